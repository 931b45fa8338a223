"""Up, centre, size and spread: pure functions against made geometry."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.placing import (
    IDENTITY,
    LEFT_IS_UP,
    RIGHT_IS_UP,
    Votes,
    find_up,
    growth,
    meeting_point,
    settle_sideways,
    spread,
    widest_angle_deg,
    without_strays,
    world_rotation,
)
from tests.captures import look_at


def orbit(sweep_deg: float, lift_deg: float, turn: np.ndarray = IDENTITY, num: int = 12) -> np.ndarray:
    """camera_from_world [N, 3, 4] round the origin, a degree of roll, z up."""
    out = []
    for i in range(num):
        a, b = math.radians(sweep_deg * i / (num - 1)), math.radians(lift_deg + 5 * math.sin(2.0 * i))
        at = 4 * np.array([math.cos(a) * math.cos(b), math.sin(a) * math.cos(b), math.sin(b)])
        out.append(turn @ look_at(at, np.zeros(3), math.radians(math.sin(5.0 * i))))
    return np.stack(out)


def centres_of(poses: np.ndarray) -> np.ndarray:
    return -np.einsum("nji,nj->ni", poses[:, :, :3], poses[:, :, 3])


@pytest.mark.parametrize("sweep", [60, 120, 340])
@pytest.mark.parametrize("lift", [15, 50])
@pytest.mark.parametrize(("turn", "sideways"), [(IDENTITY, False), (LEFT_IS_UP.T, True), (RIGHT_IS_UP.T, True)])
def test_up_is_found_in_open_and_closed_orbits_upright_and_sideways(
    sweep: float, lift: float, turn: np.ndarray, sideways: bool
) -> None:
    poses = orbit(sweep, lift, turn)
    up = find_up(poses[:, :, :3])
    assert up.sure
    assert up.sideways is sideways
    floor = np.c_[np.random.default_rng(0).uniform(-2, 2, (80, 2)), np.full(80, -0.8)]
    for rest in (floor, np.zeros((0, 3))):  # by the floor, and without one by the cameras' height
        settled, found = settle_sideways(up, poses[:, :, :3], centres_of(poses), np.zeros(3), rest)
        assert np.degrees(np.arccos(settled.axis[2])) < 1.5
        np.testing.assert_array_equal(found, turn.T)
        assert ((found @ poses[:, :, :3])[:, 1, 2] < 0).all()  # upright cameras' y points down


def test_a_turntable_with_the_object_lying_down_has_no_answer_and_says_so() -> None:
    rng = np.random.default_rng(0)
    poses = np.stack(
        [look_at(4 * d / np.linalg.norm(d), np.zeros(3), rng.uniform(0, 6)) for d in rng.normal(size=(20, 3))]
    )
    up = find_up(poses[:, :, :3])
    assert not up.sure
    assert not up.sideways
    assert np.linalg.norm(up.axis) == pytest.approx(1)


def test_a_point_is_the_objects_by_its_track_and_by_its_views() -> None:
    votes = Votes(
        observed=np.array([4.0, 4, 4, 0]), observed_in=np.array([4.0, 1, 3, 0]),
        seen=np.array([8.0, 8, 8, 8]), seen_in=np.array([7.0, 8, 5, 8]),
    )  # fmt: skip
    assert votes.of_object().tolist() == [True, False, False, False]


def test_a_stray_point_does_not_decide_the_size_and_a_thin_end_stays() -> None:
    rng = np.random.default_rng(0)
    body = rng.uniform(-1, 1, (1000, 3))
    tip = np.array([[0, 0, 1.2]])
    kept = without_strays(np.concatenate([body, tip, [[30.0, 0, 0]]]))
    assert len(kept) == 1001
    assert kept[:, 2].max() == 1.2


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_lines_through_a_point_meet_there(seed: int) -> None:
    rng = np.random.default_rng(seed)
    place = rng.normal(size=3)
    origins = place + rng.normal(size=(5, 3)) * 3
    directions = (place - origins) / np.linalg.norm(place - origins, axis=1, keepdims=True)
    found, miss = meeting_point(origins, directions)
    np.testing.assert_allclose(found, place, atol=1e-6)
    assert miss < 1e-6


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_world_has_up_on_z_and_the_first_camera_on_the_side_of_minus_y(seed: int) -> None:
    rng = np.random.default_rng(seed)
    up = rng.normal(size=3)
    up /= np.linalg.norm(up)
    centre, first = rng.normal(size=(2, 3))
    rotation = world_rotation(up, first, centre)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(rotation) > 0
    np.testing.assert_allclose(rotation @ up, [0, 0, 1], atol=1e-9)
    away = rotation @ (first - centre)
    assert abs(away[0]) < 1e-9
    assert away[1] < 0
    np.testing.assert_allclose(world_rotation(up, centre + up, centre) @ up, [0, 0, 1], atol=1e-9)


def test_views_are_spread_and_their_widest_angle_is_known() -> None:
    angle = np.radians(np.arange(0, 360, 10))
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
    assert spread(ring, 4) == [0, 9, 18, 27]
    assert spread(ring, 100) == list(range(36))
    assert widest_angle_deg(ring) == pytest.approx(180)
    assert widest_angle_deg(ring[:10]) == pytest.approx(90)


def test_a_box_grows_until_it_covers_the_masks_and_never_shrinks() -> None:
    poses = orbit(300, 20)
    cube = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T

    def hulls(factor: float) -> list[np.ndarray]:
        out = []
        for pose in poses:
            camera = factor * cube @ pose[:, :3].T + pose[:, 3]
            out.append(camera[:, :2] / camera[:, 2:])
        return out

    views = [(pose[:, :3], pose[:, 3]) for pose in poses]
    assert growth(hulls(0.5), views) == 1
    assert growth(hulls(1.0), views) == 1
    assert growth(hulls(1.2), views) == pytest.approx(1.2, abs=0.06)
