"""Lights of a sample: a pure function of (recipe, seed), recorded in the sample.

Radiances are in units of a white diffuse surface: under a uniform environment of strength 1 such a surface has
radiance 1. A sun of irradiance E on a surface that faces it adds E / pi, and a quarter of that on average over a
sphere. `studio` therefore draws environment + (key + fill) / 4 near 0.75, so that an 18 % grey ball lands mid-scale
(sRGB near 103 of 255), while a white surface square to the key stays near 1.1, and hardly clips: untextured white is
the most frequent material of all. A uniform environment alone (`ambient`) leaves a white object without an edge.
"""

from __future__ import annotations

import math
from typing import Any

import bpy
import numpy as np
from mathutils import Matrix

from pipeline.types import Float64, derive_seed
from render.versions import node_tree


def set_lights(recipe: str, seed: int) -> dict[str, Any]:
    """Light the current scene by a recipe ("studio" or "ambient") and return the JSON record of what was set."""
    if recipe == "ambient":
        record: dict[str, Any] = {"recipe": recipe, "environment": 1.0, "suns": []}
    elif recipe == "studio":
        record = studio(seed)
    else:
        raise ValueError(f"lighting {recipe!r} is not 'studio' or 'ambient'")
    _set_environment(record["environment"])
    for i, sun in enumerate(record["suns"]):
        _add_sun(f"lrm sun {i}", sun)
    return record


def studio(seed: int) -> dict[str, Any]:
    """Draw the record of a studio: environment, key from above at any azimuth, softer fill from another side."""
    rng = np.random.default_rng(derive_seed("lights", seed))
    azimuth = rng.uniform(0, 2 * math.pi)
    environment = rng.uniform(0.50, 0.58)
    key = _sun("key", azimuth, rng.uniform(30, 60), rng.uniform(0.50, 0.65), angle_deg=6.0)
    opposite = azimuth + math.pi + rng.uniform(-0.9, 0.9)
    fill = _sun("fill", opposite, rng.uniform(15, 45), rng.uniform(0.12, 0.22), angle_deg=25.0)
    return {"recipe": "studio", "environment": round(float(environment), 6), "suns": [key, fill]}


def _sun(name: str, azimuth: float, elevation_deg: float, radiance: float, angle_deg: float) -> dict[str, Any]:
    """Return a sun's record: `direction` points from the object to the light, `irradiance` is in units of pi."""
    elevation = math.radians(elevation_deg)
    direction = [
        math.cos(elevation) * math.cos(azimuth),
        math.cos(elevation) * math.sin(azimuth),
        math.sin(elevation),
    ]
    return {
        "name": name,
        "direction": [round(float(x), 6) for x in direction],
        "irradiance_over_pi": round(float(radiance), 6),
        "angle_deg": angle_deg,
    }


def _set_environment(strength: float) -> None:
    world = bpy.data.worlds.new("lrm environment")
    background = next(node for node in node_tree(world).nodes if node.type == "BACKGROUND")
    background.inputs["Color"].default_value = (1.0, 1.0, 1.0, 1.0)
    background.inputs["Strength"].default_value = strength
    bpy.context.scene.world = world


def show_white_behind() -> None:
    """Show white to the camera where nothing is hit, also through glass; what lights the object stays as it is."""
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
    light = bpy.data.lights.new(name, "SUN")
    light.energy = record["irradiance_over_pi"] * math.pi
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
