"""Measures of made pictures whose figures are known by hand, flags, and the admission rules on them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.phash import perceptual_hash
from pipeline.quality import FLAGS, judge, measure_sample, side_facts, view_facts
from pipeline.spec import AdmissionSpec
from pipeline.types import Camera, FailureKind
from tests.conftest import orbit_camera

CAMERA = orbit_camera(0.0, 0.0, 2.0, 128)  # at distance 2 an object of 2 units spans twice the focal length over 2


def focal_px(camera: Camera) -> float:
    return float(camera.intrinsics[0, 0])


def box(
    rows: slice, columns: slice, colour: tuple[int, int, int] = (90, 120, 60), size: int = 128
) -> NDArray[np.uint8]:
    picture = np.zeros((size, size, 4), np.uint8)
    picture[rows, columns] = (*colour, 255)
    return picture


SOLID = box(slice(34, 94), slice(34, 94))


def facts(picture: NDArray[np.uint8], camera: Camera = CAMERA) -> dict[str, float | bool]:
    return view_facts(picture, camera)


def test_coverage_border_and_extremes_are_counted_over_the_objects_pixels() -> None:
    picture = box(slice(0, 64), slice(32, 64))
    picture[:16, 32:64] = 255
    picture[16:24, 32:64, :3] = 2
    picture[100:110, :, :] = (255, 255, 255, 127)  # less than half covered: no object
    found = facts(picture)
    assert found["alpha_coverage"] == pytest.approx(64 * 32 / 128**2)
    assert found["clipped"] == pytest.approx(16 / 64)
    assert found["black"] == pytest.approx(8 / 64)
    assert found["border_touch"] is True
    assert facts(SOLID)["border_touch"] is False


def test_colour_spread_is_the_rms_deviation_over_the_channels() -> None:
    picture = SOLID.copy()
    assert facts(picture)["colour_spread"] == 0
    picture[34:64, 34:94, 0] = 190  # half the pixels 100 levels brighter in one of three channels: deviation 50
    assert facts(picture)["colour_spread"] == pytest.approx(50 / math.sqrt(3) / 255, abs=1e-6)
    picture[:34] = 255  # what is transparent does not count
    picture[..., 3][:34] = 0
    assert facts(picture)["colour_spread"] == pytest.approx(50 / math.sqrt(3) / 255, abs=1e-6)


@pytest.mark.parametrize("width", [1, 2, 3, 8, 31])
def test_thickness_of_a_strip_is_its_width_to_a_pixel(width: int) -> None:
    picture = box(slice(10, 118), slice(60, 60 + width))
    pixels = round(float(facts(picture)["thickness"]) * 2 * focal_px(CAMERA) / 2, 3)
    assert pixels in (width - 1, width)
    assert width > 1 or pixels == 1


def ball(camera: Camera) -> NDArray[np.uint8]:
    """The silhouette of a ball of radius 1: its tangent cone cuts the picture in a circle."""
    distance = float(np.linalg.norm(camera.world_from_camera[:3, 3]))
    radius = focal_px(camera) / math.sqrt(distance**2 - 1)
    grid = np.arange(camera.width) + 0.5 - camera.width / 2
    picture = np.zeros((camera.width, camera.width, 4), np.uint8)
    picture[grid[:, None] ** 2 + grid**2 < radius**2] = (200, 100, 50, 255)
    return picture


@pytest.mark.parametrize(("distance", "size"), [(2.7, 128), (3.5, 128), (3.5, 512), (3.5, 48)])
def test_thickness_is_in_units_of_the_object_whatever_the_camera(distance: float, size: int) -> None:
    camera = orbit_camera(1.0, 0.4, distance, size)
    width = distance / math.sqrt(distance**2 - 1)  # seen from near, the circle is larger than the ball's
    pixel = distance / focal_px(camera) / 2
    assert width - 2.5 * pixel <= facts(ball(camera), camera)["thickness"] <= width


def test_a_pole_seen_from_its_end_is_as_thin_as_from_its_side() -> None:
    side, end = box(slice(10, 118), slice(62, 66)), box(slice(62, 66), slice(62, 66))
    assert facts(side)["thickness"] == facts(end)["thickness"] < 0.05


def test_a_wire_ring_is_thin_and_what_fills_the_picture_is_not_endless() -> None:
    grid = np.arange(128) - 63.5
    distance = np.hypot(grid[:, None], grid)
    ring = np.zeros((128, 128, 4), np.uint8)
    ring[(distance > 40) & (distance < 43)] = 255
    assert float(facts(ring)["thickness"]) < 0.05
    full = facts(np.full((128, 128, 4), 255, np.uint8))
    assert full["thickness"] == pytest.approx(127 / focal_px(CAMERA), rel=0.02)


def test_an_empty_picture_measures_zero_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = facts(np.zeros((128, 128, 4), np.uint8))
    assert set(found.values()) == {0}


def record_of(*pictures: NDArray[np.uint8], scene: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    return measure_sample([facts(picture) | extra for picture in pictures], scene or {})


def test_a_record_holds_the_scene_the_figures_and_every_column_of_the_views() -> None:
    card = [SOLID, box(slice(34, 94), slice(60, 61)), SOLID]
    record = record_of(*card, scene={"num_triangles": 12, "pose": "rest"}, cropped=0.25, samples=16, psnr=41.5)
    assert record["pose"] == "rest"
    assert record["mean_cropped"] == 0.25
    assert record["views"]["samples"] == [16, 16, 16]
    assert record["views"]["psnr"] == [41.5] * 3
    assert record["thickness_min"] == facts(card[1])["thickness"]
    assert record["thickness_median"] == facts(SOLID)["thickness"]
    assert record["border_touch_share"] == 0
    assert "mean_cropped" not in record_of(SOLID)


GOOD_SCENE = {
    "untextured": False,
    "transparent": False,
    "num_triangles": 90,
    "num_triangles_file": 100,
    "stray": {"num_triangles": 10},
}


def patterned() -> NDArray[np.uint8]:
    picture = SOLID.copy()
    picture[34:64, 34:94, :3] = (220, 40, 40)
    return picture


CUT = box(slice(0, 60), slice(34, 94))
CUT[:30, 34:94, :3] = (220, 40, 40)
WHITE = patterned()
WHITE[34:42, 34:94] = 255


@pytest.mark.parametrize(
    ("flag", "pictures", "scene"),
    [
        ("blank", [patterned(), np.zeros_like(SOLID)], {}),
        ("single_colour", [SOLID, SOLID], {}),
        ("touches_border", [CUT, CUT], {}),
        ("thin", [patterned(), patterned() * (np.abs(np.arange(128) - 64) < 1)[None, :, None].astype(np.uint8)], {}),
        ("over_exposed", [WHITE, WHITE], {}),
        ("untextured", [patterned()], {"untextured": True}),
        ("transparent", [patterned()], {"transparent": True}),
        ("partial_import", [patterned()], {"num_triangles": 89}),
    ],
)
def test_each_flag_says_what_it_is_named_for(
    flag: str, pictures: list[NDArray[np.uint8]], scene: dict[str, Any]
) -> None:
    assert record_of(patterned(), patterned(), scene=GOOD_SCENE)["flags"] == []
    flags = record_of(*pictures, scene=GOOD_SCENE | scene)["flags"]
    assert flag in flags
    assert set(flags) - {flag} <= ({"thin"} if flag == "blank" else set())
    assert set(flags) <= set(FLAGS)


def test_one_colour_is_judged_by_the_albedo_where_there_is_one() -> None:
    """Shading spreads a plain colour, and a plain light hides nothing of a pattern: only the albedo tells."""
    data = np.stack([SOLID[::2, ::2]] * 4)
    shaded = measure_sample([facts(patterned())], {}, side_facts(data))
    assert shaded["albedo_spread"] == 0
    assert shaded["colour_spread"] > 0.1
    assert shaded["flags"] == ["single_colour"]
    assert shaded["phash"] == perceptual_hash(data)
    assert (
        "single_colour"
        not in measure_sample([facts(SOLID)], {}, side_facts(np.stack([patterned()[::2, ::2]] * 4)))["flags"]
    )


BASE: dict[str, Any] = record_of(patterned(), patterned(), scene=GOOD_SCENE, cropped=0.0)


def test_lenient_rules_admit_all_that_is_not_blank() -> None:
    worst = BASE | {
        "mean_cropped": 1.0, "border_touch_share": 1.0, "mean_clipped": 1.0, "thickness_min": 0.0,
        "thickness_median": 0.0, "flags": list(FLAGS),
    }  # fmt: skip
    assert judge(worst, AdmissionSpec()) is None
    assert judge({"mean_alpha_coverage": 0.5}, AdmissionSpec(max_cropped=0, admit_untextured=False)) is None


LIMITS = [
    ("max_cropped", 0.1, "mean_cropped", 0.1, 0.11, FailureKind.CROPPED),
    ("max_border_touch", 0.25, "border_touch_share", 0.25, 0.5, FailureKind.CROPPED),
    ("max_clipped", 0.02, "mean_clipped", 0.02, 0.0205, FailureKind.OVER_EXPOSED),
    ("min_thickness", 0.03, "thickness_min", 0.03, 0.0296, FailureKind.THIN),
    ("min_median_thickness", 0.03, "thickness_median", 0.03, 0.0, FailureKind.THIN),
    ("min_alpha_coverage", 0.01, "mean_alpha_coverage", 0.01, 0.001, FailureKind.BLANK_IMAGE),
]


@pytest.mark.parametrize(("key", "allowed", "figure", "good", "bad", "kind"), LIMITS)
def test_a_limit_admits_what_reaches_it_and_refuses_what_breaks_it(
    key: str, allowed: float, figure: str, good: float, bad: float, kind: FailureKind
) -> None:
    rules = AdmissionSpec.model_validate({key: allowed})
    assert judge(BASE | {figure: good}, rules) is None
    refusal = judge(BASE | {figure: bad}, rules)
    assert refusal is not None
    assert refusal.kind is kind
    assert not kind.retryable
    assert f"admission.{key}" in refusal.message
    assert f"{allowed:g}" in refusal.message
    assert (f"{bad:.2e}" if kind is FailureKind.BLANK_IMAGE else f"{bad:.4g}") in refusal.message
    assert "\n" not in refusal.message


SWITCHES = [
    ("admit_single_colour", "single_colour", FailureKind.SINGLE_COLOUR),
    ("admit_untextured", "untextured", FailureKind.UNTEXTURED),
    ("admit_transparent", "transparent", FailureKind.TRANSPARENT),
]


@pytest.mark.parametrize(("key", "flag", "kind"), SWITCHES)
def test_a_switch_refuses_its_flag_only(key: str, flag: str, kind: FailureKind) -> None:
    rules = AdmissionSpec.model_validate({key: False})
    assert judge(BASE | {"flags": [other for other in FLAGS if other != flag]}, rules) is None
    refusal = judge(BASE | {"flags": [flag]}, rules)
    assert refusal is not None
    assert refusal.kind is kind
    assert f"admission.{key}" in refusal.message


def test_every_rule_on_pictures_in_the_spec_is_one_of_these() -> None:
    before_pictures = {"licenses", "max_asset_bytes", "max_triangles", "min_triangle_share"}
    on_captures = {
        "min_frames", "min_registered_share", "max_reprojection_px", "min_sweep_deg", "min_mask_agreement",
        "max_cut_off",
    }  # fmt: skip
    tested = {limit[0] for limit in LIMITS} | {switch[0] for switch in SWITCHES}
    assert set(AdmissionSpec.model_fields) - before_pictures - on_captures == tested | {"duplicate_distance"}


def test_black_pictures_are_blank_and_empty_views_are_no_evidence_of_black() -> None:
    black = box(slice(34, 94), slice(34, 94), (0, 0, 0))
    refusal = judge(record_of(black, np.zeros_like(black)), AdmissionSpec())
    assert refusal is not None
    assert refusal.kind is FailureKind.BLANK_IMAGE
    assert "black in every picture" in refusal.message
    assert judge(record_of(black, patterned()), AdmissionSpec()) is None


def test_wholly_empty_pictures_are_judged_even_where_they_are_allowed() -> None:
    empty = record_of(np.zeros_like(SOLID))
    assert judge(empty, AdmissionSpec(min_alpha_coverage=0)) is None
    assert judge(empty, AdmissionSpec()) is not None
