"""How a loader ends, and begins again elsewhere: closed, dropped, forked, pickled, or left to the interpreter's end."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lrm.data import PlainViews, view_loader
from lrm.dataset import ViewDataset
from lrm.loader import Batch, BatchLoader, Fields, LoaderOptions
from lrm.order import Draw
from pipeline.reader import DamagedDataError, VersionReader, ViewsRead
from pipeline.types import UserError
from tests.lrm.test_windows import HeldReads
from tests.pipeline.test_reads import WebServer

PATIENCE_S = 20.0


@pytest.fixture
def server(ball_corpus: str) -> Iterator[WebServer]:
    web = WebServer(Path(ball_corpus))
    yield web
    web.gate.set()
    web.shutdown()
    web.server_close()


def until(done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)
    return done()


def open_loader(reader: VersionReader) -> BatchLoader:
    return BatchLoader(reader, PlainViews(2, 64, None), LoaderOptions(prefetch_bytes=200_000), batch_size=4)


def open_dataset(corpus: str) -> ViewDataset:
    return ViewDataset(corpus, batch_size=4, num_views=2, image_px=64, background=None)


def rows(batch: Batch) -> list[int]:
    return [int(row) for row in batch["row"]]


@pytest.fixture(scope="module")
def expected(ball_corpus: str) -> list[list[int]]:
    """Rows of the first batches of an uninterrupted run."""
    with open_loader(VersionReader.open(ball_corpus)) as loader:
        return [rows(next(loader)) for _ in range(6)]


def test_a_closed_loader_says_so_to_whoever_takes_or_waits_for_a_batch(ball_corpus: str) -> None:
    reader = VersionReader.open(ball_corpus)
    reads = HeldReads(reader)
    reader._reads = (os.getpid(), reads)
    loader = open_loader(reader)
    with ThreadPoolExecutor(1) as consumer:
        waiting = consumer.submit(next, loader)
        assert until(lambda: bool(reads.held))
        time.sleep(0.1)
        loader.close()
        with pytest.raises(UserError, match="this loader is closed"):
            waiting.result(5)
        with pytest.raises(UserError, match="this loader is closed"):
            consumer.submit(next, loader).result(5)


def test_a_batch_that_an_interrupt_keeps_from_its_consumer_is_in_the_rest_of_the_run(
    ball_corpus: str, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes while the loader, which has a batch in hand, asks for what is to be read next."""
    with open_loader(VersionReader.open(ball_corpus)) as loader:
        assert [rows(next(loader)) for _ in range(2)] == expected[:2]
        assert until(lambda: not loader._batches[0].left)

        looks = itertools.count()

        def top_up() -> None:
            if threading.current_thread() is threading.main_thread() and next(looks) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(loader, "_top_up", top_up)
        with pytest.raises(KeyboardInterrupt):
            next(loader)
        state = loader.state_dict()
    with open_loader(VersionReader.open(ball_corpus)) as again:
        again.load_state_dict(state)
        assert rows(next(again)) == expected[2]


class AllDamaged(PlainViews):
    """Finds every sample damaged, while the store falls silent."""

    def __init__(self, server: WebServer) -> None:
        super().__init__(2, 64, None)
        self.server, self.found = server, threading.Event()

    def fill(self, read: ViewsRead, draw: Draw, out: Fields) -> None:
        self.server.gate.clear()
        self.found.set()
        raise DamagedDataError(f"sample {read.key}: not a picture")


def test_closing_waits_for_no_substitute_that_the_store_owes(server: WebServer) -> None:
    views = AllDamaged(server)
    options = LoaderOptions(prefetch_bytes=1, num_threads=1, max_damaged_samples=6)
    loader = BatchLoader(VersionReader.open(server.url), views, options, batch_size=1)
    with ThreadPoolExecutor(1) as consumer:
        waiting = consumer.submit(next, loader)
        assert views.found.wait(PATIENCE_S)
        time.sleep(0.2)
        begun = time.monotonic()
        loader.close()
        assert time.monotonic() - begun < 5
        with pytest.raises(UserError, match="this loader is closed"):
            waiting.result(5)


def test_closing_a_loader_leaves_another_of_the_same_reader_at_work(
    server: WebServer, expected: list[list[int]]
) -> None:
    reader = VersionReader.open(server.url)
    first, second = open_loader(reader), open_loader(reader)
    got = [rows(next(second))]
    next(first)
    first.close()
    got += [rows(next(second)) for _ in range(5)]
    assert got == expected
    assert second.stats.reads is reader.stats
    second.close()
    assert until(lambda: "shard-requests" not in {thread.name for thread in threading.enumerate()})


def test_a_loader_that_is_dropped_unclosed_leaves_no_thread(server: WebServer) -> None:
    before = set(threading.enumerate())

    def new() -> set[str]:
        gc.collect()
        return {thread.name for thread in threading.enumerate() if thread not in before} & {
            "shard-requests", "lrm-decode_0", "lrm-decode_1"
        }  # fmt: skip

    loader = open_loader(VersionReader.open(server.url))
    next(loader)
    assert "shard-requests" in new()
    del loader
    assert until(lambda: not new()), new()


LEAVES = """
import sys
from lrm.data import view_loader
loader = view_loader(sys.argv[1], num_views=2, image_px=64, batch_size=2)
next(loader)
"""


def test_a_process_that_leaves_its_loader_unclosed_ends_in_peace(server: WebServer) -> None:
    """Answers that come while the interpreter ends used to abort it, or to print what nobody understands."""
    len(VersionReader.open(server.url))  # the node's index is made
    server.slow = SlowAll(0.02)
    done = subprocess.run(
        [sys.executable, "-c", LEAVES, server.url], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


class SlowAll(dict[str, float]):
    """Makes every ranged request of a server slow."""

    def __init__(self, seconds: float) -> None:
        super().__init__(any=seconds)

    def pop(self, key: str, *_: object) -> float:  # type: ignore[override]
        return self["any"]


def test_workers_go_on_from_where_the_dataset_came_to_in_their_parent(
    ball_corpus: str, expected: list[list[int]]
) -> None:
    """A look at a first batch, or at the state, opens the loader in the parent: its threads are no worker's."""
    dataset = open_dataset(ball_corpus)
    got = [rows(next(iter(dataset)))]
    spawned = pickle.loads(pickle.dumps(dataset))
    assert rows(next(iter(spawned))) == expected[1]
    spawned.close()
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=10
    )
    batches = iter(loader)
    got += [rows(next(batches)) for _ in range(3)]
    assert got == expected[:4]
    del batches
    dataset.close()


def test_a_closed_dataset_goes_on_from_where_it_came_to(ball_corpus: str, expected: list[list[int]]) -> None:
    dataset, got = open_dataset(ball_corpus), list[list[int]]()
    for _ in range(3):
        got.append(rows(next(iter(dataset))))
        dataset.close()
    assert got == expected[:3]


def test_a_loader_of_the_parent_is_refused_in_a_forked_process(ball_corpus: str) -> None:
    with view_loader(ball_corpus, num_views=2, image_px=64, batch_size=2) as loader:
        next(loader)
        loader._pid = os.getpid() + 1
        with pytest.raises(UserError, match="in the process that this one was forked from"):
            next(loader)
