"""Byte ranges of shards, asked for ahead: from a folder, or from a remote store with joined, hedged requests.

    FolderReads   the kernel reads ahead, who wants the bytes copies them; no thread, no open file kept
    RemoteReads   one event loop in a thread of its own; every sample's ranges are joined where the gap is small, its
                  spans are asked for by one call, and any number of samples may be on their way

Road not taken: a thread a request. A store that answers in 50 ms needs dozens of requests in flight for one rank, and
as many threads hand the interpreter to each other. Mapping shards into memory was not taken either: a file that is cut
while it is mapped ends the process by SIGBUS instead of one sample by an error.

**Retries and hedges.** What fails is tried again by obstore's client (`pipeline.backends`), save for what it cannot
make out or was patient with for too long: a body that is cut where the server gives no ETag, an answer of another
range, a connection that says nothing for two minutes. Where the shard is then found to be whole, the sample is asked
for once more. What is merely slow is not tried again by the client: a
sample that takes longer than `hedge_factor` times the running mean, and a quarter of a second, is asked for a second
time and the first answer counts. At most one in twenty is hedged, so that a store which is slow as a whole is not asked
twice for everything.

What comes with other checksums than were written is asked for once more, by `submit_again`, before it counts as damage.
Short answers are damage, never data: a length that differs from what was asked for is raised as DamagedDataError where
the shard has another size than its version says, and as StoreError otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
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
MAX_REQUESTS = 128
"""Requests at once. 64 were as fast where an answer takes 20 ms or less, and a tenth slower at 100 ms."""
FIRST_REQUESTS = 16
"""Requests at once to begin with; every answer makes room for one more. Connections that are all opened at once delay
the first batch by the time it takes to open them."""

CLOSE_S = 10.0


@dataclass(slots=True)
class ReadStats:
    """What was read so far. Counted by any thread, read by anyone.

    Attributes:
        num_wire_bytes: bytes asked of the store, joined gaps and whole shards included.
        num_requests: requests to the store.
        num_hedged: reads of a sample that were sent a second time because the first was slow.
        cache_hits: samples read from shards that the node's cache held already.
        cache_misses: shards that had to be brought first.
        cache_bypasses: samples read past a cache that had no room.
        cache_damaged: cached shards that were no longer what was brought, and were removed.
    """

    num_wire_bytes: int = 0
    num_requests: int = 0
    num_hedged: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_bypasses: int = 0
    cache_damaged: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count(self, **more: int) -> None:
        """Add to counts, whole: `+=` of one thread between that of another would be lost."""
        with self._lock:
            for name, number in more.items():
                setattr(self, name, getattr(self, name) + number)


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

    def submit_again(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> Future[list[Buffer]]:
        """Begin to read ranges whose bytes were not those that were written, from the store itself."""
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

    submit_again = submit

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
        self.stats.count(num_wire_bytes=sum(lengths), num_requests=1)
        return out

    def close(self) -> None:
        """Nothing to end."""


@dataclass(slots=True)
class _Usual:
    """Running mean of the seconds that reads take."""

    base_s: float = 0.0
    count: int = 0

    def note(self, seconds: float) -> None:
        self.count += 1
        self.base_s += (seconds - self.base_s) * max(0.02, 1 / self.count)


class _Read(Future[list[Buffer]]):
    """Ranges of a shard that are asked for as one call of joined spans; the first answer counts."""

    def __init__(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> None:
        super().__init__()
        self.shard, self.starts, self.lengths = shard, starts, lengths
        self.spans = join_spans(starts, lengths, max(MIN_GAP_BYTES, int(GAP_SHARE * sum(lengths))))
        self.begun_s = 0.0
        self.under_way: list[asyncio.Task[Any]] = []
        self.hedged = self.answered = self.asked_again = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the spans."""
        return sum(end - start for start, end in self.spans)

    def parts(self, answers: Sequence[Any]) -> list[Buffer]:
        """Cut the answers to the spans into the ranges, uncopied.

        Raises:
            StoreError: if an answer has another length than its span.
        """
        found, wanted = [len(answer) for answer in answers], [end - start for start, end in self.spans]
        if found != wanted:
            raise StoreError(f"{self.shard.key} gave {found} bytes for its bytes {self.spans}")
        views = [memoryview(answer) for answer in answers]
        out: list[Buffer] = []
        for start, length in zip(self.starts, self.lengths):
            place = next(i for i, (begin, end) in enumerate(self.spans) if begin <= start and start + length <= end)
            begin = self.spans[place][0]
            out.append(views[place][start - begin : start - begin + length])
        return out


class RemoteReads:
    """Reads ranges of shards from an object store.

    One that is dropped without `close`, or lives when the interpreter ends, is closed then: the store's client would
    else call into an interpreter that is no more, and abort the process.
    """

    def __init__(self, store: Store, *, max_requests: int = MAX_REQUESTS, hedge_factor: float = 4.0) -> None:
        requests = _Requests(store, max_requests, hedge_factor)  # holds nothing of this, and so may outlive it
        self.stats, self.submit, self.submit_again = requests.stats, requests.submit, requests.submit
        self._close = weakref.finalize(self, requests.close)

    def close(self) -> None:
        """Cancel what is under way and end the loop."""
        self._close()


class _Requests:
    """The event loop of RemoteReads, in its thread.

    All of a sample's spans are one call into obstore, as each answer that crosses from its threads to the loop costs a
    hold of the GIL and a wake-up: 136 objects/s in place of the 127 of a call a span, by `make bench-loader`'s s3.
    """

    def __init__(self, store: Store, max_requests: int, hedge_factor: float) -> None:
        self._store, self._max_requests, self._hedge_factor = store, max_requests, hedge_factor
        self._room = min(max_requests, FIRST_REQUESTS)
        self.stats = ReadStats()
        self._usual = _Usual()
        self._queue: deque[_Read] = deque()
        self._outstanding: set[_Read] = set()
        self._num_requests = self._num_reads = 0  # requests under way; reads sent since the beginning
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._ended, self._ending = False, threading.Lock()  # whether nothing more may be submitted
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="shard-requests", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(self._loop), return_exceptions=True))
        self._loop.close()

    def submit(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> Future[list[Buffer]]:
        """Begin to read ranges."""
        read = _Read(shard, starts, lengths)
        with self._ending:  # what the loop is told before its end it looks at
            if not self._ended:
                self._loop.call_soon_threadsafe(self._take, read)
                return read
        read.set_exception(CancelledError())
        return read

    # ---- all that follows runs in the loop's thread

    def _take(self, read: _Read) -> None:
        self._queue.append(read)
        self._send_more()

    def _send_more(self) -> None:
        """Send reads in the order they were asked for, as many as there is room for, and one at least."""
        while self._queue and not self._closed:
            num = len(self._queue[0].spans)
            if self._num_requests and self._num_requests + num > self._room:
                return
            read = self._queue.popleft()
            if read.set_running_or_notify_cancel():
                read.begun_s = time.perf_counter()
                self._outstanding.add(read)
                self._num_reads += 1
                self._send(read)
                if self._num_reads == 1:
                    self._start(self._hedge())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself holds no task
        task.add_done_callback(self._tasks.discard)

    def _send(self, read: _Read) -> None:
        self._num_requests += len(read.spans)
        self.stats.count(num_requests=len(read.spans), num_wire_bytes=read.num_bytes)
        call = self._loop.create_task(self._call(read))
        read.under_way.append(call)
        call.add_done_callback(lambda done: self._settle(read, done))

    async def _call(self, read: _Read) -> Sequence[Any]:
        starts, ends = zip(*read.spans)
        # By itself obstore would read over gaps of up to a MiB.
        answers: Sequence[Any] = await obstore.get_ranges_async(
            self._store.backend, read.shard.key, starts=starts, ends=ends, coalesce=0
        )
        return answers

    def _settle(self, read: _Read, done: asyncio.Task[Any]) -> None:
        """Take the first answer; an error counts if no other call is under way."""
        self._num_requests -= len(read.spans)
        self._room = min(self._max_requests, self._room + len(read.spans))
        read.under_way.remove(done)
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if not read.answered and (error is None or not read.under_way):
            read.answered = True
            for late in read.under_way:
                late.cancel()
            if error is None:
                error = self._take_answer(read, done.result())
            if error is not None:
                self._start(self._fail(read, error))
        self._send_more()

    def _take_answer(self, read: _Read, answers: Sequence[Any]) -> Exception | None:
        self._usual.note(time.perf_counter() - read.begun_s)
        try:
            parts = read.parts(answers)
        except Exception as error:  # noqa: BLE001 - whoever waits raises it
            return error
        self._outstanding.discard(read)
        read.set_result(parts)
        return None

    async def _hedge(self) -> None:
        """Ask again for what is late: one look at all that is outstanding, rather than a timer a request."""
        while True:
            await asyncio.sleep(MIN_HEDGE_S / 4)
            self._hedge_late()  # holds no read while it sleeps

    def _hedge_late(self) -> None:
        late_s = max(MIN_HEDGE_S, self._hedge_factor * self._usual.base_s)
        for read in list(self._outstanding):
            if read.hedged or read.answered or time.perf_counter() - read.begun_s < late_s:
                continue
            if self.stats.num_hedged > 2 + self._num_reads // 20:
                break
            read.hedged = True
            self.stats.count(num_hedged=1)
            self._send(read)

    async def _fail(self, read: _Read, error: BaseException) -> None:
        """Give a read its error, in the project's words."""
        key, url = read.shard.key, self._store.url
        if isinstance(error, NotFoundError | FileNotFoundError):
            error = MissingObjectError(f"{url}: there is no {key}")
        elif isinstance(error, BaseError | OSError | StoreError):
            found = await self._size(read.shard)
            if found == read.shard.num_bytes and not read.asked_again:
                read.asked_again, read.answered, read.begun_s = True, False, time.perf_counter()
                self._send(read)
                return
            if found not in (None, read.shard.num_bytes):
                error = DamagedDataError(f"shard {key} is cut: it has {found} of {read.shard.num_bytes} bytes")
            else:
                text = str(error) if isinstance(error, StoreError) else f"reading {key} failed: {short_error(error)}"
                error = StoreError(f"{url}: {text}")
        self._outstanding.discard(read)
        read.set_exception(error)

    async def _size(self, shard: ShardRef) -> int | None:
        try:
            return int((await obstore.head_async(self._store.backend, shard.key))["size"])
        except (BaseError, OSError):
            return None

    def _stop(self) -> None:
        self._closed = True
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        for read in (*self._outstanding, *self._queue):
            read.answered = True
            if read.running() or read.set_running_or_notify_cancel():
                read.set_exception(CancelledError())
        self._loop.call_soon(self._loop.stop)

    # ---- any thread

    def close(self) -> None:
        """Cancel what is under way and end the loop."""
        if not self._thread.is_alive():  # in the child of a fork, where the lock may be another's for ever
            return
        with self._ending:
            self._ended = True
        self._loop.call_soon_threadsafe(self._stop)
        # The collector may run this anywhere: in this thread itself, or in one that holds a lock which this waits for.
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)
