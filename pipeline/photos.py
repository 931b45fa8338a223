"""Frames and masks from bytes: sizes judged before a decoder allocates, EXIF turns left alone, cut files refused.

COLMAP looks at pixels as they are stored, so an EXIF orientation must not be applied: the poses would belong to another
picture. Decoders promise a size and fill it with grey where a file ends early; so the header's size is held against a
limit first, and a JPEG must have its end.

A JPEG has no checksum: a file whose middle is zeros, as a broken download leaves it, decodes to a smear. The decoder
notices that its data came to an end too early or too late, and warns; OpenCV and Pillow drop the warning. TurboJPEG
through simplejpeg hands it over, gives the very pixels that OpenCV does (both are libjpeg-turbo), and takes half its
time at full size. A small hole may by chance last as long as what it replaced; where zeros cannot mean a flat area,
they are refused as such.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline import sniff
from pipeline.types import AssetError, FailureKind

UInt8 = NDArray[np.uint8]

MAX_PIXELS = 2**27
"""Largest frame, 134 megapixels: 0.4 GB decoded."""
MAX_FRAME_BYTES = 2**27

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_REDUCED = {
    1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8
}  # fmt: skip
_DAMAGE = re.compile(
    r"Premature end|premature end|bad (?:Huffman|arithmetic) code|instead of RST|(\d+) extraneous bytes"
)
_ZEROS = bytes(64)
MAX_EXTRANEOUS_BYTES = 16
"""Some cameras pad their pictures by a few bytes, which is no damage; 16 zeroed bytes of a photo made 40 of them."""


def image_size(data: bytes, name: str) -> tuple[str, int, int]:
    """Return (format, width, height) of an image from its header, without decoding it.

    Raises:
        AssetError: CORRUPT_FILE where it is no image that we read, TOO_LARGE where it promises too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                kind, (width, height) = str(image.format), image.size
    except Image.DecompressionBombError as error:
        raise AssetError(FailureKind.TOO_LARGE, f"{name!a}: {error}") from None
    except (OSError, ValueError, SyntaxError, OverflowError, MemoryError):
        what = sniff.error_page(data[: sniff.HEAD_BYTES], len(data)) or sniff.describe(data[:64])
        raise AssetError(FailureKind.CORRUPT_FILE, f"{name!a} is no image: {len(data)} bytes, {what}") from None
    if width * height > MAX_PIXELS or min(width, height) < 1:
        message = f"{name!a} has {width} x {height} px; at most {MAX_PIXELS} pixels are allowed"
        raise AssetError(FailureKind.TOO_LARGE, message)
    return kind, width, height


def decode_photo(data: bytes, name: str, shrink: int = 1) -> tuple[UInt8, int, int]:
    """Decode a frame to BGR [H / shrink, W / shrink, 3] as it is stored; return it with its own width and height.

    Raises:
        AssetError: CORRUPT_FILE or TOO_LARGE.
    """
    kind, width, height = image_size(data, name)
    if kind == "JPEG" and not _jpeg_ends(data):
        raise AssetError(FailureKind.CORRUPT_FILE, f"{name!a}: a JPEG of {len(data)} bytes without its end")
    if kind == "JPEG":
        return _decode_jpeg(data, name, width, height, shrink), width, height
    image = _imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, name)
    return shrunk(image, shrink) if shrink > 1 else image, width, height


def _decode_jpeg(data: bytes, name: str, width: int, height: int, shrink: int) -> UInt8:
    """Decode a JPEG to BGR [ceil(H / shrink), ceil(W / shrink), 3], and refuse what the decoder warns of as damage."""
    sides = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)}
    try:
        tall, wide, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (wide, tall) == (width, height) and colours in ("YCbCr", "Gray", "RGB"):
            image = np.asarray(simplejpeg.decode_jpeg(data, "BGR", **sides, strict=True), np.uint8)
            if _zeroed(data):
                raise AssetError(FailureKind.CORRUPT_FILE, f"{name!a}: damaged within: a run of zeros in its data")
            return image
    except ValueError as error:
        found = _DAMAGE.search(str(error))
        if found is not None and (found[1] is None or int(found[1]) > MAX_EXTRANEOUS_BYTES):
            raise AssetError(FailureKind.CORRUPT_FILE, f"{name!a}: damaged within: {str(error)[:100]}") from None
    # Inks instead of colours, and warnings that are no damage.
    return _imdecode(data, _REDUCED[shrink] | cv2.IMREAD_IGNORE_ORIENTATION, name)


def _jpeg_ends(data: bytes) -> bool:
    """Whether an end of image follows the first scan; phones append films behind it, which hold markers of any kind."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return data.find(b"\xff\xd9", at) >= 0
        if data[at + 1] == 0xFF:  # a filler
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")


def _zeroed(data: bytes) -> bool:
    """Whether the first scan holds a run of zeros that its codes cannot mean.

    Zero bits are the shortest code of a Huffman table. If that is the end of a block in all tables of the scan, as in
    optimised files of flat pictures, zeros are a flat area; else they are blocks of nothing but equal high frequencies,
    which no picture has. Progressive files code otherwise, and are not judged.
    """
    at, ends = 2, dict[int, bool]()  # whether the shortest code of an AC table is the end of a block
    while at + 4 <= len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        part = data[at + 4 : at + 2 + length]
        if kind == 0xDA:
            used = [part[2 + 2 * i] & 15 for i in range(part[0])] if part and len(part) >= 1 + 2 * part[0] else []
            words = np.frombuffer(data, np.uint64, (len(data) - at) // 8, at)
            if all(ends.get(table, True) for table in used) or words.all():
                return False  # in 0.2 ms a megabyte; to look for the run itself takes 1
            return data.find(_ZEROS, at, data.find(b"\xff\xd9", at)) >= 0
        if kind == 0xC4:
            ends |= _shortest_ends(part)
        elif 0xC2 <= kind <= 0xCF and kind not in (0xC8, 0xCC):
            return False
        at += 1 if kind == 0xFF else 2 + length
    return False


def _shortest_ends(tables: bytes) -> dict[int, bool]:
    """Return by number whether the shortest code of each AC table in a DHT segment is the end of a block."""
    at, found = 0, dict[int, bool]()
    while at + 17 < len(tables):
        if tables[at] >> 4 == 1:
            found[tables[at] & 15] = tables[at + 17] == 0
        at += 17 + sum(tables[at + 1 : at + 17])
    return found


def shrunk(image: UInt8, factor: int) -> UInt8:
    """Average factor x factor pixels of an image; what is left at the right and bottom is filled by repetition."""
    rows, columns = (-size % factor for size in image.shape[:2])
    if rows or columns:
        image = np.asarray(cv2.copyMakeBorder(image, 0, rows, 0, columns, cv2.BORDER_REPLICATE), np.uint8)
    size = (image.shape[1] // factor, image.shape[0] // factor)
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def decode_mask(data: bytes, name: str, check: Callable[[int, int], None] | None = None) -> UInt8:
    """Decode a mask to [H, W] uint8: its alpha where it has one that says something, else its brightest channel.

    Masks of 0 and 1, and those of 16 bits, are brought to 0 to 255.

    Args:
        check: is given width and height of the header, and raises where such a mask is not to be decoded.

    Raises:
        AssetError: CORRUPT_FILE, TOO_LARGE, or what `check` raises.
    """
    kind, width, height = image_size(data, name)
    if check is not None:
        check(width, height)
    if kind == "JPEG":
        image = _decode_jpeg(data, name, width, height, 1)
    else:
        image = _imdecode(data, cv2.IMREAD_UNCHANGED, name)
    if image.dtype == np.uint16:
        image = (image >> 8 if image.max() > 255 else image).astype(np.uint8)  # some store 0 to 255 in 16 bits
    if image.dtype != np.uint8:
        raise AssetError(FailureKind.CORRUPT_FILE, f"{name!a}: a mask of {image.dtype}; 8 or 16 bits are read")
    if image.ndim == 3:
        alpha = image[..., 3] if image.shape[2] == 4 else None
        image = alpha if alpha is not None and alpha.min() < 255 else image[..., :3].max(axis=2)
    if 0 < int(image.max()) <= 1:
        image = image * np.uint8(255)
    return np.ascontiguousarray(image, np.uint8)


def _imdecode(data: bytes, flags: int, name: str) -> UInt8:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise AssetError(FailureKind.CORRUPT_FILE, f"{name!a}: an image of {len(data)} bytes that cannot be decoded")
    return np.asarray(image)
