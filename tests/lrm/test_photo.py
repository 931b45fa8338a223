"""Pictures of people become the model's input: cut out, centred, seen by a camera that fits."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lrm.cameras import normalizing_rotation
from lrm.photo import assumed_distance, frame_object, list_pictures, orbit_camera, orbit_pose, read_cutout
from pipeline.types import UserError
from tests.lrm.conftest import nano_config


def card(high: int, wide: int, top: int, left: int, box: tuple[int, int]) -> np.ndarray:
    """A red card on nothing."""
    rgba = np.zeros((high, wide, 4), np.uint8)
    rgba[top : top + box[0], left : left + box[1]] = (200, 0, 0, 255)
    return rgba


@given(
    st.integers(0, 60), st.integers(0, 60), st.integers(12, 60), st.integers(12, 60), st.sampled_from([0.5, 0.85, 1.0])
)
def test_the_object_is_in_the_middle_and_fills_its_share(
    top: int, left: int, high: int, wide: int, fill: float
) -> None:
    framed = frame_object(card(128, 128, top, left, (high, wide)), 128, fill, "card.png")
    seen = framed[..., 1] < 0.5
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert framed.shape == (128, 128, 3)
    pixel = 128 / math.ceil(max(high, wide) / fill)  # of the picture, in those of the result
    assert len(rows) == pytest.approx(high * pixel, abs=1.5)
    assert len(columns) == pytest.approx(wide * pixel, abs=1.5)
    assert max(len(rows), len(columns)) == pytest.approx(128 * fill, abs=pixel + 1.5)
    assert (rows[0] + rows[-1] + 1) / 2 == pytest.approx(64, abs=pixel / 2 + 1)
    assert (columns[0] + columns[-1] + 1) / 2 == pytest.approx(64, abs=pixel / 2 + 1)


def test_alpha_is_taken_and_its_edge_stays_soft(tmp_path: Path) -> None:
    rgba = card(40, 40, 10, 10, (20, 20))
    rgba[10:30, 9, :] = (200, 0, 0, 100)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    read = read_cutout(tmp_path / "a.png")
    np.testing.assert_array_equal(read, rgba)
    framed = frame_object(read, 20, 1.0, "a")  # 20 px of opaque card: the soft column is outside its box
    np.testing.assert_allclose(framed, np.broadcast_to([200 / 255, 0, 0], (20, 20, 3)), atol=1e-6)


def test_a_turned_photograph_is_read_upright(tmp_path: Path) -> None:
    rgb = np.zeros((4, 6, 3), np.uint8)
    rgb[0] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    Image.fromarray(rgb).save(tmp_path / "a.tif", exif=exif)
    read = read_cutout(tmp_path / "a.tif", "white")
    assert read.shape == (6, 4, 4)
    assert (read[:, -1, 0] == 255).all()


def test_white_is_background_where_that_is_said(tmp_path: Path) -> None:
    rgb = np.full((30, 30, 3), 255, np.uint8)
    rgb[5:25, 5:25] = (10, 20, 30)
    rgb[0, 0] = 250  # noise
    Image.fromarray(rgb).save(tmp_path / "a.png")
    alpha = read_cutout(tmp_path / "a.png", "white")[..., 3]
    assert alpha[5:25, 5:25].min() == 255
    assert alpha.astype(int).sum() == 255 * 400


@pytest.mark.skipif(importlib.util.find_spec("rembg") is not None, reason="rembg is installed")
def test_an_opaque_picture_without_rembg_is_refused_with_what_to_do(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "gray").save(tmp_path / "photo.jpg")
    with pytest.raises(UserError, match=r"photo\.jpg: no pixel of it is transparent.*matting.*background=white"):
        read_cutout(tmp_path / "photo.jpg")


def test_bad_pictures_and_empty_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(UserError, match=r"no\.png: cannot be read"):
        read_cutout(tmp_path / "no.png")
    with pytest.raises(UserError, match="its object is 0 px long"):
        frame_object(np.zeros((9, 9, 4), np.uint8), 8, 0.85, "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no picture in it"):
        list_pictures(tmp_path / "empty")
    with pytest.raises(UserError, match="no such file or folder"):
        list_pictures(tmp_path / "nothing")


def test_the_assumed_camera_shows_the_box_s_side_at_its_share() -> None:
    distance = assumed_distance(nano_config().data, 0.85, 50.0)
    camera = orbit_camera(0, 0, distance, 50.0, 100)
    edges = camera.project(np.array([[-1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]]))
    assert edges[1, 0] - edges[0, 0] == pytest.approx(85)
    assert edges[2, 1] == pytest.approx(50 - 42.5)  # up is up
    np.testing.assert_allclose(camera.world_from_camera[:3, 3], [0, -distance, 0], atol=1e-12)
    fixed = nano_config("data.input_distance=2.0").data
    assert assumed_distance(fixed, 0.85, 50.0) == 2.0


@given(st.floats(0, 360), st.floats(-89, 89))
def test_an_orbit_looks_at_the_origin_upright(azimuth_deg: float, elevation_deg: float) -> None:
    camera = orbit_camera(azimuth_deg, elevation_deg, 2.0, 50.0, 64)  # a Camera refuses what is not rigid
    np.testing.assert_allclose(camera.project(np.zeros((1, 3))), [[32, 32]], atol=1e-9)
    assert camera.project(np.array([[0, 0, 0.1]]))[0, 1] <= 32


def test_an_orbit_s_first_camera_is_the_normalised_input_and_turns_counter_clockwise() -> None:
    np.testing.assert_allclose(normalizing_rotation(orbit_pose(0, 0, 2.0)), np.eye(3), atol=1e-12)
    np.testing.assert_allclose(orbit_pose(90, 0, 2.0)[:3, 3], [2, 0, 0], atol=1e-12)
