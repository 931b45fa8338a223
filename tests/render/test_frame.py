"""Passes copied out of Cycles' callback, against the file that Blender itself saves of the same render."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.render.test_versions import run_blender

pytestmark = [pytest.mark.blender, pytest.mark.timeout(120)]

SCENE = """
import numpy as np
from render.frame import FrameError, render_passes
scene = bpy.context.scene
scene.render.engine = "CYCLES"
scene.cycles.samples, scene.cycles.use_denoising = 4, False
scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = 24, 16, 100
scene.render.film_transparent = True
bpy.ops.mesh.primitive_monkey_add()
camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
camera.location = 0.5, 0.3, 4.0
scene.collection.objects.link(camera)
scene.camera = camera
scene.render.use_border = scene.render.use_crop_to_border = True
scene.render.border_min_x, scene.render.border_max_x = 0.25 / 24, 18.25 / 24
scene.render.border_min_y, scene.render.border_max_y = 4.25 / 16, 16.0 / 16
layer = bpy.context.view_layer
layer.use_pass_z = layer.use_pass_normal = True
layer.cycles.denoising_store_passes = True
"""


def test_passes_are_those_of_the_file_that_blender_saves(tmp_path: Path) -> None:
    """Values, rows and columns of a part of a picture, to the last bit."""
    script = f"""{SCENE}
passes, seconds = render_passes(["Combined", "Depth", "Normal", "Denoising Albedo"])
settings = scene.render.image_settings
if hasattr(settings, "media_type"):
    settings.media_type = "IMAGE"
settings.file_format, settings.color_depth, settings.exr_codec, settings.color_mode = "OPEN_EXR", "32", "NONE", "RGBA"
path = sys.argv[2]
bpy.data.images["Render Result"].save_render(path, scene=scene)
image = bpy.data.images.load(path)
pixels = np.empty(image.size[0] * image.size[1] * 4, np.float32)
image.pixels.foreach_get(pixels)
saved = pixels.reshape(image.size[1], image.size[0], 4)[::-1]
depth, normal = passes["Depth"][..., 0], passes["Normal"]
hit = depth < 100
out = [
    [list(one.shape) for one in passes.values()], all(one.flags.c_contiguous for one in passes.values()),
    bool((saved == passes["Combined"]).all()), float(saved.std()), seconds > 0,
    float(depth[hit].min()), float(abs(np.median(np.linalg.norm(normal[hit], axis=-1)) - 1)),
]
"""
    shapes, contiguous, equal, spread, timed, nearest, off_unit = run_blender(tmp_path, script, str(tmp_path / "a.exr"))
    assert shapes == [[12, 18, 4], [12, 18, 1], [12, 18, 3], [12, 18, 3]]
    assert contiguous
    assert timed
    assert spread > 0.05, "an even picture would agree upside down too"
    assert equal
    assert 2.5 < nearest < 4
    assert off_unit < 0.05, "means over the samples of a pixel are a little shorter"


def test_arrays_are_copies_and_the_engine_is_left_as_it_was(tmp_path: Path) -> None:
    script = f"""{SCENE}
cycles = bpy.types.RenderEngine.bl_rna_get_subclass_py("CYCLES")
before = cycles.render
first, _ = render_passes(["Combined"])
kept = first["Combined"].copy()
bpy.data.objects["Suzanne"].location.x = 1.0
second, _ = render_passes(["Combined"])
out = [cycles.render is before, bool((first["Combined"] == kept).all()), bool((second["Combined"] == kept).all())]
"""
    assert run_blender(tmp_path, script) == [True, True, False]


def test_a_pass_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    script = f"""{SCENE}
cycles = bpy.types.RenderEngine.bl_rna_get_subclass_py("CYCLES")
before = cycles.render
try:
    render_passes(["Combined", "Mist"])
except FrameError as error:
    out = [str(error), cycles.render is before]
"""
    message, restored = run_blender(tmp_path, script)
    assert message.startswith("the render has no pass Mist; it has Combined, Depth, ")
    assert restored


def test_a_render_that_is_refused_is_an_error_and_no_old_picture(tmp_path: Path) -> None:
    script = f"""{SCENE}
render_passes(["Combined"])
scene.camera = None
try:
    render_passes(["Combined"])
except (FrameError, RuntimeError) as error:
    out = str(error)
"""
    assert "camera" in run_blender(tmp_path, script).lower()
