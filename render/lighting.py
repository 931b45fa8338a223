"""Lights of a sample: a pure function of (recipe, seed), recorded in the sample.

Radiances are in units of a white diffuse surface: under a uniform environment of strength 1 such a surface has
radiance 1. A sun of irradiance E on a surface that faces it adds E / pi, and a quarter of that on average over a
sphere. What a recipe shows on average is therefore environment + (sum of suns) / 4, and at most environment + (sum of
suns), where all of them are square to one surface.

    recipe    environment   suns                                          average       at most
    ambient   1.00          none                                          1.00          1.00
    studio    0.50 to 0.58  key 0.48 to 0.60 from above, fill 0.22 to     0.68 to 0.81  1.50
                            0.32 from about the opposite side
    random    0.53 to 0.72  1 to 3, in all 0.40 to 0.82, from any side    0.74 to 0.82  1.43
                            but far below

The averages put an 18 % grey ball at 104 to 118 of 255 in sRGB, mid-scale, on average over the seeds. White is the
price: untextured white is the most frequent material of all, and a directed light that is bright enough to model a form
burns out the part that faces it. On a ball of albedo 0.9 no more than `MAX_CLIPPED_SHARE` of the visible pixels may,
averaged over the seeds; 2.3 % do under `studio`, 3.8 % under `random`, none under `ambient`. But `ambient` alone leaves
a white object without an edge against a white background, and shades by occlusion only: it is for pictures close to
albedo and for comparisons, not for a corpus.

`random` tints each sun a little along the line from warm to cool, as mixed light does, at unchanged luminance: at most
10 % in red and blue, at even odds, so that colours are true on average. The environment stays white.

All lights but the environment are suns: a sun has no falloff, no place and no mesh, and everything in the box gets what
the record says. Noise decides it too. At 16 samples without denoising, on two procedural objects, as variance in 1e-4
of white squared and as PSNR on white: `ambient` 10.3, 33.2 dB; `studio` 6.8, 34.2 dB; `random` 5.1, 6.3, 6.1 with one,
two, three suns, 34.4 to 34.2 dB. It is the environment that is noisy, since it is found by chance, and a sun is aimed
at; the width of a sun hardly counts (1 degree 4.6, 40 degrees 5.1). Not taken: soft lobes painted on the environment in
place of the weaker suns, 5.4 to 8.4; a light tree, which takes 10 to 18 % off the variance where there are two suns or
more and costs 10 to 20 % more time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.types import Float64, derive_seed
from render.versions import node_tree

MAX_CLIPPED_SHARE = 0.05
"""Share of visible pixels that may burn out on a ball of albedo 0.9: the mean over seeds, under any recipe."""

RANDOM_AVERAGE, RANDOM_SUNS, RANDOM_TINT = (0.74, 0.82), (0.40, 0.58), 0.10
"""Ranges of `random`: average radiance of a white ball, strength of a single sun, and the largest tint of a sun."""

_FURTHER_SUN = 0.2  # each sun more adds this share to the sum, since suns from several sides flatten each other's form

_LOWEST_RANDOM_SUN = -0.25  # sine of the elevation; objects stand on grounds that little light comes through
_LUMINANCE = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709


def set_lights(recipe: str, seed: int) -> dict[str, Any]:
    """Light the current scene by a recipe and return the JSON record of what was set."""
    record = draw_lights(recipe, seed)
    _set_environment(record["environment"])
    for i, sun in enumerate(record["suns"]):
        _add_sun(f"lrm sun {i}", sun)
    return record


def draw_lights(recipe: str, seed: int) -> dict[str, Any]:
    """Return the JSON record of a recipe's lights: `environment` is its strength, `suns` are as `_sun` says."""
    rng = np.random.default_rng(derive_seed("lights", seed))
    if recipe == "ambient":
        return _record(recipe, 1.0, [])
    if recipe == "studio":
        return _studio(rng)
    if recipe == "random":
        return _random(rng)
    raise ValueError(f"lighting {recipe!r} is not 'studio', 'ambient' or 'random'")


def _studio(rng: np.random.Generator) -> dict[str, Any]:
    """Environment, key from above at any azimuth, softer fill from another side."""
    azimuth = rng.uniform(0, 2 * math.pi)
    environment = rng.uniform(0.50, 0.58)
    key = _sun("key", azimuth, math.radians(rng.uniform(30, 60)), rng.uniform(0.48, 0.60), angle_deg=6.0)
    opposite = azimuth + math.pi + rng.uniform(-0.9, 0.9)
    fill = _sun("fill", opposite, math.radians(rng.uniform(15, 45)), rng.uniform(0.22, 0.32), angle_deg=25.0)
    return _record("studio", environment, [key, fill])


def _random(rng: np.random.Generator) -> dict[str, Any]:
    """One to three suns, uniform by area over the sphere but its lowest part, none much weaker than the others."""
    num_suns = int(rng.integers(1, 4))
    average = rng.uniform(*RANDOM_AVERAGE)
    total = rng.uniform(*RANDOM_SUNS) * (1 + _FURTHER_SUN * (num_suns - 1))
    shares = rng.uniform(0.4, 1.0, num_suns)
    suns = [
        _sun(
            f"light {i}",
            rng.uniform(0, 2 * math.pi),
            math.asin(rng.uniform(_LOWEST_RANDOM_SUN, 1.0)),
            total * share,
            angle_deg=round(rng.uniform(2.0, 12.0), 3),
            warmth=rng.uniform(-RANDOM_TINT, RANDOM_TINT),
        )
        for i, share in enumerate(shares / shares.sum())
    ]
    return _record("random", average - total / 4, suns)


def _record(recipe: str, environment: float, suns: list[dict[str, Any]]) -> dict[str, Any]:
    return {"recipe": recipe, "environment": round(float(environment), 6), "suns": suns}


def _sun(
    name: str, azimuth: float, elevation: float, radiance: float, *, angle_deg: float, warmth: float = 0.0
) -> dict[str, Any]:
    """Return a sun's record.

    `direction` points from the object to the light, `irradiance_over_pi` is the radiance of a white surface that faces
    it, `angle_deg` its apparent diameter, and `color` its linear RGB at a luminance of 1: red is brighter by `warmth`,
    blue darker.
    """
    direction = [
        math.cos(elevation) * math.cos(azimuth),
        math.cos(elevation) * math.sin(azimuth),
        math.sin(elevation),
    ]
    color = np.array([1 + warmth, 1.0, 1 - warmth])
    color /= color @ _LUMINANCE
    return {
        "name": name,
        "direction": [round(float(x), 6) for x in direction],
        "irradiance_over_pi": round(float(radiance), 6),
        "angle_deg": float(angle_deg),
        "color": [round(float(x), 6) for x in color],
    }


def _set_environment(strength: float) -> None:
    import bpy

    world = bpy.data.worlds.new("lrm environment")
    background = next(node for node in node_tree(world).nodes if node.type == "BACKGROUND")
    background.inputs["Color"].default_value = (1.0, 1.0, 1.0, 1.0)
    background.inputs["Strength"].default_value = strength
    bpy.context.scene.world = world


def show_white_behind() -> None:
    """Show white to the camera where nothing is hit, also through glass; what lights the object stays as it is."""
    import bpy

    tree = bpy.context.scene.world.node_tree
    background = next(node for node in tree.nodes if node.type == "BACKGROUND")
    path = tree.nodes.new("ShaderNodeLightPath")
    seen = tree.nodes.new("ShaderNodeMath")
    seen.operation = "MAXIMUM"
    strength = tree.nodes.new("ShaderNodeMix")
    strength.data_type = "FLOAT"
    tree.links.new(path.outputs["Is Camera Ray"], seen.inputs[0])
    tree.links.new(path.outputs["Is Transmission Ray"], seen.inputs[1])
    tree.links.new(seen.outputs[0], strength.inputs["Factor"])
    strength.inputs["A"].default_value = background.inputs["Strength"].default_value
    strength.inputs["B"].default_value = 1.0
    tree.links.new(strength.outputs["Result"], background.inputs["Strength"])


def _add_sun(name: str, record: dict[str, Any]) -> None:
    import bpy
    from mathutils import Matrix

    light = bpy.data.lights.new(name, "SUN")
    light.energy = record["irradiance_over_pi"] * math.pi
    light.color = record["color"]
    light.angle = math.radians(record["angle_deg"])
    obj = bpy.data.objects.new(name, light)
    bpy.context.scene.collection.objects.link(obj)
    # A light shines along its own -z, so its +z must point from the object to the light.
    obj.matrix_world = Matrix(_frame_with_z(np.array(record["direction"])))


def _frame_with_z(direction: Float64) -> Float64:
    z = direction / np.linalg.norm(direction)
    x = np.cross([0.0, 0.0, 1.0], z)
    x = np.array([1.0, 0.0, 0.0]) if np.linalg.norm(x) < 1e-9 else x / np.linalg.norm(x)
    frame = np.eye(4)
    frame[:3, :3] = np.stack([x, np.cross(z, x), z], axis=1)
    return frame
