"""The header of a KTX2 image, judged before its pixels are decoded.

    "\\xabKTX 20\\xbb\\r\\n\\x1a\\n" | vkFormat u32 | typeSize u32 | width u32 | height u32 | depth u32 | layers u32 |
    faces u32 | levels u32 | supercompression u32 | 8 x u32 and 2 x u64 of index |
    per level, largest first: offset u64, bytes u64, uncompressed bytes u64

glTF's own rule (KHR_texture_basisu) is one 2D image of Basis Universal, ETC1S or UASTC; real files also hold plain
8-bit pixels, as the Khronos sample AnisotropyBarnLamp does. Everything else is refused by name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pipeline import sniff
from pipeline.types import AssetError, FailureKind

_HEADER = struct.Struct("<12s9I")
_LEVEL = struct.Struct("<3Q")
_LEVELS_AT = 80

PLAIN_FORMATS = {
    9: "r", 15: "r",
    16: "rg", 22: "rg",
    23: "rgb", 29: "rgb", 30: "bgr", 36: "bgr",
    37: "rgba", 43: "rgba", 44: "bgra", 50: "bgra",
}  # fmt: skip
"""Channels, a byte each, of the vkFormats that are plain 8-bit pixels: UNORM and SRGB of each."""

BASIS_FORMAT = 0
"""VK_FORMAT_UNDEFINED: the pixels are in a format of Basis Universal."""

NO_SCHEME, BASIS_LZ, ZSTD, ZLIB = 0, 1, 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Ktx2Header:
    """What a KTX2 file says of its largest level.

    Attributes:
        vk_format: BASIS_FORMAT, or a key of PLAIN_FORMATS.
        width, height: pixels.
        scheme: supercompression: NO_SCHEME, BASIS_LZ, ZSTD or ZLIB.
        offset, num_bytes: where the level lies in the file.
        inflated_bytes: size of the level without ZSTD or ZLIB.
    """

    vk_format: int
    width: int
    height: int
    scheme: int
    offset: int
    num_bytes: int
    inflated_bytes: int


def read_header(head: bytes, name: str) -> Ktx2Header:
    """Return what the first bytes of a KTX2 file say.

    Args:
        head: at least the first 104 bytes, where the file has as many.
        name: what messages call the image.

    Raises:
        AssetError: CORRUPT_FILE, UNSUPPORTED_FORMAT for what is no single 2D image in a format that can be decoded,
            TOO_LARGE for more pixels than a texture may have.
    """
    if len(head) < _LEVELS_AT + _LEVEL.size:
        raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: a KTX2 image cut off in its header")
    _, vk_format, _, width, height, depth, layers, faces, _, scheme = _HEADER.unpack_from(head)
    offset, num_bytes, inflated = _LEVEL.unpack_from(head, _LEVELS_AT)
    if not (width and height and depth == 0 and layers <= 1 and faces == 1):
        found = f"{width} x {height} x {depth} px, {layers} layers, {faces} faces"
        raise AssetError(FailureKind.UNSUPPORTED_FORMAT, f"{name}: a KTX2 image of {found}; one 2D image is allowed")
    sniff.check_num_pixels(width, height, name)
    if vk_format not in (BASIS_FORMAT, *PLAIN_FORMATS) or scheme not in (NO_SCHEME, BASIS_LZ, ZSTD, ZLIB):
        found = f"vkFormat {vk_format} with supercompression {scheme}"
        allowed = "Basis Universal and plain 8-bit pixels are decoded; convert the image to one of them, or to PNG"
        raise AssetError(FailureKind.UNSUPPORTED_FORMAT, f"{name}: a KTX2 image of {found}; {allowed}")
    header = Ktx2Header(
        vk_format=vk_format, width=width, height=height, scheme=scheme,
        offset=offset, num_bytes=num_bytes, inflated_bytes=num_bytes if scheme == NO_SCHEME else inflated,
    )  # fmt: skip
    _check_size(header, name)
    return header


def _check_size(header: Ktx2Header, name: str) -> None:
    """Refuse a level whose size is not its pixels': what it inflates to is allocated by this number."""
    if header.vk_format == BASIS_FORMAT:
        # UASTC has 16 bytes a block of 4 x 4; ETC1S is bounded by its own bytes, and states no size (0).
        most = 16 * -(-header.width // 4) * -(-header.height // 4)
        if header.scheme in (ZSTD, ZLIB) and header.inflated_bytes > most:
            found = f"a level of {header.inflated_bytes} bytes"
            raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: KTX2 with {found}; its pixels take {most}")
        return
    size = header.width * header.height * len(PLAIN_FORMATS[header.vk_format])
    if header.scheme == BASIS_LZ or header.inflated_bytes != size:
        found = f"a level of {header.inflated_bytes} bytes by supercompression {header.scheme}"
        raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: KTX2 with {found}; its pixels take {size}")
