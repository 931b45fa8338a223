"""What the loader holds at a time: bytes read ahead, batches in memory, and which sample is decoded next."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrm.data import PlainViews
from lrm.loader import BatchLoader, LoaderOptions
from lrm.order import Draw
from lrm.windows import AHEAD_S, LEAST_AHEAD_BYTES, ReadingWindow
from pipeline.reader import VersionReader, ViewsRead
from pipeline.shard_reads import Buffer, FolderReads, ReadStats, ShardRef

MIB = 2**20


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def decode(window: ReadingWindow, clock: Clock, num: int, num_bytes: int, each_s: float) -> None:
    for _ in range(num):
        clock.now_s += each_s
        window.note_decoded(num_bytes)


@given(
    num_bytes=st.integers(10_000, 8 * MIB), each_s=st.floats(0.0005, 0.2), limit=st.sampled_from([MIB, 64 * MIB, 2**30])
)
def test_the_window_is_what_is_decoded_in_a_quarter_of_a_second(num_bytes: int, each_s: float, limit: int) -> None:
    clock = Clock()
    window = ReadingWindow(limit, clock)
    assert window.num_bytes == min(limit, LEAST_AHEAD_BYTES)
    decode(window, clock, int(2 / each_s), num_bytes, each_s)
    wanted = min(limit, max(LEAST_AHEAD_BYTES, AHEAD_S * num_bytes / each_s))
    assert window.num_bytes == pytest.approx(wanted, rel=0.01)


def test_the_window_follows_a_change_of_speed_and_a_pause_is_none() -> None:
    clock = Clock()
    window = ReadingWindow(2**30, clock)
    decode(window, clock, 500, MIB, 0.002)
    fast = window.num_bytes
    assert fast == pytest.approx(125 * MIB, rel=0.01)
    clock.now_s += 60  # evaluation: nobody takes a batch
    decode(window, clock, 1, MIB, 0.002)
    assert window.num_bytes == fast
    decode(window, clock, 100, MIB, 0.01)
    assert window.num_bytes == pytest.approx(25 * MIB, rel=0.01)


class HeldReads(FolderReads):
    """Reads of a folder that arrive when the test says so."""

    def __init__(self, reader: VersionReader) -> None:
        super().__init__(reader.store)
        self.held: list[tuple[Future[list[Buffer]], Callable[[], list[Buffer]]]] = []

    def submit(self, shard: ShardRef, starts: Sequence[int], lengths: Sequence[int]) -> Future[list[Buffer]]:
        future: Future[list[Buffer]] = Future()
        self.held.append((future, lambda: self.read(shard, starts, lengths)))
        return future

    def arrive(self, number: int) -> None:
        future, read = self.held[number]
        future.set_result(read())


class WatchedViews(PlainViews):
    """Notes what is decoded, in order; the first waits for the test."""

    def __init__(self) -> None:
        super().__init__(2, 64, None)
        self.rows: list[int] = []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def fill(self, read: ViewsRead, draw: Draw, out: Any) -> None:
        self.rows.append(draw.row)
        self.begun.set()
        assert self.go_on.wait(20)
        super().fill(read, draw, out)


def test_what_is_wanted_first_is_decoded_first_and_batches_that_wait_hold_no_memory(ball_corpus: str) -> None:
    """Three batches of two are open. The last sample arrives first, then the others, last to first."""
    reader, views = VersionReader.open(ball_corpus), WatchedViews()
    reads = HeldReads(reader)
    reader._reads = (os.getpid(), reads)
    assert isinstance(reads.stats, ReadStats)
    options = LoaderOptions(num_threads=1, prefetch_batches=2)
    with BatchLoader(reader, views, options, batch_size=2) as loader:
        wanted = [loader.order.draw(position).row for position in range(6)]
        taken: list[Any] = []
        consumer = threading.Thread(target=lambda: taken.extend(next(loader) for _ in range(3)))
        consumer.start()
        deadline = time.monotonic() + 20
        while len(reads.held) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not loader._arrays._known, "no batch has memory before a sample of it is there"
        reads.arrive(5)
        assert views.begun.wait(20)
        assert len(loader._arrays._known) == 1
        for number in (4, 3, 2, 1, 0):
            reads.arrive(number)
        views.go_on.set()
        consumer.join(20)
        assert not consumer.is_alive()
    assert views.rows[:6] == [wanted[5], *wanted[:5]]
    assert np.concatenate([batch["row"].numpy() for batch in taken]).tolist() == wanted
