"""Chamfer distance and F-score of surfaces whose distance is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm.mesh import Mesh
from lrm.mesh_metrics import depth_points, draw, sample_surface, surface_distances, thin
from tests.conftest import orbit_camera


def sphere(radius: float, centre: tuple[float, float, float] = (0, 0, 0)) -> Mesh:
    made = trimesh.creation.icosphere(4, radius)
    return Mesh(vertices=(made.vertices + centre).astype(np.float32), faces=made.faces.astype(np.int64))


def test_spheres_in_each_other_are_twice_their_radii_apart() -> None:
    inner, outer = (sample_surface(sphere(r), 20_000, seed) for seed, r in enumerate((0.5, 0.6)))
    chamfer, (tight, loose) = surface_distances(inner, outer, (0.09, 0.12))
    assert chamfer == pytest.approx(0.2, abs=0.004)  # points are a little apart along the surface, too
    assert (tight, loose) == (0.0, 1.0)
    nothing, (all_of_it,) = surface_distances(inner, inner, (1e-6,))
    assert (nothing, all_of_it) == (0.0, 1.0)


def test_a_part_is_precise_and_not_complete() -> None:
    square = np.stack(np.meshgrid(np.arange(20) / 20, np.arange(20) / 20, [0.0]), -1).reshape(-1, 3)
    half = square[square[:, 0] < 0.5]
    chamfer, (score,) = surface_distances(half, square, (1e-6,))
    assert score == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert chamfer == pytest.approx(np.mean([max(0, i - 9) / 20 for i in range(20)]))


def test_a_shift_is_measured_along_the_normal() -> None:
    flat = np.stack(np.meshgrid(np.arange(50) / 50, np.arange(50) / 50, [0.0]), -1).reshape(-1, 3)
    chamfer, scores = surface_distances(flat + np.array([0, 0, 0.07]), flat, (0.05, 0.1))
    assert chamfer == pytest.approx(0.14)
    assert scores == [0.0, 1.0]


def test_points_are_drawn_uniformly_by_area_and_by_the_seed() -> None:
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 0], [8, 0, 0], [5, 1, 0]], np.float32)
    mesh = Mesh(vertices=vertices, faces=np.array([[0, 1, 2], [3, 4, 5]]))
    points = sample_surface(mesh, 40_000, seed=0)
    assert (points[:, 0] > 2).mean() == pytest.approx(0.75, abs=0.01)
    small = points[points[:, 0] < 2]
    np.testing.assert_allclose(small.mean(0), [1 / 3, 1 / 3, 0], atol=0.01)
    assert (small[:, 0] + small[:, 1]).max() <= 1
    np.testing.assert_array_equal(points, sample_surface(mesh, 40_000, seed=0))
    assert not np.array_equal(points, sample_surface(mesh, 40_000, seed=1))


@given(st.floats(0, 2 * math.pi), st.floats(-0.6, 1.2), st.floats(1.7, 3.0))
@settings(max_examples=20, deadline=None)
def test_depth_becomes_the_points_that_the_pixels_see(azimuth: float, height: float, distance: float) -> None:
    camera = orbit_camera(azimuth, height, distance, 24)
    depth = np.zeros((24, 24), np.float32)
    depth[3, 17], depth[20, 5] = 1.25, 2.5
    points = depth_points(depth, camera)
    np.testing.assert_allclose(camera.project(points), [[17.5, 3.5], [5.5, 20.5]], atol=1e-6)
    forward = camera.world_from_camera[:3, 2]
    np.testing.assert_allclose((points - camera.world_from_camera[:3, 3]) @ forward, [1.25, 2.5], atol=1e-6)


def test_thinning_keeps_a_point_a_voxel_whatever_the_number_of_views() -> None:
    rng = np.random.default_rng(0)
    dense, sparse = rng.random((20_000, 3)) * [0.5, 1, 0], rng.random((2_000, 3)) * [0.5, 1, 0] + [0.5, 0, 0]
    thinned = thin(np.concatenate([dense, sparse]), voxel=0.05)
    assert len(thinned) == 20 * 20
    assert (thinned[:, 0] < 0.5).mean() == 0.5
    drawn = draw(thinned, 100, seed=0)
    assert len(np.unique(drawn, axis=0)) == 100
    np.testing.assert_array_equal(draw(thinned, 1000, seed=0), thinned)
