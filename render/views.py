"""One view on its way from the child to the shard: pixels as bytes, checked, and encoded.

Only the part of a picture that was rendered travels; the rest is background. This side of the pipe runs in threads of
the supervisor while the child renders on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.quality import view_facts
from pipeline.sample import encode_data, encode_rgba, premultiplied_linear_to_rgba8
from pipeline.spec import RenderSpec
from pipeline.types import Camera, Plane, PlaneName
from render.cameras import depth_scale

# Type and channels of a pixel of each plane.
_PIXELS: Mapping[PlaneName, tuple[type[np.generic], int]] = {
    "rgba": (np.float32, 4),
    "depth": (np.uint16, 1),
    "normal": (np.uint8, 3),
    "albedo": (np.uint8, 3),
}


@dataclass(frozen=True, slots=True, eq=False)
class EncodedView:
    """The planes of a view as they go into a shard, what the picture measures, and what encoding took."""

    planes: dict[PlaneName, Plane]
    facts: dict[str, float | bool]
    seconds: float


def bytes_per_pixel(name: PlaneName) -> int:
    """Return how many bytes of a pixel of this plane travel."""
    kind, channels = _PIXELS[name]
    return int(np.dtype(kind).itemsize) * channels


def pack_view(planes: Mapping[PlaneName, NDArray[Any]]) -> bytes:
    """Return the planes of a part of a view, [h, w] or [h, w, C] each, one after the other."""
    return b"".join(np.ascontiguousarray(plane, _PIXELS[name][0]).tobytes() for name, plane in planes.items())


def unpack_view(header: Mapping[str, Any], payload: bytearray, spec: RenderSpec) -> dict[PlaneName, NDArray[Any]]:
    """Return the planes of a whole view, [H, W, C] each, from the part of it that came.

    Raises:
        ValueError: if the part or the planes are not what was asked for.
    """
    size, box = spec.resolution_px, header.get("box")
    if not (isinstance(box, list) and len(box) == 4 and all(type(x) is int for x in box)):
        raise ValueError(f"its box {str(box)[:40]} is not four integers")
    left, top, right, bottom = box
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise ValueError(f"its box {box} does not lie in {size} x {size} px")
    if header.get("planes") != list(spec.planes):
        raise ValueError(
            f"it came with the planes {str(header.get('planes'))[:80]}; {list(spec.planes)} were asked for"
        )
    height, width = bottom - top, right - left
    expected = height * width * sum(bytes_per_pixel(name) for name in spec.planes)
    if len(payload) != expected:
        raise ValueError(f"it came with {len(payload)} bytes of pixels; {expected} are right for its box")
    out: dict[PlaneName, NDArray[Any]] = {}
    at = 0
    for name in spec.planes:
        kind, channels = _PIXELS[name]
        shape = (height, width, channels)
        part = np.frombuffer(payload, kind, math.prod(shape), at).reshape(shape)
        at += part.nbytes
        out[name] = np.zeros((size, size, channels), kind)
        out[name][top:bottom, left:right] = part
    return out


def encode_view(
    planes: Mapping[PlaneName, NDArray[Any]], told: Mapping[str, float], spec: RenderSpec, camera: Camera
) -> EncodedView:
    """Encode the planes of a view [H, W, C], and measure its picture; `told` are facts that the child measured."""
    started = time.perf_counter()
    rgba = premultiplied_linear_to_rgba8(planes["rgba"])
    facts = {**told, **view_facts(rgba, camera)}
    encoded: dict[PlaneName, Plane] = {}
    for name, pixels in planes.items():
        if name == "rgba":
            encoded[name] = encode_rgba(rgba, spec.codec)
        elif name == "depth":
            encoded[name] = encode_data(name, pixels[..., 0], spec.codec, depth_scale(spec))
        else:
            encoded[name] = encode_data(name, pixels, spec.codec)
    return EncodedView(encoded, facts, time.perf_counter() - started)
