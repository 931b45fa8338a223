"""Cameras: the recipe's ranges, uniformity, axes; numpy only."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from render.cameras import (
    HEIGHT_RANGE,
    RADIUS_RANGE,
    cameras_for,
    flip_camera_axes,
    intrinsics,
    look_at,
    sample_centres,
)
from tests.render.conftest import make_spec

seeds = st.integers(0, 2**63 - 1)
coordinates = st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3)


@given(seeds)
def test_every_camera_is_in_the_recipes_shell_and_looks_at_the_origin(seed: int) -> None:
    for camera in cameras_for(make_spec(render={"num_views": 8}).render, seed):
        centre, axes = camera.world_from_camera[:3, 3], camera.world_from_camera[:3, :3]
        assert RADIUS_RANGE[0] - 1e-12 <= np.linalg.norm(centre) <= RADIUS_RANGE[1] + 1e-12
        assert HEIGHT_RANGE[0] - 1e-12 <= centre[2] <= HEIGHT_RANGE[1] + 1e-12
        np.testing.assert_allclose(camera.project(np.zeros((1, 3))), [[16, 16]], atol=1e-9)
        assert axes[2, 1] <= 1e-12, "image y must point down in the world"
        assert abs(axes[2, 0]) < 1e-12, "the horizon must be level"


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
    [camera] = cameras_for(make_spec(render={"num_views": 1}).render, 0)
    pose = look_at(np.array([0.0, -2.0, 0.0]))
    moved = type(camera)(world_from_camera=pose, intrinsics=camera.intrinsics, width=32, height=32)
    (right, up) = moved.project(np.array([[0.5, 0.0, 0.0], [0.0, 0.0, 0.5]]))
    assert right[0] > 16
    assert up[1] < 16
    assert [right[1], up[0]] == pytest.approx([16, 16])


def test_azimuth_is_uniform_without_a_bias_to_cube_diagonals() -> None:
    centres = sample_centres(6000, 11)
    azimuth = np.degrees(np.arctan2(centres[:, 1], centres[:, 0]))
    near_diagonal = np.abs((azimuth % 90) - 45) < 15
    # Normalised points of a cube give 0.45; 1/3 has a standard deviation of 0.006 here.
    assert near_diagonal.mean() == pytest.approx(1 / 3, abs=0.03)
    counts, _ = np.histogram(azimuth, bins=12, range=(-180, 180))
    assert np.abs(counts / 500 - 1).max() < 0.2


def test_radius_and_height_are_uniform_in_their_intervals() -> None:
    centres = sample_centres(6000, 5)
    radius = np.linalg.norm(centres, axis=1)
    for values, (low, high) in ((radius, RADIUS_RANGE), (centres[radius > 1.6, 2], HEIGHT_RANGE)):
        counts, _ = np.histogram(values, bins=8, range=(low, high))
        assert np.abs(counts / (len(values) / 8) - 1).max() < 0.2


@given(seeds, st.integers(1, 12), st.integers(1, 12))
def test_a_view_does_not_depend_on_how_many_there_are(seed: int, few: int, more: int) -> None:
    few, more = sorted((few, more))
    np.testing.assert_array_equal(sample_centres(few, seed), sample_centres(more, seed)[:few])


def test_seeds_differ_and_zero_is_a_seed() -> None:
    assert not np.allclose(sample_centres(4, 0), sample_centres(4, 1))
    np.testing.assert_array_equal(sample_centres(4, 0), sample_centres(4, 0))


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
