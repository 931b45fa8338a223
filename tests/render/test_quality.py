"""What real renders measure, and that the rules of the spec act on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.phash import MAX_DISTANCE, NEAR_DISTANCE, hash_distance, perceptual_hash
from pipeline.quality import MAX_THIN
from pipeline.sample import decode_rgba
from pipeline.types import Asset, AssetError, FailureKind, Sample
from render.worker import RenderWorker
from tests.render.conftest import Render, asset_of, make_spec
from tests.render.files import CUBE_VERTICES, one_mesh_glb

FAKE = [sys.executable, "-P", "-s", str(Path(__file__).with_name("fake_child.py"))]


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        ({"max_border_touch": 0.5}, FailureKind.CROPPED),
        ({"admit_single_colour": False}, FailureKind.SINGLE_COLOUR),
        ({}, None),
    ],
)
def test_a_sample_that_a_rule_refuses_is_a_failure_that_names_the_key(
    tmp_path: Path, rule: dict[str, object], kind: FailureKind | None
) -> None:
    """The stand-in's pictures are white from edge to edge."""
    path = tmp_path / "good.glb"
    path.touch()
    with RenderWorker(
        make_spec(admission=rule), fingerprint="f", scratch_dir=tmp_path / "scratch", child_command=FAKE
    ) as worker:
        if kind is None:
            flags = worker.render(asset_of(path), path).quality["flags"]
            assert set(flags) == {"single_colour", "touches_border", "over_exposed"}
            return
        with pytest.raises(AssetError) as caught:
            worker.render(asset_of(path), path)
    assert caught.value.kind is kind
    assert f"admission.{next(iter(rule))}" in caught.value.message


@pytest.mark.blender
def test_cards_and_poles_are_told_from_solid_objects(render: Render, tmp_path: Path) -> None:
    """A pole is thin in every view; a card in those that see it edge on, which among 12 random ones some do nearly."""
    figures = {}
    for name, extent in {"cube": (1, 1, 1), "card": (1, 0.01, 1), "pole": (0.02, 0.02, 1)}.items():
        sample = render(one_mesh_glb(tmp_path / f"{name}.glb", CUBE_VERTICES * np.array(extent, np.float32)))
        figures[name] = sample.quality
    assert figures["cube"]["thickness_min"] > 0.5
    assert figures["card"]["thickness_median"] > 0.2
    assert figures["card"]["thickness_min"] < 0.5 * figures["card"]["thickness_median"]
    assert figures["pole"]["thickness_median"] < 3 * MAX_THIN
    assert figures["pole"]["flags"].count("thin") == 1
    assert "thin" not in figures["cube"]["flags"]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[RenderWorker]:
    spec = make_spec(render={"num_views": 12, "resolution_px": 96, "samples": 4, "lighting": "ambient"})
    with RenderWorker(spec, fingerprint="f", num_threads=2, scratch_dir=tmp_path) as one:
        yield one


def data_views(worker: RenderWorker, seed: int) -> np.ndarray:
    """Four views of a procedural object; one uid for all objects, so that all have the same cameras."""
    asset = Asset(uid="same cameras", source="test", uri=f"procedural:{seed}", format="procedural")
    sample: Sample = worker.render(asset, None)
    return np.stack([decode_rgba(view.planes["rgba"].data) for view in sample.views])


@pytest.mark.blender
def test_hashes_of_rendered_objects_are_near_for_one_and_far_for_two(tmp_path: Path) -> None:
    """Procedural objects, whole in the picture and under a uniform light, with few and with fewer samples."""
    hashes: list[list[str]] = []
    for samples in (4, 2):
        render = {"num_views": 4, "resolution_px": 64, "samples": samples, "lighting": "ambient", "fov_deg": 75.0}
        with RenderWorker(make_spec(render=render), fingerprint="f", num_threads=2, scratch_dir=tmp_path) as worker:
            hashes.append([perceptual_hash(data_views(worker, seed)) for seed in range(16)])
    one, other = hashes
    again = [hash_distance(a, b) for a, b in zip(one, other, strict=True)]
    apart = [hash_distance(a, b) for i, a in enumerate(one) for b in one[:i]]
    assert max(again) <= NEAR_DISTANCE, again
    assert min(apart) > MAX_DISTANCE, sorted(apart)[:10]
