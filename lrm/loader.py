"""Batches ahead of their consumer: reading by bytes, decoding by threads, exactly once, resumable anywhere.

Two windows move along the order (`lrm.order`). The *reading* window is bounded in bytes: samples are asked for from the
store as long as fewer encoded bytes are on their way or wait for a decoder than are decoded in a quarter of a second
(`lrm.windows`; `prefetch_bytes` is the limit), so a slow store gets many requests at once and a fast one does not fill
the memory. The *decoding* window is bounded in batches: a view
is decoded straight into its place in the batch it belongs to, at most `prefetch_batches` beyond the one being waited
for. Of the samples that have arrived, the one that is wanted first is decoded first; batches leave in order.

Threads, not processes. Decoding releases the GIL and what remains in Python is about 0.4 ms an object of four 512^2
views, so two threads keep two cores decoding. Two worker processes of a DataLoader were measured beside them
(`make bench-loader`, contestant `ours_workers`): 14.2 ms of CPU an object against 8.3, for pickling and for copying
each decoded batch, 4 MB an object, into shared memory, where threads write pixels once, in place. Past some eight cores
a rank the GIL would bind; there `lrm.dataset` runs this loader in the workers of a DataLoader, each its share of
batches.

**Place.** Batch k of a run is `batch_size` consecutive positions of the global order over all ranks; a rank decodes its
slice of them. State is where the next batch begins, whatever was prefetched, and knows no ranks, workers or batch size.
By default batches run on across the end of an epoch, so all ranks always have the same number of full batches. With
`whole_epochs` iteration ends with the epoch: its last batch is filled up with samples that are marked `valid = False`,
again on all ranks alike, so no rank waits for another at the end.

**Damage.** A damaged sample (wrong length, checksum, or not an image) is replaced by a substitute that is a function of
its position, so that ranks keep equal batches and a resumed run sees the same; it is counted, named in the log, and
past `max_damaged_samples` different ones the run stops. A missing shard or a store that cannot be read stops it at
once.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lrm.order import Draw, SampleOrder
from lrm.windows import BatchArrays, ReadingWindow
from pipeline.reader import DamagedDataError, Request, VersionReader, ViewsRead
from pipeline.shard_cache import CachedReads
from pipeline.shard_reads import Buffer, ReadStats
from pipeline.types import UserError

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Fields = Mapping[str, NDArray[Any]]
STATE_SCHEMA = 2
MAX_ATTEMPTS = 1000
MAX_VIEWS = 999  # an object, as the spec allows
MAX_SAMPLES_AHEAD = 512  # small views: what is asked for costs memory and time of its own


class Preparer(Protocol):
    """What becomes of a sample's views in a batch."""

    num_views: int
    """Views to draw of each sample, the input view included."""

    def shapes(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Return shape and dtype of each field of one sample."""
        ...

    def fill(self, read: ViewsRead, draw: Draw, out: Fields) -> None:
        """Write one sample into its place of a batch.

        Raises:
            DamagedDataError: if the sample is not what was written.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """How a loader works; only seed, mix, max_views, input_views and block_shards change what it yields."""

    seed: int = 0
    max_views: int = 0  # views of an object to draw from, its first; 0 is all
    input_views: int = 0  # those of them that may be the input, the first; 0 is all
    mix: Mapping[str, float] = field(default_factory=dict)
    block_shards: int = 0
    num_threads: int = 2
    prefetch_batches: int = 2
    prefetch_bytes: int = 64 * 2**20
    max_damaged_samples: int = 0
    pin_memory: bool = False
    whole_epochs: bool = False


@dataclass(slots=True)
class LoaderStats:
    """What a loader has done since it was made.

    Attributes:
        num_objects: samples delivered.
        num_bytes: bytes of them that were needed: their JSON and the planes of their views.
        num_asked_bytes: the same, of all samples that were asked for, delivered or not.
        data_wait_s: seconds the consumer waited for data.
        damaged: row of each damaged sample, and what was found.
        reads: what was read from the store or the cache.
    """

    num_objects: int = 0
    num_bytes: int = 0
    num_asked_bytes: int = 0
    data_wait_s: float = 0.0
    damaged: dict[int, str] = field(default_factory=dict)
    reads: ReadStats = field(default_factory=ReadStats)

    @property
    def wire_ratio(self) -> float:
        """Bytes read over bytes needed, of all that was asked for so far."""
        return self.reads.num_wire_bytes / max(1, self.num_asked_bytes)


@dataclass(slots=True, eq=False)
class _Open:
    """A batch that is being read or decoded."""

    number: int
    positions: range
    valid: int  # how many of the positions lie before the end of the epoch
    left: int
    arrays: dict[str, NDArray[Any]] | None = None
    tensors: Batch | None = None
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Slot:
    """One sample of an open batch."""

    batch: _Open
    place: int
    consumed: int
    draw: Draw
    request: Request
    future: Future[list[Buffer]] | None = None
    arrived: bool = False
    opened: bool = False  # whether it may be decoded; it is, once both hold


class BatchLoader:
    """An iterator of batches with a resumable position.

    `state_dict` after k batches names where batch k + 1 begins. Use as a context manager, or `close`, to end its
    threads. One consumer at a time. A batch's tensors are the consumer's; when all of them are dropped their memory is
    used for another batch.

    Args:
        reader: the version.
        preparer: what a batch holds.
        options: see there.
        batch_size: objects a batch over all ranks.
        rank: this process's number.
        ranks: number of processes. Slices differ by one object where batch_size does not divide.
        worker: share of the rank's batches: those with number = worker modulo workers, counted from where it begins.
        workers: number of such shares.
    """

    def __init__(
        self,
        reader: VersionReader,
        preparer: Preparer,
        options: LoaderOptions,
        *,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        if not 0 <= rank < ranks <= batch_size:
            raise UserError(f"batch size {batch_size} gives rank {rank} of {ranks} no object; raise it")
        self._reader, self._preparer, self._options = reader, preparer, options
        reader.users.add(self)
        index = reader.index
        self.order = SampleOrder.build(
            sources=index.sources, source=index.source, shard=index.shard, heldout=index.heldout,
            num_views=np.minimum(index.num_views, options.max_views or MAX_VIEWS), views_per_sample=preparer.num_views,
            seed=options.seed, input_views=options.input_views, mix=options.mix, block_shards=options.block_shards,
        )  # fmt: skip
        self._batch_size, self._worker, self._workers = batch_size, worker, workers
        self._local = slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)
        self._arrays = BatchArrays(
            preparer.shapes() | {"row": ((), np.int64), "valid": ((), np.bool_)},
            self._local.stop - self._local.start, options.prefetch_batches + 4, pin=options.pin_memory,
        )  # fmt: skip
        self._window = ReadingWindow(options.prefetch_bytes)
        self._lock = threading.RLock()
        self._ready = threading.Condition(self._lock)
        self._pool = ThreadPoolExecutor(options.num_threads, thread_name_prefix="lrm-decode")
        self.stats = LoaderStats(reads=reader.stats)
        self._closed, self._pid = False, os.getpid()
        self._go_to(0, worker)

    # ---- place

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch begins: JSON values only, the same on every rank.

        The state of one of several workers also names the worker: it is where *its* next batch begins.
        """
        epoch, position = divmod(self._consumed, len(self.order))
        own: dict[str, int] = {}
        if self._workers > 1:
            # A worker may have no batch left in an epoch that goes on in others.
            in_epoch = self._epoch + self._ended if self._options.whole_epochs else epoch
            own = {"worker": self._worker, "workers": self._workers, "in_epoch": in_epoch}
        return self._identity() | {"epoch": epoch, "position": position} | own

    def _identity(self) -> dict[str, Any]:
        return {
            "schema": STATE_SCHEMA,
            "version_digest": self._reader.digest,
            "seed": self._options.seed,
            "max_views": self._options.max_views,
            "input_views": self._options.input_views,
            "mix": dict(self.order.mix),
            "block_shards": self.order.block_shards,
            "num_slots": len(self.order),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place: of a run, or of this worker.

        Raises:
            UserError: if the state belongs to another version, seed, mix of sources, kind of order, or worker.
        """
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise UserError(
                    f"loader state is of {name} {state.get(name)!r}, this run has {own!r}; "
                    "resume on the version and data settings it was saved with, or start in a new folder"
                )
        consumed = int(state["epoch"]) * len(self.order) + int(state["position"])
        if "worker" not in state:
            self._go_to(consumed, self._worker)
        elif (state["worker"], state["workers"]) == (self._worker, self._workers):
            waits = state["in_epoch"] < state["epoch"]
            # Where iteration stops with the epoch, an epoch's first batch is worker 0's.
            begins = self._options.whole_epochs and state["position"] == 0 and not waits
            self._go_to(consumed, self._worker if begins else 0)
            self._epoch = int(state["in_epoch"])
        else:
            raise UserError(
                f"loader state is of worker {state['worker']} of {state['workers']}, this is worker {self._worker} of "
                f"{self._workers}; with another number of workers take up lrm.dataset.place_of(state)"
            )

    def _go_to(self, consumed: int, skip: int) -> None:
        with self._lock:
            self._drop()
            self._epoch = consumed // len(self.order)
            for _ in range(skip):
                consumed = self._beyond(consumed)
            self._consumed = self._planned = consumed  # what the next batch begins with; what is planned next
            self._error: BaseException | None = None
            self._ended = False  # whether the consumer has met the end of the epoch
            self._number = 0  # number of the next batch to leave, counted from here
            self._opened = 0
            self._bytes_ahead = self._num_ahead = 0
            self._block = -1
            self._batches: deque[_Open] = deque()
            self._waiting: deque[_Slot] = deque()  # slots of batches that are not open for decoding yet
            self._rest: deque[tuple[_Open, int]] = deque()  # slots that are not asked for yet
            self._arrivals: list[tuple[int, int, _Slot]] = []  # a heap of slots that may be decoded now
            self._generation = getattr(self, "_generation", 0) + 1

    def _after(self, consumed: int) -> int:
        """Return where the batch after the one at `consumed` begins: `batch_size` on, or at the end of its epoch."""
        after = consumed + self._batch_size
        if self._options.whole_epochs:
            after = min(after, (consumed // len(self.order) + 1) * len(self.order))
        return after

    def _plan(self) -> _Open | None:
        """Return the next batch of this worker, or None where the epoch is at its end."""
        begin = self._planned
        if self._options.whole_epochs and begin // len(self.order) != self._epoch:
            return None
        stop = self._after(begin)
        positions = range(begin, begin + self._batch_size)[self._local]
        valid = sum(position < stop for position in positions)
        self._planned = stop
        for _ in range(self._workers - 1):
            self._planned = self._beyond(self._planned)
        self._opened += 1
        return _Open(self._opened - 1, positions, valid, len(positions))

    def _beyond(self, consumed: int) -> int:
        """Skip another worker's batch; where iteration stops with the epoch, none lies beyond its end."""
        if self._options.whole_epochs and consumed // len(self.order) != self._epoch:
            return consumed
        return self._after(consumed)

    # ---- iteration

    def __iter__(self) -> Iterator[Batch]:
        with self._lock:
            if self._ended:  # the next epoch
                self._go_to(self._consumed, self._worker)
        return self

    def __next__(self) -> Batch:
        start_s = time.perf_counter()
        if os.getpid() != self._pid:
            raise UserError("this loader's threads are in the process that this one was forked from; make one here")
        with self._ready:
            self._top_up()
            if not self._batches and not self._closed:
                self._ended = True
                raise StopIteration
            while not self._closed and self._error is None and self._batches[0].left:
                self._ready.wait()
            if self._closed:
                raise UserError("this loader is closed; make another, which may take up its state")
            if self._error is not None:
                raise self._error
            batch = self._batches[0]
            self._batches.popleft()
            self._number += 1
            after = self._batches[0].positions.start - self._local.start if self._batches else self._planned
            self._top_up()
            self._consumed = after  # last: a batch that an interrupt keeps from the consumer is not consumed
        self.stats.data_wait_s += time.perf_counter() - start_s
        self.stats.num_objects += batch.valid
        self.stats.num_bytes += batch.num_bytes
        assert batch.tensors is not None
        return batch.tensors

    def _top_up(self) -> None:
        """Ask for samples up to the window of bytes, and open batches for decoding up to theirs; lock held."""
        if self._closed or self._error is not None:
            return
        while self._has_room() or self._window_is_short():
            if not self._rest:
                batch = self._plan()
                if batch is None:
                    break
                self._batches.append(batch)
                self._rest.extend((batch, place) for place in range(len(batch.positions)))
            self._ask(*self._rest.popleft())
        while self._waiting and self._is_open(self._waiting[0].batch):
            slot = self._waiting.popleft()
            slot.opened = True
            if slot.arrived:
                self._line_up(slot)

    def _has_room(self) -> bool:
        return self._bytes_ahead < self._window.num_bytes and self._num_ahead < MAX_SAMPLES_AHEAD

    def _window_is_short(self) -> bool:
        """Whether the batch being waited for is not wholly asked for, however small the window of bytes is."""
        return not self._batches or (bool(self._rest) and self._rest[0][0].number == self._number)

    def _is_open(self, batch: _Open) -> bool:
        return batch.number <= self._number + self._options.prefetch_batches

    def _ask(self, batch: _Open, place: int) -> None:
        consumed = batch.positions[place]
        if place >= batch.valid:  # beyond the end of the epoch: any sample fills the place
            consumed = batch.positions.start - self._local.start
        draw = self.order.draw(consumed)
        request = self._reader.request(draw.row, draw.views)
        slot = _Slot(batch, place, consumed, draw, request)
        self._bring_ahead(consumed)
        self._bytes_ahead += request.num_bytes
        self._num_ahead += 1
        self.stats.num_asked_bytes += request.num_bytes
        self._waiting.append(slot)
        generation = self._generation
        slot.future = self._reader.fetch(request)
        slot.future.add_done_callback(lambda _: self._arrived(slot, generation))

    def _bring_ahead(self, consumed: int) -> None:
        """Where whole shards are cached: begin to bring the next block's as the first of a block is asked for."""
        reads = self._reader.reads
        if not self.order.block_shards or not isinstance(reads, CachedReads):
            return
        block = self.order.block_of(consumed)
        if block != self._block:
            self._block = block
            reads.bring_ahead([self._reader.shard(number) for number in self.order.shards_of_block(block + 1)])

    def _arrived(self, slot: _Slot, generation: int) -> None:
        with self._lock:
            if generation != self._generation or self._closed:
                return
            slot.arrived = True
            if slot.opened:
                self._line_up(slot)

    def _line_up(self, slot: _Slot) -> None:
        heapq.heappush(self._arrivals, (slot.batch.number, slot.place, slot))
        with contextlib.suppress(RuntimeError):  # the interpreter ends, and nobody waits
            self._pool.submit(self._decode, self._generation)

    def _decode(self, generation: int) -> None:
        """Decode the sample that is wanted first of those that have arrived."""
        with self._lock:
            if generation != self._generation:
                return
            slot = heapq.heappop(self._arrivals)[2]
            batch = slot.batch
            if batch.arrays is None:  # now and not when it was opened: batches that wait for bytes need no memory
                batch.arrays, batch.tensors = self._arrays.take()
        out = {name: array[slot.place] for name, array in batch.arrays.items() if name not in ("row", "valid")}
        num_bytes, error, draw = 0, None, slot.draw
        try:
            draw, num_bytes = self._fill(slot, out)
        except BaseException as caught:  # noqa: BLE001 - the consumer raises it
            error = caught
        batch.arrays["row"][slot.place] = draw.row
        batch.arrays["valid"][slot.place] = slot.place < batch.valid
        with self._ready:
            if generation != self._generation:
                return
            slot.future = None
            self._bytes_ahead -= slot.request.num_bytes
            self._window.note_decoded(slot.request.num_bytes)
            self._num_ahead -= 1
            batch.num_bytes += num_bytes
            batch.left -= 1
            self._error = self._error or error
            try:
                self._top_up()
            except BaseException as caught:  # noqa: BLE001 - the consumer raises it
                self._error = self._error or caught
            if batch.left == 0 or self._error is not None:
                self._ready.notify_all()

    def _fill(self, slot: _Slot, out: Fields) -> tuple[Draw, int]:
        """Write a sample, or its first undamaged substitute; returns the draw it is of, and its bytes."""
        assert slot.future is not None
        draw, request, future = slot.draw, slot.request, slot.future
        for attempt in range(1, MAX_ATTEMPTS):
            try:  # also where the row is known to be damaged: other views of it may be whole, on a resumed run too
                read = self._reader.collect(request, future)
                self._preparer.fill(read, draw, out)
                return draw, read.num_bytes
            except DamagedDataError as error:
                self._note_damaged(draw.row, error)
            draw = self.order.draw(slot.consumed, attempt)
            request = self._reader.request(draw.row, draw.views)
            with self._lock:
                if self._closed:
                    raise CancelledError
                self.stats.num_asked_bytes += request.num_bytes
                future = self._reader.fetch(request)
        raise DamagedDataError(f"no undamaged substitute found for position {slot.consumed} in {MAX_ATTEMPTS} tries")

    def _note_damaged(self, row: int, error: DamagedDataError) -> None:
        with self._lock:
            if row not in self.stats.damaged:
                log.warning("damaged sample replaced: %s", error)
            self.stats.damaged[row] = str(error)
            found, limit = len(self.stats.damaged), self._options.max_damaged_samples
        if found > limit:
            raise DamagedDataError(
                f"{found} damaged samples, data.max_damaged_samples allows {limit}; the last: {error}"
            ) from None

    # ---- end

    def _drop(self) -> None:
        for slot in getattr(self, "_waiting", ()):
            if slot.future is not None:
                slot.future.cancel()

    def close(self) -> None:
        """Cancel what is prefetched and end the threads."""
        with self._ready:
            self._closed = True
            self._drop()
            self._ready.notify_all()
        # A decoder may wait for a substitute that the store owes: the reads end first.
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._reader.users.discard(self)
        if not self._reader.users:
            self._reader.close()
        self._pool.shutdown(wait=True)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
