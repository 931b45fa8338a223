"""The loader's promises: the same samples in the same order, whoever reads them and wherever a run was stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrm.data import PlainViews, view_loader
from lrm.dataset import ViewDataset, place_of
from lrm.loader import Batch, BatchLoader, LoaderOptions
from pipeline.reader import CacheSettings, DamagedDataError, VersionReader
from pipeline.shard import shard_key
from pipeline.store import MissingObjectError
from pipeline.types import UserError
from tests.lrm.conftest import build_corpus

SIZE_PX = 16
MIX = {"video": 3.0}
Record = tuple[int, bytes, bool]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Thirteen balls in four shards: seven of one source, six of another; 25 slots an epoch under MIX."""
    folder = tmp_path_factory.mktemp("mixed")
    return build_corpus(folder, num_objects=13, num_views=4, size_px=SIZE_PX, sources=("rendered", "video"))


def options(**changes: Any) -> LoaderOptions:
    return LoaderOptions(**({"mix": MIX, "num_threads": 1, "seed": 3, "prefetch_bytes": 20_000} | changes))


def open_loader(corpus: str, work: LoaderOptions, **changes: Any) -> BatchLoader:
    return BatchLoader(VersionReader.open(corpus), PlainViews(2, SIZE_PX, None), work, **changes)


def records(batch: Batch) -> list[Record]:
    """One record a sample: its row, its pixels and cameras, and whether it counts."""
    data = [(batch["rgba"][i].numpy().tobytes(), batch["intrinsics"][i].numpy().tobytes(),
             batch["world_from_camera"][i].numpy().tobytes()) for i in range(len(batch["row"]))]  # fmt: skip
    return [(int(row), b"".join(part), bool(ok)) for row, part, ok in zip(batch["row"], data, batch["valid"])]


class Run:
    """Ranks and workers as a training run has them: each batch of each rank comes from its worker in turn."""

    def __init__(
        self,
        corpus: str,
        work: LoaderOptions,
        ranks: int,
        workers: int,
        batch_size: int,
        place: Mapping[str, Any] | None,
    ) -> None:
        self.shares = [
            [open_loader(corpus, work, batch_size=batch_size, rank=rank, ranks=ranks, worker=w, workers=max(1, workers))
             for w in range(max(1, workers))]
            for rank in range(ranks)
        ]  # fmt: skip
        for share in self.shares:
            for loader in share:
                if place is not None:
                    loader.load_state_dict(place)
                iter(loader)
        self._turn = 0

    def batch(self) -> list[Record]:
        """The next global batch: the slices of all ranks."""
        out = [record for share in self.shares for record in records(next(share[self._turn % len(share)]))]
        self._turn += 1
        return out

    def place(self) -> dict[str, Any]:
        """The run's place, as it comes out of a checkpoint of any rank."""
        found = [place_of({str(w): loader.state_dict() for w, loader in enumerate(share)}) for share in self.shares]
        assert all(one == found[0] for one in found)
        assert len(json.dumps(found[0])) < 400
        return json.loads(json.dumps(found[0]))

    def close(self) -> None:
        for share in self.shares:
            for loader in share:
                loader.close()


_whole: dict[tuple[str, LoaderOptions], list[Record]] = {}


def whole_run(corpus: str, work: LoaderOptions, num: int) -> list[Record]:
    """The first samples of an uninterrupted run of one process, one at a time."""
    key = (corpus, work.block_shards)
    if len(_whole.get(key, ())) < num:
        run = Run(corpus, work, 1, 0, 1, None)
        _whole[key] = [record for _ in range(num) for record in run.batch()]
        run.close()
    return _whole[key][:num]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block_shards=st.sampled_from([0, 2]),
    legs=st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 5), st.integers(4, 7), st.integers(0, 5)), min_size=2, max_size=3
    ),
)
def test_any_stops_and_any_ranks_and_workers_give_the_uninterrupted_run(
    corpus: str, block_shards: int, legs: list[tuple[int, int, int, int]]
) -> None:
    """Legs of (ranks, workers, batch size, batches): up to 105 samples, four epochs of 25, with mixing."""
    work, got, place = options(block_shards=block_shards), list[Record](), None
    for ranks, workers, batch_size, num in legs:
        run = Run(corpus, work, ranks, workers, batch_size, place)
        for _ in range(num):
            got += run.batch()
        place = run.place()
        run.close()
    assert got == whole_run(corpus, work, 105)[: len(got)]
    assert all(ok for _, _, ok in got)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block_shards=st.sampled_from([0, 2]), stop=st.integers(0, 3), ranks=st.integers(1, 4), workers=st.integers(0, 5),
    batch_size=st.integers(4, 9),
)  # fmt: skip
def test_an_epochs_end_is_the_same_on_all_ranks_and_each_sample_counts_once(
    corpus: str, block_shards: int, stop: int, ranks: int, workers: int, batch_size: int
) -> None:
    """25 slots divide by no batch size here: the last batch is filled up, and every rank has as many batches."""
    work = options(block_shards=block_shards, whole_epochs=True)
    first = Run(corpus, work, 1, 0, 4, None)
    got = [record for _ in range(stop) for record in first.batch()]
    place = first.place()
    first.close()
    run = Run(corpus, work, ranks, workers, batch_size, place)
    for epoch in range(2):
        left = len(run.shares[0][0].order) - (4 * stop if epoch == 0 else 0)
        for _ in range(-(-left // batch_size)):
            got += run.batch()
        for share in run.shares:
            for loader in share:
                with pytest.raises(StopIteration):
                    next(loader)
                iter(loader)
        run._turn = 0
    run.close()
    counted = [record for record in got if record[2]]
    assert counted == whole_run(corpus, options(block_shards=block_shards), 105)[:50]
    for begin in (0, 25):
        rows = Counter(row for row, _, _ in counted[begin : begin + 25])
        assert Counter(rows.values()) == {1: 7, 3: 6}


def test_a_worker_takes_up_its_own_place_and_no_other(corpus: str) -> None:
    run = Run(corpus, options(), 1, 2, 4, None)
    for _ in range(3):
        run.batch()
    states = [loader.state_dict() for loader in run.shares[0]]
    after = [run.batch() for _ in range(2)]
    for number, loader in enumerate(run.shares[0]):
        loader.load_state_dict(json.loads(json.dumps(states[number])))
    with pytest.raises(UserError, match=r"worker 0 of 2, this is worker 1 of 2; .*place_of"):
        run.shares[0][1].load_state_dict(states[0])
    assert [run.batch() for _ in range(2)] == after
    run.close()


def test_the_stateful_data_loader_saves_and_resumes_and_its_place_is_elastic(corpus: str) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make(workers: int) -> Any:
        dataset = ViewDataset(corpus, batch_size=4, num_views=2, image_px=SIZE_PX, background=None, options=options())
        loader = stateful.StatefulDataLoader(dataset, batch_size=None, num_workers=workers)
        return dataset, loader

    expected = whole_run(corpus, options(), 40)
    _, loader = make(2)
    batches = iter(loader)
    got = [record for _ in range(3) for record in records(next(batches))]
    state = loader.state_dict()
    del batches
    _, again = make(2)  # the same number of workers: torchdata's own way
    again.load_state_dict(state)
    batches = iter(again)
    assert got + [record for _ in range(2) for record in records(next(batches))] == expected[:20]
    del batches
    for workers in (0, 1):  # another number: by the place
        dataset, other = make(workers)
        dataset.load_state_dict(place_of(state))
        batches = iter(other)
        rest = [record for _ in range(7) for record in records(next(batches))]
        assert got + rest == expected
        del batches
        dataset.close()


def test_spawned_workers_open_the_version_themselves(corpus: str) -> None:
    dataset = ViewDataset(corpus, batch_size=4, num_views=2, image_px=SIZE_PX, background=None, options=options())
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    batches = iter(loader)
    assert [record for _ in range(4) for record in records(next(batches))] == whole_run(corpus, options(), 16)


RANK = """
import json, sys
from lrm.data import PlainViews
from lrm.loader import BatchLoader, LoaderOptions
from pipeline.reader import VersionReader
corpus, rank, ranks, state = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
loader = BatchLoader(VersionReader.open(corpus), PlainViews(2, 16, None), LoaderOptions(seed=3, mix={"video": 3.0}),
                     batch_size=6, rank=rank, ranks=ranks)
if state:
    loader.load_state_dict(state)
for _ in sys.stdin:
    batch = next(loader)
    print(json.dumps([batch["row"].tolist(), loader.state_dict()]), flush=True)
"""


def start_ranks(corpus: str, num: int, state: Any) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen([sys.executable, "-c", RANK, corpus, str(rank), str(num), json.dumps(state)],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in range(num)
    ]  # fmt: skip


def step(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], Any]:
    for rank in ranks:
        rank.stdin.write("next\n")  # type: ignore[union-attr]
        rank.stdin.flush()  # type: ignore[union-attr]
    answers = [json.loads(rank.stdout.readline()) for rank in ranks]  # type: ignore[union-attr]
    assert all(state == answers[0][1] for _, state in answers)
    return [row for rows, _ in answers for row in rows], answers[0][1]


def test_a_killed_rank_costs_only_the_steps_since_the_checkpoint(corpus: str) -> None:
    """Two ranks in step, a checkpoint after the second; one is killed in the fifth; three go on from the checkpoint."""
    ranks = start_ranks(corpus, 2, None)
    kept = [step(ranks) for _ in range(2)]
    for _ in range(2):
        step(ranks)
    ranks[1].send_signal(signal.SIGKILL)
    ranks[0].kill()
    for rank in ranks:
        rank.communicate()
    ranks = start_ranks(corpus, 3, kept[-1][1])
    kept += [step(ranks) for _ in range(6)]
    for rank in ranks:
        rank.communicate()
    rows = [row for got, _ in kept for row in got]
    assert rows == [row for row, _, _ in whole_run(corpus, options(), 48)]
    assert Counter(Counter(rows[:25]).values()) == {1: 7, 3: 6}


def test_two_ranks_share_a_nodes_cache_and_read_what_ranged_reading_reads(corpus: str, tmp_path: Path) -> None:
    work = options(block_shards=2)
    cache = CacheSettings(folder=tmp_path / "cache", max_bytes=10**8, open_shards=4)
    ranks = [
        BatchLoader(
            VersionReader.open(corpus, cache=cache),
            PlainViews(2, SIZE_PX, None),
            work,
            batch_size=5,
            rank=rank,
            ranks=2,
        )
        for rank in range(2)
    ]
    got = [record for _ in range(10) for rank in ranks for record in records(next(rank))]
    assert got == whole_run(corpus, work, 105)[:50]
    reads = [rank.stats.reads for rank in ranks]
    assert sum(one.cache_misses for one in reads) == 4, "each of the four shards was brought once, by either"
    assert sum(one.num_wire_bytes for one in reads) == sum(path.stat().st_size for path in shard_files(corpus))
    assert all(one.cache_hits > 0 for one in reads)
    for rank in ranks:
        rank.close()


# ---- damage


def shard_files(corpus: str) -> list[Path]:
    return sorted((Path(corpus) / "shards").glob("*.tar"))


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def keys_in(corpus: str, path: Path) -> set[str]:
    index = VersionReader.open(corpus).index
    return {index.key(row) for row in range(len(index)) if Path(index.shard_key(row)).name == path.name}


def damage(corpus: str, how: str) -> set[str]:
    """Damage shards of a corpus; returns the keys of the samples that cannot be read any more."""
    first, second = shard_files(corpus)[:2]
    if how == "truncated":
        overwrite(first, first.read_bytes()[: first.stat().st_size // 3])
        index = VersionReader.open(corpus).index
        rows = [row for row in range(len(index)) if Path(index.shard_key(row)).name == first.name]
        return {index.key(r) for r in rows if index.parts(r, range(4))[-1].start > first.stat().st_size}
    if how == "flipped":
        data = bytearray(first.read_bytes())
        entry = VersionReader.open(corpus).index
        row = next(r for r in range(len(entry)) if Path(entry.shard_key(r)).name == first.name)
        for part in entry.parts(row, range(4)):
            data[part.start + part.length // 2] ^= 1
        overwrite(first, bytes(data))
        return {entry.key(row)}
    one, other = first.read_bytes(), second.read_bytes()
    overwrite(first, other)
    overwrite(second, one)
    return keys_in(corpus, first) | keys_in(corpus, second)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("how", ["truncated", "flipped", "swapped"])
def test_damaged_shards_are_caught_and_named(
    tmp_path: Path, how: str, cached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = build_corpus(tmp_path / "corpus", num_objects=12, num_views=4, size_px=SIZE_PX)
    VersionReader.open(corpus).index  # noqa: B018 - made before the damage, as on a node that reads already
    hurt = damage(corpus, how)
    cache = CacheSettings(folder=tmp_path / "cache", max_bytes=10**8) if cached else None
    work = LoaderOptions(max_damaged_samples=12, block_shards=2 if cached else 0)
    with view_loader(
        corpus, num_views=4, image_px=SIZE_PX, background=None, batch_size=4, options=work, cache=cache
    ) as loader:
        reader = loader._reader
        rows = [row for _ in range(3) for row in next(loader)["row"].tolist()]
        named = {reader.index.key(row) for row in loader.stats.damaged}
        assert named == hurt, "with a cache, where the digest of the whole shard fails, and without"
        assert not {reader.index.key(row) for row in rows} & named
    for key in named:
        assert key in caplog.text
    assert all(shard_key(path.stem) in caplog.text for path in shard_files(corpus)[: 2 if how == "swapped" else 1])
    strict = LoaderOptions(max_damaged_samples=0, block_shards=work.block_shards)
    with (
        view_loader(
            corpus, num_views=4, image_px=SIZE_PX, background=None, batch_size=12, options=strict, cache=cache
        ) as loader,
        pytest.raises(DamagedDataError, match=r"max_damaged_samples allows 0; the last: .*shards/"),
    ):
        next(loader)


def test_a_sample_that_is_damaged_in_part_is_delivered_alike_on_a_resumed_run(tmp_path: Path) -> None:
    """Whether a sample is replaced is a matter of the views that are wanted, not of what was found out before."""
    corpus = build_corpus(tmp_path, num_objects=8, num_views=4, size_px=16)
    reader = VersionReader.open(corpus)
    path, part = Path(corpus) / reader.shard(int(reader.index.shard[2])).key, reader.index.parts(2, [3])[-1]
    data = bytearray(path.read_bytes())
    data[part.start + part.length // 2] ^= 1
    overwrite(path, bytes(data))

    def rows_of(num_batches: int, state: Mapping[str, Any] | None = None) -> list[tuple[Mapping[str, Any], list[int]]]:
        work = LoaderOptions(max_damaged_samples=1)
        with view_loader(corpus, num_views=2, image_px=16, batch_size=4, options=work) as loader:
            if state is not None:
                loader.load_state_dict(state)
            return [(loader.state_dict(), next(loader)["row"].tolist()) for _ in range(num_batches)]

    whole = rows_of(16)
    assert all(rows_of(1, state) == [(state, rows)] for state, rows in whole)
    assert 0 < sum(rows.count(2) for _, rows in whole) < 8, "it is delivered in some epochs, and replaced in others"


def test_a_missing_shard_stops_the_run(tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path, num_objects=8, num_views=4, size_px=SIZE_PX)
    path = shard_files(corpus)[0]
    path.unlink()
    work = LoaderOptions(max_damaged_samples=8)
    with (
        view_loader(corpus, image_px=SIZE_PX, background=None, options=work) as loader,
        pytest.raises(MissingObjectError, match=f"there is no shards/{path.name}"),
    ):
        next(loader)


# ---- pixels and memory


def test_resized_views_keep_points_where_their_intrinsics_say(corpus: str) -> None:
    """A half-size picture is the area mean of the stored one, and its K maps rays through the same places."""
    with view_loader(corpus, num_views=2, image_px=SIZE_PX, background=None, batch_size=2) as loader:
        full = next(loader)
    with view_loader(corpus, num_views=2, image_px=SIZE_PX // 2, batch_size=2) as loader:
        half = next(loader)
    alpha = full["rgba"][..., 3:].float() / 255
    over = (full["rgba"][..., :3].float() / 255 * alpha + 1 - alpha).permute(0, 1, 4, 2, 3)
    mean = torch.nn.functional.avg_pool2d(over.flatten(0, 1), 2).reshape(half["image"].shape)
    torch.testing.assert_close(half["image"], mean, atol=2e-6, rtol=0)
    scale = torch.tensor([[0.5], [0.5], [1.0]])
    torch.testing.assert_close(half["intrinsics"], full["intrinsics"] * scale)
    assert torch.equal(half["world_from_camera"], full["world_from_camera"])


def test_random_backgrounds_are_drawn_by_sample_and_known(corpus: str) -> None:
    with view_loader(corpus, num_views=2, image_px=SIZE_PX, background="random", batch_size=13) as loader:
        batch = next(loader)
    corners = batch["image"][:, :, :, 0, 0]
    torch.testing.assert_close(corners, batch["background"][:, None].expand_as(corners), atol=1e-6, rtol=0)
    assert len(batch["background"][:, 0].unique()) > 5
    with view_loader(corpus, num_views=2, image_px=SIZE_PX, background="random", batch_size=13) as loader:
        assert torch.equal(next(loader)["background"], batch["background"])


def test_memory_of_dropped_batches_is_used_again_and_of_kept_ones_never(corpus: str) -> None:
    with view_loader(corpus, num_views=2, image_px=SIZE_PX, background=None, batch_size=2) as loader:
        kept = [next(loader) for _ in range(20)]
        copies = [{name: value.clone() for name, value in batch.items()} for batch in kept]
        addresses = set()
        for _ in range(30):
            addresses.add(next(loader)["rgba"].data_ptr())
        assert all(torch.equal(a[name], b[name]) for a, b in zip(kept, copies) for name in a)
        assert len({batch["rgba"].data_ptr() for batch in kept}) == 20
        assert len(addresses) < 15


def test_prefetch_is_bounded_in_bytes_and_batches(corpus: str) -> None:
    work = LoaderOptions(prefetch_bytes=1, prefetch_batches=1, num_threads=2)
    with view_loader(corpus, num_views=2, image_px=SIZE_PX, background=None, batch_size=2, options=work) as loader:
        next(loader)
        time.sleep(0.3)
        assert loader.stats.reads.num_requests <= 2 * 3 + 1  # one batch taken, one waited for, one ahead; one read
        assert loader._bytes_ahead < 10_000
    assert 0.5 < loader.stats.wire_ratio <= 1


def test_the_wait_of_a_slow_consumer_is_near_nothing(corpus: str) -> None:
    with view_loader(corpus, num_views=2, image_px=SIZE_PX, background=None, batch_size=2) as loader:
        next(loader)
        before = loader.stats.data_wait_s
        for _ in range(10):
            deadline = time.monotonic() + 20
            while loader._batches[0].left and time.monotonic() < deadline:
                time.sleep(0.005)  # the consumer works; the next batch gets ready meanwhile
            next(loader)
        assert loader.stats.data_wait_s - before < 0.5
        assert loader.stats.num_objects == 22


def test_closing_in_the_middle_of_reading_ends(corpus: str) -> None:
    for _ in range(5):
        loader = view_loader(corpus, num_views=2, image_px=SIZE_PX, background=None, batch_size=4)
        if random.random() < 0.5:
            next(loader)
        loader.close()


def test_forked_workers_refuse_a_remote_store_by_name(corpus: str) -> None:
    reader = VersionReader.open(corpus, cache=CacheSettings(folder=Path(corpus) / "cache", max_bytes=10**8))
    reader._pid = os.getpid() + 1
    with pytest.raises(UserError, match=r'forked from .*multiprocessing_context="spawn"'):
        reader.read_views(0, [0])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    np.seterr(all="raise", under="ignore")
    yield
    np.seterr(all="warn", under="ignore")
