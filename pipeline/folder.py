"""Create-if-absent on a local folder, in a way that a crash of the machine cannot undo.

    write a temporary file beside the target -> fsync -> link it to its name (fails if taken) -> fsync the folder

Linking is atomic and refuses a taken name, and the name appears only when all bytes are on disk: no reader meets half a
file, no receipt outlives the shard it speaks of. A blob that lies on the same file system is linked itself, without a
copy. What a killed writer leaves is a temporary file `NAME#DIGITS`, a name that listings leave out and `leftovers`
finds. Cost: two fsyncs an object. The road not taken: obstore's own local store, which never calls fsync, reads a blob
whole into memory, and would let a power cut keep a receipt and empty its shard.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = re.compile(r"#\d+$")
_COPY_BYTES = 16 * 2**20
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES}


def create_bytes(path: Path, data: bytes) -> None:
    """Create a file that holds `data`.

    Raises:
        FileExistsError: if the name is taken; whatever stands there is left alone.
        OSError: if it cannot be written; nothing is left behind.
    """
    with _temporary(path) as (name, fd):
        _write_all(fd, data)
        os.fsync(fd)
        os.link(name, path)
    _sync_folder(path.parent)


def create_file(path: Path, source: Path, num_bytes: int) -> None:
    """Create a file with the bytes of `source`, which nobody may change afterwards: it may become the same file.

    Raises:
        FileExistsError, OSError: as `create_bytes`; also if `source` has another length.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(source, os.O_RDONLY)
    try:
        if os.fstat(fd).st_size != num_bytes:
            raise OSError(errno.EIO, f"{source} has {os.fstat(fd).st_size} bytes instead of {num_bytes}")
        os.fsync(fd)
        try:
            os.link(source, path)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            _copy(fd, path, num_bytes)
    finally:
        os.close(fd)
    _sync_folder(path.parent)


def _copy(source: int, path: Path, num_bytes: int) -> None:
    with _temporary(path) as (name, fd):
        while piece := os.read(source, _COPY_BYTES):
            _write_all(fd, piece)
        if os.fstat(fd).st_size != num_bytes:
            raise OSError(errno.EIO, f"{path} took {os.fstat(fd).st_size} of {num_bytes} bytes")
        os.fsync(fd)
        os.link(name, path)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, int]]:
    """Give a new file beside `path`, gone on leaving; linked names stay."""
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f"{path.name}#{secrets.randbits(63)}")
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield name, fd
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            name.unlink()


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def leftovers(root: Path, older_than_s: float) -> list[Path]:
    """Return temporary files of killed writers that have not been written to for so long."""
    old = time.time() - older_than_s
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            if TEMPORARY.search(name):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime <= old:
                        found.append(path)
    return sorted(found)
