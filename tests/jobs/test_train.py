"""Training by Ray Train on a real local Ray, and the verb that starts it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from typer.testing import CliRunner

from jobs.cli import app
from jobs.train import train_on_ray
from lrm.checkpoint import load_model
from lrm.metrics import read_metrics
from lrm.train import train
from pipeline.types import UserError
from tests.lrm.conftest import NANO, build_corpus, nano_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_corpus(tmp_path_factory.mktemp("balls"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def losses(out: Path) -> list[float]:
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def kill_and_stop(out: Path, done: list[str]) -> None:
    """Kill one of the two workers after step 10, and from step 30 on ask the driver, which is this process, to stop."""
    deadline_s = time.monotonic() + 500
    for step in (10, 30):
        while max((line["step"] for line in read_metrics(out / "metrics.jsonl")), default=0) < step:
            if time.monotonic() > deadline_s:
                return
            time.sleep(0.02)
        if step == 30:
            done.append("stopped")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        for process in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                done.append("killed")
                process.send_signal(signal.SIGKILL)
                break


def test_two_workers_learn_what_one_process_does_a_killed_one_is_made_good_and_sigterm_saves(
    corpus: str, cluster: None, tmp_path: Path
) -> None:
    # A rate that does not depend on the number of steps.
    settings = (
        "model.volume.jitter=false",
        "train.batch_size=4",
        "train.checkpoint_every_steps=5",
        "train.min_lr_ratio=1",
    )
    out, done = tmp_path / "ray", list[str]()
    helper = threading.Thread(target=kill_and_stop, args=(out, done))
    helper.start()
    result = train_on_ray(nano_config(*settings, "train.steps=1000000"), corpus, None, out, workers=2)
    helper.join()
    assert done == ["killed", "stopped"]
    assert result.stopped
    assert 30 <= result.step == load_model(out)[2]["step"]
    assert result.steps_now < result.step  # the call that ended it took up a checkpoint
    assert not (out / "stop").exists()
    train(nano_config(*settings, f"train.steps={result.step}"), corpus, None, tmp_path / "one")
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_what_the_cluster_cannot_do_is_one_line(corpus: str, cluster: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 workers are asked for; the cluster has 2 CPU"):
        train_on_ray(nano_config(), corpus, None, tmp_path, workers=3)
    with pytest.raises(UserError, match="batch_size 3 must divide by the 2 workers"):
        train_on_ray(nano_config("train.batch_size=3"), corpus, None, tmp_path, workers=2)
    with pytest.raises(UserError, match="Ray sees no GPU"):
        train_on_ray(nano_config("train.device=cuda"), corpus, None, tmp_path)


def test_a_mistake_that_a_worker_finds_is_told_as_without_ray_and_not_tried_again(
    corpus: str, cluster: None, tmp_path: Path
) -> None:
    (tmp_path / "step-00000001.pt").touch()
    with pytest.raises(UserError, match="checkpoints of an older format"):
        train_on_ray(nano_config(), corpus, None, tmp_path, workers=1)


def test_a_cluster_that_is_not_there_is_one_line(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    result = CliRunner().invoke(app, ["train", "--corpus", corpus, "--out", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert "Ray at 127.0.0.1:9 cannot be reached" in str(result.exception)


def test_a_dry_run_says_what_a_run_is_and_starts_nothing(corpus: str, tmp_path: Path) -> None:
    settings = [part for item in NANO for part in ("--set", item)]
    out = tmp_path / "out"
    asked = ["train", "--corpus", corpus, "--out", str(out), "--dry-run", "--json", *settings]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0
    assert "version     1 of" in result.output
    assert "10 steps of 2 objects, 20 in all, 3.33 epochs" in result.output
    assert not out.exists()
    nowhere = CliRunner().invoke(app, ["train", "--corpus", str(tmp_path / "none"), "--out", str(out), "--dry-run"])
    assert nowhere.exit_code == 0
    assert "version     not counted: " in nowhere.output


def test_the_verbs_train_and_export(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = [part for item in (*NANO, "train.steps=2") for part in ("--set", item)]
    done = CliRunner().invoke(app, ["train", "--corpus", corpus, "--out", str(tmp_path / "run"), "--json", *settings])
    assert done.exit_code == 0
    assert json.loads(done.stdout.splitlines()[-1])["steps_now"] == 2
    weights = tmp_path / "weights.safetensors"
    told = CliRunner().invoke(app, ["export", "--checkpoint", str(tmp_path / "run"), "--out", str(weights)])
    assert told.exit_code == 0
    assert load_model(weights)[2]["step"] == 2
