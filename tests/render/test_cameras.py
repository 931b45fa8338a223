"""Cameras: the presets' numbers, uniformity, axes, whole objects, and what the frame cuts; numpy only."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.spec import RenderSpec
from pipeline.types import Camera
from render.cameras import (
    BOX_RADIUS,
    NEAR_PLANE,
    PRESETS,
    border,
    cameras_for,
    cropped_share,
    depth_scale,
    flip_camera_axes,
    fov_deg,
    intrinsics,
    look_at,
    max_depth,
    radius_range,
    sample_centres,
)

CORNERS = np.array(list(product((-1.0, 1.0), repeat=3)))
LRM = PRESETS["lrm"]

seeds = st.integers(0, 2**63 - 1)
coordinates = st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3)
fields_of_view = st.floats(5, 120)
resolutions = st.integers(16, 1024)


def spec_of(preset: str = "lrm", **changes: object) -> RenderSpec:
    return RenderSpec.model_validate({"preset": preset, "num_views": 8, "resolution_px": 32} | changes)


# Presets

PUBLISHED = [
    ("lrm", (1.5, 3.0), (-0.75, 1.60), 50.0),
    ("openlrm", (1.9, 2.6), (-0.75, 1.60), 67.38013505195957),
    ("instantmesh", (2.0, 3.5), (-0.75, 1.60), 50.0),
]


@pytest.mark.parametrize(("preset", "radii", "heights", "fov"), PUBLISHED)
@given(seed=seeds)
def test_cameras_keep_to_the_published_numbers(
    preset: str, radii: tuple[float, float], heights: tuple[float, float], fov: float, seed: int
) -> None:
    for camera in cameras_for(spec_of(preset), seed):
        centre, axes = camera.world_from_camera[:3, 3], camera.world_from_camera[:3, :3]
        assert radii[0] - 1e-12 <= np.linalg.norm(centre) <= radii[1] + 1e-12
        assert heights[0] - 1e-12 <= centre[2] <= heights[1] + 1e-12
        assert 2 * math.degrees(math.atan(16 / camera.intrinsics[0, 0])) == pytest.approx(fov, abs=1e-9)
        np.testing.assert_allclose(camera.project(np.zeros((1, 3))), [[16, 16]], atol=1e-9)
        assert axes[2, 1] <= 1e-12, "image y must point down in the world"
        assert abs(axes[2, 0]) < 1e-12, "the horizon must be level"


def test_every_preset_of_the_spec_is_in_the_table() -> None:
    field = RenderSpec.model_fields["preset"]
    assert set(PRESETS) == set(field.annotation.__args__)  # type: ignore[union-attr]


def test_openlrm_has_a_focal_length_of_exactly_three_quarters_of_the_width() -> None:
    for resolution_px in (96, 512, 1000, 1024):
        [camera] = cameras_for(spec_of("openlrm", resolution_px=resolution_px, num_views=1), 0)
        assert camera.intrinsics[0, 0] == 0.75 * resolution_px


@given(seeds)
def test_openlrm_looks_from_the_front_first(seed: int) -> None:
    first, second = sample_centres(spec_of("openlrm", num_views=2), seed)
    assert first[0] == first[2] == 0
    assert -2.6 <= first[1] <= -1.9
    assert np.linalg.norm(second / np.linalg.norm(second) - [0, -1, 0]) > 1e-3


@given(st.sampled_from(list(PRESETS)), fields_of_view)
def test_the_specs_field_of_view_goes_before_the_presets(preset: str, fov: float) -> None:
    [camera] = cameras_for(spec_of(preset, num_views=1, fov_deg=fov), 0)
    assert camera.intrinsics[0, 0] == pytest.approx(16 / math.tan(math.radians(fov / 2)))
    assert fov_deg(spec_of(preset, fov_deg=fov)) == fov
    if PRESETS[preset].radius_range is not None:
        np.testing.assert_array_equal(
            sample_centres(spec_of(preset, fov_deg=fov), 5), sample_centres(spec_of(preset), 5)
        )


def test_the_draws_of_lrm_never_change() -> None:
    """The fingerprint promises that one spec and one seed are one picture; these were written down once."""
    cameras = cameras_for(spec_of(num_views=32, resolution_px=512), 7)
    for view, centre in (
        (0, [-0.066645095, 2.199747995, -0.387241705]),
        (1, [-0.516597052, 1.043682313, 0.969061222]),
        (31, [-0.227971615, 1.38905787, 1.155110746]),
    ):
        np.testing.assert_allclose(cameras[view].world_from_camera[:3, 3], centre, atol=2e-9)
        assert cameras[view].intrinsics[0, 0] == pytest.approx(548.993771650447)


# Draws


def test_poses_do_not_hang_on_the_kernel_that_blas_picks_for_a_processor() -> None:
    """Nodes of one run may have several kinds of processors, and their shards one name."""
    code = (
        "import hashlib; from render.cameras import cameras_for; from pipeline.spec import RenderSpec\n"
        "poses = [c.world_from_camera for seed in range(50) for c in cameras_for(RenderSpec(), seed)]\n"
        "print(hashlib.sha256(b''.join(pose.tobytes() for pose in poses)).hexdigest())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"OPENBLAS_CORETYPE": kernel}, text=True, check=True,
            stdout=subprocess.PIPE,
        ).stdout
        for kernel in ("Prescott", "")  # the oldest, and the one it picks
    }  # fmt: skip
    assert len(told) == 1


@pytest.mark.parametrize("preset", list(PRESETS))
def test_azimuth_is_uniform_without_a_bias_to_cube_diagonals(preset: str) -> None:
    centres = _many_centres(preset)
    azimuth = np.degrees(np.arctan2(centres[:, 1], centres[:, 0]))
    near_diagonal = np.abs((azimuth % 90) - 45) < 15
    # Normalised points of a cube give 0.45; 1/3 has a standard deviation of 0.006 here.
    assert near_diagonal.mean() == pytest.approx(1 / 3, abs=0.03)
    counts, _ = np.histogram(azimuth, bins=12, range=(-180, 180))
    assert np.abs(counts / (len(centres) / 12) - 1).max() < 0.2


@pytest.mark.parametrize("preset", list(PRESETS))
def test_radius_and_height_are_uniform_in_their_intervals(preset: str) -> None:
    centres = _many_centres(preset)
    radius = np.linalg.norm(centres, axis=1)
    heights = centres[:, 2] if PRESETS[preset].radius_range is not None else centres[:, 2] / radius
    for values, (low, high) in (
        (radius, radius_range(spec_of(preset))),
        (heights[radius > 1.6], PRESETS[preset].height_range),
    ):
        assert low - 1e-12 <= values.min()
        assert values.max() <= high + 1e-12
        counts, _ = np.histogram(values, bins=8, range=(low, high))
        assert np.abs(counts / (len(values) / 8) - 1).max() < 0.2


def _many_centres(preset: str) -> np.ndarray:
    """6000 centres, without the views that are not drawn."""
    spec = spec_of(preset, num_views=501)
    return np.concatenate([sample_centres(spec, seed)[1:] for seed in range(12)])


def test_uncropped_looks_from_as_much_of_the_sphere_as_lrm() -> None:
    low, high = PRESETS["uncropped"].height_range
    radius = np.linspace(*LRM.radius_range, 1001)  # type: ignore[misc]
    top = np.minimum(LRM.height_range[1], radius)
    of_lrm = ((top - LRM.height_range[0]) / (2 * radius)).mean()
    assert (high - low) / 2 == pytest.approx(of_lrm, abs=0.03)


@given(st.sampled_from(list(PRESETS)), seeds, st.integers(1, 12), st.integers(1, 12))
def test_a_view_does_not_depend_on_how_many_there_are(preset: str, seed: int, few: int, more: int) -> None:
    few, more = sorted((few, more))
    of_few, of_more = (sample_centres(spec_of(preset, num_views=number), seed) for number in (few, more))
    np.testing.assert_array_equal(of_few, of_more[:few])


@pytest.mark.parametrize("preset", list(PRESETS))
def test_seeds_differ_and_zero_is_a_seed(preset: str) -> None:
    assert not np.allclose(sample_centres(spec_of(preset), 0), sample_centres(spec_of(preset), 1))
    np.testing.assert_array_equal(sample_centres(spec_of(preset), 0), sample_centres(spec_of(preset), 0))


# Axes


@given(coordinates, coordinates, coordinates)
def test_look_at_is_a_right_handed_rigid_motion(x: float, y: float, z: float) -> None:
    pose = look_at(np.array([x, y, z]))
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)


@pytest.mark.parametrize("z", [2.0, -2.0])
def test_look_at_has_an_answer_at_the_poles(z: float) -> None:
    pose = look_at(np.array([0.0, 0.0, z]))
    np.testing.assert_allclose(pose[:3, 2], [0, 0, -np.sign(z)], atol=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)


def test_look_at_refuses_the_origin() -> None:
    with pytest.raises(ValueError, match="cannot look at the origin"):
        look_at(np.zeros(3))


def test_what_is_up_and_right_in_the_world_is_up_and_right_in_the_picture() -> None:
    # From -y, the world's +x is to the right and its +z is up.
    camera = camera_at(np.array([0.0, -2.0, 0.0]))
    (right, up) = camera.project(np.array([[0.5, 0.0, 0.0], [0.0, 0.0, 0.5]]))
    assert right[0] > 16
    assert up[1] < 16
    assert [right[1], up[0]] == pytest.approx([16, 16])


@given(coordinates, coordinates, coordinates)
def test_axes_convert_to_opengl_and_back(x: float, y: float, z: float) -> None:
    pose = look_at(np.array([x, y, z]))
    opengl = flip_camera_axes(pose)
    np.testing.assert_array_equal(flip_camera_axes(opengl), pose)
    np.testing.assert_array_equal(opengl[:3, 3], pose[:3, 3])
    np.testing.assert_array_equal(opengl[:3, 0], pose[:3, 0])
    np.testing.assert_array_equal(opengl[:3, 1:3], -pose[:3, 1:3])


def test_intrinsics_hold_the_field_of_view() -> None:
    matrix = intrinsics(512, 50.0)
    assert matrix[0, 0] == matrix[1, 1]
    assert 2 * math.degrees(math.atan(256 / matrix[0, 0])) == pytest.approx(50)
    np.testing.assert_array_equal(matrix[:2, 2], [256, 256])


# Whole objects


@given(seeds, fields_of_view, resolutions)
def test_uncropped_shows_the_whole_box_with_a_margin(seed: int, fov: float, resolution_px: int) -> None:
    spec = spec_of("uncropped", fov_deg=fov, resolution_px=resolution_px)
    for camera in cameras_for(spec, seed):
        pixels = camera.project(CORNERS)
        assert pixels.min() >= 1.999
        assert pixels.max() <= resolution_px - 1.999
        assert cropped_share(camera, CORNERS, np.ones(8)) == 0


@given(fields_of_view, resolutions)
def test_uncropped_stands_no_farther_than_it_must(fov: float, resolution_px: int) -> None:
    """The ball around the box touches the margin at the nearest distance, and is a tenth smaller at the farthest."""
    spec = spec_of("uncropped", fov_deg=fov, resolution_px=resolution_px)
    nearest, farthest = radius_range(spec)
    assert farthest == pytest.approx(1.1 * nearest)
    outline_px = spec.resolution_px / 2 / math.tan(math.radians(fov / 2)) * BOX_RADIUS / (nearest**2 - 3) ** 0.5
    assert outline_px == pytest.approx(resolution_px / 2 - 2, rel=1e-6)


@pytest.mark.parametrize("fov", [1.01, 169.9])
@pytest.mark.parametrize("resolution_px", [16, 4096])
def test_uncropped_keeps_the_box_before_the_near_plane_at_any_field_of_view(fov: float, resolution_px: int) -> None:
    spec = spec_of("uncropped", fov_deg=fov, resolution_px=resolution_px, num_views=64)
    assert radius_range(spec)[0] - BOX_RADIUS > NEAR_PLANE, "a corner of the box may point at the camera"
    for camera in cameras_for(spec, 3):
        depth = (CORNERS - camera.world_from_camera[:3, 3]) @ camera.world_from_camera[:3, 2]
        assert depth.min() > NEAR_PLANE
        assert depth.max() <= max_depth(spec)


@given(st.sampled_from(list(PRESETS)), st.none() | st.floats(1.01, 169), resolutions, seeds)
def test_depth_fits_16_bits_at_the_largest_power_of_two(
    preset: str, fov: float | None, resolution_px: int, seed: int
) -> None:
    spec = spec_of(preset, fov_deg=fov, resolution_px=resolution_px)
    scale = depth_scale(spec)
    for camera in cameras_for(spec, seed):
        depth = (CORNERS - camera.world_from_camera[:3, 3]) @ camera.world_from_camera[:3, 2]
        assert round(depth.max() * scale) <= 65535
    assert math.log2(scale) == round(math.log2(scale))
    assert scale == 8192 or 2 * scale * max_depth(spec) > 65535


def test_depth_scale_is_8192_unless_the_cameras_stand_far() -> None:
    assert {depth_scale(spec_of(preset)) for preset in PRESETS} == {8192}
    assert depth_scale(spec_of("uncropped", fov_deg=5, resolution_px=512)) == 1024
    assert depth_scale(spec_of("lrm", fov_deg=5)) == 8192
    assert depth_scale(spec_of("uncropped", fov_deg=150)) == 8192


# What the frame cuts

clouds = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).uniform(-1.2, 1.2, (200, 3)))
places = st.tuples(coordinates, coordinates, coordinates).map(np.array)


def camera_at(centre: np.ndarray, width: int = 32, height: int = 32, fov: float = 50.0) -> Camera:
    matrix = intrinsics(width, fov)
    matrix[1, 2] = height / 2
    return Camera(world_from_camera=look_at(centre), intrinsics=matrix, width=width, height=height)


def depth_of(camera: Camera, points: np.ndarray) -> np.ndarray:
    depth: np.ndarray = (points - camera.world_from_camera[:3, 3]) @ camera.world_from_camera[:3, 2]
    return depth


@given(places, clouds, st.integers(8, 80), st.integers(8, 80))
def test_cropped_share_is_what_projects_outside(place: np.ndarray, points: np.ndarray, width: int, height: int) -> None:
    camera = camera_at(place, width, height)
    weights = np.abs(points).sum(axis=1)
    pixels = camera.project(points)
    with np.errstate(invalid="ignore"):
        inside = ((pixels >= 0) & (pixels < [width, height])).all(axis=1) & (depth_of(camera, points) > NEAR_PLANE)
    expected = weights[~inside].sum() / weights.sum()
    assert cropped_share(camera, points, weights) == pytest.approx(expected, abs=1e-9)


def test_cropped_share_counts_by_weight_and_knows_all_and_nothing() -> None:
    camera = camera_at(np.array([0.0, -2.0, 0.0]))
    inside, outside, behind = [0.0, 0.0, 0.0], [1.5, 0.0, 0.0], [0.0, -5.0, 0.0]
    assert cropped_share(camera, np.array([inside, outside, behind]), np.array([3.0, 1.0, 2.0])) == 0.5
    too_near = [0.0, -2.0 + 0.9 * NEAR_PLANE, 0.0]
    assert cropped_share(camera, np.array([inside, too_near]), np.array([3.0, 1.0])) == 0.25
    assert cropped_share(camera, np.array([inside, inside]), np.array([0.1, 0.2])) == 0
    assert cropped_share(camera, np.array([outside, behind]), np.array([0.1, 0.2])) == 1


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [2.0, -1.0], [1.0, math.nan], [1.0, math.inf], [[1.0, 1.0]]])
def test_cropped_share_refuses_weights_that_are_no_areas(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        cropped_share(camera_at(np.array([0.0, -2.0, 0.0])), np.zeros((2, 3)), np.array(weights))


@given(places, clouds, st.sampled_from([0.0, 0.5, 2.0, 7.25]), st.integers(8, 80), st.integers(8, 80))
def test_border_holds_every_point_and_no_more_than_the_margin(
    place: np.ndarray, points: np.ndarray, margin_px: float, width: int, height: int
) -> None:
    camera = camera_at(place, width, height)
    assume(depth_of(camera, points).min() > NEAR_PLANE)
    x0, y0, x1, y1 = border(camera, points, margin_px)
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    pixels = camera.project(points)
    for axis, first, final, size in ((0, x0, x1, width), (1, y0, y1, height)):
        low, high = pixels[:, axis].min() - margin_px, pixels[:, axis].max() + margin_px
        assert first <= max(low, 0) or first == size - 1
        assert min(high, size) <= final or final == 1
        assert first > low - 1 - 1e-9 or first == 0
        assert final <= high + 1 + 1e-9 or final in (1, size)


@given(places, clouds)
def test_border_is_the_whole_image_where_a_point_is_behind(place: np.ndarray, points: np.ndarray) -> None:
    camera = camera_at(place, 40, 30)
    behind = camera.world_from_camera[:3, 3] + camera.world_from_camera[:3, 2] * (NEAR_PLANE * 0.999)
    points = np.concatenate([points, [behind]])
    assert border(camera, points, 1.0) == (0, 0, 40, 30)


def test_border_of_nothing_in_the_frame_is_one_pixel() -> None:
    camera = camera_at(np.array([0.0, -2.0, 0.0]), 40, 30)
    for far in ([9.0, 0.0, 9.0], [-9.0, 0.0, -9.0]):
        x0, y0, x1, y1 = border(camera, np.array([far]), 1.0)
        assert (x1 - x0, y1 - y0) == (1, 1)
    x0, y0, x1, y1 = border(camera, np.zeros((0, 3)), 1.0)
    assert (x1 - x0, y1 - y0) == (1, 1)


def test_border_of_a_point_in_the_middle_of_a_pixel() -> None:
    camera = camera_at(np.array([0.0, -2.0, 0.0]), 41, 31)
    centre = np.zeros((1, 3))
    assert border(camera, centre, 0.0) == (20, 15, 21, 16)
    assert border(camera, centre, 0.6) == (19, 14, 22, 17)


@pytest.mark.parametrize("place", [0, 500_000, 999_999])
def test_a_million_points_are_framed_whole_and_in_passing(place: int) -> None:
    """The time is a guard against Python loops, no benchmark: both take 6 ms, Camera.project alone takes 200."""
    camera = camera_at(np.array([0.0, -2.0, 0.0]), 40, 30)
    points = np.zeros((1_000_000, 3))
    points[place] = [0.2, 0.0, 0.1]
    weights = np.ones(len(points))
    started = time.process_time()
    assert border(camera, points, 0.0) == (20, 12, 25, 16)
    assert cropped_share(camera, points, weights) == 0
    points[place] = [9.0, 0.0, 0.0]
    assert cropped_share(camera, points, weights) == 1e-6
    assert time.process_time() - started < 2
