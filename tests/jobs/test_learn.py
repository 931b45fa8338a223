"""`make learn`, with balls in place of Blender's pictures: every other stage is the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.learn import SPEC, as_text, run_learn
from lrm.learn import Protocol
from pipeline.spec import ProceduralSource, load_spec
from tests.jobs import fakes
from tests.lrm.conftest import NANO

BALLS = """
name = "balls"
[source]
kind = "procedural"
num_objects = 8
[render]
num_views = 4
resolution_px = 32
[shards]
objects_per_shard = 4
[split]
heldout_per_mille = 400
"""


def test_a_run_ends_in_scores_and_pictures_and_goes_on_from_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "balls.toml"
    spec.write_text(BALLS.replace("num_objects = 8", "num_objects = 80"))
    options: dict[str, Any] = {
        "spec_path": spec,
        "protocol": Protocol(image_px=16, num_inputs=2),
        "produce": fakes.produce,
    }
    settings = (*NANO, "data.max_views=3", "train.steps=4", "source.num_objects=8")
    first = json.loads(json.dumps(run_learn(tmp_path / "out", settings, **options)))
    assert first["steps"] == 4
    assert first["train_objects"] + first["unseen_objects"]["objects"] == 7, "seed 3 fails, as the fake was asked to"
    assert first["unseen_objects"]["psnr_db"] == first["psnr_unseen_objects_db"] > 0
    assert first["unseen_views"]["psnr_db"] == first["psnr_unseen_views_db"] > 0
    assert min(first["baseline_mean_db"], first["baseline_copy_db"]) > 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "loss.png", "unseen_objects.png", "unseen_views.png",
    }  # fmt: skip
    assert f"{first['psnr_unseen_objects_db']:10.2f}" in as_text(first).splitlines()[1]
    capsys.readouterr()
    again = run_learn(tmp_path / "out", settings, **options)
    times = {"elapsed_s", "render_s", "train_s"}
    assert {k: v for k, v in again.items() if k not in times} == {k: v for k, v in first.items() if k not in times}
    assert "8 listed: nothing to make" in capsys.readouterr().err


def test_the_spec_holds_out_enough_objects_and_leaves_views_unseen() -> None:
    spec = load_spec(SPEC, ())
    assert isinstance(spec.source, ProceduralSource)
    held = [spec.is_heldout(f"procedural-{seed}") for seed in range(spec.source.num_objects)]
    assert sum(held) >= 16
    assert len(held) - sum(held) >= 64
    assert spec.render.num_views == 20
