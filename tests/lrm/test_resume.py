"""Killed at any point and started again, on as many ranks or others, a run logs the losses of one that never stopped.

The processes are real, and so are the kills: signal 9, whenever it comes, in a step or while a checkpoint is written.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from lrm.checkpoint import checkpoint_paths, load_model, newest_checkpoint
from lrm.metrics import read_metrics
from lrm.train import train
from tests.lrm.conftest import NANO, nano_config
from tests.lrm.zygote import Zygote

STEPS = 30
COMMON = (
    f"train.steps={STEPS}", "train.batch_size=4", "train.ema_decay=0.9", "train.checkpoint_every_steps=3",
    "train.log_every_steps=2",  # so that a checkpoint holds a loss that is not logged yet
)  # fmt: skip
SAME_FOR_ANY_RANKS = "model.volume.jitter=false"  # rays are jittered by rank


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as one:
        yield one


def command(corpus: str, out: Path, *overrides: str) -> list[str]:
    settings = [part for item in (*NANO, *COMMON, *overrides) for part in ("--set", item)]
    return ["--corpus", corpus, "--config", "tiny", "--out", str(out), *settings]


def losses(out: Path) -> list[float]:
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(2, STEPS + 1, 2))  # none twice, none missing
    return [line["loss"] for line in lines]


def last_step(out: Path) -> int:
    return max((line["step"] for line in read_metrics(out / "metrics.jsonl")), default=0)


def kill_at(zygote: Zygote, pids: Sequence[int], out: Path, step: int, delay_s: float) -> None:
    """Kill the last process `delay_s` after the step was logged; the others follow it, or are seen to end."""
    deadline_s = time.monotonic() + 120
    while last_step(out) < step:
        assert time.monotonic() < deadline_s
        assert zygote.exit_status(pids[0]) is None, "training ended early"
        time.sleep(0.002)
    time.sleep(delay_s)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGKILL)
    assert set(zygote.wait(pids)) <= {-signal.SIGKILL, 0}


@pytest.mark.parametrize(
    ("worlds", "parallel", "overrides"),
    [
        ((1, 1, 1, 1), "ddp", ()),
        ((2, 2, 2), "ddp", ()),
        ((2, 1, 2, 1), "ddp", (SAME_FOR_ANY_RANKS,)),
        ((1, 2, 1), "fsdp", (SAME_FOR_ANY_RANKS,)),
    ],
    ids=["one", "two", "two-one", "one-sharded"],
)
def test_killed_anywhere_it_goes_on_with_the_same_losses(
    ball_corpus: str, tmp_path: Path, zygote: Zygote, worlds: tuple[int, ...], parallel: str, overrides: tuple[str, ...]
) -> None:
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    ask = (f"train.parallel={parallel}", *overrides)
    assert set(zygote.wait(zygote.start(command(ball_corpus, whole, *ask), log, worlds[0]))) == {0}
    random_ = random.Random(f"{worlds}{parallel}")
    for world in worlds[:-1]:
        pids = zygote.start(command(ball_corpus, killed, *ask), log, world)
        kill_at(zygote, pids, killed, min(last_step(killed) + 4, STEPS - 6), random_.uniform(0, 0.1))
    assert set(zygote.wait(zygote.start(command(ball_corpus, killed, *ask), log, worlds[-1]))) == {0}
    tolerance = 1e-5 if len(set(worlds)) == 1 else 1e-3
    assert losses(killed) == pytest.approx(losses(whole), rel=tolerance)
    ours, theirs = (load_model(out)[0].state_dict() for out in (killed, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance)


def test_a_rank_that_dies_ends_the_others(ball_corpus: str, tmp_path: Path, zygote: Zygote) -> None:
    out = tmp_path / "run"
    first, second = zygote.start(command(ball_corpus, out, "train.steps=100000"), tmp_path / "log", 2)
    deadline_s = time.monotonic() + 120
    while last_step(out) < 4:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    os.kill(second, signal.SIGKILL)
    assert zygote.wait([second]) == [-signal.SIGKILL]
    assert zygote.wait([first], timeout_s=60)[0] not in (0, None)
    found = newest_checkpoint(out)
    assert found is not None
    assert found.run["step"] >= 3


def test_sigterm_at_one_rank_saves_on_all(ball_corpus: str, tmp_path: Path, zygote: Zygote) -> None:
    out = tmp_path / "run"
    ranks = zygote.start(command(ball_corpus, out, "train.steps=100000"), tmp_path / "log", 2)
    deadline_s = time.monotonic() + 120
    while last_step(out) < 4:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    os.kill(ranks[1], signal.SIGTERM)
    assert zygote.wait(ranks, timeout_s=60) == [3, 3]
    found = newest_checkpoint(out)
    assert found is not None
    assert found.run["step"] - last_step(out) in (0, 1)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_save_what_one_would_and_each_writes_its_share(
    ball_corpus: str, tmp_path: Path, zygote: Zygote, parallel: str
) -> None:
    settings = (SAME_FOR_ANY_RANKS, f"train.parallel={parallel}", "train.heldout_every_steps=10")
    ranks = zygote.start(command(ball_corpus, tmp_path / "two", *settings), tmp_path / "log", 2)
    train(nano_config(*COMMON, *settings), ball_corpus, None, tmp_path / "one")
    assert set(zygote.wait(ranks)) == {0}
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    looked = [
        [line["psnr_train"] for line in read_metrics(tmp_path / out / "metrics.jsonl") if "psnr_train" in line]
        for out in ("one", "two")
    ]
    assert len(looked[0]) == 3
    assert looked[1] == pytest.approx(looked[0], abs=0.02)
    one, two = (checkpoint_paths(tmp_path / out)[0] for out in ("one", "two"))
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (one, two)]
    assert len(list(two.glob("*.safetensors"))) == 2
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)  # nothing is written twice
    assert max(file.stat().st_size for file in two.glob("*.safetensors")) < 0.7 * sizes[1]
    ours, theirs = (load_model(tmp_path / out)[0].state_dict() for out in ("two", "one"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3)
