"""Captures as people really have them, each of which once cost the whole capture or its truth."""

from __future__ import annotations

import math
import struct
import sys
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from pipeline.layout import arrange
from pipeline.masks import hook_mask
from pipeline.mvimgnet import ingest
from pipeline.photos import decode_mask, decode_photo
from pipeline.placing import MIN_RAY_SPREAD_RAD, find_up, spread_of
from pipeline.sample import decode_rgba
from pipeline.sources.colmap import ColmapAssets
from pipeline.sources.mvimgnet import MvimgnetAssets
from pipeline.spec import ColmapSource, DatasetSpec, MvimgnetSource
from pipeline.types import AssetError, Sample, UserError
from tests.captures import Capture, jpeg, make_capture, picture, png, write_mvimgnet
from tests.pipeline.test_mvimgnet import run


def test_the_model_of_undistorted_photos_goes_with_them() -> None:
    """Trainers of splats keep input/ with distorted/sparse/0 and images/ with sparse/0, under the same names."""
    both = [f"{place}/0/{name}.bin" for place in ("distorted/sparse", "sparse") for name in ("cameras", "images")]
    layout = arrange(["images/a.jpg", "input/a.jpg", *both])
    assert layout.models == {"0": {"cameras.bin": "sparse/0/cameras.bin", "images.bin": "sparse/0/images.bin"}}
    assert list(arrange(["images/a.jpg", *both[:2]]).models) == ["0"], "the only model there is stays"


def rounded(images: bytes, digits: int) -> bytes:
    """Round the quaternions of an images.bin."""
    out, at = bytearray(images), 8
    for _ in range(struct.unpack_from("<Q", images)[0]):
        turn = [round(x, digits) for x in struct.unpack_from("<4d", images, at + 4)]
        struct.pack_into("<4d", out, at + 4, *turn)
        end = images.index(b"\0", at + 64)
        at = end + 9 + 24 * struct.unpack_from("<Q", images, end + 1)[0]
    return bytes(out)


@pytest.mark.parametrize("digits", [4, 6])
def test_quaternions_of_few_digits_are_unit_ones(digits: int) -> None:
    capture = make_capture(num_frames=9)
    exact = run(capture)
    capture.models["0"]["images.bin"] = rounded(capture.models["0"]["images.bin"], digits)
    near = run(capture)
    for one, other in zip(exact.views, near.views, strict=True):
        # A point on a mask's edge may vote otherwise, and move the box's centre a little.
        np.testing.assert_allclose(one.camera.world_from_camera, other.camera.world_from_camera, atol=5e-3)


def test_a_picture_beside_captures_does_not_make_one_capture_of_them(tmp_path: Path) -> None:
    for name in ("car", "mug"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / "a.jpg").write_bytes(b"x")
    (tmp_path / "preview.png").write_bytes(b"x")
    source = ColmapSource(path=str(tmp_path))
    assert [a.uid for a in ColmapAssets(source, max_capture_bytes=2**20).list_assets()] == ["car", "mug"]
    (tmp_path / "one" / "notes").mkdir(parents=True)
    (tmp_path / "one" / "a.jpg").write_bytes(b"x")
    alone = ColmapSource(path=str(tmp_path / "one"))
    assert [a.uid for a in ColmapAssets(alone, max_capture_bytes=2**20).list_assets()] == ["one"]


def test_a_film_behind_a_photo_is_no_harm_and_a_cut_photo_is() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    whole = jpeg(rgb)
    plain = decode_photo(whole, "a.jpg")[0]
    film = b"\x00\x00\x00\x18ftypmp42" + b"\xff\xd9\xff\xda" + bytes(50)
    assert (decode_photo(whole + film, "a.jpg")[0] == plain).all()
    with pytest.raises(AssetError, match="without its end"):
        decode_photo(whole[: len(whole) * 2 // 3], "a.jpg")


@pytest.mark.parametrize(("value", "dtype"), [(255, np.uint16), (1, np.uint16), (65535, np.uint16), (1, np.uint8)])
def test_masks_of_any_depth_mean_what_they_show(value: int, dtype: type) -> None:
    mask = np.zeros((6, 8), dtype)
    mask[2:4, 3:6] = value
    assert (decode_mask(png(mask), "m.png") == np.where(mask > 0, 255, 0)).all()


def test_photos_smaller_than_their_camera_are_not_shrunk_twice() -> None:
    capture = make_capture(width=540, height=960, num_frames=9)
    spec = DatasetSpec.model_validate(
        {"name": "t", "source": {"kind": "mvimgnet", "path": "."}, "capture": {"resolution_px": 128, "codec": "webp"}}
    )
    full = _ingest(capture, spec)
    half = make_capture(width=540, height=960, num_frames=9)
    for name, data in half.frames.items():
        half.frames[name] = jpeg(cv2.resize(picture(data), (270, 480), interpolation=cv2.INTER_AREA), 97)
    small = _ingest(half, spec)
    for one, other in zip(full.views, small.views, strict=True):
        a, b = (decode_rgba(view.planes["rgba"].data).astype(float) for view in (one, other))
        error = ((a[..., :3] - b[..., :3]) ** 2)[a[..., 3] > 250].mean()
        assert 10 * math.log10(255**2 / error) > 36


def _ingest(capture: Capture, spec: DatasetSpec) -> Sample:
    from pipeline.types import Asset

    asset = Asset(uid="0/00c0ffee", source="mvimgnet", uri="capture:x", format="capture")
    return ingest(capture.files(), asset, spec, "f")


def test_zips_may_lie_beside_the_tree_that_came_out_of_them(tmp_path: Path) -> None:
    capture = make_capture(num_frames=3, samples=1)
    write_mvimgnet(capture, tmp_path, layout="2.0", zipped=True)
    with zipfile.ZipFile(tmp_path / "mvi_00.zip") as archive:
        archive.extractall(tmp_path)
    source = MvimgnetAssets(MvimgnetSource(path=str(tmp_path)), max_capture_bytes=2**25)
    (asset,) = source.list_assets()
    files = source.open_capture(asset).files
    assert sorted(files.frames) == sorted(capture.frames)
    assert len(files.models["0"]) == len(capture.models["0"])


def test_what_a_mac_adds_to_a_zip_is_left_out(tmp_path: Path) -> None:
    capture = make_capture(num_frames=12, samples=1)
    write_mvimgnet(capture, tmp_path / "plain", layout="2.0", zipped=True)
    with zipfile.ZipFile(tmp_path / "plain" / "mvi_00.zip") as archive, \
            zipfile.ZipFile(tmp_path / "mvi_00.zip", "w") as mac:  # fmt: skip
        for name in archive.namelist():
            mac.writestr(name, archive.read(name))
            folder, _, leaf = name.rpartition("/")
            mac.writestr(f"__MACOSX/{folder}/._{leaf}", b"resource fork")
    source = MvimgnetAssets(MvimgnetSource(path=str(tmp_path)), max_capture_bytes=2**25)
    (asset,) = [one for one in source.list_assets() if "plain" not in one.uri]
    assert sorted(source.open_capture(asset).files.frames) == sorted(capture.frames)


@pytest.mark.parametrize("command", ["'unbalanced {image} {mask}", "{script} {image} {mask}", "a\0b {image} {mask}"])
def test_a_hook_that_cannot_be_run_is_one_clear_line(tmp_path: Path, command: str) -> None:
    script = tmp_path / "hook"
    script.write_text("no shebang")
    script.chmod(0o755)
    with pytest.raises(UserError, match=r"capture\.mask_command") as info:
        hook_mask(command.replace("{script}", str(script)), b"x", "a.jpg")
    assert "\n" not in str(info.value)


def test_what_a_hook_leaves_running_ends_with_it(tmp_path: Path) -> None:
    mark = f"{time.time():.6f}"
    script = tmp_path / "hook.py"
    script.write_text(
        "import shutil, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])\n"
        f"shutil.copy({str(tmp_path / 'm.png')!r}, sys.argv[2])\n"
    )
    (tmp_path / "m.png").write_bytes(png(np.full((4, 4), 255, np.uint8)))
    assert hook_mask(f"{sys.executable} {script} {{image}} {{mask}}", b"x", "a.jpg").shape == (4, 4)
    time.sleep(0.2)
    left = [one for one in psutil.process_iter(["cmdline", "status"]) if mark in (one.info["cmdline"] or [])]
    assert not [one for one in left if one.info["status"] != psutil.STATUS_ZOMBIE]


def test_views_that_look_one_way_place_nothing() -> None:
    same = np.tile([0.0, 0.0, 1.0], (10, 1))
    assert spread_of(same) < MIN_RAY_SPREAD_RAD
    angles = np.radians(np.linspace(0, 20, 10))
    assert spread_of(np.stack([np.sin(angles), 0 * angles, np.cos(angles)], 1)) > MIN_RAY_SPREAD_RAD
    assert not find_up(np.tile(np.eye(3), (10, 1, 1))).sure
