"""How public scripts render Objaverse, written anew to be measured against: one process an object.

    python -m tests.bench.baseline FILE|procedural:SEED FORMAT CAMERAS.json OUT_DIR RESOLUTION

What they have in common (objaverse-rendering, Objaverse-XL, OpenLRM): factory settings, 128 samples a pixel with its
adaptive sampling on, OpenImageDenoise with its defaults (accurate prefilter, high quality), few bounces, a filter of
0.01 px, one area light, no persistent data, a PNG on disk a view. Normalised by the meshes' boxes as they do. The
cameras are ours, so that both render the same views. Prints one JSON line: seconds until the first view, and a view.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

BEGUN = time.perf_counter()

import bpy  # noqa: E402
import numpy as np  # noqa: E402
from mathutils import Matrix, Vector  # noqa: E402

from render.cameras import flip_camera_axes  # noqa: E402


def main() -> None:
    """Render every camera of the list."""
    file, format_name, cameras, out_dir, resolution = sys.argv[1:6]
    bpy.ops.wm.read_factory_settings(use_empty=True)
    _load(file, format_name)
    _normalise()
    scene = bpy.context.scene
    _settings(scene, int(resolution))
    data = bpy.data.cameras.new("camera")
    camera = bpy.data.objects.new("camera", data)
    scene.collection.objects.link(camera)
    scene.camera = camera
    _light(scene)
    ready = time.perf_counter()
    seconds = []
    for i, view in enumerate(json.loads(Path(cameras).read_text())):
        before = time.perf_counter()
        data.sensor_fit, data.sensor_width, data.lens = "HORIZONTAL", 32.0, view["focal"] * 32.0
        camera.matrix_world = Matrix(flip_camera_axes(np.array(view["pose"])))
        scene.render.filepath = f"{out_dir}/{i:03d}.png"
        bpy.ops.render.render(write_still=True)
        seconds.append(time.perf_counter() - before)
    print("\n" + json.dumps({"fixed_s": ready - BEGUN, "view_s": seconds}))


def _load(file: str, format_name: str) -> None:
    if file.startswith("procedural:"):
        from render.procedural import build

        build(int(file.split(":")[1]))
    elif format_name in ("glb", "gltf"):
        bpy.ops.import_scene.gltf(filepath=file)
    elif format_name == "obj":
        bpy.ops.wm.obj_import(filepath=file)
    else:
        raise SystemExit(f"the baseline does not read {format_name} files")


def _normalise() -> None:
    bpy.context.view_layer.update()
    meshes = [obj for obj in bpy.context.scene.objects if obj.type == "MESH"]
    corners = np.array([obj.matrix_world @ Vector(corner) for obj in meshes for corner in obj.bound_box])
    low, high = corners.min(axis=0), corners.max(axis=0)
    root = bpy.data.objects.new("root", None)
    bpy.context.scene.collection.objects.link(root)
    for obj in [obj for obj in bpy.context.scene.objects if obj.parent is None and obj != root]:
        obj.parent = root
    scale = 2 / float((high - low).max())
    root.matrix_world = Matrix.Diagonal((scale, scale, scale, 1)) @ Matrix.Translation(-(low + high) / 2)


def _settings(scene: bpy.types.Scene, resolution: int) -> None:
    scene.render.engine = "CYCLES"
    scene.render.image_settings.file_format = "PNG"
    scene.render.image_settings.color_mode = "RGBA"
    scene.render.resolution_x = scene.render.resolution_y = resolution
    scene.render.film_transparent = True
    cycles = scene.cycles
    cycles.device = "CPU"
    cycles.samples = 128
    cycles.diffuse_bounces = cycles.glossy_bounces = 1
    cycles.transparent_max_bounces = cycles.transmission_bounces = 3
    cycles.filter_width = 0.01
    cycles.use_denoising = True


def _light(scene: bpy.types.Scene) -> None:
    light = bpy.data.lights.new("area", "AREA")
    light.energy, light.size = 1000, 5
    lamp = bpy.data.objects.new("area", light)
    lamp.location = (0.5, -0.5, 4)
    scene.collection.objects.link(lamp)
    scene.world = bpy.data.worlds.new("world")
    scene.world.use_nodes = True
    scene.world.node_tree.nodes["Background"].inputs["Color"].default_value = (0.25, 0.25, 0.25, 1)


if __name__ == "__main__":
    main()
