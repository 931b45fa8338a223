"""From a prepared scene to pictures: the camera, and as many samples as each needs.

A fixed number of samples cannot meet a noise target: at 512^2 a plain tree reaches it with 4 samples a pixel, brushed
metal with 16, glass with more. So each view is rendered in steps of one Sobol sequence until its estimated error
(`render.noise`) is below the target:

    picture: samples [0, n) -> denoise -> estimate from two probes of 1 sample -> enough? else samples [n, m), and again

Steps of one sequence add up to exactly the picture that one call would have made. The next view starts where this one
ended. Cycles' own adaptive sampling looks every 16 samples, after this is done, and knows nothing of the denoiser.

Persistent data keeps the synchronised scene and its BVH from view to view: only the camera, the seed and the sample
range change. They are seen by the renderer only after the scene is tagged: without, every call repeats the last.
Only the pixels that the object can cover are rendered; outside, a view is background by construction.

Surfaces that are see-through (`see_through = "white"`) take a pass more. Cycles' own alpha of glass depends on the
angle and on the number of layers, and is no coverage: masks of one object disagree between views. So coverage is
rendered first, without light, with every alpha made 0 or 1; then the object on white, whose white is taken out again
under the coverage.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import bpy
import cv2
import numpy as np
from mathutils import Matrix
from numpy.typing import NDArray

from pipeline.sample import albedo_to_u8, depth_to_u16, normal_to_u8
from pipeline.spec import RenderSpec
from pipeline.types import Camera, Float64, PlaneName, derive_seed
from render import noise
from render.cameras import NEAR_PLANE, NUM_SIDES, border, canonical_cameras, depth_scale, flip_camera_axes
from render.cycles import CENTRE_FILTER_PX, FILTER_PX, set_cycles, set_output
from render.denoise import Denoiser
from render.frame import render_passes
from render.geometry import outer_points
from render.lighting import show_white_behind
from render.overrides import bare_surfaces

OPACITY_THRESHOLD = 0.1
"""Surfaces with an alpha up to this are no part of the object: soft painted shadows, invisible helpers."""

BARE_SAMPLES = 12
"""Samples a pixel of a see-through object without light, for its coverage and the denoiser's guides: each costs a
quarter of one with light."""

BARE_LAG = 2
"""How many times those of its coverage a see-through picture's samples may be before the coverage is made anew."""

FIRST_PROBE_SAMPLES = 8
"""Samples of each probe of the first two views, which the judgement of all others rests on."""

FULL_PROBE_PX = 256
"""Width from which on so few samples do; smaller pictures take more, as they have fewer pixels."""

WHITE_PROBE_SAMPLES = 4
"""Samples of a probe of a see-through object, with light and without: as many, since their edges must agree."""

MARGIN_PX = 3
"""Pixels around the object's box that are rendered too: the filter reaches 1, the denoiser looks around."""

FIRST_SAMPLE = 64
"""Where in its Sobol sequence a view starts. Cycles takes sample 0 through the centre of each pixel, whatever the seed:
a probe of that sample would see no edge and no texture filtered. Steps from a power of two on are stratified as from 0.
"""

_FAR = 1000.0

Box = tuple[int, int, int, int]
"""Left, top, right, bottom of a part of a view in pixels, half-open."""


@dataclass(slots=True, eq=False)
class RenderedView:
    """One finished view: only the pixels in `box`, outside of which there is background.

    Attributes:
        box: what was rendered.
        rgba: [h, w, 4] float32, scene-linear, premultiplied, top row first.
        data: the data planes asked for, in their order: depth [h, w] uint16, normal and albedo [h, w, 3] uint8.
        samples: samples a pixel of the picture.
        quality: its estimated errors; None where the number of samples was fixed.
    """

    box: Box
    rgba: NDArray[np.float32]
    data: dict[PlaneName, NDArray[Any]]
    samples: int
    quality: noise.Quality | None


@dataclass(slots=True, eq=False)
class _Mean:
    """The samples of one view so far: means of the premultiplied picture and of the denoiser's guides."""

    samples: int = 0
    layers: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def add(self, layers: dict[str, NDArray[np.float32]], samples: int) -> None:
        """Take in the means over so many samples more; the arrays become ours. A layer that is left out stays."""
        self.samples += samples
        share = np.float32(samples / self.samples)
        for name, layer in layers.items():
            # Most views take one step: nothing is copied then.
            mean = self.layers.setdefault(name, layer)
            if mean is not layer:
                np.subtract(layer, mean, out=layer)
                np.multiply(layer, share, out=layer)
                mean += layer

    def layer(self) -> noise.Layer:
        """Return the picture without its guides."""
        return noise.Layer(self.layers["colour"], self.layers["alpha"])


@dataclass(frozen=True, slots=True, eq=False)
class _Bare:
    """A see-through object without light: coverage [h, w, 1], and base colour and normal [h, w, 3] of the picture."""

    alpha: NDArray[np.float16]
    albedo: NDArray[np.float16] | None
    normal: NDArray[np.float16] | None


@dataclass(slots=True, eq=False)
class _View:
    """A view to render.

    `probed` views are judged by probes of their own, `probe_samples` is how many samples each of the two should have;
    `bare` is what a see-through object is without light, in the picture, with `bare_samples`, and in the probes.
    """

    index: int
    camera: Camera
    box: Box
    planes: dict[PlaneName, NDArray[Any]]
    probed: bool
    probe_samples: int
    bare_samples: int
    bare: list[_Bare] = field(default_factory=list)


class Engine:
    """Renders the current scene. One an asset: make it after the scene and its lights are in place.

    Args:
        spec: the pixel part of the dataset's spec.
        seed: the sample's seed.
        num_threads: threads that Cycles may use.
        points: [N, 3] float64, positions that bound the object.
        transparent: whether light may pass a surface.
        denoiser: the process's denoiser.
        device: "CPU" or "GPU".

    Attributes:
        seconds: what was spent so far, by stage; complete after `close`.
    """

    def __init__(
        self,
        spec: RenderSpec,
        seed: int,
        num_threads: int,
        *,
        points: Float64,
        transparent: bool,
        denoiser: Denoiser,
        device: str = "CPU",
    ) -> None:
        self._spec, self._seed, self._points, self._denoiser = spec, seed, outer_points(points), denoiser
        self._on_white = transparent and spec.see_through == "white"
        margin = noise.WHITE_MARGIN_DB if self._on_white else 0.0
        self._targets_db = spec.half_psnr_db + margin, spec.full_psnr_db + margin
        self._scene = bpy.context.scene
        data = bpy.data.cameras.new("lrm camera")
        self._camera = bpy.data.objects.new("lrm camera", data)
        self._scene.collection.objects.link(self._camera)
        self._scene.camera = self._camera
        set_output(self._scene, spec.resolution_px, num_threads)
        set_cycles(self._scene, device, FIRST_SAMPLE + (spec.samples or spec.max_samples))
        self._views: list[_View] = []
        self._model = noise.Model(noise.WHITE_SPREAD if self._on_white else noise.OPAQUE_SPREAD)
        self._call_s: list[float] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def close(self) -> None:
        """Finish the account of seconds.

        What a call takes without samples is what the fastest of the tiny side views took; what the first took longer is
        the scene's way to Cycles and its BVH. The rest of the calls is sampling.
        """
        if len(self._call_s) > NUM_SIDES:
            idle = min(self._call_s[:NUM_SIDES])
            self.seconds["synchronization"] = idle * (len(self._call_s) - 1) + self._call_s[0]
            self.seconds["sampling"] = sum(self._call_s) - self.seconds["synchronization"]

    def render_bare(self, cameras: Sequence[Camera]) -> NDArray[np.uint8]:
        """Render what needs no light, once before `render_views` of the same cameras: data planes, and coverage.

        Returns:
            [4, S, S, 4] straight sRGB RGBA: the base colours from four sides, the same cameras for every object, for
            telling duplicates.
        """
        self._views = []
        with self._bare():
            sides = [self._render_side(camera) for camera in canonical_cameras()]
            for index, camera in enumerate(cameras):
                box = _even_box(border(camera, self._points, MARGIN_PX), camera)
                planes = self._render_planes(camera, box)
                # The first views teach the model, and every eighth goes on to. Without a denoiser there is no model.
                probed = index < 2 or index % 8 == 0 or not self._spec.denoise
                probe_samples = FIRST_PROBE_SAMPLES if index < 2 else WHITE_PROBE_SAMPLES if self._on_white else 1
                # A small picture has few pixels to tell by, and much edge.
                small = min(max(1, round((FULL_PROBE_PX / camera.width) ** 2)), 8)
                bare_samples = max(BARE_SAMPLES * small, self._spec.samples or 0)
                self._views.append(_View(index, camera, box, planes, probed, probe_samples * small, bare_samples))
            if self._on_white:
                self._set_filter(centre_only=False)
                for view in self._views:
                    self._render_bare(view)
        if self._on_white:
            show_white_behind()
        self._scene.render.film_transparent = not self._on_white
        bpy.context.view_layer.cycles.denoising_store_passes = self._spec.denoise and not self._on_white
        return np.stack(sides)

    def render_views(self) -> Iterator[RenderedView]:
        """Yield each view as soon as it is done."""
        samples = self._spec.samples or noise.MIN_SAMPLES
        for view in self._views:
            layer, count, quality = self._render_view(view, samples)
            if quality is not None:
                short = quality.shortfall_db(*self._targets_db, deviations=1)
                samples = noise.first_samples(count, short, self._spec.max_samples)
            rgba = np.asarray(cv2.merge([np.maximum(layer.colour, 0), layer.alpha]), np.float32)
            yield RenderedView(view.box, rgba, view.planes, count, quality)

    def _render_view(self, view: _View, samples: int) -> tuple[noise.Layer, int, noise.Quality | None]:
        """Render one view, in steps until its noise is below the target, or with a fixed number of samples."""
        spec, total, probes = self._spec, _Mean(), (_Mean(), _Mean())
        while True:
            self._extend(total, view, 0, samples)
            if self._on_white and spec.samples is None and samples > BARE_LAG * view.bare_samples:
                self._refine_bare(view, total, samples)
            layer = self._denoised(total)
            if spec.samples is not None:
                return layer, samples, None
            quality = self._judge(view, layer, total, probes)
            short = quality.shortfall_db(*self._targets_db, deviations=1)
            if short <= 0 or samples >= spec.max_samples:
                return layer, samples, quality
            samples = noise.next_samples(samples, short, spec.max_samples)

    def _judge(self, view: _View, layer: noise.Layer, total: _Mean, probes: tuple[_Mean, _Mean]) -> noise.Quality:
        """Estimate a picture's quality: from the views so far where that will do, else from probes of its own."""
        spec, num_pixels = self._spec, view.camera.width * view.camera.height
        targets = self._targets_db
        before = time.perf_counter()
        removed = noise.removed_noise(layer, total.layers["colour"], num_pixels)
        self.seconds["estimate"] += time.perf_counter() - before
        expected = self._model.expect(total.samples, removed) if spec.denoise else None
        if expected is not None and not view.probed and (self._on_white or expected.shortfall_db(*targets, 1) <= 0):
            return expected
        # With the picture the probes grow too: the same unlucky ones would refuse it for ever.
        wanted = max(view.probe_samples, probes[0].samples, total.samples // 8)
        while True:
            for which, probe in enumerate(probes, 1):
                self._extend(probe, view, which, wanted)
            before = time.perf_counter()
            own = noise.estimate(layer, (probes[0].layer(), probes[1].layer()), num_pixels)
            quality = own if expected is None else noise.weigh(own, expected)
            self.seconds["estimate"] += time.perf_counter() - before
            known = quality.shortfall_db(*targets, -1) > 0 or quality.shortfall_db(*targets, 1) <= 0
            if known or 2 * wanted > max(view.probe_samples, total.samples // 4):
                self._model.learn(total.samples, removed, own)
                return quality
            wanted *= 2

    def _extend(self, total: _Mean, view: _View, which: int, samples: int) -> None:
        """Render what a view's picture (0) or probe (1, 2) lacks to so many samples."""
        first = total.samples
        if samples > first:
            seed = self._cycles_seed(view.index, which)
            bare = view.bare[which] if self._on_white else None
            guided = bare is None and which == 0 and self._spec.denoise
            names = ("Combined", "Denoising Albedo", "Denoising Normal") if guided else ("Combined",)
            passes = self._render(view.camera, view.box, seed, FIRST_SAMPLE + first, samples - first, names)
            before = time.perf_counter()
            layers = _layers(passes, bare, guided)
            if bare is not None and first:
                layers = {"colour": layers["colour"]}  # coverage and guides are the bare ones in every step
            total.add(layers, samples - first)
            self.seconds["readback"] += time.perf_counter() - before

    def _denoised(self, total: _Mean) -> noise.Layer:
        layer = total.layer()
        if not self._spec.denoise:
            return layer
        before = time.perf_counter()
        # Over black: over white, the share of white that noise leaves at an edge is great in sRGB where the object is
        # dark; 0.5 to 2 dB lay between them.
        colour = np.maximum(layer.colour, 0)
        colour = self._denoiser.run(colour, total.layers["albedo"], total.layers["normal"])
        self.seconds["denoise"] += time.perf_counter() - before
        seen = (layer.alpha > 0).view(np.uint8)
        return noise.Layer(np.asarray(cv2.copyTo(colour, seen), np.float32), layer.alpha)

    def _refine_bare(self, view: _View, total: _Mean, samples: int) -> None:
        """Render a see-through object's coverage anew with more samples, where its noise may be what is left."""
        with self._bare(film_transparent=False):
            self._set_filter(centre_only=False)
            before, after = view.bare[0], self._bare_of(view, 0, samples)
        view.bare[0], view.bare_samples = after, samples
        # The picture on white stays what it is; less or more of it is the white behind.
        total.layers["colour"] += _from_half(after.alpha) - _from_half(before.alpha)
        for name in ("alpha", "albedo", "normal"):
            total.layers[name] = _from_half(getattr(after, name))

    def _render_side(self, camera: Camera) -> NDArray[np.uint8]:
        data = self._render_data(camera, (0, 0, camera.width, camera.height))
        seen = np.where(data["depth"] > 0, 255, 0).astype(np.uint8)
        return np.concatenate([albedo_to_u8(data["albedo"]), seen[..., None]], axis=2)

    def _render_planes(self, camera: Camera, box: Box) -> dict[PlaneName, NDArray[Any]]:
        """Return the data planes that the spec asks for, quantised."""
        wanted = [name for name in self._spec.planes if name != "rgba"]
        if not wanted:
            return {}
        data, scale = self._render_data(camera, box), depth_scale(self._spec)
        make: dict[PlaneName, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
            "depth": lambda z: depth_to_u16(z, scale),
            "normal": normal_to_u8,
            "albedo": albedo_to_u8,
        }
        return {name: make[name](data[name]) for name in wanted}

    def _render_data(self, camera: Camera, box: Box) -> dict[str, NDArray[np.float32]]:
        """Return depth z [h, w] in world units (0 where nothing is), normal [h, w, 3] and base colour [h, w, 3].

        One sample through the centre of each pixel: a mean over an edge would be the depth of no surface.
        """
        passes = self._render(camera, box, 0, 0, 1, ("Combined", "Depth", "Normal"))
        combined, depth = passes["Combined"], passes["Depth"][..., 0]
        seen = combined[..., 3] > 0.5
        return {
            "depth": np.where(seen & (depth < _FAR), depth, np.float32(0)),
            "normal": np.where(seen[..., None], passes["Normal"], np.float32(0)),
            "albedo": np.where(seen[..., None], combined[..., :3], np.float32(0)),
        }

    def _render_bare(self, view: _View) -> None:
        """Render what a see-through object is without light: in a view's picture, and in its probes if it has any.

        Each with the seed and so the rays of its colours: the white that is taken out at an edge is what came in.
        """
        probes = (view.probe_samples,) * 2 if view.probed and self._spec.samples is None else ()
        view.bare = [self._bare_of(view, which, n) for which, n in enumerate((view.bare_samples, *probes))]

    def _bare_of(self, view: _View, which: int, samples: int) -> _Bare:
        """Render the coverage and guides of a view's picture (0), or the coverage of a probe (1, 2)."""
        seed = self._cycles_seed(view.index, which)
        names = ("Combined",) if which else ("Combined", "Normal")
        passes = self._render(view.camera, view.box, seed, FIRST_SAMPLE, samples, names)
        colour, alpha = _split(passes["Combined"])
        if which:
            return _Bare(_to_half(alpha), None, None)
        return _Bare(_to_half(alpha), _to_half(colour), _to_half(passes["Normal"]))

    @contextmanager
    def _bare(self, *, film_transparent: bool = True) -> Iterator[None]:
        """Render surfaces without light, by camera rays alone, at first through the centres of pixels.

        `film_transparent` is what the film becomes again afterwards.
        """
        cycles = self._scene.cycles
        bounces, cycles.max_bounces = cycles.max_bounces, 0
        self._scene.render.film_transparent = True
        layer = bpy.context.view_layer
        layer.use_pass_z = layer.use_pass_normal = True
        self._set_filter(centre_only=True)
        try:
            with bare_surfaces(bpy.data.materials, OPACITY_THRESHOLD):
                yield
        finally:
            cycles.max_bounces = bounces
            self._scene.render.film_transparent = film_transparent
            layer.use_pass_z = layer.use_pass_normal = False
            self._set_filter(centre_only=False)

    def _set_filter(self, *, centre_only: bool) -> None:
        """Sample pixels at their centres, or filter them as pictures are."""
        self._scene.cycles.filter_width = CENTRE_FILTER_PX if centre_only else FILTER_PX

    def _render(
        self, camera: Camera, box: Box, seed: int, first: int, samples: int, names: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """Render samples [first, first + samples) of a view's sequence, in a part of it; return passes by name."""
        before = time.perf_counter()
        self._aim(camera, box)
        cycles = self._scene.cycles
        cycles.seed = seed
        cycles.sample_offset, cycles.sample_subset_length = first, samples
        # Time alone: a whole update sends all materials and images again, 42 ms a call on a textured helmet, not 3.
        self._scene.update_tag(refresh={"TIME"})
        passes, copying_s = render_passes(names)
        self._call_s.append(time.perf_counter() - before - copying_s)
        self.seconds["readback"] += copying_s
        return passes

    def _cycles_seed(self, view: int, which: int) -> int:
        """Return the Cycles seed of a view's picture (0) or probe (1, 2): 31 bits, which is what the setting holds."""
        return derive_seed("cycles", self._seed, view, which) & 0x7FFFFFFF

    def _aim(self, camera: Camera, box: Box) -> None:
        """Set Blender's camera to exactly `camera`; the matrix is ours, never read back from constraints."""
        data, render = self._camera.data, self._scene.render
        data.type = "PERSP"
        # Blender 4.5 picks the sensor side by itself unless told; horizontal makes focal length a matter of width.
        data.sensor_fit = "HORIZONTAL"
        data.sensor_width = data.sensor_height = 32.0
        data.lens = float(camera.intrinsics[0, 0]) / camera.width * 32.0
        data.shift_x = data.shift_y = 0.0
        data.clip_start, data.clip_end = NEAR_PLANE, _FAR
        data.dof.use_dof = False
        self._camera.matrix_world = Matrix(flip_camera_axes(camera.world_from_camera))
        render.resolution_x, render.resolution_y = camera.width, camera.height
        # A quarter of a pixel inside, since Blender rounds down. Its y runs from the bottom up.
        left, top, right, bottom = box
        render.border_min_x = (left + 0.25) / camera.width
        render.border_max_x = (right + 0.25) / camera.width
        render.border_min_y = (camera.height - bottom + 0.25) / camera.height
        render.border_max_y = (camera.height - top + 0.25) / camera.height


def _layers(passes: dict[str, NDArray[np.float32]], bare: _Bare | None, guided: bool) -> dict[str, NDArray[np.float32]]:
    """Return the premultiplied picture that a render shows, its coverage, and the guides of the denoiser."""
    combined = passes["Combined"]
    # One value that is not finite would spread over the whole picture in the denoiser; a sum finds it faster.
    if not np.isfinite(combined.sum()):
        combined = np.nan_to_num(combined, copy=False, nan=0.0, posinf=1e4, neginf=0.0)
    colour, alpha = _split(combined)
    if bare is not None:
        alpha = _from_half(bare.alpha)
        colour -= cv2.merge([1 - alpha] * 3)
    out = {"colour": colour, "alpha": np.clip(alpha, 0, 1)}
    if bare is not None and bare.albedo is not None and bare.normal is not None:
        # Through glass Cycles' own guides are as noisy as the picture, and the denoiser would keep their grain.
        out |= {"albedo": _from_half(bare.albedo), "normal": _from_half(bare.normal)}
    elif guided:
        out |= {"albedo": passes["Denoising Albedo"], "normal": passes["Denoising Normal"]}
    return out


# OpenCV moves interleaved channels ten to forty times faster than NumPy's strided copies: several milliseconds a view.


def _split(rgba: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return copies of colour [H, W, 3] and alpha [H, W, 1]."""
    colour = np.asarray(cv2.cvtColor(rgba, cv2.COLOR_BGRA2BGR), np.float32)
    return colour, np.asarray(cv2.extractChannel(rgba, 3), np.float32)[..., None]


def _to_half(x: NDArray[np.float32]) -> NDArray[np.float16]:
    # OpenCV 4 alone has it: thirty times faster than NumPy, to the same bits.
    if hasattr(cv2, "convertFp16"):
        return np.asarray(cv2.convertFp16(x)).view(np.float16).reshape(x.shape)
    return x.astype(np.float16)


def _from_half(x: NDArray[np.float16]) -> NDArray[np.float32]:
    if hasattr(cv2, "convertFp16"):
        return np.asarray(cv2.convertFp16(x.view(np.int16)), np.float32).reshape(x.shape)
    return x.astype(np.float32)


def _even_box(box: Box, camera: Camera) -> Box:
    """Grow a box to even numbers, so that it holds whole blocks of 2 x 2 pixels; the view's own edge is the limit."""
    left, top, right, bottom = box
    return left // 2 * 2, top // 2 * 2, min(-(-right // 2) * 2, camera.width), min(-(-bottom // 2) * 2, camera.height)
