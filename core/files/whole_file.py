"""Writing files so that they appear whole or not at all."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


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
    partial = target.with_name(f".{os.getpid()}-{threading.get_ident()}.partial.{target.name}")
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


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; it appears whole or not at all.

    Raises:
        OSError: The folder is missing, read-only or full.
    """
    if not Path(path).resolve().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with whole_file(path) as partial:
        # safetensors lets nobody but the owner read; new files have the mode that the user's mask gives.
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(tensors, partial, metadata=metadata)
            partial.chmod(mode)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from error


def writable_folder(path: Path) -> Path:
    """A folder that can be written; made if it does not exist."""
    path.mkdir(parents=True, exist_ok=True)
    with whole_file(path / ".writable") as probe:
        probe.write_text("")
    (path / ".writable").unlink()
    return path
