"""Cycles on the CPU: settings, the camera, and pixels out of it as float32 arrays.

Every setting that changes pixels is set here, none is left to Blender's defaults, which differ between versions.
Persistent data keeps the synchronised scene and its BVH from view to view: only the camera and the seed change, which
makes 8 views of a 328k-face mesh 3 to 4 times faster.

Pixels leave as an uncompressed float EXR written into anonymous memory (a memfd), so that no image file touches a disk;
that costs 2 ms at 256^2 px. The compositor's viewer image, the usual way, stays empty when Blender has no window.
Scene-linear values are taken, so no view transform applies; it is set all the same.

See-through surfaces (`see_through = "white"`) take two passes. Cycles' own alpha of glass depends on the angle and on
the number of layers behind each other, is never denoised, and is no coverage: masks of one object disagree between
views. So a first, cheap pass without light renders coverage, with every alpha made 0 or 1; then the object is rendered
on white, and the white is taken out again under the coverage. On white the picture is exactly Cycles' own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import bpy
import numpy as np
from mathutils import Matrix
from numpy.typing import NDArray

from pipeline.spec import RenderSpec
from pipeline.types import Camera, derive_seed
from render.cameras import flip_camera_axes
from render.lighting import show_white_behind
from render.materials import opacity_in_steps

NOISE_THRESHOLD = 0.02
"""Adaptive sampling stops a pixel at this relative error; measured with `samples` as the upper bound."""

WHITE_FACTOR = 2
"""How many times the samples a scene takes that is rendered on white.

Neither of its two passes stops early, and both have one seed, so that the same rays make colour and coverage: at an
edge the share of white that is taken out is then the share that came in.
"""

OPACITY_THRESHOLD = 0.1
"""Surfaces with an alpha up to this are no part of the object: soft painted shadows, invisible helpers."""

TRANSLUCENT_FACTOR, TRANSLUCENT_NOISE_THRESHOLD = 4, 0.05
"""How many times the samples a translucent scene takes, and where it may stop: its alpha is sampled, not denoised."""


class Engine:
    """Renders the current scene. One an asset: make it after the scene and its lights are in place.

    Attributes:
        readback_s: seconds spent so far in taking pixels out of Blender.
    """

    def __init__(self, spec: RenderSpec, num_threads: int, *, transparent: bool) -> None:
        self._on_white = transparent and spec.see_through == "white"
        self._scene = bpy.context.scene
        data = bpy.data.cameras.new("lrm camera")
        self._camera = bpy.data.objects.new("lrm camera", data)
        self._scene.collection.objects.link(self._camera)
        self._scene.camera = self._camera
        _set_output(self._scene, spec.resolution_px, num_threads)
        _set_cycles(self._scene, spec)
        if self._on_white:
            self._scene.cycles.samples = (spec.samples or 16) * WHITE_FACTOR
            self._scene.cycles.use_adaptive_sampling = False
            # Layers of glass make the denoiser's guides as noisy as the picture, and it would keep their grain.
            self._scene.cycles.denoising_input_passes = "RGB"
        elif transparent:
            self._scene.cycles.samples = (spec.samples or 16) * TRANSLUCENT_FACTOR
            self._scene.cycles.adaptive_threshold = TRANSLUCENT_NOISE_THRESHOLD
        self._memory = os.memfd_create("lrm-frame")
        self.readback_s = 0.0

    def close(self) -> None:
        """Free the frame's memory."""
        os.close(self._memory)

    def render_views(self, cameras: Sequence[Camera], seeds: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Yield each view as soon as it is done: scene-linear, premultiplied RGBA [H, W, 4], top row first."""
        if not self._on_white:
            for camera, seed in zip(cameras, seeds, strict=True):
                yield self._render(camera, seed)
            return
        coverage = self._render_coverage(cameras, seeds)
        self._scene.render.film_transparent = False
        show_white_behind()
        for camera, seed, alpha in zip(cameras, seeds, coverage, strict=True):
            pixels = self._render(camera, seed)
            pixels[..., 3] = alpha
            pixels[..., :3] = np.maximum(pixels[..., :3] - (1 - pixels[..., 3:]), 0)
            yield pixels

    def _render_coverage(self, cameras: Sequence[Camera], seeds: Sequence[int]) -> list[NDArray[np.float16]]:
        """Return the share of each pixel that surfaces cover, whatever they let through; [H, W] a view."""
        cycles = self._scene.cycles
        denoise, bounces = cycles.use_denoising, cycles.max_bounces
        cycles.use_denoising, cycles.max_bounces, cycles.film_transparent_glass = False, 0, False
        with opacity_in_steps(bpy.data.materials, OPACITY_THRESHOLD):
            coverage = [self._render(c, s)[..., 3].astype(np.float16) for c, s in zip(cameras, seeds, strict=True)]
        cycles.use_denoising, cycles.max_bounces = denoise, bounces
        return coverage

    def _render(self, camera: Camera, seed: int) -> NDArray[np.float32]:
        self._aim(camera)
        self._scene.cycles.seed = seed
        bpy.ops.render.render(write_still=False)
        before = time.perf_counter()
        pixels = self._read()
        self.readback_s += time.perf_counter() - before
        return pixels

    def _aim(self, camera: Camera) -> None:
        """Set Blender's camera to exactly `camera`; the matrix is ours, never read back from constraints."""
        data = self._camera.data
        data.type = "PERSP"
        # Blender 4.5 picks the sensor side by itself unless told; horizontal makes focal length a matter of width.
        data.sensor_fit = "HORIZONTAL"
        data.sensor_width = data.sensor_height = 32.0
        data.lens = float(camera.intrinsics[0, 0]) / camera.width * 32.0
        data.shift_x = data.shift_y = 0.0
        data.clip_start, data.clip_end = 0.01, 100.0
        data.dof.use_dof = False
        self._camera.matrix_world = Matrix(flip_camera_axes(camera.world_from_camera))

    def _read(self) -> NDArray[np.float32]:
        path = f"/proc/self/fd/{self._memory}"
        bpy.data.images["Render Result"].save_render(path, scene=self._scene)
        image = bpy.data.images.load(path, check_existing=False)
        try:
            width, height = image.size
            pixels = np.empty((height, width, 4), np.float32)
            image.pixels.foreach_get(pixels.reshape(-1))
        finally:
            bpy.data.images.remove(image)
        return np.ascontiguousarray(pixels[::-1])  # Blender's rows run from the bottom up


def view_seed(sample_seed: int, view: int) -> int:
    """Return the Cycles seed of a view: 31 bits, which is what the setting holds."""
    return derive_seed("cycles", sample_seed, view) & 0x7FFFFFFF


def _set_output(scene: Any, resolution_px: int, num_threads: int) -> None:
    render = scene.render
    render.engine = "CYCLES"
    render.resolution_x = render.resolution_y = resolution_px
    render.resolution_percentage = 100
    render.pixel_aspect_x = render.pixel_aspect_y = 1.0
    render.use_border = render.use_crop_to_border = False
    render.film_transparent = True
    render.use_persistent_data = True
    render.threads_mode = "FIXED"
    render.threads = num_threads
    render.use_compositing = render.use_sequencer = False
    render.use_motion_blur = False
    render.use_simplify = False
    render.use_multiview = False
    render.dither_intensity = 0.0
    render.use_file_extension = False
    output = render.image_settings
    output.file_format = "OPEN_EXR"
    output.color_mode = "RGBA"
    output.color_depth = "32"
    output.exr_codec = "NONE"
    scene.display_settings.display_device = "sRGB"
    view = scene.view_settings
    view.view_transform, view.look, view.exposure, view.gamma = "Standard", "None", 0.0, 1.0
    view.use_curve_mapping = False


def _set_cycles(scene: Any, spec: RenderSpec) -> None:
    cycles = scene.cycles
    cycles.device = "CPU"
    cycles.samples = spec.samples or 16
    cycles.use_adaptive_sampling = True
    cycles.adaptive_threshold = NOISE_THRESHOLD
    cycles.adaptive_min_samples = min(8, spec.samples or 16)
    cycles.use_animated_seed = False
    cycles.sampling_pattern = "TABULATED_SOBOL"
    cycles.use_light_tree = False
    cycles.max_bounces = 6
    cycles.diffuse_bounces = 2
    cycles.glossy_bounces = 2
    cycles.transmission_bounces = 6
    # Cards of leaves and hair stack many alpha-mapped layers; with too few they turn black.
    cycles.transparent_max_bounces = 16
    cycles.volume_bounces = 0
    cycles.caustics_reflective = cycles.caustics_refractive = False
    cycles.blur_glossy = 1.0
    cycles.sample_clamp_direct, cycles.sample_clamp_indirect = 0.0, 10.0
    cycles.film_transparent_glass = True
    cycles.film_transparent_roughness = 1.0
    cycles.film_exposure = 1.0
    cycles.pixel_filter_type = "BLACKMAN_HARRIS"
    cycles.filter_width = 1.5
    cycles.use_auto_tile = False
    cycles.time_limit = 0.0
    cycles.use_denoising = spec.denoise
    if spec.denoise:
        cycles.denoiser = "OPENIMAGEDENOISE"
        cycles.denoising_input_passes = "RGB_ALBEDO_NORMAL"
        cycles.denoising_prefilter = "NONE"
        cycles.denoising_quality = "FAST"
        cycles.denoising_use_gpu = False
    layer = bpy.context.view_layer
    layer.pass_alpha_threshold = 0.0
    # The world is one colour: drawing it through the surface's own lobes is exact, a map of it is not needed.
    if scene.world is not None:
        scene.world.cycles.sampling_method = "NONE"
        scene.world.cycles_visibility.camera = True
