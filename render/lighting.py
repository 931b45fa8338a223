"""Lights of a sample: a pure function of (recipe, seed), recorded in the sample.

All light comes from the world: an even environment, and soft boxes at infinity, each a lobe around its direction,

    radiance(d) = environment + sum over lights of irradiance_over_pi * (p + 2) / 2 * max(0, d . direction)^p * color

in units of a white diffuse surface: under an environment of 1 it has radiance 1, and one that faces a light gains its
`irradiance_over_pi`, whatever the exponent p. A key with p = 8 is half as bright 24 degrees off its middle, a fill with
p = 4 at 33. On average over a ball a light adds irradiance_over_pi * (p + 2) / (p + 1) / 4.

    recipe    environment   lights                                         average       at most
    ambient   1.00          none                                           1.00          1.00
    studio    0.48 to 0.56  key 0.48 to 0.60 from above, fill 0.22 to      0.68 to 0.82  1.48
                            0.32 from about the opposite side
    random    the rest      1 to 3, in all 0.40 to 0.82, from any side     0.74 to 0.82  1.43
                            but far below, p from 4 to 16

The averages put an 18 % grey ball at 103 to 118 of 255 in sRGB, mid-scale, on average over the seeds. White is the
price: untextured white is the most frequent material of all, and a directed light that is bright enough to model a form
burns out the part that faces it. On a ball of albedo 0.9 no more than `MAX_CLIPPED_SHARE` of the visible pixels may,
averaged over the seeds. But `ambient` alone leaves a white object without an edge against a white background, and
shades by occlusion only: it is for pictures close to albedo and for comparisons, not for a corpus.

`random` tints each light a little along the line from warm to cool, as mixed light does, at unchanged luminance: at
most 10 % in red and blue, at even odds, so that colours are true on average. The environment stays white.

Lobes and not lamps, because of noise. A lobe is met by the surface's own reflected rays: no light to choose, no shadow
ray to pay, and no small bright disc for a rough metal to hit by chance. At 16 samples a pixel, denoised, on white after
2 x 2 averaging: a brushed metal statue 36 dB under suns of 6 and 25 degrees, 44 to 45 under suns of 30 to 80, 46 under
these lobes; a matt tree 48, 48 and 46; a sample costs 15 to 20 % less. Importance maps of the world cost 30 % a sample
and bring 0 to 1.5 dB.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.types import derive_seed
from render.versions import node_tree

MAX_CLIPPED_SHARE = 0.05
"""Share of visible pixels that may burn out on a ball of albedo 0.9: the mean over seeds, under any recipe."""

RANDOM_AVERAGE, RANDOM_LIGHT, RANDOM_TINT = (0.74, 0.82), (0.40, 0.58), 0.10
"""Ranges of `random`: average radiance of a white ball, strength of a single light, and the largest tint of a light."""

KEY_EXPONENT, FILL_EXPONENT, RANDOM_EXPONENTS = 8.0, 4.0, (4.0, 16.0)
"""Exponents of lobes: the greater, the narrower the light and the harder its shadows."""

_FURTHER_LIGHT = 0.2  # each one more adds this share to the sum, since lights from several sides flatten each other

_LOWEST_RANDOM_LIGHT = -0.25  # sine of the elevation; objects stand on grounds that little light comes through
_LUMINANCE = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709


def set_lights(recipe: str, seed: int) -> dict[str, Any]:
    """Light the current scene by a recipe and return the JSON record of what was set."""
    record = draw_lights(recipe, seed)
    _set_world(record)
    return record


def draw_lights(recipe: str, seed: int) -> dict[str, Any]:
    """Return the JSON record of a recipe's lights: `environment` is its radiance, `lights` are as `_light` says."""
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
    environment = rng.uniform(0.48, 0.56)
    key = _light("key", azimuth, math.radians(rng.uniform(30, 60)), rng.uniform(0.48, 0.60), KEY_EXPONENT)
    opposite = azimuth + math.pi + rng.uniform(-0.9, 0.9)
    fill = _light("fill", opposite, math.radians(rng.uniform(15, 45)), rng.uniform(0.22, 0.32), FILL_EXPONENT)
    return _record("studio", environment, [key, fill])


def _random(rng: np.random.Generator) -> dict[str, Any]:
    """One to three lights, uniform by area over the sphere but its lowest part, none much weaker than the others."""
    num_lights = int(rng.integers(1, 4))
    average = rng.uniform(*RANDOM_AVERAGE)
    total = rng.uniform(*RANDOM_LIGHT) * (1 + _FURTHER_LIGHT * (num_lights - 1))
    shares = rng.uniform(0.4, 1.0, num_lights)
    lights = [
        _light(
            f"light {i}",
            rng.uniform(0, 2 * math.pi),
            math.asin(rng.uniform(_LOWEST_RANDOM_LIGHT, 1.0)),
            total * share,
            round(rng.uniform(*RANDOM_EXPONENTS), 3),
            warmth=rng.uniform(-RANDOM_TINT, RANDOM_TINT),
        )
        for i, share in enumerate(shares / shares.sum())
    ]
    return _record("random", average - sum(map(mean_over_ball, lights)), lights)


def mean_over_ball(light: dict[str, Any]) -> float:
    """Return what a light adds to the radiance of a white ball on average over its surface."""
    exponent = float(light["exponent"])
    return float(light["irradiance_over_pi"]) * (exponent + 2) / (exponent + 1) / 4


def _record(recipe: str, environment: float, lights: list[dict[str, Any]]) -> dict[str, Any]:
    return {"recipe": recipe, "environment": round(float(environment), 6), "lights": lights}


def _light(
    name: str, azimuth: float, elevation: float, radiance: float, exponent: float, *, warmth: float = 0.0
) -> dict[str, Any]:
    """Return a light's record.

    `direction` points from the object to the light, `irradiance_over_pi` is the radiance of a white surface that faces
    it, `exponent` the p of its lobe, and `color` its linear RGB at a luminance of 1: red is brighter by `warmth`, blue
    darker.
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
        "exponent": float(exponent),
        "color": [round(float(x), 6) for x in color],
    }


def _set_world(record: dict[str, Any]) -> None:
    """Make a world of the record's environment and lobes."""
    import bpy

    world = bpy.data.worlds.new("lrm environment")
    tree = node_tree(world)
    background = next(node for node in tree.nodes if node.type == "BACKGROUND")
    background.inputs["Color"].default_value = (*[record["environment"]] * 3, 1.0)
    background.inputs["Strength"].default_value = 1.0
    sum_so_far = None
    direction = tree.nodes.new("ShaderNodeTexCoord").outputs["Generated"]  # in a world's shader, where the ray goes
    for light in record["lights"]:
        sum_so_far = _add_lobe(tree, direction, light, record["environment"] if sum_so_far is None else sum_so_far)
    if sum_so_far is not None:
        tree.links.new(sum_so_far, background.inputs["Color"])
    bpy.context.scene.world = world


def _add_lobe(tree: Any, direction: Any, light: dict[str, Any], before: Any) -> Any:
    """Return the socket of `before`, a socket or the environment's radiance, plus a light's lobe."""
    cosine = tree.nodes.new("ShaderNodeVectorMath")
    cosine.operation = "DOT_PRODUCT"
    tree.links.new(direction, cosine.inputs[0])
    cosine.inputs[1].default_value = light["direction"]
    facing, power = tree.nodes.new("ShaderNodeMath"), tree.nodes.new("ShaderNodeMath")
    facing.operation, power.operation = "MAXIMUM", "POWER"
    tree.links.new(cosine.outputs["Value"], facing.inputs[0])
    facing.inputs[1].default_value = 0.0
    tree.links.new(facing.outputs[0], power.inputs[0])
    power.inputs[1].default_value = light["exponent"]
    add = tree.nodes.new("ShaderNodeVectorMath")
    add.operation = "MULTIPLY_ADD"
    tree.links.new(power.outputs[0], add.inputs[0])
    peak = light["irradiance_over_pi"] * (light["exponent"] + 2) / 2
    add.inputs[1].default_value = [peak * channel for channel in light["color"]]
    if isinstance(before, float):
        add.inputs[2].default_value = [before] * 3
    else:
        tree.links.new(before, add.inputs[2])
    return add.outputs[0]


def show_white_behind() -> None:
    """Show white to the camera where nothing is hit, also through glass; what lights the object stays as it is."""
    import bpy

    tree = bpy.context.scene.world.node_tree
    lit = next(node for node in tree.nodes if node.type == "BACKGROUND")
    output = next(node for node in tree.nodes if node.type == "OUTPUT_WORLD")
    path, seen = tree.nodes.new("ShaderNodeLightPath"), tree.nodes.new("ShaderNodeMath")
    seen.operation = "MAXIMUM"
    tree.links.new(path.outputs["Is Camera Ray"], seen.inputs[0])
    tree.links.new(path.outputs["Is Transmission Ray"], seen.inputs[1])
    white, mix = tree.nodes.new("ShaderNodeBackground"), tree.nodes.new("ShaderNodeMixShader")
    white.inputs["Color"].default_value = (1.0, 1.0, 1.0, 1.0)
    white.inputs["Strength"].default_value = 1.0
    tree.links.new(seen.outputs[0], mix.inputs[0])
    tree.links.new(lit.outputs[0], mix.inputs[1])
    tree.links.new(white.outputs[0], mix.inputs[2])
    tree.links.new(mix.outputs[0], output.inputs["Surface"])
