"""Checkpoints: whole or not there; read on any number of ranks (tests/lrm/test_resume.py); no code runs from one."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lrm import checkpoint
from lrm.checkpoint import (
    MARKER,
    Saver,
    checkpoint_paths,
    export_weights,
    load_model,
    load_tensors,
    newest_checkpoint,
    read_checkpoint,
    remove_strays,
)
from lrm.ranks import Ranks
from lrm.train import train
from pipeline.types import UserError
from tests.lrm.conftest import nano_config

ALONE = Ranks(rank=0, size=1, device=torch.device("cpu"))


def tensors(step: int) -> dict[str, Tensor]:
    return {"model.w": torch.full((1000, 3), float(step)), "model.b": torch.full((7,), -float(step))}


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    folder.mkdir(exist_ok=True)
    with Saver(folder, keep, ALONE) as saver:
        for step in steps:
            saver.save(tensors(step), {"step": step, "told": [1, None, "x"]})


def test_the_newest_few_are_kept_and_read_back(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 30)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000030", "step-00000002"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.run == {"step": 30, "told": [1, None, "x"]}
    assert found.tensors == {"model.w", "model.b"}
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    load_tensors(found, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(30).items())
    with pytest.raises(UserError, match=r"lacks model\.c and 0 other"):
        load_tensors(found, into | {"model.c": torch.zeros(1)})
    assert newest_checkpoint(tmp_path / "none") is None


def test_a_torch_that_closes_its_stager_after_every_save_can_save_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch before 2.13 does to a stager that it is given."""
    real = checkpoint.async_save

    def older(*args: Any, **kwargs: Any) -> Any:
        future = real(*args, **kwargs)
        kwargs["async_stager"].close()
        return future

    monkeypatch.setattr(checkpoint, "async_save", older)
    save(tmp_path, 1, 2)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    load_tensors(found, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(2).items())


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path) -> None:
    """Training goes on while a thread writes."""
    state = {"model.w": torch.zeros(2_000_000)}
    with Saver(tmp_path, 1, ALONE) as saver:
        saver.save(state, {"step": 1})
        state["model.w"].fill_(7.0)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    into = {"model.w": torch.ones(2_000_000)}
    load_tensors(found, into)
    assert torch.equal(into["model.w"], torch.zeros(2_000_000))


def shard_of(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def damage(path: Path, how: str) -> None:
    """Do to a complete checkpoint what disks and people do."""
    shard, marker = shard_of(path), path / MARKER
    data = bytearray(shard.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif how == "cut":
        shard.write_bytes(data[: len(data) * 2 // 3])
    elif how == "lost shard":
        shard.unlink()
    elif how == "foreign shard":
        shutil.copy(shard, path / "shard-00009-model-00001-of-00001.safetensors")
    elif how == "cut marker":
        marker.write_text(marker.read_text()[:-20])
    elif how == "other marker":
        marker.write_text("[]")
    else:
        assert how == "no marker"
        marker.unlink()


@pytest.mark.parametrize(
    "how", ["flip", "cut", "lost shard", "foreign shard", "cut marker", "other marker", "no marker"]
)
def test_a_damaged_newest_one_falls_back_with_a_warning(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002", how)
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.run["step"] == 1
    warned = [record.getMessage() for record in caplog.records if record.name == "lrm.checkpoint"]
    assert any("step-00000002" in text for text in warned) == (how != "no marker")  # one that never counted: no word
    save(tmp_path, 2)  # the run comes by there again
    again = newest_checkpoint(tmp_path)
    assert again is not None
    assert again.run["step"] == 2
    for path in checkpoint_paths(tmp_path):
        damage(path, "flip")
    with pytest.raises(UserError, match="none of its 2 checkpoints is readable"):
        newest_checkpoint(tmp_path)


def test_checkpoints_of_the_older_format_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "step-00000100.pt").write_bytes(b"zip")
    with pytest.raises(UserError, match="checkpoints of an older format"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["fsync", "commit"])
def test_a_failing_write_ends_in_one_line_and_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        if place == "fsync":
            broken.setattr(checkpoint.os, "fsync", fail)
        else:
            broken.setattr(checkpoint.Path, "replace", fail)
        with pytest.raises(OSError, match=r"could not be written to .*: No space left on device") as caught:
            save(tmp_path, 2)
    assert "\n" not in str(caught.value)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000001"]
    remove_strays(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    save(tmp_path, 2)
    assert len(checkpoint_paths(tmp_path)) == 2


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a pickle in a shard's place, with a marker that vouches for it, nor one where torch keeps its index."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    bomb = pickle.dumps(Bomb())
    (path / ".metadata").write_bytes(bomb)
    found = read_checkpoint(path)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    load_tensors(found, into)
    shard = shard_of(path)
    shard.write_bytes(bomb)
    marker = json.loads((path / MARKER).read_text())
    marker["files"][shard.name] = [len(bomb), zlib.crc32(bomb)]
    (path / MARKER).write_text(json.dumps(marker))
    with pytest.raises(ValueError, match="is not readable"):
        read_checkpoint(path)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)  # the bomb is one
    assert (tmp_path / "exploded").exists()


def test_exported_weights_are_the_averaged_ones_and_load_alone(ball_corpus: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(nano_config("train.steps=6", "train.ema_decay=0.5"), ball_corpus, None, run)
    num_bytes = export_weights(run, tmp_path / "out" / "weights.safetensors")
    assert num_bytes == (run / "model.safetensors").stat().st_size  # made at the end of a run
    model, config, state = load_model(tmp_path / "out" / "weights.safetensors")
    assert (state["step"], config.train.ema_decay, model.training) == (6, 0.5, False)
    found = newest_checkpoint(run)
    assert found is not None
    saved: dict[str, Tensor] = {}
    with safe_open(shard_of(found.path), framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[f"ema.{name}"])
    assert any(not torch.equal(saved[f"ema.{name}"], saved[f"model.{name}"]) for name in model.state_dict())
    for path in (run, found.path):
        again, _, at = load_model(path)
        assert at["step"] == 6
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a file of exported weights"):
        load_model(tmp_path / "bad.safetensors")
