"""Where metrics go: the file, TensorBoard, W&B."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from lrm import metrics
from lrm.flops import count_flops
from lrm.loader import LoaderStats
from lrm.metrics import Clock, Recorder, append_metrics, check_recorders, read_metrics, rewind_metrics
from lrm.ranks import Ranks
from pipeline.types import UserError
from tests.lrm.conftest import nano_config


def board(folder: Path) -> list[Event]:
    """Read TensorBoard's files by their format: length (8), CRC (4), event, CRC (4)."""
    events = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return events


def test_lines_are_rewound_to_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_metrics(path, {"step": step, "loss": float("nan") if step == 2 else 0.5})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    rewind_metrics(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": None},
    ]  # fmt: skip


def test_tensorboard_gets_every_number_and_the_pictures(tmp_path: Path) -> None:
    config = nano_config("train.tensorboard=true")
    check_recorders(config)
    recorder = Recorder(tmp_path, config, 4)
    recorder.write({"step": 5, "loss": 0.25, "mfu": None})
    recorder.draw(5, tmp_path / "p.png", np.zeros((4, 6, 3), np.uint8))
    recorder.close()
    values = [(event.step, value) for event in board(tmp_path / "tensorboard") for value in event.summary.value]
    assert [(step, value.tag, value.simple_value) for step, value in values if value.tag == "loss"] == [
        (5, "loss", 0.25)
    ]
    assert [(value.image.height, value.image.width) for _, value in values if value.tag == "views"] == [(4, 6)]
    assert len(values) == 2
    assert any(event.session_log.status == event.session_log.START for event in board(tmp_path / "tensorboard"))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 0.25, "mfu": None}]


def test_wandb_is_told_and_a_resumed_run_goes_on_in_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def init(**settings: Any) -> SimpleNamespace:
        told.append(settings)
        return SimpleNamespace(log=lambda line, step: told.append((step, line)), finish=lambda: told.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda path: path))
    config = nano_config("train.wandb_project='p'")
    for step in (1, 2):
        recorder = Recorder(tmp_path, config, step)
        recorder.write({"step": step, "loss": 0.5, "mfu": None})
        recorder.draw(step, tmp_path / "x.png", np.zeros((1, 1, 3), np.uint8))
        recorder.close()
    assert told[1:4] == [(1, {"loss": 0.5}), (1, {"views": str(tmp_path / "x.png")}), "end"]
    assert (told[0]["project"], told[0]["resume"], told[0]["id"]) == ("p", "allow", told[4]["id"])


def test_a_package_that_is_not_there_is_one_line_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, setting in (("wandb", "train.wandb_project='p'"), ("tensorboardX", "train.tensorboard=true")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"pip install {package}") as caught:
            check_recorders(nano_config(setting))
        assert "\n" not in str(caught.value)


def test_speed_and_utilisation_are_those_of_the_time_between_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    config, stats = nano_config(), LoaderStats()
    clock = Clock(stats, config, Ranks(rank=0, size=4, device=torch.device("cpu")))
    clock._peak = 1e9  # a device that is known
    stats.num_objects, stats.data_wait_s, now = 50, 0.5, 107.0
    clock.leave_out(2.0)
    line = clock.read()
    assert (line["objects_per_s"], line["data_wait_share"]) == (40.0, 0.1)
    assert line["mfu"] == pytest.approx(10 * count_flops(config).train / 1e9, abs=1e-4)
    assert int(line["peak_mem_bytes"] or 0) > 50e6
    stats.num_objects, now = 60, 108.0
    assert clock.read()["objects_per_s"] == 40.0
