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


def check_image_size(head: bytes, name: str) -> None:
    """Refuse a PNG whose header promises more pixels than `MAX_IMAGE_PIXELS`.

    Raises:
        AssetError: TOO_LARGE.
    """
    if image_format(head) != "png" or len(head) < 24:
        return
    width, height = struct.unpack(">II", head[16:24])
    check_num_pixels(width, height, name)


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
