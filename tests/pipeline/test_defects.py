"""Every defect of `tests/CAPTURES.md`, from zips as MVImgNet's lie on disk to the reason or the repair."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import looks
from pipeline.colmap import parse_model
from pipeline.mvimgnet import ingest, reprojection_px
from pipeline.sources.mvimgnet import MvimgnetAssets
from pipeline.spec import DatasetSpec, MvimgnetSource
from pipeline.types import Asset, AssetError, Sample
from tests.captures import png
from tests.defects import Defect, write_all
from tests.pipeline.test_mvimgnet import assert_exact, copy_of, made, run, to_world, up_error_deg

NAMES = [
    "none", "no sparse", "a model without images.bin", "a model cut by a stopped download",
    "several models, 0 not the largest", "a hundred models", "frames without a pose", "an absurd focal length",
    "an absurd distortion", "points without an error", "a camera of 4 gigapixels", "a third of the frames missing",
    "most frames missing",
    "more masks than frames, of other indices", "cut-outs beside the frames", "masks of 2.0", "no masks",
    "masks of some frames", "masks with holes", "fuzzy masks", "empty and full masks", "masks in shreds",
    "masks of the wrong object", "one mask of the wrong object", "a mask that jumps", "an object cut by its frames",
    "masks of half the size", "a bomb among the masks", "stored sideways", "an EXIF orientation",
    "frames turned after COLMAP saw them", "frames of half the camera's size",
    "frames of another shape than the camera's", "frames cut, zeroed within, and no pictures",
    "a sequence that somebody listed as bad", "a sub-model that somebody listed as bad", "a narrow sweep",
    "a copy in the archives by category",
]  # fmt: skip

Found = dict[str, tuple[Defect, Asset, MvimgnetAssets]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the source lists of them, by the defect's name."""
    root = tmp_path_factory.mktemp("defects")
    written = write_all(root)
    source = MvimgnetAssets(
        MvimgnetSource(path=str(root), masks=str(root / "mask"), exclude_file=str(root / "bad.txt")),
        max_capture_bytes=2**25,
    )
    out = {}
    for asset in source.list_assets():
        name, defect = written[asset.uid]
        out[name] = (defect, asset, source)
    assert list(out) == NAMES
    return out


SPEC = DatasetSpec.model_validate(
    {
        "name": "t",
        "source": {"kind": "mvimgnet", "path": "x"},
        "capture": {"resolution_px": 64},
        "admission": {"min_frames": 6},
    }
)


@pytest.mark.parametrize("name", NAMES)
def test_every_known_defect_ends_in_its_reason_or_its_repair(found: Found, name: str) -> None:
    defect, asset, source = found[name]
    if defect.kind != "accepted":
        with pytest.raises(AssetError) as error:
            ingest(source.open_capture(asset).files, asset, SPEC, "f")
        assert error.value.kind.value == defect.kind, error.value.message
        assert str(defect.says.get("message", "")) in error.value.message
        return
    sample = ingest(source.open_capture(asset).files, asset, SPEC, "f")
    assert sample.quality["dropped"] == defect.dropped
    for figure, expected in defect.says.items():
        value = sample.quality[figure]
        assert expected(value) if callable(expected) else value == expected, (figure, value)
    assert len(sample.views) == sample.quality["num_good_frames"] - defect.dropped.get("damaged", 0)
    assert_in_place(defect, sample)


def assert_in_place(defect: Defect, sample: Sample) -> None:
    """What is let in is repaired: the object fills its box, stands upright, and cameras are those of their frames."""
    assert up_error_deg(defect.capture, sample) < 2
    if sample.quality["sweep_deg"] > 90:  # else nobody saw its back
        assert 0.93 < np.abs(to_world(sample, defect.capture.corners)).max() < 1.07
    norm = sample.normalization
    for view, frame in zip(sample.views, sample.quality["frame_names"], strict=True):
        centre = norm.rotation.T @ (view.camera.world_from_camera[:3, 3] - norm.translation) / norm.scale
        pose = defect.capture.poses[frame]
        np.testing.assert_allclose(centre, -pose[:, :3].T @ pose[:, 3], atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(480, 270), (270, 300), (27, 48), (2700, 4800)])
def test_a_mask_that_is_not_its_cameras_is_refused_by_its_header(width: int, height: int) -> None:
    """The mask ends behind its header: were it decoded, it would be damaged."""
    capture = copy_of(made())
    whole = png(np.zeros((height, width), np.uint8))
    capture.masks["003.jpg"] = whole[: whole.index(b"IDAT") + 8]
    assert run(capture).quality["dropped"] == {"bad_size": 1}


def test_what_is_kept_of_a_frame_does_not_grow_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.looks.MAX_VOTERS", 150)
    kept = []
    original = looks._look
    monkeypatch.setattr(looks, "_look", lambda *arguments: kept.append(original(*arguments)) or kept[-1])
    capture = made()
    sample = run(capture)
    assert {len(look.seen) for look in kept} == {len(look.seen_in) for look in kept}
    assert all(len(look.seen) <= 150 for look in kept)
    assert_exact(capture, sample)


def test_the_reprojection_error_is_the_mean_over_all_observations() -> None:
    capture = made()
    model = parse_model("0", *(capture.models["0"][f"{part}.bin"] for part in ("cameras", "images", "points3D")))
    moved = replace(model, seen_px=model.seen_px + np.where(np.arange(len(model.seen_px)) % 4 == 0, 3.0, 0.0)[:, None])
    misses = []
    for image, point, pixel in zip(moved.seen_image, moved.seen_point, moved.seen_px):
        one = moved.images[image]
        x, y, z = one.rotation @ moved.points[point] + one.translation
        misses.append(np.linalg.norm(moved.lenses[one.camera_id].pixels(np.array([[x / z, y / z]]))[0] - pixel))
    assert reprojection_px(moved) == pytest.approx(np.mean(misses))
    assert np.mean(misses) == pytest.approx(3 * 2**0.5 / 4, rel=0.02)
    assert reprojection_px(replace(model, seen_image=model.seen_image[:0], seen_point=model.seen_point[:0])) is None


def test_the_tables_name_tests_that_are_there() -> None:
    folder = Path(__file__).parents[1]
    text = (folder / "CAPTURES.md").read_text()
    named = re.findall(r"`((?:[a-z_]+/)?test_[a-z_]+\.py)(?:::(test_\w+))?", text)
    assert len(named) > 60
    for file, test in named:
        path = folder / (file if "/" in file else f"pipeline/{file}")
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"
    for name in NAMES:
        assert f"[{name}]" in text, name
