"""What bytes look like, from their first few: error pages that pose as assets, and the magic of known formats."""

from __future__ import annotations

import json
import re
import struct

from pipeline.types import AssetError, FailureKind

HEAD_BYTES = 4096

_HTML = re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_XML_ERROR = re.compile(rb"<(error|errordocument|listbucketresult)\b", re.IGNORECASE)
_ERROR_KEYS = frozenset({"error", "errors", "message", "detail", "code", "status", "statuscode"})
_MAGICS = (
    (b"glTF", "a binary glTF"),
    (b"\x1f\x8b", "a gzip stream"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard stream"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"PXR-USDC", "a binary USD file"),
    (b"#usda", "a text USD file"),
    (b"Kaydara FBX Binary", "a binary FBX file"),
    (b"BLENDER", "a Blender file"),
    (b"ply", "a PLY file"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"\xabKTX 20\xbb", "a KTX2 texture"),
    (b"%PDF", "a PDF document"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x7fELF", "an executable"),
)


def error_page(head: bytes, num_bytes: int) -> str | None:
    """Return what a body is that a server, a proxy or git put in place of the file, or None.

    Args:
        head: the first HEAD_BYTES of the body, or all of it where it is shorter.
        num_bytes: size of the whole body.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        if _HTML.search(text[:1024]):
            return "an HTML page"
        if _XML_ERROR.search(text[:1024]):
            return "an XML error page"
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-LFS pointer"
    if text.startswith(b"{") and num_bytes <= HEAD_BYTES:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        keys = {key.lower() for key in value}
        if keys & _ERROR_KEYS and not keys & {"asset", "meshes", "nodes"}:
            return "a JSON error body"
    return None


def describe(head: bytes) -> str:
    """Return a few words on what a file that starts with these bytes looks like, for messages."""
    for magic, name in _MAGICS:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    text = head.lstrip()
    if text.startswith(b"{"):
        return "JSON text"
    if text.startswith(b"<"):
        return "XML text"
    return f"bytes {head[:8].hex(' ')}"


MAX_IMAGE_PIXELS = 2**28
"""Largest texture: 16384 x 16384. Blender takes 4 bytes a pixel at once; a flat PNG of any size is small on disk."""


IMAGE_HEAD_BYTES = 1 << 18
"""How much of an image is looked at: cameras put previews and colour profiles before the size of a JPEG."""


def check_image_size(head: bytes, name: str) -> None:
    """Refuse an image whose header promises more pixels than `MAX_IMAGE_PIXELS`.

    Args:
        head: the first IMAGE_HEAD_BYTES of it.
        name: for the message.

    Raises:
        AssetError: TOO_LARGE.
    """
    size = image_size(head)
    if size is not None:
        check_num_pixels(*size, name)


def image_size(head: bytes) -> tuple[int, int] | None:
    """Return (width, height) in pixels as the header of a PNG, JPEG, WebP, GIF or BMP says, None for anything else."""
    found = image_format(head)
    try:
        if found == "png":
            width, height = struct.unpack_from(">II", head, 16)
        elif found == "gif":
            width, height = struct.unpack_from("<HH", head, 6)
        elif found == "bmp":
            width, height = struct.unpack_from("<ii", head, 18)
        elif found == "jpeg":
            return _jpeg_size(head)
        elif found == "webp":
            return _webp_size(head)
        else:  # of other kinds the memory that a child may hold is the bound
            return None
    except struct.error:
        return None
    return abs(width), abs(height)


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    """Walk the segments of a JPEG to its frame header: marker, length, precision, height, width."""
    place = 2
    while place + 9 <= len(head) and head[place] == 0xFF:
        marker = head[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", head, place + 5)
            return width, height
        if marker == 0xFF or 0xD0 <= marker <= 0xD8 or marker == 0x01:  # padding, or a marker that stands alone
            place += 1 if marker == 0xFF else 2
        else:
            place += 2 + int.from_bytes(head[place + 2 : place + 4], "big")
    return None


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Read the size from the first chunk of a WebP: lossy, lossless, or extended."""
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and head[20:21] == b"\x2f":
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and len(head) >= 30:
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    return None


def check_num_pixels(width: int, height: int, name: str) -> None:
    """Refuse an image of more than `MAX_IMAGE_PIXELS`.

    Raises:
        AssetError: TOO_LARGE.
    """
    if width * height > MAX_IMAGE_PIXELS:
        raise AssetError(
            FailureKind.TOO_LARGE, f"{name} has {width} x {height} px; at most {MAX_IMAGE_PIXELS} pixels are allowed"
        )


def image_format(head: bytes) -> str | None:
    """Return the format of an image that Blender or `render.ktx2` decodes, or None for anything else."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith(b"\xabKTX 20\xbb"):
        return "ktx2"
    # Not allowed by glTF, but Blender reads them and real exporters write them.
    other = ((b"GIF8", "gif"), (b"BM", "bmp"), (b"DDS ", "dds"), (b"II*\x00", "tiff"), (b"MM\x00*", "tiff"))
    return next((name for magic, name in other if head.startswith(magic)), None)
