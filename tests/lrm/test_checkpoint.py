"""Checkpoints: whole or not there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lrm import checkpoint
from lrm.checkpoint import checkpoint_paths, newest_checkpoint, read_checkpoint, remove_strays, save_checkpoint
from pipeline.types import UserError


def state(step: int) -> checkpoint.State:
    return {"step": step, "model": {"w": torch.full((1000,), float(step))}}


def test_the_newest_few_are_kept_and_read_back(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000030.pt", "step-00000002.pt"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 30
    assert newest_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["cut", "empty", "flip"])
def test_a_damaged_newest_one_falls_back_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, state(1), keep=2)
    path = save_checkpoint(tmp_path, state(2), keep=2)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[: len(data) * 2 // 3], "empty": b"", "flip": data}[damage])
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1
    assert "step-00000002.pt" in caplog.text
    checkpoint_paths(tmp_path)[1].write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of its 2 checkpoints is readable"):
        newest_checkpoint(tmp_path)


def test_a_failing_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, state(1), keep=2)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, state(2), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    (tmp_path / ".step-00000002.pt.77.tmp").write_bytes(b"half")
    remove_strays(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save({"step": 1, "model": {}, "bad": Path("x")}, path)
    with pytest.raises(ValueError, match="is not readable"):
        read_checkpoint(path)
