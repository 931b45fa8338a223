"""Cameras: normalisation keeps the pictures, intrinsics follow pixels through resize and crop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrm.cameras import (
    camera_numbers,
    crop_intrinsics,
    input_distance,
    normalize_cameras,
    pixel_rays,
    resize_intrinsics,
)
from lrm.data import cut_window
from pipeline.types import Camera
from tests.conftest import orbit_camera

POINTS = np.random.default_rng(0).uniform(-0.8, 0.8, (40, 3))


def orbit(count: int = 5) -> list[Camera]:
    return [orbit_camera(1.3 * i + 0.2, 0.3 * i - 0.5, 1.6 + 0.25 * i, 64) for i in range(count)]


def moved(camera: Camera, pose: np.ndarray) -> Camera:
    return Camera(world_from_camera=pose, intrinsics=camera.intrinsics, width=camera.width, height=camera.height)


@given(st.integers(0, 4), st.floats(-0.2, 0.2), st.one_of(st.none(), st.floats(0.5, 4)))
def test_normalisation_puts_the_input_camera_on_minus_y_and_changes_no_picture(
    chosen: int, tilt_rad: float, distance: float | None
) -> None:
    cameras = orbit()
    tilt = np.eye(4)
    tilt[:2, :2] = [[math.cos(tilt_rad), -math.sin(tilt_rad)], [math.sin(tilt_rad), math.cos(tilt_rad)]]
    nod = np.eye(4)
    nod[1:3, 1:3] = tilt[:2, :2]
    poses = np.stack([camera.world_from_camera @ tilt @ nod for camera in cameras])  # rolled, and off-axis
    out = normalize_cameras(poses, chosen, distance)
    before = np.linalg.norm(poses[chosen, :3, 3])
    np.testing.assert_allclose(out[chosen, :3, 3], [0, -(distance or before), 0], atol=1e-12)
    up = -out[chosen, :3, 1]
    assert abs(up[0]) < 1e-12
    assert up[2] > 0.9
    q = out[chosen, :3, :3] @ poses[chosen, :3, :3].T
    np.testing.assert_allclose(q @ q.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(q) > 0
    for camera, old, new in zip(cameras, poses, out):  # the turned and scaled world looks the same
        scale = (distance or before) / before
        seen = moved(camera, new).project(scale * POINTS @ q.T)
        np.testing.assert_allclose(seen, moved(camera, old).project(POINTS), atol=1e-8)


def test_a_camera_that_looks_at_the_origin_still_does_and_stands_upright() -> None:
    out = normalize_cameras(np.stack([camera.world_from_camera for camera in orbit()]), 3)[3]
    np.testing.assert_allclose(out[:3, :3], [[1, 0, 0], [0, 0, 1], [0, -1, 0]], atol=1e-12)


@given(st.integers(0, 4), st.floats(-0.12, 0.12), st.floats(-0.12, 0.12), st.floats(1.2, 2.5))
def test_a_captured_camera_keeps_its_distance_its_tilt_and_its_object(
    chosen: int, nod_rad: float, pan_rad: float, farther: float
) -> None:
    """Real cameras miss the object's centre by up to 7 degrees; it must stay at the origin all the same."""
    poses = np.stack([camera.world_from_camera for camera in orbit()])
    poses[:, :3, 3] *= farther
    nod, pan = np.eye(4), np.eye(4)
    nod[1:3, 1:3] = [[math.cos(nod_rad), -math.sin(nod_rad)], [math.sin(nod_rad), math.cos(nod_rad)]]
    pan[::2, ::2][:2, :2] = [[math.cos(pan_rad), math.sin(pan_rad)], [-math.sin(pan_rad), math.cos(pan_rad)]]
    poses = poses @ nod @ pan
    out = normalize_cameras(poses, chosen, input_distance("mvimgnet", 2.0))
    np.testing.assert_allclose(np.linalg.norm(out[:, :3, 3], axis=1), np.linalg.norm(poses[:, :3, 3], axis=1))
    np.testing.assert_allclose(out[chosen, :3, 3], [0, -np.linalg.norm(poses[chosen, :3, 3]), 0], atol=1e-9)
    origin = np.zeros((1, 3))
    for camera, old, new in zip(orbit(), poses, out):
        np.testing.assert_allclose(moved(camera, new).project(origin), moved(camera, old).project(origin), atol=1e-8)


def test_only_renders_are_brought_to_a_distance() -> None:
    assert input_distance("objaverse", 2.0) == 2.0
    assert input_distance("procedural", None) is None
    assert input_distance("mvimgnet", 2.0) is None
    assert input_distance("colmap", 2.0) is None


def test_a_camera_without_a_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="stands at the world origin"):
        normalize_cameras(np.eye(4)[None], 0)


@given(st.integers(24, 120), st.data())
def test_a_point_stays_on_its_pixel_through_resize_and_crop(size: int, data: st.DataObject) -> None:
    """A picture that holds its own pixel coordinates must, after the cut, still name where its pixels came from."""
    camera = orbit()[0]
    width, height, window = 80, 60, 16
    left, top = (data.draw(st.integers(0, size - window)) for _ in range(2))
    columns, rows = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    image = np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.float32)
    k = np.array([[70.0, 0, 41], [0, 65, 28], [0, 0, 1]])
    cut = cut_window(image, k, size, left, top, window)
    pixels = Camera(world_from_camera=camera.world_from_camera, intrinsics=k, width=width, height=height).project(
        POINTS
    )
    new = Camera(world_from_camera=camera.world_from_camera, intrinsics=cut.intrinsics, width=window, height=window)
    moved_pixels = new.project(POINTS)
    np.testing.assert_allclose((moved_pixels + np.array([left, top])) / size, pixels / [width, height], atol=1e-12)
    centres = (np.arange(window) + 0.5 + left) / size
    inside = (centres > 1 / 60) & (centres < 1 - 1 / 60)  # a bilinear enlargement repeats the outermost half pixel
    np.testing.assert_allclose(cut.image[0, inside, 0], centres[inside], atol=1.5e-3)
    centres = (np.arange(window) + 0.5 + top) / size
    inside = (centres > 1 / 60) & (centres < 1 - 1 / 60)
    np.testing.assert_allclose(cut.image[inside, 0, 1], centres[inside], atol=1.5e-3)


def test_rays_pass_through_the_points_that_project_to_their_pixels() -> None:
    camera = orbit()[1]
    k = crop_intrinsics(resize_intrinsics(camera.intrinsics, 0.5, 0.75), 3, 5)
    pose = torch.tensor(camera.world_from_camera)
    origins, directions = pixel_rays(pose, torch.tensor(k), 20, 10)
    assert origins.shape == directions.shape == (200, 3)
    points = (origins + 1.7 * directions).numpy()
    pixels = Camera(world_from_camera=camera.world_from_camera, intrinsics=k, width=10, height=20).project(points)
    rows, columns = np.divmod(np.arange(200), 10)
    np.testing.assert_allclose(pixels, np.stack([columns, rows], 1) + 0.5, atol=1e-9)


def test_the_twenty_numbers_are_the_pose_and_intrinsics_over_the_image_size() -> None:
    camera = orbit()[2]
    numbers = camera_numbers(camera.world_from_camera, camera.intrinsics, camera.width, camera.height)
    assert numbers.shape == (20,)
    np.testing.assert_allclose(numbers[:16].reshape(4, 4), camera.world_from_camera)
    np.testing.assert_allclose(numbers[18:], [0.5, 0.5])
