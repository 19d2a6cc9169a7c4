"""Files that travel together: a folder or one .zip, read without trusting a byte and written whole or not at all."""

import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from stepgraph.errors import ArgumentError, FileFormatError, PlanError
from stepgraph.files.whole_file import whole_file, whole_folder

# Of one file; beyond it nobody has written an artifact.
LARGEST_FILE = 2**37
MOST_FILES = 4096
# Of all but weights and factors, which are read into memory as they are.
CHUNK = 2**20


class Container:
    """The files of an artifact, by name, without folders. Nothing is ever unpacked.

    Args:
        path: A folder, or a zip file.

    Raises:
        PlanError: There is neither, or the zip's own structure is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        if not self.path.exists():
            raise PlanError(f"no artifact at {path}; make one with Executable.save (stepgraph compile --save)")
        if self.path.is_dir():
            return
        if not self.path.is_file():
            raise ArgumentError(f"{path} is neither a folder nor a file; expected an artifact")
        try:
            self._zip = zipfile.ZipFile(self.path)
        except DAMAGED as error:
            raise FileFormatError(f"{path}: not a complete zip file ({_said(error)}); save the artifact again") from error
        self._refuse_entries(self._zip.infolist())

    def close(self) -> None:
        """Let go of the zip file."""
        if self._zip is not None:
            self._zip.close()

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str, limit: int = LARGEST_FILE) -> bytes:
        """The contents of a file, of at most `limit` bytes.

        Raises:
            PlanError: It is missing, larger, a link, or damaged.
        """
        try:
            data = self._of_folder(name, limit) if self._zip is None else self._of_zip(self._zip, name, limit)
        except PlanError:
            raise
        except FileNotFoundError as error:
            raise FileFormatError(f"{self.path}: the file {name} is missing; save the artifact again") from error
        except (*DAMAGED, MemoryError) as error:
            raise FileFormatError(f"{self.path}: {name} cannot be read ({_said(error)}); save the artifact again") from error
        if len(data) > limit:
            raise FileFormatError(f"{self.path}: {name} has more than the {limit} bytes that it may have")
        return data

    def _of_folder(self, name: str, limit: int) -> bytes:
        """Neither a link is followed nor a pipe waited for."""
        try:
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if (self.path / name).is_symlink():
                raise FileFormatError(f"{self.path}: {name} is a symbolic link; artifacts have none") from error
            raise
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileFormatError(f"{self.path}: {name} is not a regular file")
            return file.read(limit + 1)

    def _of_zip(self, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
        """Read piece by piece, so that what says it is small and is not ends at the limit."""
        try:
            entry = archive.getinfo(name)
        except KeyError as error:
            raise FileNotFoundError(name) from error
        pieces, size = [], 0
        with archive.open(entry) as file:
            while size <= limit and (piece := file.read(CHUNK)):
                pieces.append(piece)
                size += len(piece)
        return b"".join(pieces)

    def _refuse_entries(self, entries: list[zipfile.ZipInfo]) -> None:
        """What no artifact holds: names with folders in them, links, twice the same name, ciphers, bombs."""
        if len(entries) > MOST_FILES:
            raise FileFormatError(f"{self.path}: {len(entries)} files; an artifact has at most {MOST_FILES}")
        names = [entry.filename for entry in entries]
        if len(set(names)) < len(names):
            raise FileFormatError(f"{self.path}: a file is in the zip twice; save the artifact again")
        for entry in entries:
            if not plain_name(entry.filename) or entry.is_dir() or entry.filename != entry.orig_filename:
                raise FileFormatError(f"{self.path}: the zip holds {entry.orig_filename!r}; artifacts have no folders or paths")
            if stat.S_ISLNK(entry.external_attr >> 16):
                raise FileFormatError(f"{self.path}: {entry.filename} is a symbolic link; artifacts have none")
            if entry.filename.endswith(".safetensors") and entry.compress_type != zipfile.ZIP_STORED:
                raise FileFormatError(f"{self.path}: {entry.filename} is packed; tensors are stored as they are")
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise FileFormatError(f"{self.path}: {entry.filename} is encrypted or packed in a way that is not known here")


DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError, OSError, RuntimeError, EOFError, OverflowError)


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__


def plain_name(name: str) -> bool:
    """Whether a name is of one file beside others: letters, digits, dots, dashes, none of them first but a letter."""
    allowed = all(c.isascii() and (c.isalnum() or c in "._-") for c in name)
    return bool(name) and len(name) <= 128 and allowed and name[0].isalpha()


def write_container(path: str | Path, files: Mapping[str, Path]) -> None:
    """Write files as a zip (where `path` ends in .zip) or as a folder; it appears whole or not at all.

    An artifact that stands at `path` is replaced.

    Raises:
        PlanError: Something else than an artifact stands there.
        OSError: The place cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() == ".zip":
        if target.is_dir():
            raise ArgumentError(f"{path} is a folder; a name that ends in .zip is for a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as partial:
            _write_zip(partial, files)
        return
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / "manifest.json").is_file()):
        raise ArgumentError(f"{path} is there and is no artifact; choose another place, or remove it")
    with whole_folder(target) as folder:
        for name, source in files.items():
            shutil.copyfile(source, folder / name)


def _write_zip(path: Path, files: Mapping[str, Path]) -> None:
    """The same files make the same zip. Tensors do not shrink, so that only text is packed."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, source in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(".safetensors") else zipfile.ZIP_DEFLATED
            entry.file_size = source.stat().st_size
            with source.open("rb") as read, archive.open(entry, "w") as written:
                shutil.copyfileobj(read, written, CHUNK)
