"""Writing files and folders so that they appear whole or not at all."""

import errno
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stepgraph.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` if the block succeeds and is removed if it fails.

    A link stays a link to the file that is replaced, which keeps its permissions; a device or pipe is written to directly.

    Raises:
        OSError: The folder is missing, read-only or full; what stood at `path` is untouched.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
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
        # Where a file stands in place of the folder, there is nothing to remove.
        with suppress(NotADirectoryError):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it replaces `path` if the block succeeds and is removed if it fails.

    What stands at `path` is renamed before the new folder is; killed between the two, both lie beside `path` under names that
    end in .old and .partial.

    Raises:
        OSError: The place cannot be written; what stood at `path` is untouched.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    partial.mkdir()
    try:
        yield partial
        _replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(partial: Path, target: Path) -> None:
    old = partial.with_suffix(".old")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


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


def save_figure(path: str | Path, figure: "Figure", dpi: int = 120) -> None:
    """Write a picture in the format that the path's ending says; it appears whole or not at all.

    Raises:
        ArgumentError: The ending is none of a picture's.
        OSError: The folder is missing, read-only or full.
    """
    ending, known = Path(path).suffix.removeprefix("."), sorted(figure.canvas.get_supported_filetypes())
    if ending.lower() not in known:
        raise ArgumentError(f"{path} does not end as a picture does; expected .png, or one of {', '.join(known)}")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=dpi)


def writable_folder(path: Path) -> Path:
    """A folder that can be written; made if it does not exist."""
    path.mkdir(parents=True, exist_ok=True)
    with whole_file(path / ".writable") as probe:
        probe.write_text("")
    (path / ".writable").unlink()
    return path
