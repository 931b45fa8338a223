"""Object storage: the only code that writes to a corpus.

Everything below rests on one operation, create-if-absent, and on its four outcomes:

    reply            then look                        outcome
    created          -                                CREATED
    already exists   bytes there are ours             SAME      (our reply was lost, or an equal attempt won)
    already exists   bytes differ                     CONFLICT  (read the winner, adopt it)
    already exists   nothing there                    try again (S3 says 409 where two writers meet)
    lost, 5xx, cut   read back: ours / other / none   CREATED / CONFLICT / try again
    any of these     cannot be read back              UnknownOutcomeError

Nothing is ever overwritten and nothing is deleted on doubt. A store that accepts the precondition and ignores it would
break every promise at once, so `probe` creates a random key twice at start and refuses the store unless the second is
turned down. `pipeline.backends` tells what obstore tries again by itself; the loop in `_create` does the rest, and
there is no third place.

Blobs of MULTIPART_BYTES and more go to a remote store in parts, so that a shard is neither read into memory whole nor
lost to one bad connection. S3 could complete such an upload on a condition, but obstore offers none: a blob is looked
for first, and two writers that both find nothing put the same bytes under the name that is their digest. An upload that
fails is aborted; what a killed writer leaves is found by `sweep_uploads`.

Any URL that obstore opens is a corpus: a folder (`pipeline.folder` writes it), `s3://`, `gs://`, `az://`, `memory://`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, MemoryStore

from pipeline import folder
from pipeline.backends import open_backend, short_error, shown_url
from pipeline.types import UserError

MAX_CREATE_TRIES = 4
CREATE_BACKOFF_S = 0.2
MULTIPART_BYTES = 32 * 2**20
PART_BYTES = 16 * 2**20
READ_BYTES = 32 * 2**20
_UPLOAD_THREADS = 4
_READ_THREADS = 8
_PROBE = ".probe/"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_KEY = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")

_TAKEN = (AlreadyExistsError, PreconditionError, FileExistsError)
_ABSENT = (NotFoundError, FileNotFoundError)
_REFUSED = (PermissionDeniedError, UnauthenticatedError, InvalidPathError, NotSupportedError, ValueError)
_ANY = (BaseError, OSError)

_memory_stores: dict[str, Any] = {}  # memory:// lives as long as the process: for tests of one process
_pools: dict[int, ThreadPoolExecutor] = {}  # by process id: threads do not survive a fork


class StoreError(Exception):
    """The store did not do what was asked: names the key and the operation."""


class MissingObjectError(StoreError, FileNotFoundError):
    """There is no object of that key."""


class UnknownOutcomeError(StoreError):
    """A conditional create whose reply was lost and whose result could not be read back. Nothing was deleted."""


class Outcome(Enum):
    """What became of a create-if-absent; the fourth outcome, unknown, is UnknownOutcomeError."""

    CREATED = "created"
    SAME = "same"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One object of a listing."""

    key: str
    num_bytes: int
    modified_s: float


class Store:
    """A corpus on object storage. Safe to share between threads; pickles as its URL alone."""

    def __init__(self, url: str, backend: Any, local_root: Path | None) -> None:
        self.url = url
        self.backend = backend
        self.local_root = local_root

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.url,)

    def create(self, key: str, data: bytes) -> Outcome:
        """Create an object unless one is there; see the module's table.

        Raises:
            UnknownOutcomeError: if neither the reply nor a read-back tells what happened.
            StoreError: if the store refuses, or went on failing and holds nothing of that key.
        """
        return self._create(key, lambda: self._put(key, data), lambda: self.get(key) == data)

    def create_blob(self, key: str, path: Path, num_bytes: int) -> Outcome:
        """Put a content-addressed file if absent. What is found under its name is read and compared.

        Args:
            path: the file, which nobody may change afterwards: a folder may link it rather than copy it.

        Returns:
            CREATED or SAME.

        Raises:
            UnknownOutcomeError, StoreError: as `create`; also if other bytes stand under that name.
        """
        digest: list[str] = []

        def same() -> bool:
            if self.size(key) not in (None, num_bytes):
                return False
            found = self.sha256(key)
            digest[:] = digest or [_sha256_of(path)]
            return found == (digest[0], num_bytes)

        outcome = self._create(key, lambda: self._put_file(key, path, num_bytes), same)
        if outcome is Outcome.CONFLICT:
            raise StoreError(
                f"{self.url}: {key} is there with {self.size(key)} bytes that are not the {num_bytes} of its name; "
                "it was left alone: move it away and run the same command again"
            )
        return outcome

    def _put(self, key: str, data: bytes) -> None:
        if self.local_root is not None:
            folder.create_bytes(self._path(key), data)
        else:
            obstore.put(self.backend, key, data, mode="create", use_multipart=False)

    def _put_file(self, key: str, path: Path, num_bytes: int) -> None:
        if self.local_root is not None:
            folder.create_file(self._path(key), path, num_bytes)
        elif num_bytes < MULTIPART_BYTES or isinstance(self.backend, MemoryStore):
            obstore.put(self.backend, key, path, mode="create", use_multipart=False)
        elif self.size(key) is not None:
            raise AlreadyExistsError(key)
        else:
            obstore.put(
                self.backend, key, path, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=_UPLOAD_THREADS
            )
            if (found := self.size(key)) != num_bytes:
                raise OSError(f"{found} of {num_bytes} bytes arrived")

    def _path(self, key: str) -> Path:
        assert self.local_root is not None
        if not _KEY.fullmatch(key) or ".." in key.split("/"):
            raise InvalidPathError(f"{key!r} is not a key")
        return self.local_root / key

    def _create(self, key: str, put: Callable[[], None], same: Callable[[], bool]) -> Outcome:
        """Run `put` until it or `same`, which reads back and compares, tells what happened."""
        tries = 1 if self.local_root is not None else MAX_CREATE_TRIES
        error: Exception | None = None
        for attempt in range(tries):
            if attempt:
                time.sleep(random.uniform(0.5, 1.0) * CREATE_BACKOFF_S * 3 ** (attempt - 1))
            try:
                put()
                return Outcome.CREATED
            except _REFUSED as refusal:
                raise StoreError(f"{self.url}: creating {key} was refused: {short_error(refusal)}") from None
            except (*_ANY, StoreError) as lost:
                error = lost
            ours = self._is_ours(key, same, error)
            if ours is not None:
                taken = isinstance(error, _TAKEN)
                return (Outcome.SAME if taken else Outcome.CREATED) if ours else Outcome.CONFLICT
        assert error is not None
        times = f" {tries} times" if tries > 1 else ""
        raise StoreError(f"{self.url}: creating {key} failed{times}: {short_error(error)}") from None

    def _is_ours(self, key: str, same: Callable[[], bool], lost: Exception) -> bool | None:
        try:
            return same()
        except FileNotFoundError:
            return None
        except StoreError as error:
            raise UnknownOutcomeError(
                f"{self.url}: whether {key} was created is not known ({short_error(lost)}; reading back: {error}). "
                "Nothing was deleted; run the same command again."
            ) from None

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return a whole object.

        Raises:
            FileNotFoundError: if there is none.
            StoreError: if it cannot be read, is cut short, or is larger than `max_bytes`.
        """
        with self._reading(key):
            result = obstore.get(self.backend, key)
            size = result.meta["size"]
            if max_bytes is not None and size > max_bytes:
                raise StoreError(f"{self.url}: {key} has {size} bytes; at most {max_bytes} are allowed")
            data = bytes(result.bytes())
        if len(data) != size:
            raise StoreError(f"{self.url}: {key} gave {len(data)} of {size} bytes")
        return data

    def get_ranges(
        self, key: str, starts: Sequence[int], lengths: Sequence[int], max_gap_bytes: int = 4096
    ) -> list[bytes]:
        """Return several byte ranges of an object; those at most `max_gap_bytes` apart come in one request.

        Joined here and not by obstore, whose own joining aborts with a panic where a store sends less than asked for.

        Raises:
            FileNotFoundError, StoreError: as `get`; also if a range comes back with another length.
        """
        spans = join_ranges(starts, lengths, max_gap_bytes)
        if len(spans) > 1 and self.local_root is None:
            parts = list(_pool().map(lambda span: self._get_range(key, *span), spans))
        else:
            parts = [self._get_range(key, *span) for span in spans]
        out = []
        for start, length in zip(starts, lengths, strict=True):
            part, (begin, _) = next((p, s) for p, s in zip(parts, spans) if s[0] <= start and start + length <= s[1])
            out.append(part[start - begin : start - begin + length])
        return out

    def _get_range(self, key: str, start: int, end: int) -> bytes:
        if start == end:
            return b""
        with self._reading(key):
            data = bytes(obstore.get_range(self.backend, key, start=start, end=end))
        if len(data) != end - start:
            raise StoreError(f"{self.url}: {key} gave {len(data)} bytes of its bytes {start} to {end}")
        return data

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except _ABSENT as error:
            if isinstance(error, StoreError):
                raise
            raise MissingObjectError(f"{self.url}: there is no {key}") from None
        except (*_ANY, ValueError) as error:  # ValueError: a key that is not one
            raise StoreError(f"{self.url}: reading {key!r} failed: {short_error(error)}") from None

    def size(self, key: str) -> int | None:
        """Return the length of an object in bytes, or None if there is none."""
        try:
            with self._reading(key):
                return int(obstore.head(self.backend, key)["size"])
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects under a prefix such as "receipts/". For writers and tools: readers never list."""
        try:
            for chunk in obstore.list(self.backend, prefix, chunk_size=1000):
                for item in chunk:
                    yield ObjectInfo(
                        key=item["path"], num_bytes=item["size"], modified_s=item["last_modified"].timestamp()
                    )
        except _ANY as error:
            raise StoreError(f"{self.url}: listing {prefix} failed: {short_error(error)}") from None

    def sha256(self, key: str) -> tuple[str, int]:
        """Return digest and length of an object, read in pieces that each have their own request and time limit."""
        size = self.size(key)
        if size is None:
            raise MissingObjectError(f"{self.url}: there is no {key}")
        digest = hashlib.sha256()
        for start in range(0, size, READ_BYTES):
            digest.update(self._get_range(key, start, min(start + READ_BYTES, size)))
        return digest.hexdigest(), size

    def sweep_uploads(self, older_than_s: float, *, delete: bool = False) -> Sequence[ObjectInfo]:
        """Return what killed writers left half-done, and remove it if `delete`.

        That is: unfinished multipart uploads on S3, temporary files in a folder, probe objects everywhere. GCS and
        Azure cannot tell; their buckets want a lifecycle rule.

        Args:
            older_than_s: spare what is younger; must exceed the longest upload.

        Returns:
            One entry each; `num_bytes` of an unfinished upload is 0, since only its parts know.

        Raises:
            StoreError: if it cannot be listed or removed.
        """
        from pipeline import uploads  # its HTTP client takes 24 ms to load, and no reader needs it

        old = time.time() - older_than_s
        found = [item for item in self.list(_PROBE) if item.modified_s <= old]
        try:
            for item in found if delete else ():
                with contextlib.suppress(*_ABSENT):
                    obstore.delete(self.backend, item.key)
            if self.local_root is not None:
                for path in folder.leftovers(self.local_root, older_than_s):
                    stat = path.stat()
                    key = path.relative_to(self.local_root).as_posix()
                    found.append(ObjectInfo(key=key, num_bytes=stat.st_size, modified_s=stat.st_mtime))
                    if delete:
                        path.unlink(missing_ok=True)
            elif urlsplit(self.url).scheme in ("s3", "s3a"):
                for upload in [one for one in uploads.list_uploads(self.url) if one.started_s <= old]:
                    key = upload.key.removeprefix(uploads.bucket_and_prefix(self.url)[1])
                    found.append(ObjectInfo(key=key, num_bytes=0, modified_s=upload.started_s))
                    if delete:
                        uploads.abort_upload(self.url, upload)
        except (*_ANY, uploads.UploadsError) as error:
            raise StoreError(f"{self.url}: sweeping unfinished uploads failed: {short_error(error)}") from None
        return found

    def probe(self) -> None:
        """Check that the store can be written and honours create-if-absent; refuse it otherwise.

        Raises:
            UserError: in one line, with what to do.
        """
        key = f"{_PROBE}{os.urandom(12).hex()}"
        try:
            # SAME is ours too, under a random key: the reply was lost and the client asked again.
            if self.create(key, b"first") is Outcome.CONFLICT or self.get(key) != b"first":
                raise UserError(f"corpus {self.url}: the store lost or changed a probe object; use another store")
            honoured = self.create(key, b"second") is Outcome.CONFLICT and self.get(key) == b"first"
        except (StoreError, NotImplementedError, *_ANY) as error:  # the second: a plain web server
            raise UserError(
                f"corpus {self.url}: the store cannot be reached or written ({short_error(error)}); "
                "check the URL, its endpoint and region, and the credentials in the environment"
            ) from None
        with contextlib.suppress(*_ANY):  # a writer needs no right to delete; what stays is swept with the uploads
            obstore.delete(self.backend, key)
        if not honoured:
            raise UserError(
                f"corpus {self.url}: the store ignores create-if-absent (If-None-Match), on which every promise rests; "
                "use a store that honours it, such as a local folder, S3, GCS or Azure Blob"
            )


def join_ranges(starts: Sequence[int], lengths: Sequence[int], max_gap_bytes: int) -> list[tuple[int, int]]:
    """Return the fewest (start, end) spans that cover these ranges, bridging gaps of at most `max_gap_bytes`."""
    spans: list[tuple[int, int]] = []
    for start, length in sorted(zip(starts, lengths, strict=True)):
        if spans and start <= spans[-1][1] + max_gap_bytes:
            spans[-1] = (spans[-1][0], max(spans[-1][1], start + length))
        else:
            spans.append((start, start + length))
    return spans


def _pool() -> ThreadPoolExecutor:
    pid = os.getpid()
    if pid not in _pools:
        _pools[pid] = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="store-read")
    return _pools[pid]


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_store(url: str, *, must_exist: bool = False) -> Store:
    """Open a corpus by URL or folder path. Creates a missing folder unless `must_exist`.

    Raises:
        UserError: if the URL is malformed, or the folder is missing or not a folder.
    """
    if not url.strip():
        raise UserError("CORPUS is empty; give a folder, or an s3://, gs:// or az:// URL")
    scheme = url.partition(":")[0].lower() if _SCHEME.match(url) else ""
    if scheme == "memory":
        return Store(url, _memory_stores.setdefault(url, MemoryStore()), None)
    if scheme == "file":
        path = unquote(url.partition(":")[2].removeprefix("//").removeprefix("localhost"))
        if not path.startswith("/"):
            raise UserError(f"corpus {shown_url(url)}: a file URL names a folder of this machine; write file:///PATH")
        return _open_folder(path, Path(path), must_exist)
    if not scheme:
        return _open_folder(url, Path(url), must_exist)
    return Store(url, open_backend(url), None)


def _open_folder(url: str, path: Path, must_exist: bool) -> Store:
    root = path.expanduser().absolute()
    if not root.is_dir():
        other = "give the folder or URL that `make render CORPUS=` wrote to"
        if must_exist:
            raise UserError(f"corpus {url}: {'is not a folder' if root.exists() else 'does not exist'}; {other}")
        try:
            root.mkdir(parents=True, exist_ok=True)  # tasks of an array make it at the same time
        except FileExistsError:
            raise UserError(f"corpus {url}: is not a folder; {other}") from None
        except OSError as error:
            raise UserError(f"corpus {url}: the folder cannot be made: {error.strerror}") from None
    return Store(str(root), LocalStore(str(root)), root)
