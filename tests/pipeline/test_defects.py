"""Every defect of `tests/CAPTURES.md`, from zips as MVImgNet's lie on disk to the reason or the repair."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.mvimgnet import ingest
from pipeline.sources.mvimgnet import MvimgnetAssets
from pipeline.spec import DatasetSpec, MvimgnetSource
from pipeline.types import Asset, AssetError, Sample
from tests.defects import Defect, write_all
from tests.pipeline.test_mvimgnet import to_world, up_error_deg

NAMES = [
    "none", "no sparse", "a model without images.bin", "a model cut by a stopped download",
    "several models, 0 not the largest", "a hundred models", "frames without a pose", "an absurd focal length",
    "an absurd distortion", "a camera of 4 gigapixels", "a third of the frames missing", "most frames missing",
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
