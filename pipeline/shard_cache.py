"""A node's cache of whole shards: one folder that any number of processes share, with a limit in bytes.

    <sha256>.tar                     a whole shard, checked against its digest
    .<sha256>.<bytes>.<random>.tmp   one on its way; its name reserves its bytes, its writer holds a lock on it
    .lock                            held while room is made and reserved, never while bytes flow
    .lock-<2 hex digits>             held by the one process that brings a shard whose digest begins so

Four promises, by locks of the kernel (flock), which end with their process however that ends:

- *Half a shard never has the name of a shard.* It is written under a temporary name, checked, and renamed.
- *What is in use is never evicted.* A reader holds a shared lock on the open file; the evictor needs an exclusive one.
- *A file that its disk has changed does no harm.* Where a reader finds a wrong checksum it reads the store, and the
  file is hashed whole; if it is no longer what was brought, it is removed.
- *The limit holds across processes.* Room is made under `.lock`, counting files and reservations alike. The least
  recently opened goes first. Where all that is there is in use, the caller is told so and reads by ranges instead.

What a killed process leaves behind, an unlocked temporary file, is removed by whoever makes room next.
Costs: one extra read of a shard's bytes for its digest, done while they arrive.
Not for network file systems without flock, nor for a folder that two corpora with different limits share.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import obstore
from obstore.exceptions import BaseError, NotFoundError

from pipeline.backends import short_error
from pipeline.shard import DamagedDataError
from pipeline.shard_reads import Buffer, ReadStats, ShardReads, ShardRef, read_file_ranges
from pipeline.store import MissingObjectError, Store, StoreError
from pipeline.types import UserError

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 * 2**20
_SHARD = re.compile(r"[0-9a-f]{64}\.tar")
_ON_ITS_WAY = re.compile(r"\.(?P<sha256>[0-9a-f]{64})\.(?P<num_bytes>[0-9]+)\.[0-9a-f]+\.tmp")
"""Names of the cache's own files. What else lies in its folder is somebody's, and is neither counted nor evicted."""


class CacheFullError(Exception):
    """There is no room: all that the cache holds is in use."""


class ShardCache:
    """The cache folder. Safe between threads and processes. `stats` counts the damaged shards that it removed."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.stats = ReadStats()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {folder}: cannot be made: {error.strerror}; name another folder") from None

    def path(self, shard: ShardRef) -> Path:
        """Return where a shard lies once it is there."""
        return self.folder / f"{shard.sha256}.tar"

    def open(self, shard: ShardRef) -> int | None:
        """Return a descriptor of a cached shard, protected from eviction until it is closed; None if it is not there.

        A file of another length than the shard's is removed, and counts as absent.
        """
        while True:
            try:
                descriptor = os.open(self.path(shard), os.O_RDONLY)
            except FileNotFoundError:
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            found = os.fstat(descriptor)
            if found.st_nlink == 0:  # evicted between the two calls
                os.close(descriptor)
                continue
            if found.st_size != shard.num_bytes:
                told = (self.path(shard), found.st_size, shard.num_bytes)
                try:
                    if self._remove_open(shard, descriptor):
                        log.warning("cache: %s has %d bytes, not %d; removed", *told)
                finally:
                    os.close(descriptor)
                return None
            with contextlib.suppress(OSError):
                os.utime(descriptor)
            return descriptor

    def bring(self, store: Store, shard: ShardRef) -> tuple[int, bool]:
        """Return a descriptor as `open` does, bringing the shard first if need be, and whether it was brought now.

        Of several processes that ask at once, one brings it and the others wait.

        Raises:
            CacheFullError: if room cannot be made.
            DamagedDataError: if the shard that arrives is not the one named.
            MissingObjectError, StoreError: if it cannot be read.
        """
        if (descriptor := self.open(shard)) is not None:
            return descriptor, False
        with self._locked(f".lock-{shard.sha256[:2]}"):
            if (descriptor := self.open(shard)) is not None:
                return descriptor, False
            self._download(store, shard)
            descriptor = self.open(shard)
            if descriptor is None:
                raise CacheFullError  # evicted at once: others need the room more
            return descriptor, True

    def remove_damaged(self, shard: ShardRef, descriptor: int) -> bool:
        """Hash an open shard and remove it if its bytes are not those of its name; returns whether it was removed.

        Raises:
            OSError: if it cannot be removed.
        """
        digest, at = hashlib.sha256(), 0
        with contextlib.suppress(OSError):  # a disk that cannot read it
            while chunk := os.pread(descriptor, CHUNK_BYTES, at):
                digest.update(chunk)
                at += len(chunk)
        if (digest.hexdigest(), at) == (shard.sha256, shard.num_bytes):
            return False
        with self._locked(f".lock-{shard.sha256[:2]}"):
            removed = self._remove_open(shard, descriptor)
        if removed:
            log.warning("cache: %s is no longer what was brought; removed, and read from the store", self.path(shard))
        return removed

    def _remove_open(self, shard: ShardRef, descriptor: int) -> bool:
        """Remove a shard's file if it is the open one, and not one that was brought again meanwhile; whether it was."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self.path(shard).stat(), os.fstat(descriptor)):
                self.path(shard).unlink()
                self.stats.count(cache_damaged=1)
                return True
        return False

    def _download(self, store: Store, shard: ShardRef) -> None:
        with self._locked(".lock"):
            self._make_room(shard.num_bytes)
            path = self.folder / f".{shard.sha256}.{shard.num_bytes}.{secrets.token_hex(6)}.tmp"
            file = path.open("xb")
            fcntl.flock(file, fcntl.LOCK_EX)
        digest, count = hashlib.sha256(), 0
        try:
            with file:
                for chunk in obstore.get(store.backend, shard.key).stream(min_chunk_size=CHUNK_BYTES):
                    digest.update(chunk)
                    count += file.write(chunk)
                if (digest.hexdigest(), count) != (shard.sha256, shard.num_bytes):
                    what = "other bytes than its name" if count == shard.num_bytes else f"{count} bytes"
                    raise DamagedDataError(
                        f"shard {shard.key}: the store holds {what}, its version says {shard.num_bytes} bytes of that "
                        "digest"
                    )
                file.flush()
                path.rename(self.path(shard))
        except (NotFoundError, FileNotFoundError):
            raise MissingObjectError(f"{store.url}: there is no {shard.key}") from None
        except (BaseError, OSError) as error:
            raise StoreError(
                f"{store.url}: caching {shard.key} in {self.folder} failed: {short_error(error)}"
            ) from None
        finally:
            path.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Evict the least recently opened until `num_bytes` fit; the caller holds `.lock`."""
        if num_bytes > self.max_bytes:
            raise UserError(
                f"data.cache_bytes {self.max_bytes} is less than one shard of {num_bytes} bytes; raise it, or leave "
                "data.cache_dir empty to read by ranges"
            )
        used, shards = 0, list[tuple[int, int, Path]]()
        names = {path.name for path in self.folder.iterdir()}
        for name in names.copy():
            if own := _ON_ITS_WAY.fullmatch(name):
                if not self._remove_unlocked(self.folder / name):
                    used += int(own["num_bytes"])
                else:  # left behind by a killed process; or it arrived, and got its name after the folder was listed
                    names.add(f"{own['sha256']}.tar")
        for path in (self.folder / name for name in names if _SHARD.fullmatch(name)):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                used += found.st_size
                shards.append((found.st_mtime_ns, found.st_size, path))
        for _, size, path in sorted(shards):
            if used + num_bytes <= self.max_bytes:
                return
            if self._remove_unlocked(path):
                used -= size
        if used + num_bytes > self.max_bytes:
            raise CacheFullError

    @staticmethod
    def _remove_unlocked(path: Path) -> bool:
        """Remove a file unless a process holds a lock on it; returns whether it is gone."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        try:
            file = (self.folder / name).open("ab")
        except OSError as error:
            raise StoreError(f"cache {self.folder}: {name} cannot be opened: {error.strerror}") from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class CachedReads:
    """Reads ranges of shards from the node's cache, bringing whole shards; past a full cache, from the store.

    A shard that is damaged in the store is not cached: its samples are read by ranges, and those that are whole are as
    good there as they are without a cache.

    Holds the `max_open` shards that were used last, so that the window of shards a loader works on stays.
    """

    def __init__(
        self, store: Store, cache: ShardCache, beyond: ShardReads, max_open: int, num_threads: int = 4
    ) -> None:
        self._store, self._cache, self._beyond, self._max_open = store, cache, beyond, max_open
        self.stats = cache.stats = beyond.stats
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="shard-cache")
        self._ahead = ThreadPoolExecutor(2, thread_name_prefix="shard-ahead")
        self._held: OrderedDict[ShardRef, int] = OrderedDict()
        self._bringing: dict[ShardRef, threading.Lock] = {}
        self._lock = threading.Lock()
        self._told = False
        self._bad: set[ShardRef] = set()  # in the store itself, or on a disk that keeps what is damaged
        weakref.finalize(self, _let_go, self._held, 0)  # dropped without `close`, its shards may be evicted

    def submit(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> Future[list[Buffer]]:
        """Begin to read ranges."""
        return self._pool.submit(self._read, shard, starts, lengths)

    def bring_ahead(self, shards: Sequence[ShardRef]) -> None:
        """Begin to bring shards that will be needed soon. Errors are left to the reads that meet them."""
        for shard in shards:
            self._ahead.submit(self._bring_quietly, shard)

    def _bring_quietly(self, shard: ShardRef) -> None:
        if shard in self._bad:
            return
        with contextlib.suppress(CacheFullError, DamagedDataError, StoreError, UserError):
            os.close(self._descriptor(shard))

    def _read(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> list[Buffer]:
        if shard in self._bad:
            return self._beyond.submit(shard, starts, lengths).result()
        try:
            descriptor = self._descriptor(shard)
        except DamagedDataError:  # in part, it may be: by ranges each sample is held to its own checksums
            return self._beyond.submit(shard, starts, lengths).result()
        except CacheFullError:
            self.stats.count(cache_bypasses=1)
            if not self._told:
                self._told = True
                log.warning(
                    "cache %s of %d bytes is full of shards in use; reading by ranges where it has no room: raise "
                    "data.cache_bytes or lower data.block_shards", self._cache.folder, self._cache.max_bytes,
                )  # fmt: skip
            return self._beyond.submit(shard, starts, lengths).result()
        try:
            return read_file_ranges(descriptor, shard, starts, lengths)
        except OSError:  # of the disk
            return self._read_again(shard, starts, lengths)
        finally:
            os.close(descriptor)

    def submit_again(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> Future[list[Buffer]]:
        """Begin to read, from the store, ranges whose bytes in the cache were damaged; a damaged file is removed."""
        return self._pool.submit(self._read_again, shard, starts, lengths)

    def _read_again(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> list[Buffer]:
        try:
            self._look_for_damage(shard)
        except (OSError, StoreError) as error:  # of a disk that can be neither read nor written
            self._pass_by(shard, f"{self._cache.path(shard)} is damaged and stays: {error}")
        return self._beyond.submit(shard, starts, lengths).result()

    def _look_for_damage(self, shard: ShardRef) -> None:
        """Let go of a cached shard, and remove it if it is damaged; in its turn, or others would take it up again."""
        with self._lock:
            turn = self._bringing.setdefault(shard, threading.Lock())
        with turn:
            with self._lock:
                held = self._held.pop(shard, None)
            descriptor = self._cache.open(shard) if held is None else held
            if descriptor is not None:
                try:
                    self._cache.remove_damaged(shard, descriptor)
                finally:
                    os.close(descriptor)

    def _pass_by(self, shard: ShardRef, why: object) -> None:
        """Read a shard by ranges from now on."""
        self._bad.add(shard)
        log.warning("cache: %s; not cached, its samples are read by ranges", why)

    def _descriptor(self, shard: ShardRef) -> int:
        """Return a descriptor of the caller's own on a cached shard."""
        with self._lock:
            held = self._held.get(shard)
            if held is not None:
                self._held.move_to_end(shard)
                self.stats.count(cache_hits=1)
                return os.dup(held)
            turn = self._bringing.setdefault(shard, threading.Lock())
        with turn:
            with self._lock:
                held = self._held.get(shard)
                if held is not None:
                    self.stats.count(cache_hits=1)
                    return os.dup(held)
                _let_go(self._held, self._max_open - 1)
            if shard in self._bad:
                raise DamagedDataError(f"shard {shard.key} is damaged")  # as who had the turn before this found
            try:
                descriptor, brought = self._cache.bring(self._store, shard)
            except DamagedDataError as error:
                self._pass_by(shard, error)
                raise
            with self._lock:
                if (other := self._held.pop(shard, None)) is not None:
                    os.close(other)  # let go while this waited for its turn, and brought again in another's
                self._held[shard] = descriptor
                self._bringing.pop(shard, None)
                if brought:
                    self.stats.count(cache_misses=1, num_wire_bytes=shard.num_bytes, num_requests=1)
                else:
                    self.stats.count(cache_hits=1)
                return os.dup(descriptor)

    def close(self) -> None:
        """End the threads and let go of every shard."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            _let_go(self._held, 0)
        self._beyond.close()


def _let_go(held: OrderedDict[ShardRef, int], keep: int) -> None:
    while len(held) > max(0, keep):
        os.close(held.popitem(last=False)[1])
