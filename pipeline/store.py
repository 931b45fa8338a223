"""Object storage: the only code that writes to a corpus.

Everything below rests on one operation, create-if-absent, and on its four outcomes:

    reply            then look                        outcome
    created          -                                CREATED
    already exists   bytes there are ours             SAME      (our reply was lost, or an equal attempt won)
    already exists   bytes differ                     CONFLICT  (read the winner, adopt it)
    lost, 5xx, cut   read back: ours / other / none   CREATED / CONFLICT / try again, then UnknownOutcome

Nothing is ever overwritten and nothing is deleted on doubt. A store that accepts the precondition and ignores it would
break every promise at once, so `probe` creates a random key twice at start and refuses the store unless the second is
turned down. Retries with backoff and jitter happen in obstore's client, configured here and nowhere else.

Any URL that obstore opens is a corpus: a folder, `s3://`, `gs://`, `az://`, `memory://`. Endpoint, region and
credentials come from the usual environment variables (AWS_ENDPOINT_URL, AWS_REGION, ...) and are never logged.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import LocalStore, MemoryStore, from_url

from pipeline.types import UserError

RETRY_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 120.0
MAX_CREATE_TRIES = 3

_memory_stores: dict[str, Any] = {}  # memory:// lives as long as the process: for tests of one process


class StoreError(Exception):
    """The store did not do what was asked: names the key and the operation."""


class MissingObjectError(StoreError, FileNotFoundError):
    """There is no object of that key."""


class UnknownOutcomeError(StoreError):
    """A conditional create whose reply was lost and whose result could not be read back. Nothing was deleted."""


class Outcome(Enum):
    """What became of a create-if-absent."""

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
        """
        for attempt in range(MAX_CREATE_TRIES):
            try:
                obstore.put(self.backend, key, data, mode="create", use_multipart=False)
                return Outcome.CREATED
            except (AlreadyExistsError, PreconditionError):
                return Outcome.SAME if self.get(key) == data else Outcome.CONFLICT
            except (BaseError, OSError) as error:
                lost = error
            found = self._read_back(key, lost)
            if found is not None:
                return Outcome.CREATED if found == data else Outcome.CONFLICT
            time.sleep(0.2 * 2**attempt)
        raise StoreError(f"{self.url}: creating {key} failed {MAX_CREATE_TRIES} times: {_short(lost)}") from lost

    def _read_back(self, key: str, lost: Exception) -> bytes | None:
        try:
            return self.get(key)
        except FileNotFoundError:
            return None
        except StoreError as error:
            raise UnknownOutcomeError(
                f"{self.url}: whether {key} was created is not known ({_short(lost)}; reading back: {error}). "
                "Nothing was deleted; run the same command again."
            ) from lost

    def create_blob(self, key: str, path: Path, num_bytes: int) -> Outcome:
        """Put a content-addressed file if absent. An object of that name and length is taken for it."""
        try:
            obstore.put(self.backend, key, path, mode="create", use_multipart=False)
            return Outcome.CREATED
        except (AlreadyExistsError, PreconditionError):
            pass
        except (BaseError, OSError) as error:
            if self.size(key) is None:
                raise StoreError(f"{self.url}: storing {key} ({num_bytes} bytes) failed: {_short(error)}") from error
        found = self.size(key)
        if found != num_bytes:
            raise StoreError(f"{self.url}: {key} is there with {found} bytes instead of {num_bytes}; it was left alone")
        return Outcome.SAME

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        """Return a whole object.

        Raises:
            FileNotFoundError: if there is none.
            StoreError: if it cannot be read, is cut short, or is larger than `max_bytes`.
        """
        try:
            result = obstore.get(self.backend, key)
            size = result.meta["size"]
            if max_bytes is not None and size > max_bytes:
                raise StoreError(f"{self.url}: {key} has {size} bytes; at most {max_bytes} are allowed")
            data = bytes(result.bytes())
        except (NotFoundError, FileNotFoundError):
            raise MissingObjectError(f"{self.url}: there is no {key}") from None
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.url}: reading {key} failed: {_short(error)}") from error
        if len(data) != size:
            raise StoreError(f"{self.url}: {key} gave {len(data)} of {size} bytes")
        return data

    def get_ranges(
        self, key: str, starts: Sequence[int], lengths: Sequence[int], max_gap_bytes: int = 4096
    ) -> list[bytes]:
        """Return several byte ranges of an object; those at most `max_gap_bytes` apart come in one request.

        Raises:
            FileNotFoundError, StoreError: as `get`; also if a range comes back with another length.
        """
        try:
            parts = obstore.get_ranges(self.backend, key, starts=starts, lengths=lengths, coalesce=max_gap_bytes)
        except (NotFoundError, FileNotFoundError):
            raise MissingObjectError(f"{self.url}: there is no {key}") from None
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.url}: reading ranges of {key} failed: {_short(error)}") from error
        data = [bytes(part) for part in parts]
        if [len(part) for part in data] != list(lengths):
            raise StoreError(f"{self.url}: ranges of {key} came back with other lengths than asked for")
        return data

    def size(self, key: str) -> int | None:
        """Return the length of an object in bytes, or None if there is none."""
        try:
            return int(obstore.head(self.backend, key)["size"])
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.url}: looking for {key} failed: {_short(error)}") from error

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects under a prefix such as "receipts/". For writers and tools: readers never list."""
        try:
            for chunk in obstore.list(self.backend, prefix, chunk_size=1000):
                for item in chunk:
                    yield ObjectInfo(
                        key=item["path"], num_bytes=item["size"], modified_s=item["last_modified"].timestamp()
                    )
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.url}: listing {prefix} failed: {_short(error)}") from error

    def sha256(self, key: str) -> tuple[str, int]:
        """Return digest and length of an object, read in pieces."""
        digest, count = hashlib.sha256(), 0
        try:
            for chunk in obstore.get(self.backend, key).stream(min_chunk_size=8 * 2**20):
                digest.update(chunk)
                count += len(chunk)
        except (NotFoundError, FileNotFoundError):
            raise MissingObjectError(f"{self.url}: there is no {key}") from None
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.url}: reading {key} failed: {_short(error)}") from error
        return digest.hexdigest(), count

    def probe(self) -> None:
        """Check that the store can be written and honours create-if-absent; refuse it otherwise.

        Raises:
            UserError: in one line, with what to do.
        """
        key = f".probe/{os.urandom(12).hex()}"
        try:
            if self.create(key, b"first") is not Outcome.CREATED or self.get(key) != b"first":
                raise UserError(f"corpus {self.url}: the store lost or changed a probe object; use another store")
            honoured = self.create(key, b"second") is Outcome.CONFLICT and self.get(key) == b"first"
            obstore.delete(self.backend, key)
        except (StoreError, BaseError, OSError, NotImplementedError) as error:  # the last: a plain web server
            raise UserError(
                f"corpus {self.url}: the store cannot be reached or written ({_short(error)}); "
                "check the URL, its endpoint and region, and the credentials in the environment"
            ) from error
        if not honoured:
            raise UserError(
                f"corpus {self.url}: the store ignores create-if-absent (If-None-Match), on which every promise rests; "
                "use a store that honours it, such as a local folder, S3, GCS or Azure Blob"
            )


def open_store(url: str, *, must_exist: bool = False) -> Store:
    """Open a corpus by URL or folder path. Creates a missing folder unless `must_exist`.

    Raises:
        UserError: if the URL is malformed, or the folder is missing or not a folder.
    """
    if not url.strip():
        raise UserError("CORPUS is empty; give a folder, or an s3://, gs:// or az:// URL")
    scheme = urlsplit(url).scheme
    if scheme == "memory":
        return Store(url, _memory_stores.setdefault(url, MemoryStore()), None)
    if scheme in ("", "file"):
        return _open_folder(url, Path(urlsplit(url).path if scheme else url), must_exist)
    options: dict[str, Any] = {"connect_timeout": f"{CONNECT_TIMEOUT_S}s", "timeout": f"{REQUEST_TIMEOUT_S}s"}
    if scheme == "http" or os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", "")).startswith("http://"):
        options["allow_http"] = True
    retry: dict[str, Any] = {
        "max_retries": 8,
        "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S),
        "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2},
    }
    try:
        backend = from_url(url, client_options=options, retry_config=retry)  # type: ignore[call-overload]
    except (BaseError, OSError, ValueError) as error:
        raise UserError(
            f"corpus {url}: cannot be opened: {_short(error)}; use a folder, s3://, gs://, az:// or memory://"
        ) from None
    return Store(url, backend, None)


def _open_folder(url: str, path: Path, must_exist: bool) -> Store:
    root = path.expanduser().absolute()
    if not root.is_dir():
        if must_exist or root.exists():
            found = "is not a folder" if root.exists() else "does not exist"
            raise UserError(f"corpus {url}: {found}; give the folder or URL that `make render CORPUS=` wrote to")
        try:
            root.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"corpus {url}: the folder cannot be made: {error.strerror}") from None
    return Store(str(root), LocalStore(str(root)), root)


def _short(error: BaseException) -> str:
    """Return the first line of an error, bounded: obstore's own texts run over pages with a debug dump."""
    text = str(error).strip() or type(error).__name__
    return text.split("\n", 1)[0].split("Debug source:", 1)[0].strip()[:300]
