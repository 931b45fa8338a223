"""The dataset card: what it says of a version."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import plan as plans
from pipeline import receipt, version
from pipeline.reader import VersionReader
from pipeline.report import write_report
from pipeline.spec import DatasetSpec, ProceduralSource, RenderSpec
from pipeline.store import open_store
from pipeline.types import Failure, FailureKind
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
