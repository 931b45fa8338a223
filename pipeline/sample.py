"""Planes and cameras to bytes and back.

A sample in a shard is consecutive tar members, the JSON first:

    {key}.json
    {key}.000.rgba.webp      view 0, then its other planes in the spec's order
    {key}.001.rgba.webp      view 1 ...

Pixels arrive scene-linear with premultiplied alpha, as a renderer makes them, and leave as 8-bit sRGB with straight
alpha. Always encoded here, by pinned libraries, so that equal pixels give equal bytes: PNG files of Blender hold
render times in text chunks and are never equal twice.

Lossless WebP at 512^2 takes about 50 ms to encode and releases the GIL: callers encode in threads while they render.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import SCHEMA
from pipeline.canonical import canonical_json
from pipeline.sniff import IMAGE_HEAD_BYTES, image_size
from pipeline.types import Asset, Camera, Normalization, Plane, PlaneName, Sample

MAX_JSON_BYTES = 4 * 2**20
MAX_VIEWS = 999
MAX_VIEW_PX = 4096  # as `render.resolution_px` and `capture.resolution_px` allow

# Lossless WebP: "quality" and "method" are effort. On 512^2 renders these take 50 ms a view for 54 KB; 70 and 4, the
# library's defaults, take 60 ms for the same bytes, 25 and 2 take 28 ms for 5 % more.
_WEBP_QUALITY, _WEBP_METHOD = 50, 3

# Lossy WebP: effort 2 takes half the time of 4, which OpenCV's encoder uses and does not let go of. On 512^2 views of
# photographs: 13 ms, 73.0 KB and 35.8 dB (a phone's noise included) against 26 ms, 72.6 KB and 36.0 dB.
_LOSSY_QUALITY, _LOSSY_METHOD = 95, 2


class SampleError(ValueError):
    """Bytes that should be a sample are not: names the sample and what was found."""


def linear_to_srgb(linear: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Apply the sRGB transfer curve (IEC 61966-2-1) to values clipped to [0, 1]; same shape."""
    x = np.clip(np.asarray(linear, np.float32), 0.0, 1.0)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.power(x, 1 / 2.4, dtype=np.float32) - 0.055).astype(
        np.float32
    )


def srgb_to_linear(srgb: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Invert `linear_to_srgb`; same shape, values in [0, 1]."""
    x = np.clip(np.asarray(srgb, np.float32), 0.0, 1.0)
    return np.where(x <= 0.04045, x / 12.92, np.power((x + 0.055) / 1.055, 2.4, dtype=np.float32)).astype(np.float32)


def premultiplied_linear_to_rgba8(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert scene-linear, premultiplied float pixels [H, W, 4] to straight sRGB RGBA uint8 [H, W, 4].

    Where alpha rounds to 0 the colour is 0 too, so that invisible noise costs no bytes.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 4:
        raise ValueError(f"pixels have shape {pixels.shape}; [H, W, 4] is required")
    out = np.zeros(pixels.shape, np.uint8)
    seen = pixels[..., 3] > 0
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    if len(rows):  # the rest is background, often half of a picture
        part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        out[part] = _to_rgba8(pixels[part])
    return out


def _to_rgba8(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    finite = np.nan_to_num(pixels, nan=0.0, posinf=1e4, neginf=0.0)
    alpha = np.clip(finite[..., 3:], 0.0, 1.0)
    colour = finite[..., :3] / np.maximum(alpha, 1e-6)
    out = np.empty(pixels.shape, np.uint8)
    out[..., :3] = np.rint(linear_to_srgb(colour) * 255)
    out[..., 3:] = np.rint(alpha * 255)
    out[out[..., 3] == 0] = 0
    return out


def encode_rgba(rgba: NDArray[np.uint8], codec: str) -> Plane:
    """Encode straight RGBA uint8 [H, W, 4] with a codec of the spec ("webp", "webp-q95", "png")."""
    if rgba.ndim != 3 or rgba.shape[2] != 4 or rgba.dtype != np.uint8:
        raise ValueError(f"rgba has shape {rgba.shape}, {rgba.dtype}; [H, W, 4] uint8 is required")
    if codec == "webp":
        return Plane(codec="webp", data=_lossless_webp(rgba))
    if codec == "png":
        bgra = cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA)
        return Plane(codec="png", data=_imencode(".png", bgra, [cv2.IMWRITE_PNG_COMPRESSION, 6]))
    if (rgba[..., 3] == 255).all():
        rgba = rgba.copy()
        rgba[0, 0, 3] = 254  # lossy WebP stores no alpha for an opaque picture, which would decode to three channels
    sink = io.BytesIO()
    Image.fromarray(rgba, "RGBA").save(sink, "WEBP", quality=_LOSSY_QUALITY, method=_LOSSY_METHOD)
    return Plane(codec="webp", data=sink.getvalue())


def _imencode(ending: str, bgra: NDArray[Any], flags: list[int]) -> bytes:
    ok, data = cv2.imencode(ending, bgra, flags)
    if not ok:
        raise SampleError(f"OpenCV could not encode an image of {bgra.shape[1]} x {bgra.shape[0]} px as {ending}")
    return bytes(data.tobytes())


def _lossless_webp(rgba: NDArray[np.uint8]) -> bytes:
    """Encode by Pillow: OpenCV offers no `exact`, and without it invisible pixels come back in any colour.

    Readers that scale a picture before they apply its alpha would then see green and red fringes.
    """
    sink = io.BytesIO()
    image = Image.fromarray(rgba, "RGBA")
    image.save(sink, "WEBP", lossless=True, exact=True, quality=_WEBP_QUALITY, method=_WEBP_METHOD)
    data = sink.getvalue()
    return _declare_alpha(data) if (rgba[..., 3] == 255).all() else data


def _declare_alpha(data: bytes) -> bytes:
    """Set alpha_is_used in a lossless WebP, so that an opaque picture decodes to four channels like any other.

    The bit is a hint by the format's specification and no pixel depends on it. Layout: RIFF header (12 bytes), "VP8L"
    and its size (8), 0x2f, then 14 bits of width - 1, 14 of height - 1, the hint, 3 of version.
    """
    if data[:4] != b"RIFF" or data[12:16] != b"VP8L" or data[20] != 0x2F:
        raise SampleError("lossless WebP of an unknown layout; use the Pillow of constraints.txt")
    return data[:24] + bytes([data[24] | 0x10]) + data[25:]


def depth_to_u16(depth: NDArray[np.floating[Any]], scale: float) -> NDArray[np.uint16]:
    """Quantise planar z [H, W] in world units to round(z * scale); 0 stays 0 and means background.

    Raises:
        ValueError: if a depth does not fit; `scale` is chosen so that the farthest camera's does.
    """
    steps = np.rint(np.asarray(depth, np.float64) * scale)
    if steps.max(initial=0) > 65535:
        raise ValueError(f"a depth of {float(np.max(depth)):g} units does not fit 16 bits at a scale of {scale:g}")
    return np.where(depth > 0, np.maximum(steps, 1), 0).astype(np.uint16)


def normal_to_u8(normal: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Quantise world-space unit normals [H, W, 3] to (n + 1) / 2 in 8 bits; a zero vector, background, becomes 0."""
    steps = np.rint((np.clip(normal, -1, 1) + 1) * 127.5)
    return np.where((normal != 0).any(axis=-1, keepdims=True), steps, 0).astype(np.uint8)


def albedo_to_u8(albedo: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Convert scene-linear base colour [H, W, 3] to 8-bit sRGB."""
    return np.asarray(np.rint(linear_to_srgb(albedo) * 255), np.uint8)


def encode_data(name: PlaneName, pixels: NDArray[Any], codec: str, scale: float | None = None) -> Plane:
    """Encode a data plane without loss: depth [H, W] uint16 as PNG; normal and albedo [H, W, 3] uint8 as the codec.

    Args:
        codec: codec of the spec; a lossy one is for `rgba` only, here it means lossless WebP.
        scale: of depth: stored value = round(z * scale).
    """
    shape, kind = (2, np.uint16) if name == "depth" else (3, np.uint8)
    if pixels.ndim != shape or pixels.dtype != kind:
        raise ValueError(f"{name} has shape {pixels.shape}, {pixels.dtype}; {shape} dimensions of {kind} are required")
    if name == "depth":
        data = _imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 4])
        return Plane(codec="png", data=data, scale=scale)
    if codec == "png":
        data = _imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 4])
        return Plane(codec="png", data=data)
    sink = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(sink, "WEBP", lossless=True, quality=_WEBP_QUALITY, method=_WEBP_METHOD)
    return Plane(codec="webp", data=sink.getvalue())


def decode_data(name: PlaneName, plane: Plane) -> NDArray[Any]:
    """Decode a data plane: depth to float32 [H, W] in world units (0 is background), the others to uint8 RGB [H, W, 3].

    Raises:
        SampleError: if the bytes are not such a plane.
    """
    image = _imdecode(plane.data)
    depth = name == "depth"
    if image is None or image.ndim != (2 if depth else 3) or image.dtype != (np.uint16 if depth else np.uint8):
        raise SampleError(f"{name} plane of {len(plane.data)} bytes does not decode to its kind of image")
    if not depth:
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)
    if not plane.scale or plane.scale <= 0:
        raise SampleError(f"depth plane without a scale: {plane.scale!r}")
    return image.astype(np.float32) / np.float32(plane.scale)


def decode_rgba(data: bytes | memoryview) -> NDArray[np.uint8]:
    """Decode an encoded rgba plane to straight RGBA uint8 [H, W, 4].

    Raises:
        SampleError: if the bytes are not an 8-bit image with four channels.
    """
    image = _imdecode(data)
    if image is None or image.ndim != 3 or image.shape[2] != 4 or image.dtype != np.uint8:
        raise SampleError(f"rgba plane of {len(data)} bytes does not decode to an 8-bit RGBA image")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA), np.uint8)


def _imdecode(data: bytes | memoryview) -> NDArray[Any] | None:
    """Decode an image as it is, None for what is none; a small file may not become gigabytes.

    Raises:
        SampleError: it says that it has more pixels than any view.
    """
    size = image_size(bytes(data[:IMAGE_HEAD_BYTES]))
    if size is None:  # no PNG, JPEG or WebP, and so no plane
        return None
    if size[0] * size[1] > MAX_VIEW_PX**2:
        raise SampleError(f"image of {size[0]} x {size[1]} px; a view has at most {MAX_VIEW_PX} x {MAX_VIEW_PX}")
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def sample_metadata(sample: Sample) -> dict[str, Any]:
    """Return the JSON value that stands in front of a sample's views in a shard."""
    asset, norm = sample.asset, sample.normalization
    return {
        "schema": SCHEMA,
        "key": sample.key,
        "uid": asset.uid,
        "source": asset.source,
        "license": asset.license,
        "attribution": asset.attribution,
        "asset_sha256": asset.sha256,
        "spec": sample.spec_fingerprint,
        "seed": sample.seed,
        "normalization": {
            "scale": float(norm.scale),
            "rotation": np.asarray(norm.rotation, float).tolist(),
            "translation": np.asarray(norm.translation, float).tolist(),
        },
        "quality": dict(sample.quality),
        "lights": dict(sample.lights),
        "num_views": len(sample.views),
        "views": [
            {
                "world_from_camera": view.camera.world_from_camera.tolist(),
                "intrinsics": view.camera.intrinsics.tolist(),
                "width": view.camera.width,
                "height": view.camera.height,
                "planes": {
                    name: {"codec": plane.codec, "num_bytes": len(plane.data), "crc32": plane.crc32}
                    | ({} if plane.scale is None else {"scale": plane.scale})
                    for name, plane in view.planes.items()
                },
            }
            for view in sample.views
        ],
    }


def sample_members(sample: Sample, metadata: Mapping[str, Any] | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield (member name, bytes) of a sample in the order of the shard.

    Args:
        metadata: `sample_metadata` of it, where the caller has it: it costs a CRC-32 of every plane.

    Raises:
        SampleError: if view indexes are not 0..N-1 or views differ in their planes.
    """
    if not 1 <= len(sample.views) <= MAX_VIEWS or [v.index for v in sample.views] != list(range(len(sample.views))):
        raise SampleError(
            f"{sample.key}: views {[v.index for v in sample.views]} are not 0..N-1 with N in 1..{MAX_VIEWS}"
        )
    names = list(sample.views[0].planes)
    if "rgba" not in names or any(list(view.planes) != names for view in sample.views):
        raise SampleError(f"{sample.key}: planes {names} lack rgba or differ between views")
    yield f"{sample.key}.json", canonical_json(sample_metadata(sample) if metadata is None else metadata)
    for view in sample.views:
        for name, plane in view.planes.items():
            yield f"{sample.key}.{view.index:03d}.{name}.{plane.codec}", plane.data


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleHeader:
    """The parsed JSON of a sample: who it is, and its cameras; `metadata` is the whole value."""

    key: str
    uid: str
    cameras: tuple[Camera, ...]
    plane_names: tuple[str, ...]
    normalization: Normalization
    metadata: Mapping[str, Any]


def parse_sample_json(data: bytes) -> SampleHeader:
    """Parse and check the JSON member of a sample: untrusted bytes, bounded work, typed errors.

    Raises:
        SampleError: naming the field that is wrong.
    """
    if len(data) > MAX_JSON_BYTES:
        raise SampleError(f"sample JSON has {len(data)} bytes; at most {MAX_JSON_BYTES} are allowed")
    try:
        meta = json.loads(data)
        if not isinstance(meta, dict):
            raise SampleError(f"sample JSON holds a {type(meta).__name__}, not an object")
        if meta["schema"] != SCHEMA:
            raise SampleError(f"sample {meta.get('key')!r} has schema {meta['schema']!r}; this code reads {SCHEMA}")
        views = meta["views"]
        if not 1 <= len(views) <= MAX_VIEWS or meta["num_views"] != len(views):
            raise SampleError(f"sample {meta['key']!r}: num_views {meta['num_views']!r} but {len(views)} views")
        cameras = tuple(parse_camera(view) for view in views)
        names = tuple(views[0]["planes"])
        if any(tuple(sorted(view["planes"])) != tuple(sorted(names)) for view in views):
            raise SampleError(f"sample {meta['key']!r}: planes differ between views")
        norm = meta["normalization"]
        normalization = Normalization(
            scale=float(norm["scale"]),
            rotation=np.array(norm["rotation"], np.float64).reshape(3, 3),
            translation=np.array(norm["translation"], np.float64).reshape(3),
        )
        return SampleHeader(
            key=str(meta["key"]), uid=str(meta["uid"]), cameras=cameras, plane_names=names,
            normalization=normalization, metadata=meta,
        )  # fmt: skip
    except SampleError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise SampleError(f"sample JSON is malformed: {type(error).__name__}: {error}") from None


def parse_camera(view: Mapping[str, Any]) -> Camera:
    """Return the camera of one view of a sample's JSON; raises as `parse_sample_json` does, or what a lookup raises."""
    width, height = view["width"], view["height"]
    if not all(isinstance(size, int) and 1 <= size <= 16384 for size in (width, height)):
        raise SampleError(f"view size {width!r} x {height!r} is not 1 to 16384 px")
    return Camera(
        world_from_camera=np.array(view["world_from_camera"], np.float64),
        intrinsics=np.array(view["intrinsics"], np.float64),
        width=width,
        height=height,
    )


def alpha_coverage(images: Sequence[NDArray[np.uint8]]) -> float:
    """Return the mean share of opaque pixels (alpha over one half) of RGBA images [H, W, 4]."""
    return math.fsum(float((image[..., 3] > 127).mean()) for image in images) / max(1, len(images))


def contact_sheet(images: Sequence[NDArray[np.uint8]], columns: int, background: int = 255) -> NDArray[np.uint8]:
    """Tile RGBA images of one size [H, W, 4] row by row over a plain background; RGB [rows * H, columns * W, 3]."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height, columns * width, 3), background, np.uint8)
    for i, image in enumerate(images):
        alpha = image[..., 3:].astype(np.float32) / 255
        top, left = i // columns * height, i % columns * width
        flat = image[..., :3] * alpha + background * (1 - alpha)
        sheet[top : top + height, left : left + width] = np.rint(flat).astype(np.uint8)
    return sheet


def asset_row(asset: Asset) -> dict[str, Any]:
    """Return the columns that a plan and a receipt hold of an asset."""
    return {name: getattr(asset, name) for name in Asset.__dataclass_fields__}
