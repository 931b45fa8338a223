"""Byte ranges of shards, asked for ahead: from a folder, or from a remote store with joined, hedged requests.

    FolderReads   the kernel reads ahead, who wants the bytes copies them; no thread, no open file kept
    RemoteReads   one event loop in a thread of its own; every sample's ranges are joined where the gap is small, its
                  spans are asked for at once, and any number of samples may be on their way

Road not taken: a thread a request. A store that answers in 50 ms needs dozens of requests in flight for one rank, and
as many threads hand the interpreter to each other. Mapping shards into memory was not taken either: a file that is cut
while it is mapped ends the process by SIGBUS instead of one sample by an error.

**Retries and hedges.** What fails is tried again by obstore's client (`pipeline.store`). What is merely slow is not: a
span that takes longer than `hedge_factor` times the running mean, and a quarter of a second, is asked for a second time
and the first answer counts. At most one request in twenty is hedged, so that a store which is slow as a whole is not
asked twice for everything.

Short answers are damage, never data: a length that differs from what was asked for is raised as DamagedDataError where
the shard has another size than its version says, and as StoreError otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import obstore
from obstore.exceptions import BaseError, NotFoundError

from pipeline.backends import short_error
from pipeline.shard import DamagedDataError, shard_key
from pipeline.store import MissingObjectError, Store, StoreError

Buffer = bytes | memoryview
MIN_GAP_BYTES = 1024
"""Gaps up to this are always bridged: neighbours in a tar are 512 to 1023 bytes apart."""
GAP_SHARE = 0.02
"""Larger gaps are bridged up to this share of the bytes asked for, so that a request is saved and not a byte in ten
wasted."""
MIN_HEDGE_S = 0.25


@dataclass(slots=True)
class ReadStats:
    """What was read so far. Written by the reading threads, read by anyone.

    Attributes:
        num_wire_bytes: bytes asked of the store, joined gaps and whole shards included.
        num_requests: requests to the store.
        num_hedged: requests that were sent a second time because the first was slow.
        cache_hits: samples read from shards that the node's cache held already.
        cache_misses: shards that had to be brought first.
        cache_bypasses: samples read past a cache that had no room.
    """

    num_wire_bytes: int = 0
    num_requests: int = 0
    num_hedged: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_bypasses: int = 0


@dataclass(frozen=True, slots=True)
class ShardRef:
    """A shard: its digest and its length."""

    sha256: str
    num_bytes: int

    @property
    def key(self) -> str:
        """Key of the shard in a corpus."""
        return shard_key(self.sha256)


class ShardReads(Protocol):
    """How ranges of shards are got."""

    stats: ReadStats

    def submit(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> Future[list[Buffer]]:
        """Begin to read ranges of a shard; the result has one buffer a range, of its length.

        The future raises DamagedDataError, MissingObjectError or StoreError.
        """
        ...

    def close(self) -> None:
        """End threads; what is under way is dropped."""
        ...


def join_spans(starts: Sequence[int], lengths: Sequence[int], max_gap_bytes: int) -> list[tuple[int, int]]:
    """Return the fewest (start, end) spans that cover these ranges, bridging gaps of at most `max_gap_bytes`."""
    spans: list[tuple[int, int]] = []
    for start, length in sorted(zip(starts, lengths)):
        if spans and start <= spans[-1][1] + max_gap_bytes:
            spans[-1] = (spans[-1][0], max(spans[-1][1], start + length))
        else:
            spans.append((start, start + length))
    return spans


def read_file_ranges(descriptor: int, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> list[Buffer]:
    """Read ranges of an open shard file.

    Raises:
        DamagedDataError: if the file ends before a range does.
    """
    out: list[Buffer] = []
    for start, length in zip(starts, lengths):
        data = os.pread(descriptor, length, start)
        while len(data) < length and (more := os.pread(descriptor, length - len(data), start + len(data))):
            data += more
        if len(data) != length:
            raise DamagedDataError(
                f"shard {shard.key} is cut: it ends at byte {os.fstat(descriptor).st_size} of {shard.num_bytes}"
            )
        out.append(data)
    return out


class _FileRead(Future[list[Buffer]]):
    """Ranges of a file that the kernel reads ahead; whoever wants the result copies them out of the page cache.

    A thread that only copied would cost a core two switches a sample and overlap nothing: it is the disk that must be
    busy ahead, and POSIX_FADV_WILLNEED makes it so.
    """

    def __init__(self, reads: FolderReads, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> None:
        super().__init__()
        self._reads, self._shard, self._starts, self._lengths = reads, shard, starts, lengths
        # What is wrong with the file shows when it is read.
        with contextlib.suppress(StoreError, OSError), reads.opened(shard) as descriptor:
            for start, end in join_spans(starts, lengths, MIN_GAP_BYTES):
                os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    def result(self, timeout: float | None = None) -> list[Buffer]:  # noqa: ARG002 - a Future's signature
        """Read and return the ranges."""
        return self._reads.read(self._shard, self._starts, self._lengths)

    def add_done_callback(self, fn: Callable[[Future[list[Buffer]]], object]) -> None:
        """Call at once: there is nothing to wait for that the result does not wait for."""
        fn(self)


class FolderReads:
    """Reads ranges of shards in a folder of this machine, in the thread that wants them."""

    def __init__(self, store: Store) -> None:
        assert store.local_root is not None
        self._store, self._root = store, store.local_root
        self.stats = ReadStats()

    def submit(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> Future[list[Buffer]]:
        """Begin to read ranges: the kernel does, into its page cache."""
        return _FileRead(self, shard, starts, lengths)

    @contextlib.contextmanager
    def opened(self, shard: ShardRef) -> Iterator[int]:
        """Open a shard for as long as the context lasts.

        Raises:
            MissingObjectError, StoreError: if it cannot be opened.
        """
        try:
            descriptor = os.open(self._root / shard.key, os.O_RDONLY)
        except FileNotFoundError:
            raise MissingObjectError(f"{self._store.url}: there is no {shard.key}") from None
        except OSError as error:
            raise StoreError(f"{self._store.url}: opening {shard.key} failed: {error.strerror}") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> list[Buffer]:
        """Read ranges of a shard."""
        with self.opened(shard) as descriptor:
            try:
                out = read_file_ranges(descriptor, shard, starts, lengths)
            except OSError as error:
                raise StoreError(f"{self._store.url}: reading {shard.key} failed: {error.strerror}") from None
        self.stats.num_wire_bytes += sum(lengths)
        self.stats.num_requests += 1
        return out

    def close(self) -> None:
        """Nothing to end."""


@dataclass(slots=True)
class _Usual:
    """Running mean of the seconds that requests take."""

    base_s: float = 0.0
    count: int = 0

    def note(self, seconds: float) -> None:
        self.count += 1
        self.base_s += (seconds - self.base_s) * max(0.02, 1 / self.count)


@dataclass(slots=True, eq=False)
class _Asked:
    """A span that is asked for: `answer` is set by the first request that brings it."""

    key: str
    start: int
    end: int
    begun_s: float
    answer: asyncio.Future[Any]
    num_sent: int = 0
    hedged: bool = False


class RemoteReads:
    """Reads ranges of shards from an object store by one event loop."""

    def __init__(self, store: Store, *, max_requests: int = 64, hedge_factor: float = 4.0) -> None:
        self._store, self._hedge_factor = store, hedge_factor
        self.stats = ReadStats()
        self._usual = _Usual()
        self._outstanding: set[_Asked] = set()
        self._watch: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._room = asyncio.Semaphore(max_requests)
        self._thread = threading.Thread(target=self._run, name="shard-requests", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def submit(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> Future[list[Buffer]]:
        """Begin to read ranges."""
        return asyncio.run_coroutine_threadsafe(self._read(shard, starts, lengths), self._loop)

    async def _read(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> list[Buffer]:
        spans = join_spans(starts, lengths, max(MIN_GAP_BYTES, int(GAP_SHARE * sum(lengths))))
        asked = []
        for start, end in spans:
            await self._room.acquire()
            asked.append(self._ask(shard.key, start, end))
        parts = [await self._answer(shard, one) for one in asked]
        out: list[Buffer] = []
        for start, length in zip(starts, lengths):
            place = next(i for i, (begin, end) in enumerate(spans) if begin <= start and start + length <= end)
            begin = spans[place][0]
            out.append(parts[place][start - begin : start - begin + length])
        return out

    def _ask(self, key: str, start: int, end: int) -> _Asked:
        asked = _Asked(key, start, end, time.perf_counter(), self._loop.create_future())
        asked.answer.add_done_callback(self._answered)
        self._outstanding.add(asked)
        self._send(asked)
        if self._watch is None:
            self._watch = self._loop.create_task(self._hedge())
        return asked

    def _answered(self, answer: asyncio.Future[Any]) -> None:
        self._room.release()
        if not answer.cancelled():
            answer.exception()  # seen, though only the first error of a sample's spans is raised

    def _send(self, asked: _Asked) -> None:
        asked.num_sent += 1
        self.stats.num_requests += 1
        request = obstore.get_range_async(self._store.backend, asked.key, start=asked.start, end=asked.end)
        asyncio.ensure_future(request).add_done_callback(lambda done: self._settle(asked, done))

    def _settle(self, asked: _Asked, done: asyncio.Future[Any]) -> None:
        """Take the first answer; an error counts if no other request is under way."""
        asked.num_sent -= 1
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if asked.answer.done() or (error is not None and asked.num_sent):
            return
        self._outstanding.discard(asked)
        if error is None:
            self._usual.note(time.perf_counter() - asked.begun_s)
            asked.answer.set_result(done.result())
        elif done.cancelled():
            asked.answer.cancel()
        else:
            asked.answer.set_exception(error)

    async def _hedge(self) -> None:
        """Ask again for what is late: one look at all that is outstanding, rather than a timer a request."""
        while True:
            await asyncio.sleep(MIN_HEDGE_S / 4)
            late_s = max(MIN_HEDGE_S, self._hedge_factor * self._usual.base_s)
            for asked in list(self._outstanding):
                if asked.hedged or time.perf_counter() - asked.begun_s < late_s:
                    continue
                if self.stats.num_hedged > 2 + self.stats.num_requests // 20:
                    break
                asked.hedged = True
                self.stats.num_hedged += 1
                self.stats.num_wire_bytes += asked.end - asked.start
                self._send(asked)

    async def _answer(self, shard: ShardRef, asked: _Asked) -> memoryview:
        try:
            data = memoryview(await asked.answer)
        except (NotFoundError, FileNotFoundError):
            raise MissingObjectError(f"{self._store.url}: there is no {shard.key}") from None
        except (BaseError, OSError) as error:
            await self._raise_damage(shard)
            raise StoreError(f"{self._store.url}: reading {shard.key} failed: {short_error(error)}") from None
        self.stats.num_wire_bytes += len(data)
        if len(data) != asked.end - asked.start:
            await self._raise_damage(shard)
            raise StoreError(
                f"{self._store.url}: {shard.key} gave {len(data)} bytes of its bytes {asked.start} to {asked.end}"
            )
        return data

    async def _raise_damage(self, shard: ShardRef) -> None:
        """Raise DamagedDataError if the shard has another length than its version says."""
        try:
            found = int((await obstore.head_async(self._store.backend, shard.key))["size"])
        except (BaseError, OSError):
            return
        if found != shard.num_bytes:
            raise DamagedDataError(f"shard {shard.key} is cut: it has {found} of {shard.num_bytes} bytes")

    def close(self) -> None:
        """Cancel what is under way and end the loop."""

        def stop() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.call_soon(self._loop.stop)

        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(stop)
            self._thread.join()
            self._loop.close()
