"""Files kept by content in a folder of one's own, safe with many processes at once and after a kill at any moment."""

import hashlib
import io
import os
import secrets
import stat
import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stepgraph.env import get_logger
from stepgraph.errors import CompileError

SUFFIX = ".bundle"
DIGEST = hashlib.sha256().digest_size
# What a killed process has left half-written is removed after this many seconds.
STALE = 3600


@dataclass(frozen=True)
class Entry:
    """One kept bundle: its key, its bytes, and when it was last used (seconds since the epoch)."""

    key: str
    bytes: int
    used: float


class Store:
    """Bundles of small files by key, in one folder.

    A bundle is one file: the SHA-256 of the rest, then a zip. It is written under another name and renamed, so that a reader
    sees all of it or nothing; one that is damaged is removed when it is read. No locks are held: two processes that make the
    same bundle write the same thing, and the last one stays. Beyond the limit, bundles that were not used for longest go.

    Args:
        folder: Made if it is missing, for its owner alone.
        limit: Most bytes of all bundles.

    Raises:
        CompileError: The folder is a link, belongs to somebody else, or others may write or read it.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        ours = not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()
        if not stat.S_ISDIR(facts.st_mode) or not ours or facts.st_mode & 0o077:
            raise CompileError(
                f"{folder} holds compiled code, so it must be a folder of your own that nobody else may enter (mode 0700); "
                f"it has owner {facts.st_uid} and mode {stat.S_IMODE(facts.st_mode):04o}: chmod 700 it, or remove it"
            )

    def get(self, key: str) -> dict[str, bytes] | None:
        """The files of a bundle; None where there is none that is whole."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            files = _unpacked(data)
        except (ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
            get_logger("store").warning("%s is damaged (%s); it is removed and made anew", path, error)
            _remove(path)
            return None
        try:
            os.utime(path)
        except OSError:
            get_logger("store").debug("%s was removed meanwhile", path)
        return files

    def put(self, key: str, files: Mapping[str, bytes]) -> None:
        """Keep a bundle; a folder that cannot be written (full, read-only) is a warning."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, data in sorted(files.items()):
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
        body = packed.getvalue()
        partial = self.folder / f".{os.getpid()}-{secrets.token_hex(8)}.partial"
        try:
            partial.write_bytes(hashlib.sha256(body).digest() + body)
            partial.replace(self._path(key))
        except OSError as error:
            get_logger("store").warning("%s is not kept: %s", key, error)
            _remove(partial)
        if sum(entry.bytes for entry in self.entries()) > self.limit:
            self.prune()

    def entries(self) -> list[Entry]:
        """All bundles, last used first."""
        bundles = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                facts = path.stat()
            except OSError:
                continue
            bundles.append(Entry(path.name.removesuffix(SUFFIX), facts.st_size, facts.st_mtime))
        return sorted(bundles, key=lambda entry: (-entry.used, entry.key))

    def prune(self, limit: int | None = None, verify: bool = False) -> int:
        """Remove what goes beyond a limit of bytes, damaged bundles where asked, and what killed processes have left.

        Returns:
            How many files were removed.
        """
        removed, size = 0, 0
        for path in self.folder.glob(".*.partial"):
            removed += _remove(path, older_than=0 if limit == 0 else STALE)
        for entry in self.entries():
            path = self._path(entry.key)
            size += entry.bytes
            if size > (self.limit if limit is None else limit) or (verify and not _whole(path)):
                removed += _remove(path)
                size -= entry.bytes
        return removed

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


def _unpacked(data: bytes) -> dict[str, bytes]:
    if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:
        raise ValueError("its hash differs")
    with zipfile.ZipFile(io.BytesIO(data[DIGEST:])) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _whole(path: Path) -> bool:
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[DIGEST:]).digest() == data[:DIGEST]


def _remove(path: Path, older_than: float = 0) -> int:
    try:
        if older_than and time.time() - path.stat().st_mtime < older_than:
            return 0
        path.unlink()
    except OSError:
        return 0
    return 1
