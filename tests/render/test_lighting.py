"""Lights: what each recipe draws, and by rendered balls that Blender does what the record says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sample import decode_rgba
from pipeline.spec import RenderSpec
from pipeline.types import Sample
from render.cameras import cameras_for
from render.lighting import MAX_CLIPPED_SHARE, draw_lights, mean_over_ball
from render.worker import RenderWorker
from tests.render.conftest import asset_of, make_spec
from tests.render.files import ball, write_obj

RECIPES = ("ambient", "studio", "random")
MID_SCALE = (103, 128)
NUM_UIDS = 10

seeds = st.integers(0, 2**63 - 1)


def to_linear(image: np.ndarray) -> np.ndarray:
    """Undo sRGB's curve: 8-bit to [0, 1]."""
    x = image / 255
    linear: np.ndarray = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return linear


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Apply sRGB's curve: [0, 1] to 8 bit, unrounded."""
    x = np.clip(linear, 0, 1)
    image: np.ndarray = 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    return image


def sphere(count: int) -> np.ndarray:
    """Directions [N, 3] spread evenly over the sphere (Fibonacci's spiral)."""
    i = np.arange(count) + 0.5
    z, azimuth = 1 - 2 * i / count, math.pi * (1 + math.sqrt(5)) * i
    planar = np.sqrt(1 - z * z)
    return np.stack([planar * np.cos(azimuth), planar * np.sin(azimuth), z], axis=1)


SKY = sphere(3000)


def radiance(lights: dict[str, Any], normals: np.ndarray) -> np.ndarray:
    """Radiance [N, 3] of a white convex surface with these normals [N, 3]: Lambert's law, summed over the sky."""
    total = np.full((len(normals), 3), lights["environment"])
    cosines = np.maximum(normals @ SKY.T, 0) * (4 * math.pi / len(SKY)) / math.pi
    for light in lights["lights"]:
        lobe = np.maximum(SKY @ np.array(light["direction"]), 0) ** light["exponent"]
        peak = light["irradiance_over_pi"] * (light["exponent"] + 2) / 2
        total += (cosines @ lobe)[:, None] * peak * np.array(light["color"])
    return total


# What is drawn


@pytest.mark.parametrize("recipe", RECIPES)
@given(seed=seeds)
def test_a_record_is_plain_json_and_a_pure_function_of_the_seed(recipe: str, seed: int) -> None:
    record = draw_lights(recipe, seed)
    assert json.loads(json.dumps(record, allow_nan=False)) == record == draw_lights(recipe, seed)
    assert record["recipe"] == recipe
    for light in record["lights"]:
        assert np.linalg.norm(light["direction"]) == pytest.approx(1, abs=1e-5)
        assert np.dot(light["color"], [0.2126, 0.7152, 0.0722]) == pytest.approx(1, abs=1e-5)
        assert 4 <= light["exponent"] <= 16


def test_every_recipe_of_the_spec_is_drawn_and_no_other() -> None:
    field = RenderSpec.model_fields["lighting"]
    assert set(RECIPES) == set(field.annotation.__args__)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="'dusk' is not"):
        draw_lights("dusk", 0)


@pytest.mark.parametrize("recipe", ["studio", "random"])
def test_seeds_differ_and_zero_is_a_seed(recipe: str) -> None:
    assert len({json.dumps(draw_lights(recipe, seed)) for seed in range(20)}) == 20


@given(seeds)
def test_ambient_is_a_white_world_of_strength_one(seed: int) -> None:
    assert draw_lights("ambient", seed) == {"recipe": "ambient", "environment": 1.0, "lights": []}


@given(seeds)
def test_studio_has_a_key_from_above_and_a_weaker_fill_from_the_other_side(seed: int) -> None:
    key, fill = draw_lights("studio", seed)["lights"]
    assert (key["name"], fill["name"]) == ("key", "fill")
    assert 0.5 - 1e-6 <= key["direction"][2] <= 0.8661
    assert 0 < fill["direction"][2] <= 0.7072
    assert fill["irradiance_over_pi"] < 0.7 * key["irradiance_over_pi"]
    assert np.dot(key["direction"][:2], fill["direction"][:2]) < 0
    assert key["color"] == fill["color"] == [1, 1, 1]


@given(seeds)
def test_random_is_bounded_in_total_and_tint(seed: int) -> None:
    record = draw_lights("random", seed)
    strengths = [light["irradiance_over_pi"] for light in record["lights"]]
    assert 1 <= len(strengths) <= 3
    assert min(strengths) >= 0.4 * max(strengths) - 1e-5
    assert record["environment"] + sum(strengths) <= 1.43
    assert 0.74 - 1e-5 <= record["environment"] + sum(map(mean_over_ball, record["lights"])) <= 0.82 + 1e-5
    for light in record["lights"]:
        red, green, blue = light["color"]
        assert red / green + blue / green == pytest.approx(2, abs=1e-5)
        assert abs(red / green - 1) <= 0.1 + 1e-5


def test_random_comes_from_any_side_but_far_below_and_is_white_on_average() -> None:
    records = [draw_lights("random", seed) for seed in range(3000)]
    counts = np.bincount([len(record["lights"]) for record in records], minlength=4)
    assert np.abs(counts[1:] / 1000 - 1).max() < 0.1
    directions = np.array([light["direction"] for record in records for light in record["lights"]])
    histogram, _ = np.histogram(directions[:, 2], bins=5, range=(-0.25, 1))
    assert histogram.sum() == len(directions)
    assert np.abs(histogram / (len(directions) / 5) - 1).max() < 0.1
    histogram, _ = np.histogram(np.arctan2(directions[:, 1], directions[:, 0]), bins=8, range=(-math.pi, math.pi))
    assert np.abs(histogram / (len(directions) / 8) - 1).max() < 0.15
    colours = np.array([light["color"] for record in records for light in record["lights"]])
    np.testing.assert_allclose(colours.mean(axis=0), 1, atol=0.005)


@pytest.mark.parametrize("recipe", RECIPES)
def test_over_many_seeds_grey_is_mid_scale_and_white_does_not_burn_out(recipe: str) -> None:
    """By Lambert's law, over the part of a ball that the cameras of `lrm` see; that renders agree is tested below."""
    normals = np.random.default_rng(0).normal(size=(600, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    grey, clipped = [], []
    for seed in range(400):
        light = radiance(draw_lights(recipe, seed), normals)
        centres = np.array([c.world_from_camera[:3, 3] for c in cameras_for(RenderSpec(num_views=4), seed)])
        distance = np.linalg.norm(centres, axis=1)
        facing = normals @ (centres / distance[:, None]).T
        weight = np.where(facing > 1 / distance, facing, 0)
        weight /= weight.sum(axis=0)
        grey.append((to_srgb(0.18 * light).mean(axis=1) @ weight).mean())
        clipped.append(((to_srgb(0.9 * light) >= 254.5).all(axis=1) @ weight).mean())
    assert MID_SCALE[0] <= np.mean(grey) <= MID_SCALE[1]
    assert min(grey) > 90
    assert max(grey) < 130
    assert np.mean(clipped) <= MAX_CLIPPED_SHARE


# What is rendered


class Balls:
    """Renders balls of one albedo in one Blender; they fill the box, so that world normals are world points."""

    def __init__(self, worker: RenderWorker, folder: Path) -> None:
        self._worker, self._folder = worker, folder

    def render(self, albedo: float, uid: str) -> Sample:
        path = self._folder / f"ball-{albedo}.obj"
        if not path.exists():
            vertices, triangles = ball()
            write_obj(path, [(vertices, triangles, (albedo,) * 3)], smooth=True)
        return self._worker.render(asset_of(path, uid), path)


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def balls(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balls]:
    folder = tmp_path_factory.mktemp("balls")
    spec = make_spec(render={"num_views": 4, "resolution_px": 40, "samples": 128, "lighting": recipe})
    with RenderWorker(spec, fingerprint="f", num_threads=2, scratch_dir=folder) as worker:
        yield Balls(worker, folder)


def visible(sample: Sample) -> np.ndarray:
    """The colours [N, 3] of all pixels that the object fills."""
    images = [decode_rgba(view.planes["rgba"].data) for view in sample.views]
    return np.concatenate([image[image[..., 3] == 255][:, :3] for image in images])


@pytest.mark.blender
@pytest.mark.timeout(240)
def test_31_by_renders_grey_is_mid_scale_and_white_does_not_burn_out(recipe: str, balls: Balls) -> None:
    uids = [f"uid{i}" for i in range(NUM_UIDS if recipe != "ambient" else 2)]
    grey = [visible(balls.render(0.18, uid)) for uid in uids]
    assert MID_SCALE[0] <= np.mean([pixels.mean() for pixels in grey]) <= MID_SCALE[1]
    if recipe != "ambient":
        assert np.mean([pixels.std() for pixels in grey]) > 6, "the light has no direction"
    white = [visible(balls.render(0.9, uid)) for uid in uids]
    assert np.mean([(pixels == 255).all(axis=1).mean() for pixels in white]) <= MAX_CLIPPED_SHARE


@pytest.mark.blender
@pytest.mark.timeout(240)
def test_36_a_white_object_keeps_its_form_but_under_ambient(recipe: str, balls: Balls) -> None:
    white = visible(balls.render(0.9, "one"))
    assert len(white) > 500, "its outline is in the alpha, whatever the light"
    if recipe == "ambient":
        assert np.percentile(white, 5) > 240, "against white there is no edge to see"
    else:
        assert np.percentile(white, 5) < 215
        assert white.std() > 10
    assert RenderSpec().lighting != "ambient"


@pytest.mark.blender
@pytest.mark.timeout(240)
@pytest.mark.parametrize("uid", ["one", "two", "three", "four"])
def test_30_each_light_shines_from_where_the_record_says(recipe: str, balls: Balls, uid: str) -> None:
    sample = balls.render(0.5, uid)
    normals, colours = seen_normals(sample)
    lights = json.loads(json.dumps(dict(sample.lights)))
    error = np.abs(to_linear(colours) / 0.5 - radiance(lights, normals)).mean()
    assert error < 0.012, "Blender does not show what Lambert's law says of the record"
    for light in lights["lights"]:
        direction = np.array(light["direction"])
        for wrong in (-direction, direction * [-1, -1, 1], direction[[1, 0, 2]], direction * [1, 1, -1]):
            if np.dot(wrong, direction) > 0.95:
                continue  # nearly its own mirror image
            light["direction"] = wrong.tolist()
            assert np.abs(to_linear(colours) / 0.5 - radiance(lights, normals)).mean() > 3 * error
        light["direction"] = direction.tolist()


def seen_normals(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The normals [N, 3] and colours [N, 3] of the pixels of a unit ball at the origin, its rim left out."""
    normals, colours = [], []
    for view in sample.views:
        camera, image = view.camera, decode_rgba(view.planes["rgba"].data)
        grid = np.arange(camera.width) + 0.5
        pixels = np.stack([*np.meshgrid(grid, grid), np.ones((camera.width, camera.width))], axis=-1)
        rays = pixels @ np.linalg.inv(camera.intrinsics).T @ camera.world_from_camera[:3, :3].T
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        centre = camera.world_from_camera[:3, 3]
        along = rays @ centre
        inside = along**2 - centre @ centre + 1
        points = centre + rays * (-along - np.sqrt(np.maximum(inside, 0)))[..., None]
        keep = (inside > 0.1) & (image[..., 3] == 255)
        normals.append(points[keep])
        colours.append(image[keep][:, :3])
    return np.concatenate(normals), np.concatenate(colours)
