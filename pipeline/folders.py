"""Folders that captures are read from: on disk, or on object storage; what is listed and read is the same.

    entries(prefix)               one level: names of subfolders, and (name, bytes) of files, both sorted
    read(name, max_bytes)         a whole file
    read_ranges(name, ...)        parts of a file: what lies in a zip is read without the rest of it

Names are relative, with forward slashes. On disk they may hold bytes that are not UTF-8, as surrogates (PEP 383).
Nothing is written here. Ranges cost one request each on storage, and the listing of a folder one request a thousand
names, so callers ask for few and large ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError

from pipeline.backends import short_error
from pipeline.store import MissingObjectError, Store, StoreError, open_store
from pipeline.types import AssetError, FailureKind, UserError


class Folder(Protocol):
    """A folder to read from. Safe to share between threads.

    Attributes:
        url: for messages.
        is_remote: whether a read is a request, so that reading ahead pays.
    """

    url: str
    is_remote: bool

    def entries(self, prefix: str) -> tuple[list[str], list[tuple[str, int]]]:
        """Return what lies directly in `prefix` ("" or "a/b/"): subfolders, and (name, bytes) of files; both sorted.

        Names are relative to the prefix. A prefix that is not there is empty.

        Raises:
            AssetError: ACCESS_DENIED or NETWORK.
        """
        ...

    def size(self, name: str) -> int:
        """Return the length of a file in bytes; AssetError NOT_FOUND where there is none."""
        ...

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return a whole file.

        Raises:
            AssetError: NOT_FOUND, ACCESS_DENIED, TOO_LARGE, or NETWORK.
        """
        ...

    def read_ranges(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Return parts of a file, each of the length asked for.

        Raises:
            AssetError: NOT_FOUND, ACCESS_DENIED, TRUNCATED where the file ends before, or NETWORK.
        """
        ...


def open_folder(url: str, key: str) -> Folder:
    """Open a folder by path or URL; on storage a missing folder cannot be told from an empty one.

    Args:
        key: of the spec, for the message, such as "source.path".

    Raises:
        UserError: if it is not there, or the URL is malformed.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("", "file"):
        path = Path(urlsplit(url).path if scheme else url).expanduser().absolute()
        if not path.is_dir():
            found = "is not a folder" if path.exists() else "does not exist"
            raise UserError(f"{key} {url!r} {found}; give a folder, or an s3://, gs:// or az:// URL")
        return DiskFolder(path)
    try:
        return StoreFolder(open_store(url, must_exist=True))
    except UserError as error:
        raise UserError(f"{key}: {str(error).removeprefix('corpus ')}") from None


class DiskFolder:
    """A folder on this machine, or on storage that it mounts."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.url = str(path)
        self._root = path

    def entries(self, prefix: str) -> tuple[list[str], list[tuple[str, int]]]:
        """List one level; links are followed, since a user's own may lead to another disk."""
        folders, files = list[str](), list[tuple[str, int]]()
        try:
            with os.scandir(self._root / prefix) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file():
                        files.append((entry.name, entry.stat().st_size))
        except (FileNotFoundError, NotADirectoryError):
            return [], []
        except OSError as error:
            raise _refusal(self._root / prefix, error) from None
        return sorted(folders), sorted(files)

    def size(self, name: str) -> int:
        """Return the length of a file in bytes."""
        try:
            return (self._root / name).stat().st_size
        except OSError as error:
            raise _refusal(self._root / name, error) from None

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return a whole file."""
        try:
            with (self._root / name).open("rb", buffering=0) as file:
                data = file.read(max_bytes + 1) or b""
                while len(data) <= max_bytes and (piece := file.read(max_bytes + 1 - len(data))):
                    data += piece
        except OSError as error:
            raise _refusal(self._root / name, error) from None
        if len(data) > max_bytes:
            raise AssetError(FailureKind.TOO_LARGE, f"{name} has more than the {max_bytes} bytes that are allowed")
        return data

    def read_ranges(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Return parts of a file."""
        try:
            fd = os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return [_read_at(fd, start, length, name) for start, length in zip(starts, lengths, strict=True)]
            finally:
                os.close(fd)
        except OSError as error:
            raise _refusal(self._root / name, error) from None


class StoreFolder:
    """A folder on object storage."""

    is_remote = True

    def __init__(self, store: Store) -> None:
        self.url = store.url
        self._store = store

    def entries(self, prefix: str) -> tuple[list[str], list[tuple[str, int]]]:
        """List one level, by the store's own notion of folders: what lies deeper costs nothing."""
        try:
            found = obstore.list_with_delimiter(self._store.backend, prefix or None)
        except (BaseError, OSError) as error:
            raise AssetError(
                FailureKind.NETWORK, f"{self.url}: listing {prefix!r} failed: {short_error(error)}"
            ) from None
        folders = sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])
        return folders, sorted((item["path"].rpartition("/")[2], item["size"]) for item in found["objects"])

    def size(self, name: str) -> int:
        """Return the length of an object in bytes."""
        try:
            size = self._store.size(name)
        except StoreError as error:
            raise AssetError(FailureKind.NETWORK, str(error)) from None
        if size is None:
            raise AssetError(FailureKind.NOT_FOUND, f"{self.url}: there is no {name}")
        return size

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return a whole object; callers know its size from a listing, so that one over the limit is not asked for."""
        try:
            return self._store.get(name, max_bytes)
        except MissingObjectError as error:
            raise AssetError(FailureKind.NOT_FOUND, str(error)) from None
        except StoreError as error:
            raise AssetError(FailureKind.NETWORK, str(error)) from None

    def read_ranges(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Return parts of an object."""
        try:
            return self._store.get_ranges(name, starts, lengths)
        except MissingObjectError as error:
            raise AssetError(FailureKind.NOT_FOUND, str(error)) from None
        except StoreError as error:
            raise AssetError(FailureKind.NETWORK, str(error)) from None


def _read_at(fd: int, start: int, length: int, name: str) -> bytes:
    data = os.pread(fd, length, start)
    while len(data) < length:
        piece = os.pread(fd, length - len(data), start + len(data))
        if not piece:
            raise AssetError(
                FailureKind.TRUNCATED, f"{name} ends at byte {start + len(data)}; {start + length} were expected"
            )
        data += piece
    return data


def _refusal(path: Path, error: OSError) -> AssetError:
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return AssetError(FailureKind.NOT_FOUND, f"{path} is not there, or not a file")
    if isinstance(error, PermissionError):
        return AssetError(FailureKind.ACCESS_DENIED, f"{path} cannot be read: permission denied")
    return AssetError(FailureKind.NETWORK, f"{path} cannot be read: {error.strerror or error}")
