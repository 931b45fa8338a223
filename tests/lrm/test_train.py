"""The loop: killed and started again it goes on with the same numbers; it learns; it refuses what it cannot do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from lrm.checkpoint import checkpoint_paths, load_model
from lrm.metrics import read_metrics
from lrm.optim import Ema, build_optimizer, learning_rate
from lrm.train import Trainer, TrainingError, build_model, main, train
from pipeline.types import UserError
from tests.lrm.conftest import NANO, build_corpus, nano_config

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}


def command(corpus: str, out: Path, *overrides: str) -> list[str]:
    settings = [part for item in (*NANO, *overrides) for part in ("--set", item)]
    return ["-m", "lrm.train", "--corpus", corpus, "--config", "tiny", "--out", str(out), *settings]


def losses(out: Path) -> list[float]:
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))  # none twice, none missing
    return [line["loss"] for line in lines]


def wait_for_step(out: Path, step: int, process: subprocess.Popen[Any]) -> None:
    deadline_s = time.monotonic() + 120
    while not any(line["step"] >= step for line in read_metrics(out / "metrics.jsonl")):
        assert process.poll() is None, "training ended early"
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole_run(ball_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of 120 steps without interruption."""
    out = tmp_path_factory.mktemp("whole")
    result = train(nano_config("train.steps=120", "train.ema_decay=0.9"), ball_corpus, None, out)
    assert (result.step, result.steps_now, result.stopped) == (120, 120, False)
    return losses(out)


def test_sigterm_saves_and_the_run_goes_on(ball_corpus: str, tmp_path: Path, whole_run: list[float]) -> None:
    overrides = ("train.steps=120", "train.ema_decay=0.9", "train.checkpoint_every_steps=1000")
    process = subprocess.Popen(
        [sys.executable, *command(ball_corpus, tmp_path, *overrides)], env=ENV, stderr=subprocess.DEVNULL
    )
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3
    done = len(losses(tmp_path))
    assert 3 <= done < 120
    assert checkpoint_paths(tmp_path)[0].name == f"step-{done:08d}"
    assert train(nano_config(*overrides), ball_corpus, None, tmp_path).steps_now == 120 - done
    assert losses(tmp_path) == pytest.approx(whole_run, rel=1e-4)


def test_a_cut_checkpoint_costs_only_the_steps_since_the_one_before(
    ball_corpus: str, tmp_path: Path, whole_run: list[float]
) -> None:
    config = nano_config("train.steps=120", "train.ema_decay=0.9", "train.checkpoint_every_steps=10")
    train(config, ball_corpus, None, tmp_path)
    newest = next(checkpoint_paths(tmp_path)[0].glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    assert train(config, ball_corpus, None, tmp_path).steps_now == 10
    assert losses(tmp_path) == pytest.approx(whole_run, rel=1e-4)


def test_a_finished_run_returns_at_once_and_can_be_extended(
    ball_corpus: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    train(nano_config("train.steps=2"), ball_corpus, None, tmp_path)
    again = train(nano_config("train.steps=2"), ball_corpus, None, tmp_path)
    assert (again.step, again.steps_now, again.loss) == (2, 0, None)
    assert "all 2 steps are done" in caplog.text
    more = train(nano_config("train.steps=3"), ball_corpus, None, tmp_path)
    assert (more.step, more.steps_now) == (3, 1)
    assert "train.steps 2 -> 3" in caplog.text


def test_another_model_or_version_is_refused(ball_corpus: str, tmp_path: Path) -> None:
    train(nano_config("train.steps=1"), ball_corpus, None, tmp_path / "run")
    with pytest.raises(UserError, match=r"trained with model.decoder.width = 32, the config says 64"):
        train(nano_config("model.decoder.width=64"), ball_corpus, None, tmp_path / "run")
    other = build_corpus(tmp_path / "other", num_objects=3, num_views=4, size_px=16)
    with pytest.raises(UserError, match="checkpoint is of version"):
        train(nano_config(), other, None, tmp_path / "run")


def test_training_lowers_the_loss(ball_corpus: str, tmp_path: Path) -> None:
    overrides = ("train.steps=80", "train.lr=3e-3", "train.log_every_steps=20", "train.batch_size=6")
    train(nano_config(*overrides), ball_corpus, None, tmp_path)
    logged = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert logged[-1] < 0.7 * logged[0]
    model, config, state = load_model(tmp_path)
    assert (state["step"], config.train.steps, model.training) == (80, 80, False)


def test_a_step_without_a_finite_gradient_changes_nothing(ball_corpus: str) -> None:
    from lrm.data import Loader
    from lrm.ranks import Ranks
    from pipeline.reader import VersionReader

    config, reader = nano_config(), VersionReader.open(ball_corpus)
    with Loader(reader, config.data, image_px=32, batch_size=2) as loader:
        place = Ranks(rank=0, size=1, device=torch.device("cpu"))
        trainer = Trainer(config, loader, reader.digest, place, None)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        batch = next(loader)
        trainer.train_step(batch | {"target_rgb": torch.full_like(batch["target_rgb"], float("nan"))})
        assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
        assert (trainer.step, trainer.skipped, trainer.window) == (1, 1, [])
        trainer.train_step(batch)
        assert (trainer.step, trainer.skipped, len(trainer.window)) == (2, 1, 1)


def test_the_users_mistake_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(str(tmp_path / "nothing"), tmp_path / "out")[2:]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def test_the_schedule_warms_up_and_falls() -> None:
    config = nano_config("train.steps=100", "train.warmup_steps=10", "train.lr=1.0").train
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def test_biases_and_norms_do_not_decay() -> None:
    config = nano_config()
    model = build_model(config, load_weights=True)
    decayed, kept = build_optimizer(model, config.train).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    assert {id(p) for p in kept["params"]} >= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_too_many_steps_without_a_finite_gradient_end_the_run(ball_corpus: str, tmp_path: Path) -> None:
    """A learning rate that blows the weights up makes every later gradient NaN."""
    overrides = ("train.steps=50", "train.lr=1e30", "train.max_skipped_steps=3")
    with pytest.raises(TrainingError, match=r"4 steps had no finite gradient, train.max_skipped_steps allows 3"):
        train(nano_config(*overrides), ball_corpus, None, tmp_path)


def test_a_file_called_stop_saves_and_ends_the_run(ball_corpus: str, tmp_path: Path) -> None:
    def ask() -> None:
        while not read_metrics(tmp_path / "metrics.jsonl"):
            time.sleep(0.01)
        (tmp_path / "stop").touch()

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    result = train(nano_config("train.steps=1000000"), ball_corpus, None, tmp_path)
    assert result.stopped
    assert load_model(tmp_path)[2]["step"] == result.step
    assert not (tmp_path / "stop").exists()
    (tmp_path / "stop").touch()  # of a time when nothing ran
    assert not train(nano_config(f"train.steps={result.step + 2}"), ball_corpus, None, tmp_path).stopped


def test_averaged_weights_are_their_recursion() -> None:
    model = build_model(nano_config(), load_weights=True)
    ema, name = Ema(model, 0.75), "decoder.camera_embedding.0.weight"
    expected = model.state_dict()[name].clone()
    for _ in range(3):
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        expected = 0.75 * expected + 0.25 * model.state_dict()[name]
        ema.update()
    torch.testing.assert_close(ema.tensors[name], expected)
    assert ema.tensors.keys() == dict(model.named_parameters()).keys()


def test_bf16_learns_what_fp32_does_nearly(ball_corpus: str, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        train(nano_config("train.steps=6", f"train.precision='{precision}'"), ball_corpus, None, tmp_path / precision)
    full, half = (losses(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert half == pytest.approx(full, rel=0.02)
    assert half != full
    assert all(tensor.dtype == torch.float32 for tensor in load_model(tmp_path / "bf16")[0].state_dict().values())


def test_gradients_are_clipped_to_their_norm(ball_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []

    def spy(optimizer: torch.optim.AdamW, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(nano_config("train.steps=2", "train.max_grad_norm=1e-3"), ball_corpus, None, tmp_path)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)
    assert all(line["grad_norm"] > 2e-3 for line in read_metrics(tmp_path / "metrics.jsonl"))  # as it was before


def test_held_out_objects_are_measured_and_drawn_and_change_nothing(tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path / "split", num_objects=12, heldout_per_mille=300)
    plain = nano_config("train.steps=6")
    watched = nano_config(
        "train.steps=6", "train.heldout_every_steps=2", "train.pictures_every_steps=3", "train.heldout_objects=2",
        "train.tensorboard=true",
    )  # fmt: skip
    for config, out in ((plain, "plain"), (watched, "watched")):
        train(config, corpus, None, tmp_path / out)
    assert losses(tmp_path / "watched") == losses(tmp_path / "plain")
    lines = read_metrics(tmp_path / "watched" / "metrics.jsonl")
    assert [line["step"] for line in lines if "psnr_heldout" in line] == [2, 4, 6]
    assert all(3 < line["psnr_heldout"] < 60 for line in lines if "psnr_heldout" in line)
    pictures = sorted((tmp_path / "watched" / "pictures").iterdir())
    assert [path.name for path in pictures] == ["step-00000003.png", "step-00000006.png"]
    assert cv2.imread(str(pictures[0])).shape == (2 * 26 - 2, 7 * 26 - 2, 3)  # input, three times (true, predicted)
    assert list((tmp_path / "watched" / "tensorboard").iterdir())
