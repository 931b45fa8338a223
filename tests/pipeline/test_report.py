"""The dataset card: what it says of a version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import plan as plans
from pipeline import receipt, version
from pipeline.reader import VersionReader
from pipeline.report import write_report
from pipeline.spec import DatasetSpec, ProceduralSource, RenderSpec
from pipeline.store import open_store
from pipeline.types import Failure, FailureKind, Sample
from tests.conftest import make_asset, make_sample


@pytest.mark.parametrize(
    ("fov_deg", "renders", "expected"),
    [(40.0, True, "40 degrees"), (None, True, "50 degrees"), (None, False, "the preset&#39;s field of view")],
)
def test_the_field_of_view_is_that_of_the_pictures(
    tmp_path: Path, fov_deg: float | None, renders: bool, expected: str
) -> None:
    """The samples of these tests have 50 degrees; the preset, which only rendering knows, would give 67."""
    render = RenderSpec(preset="openlrm", fov_deg=fov_deg)
    spec = DatasetSpec(name="fake", source=ProceduralSource(num_objects=1), render=render)
    store = open_store(str(tmp_path / "corpus"))
    plan = plans.freeze(store, spec, "f", lambda: [make_asset("ball-0")])
    failure = Failure(uid="ball-0", kind=FailureKind.EMPTY_SCENE, message="no mesh")
    receipt.commit_shard(store, plan.shards[0], {"ball-0": make_sample() if renders else failure}, tmp_path)
    published, _ = version.publish(store, [plan])
    page = write_report(VersionReader(store, published), tmp_path / "report").read_text()
    assert f"openlrm: 32 views of 512 px, {expected}" in page


def test_figures_of_noise_and_crop_are_over_all_views_that_tell(tmp_path: Path) -> None:
    """Samples of a fixed number of samples a pixel tell no PSNR, captures tell nothing."""
    told: list[dict[str, object]] = [
        {"mean_cropped": 0.1, "views": {"samples": [4, 4, 6, 64], "half_psnr_db": [41.0, 40.02, 43.0, 42.0]}},
        {"mean_cropped": 0.2, "views": {"samples": [5, 5, 5, 5]}},
        {},
    ]
    results = [replace(make_sample(f"ball-{i}"), quality=quality) for i, quality in enumerate(told)]
    page = report(tmp_path, results)
    for name, value in {
        "samples a pixel: median, most": "5, 64",
        "estimated PSNR on white after 2 x 2 averaging: least, median": "40.0, 41.5 dB",
        "share of an object outside its views: mean, most": "15.0%, 20.0%",
    }.items():
        assert f"<tr><td>{name}</td><td>{value}</td></tr>" in page
    assert "at full resolution" not in page


def report(tmp_path: Path, results: list[Sample]) -> str:
    """Return the page of a version of one shard."""
    spec = DatasetSpec(name="fake", source=ProceduralSource(num_objects=len(results)))
    store = open_store(str(tmp_path / "corpus"))
    plan = plans.freeze(store, spec, "f", lambda: [result.asset for result in results])
    receipt.commit_shard(store, plan.shards[0], {result.asset.uid: result for result in results}, tmp_path)
    published, _ = version.publish(store, [plan])
    return write_report(VersionReader(store, published), tmp_path / "report").read_text()
