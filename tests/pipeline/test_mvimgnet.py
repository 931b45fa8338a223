"""Captures to samples: known scenes to a fraction of a pixel, known defects to their reasons."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.mvimgnet import ingest, producer
from pipeline.sample import decode_rgba
from pipeline.shard import write_shard
from pipeline.spec import DatasetSpec
from pipeline.types import Asset, AssetError, FailureKind, Sample, UserError
from tests.captures import Capture, bomb, capture_of_renders, colmap_files, jpeg, make_capture, picture, png
from tests.conftest import SHARED

ASSET = Asset(uid="0/00c0ffee", source="mvimgnet", uri="mvi_00.zip", format="capture", license="MVImgNet-ToU")
NUM_FRAMES = 9


def spec_of(**sections: dict[str, Any]) -> DatasetSpec:
    capture = {"resolution_px": 256, "codec": "png"} | sections.pop("capture", {})
    admission = {"min_frames": 5} | sections.pop("admission", {})
    base = {"name": "t", "source": {"kind": "mvimgnet", "path": "x"}, "capture": capture, "admission": admission}
    return DatasetSpec.model_validate(base | sections)


SPEC = spec_of()


@lru_cache(maxsize=8)
def made(model: str = "SIMPLE_RADIAL", **options: Any) -> Capture:
    return make_capture(model=model, num_frames=NUM_FRAMES, **options)


def copy_of(capture: Capture) -> Capture:
    """A capture whose dicts may be changed."""
    models = {name: dict(parts) for name, parts in capture.models.items()}
    return replace(capture, frames=dict(capture.frames), masks=dict(capture.masks), models=models)


def run(capture: Capture, spec: DatasetSpec = SPEC) -> Sample:
    return ingest(capture.files(), ASSET, spec, "f" * 64)


def failure(capture: Capture, spec: DatasetSpec = SPEC) -> AssetError:
    with pytest.raises(AssetError) as error:
        run(capture, spec)
    return error.value


def images_of(sample: Sample) -> list[np.ndarray]:
    return [decode_rgba(view.planes["rgba"].data) for view in sample.views]


def to_world(sample: Sample, points: np.ndarray) -> np.ndarray:
    norm = sample.normalization
    return norm.scale * points @ norm.rotation.T + norm.translation


def disc_errors(capture: Capture, sample: Sample, reach: int = 14) -> np.ndarray:
    """Distance in view pixels between each disc that is seen whole and where the stored camera puts it."""
    out = []
    known = to_world(sample, capture.discs)
    for view, name, rgba in zip(sample.views, sample.quality["frame_names"], images_of(sample)):
        light = rgba[..., :3].mean(axis=-1) * (rgba[..., 3] / 255)
        for place, whole in zip(view.camera.project(known), capture.visible[name]):
            column, row = int(place[0]), int(place[1])
            if not whole or min(column, row) < reach or max(column, row) >= len(rgba) - reach:
                continue
            part = light[row - reach : row + reach + 1, column - reach : column + reach + 1]
            labels = cv2.connectedComponents((part > 130).astype(np.uint8), connectivity=4)[1]
            label = labels[reach, reach]
            assert label > 0, f"{name}: no disc where the camera says ({place})"
            near = cv2.dilate((labels == label).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
            weight = np.where(near, np.maximum(part - 110, 0), 0)
            rows, columns = np.mgrid[row - reach : row + reach + 1, column - reach : column + reach + 1] + 0.5
            found = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
            out.append(float(np.linalg.norm(found - place)))
    assert len(out) > 8 * len(sample.views)
    return np.array(out)


def up_error_deg(capture: Capture, sample: Sample) -> float:
    return float(np.degrees(np.arccos(np.clip((sample.normalization.rotation @ capture.up)[2], -1, 1))))


def assert_exact(capture: Capture, sample: Sample) -> None:
    assert disc_errors(capture, sample).max() < 0.3
    assert up_error_deg(capture, sample) < 1
    corners = to_world(sample, capture.corners)
    assert abs(np.abs(corners).max() - 1) < 0.02
    assert np.abs(corners.min(axis=0) + corners.max(axis=0)).max() < 0.04


def assert_clean(sample: Sample, folder: Path) -> None:
    """The independent reader of shards must find nothing: names, digests, rigid cameras, the visual hull."""
    tool = SHARED / "tools" / "check_corpus.py"
    if not tool.exists():
        pytest.skip("shared/tools is not present")
    write_shard([sample], folder / "one.tar")
    done = subprocess.run(
        [sys.executable, str(tool), str(folder / "one.tar")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("SIMPLE_RADIAL", {}),
        ("RADIAL", {"width": 480, "height": 270, "text": True}),
        ("OPENCV", {"width": 480, "height": 270, "sideways": 1}),
        ("PINHOLE", {"sideways": -1, "cameras_per_frame": True}),
    ],
)
def test_known_points_land_where_the_stored_cameras_say(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    capture = made(model, **options)
    sample = run(capture)
    assert len(sample.views) == NUM_FRAMES
    assert_exact(capture, sample)
    assert sample.quality["sideways"] is bool(options.get("sideways"))
    assert sample.quality["up_quality"] == "good"
    # The similarity leads back to COLMAP's own frame.
    norm = sample.normalization
    for view, name in zip(sample.views, sample.quality["frame_names"]):
        centre = norm.rotation.T @ (view.camera.world_from_camera[:3, 3] - norm.translation) / norm.scale
        pose = capture.poses[name]
        np.testing.assert_allclose(centre, -pose[:, :3].T @ pose[:, 3], atol=1e-9)
        assert view.camera.world_from_camera[2, 1] < 0  # every view is upright: its y points down
    assert sample.normalization.rotation[2] @ norm.rotation[2] == pytest.approx(1)
    assert_clean(sample, tmp_path)


def test_the_paper_codec_and_size_are_exact_too_and_threads_change_nothing() -> None:
    capture = made()
    spec = spec_of(capture={"codec": "webp-q95"})
    sample = run(capture, spec)
    assert disc_errors(capture, sample).max() < 0.3
    again = run(capture, spec_of(capture={"codec": "webp-q95"}, workers={"num_cpus": 2}))
    for one, two in zip(sample.views, again.views):
        assert one.planes["rgba"].data == two.planes["rgba"].data
    lossless = images_of(run(capture))
    for a, b in zip(images_of(sample), lossless):
        assert (a[..., 3] == b[..., 3]).all()
        solid = b[..., 3] == 255
        assert 10 * np.log10(255**2 / ((a[solid][:, :3].astype(float) - b[solid][:, :3]) ** 2).mean()) > 38


def test_the_sub_model_with_the_most_frames_is_taken_wherever_it_stands() -> None:
    capture = copy_of(made())
    files = capture.models.pop("0")
    names = list(capture.poses)
    few = colmap_files(
        capture.lens.camera("SIMPLE_RADIAL"),
        {name: np.c_[np.eye(3), [0.0, 0, 3]] for name in names[:3]},
        np.zeros((1, 3)),
        {name: (np.array([[5.0, 5.0]]), np.array([True])) for name in names},
    )
    capture.models = {"0": few, "1": files, "2": {}}
    sample = run(capture)
    assert sample.quality["model"] == "1"
    assert sample.quality["models"] == {"0": 3, "1": NUM_FRAMES}
    assert_exact(capture, sample)
    capture.models["10"] = {"cameras.bin": b""}
    assert run(capture).quality["models"]["10"] == -1


def test_frames_poses_and_masks_are_joined_by_name() -> None:
    """As 152/1b016bf0: frames that begin elsewhere than the masks, masks of frames that are not there."""
    capture = copy_of(made())
    names = list(capture.frames)
    for name in names[:2]:
        del capture.frames[name]
    del capture.masks[names[4]]
    capture.masks |= {f"{i:03d}.jpg": png(np.full((480, 270), 255, np.uint8)) for i in range(40, 49)}
    capture.frames |= {"099.jpg": capture.frames[names[3]], "readme.jpg": b"not a picture"}
    sample = run(capture)
    assert sample.quality["frame_names"] == [name for name in names[2:] if name != names[4]]
    assert sample.quality["dropped"] == {"no_frame": 2, "no_mask": 1, "no_pose": 2}
    assert sample.quality["registered_share"] == pytest.approx(7 / 9)
    assert_exact(capture, sample)


def test_a_model_that_was_made_in_another_folder_is_joined_by_the_last_part_of_its_names() -> None:
    capture = copy_of(made())
    part = capture.models["0"]
    for name in capture.frames:
        part["images.bin"] = part["images.bin"].replace(name.encode() + b"\0", b"data/in/" + name.encode() + b"\0")
    assert len(run(capture).views) == NUM_FRAMES


def test_no_model_no_mask_and_no_common_name_have_their_own_kinds() -> None:
    capture = copy_of(made())
    assert failure(replace(capture, models={})).kind == FailureKind.NO_MODEL
    assert failure(replace(capture, models={"0": {}})).kind == FailureKind.NO_MODEL
    assert failure(replace(capture, masks={})).kind == FailureKind.NO_MASK
    partial = {name: data for name, data in capture.models["0"].items() if name != "images.bin"}
    assert failure(replace(capture, models={"0": partial})).kind == FailureKind.CORRUPT_MODEL
    other = {f"x{name}": data for name, data in capture.frames.items()}
    assert failure(replace(capture, frames=other)).kind == FailureKind.TOO_FEW_FRAMES
    few = dict(list(capture.frames.items())[:4])
    assert failure(replace(capture, frames=few)).kind == FailureKind.TOO_FEW_FRAMES


def test_a_camera_that_cannot_be_one_is_refused() -> None:
    capture = copy_of(made())
    data = capture.models["0"]["cameras.bin"]
    capture.models["0"]["cameras.bin"] = data[:32] + np.array([38530.0]).tobytes() + data[40:]
    found = failure(capture)
    assert found.kind == FailureKind.BAD_CAMERA
    assert "focal length" in found.message


def test_bad_masks_drop_their_frames_and_too_many_refuse_the_capture() -> None:
    capture = copy_of(made())
    names = list(capture.masks)
    mask = cv2.imdecode(np.frombuffer(capture.masks[names[3]], np.uint8), cv2.IMREAD_GRAYSCALE)
    two = mask.copy()
    two[: int(np.nonzero(mask.any(axis=1))[0][0]) - 8] = 255  # a second object as large as the first
    for name, bad in zip(names, (np.zeros_like(mask), np.full_like(mask, 255), two)):
        capture.masks[name] = png(bad)
    sample = run(capture)
    assert sample.quality["dropped"] == {"bad_mask": 3}
    assert_exact(capture, sample)
    for name in names[3:6]:
        capture.masks[name] = b"GIF89a nothing"
    found = failure(capture)
    assert found.kind == FailureKind.BAD_MASK
    assert "6 bad_mask; '001.jpg': the mask is empty" in found.message


def test_specks_are_wiped_away_and_masks_of_0_and_1_are_masks() -> None:
    capture = copy_of(made())
    for name, data in capture.masks.items():
        mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) // 255
        mask[10:14, 10:14] = 1
        capture.masks[name] = png(mask)
    assert_exact(capture, run(capture))


def test_soft_masks_and_rgba_cut_outs_give_the_same_sample() -> None:
    capture = copy_of(made())
    plain = images_of(run(capture))
    for name, data in capture.masks.items():
        alpha = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
        capture.masks[name] = png(
            np.dstack([picture(capture.frames[name]), np.where(alpha > 0, 230, 20)]).astype(np.uint8)
        )
    for one, two in zip(plain, images_of(run(capture))):
        assert (one == two).all()


def moved_mask(data: bytes, columns: int, rows: int) -> bytes:
    mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    return png(np.roll(mask, (rows, columns), axis=(0, 1)))


def test_masks_that_disagree_with_the_points_are_dropped_and_most_of_them_refuse_the_capture() -> None:
    capture = copy_of(made())
    names = list(capture.masks)
    capture.masks[names[2]] = moved_mask(capture.masks[names[2]], 0, 120)
    sample = run(capture)
    assert sample.quality["dropped"] == {"mask_disagrees": 1}
    assert_exact(capture, sample)
    for i, name in enumerate(names):  # masks of something that is nowhere
        capture.masks[name] = moved_mask(made().masks[name], 0, (-1) ** i * 130)
    assert failure(capture).kind == FailureKind.MASK_DISAGREES


def test_a_mask_that_jumps_in_size_is_dropped() -> None:
    capture = copy_of(made())
    name = list(capture.masks)[4]
    mask = cv2.imdecode(np.frombuffer(capture.masks[name], np.uint8), cv2.IMREAD_GRAYSCALE)
    rows, columns = np.nonzero(mask)
    small = np.zeros_like(mask)
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    small[top:bottom, left : left + (right - left) // 9] = 255  # an edge of it, as tall as it is
    capture.masks[name] = png(small)
    dropped = run(capture).quality["dropped"]
    assert sum(dropped.values()) == 1
    assert set(dropped) <= {"mask_jumps", "mask_disagrees"}


def test_where_the_frame_cuts_the_object_the_view_ends_instead_of_calling_the_unknown_background(
    tmp_path: Path,
) -> None:
    capture = made(distance=3.4)
    sample = run(capture)
    cut = np.array(sample.quality["views"]["cut_off"])
    assert sample.quality["cut_off_share"] == pytest.approx(cut.mean(), abs=1e-5)
    assert 0.5 < cut.mean() < 1
    for rgba, is_cut in zip(images_of(sample), cut):
        alpha = rgba[..., 3]
        border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
        assert (border > 200).any() == is_cut
    assert disc_errors(capture, sample).max() < 0.3
    assert_clean(sample, tmp_path)
    found = failure(capture, spec_of(admission={"max_cut_off": 0.5}))
    assert found.kind == FailureKind.CUT_OFF
    assert "admission.max_cut_off" in found.message


def test_frames_of_half_the_cameras_size_keep_their_geometry() -> None:
    capture = copy_of(made())
    for name, data in capture.frames.items():
        half = cv2.resize(picture(data), (135, 240), interpolation=cv2.INTER_AREA)
        capture.frames[name] = jpeg(half, 97)
    assert disc_errors(capture, run(capture)).mean() < 0.3
    for name, data in capture.masks.items():
        mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
        capture.masks[name] = png(cv2.resize(mask, (135, 240), interpolation=cv2.INTER_AREA))
    assert disc_errors(capture, run(capture)).mean() < 0.3


def test_frames_that_were_turned_after_colmap_saw_them_are_refused() -> None:
    capture = copy_of(made())
    turned = {name: jpeg(np.rot90(picture(data))) for name, data in capture.frames.items()}
    found = failure(replace(capture, frames=turned))
    assert found.kind == FailureKind.BAD_CAMERA
    assert "turned" in found.message
    masks = {name: moved_mask(data, 0, 0) for name, data in capture.masks.items()}
    masks = {
        name: png(np.rot90(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)))
        for name, data in masks.items()
    }
    assert failure(replace(capture, masks=masks)).kind == FailureKind.BAD_CAMERA


def with_exif_turn(data: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    return data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]


def test_an_exif_orientation_is_left_alone_because_colmap_does_not_see_it() -> None:
    capture = copy_of(made())
    plain = images_of(run(capture))
    capture.frames = {name: with_exif_turn(data) for name, data in capture.frames.items()}
    assert cv2.imdecode(np.frombuffer(next(iter(capture.frames.values())), np.uint8), 1).shape[:2] == (270, 480)
    for one, two in zip(plain, images_of(run(capture))):
        assert (one == two).all()


def test_damaged_frames_are_dropped_and_the_views_chosen_again() -> None:
    capture = copy_of(made())
    names = list(capture.frames)
    capture.frames[names[0]] = capture.frames[names[0]][:4000]
    capture.frames[names[5]] = bomb()
    capture.masks[names[7]] = bomb()
    spec = spec_of(capture={"num_views": 5})
    sample = run(capture, spec)
    assert len(sample.views) == 5
    assert not set(sample.quality["frame_names"]) & {names[0], names[5], names[7]}
    assert sample.quality["dropped"]["damaged"] >= 1
    assert sample.quality["dropped"]["bad_mask"] == 1
    for name in names[1:5]:
        capture.frames[name] = b"<html>404</html>"
    found = failure(capture)
    assert found.kind == FailureKind.CORRUPT_FILE
    assert "dropped: 1 bad_mask, 6 damaged" in found.message


def test_a_store_that_cannot_be_reached_is_no_fault_of_the_capture() -> None:
    files = made().files()

    def read(member: str, most: int) -> bytes:
        if member.startswith("masks/004"):
            raise AssetError(FailureKind.NETWORK, "no route")
        return files.read(member, most)

    with pytest.raises(AssetError) as error:
        ingest(replace(files, read=read), ASSET, SPEC, "f")
    assert error.value.kind == FailureKind.NETWORK


def test_few_views_are_spread_over_the_angle() -> None:
    capture = made()
    sample = run(capture, spec_of(capture={"num_views": 4}))
    assert [view.index for view in sample.views] == [0, 1, 2, 3]
    names = sample.quality["frame_names"]
    assert names == sorted(names)
    centres = np.stack([view.camera.world_from_camera[:3, 3] for view in sample.views])
    azimuth = np.sort(np.degrees(np.arctan2(centres[:, 1], centres[:, 0])))
    assert np.diff(azimuth).min() > 40
    assert sample.quality["num_good_frames"] == NUM_FRAMES


@pytest.mark.parametrize(
    ("rule", "value", "kind"),
    [
        ("min_frames", NUM_FRAMES + 1, FailureKind.TOO_FEW_FRAMES),
        ("min_sweep_deg", 179.0, FailureKind.NARROW_SWEEP),
        ("min_mask_agreement", 0.999, FailureKind.MASK_DISAGREES),
    ],
)
def test_rules_of_the_spec_refuse_and_name_themselves(rule: str, value: float, kind: FailureKind) -> None:
    found = failure(made(), spec_of(admission={rule: value}))
    assert found.kind == kind
    assert rule in found.message


def test_the_share_of_posed_frames_is_a_rule_too() -> None:
    capture = copy_of(made())
    capture.frames |= {f"{i}.jpg": b"x" for i in range(100, 110)}
    found = failure(capture, spec_of(admission={"min_registered_share": 0.6}))
    assert found.kind == FailureKind.POOR_MODEL
    assert "0.4737" in found.message


def test_without_points_the_rays_through_the_masks_place_the_object() -> None:
    capture = copy_of(made())
    capture.models["0"] = colmap_files(
        capture.lens.camera("SIMPLE_RADIAL"),
        capture.poses,
        np.zeros((0, 3)),
        {name: (np.zeros((0, 2)), np.zeros(0, bool)) for name in capture.poses},
    )
    sample = run(capture)
    assert sample.quality["centre_from"] == "mask_rays"
    assert "mask_agreement" not in sample.quality
    assert disc_errors(capture, sample).max() < 0.3
    corners = to_world(sample, capture.corners)
    assert 0.75 < np.abs(corners).max() < 1.25
    capture.masks = {name: moved_mask(data, 0, (-1) ** i * 130) for i, (name, data) in enumerate(capture.masks.items())}
    assert failure(capture).kind == FailureKind.MASK_DISAGREES


def test_a_margin_leaves_room_and_padding_sets_the_crop() -> None:
    capture = made()
    plain, roomy = run(capture), run(capture, spec_of(capture={"margin": 1.25, "padding": 1.6}))
    assert roomy.normalization.scale * 1.25 == pytest.approx(plain.normalization.scale)
    ratio = plain.views[0].camera.intrinsics[0, 0] / roomy.views[0].camera.intrinsics[0, 0]
    assert ratio == pytest.approx(1.6 / 1.15)
    assert disc_errors(capture, roomy, reach=8).max() < 0.3


HOOK = """
import sys, cv2
image, mask = sys.argv[1:]
photo = cv2.imread(image, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
tone = photo.astype(int).sum(axis=2)
small = cv2.resize(photo, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
dark = (small.astype(int).sum(axis=2) < 270) | (small.min(axis=2) > 225)
dark = cv2.morphologyEx(dark.astype("uint8") * 255, cv2.MORPH_CLOSE, cv2.getStructuringElement(2, (9, 9)))
dark = cv2.morphologyEx(dark, cv2.MORPH_OPEN, cv2.getStructuringElement(2, (7, 7)))
cv2.imwrite(mask, cv2.resize(dark, photo.shape[1::-1]))
"""


@pytest.fixture
def hook(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "hook.py").write_text(text)
        return f"{sys.executable} {tmp_path / 'hook.py'} {{image}} {{mask}}"

    return write


def test_a_hook_makes_the_masks_that_a_data_set_lacks_and_stands_in_the_row(hook: Callable[[str], str]) -> None:
    capture = replace(copy_of(made()), masks={})
    command = hook(HOOK)
    sample = run(capture, spec_of(capture={"mask_command": command}))
    assert sample.quality["mask_source"] == f"command: {command}"
    assert sample.quality["num_hook_masks"] == len(sample.views) >= 5
    assert disc_errors(capture, sample).mean() < 0.3


@pytest.mark.parametrize(
    ("text", "said"),
    [("import sys; print('out of tea'); sys.exit(3)", "status 3"), ("pass", "wrote no mask")],
)
def test_a_hook_that_fails_is_no_mask_with_what_it_said(hook: Callable[[str], str], text: str, said: str) -> None:
    found = failure(replace(copy_of(made()), masks={}), spec_of(capture={"mask_command": hook(text)}))
    assert found.kind == FailureKind.NO_MASK
    assert said in found.message


def test_a_hook_that_cannot_be_run_is_the_users_mistake() -> None:
    capture = replace(copy_of(made()), masks={})
    with pytest.raises(UserError, match="cannot be run"):
        run(capture, spec_of(capture={"mask_command": "/no/such/thing {image} {mask}"}))
    for command, said in (
        ("true", "{image} and {mask}"),
        ("{image} {mask}", "a program"),
        ("a '{image} {mask}", "quot"),
    ):
        with pytest.raises(ValidationError, match=said):
            spec_of(capture={"mask_command": command})
    try:
        import rembg  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="not installed"):
            run(capture, spec_of(capture={"mask_command": "rembg"}))


def test_the_producer_names_what_decides_pixels() -> None:
    for word in ("revision", "OpenCV", "pycolmap", "simplejpeg"):
        assert word in producer()


@pytest.mark.blender
@pytest.mark.parametrize("model", ["SIMPLE_RADIAL", "OPENCV"])
def test_a_capture_of_our_own_renders_gives_the_renders_back(model: str, rendered: Sample, tmp_path: Path) -> None:
    """Rendered, bent by a lens, ingested: the world comes back but for a turn about z, and the pictures fit it."""
    capture = capture_of_renders(rendered, model=model)
    spec = spec_of(admission={"min_frames": 6})
    sample = run(capture, spec)
    norm = sample.normalization
    # COLMAP's world is the render's, shifted and scaled: so the way back to it is known, up to a turn about z.
    ours = np.stack([view.camera.world_from_camera[:3, 3] for view in sample.views])
    index = [int(name[:3]) for name in sample.quality["frame_names"]]
    true = np.stack([rendered.views[i].camera.world_from_camera[:3, 3] for i in index])
    back = (ours - norm.translation) @ norm.rotation / norm.scale
    np.testing.assert_allclose((back - [3, -1, 2]) / 1.7, true, atol=1e-9)
    assert np.degrees(np.arccos(norm.rotation[2, 2])) < 1
    # What a render shows at the pixel of a surface point, the ingested view shows at that of the same point.
    errors = []
    for view, i in zip(sample.views, index):
        source = rendered.views[i]
        ours_rgba = decode_rgba(view.planes["rgba"].data)
        theirs_rgba = decode_rgba(source.planes["rgba"].data)
        size = view.camera.width
        homography = source.camera.intrinsics @ np.linalg.inv(view.camera.intrinsics)  # one centre, one direction
        grid = np.stack([*np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5), np.ones((size, size))], -1)
        at = (grid @ homography.T).astype(np.float32)
        expected = cv2.remap(theirs_rgba, at[..., 0] - 0.5, at[..., 1] - 0.5, cv2.INTER_AREA)
        pair = [x[..., :3].mean(axis=-1) * (x[..., 3] / 255) for x in (expected, ours_rgba)]
        shift, _ = cv2.phaseCorrelate(*(x.astype(np.float32) for x in pair))
        errors.append(float(np.hypot(*shift)))
    assert max(errors) < 0.3, errors
    assert_clean(sample, tmp_path)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Eight views of one embedded object by our own renderer, with depth."""
    pytest.importorskip("bpy")
    from render.worker import RenderWorker

    render = {"num_views": 8, "resolution_px": 320, "samples": 8, "planes": ("rgba", "depth"), "preset": "uncropped"}
    spec = DatasetSpec.model_validate({"name": "t", "source": {"kind": "procedural"}, "render": render})
    asset = Asset(uid="procedural-3", source="procedural", uri="procedural:3", format="procedural", license="CC0-1.0")
    with RenderWorker(spec, fingerprint="f" * 64, num_threads=2, scratch_dir=tmp_path_factory.mktemp("s")) as worker:
        return worker.render(asset, None)
