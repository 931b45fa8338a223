"""The loader: shapes, exact resumption, ranks, damaged samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm.config import RunConfig
from lrm.data import Batch, Loader, over_white
from pipeline.reader import DamagedDataError, VersionReader
from pipeline.types import UserError
from tests.lrm.conftest import build_corpus, damage_sample, nano_config


def make_loader(corpus: str, config: RunConfig | None = None, **changes: int) -> Loader:
    config = config or nano_config()
    values = {"image_px": config.model.encoder.image_px, "batch_size": 2} | changes
    return Loader(VersionReader.open(corpus), config.data, **values)  # type: ignore[arg-type]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_batches_have_the_documented_shapes(ball_corpus: str) -> None:
    with make_loader(ball_corpus) as loader:
        batch = next(loader)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
    f32 = torch.float32
    assert shapes == {
        "input_image": ((2, 3, 32, 32), f32),
        "input_camera": ((2, 20), f32),
        "target_rgb": ((2, 3, 3, 8, 8), f32),
        "target_world_from_camera": ((2, 3, 4, 4), f32),
        "target_intrinsics": ((2, 3, 3, 3), f32),
        "background": ((2, 3), f32),
        "row": ((2,), torch.int64),
        "valid": ((2,), torch.bool),
    }
    assert 0 <= batch["target_rgb"].min() <= batch["target_rgb"].max() <= 1
    pose = batch["target_world_from_camera"][:, 0]
    torch.testing.assert_close(batch["input_camera"][:, :16].reshape(2, 4, 4), pose)
    torch.testing.assert_close(pose[:, [0, 2], 3], torch.zeros(2, 2), atol=1e-6, rtol=0)
    assert (pose[:, 1, 3] < -1.5).all()
    assert (batch["input_image"][:, :, 0, 0] == 1).all()  # the corner is background: white


def test_only_the_needed_views_are_read(ball_corpus: str) -> None:
    reader = VersionReader.open(ball_corpus)
    with make_loader(ball_corpus) as loader:
        next(loader)
        total = sum(reader.read_views(row, range(8)).num_bytes for row in range(len(reader)))
        assert 0 < loader.stats.num_bytes < 0.75 * 2 * total / len(reader)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 3))
def test_resuming_anywhere_equals_never_stopping(ball_corpus: str, done: int, threads: int, prefetch: int) -> None:
    """Across epoch ends too: 6 samples an epoch, batches of 2 and 4; the thread count and prefetch may change."""
    with make_loader(ball_corpus, batch_size=4) as loader:
        whole = [next(loader) for _ in range(12)]
    other = nano_config(f"data.num_threads={threads}", f"data.prefetch_batches={prefetch}")
    with make_loader(ball_corpus, batch_size=4) as loader:
        first = [next(loader) for _ in range(done)]
        state = json.loads(json.dumps(loader.state_dict()))
    with make_loader(ball_corpus, other, batch_size=4) as loader:
        loader.load_state_dict(state)
        assert_same(first + [next(loader) for _ in range(12 - done)], whole)


def test_ranks_take_slices_of_the_global_batch_and_may_change_on_resume(ball_corpus: str) -> None:
    with make_loader(ball_corpus, batch_size=4) as loader:
        whole = [next(loader)["row"] for _ in range(4)]
    with (
        make_loader(ball_corpus, batch_size=4, rank=0, ranks=2) as one,
        make_loader(ball_corpus, batch_size=4, rank=1, ranks=2) as two,
    ):
        halves = [torch.cat([next(one)["row"], next(two)["row"]]) for _ in range(2)]
        state = one.state_dict()
        assert state == two.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(halves, whole))
    with make_loader(ball_corpus, batch_size=2) as loader:  # half the batch: the same samples go on
        loader.load_state_dict(state)
        rest = torch.cat([next(loader)["row"] for _ in range(4)])
    assert torch.equal(rest, torch.cat(whole[2:]))
    with pytest.raises(UserError, match="batch size 1 gives rank 0 of 2 no object"):
        make_loader(ball_corpus, batch_size=1, ranks=2)


def test_a_state_of_another_version_or_seed_is_refused(ball_corpus: str, tmp_path: Path) -> None:
    other = build_corpus(tmp_path, num_objects=5, num_views=4, size_px=16)
    with make_loader(ball_corpus) as loader:
        state = loader.state_dict()
        with pytest.raises(UserError, match=r"loader state is of seed 1, this run has 0") as caught:
            loader.load_state_dict(state | {"seed": 1})
        assert "\n" not in str(caught.value)
    with make_loader(other) as loader, pytest.raises(UserError, match="loader state is of version_digest"):
        loader.load_state_dict(state)


def test_damaged_samples_are_replaced_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = build_corpus(tmp_path, num_objects=5, num_views=4, size_px=16)
    key = damage_sample(corpus, 2)
    with make_loader(corpus, batch_size=5) as loader:
        first = [next(loader) for _ in range(3)]
        assert list(loader.stats.damaged) == [2]
    assert key in caplog.text
    assert all(2 not in batch["row"] for batch in first)
    assert all(len(batch["row"]) == 5 for batch in first)
    with make_loader(corpus, batch_size=5) as loader:
        assert_same([next(loader) for _ in range(3)], first)
    strict = nano_config("data.max_damaged_samples=0")
    message = rf"1 damaged samples, data.max_damaged_samples allows 0.*{key}"
    with make_loader(corpus, strict, batch_size=5) as loader, pytest.raises(DamagedDataError, match=message):
        next(loader)


def test_compositing_is_over_white() -> None:
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    np.testing.assert_allclose(over_white(rgba), [[[1, 0, 0], [1, 1, 1], [0.8, 0.8, 0.8]]], atol=1e-6)
