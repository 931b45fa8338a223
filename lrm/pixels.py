"""From encoded views to pixels: composited on a background, resized and cut, with the intrinsics that belong to them.

Blending is done on sRGB values, as the paper's targets are. It is affine in the premultiplied colour, so doing it
before a linear resize equals resizing premultiplied colour and alpha and blending after.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lrm.cameras import crop_intrinsics, resize_intrinsics
from lrm.webp import decode_rgba_into
from pipeline.sample import SampleError
from pipeline.shard import DamagedDataError
from pipeline.types import Camera, Float64

Float32 = NDArray[np.float32]
Uint8 = NDArray[np.uint8]
WHITE = (1.0, 1.0, 1.0)
_scratch = threading.local()


def over_background(rgba: NDArray[np.uint8], background: Sequence[float] = WHITE) -> Float32:
    """Composite straight sRGB RGBA uint8 [H, W, 4] over a colour in [0, 1]: float32 [H, W, 3] in [0, 1]."""
    colour = np.asarray(background, np.float32)
    out: Float32 = rgba[..., :3].astype(np.float32)
    out -= 255 * colour
    out *= rgba[..., 3:].astype(np.float32) * np.float32(1 / 255**2)
    out += colour
    return np.clip(out, 0, 1, out=out)


def over_white(rgba: NDArray[np.uint8]) -> Float32:
    """Composite straight sRGB RGBA uint8 [H, W, 4] over white: float32 [H, W, 3] in [0, 1]."""
    return over_background(rgba)


def resize_image(image: Float32, width: int, height: int) -> Float32:
    """Resize [H, W, 3] by area where it shrinks, bilinear where it grows; pixel edges map to pixel edges."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = width <= image.shape[1] and height <= image.shape[0]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """A part of a resized view: its pixels [P, P, 3] and the intrinsics [3, 3] that belong to them."""

    image: Float32
    intrinsics: Float64


def cut_window(image: Float32, intrinsics: Float64, size_px: int, left_px: int, top_px: int, window_px: int) -> Window:
    """Resize a view [H, W, 3] to a square of size_px and cut a square window, with exact intrinsics."""
    height, width = image.shape[:2]
    resized = resize_image(image, size_px, size_px)
    k = crop_intrinsics(resize_intrinsics(intrinsics, size_px / width, size_px / height), left_px, top_px)
    return Window(image=resized[top_px : top_px + window_px, left_px : left_px + window_px], intrinsics=k)


def decode_view_into(data: bytes | memoryview, camera: Camera, name: str, out: NDArray[np.uint8]) -> None:
    """Decode an rgba plane to straight RGBA uint8 in `out` [H, W, 4].

    Raises:
        DamagedDataError: naming the sample, if it is not an image of the camera's size, or that is not the size of out.
    """
    if out.shape[:2] != (camera.height, camera.width):
        raise DamagedDataError(
            f"sample {name}: camera of {camera.width} x {camera.height} px; the batch is made for "
            f"{out.shape[1]} x {out.shape[0]} px: give a background, and views are resized"
        )
    try:
        decode_rgba_into(data, out)
    except SampleError as error:
        raise DamagedDataError(f"sample {name}: {error}") from None


def decode_view(data: bytes | memoryview, camera: Camera, name: str, background: Sequence[float] = WHITE) -> Float32:
    """Decode an rgba plane to [H, W, 3] over a background.

    Raises:
        DamagedDataError: naming the sample, if it is not an image of the camera's size.
    """
    shape = (camera.height, camera.width, 4)
    rgba = getattr(_scratch, "rgba", None)  # one a thread: fresh pages for every view cost a tenth of its decoding
    if rgba is None or rgba.shape != shape:
        rgba = _scratch.rgba = np.empty(shape, np.uint8)
    decode_view_into(data, camera, name, rgba)
    return over_background(rgba, background)
