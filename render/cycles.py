"""Cycles' settings: every one that changes pixels is set here.

None is left to Blender's defaults, which differ between versions. What came after Blender 4.5 stands in
`render.versions`.
"""

from __future__ import annotations

from typing import Any

import bpy

from render import versions

FILTER_PX, CENTRE_FILTER_PX = 1.5, 0.01
"""Width of the pixel filter: Blackman-Harris, and, for data, as narrow as Blender allows."""

MIN_SEQUENCE = 256
"""Least length of the Sobol sequence; a table of 1024 takes 4 MB and no time that shows."""


def set_output(scene: Any, resolution_px: int, num_threads: int) -> None:
    """Render a part of a square picture, scene-linear, on so many threads."""
    render = scene.render
    render.engine = "CYCLES"
    render.resolution_x = render.resolution_y = resolution_px
    render.resolution_percentage = 100
    render.pixel_aspect_x = render.pixel_aspect_y = 1.0
    render.use_border = render.use_crop_to_border = True
    render.film_transparent = True
    render.use_persistent_data = True
    render.threads_mode = "FIXED"
    render.threads = num_threads
    render.use_compositing = render.use_sequencer = False
    render.use_motion_blur = False
    render.use_multiview = False
    render.dither_intensity = 0.0
    versions.set_later_settings()
    scene.display_settings.display_device = "sRGB"
    view = scene.view_settings
    view.view_transform, view.look, view.exposure, view.gamma = "Standard", "None", 0.0, 1.0
    view.use_curve_mapping = False


def set_cycles(scene: Any, device: str, sequence: int) -> None:
    """Trace paths on "CPU" or "GPU"; `sequence` is how many samples of a pixel's Sobol sequence may be taken."""
    cycles = scene.cycles
    cycles.device = device
    cycles.samples = max(MIN_SEQUENCE, sequence)
    cycles.use_sample_subset = True
    cycles.use_adaptive_sampling = False
    cycles.use_animated_seed = False
    cycles.sampling_pattern = "TABULATED_SOBOL"
    # Lights are the world's, met by the surface's own rays (`render.lighting`); only surfaces that emit are sampled.
    cycles.use_light_tree = True
    cycles.max_bounces = 6
    cycles.diffuse_bounces = 2
    cycles.glossy_bounces = 2
    cycles.transmission_bounces = 6
    # Cards of leaves and hair stack many alpha-mapped layers; with too few they turn black.
    cycles.transparent_max_bounces = 16
    cycles.volume_bounces = 0
    # What lies behind or beside glass and mirrors is lit through them. Under soft light that costs no noise.
    cycles.caustics_reflective = cycles.caustics_refractive = True
    cycles.blur_glossy = 1.0
    cycles.sample_clamp_direct, cycles.sample_clamp_indirect = 0.0, 10.0
    cycles.film_transparent_glass = True
    cycles.film_transparent_roughness = 1.0
    cycles.film_exposure = 1.0
    cycles.pixel_filter_type = "BLACKMAN_HARRIS"
    cycles.filter_width = FILTER_PX
    cycles.use_auto_tile = False
    cycles.time_limit = 0.0
    cycles.use_denoising = False
    # Coverage, depth and normals are those of surfaces made wholly there or wholly absent (`render.overrides`).
    bpy.context.view_layer.pass_alpha_threshold = 0.5
    # The world is smooth: drawing it through the surface's own lobes is exact, a map of it is not needed.
    if scene.world is not None:
        scene.world.cycles.sampling_method = "NONE"
        scene.world.cycles_visibility.camera = True
