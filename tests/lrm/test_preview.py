"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

from lrm.preview import write_loss_curve, write_predictions
from lrm.train import train
from pipeline.reader import VersionReader
from pipeline.types import UserError
from tests.lrm.conftest import nano_config


def test_a_run_is_drawn(ball_corpus: str, tmp_path: Path) -> None:
    train(nano_config("train.steps=2"), ball_corpus, None, tmp_path / "run")
    reader = VersionReader.open(ball_corpus)
    found = write_predictions(tmp_path / "run", reader, tmp_path / "out" / "p.png", num_objects=3, image_px=24)
    assert (found["step"], found["split"], found["objects"]) == (2, "train", 3)
    assert 0 < float(found["psnr_db"]) < 60
    assert 0 < float(found["baseline_psnr_db"]) < 60
    sheet = cv2.imread(str(tmp_path / "out" / "p.png"))
    assert sheet.shape == (3 * 26 - 2, 5 * 26 - 2, 3)
    write_loss_curve(tmp_path / "run" / "metrics.jsonl", tmp_path / "out" / "loss.png")
    assert cv2.imread(str(tmp_path / "out" / "loss.png")).shape == (320, 640, 3)
    with pytest.raises(UserError, match="no sample in its heldout split"):
        write_predictions(tmp_path / "run", reader, tmp_path / "p.png", split="heldout")


def test_a_folder_without_a_run_is_refused(ball_corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        write_predictions(tmp_path, VersionReader.open(ball_corpus), tmp_path / "p.png")
    with pytest.raises(UserError, match="no logged loss"):
        write_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
