"""Lenses and the one resampling: against pycolmap's own undistorter, and against pictures whose answer is known."""

from __future__ import annotations

import cv2
import numpy as np
import pycolmap
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.lens import Cutout, Lens, Window, filter_sigma, lens_map, sample_view, shrink_of, straight_rgba
from pipeline.placing import IDENTITY, LEFT_IS_UP, RIGHT_IS_UP
from pipeline.types import AssetError, FailureKind
from tests.captures import bend_of, picture
from tests.conftest import SHARED

PARAMS = {
    "SIMPLE_PINHOLE": [900, 310, 250],
    "PINHOLE": [900, 940, 310, 250],
    "SIMPLE_RADIAL": [900, 310, 250, -0.1],
    "RADIAL": [900, 310, 250, 0.15, -0.05],
    "OPENCV": [900, 930, 310, 250, -0.12, 0.04, 0.003, -0.002],
    "FULL_OPENCV": [900, 930, 310, 250, -0.12, 0.04, 0.003, -0.002, 0.01, 0.02, 0.01, 0.0],
    "SIMPLE_RADIAL_FISHEYE": [700, 310, 250, 0.02],
    "RADIAL_FISHEYE": [700, 310, 250, 0.02, -0.01],
    "OPENCV_FISHEYE": [700, 710, 310, 250, 0.02, -0.01, 0.001, 0.0],
    "FOV": [800, 810, 310, 250, 0.6],
    "THIN_PRISM_FISHEYE": [700, 710, 310, 250, 0.02, -0.01, 0.001, 0.0, 0.0, 0.0, 0.001, 0.001],
    "SIMPLE_DIVISION": [900, 310, 250, -0.1],
    "EUCM": [800, 800, 310, 250, 0.55, 1.1],
}


def lens_of(model: str, params: list[float], width: int = 640, height: int = 480) -> Lens:
    return Lens.of(pycolmap.Camera(camera_id=1, model=model, width=width, height=height, params=params))


@pytest.mark.parametrize("model", PARAMS)
def test_the_filled_in_map_is_the_model_at_every_pixel(model: str) -> None:
    lens = lens_of(model, PARAMS[model])
    lens.check("1")
    low, high = lens.edge.reshape(-1, 2).min(axis=0), lens.edge.reshape(-1, 2).max(axis=0)
    window = Window(left=float(low[0]), top=float(low[1]), side=float((high - low).min()))
    x, y = lens_map(lens, window, IDENTITY, 200)
    centres = (np.arange(200) + 0.5) * window.side / 200
    grid = np.stack(np.meshgrid(window.left + centres, window.top + centres), -1).reshape(-1, 2)
    truth = lens.pixels(grid).reshape(200, 200, 2)
    there = x > -9999
    assert there.mean() > 0.98
    assert np.abs(np.stack([x, y], -1) - truth)[there].max() < 0.01


def test_a_lens_undoes_what_it_does_and_a_bend_of_our_own_agrees() -> None:
    for model in ("SIMPLE_RADIAL", "RADIAL", "OPENCV", "PINHOLE"):
        bend = bend_of(model, 270, 480)
        lens = Lens.of(bend.camera(model))
        pixels = np.random.default_rng(0).uniform((0, 0), (270, 480), (50, 2))
        np.testing.assert_allclose(lens.plane(pixels), bend.plane(pixels), atol=1e-8)
        np.testing.assert_allclose(lens.pixels(bend.plane(pixels)), pixels, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "params", "said"),
    [
        ("SIMPLE_RADIAL", [38530, 960, 540, 0.0], "focal length"),  # both seen in real captures
        ("RADIAL", [1900, 960, 540, 1.25, -5.9], "distortion"),
        ("SIMPLE_RADIAL", [300, 960, 540, 0.0], "focal length"),
        ("SIMPLE_RADIAL", [1900, -40, 540, 0.0], "principal point"),
        ("SIMPLE_RADIAL", [1500, 960, 540, -1.4], "distortion"),
        ("EQUIRECTANGULAR", [1920, 1080], "panorama"),
    ],
)
def test_absurd_lenses_are_refused(model: str, params: list[float], said: str) -> None:
    with pytest.raises(AssetError, match=said) as error:
        lens_of(model, params, 1920, 1080).check("7")
    assert error.value.kind == FailureKind.BAD_CAMERA


def test_a_camera_of_more_pixels_than_a_photo_may_have_is_refused() -> None:
    for width, height, fits in ((14_000, 9_000, True), (36_000, 64_000, False)):
        lens = lens_of("SIMPLE_PINHOLE", [1.2 * max(width, height), width / 2, height / 2], width, height)
        if fits:
            lens.check("1")
        else:
            with pytest.raises(AssetError, match="at most 134217728 pixels are allowed"):
                lens.check("1")


@pytest.mark.parametrize("params", [[1313.71, 800, 600, 0.011], [1313.71, 800, 600, -0.09]])
def test_undistortion_agrees_with_pycolmaps_own(params: list[float]) -> None:
    path = SHARED / "captures" / "plush_mit" / "images" / "20240212_003919.jpg"
    if not path.exists():
        pytest.skip("shared/captures is not present")
    camera = pycolmap.Camera(camera_id=1, model="SIMPLE_RADIAL", width=1600, height=1200, params=params)
    bitmap = pycolmap.Bitmap.from_array(picture(path.read_bytes()))
    theirs, pinhole = pycolmap.undistort_image(pycolmap.UndistortCameraOptions(), bitmap, camera)
    truth = theirs.to_array()
    focal, (cx, cy) = pinhole.focal_length_x, (pinhole.principal_point_x, pinhole.principal_point_y)
    size = max(truth.shape[:2])
    window = Window(left=-cx / focal, top=-cy / focal, side=size / focal)
    photo = cv2.imread(str(path))
    whole = Cutout.of(np.full((1200, 1600), 255, np.uint8), 1)
    ours = sample_view(photo, whole, Lens.of(camera), window, IDENTITY, size)[: truth.shape[0], : truth.shape[1], :3]
    error = ours[2:-2, 2:-2].astype(float) - truth[2:-2, 2:-2]
    assert 10 * np.log10(255**2 / (error**2).mean()) > 44


def test_what_a_lens_never_saw_is_not_folded_back_into_the_view() -> None:
    lens = lens_of("SIMPLE_RADIAL", [600, 320, 240, -0.3])
    lens.check("1")
    mask = np.full((480, 640), 255, np.uint8)
    photo = np.full((480, 640, 3), 200, np.uint8)
    wide = Window(left=-3.0, top=-3.0, side=6.0)  # beyond r = 1 / sqrt(-3 k) = 1.05 the model turns back
    view = sample_view(photo, Cutout.of(mask, 1), lens, wide, IDENTITY, 240)
    rows, columns = np.nonzero(view[..., 3])
    reach = np.abs(np.concatenate([rows, columns]) + 0.5 - 120).max() / 40
    assert reach < np.abs(lens.edge).max() + 0.1
    assert view[..., 3].max() == 255


def coordinates_photo(width: int, height: int) -> np.ndarray:
    columns, rows = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return np.rint(np.stack([columns, rows, 0 * rows], -1) * 255).astype(np.uint8)


@pytest.mark.parametrize("turn", [IDENTITY, LEFT_IS_UP, RIGHT_IS_UP])
def test_the_window_and_its_intrinsics_name_the_same_pixels(turn: np.ndarray) -> None:
    lens = lens_of("SIMPLE_PINHOLE", [500, 330, 220])
    photo = coordinates_photo(640, 480)
    window = Window(left=-0.21, top=-0.18, side=0.4)
    view = sample_view(photo, Cutout.of(np.full((480, 640), 255, np.uint8), 1), lens, window.turned(turn), turn, 100)
    k = window.turned(turn).intrinsics(100)
    pixel = np.array([63.5, 21.5, 1.0])
    ray = turn.T @ np.linalg.inv(k) @ pixel  # in the stored camera's axes
    x, y = lens.pixels((ray[:2] / ray[2])[None])[0]
    found = view[21, 63, :3].astype(float)  # RGB of a picture whose blue is x, green is y
    assert abs(found[2] / 255 * 640 - x) < 2.6
    assert abs(found[1] / 255 * 480 - y) < 2


def test_edges_hold_the_objects_colour_alone() -> None:
    """A red disc on green: premultiplied sampling lets no green into the half-covered pixels."""
    lens = lens_of("SIMPLE_PINHOLE", [900, 400, 300], 800, 600)
    mask = cv2.circle(np.zeros((600, 800), np.uint8), (400, 300), 180, 255, -1)
    photo = np.where(mask[..., None] > 0, [20, 10, 230], [10, 240, 10]).astype(np.uint8)
    window = Window(left=-0.23, top=-0.23, side=0.46)
    for shrink in (1, 2):
        small = photo if shrink == 1 else cv2.resize(photo, (400, 300), interpolation=cv2.INTER_AREA)
        view = sample_view(small, Cutout.of(mask, shrink), lens, window, IDENTITY, 256)
        edge = (view[..., 3] > 40) & (view[..., 3] < 215)
        assert edge.sum() > 100
        if shrink == 1:
            assert (view[edge][:, :3].astype(int) - [230, 10, 20]).__abs__().max() <= 8
        assert (view[view[..., 3] == 0] == 0).all()


def test_fine_stripes_become_grey_not_coarse_stripes() -> None:
    lens = lens_of("SIMPLE_PINHOLE", [1000, 512, 512], 1024, 1024)
    photo = np.zeros((1024, 1024, 3), np.uint8)
    photo[:, ::2] = 255
    whole = Cutout.of(np.full((1024, 1024), 255, np.uint8), 1)
    window = Window(left=-0.45, top=-0.45, side=0.9)
    view = sample_view(photo, whole, lens, window, IDENTITY, 500)[20:-20, 20:-20, :3].astype(float)  # 1.8 for one
    plain = cv2.remap(
        photo, *(part - 0.5 for part in lens_map(lens, window, IDENTITY, 500)), cv2.INTER_LINEAR
    )[20:-20, 20:-20]  # fmt: skip
    assert plain.std() > 2 * view.std()
    assert abs(view.mean() - 127.5) < 3


@given(st.floats(1, 2), st.floats(1, 2))
@settings(deadline=None)
def test_the_filter_grows_with_what_it_must_remove(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert filter_sigma(low) <= filter_sigma(high) + 1e-12
    assert filter_sigma(1.0) == 0


@given(st.integers(0, 255), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_straight_alpha_gives_the_same_picture_over_any_background(colour: int, alpha: int) -> None:
    premultiplied = np.zeros((1, 1, 4), np.uint8)
    premultiplied[..., :3], premultiplied[..., 3] = round(colour * alpha / 255), alpha
    out = straight_rgba(premultiplied)[0, 0].astype(float)
    assert abs(out[0] * out[3] / 255 - premultiplied[0, 0, 0]) <= 0.51
    assert alpha or not out.any()


def test_a_photo_is_shrunk_only_as_far_as_its_view_allows() -> None:
    lens = lens_of("SIMPLE_PINHOLE", [1000, 500, 500], 1000, 1000)
    found = [shrink_of(Window(left=0, top=0, side=side), lens, 100) for side in (0.05, 0.199, 0.2, 0.41, 0.9, 3)]
    assert found == [1, 1, 2, 4, 8, 8]
