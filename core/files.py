"""Writing files so that they appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` if the block succeeds and is removed if it fails.

    A link stays a link to the file that is replaced, which keeps its permissions; a device or pipe is written to directly.

    Raises:
        OSError: The folder is missing, read-only or full; what stood at `path` is untouched.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        yield target
        return
    partial = target.with_name(f".{os.getpid()}.partial.{target.name}")
    try:
        yield partial
        if target.exists():
            partial.chmod(target.stat().st_mode)
        partial.replace(target)
    except OSError as error:
        # The caller knows the file by its own name.
        if error.filename == str(partial):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)
