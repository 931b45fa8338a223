"""Decode the largest level of a KTX2 image to 8-bit pixels.

Basis Universal (ETC1S and UASTC, with their own, Zstandard or no supercompression) is transcoded by opengl-basisu, a
binding of the reference transcoder; plain 8-bit pixels are only unpacked. What the header may say is checked by
`pipeline.ktx2`; the pixels' colour space is the one that glTF gives the texture's use, whatever the file says of it.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import ktx2
from pipeline.types import AssetError, FailureKind

_CHANNELS = "rgba"


def decode_ktx2(data: bytes, name: str) -> NDArray[np.uint8]:
    """Return the pixels [H, W, 3 or 4] of a KTX2 image, rows from the top, RGB or RGBA.

    Args:
        data: the file.
        name: what messages call the image.

    Raises:
        AssetError: CORRUPT_FILE, UNSUPPORTED_FORMAT, TOO_LARGE.
    """
    header = ktx2.read_header(data, name)
    if header.offset + header.num_bytes > len(data):
        end = header.offset + header.num_bytes
        raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: its pixels end at byte {end} of {len(data)}")
    if header.vk_format == ktx2.BASIS_FORMAT:
        return _transcode(data, name)
    level = _inflate(data[header.offset : header.offset + header.num_bytes], header, name)
    order = ktx2.PLAIN_FORMATS[header.vk_format]
    pixels = np.frombuffer(level, np.uint8).reshape(header.height, header.width, len(order))
    # A channel that a format lacks reads as 0.
    out = np.zeros((header.height, header.width, max(3, len(order))), np.uint8)
    for i, channel in enumerate(order):
        out[..., _CHANNELS.index(channel)] = pixels[..., i]
    return out


def _inflate(level: bytes, header: ktx2.Ktx2Header, name: str) -> bytes:
    """Return the level without supercompression; never more bytes than its pixels take."""
    size = header.inflated_bytes
    try:
        if header.scheme == ktx2.ZSTD:
            import pyarrow as pa

            found: Any = pa.Codec("zstd").decompress(level, decompressed_size=size, asbytes=True)
        elif header.scheme == ktx2.ZLIB:
            found = zlib.decompressobj().decompress(level, size)
        else:
            found = level
    except (OSError, ValueError, zlib.error) as error:
        raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: its pixels do not inflate: {error}") from None
    if len(found) != size:
        raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: {len(found)} bytes of pixels; {size} are required")
    return bytes(found)


def _transcode(data: bytes, name: str) -> NDArray[np.uint8]:
    try:
        import opengl_basisu
    except ImportError:
        found = f"{name} is a KTX2 image of Basis Universal; to decode it, install opengl-basisu"
        raise AssetError(FailureKind.UNSUPPORTED_FORMAT, found) from None
    try:
        texture = opengl_basisu.open(data)
        if texture.codec not in (opengl_basisu.Codec.ETC1S, opengl_basisu.Codec.UASTC_LDR_4x4):
            found = f"{name}: a KTX2 image of codec {texture.codec.name}; ETC1S and UASTC are allowed"
            raise AssetError(FailureKind.UNSUPPORTED_FORMAT, found)
        pixels = np.asarray(texture.transcode("rgba8").data, np.uint8)
    except opengl_basisu.BasisuError as error:
        raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: {error}") from None
    return pixels if texture.has_alpha else pixels[..., :3]
