"""Pictures decoded straight into a batch: libwebp by its C interface where the process has one, else OpenCV.

OpenCV's wheel holds a libwebp of its own and returns a new array in BGRA order, which is turned and then copied to its
place. Pillow's wheel brings a shared libwebp whose `WebPDecodeRGBAInto` writes RGBA where it is told to. The decoders
are equally fast; what is saved is the array, the turn and the copy. Four 512^2 renders of 135 KB, CPU of one thread:
this way 7.6 ms, OpenCV 10.1 and with the turn to RGBA 13.0, Pillow's own decoder 17.4. Lossless pixels are equal by
definition, and a test compares all three. ctypes lets go of the GIL for the call.

libwebp is looked for among the libraries that Pillow has loaded into the process, then under the system's name. Where
there is none (or another ABI), and for PNG, OpenCV decodes and one copy is made.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.sample import SampleError, decode_rgba

_DECODER_ABI = 0x0209
_LIBRARY = re.compile(r"\S*/libwebp(-[0-9a-f]+)?\.so(\.\d+)*$")


class _Features(ctypes.Structure):
    """WebPBitstreamFeatures of webp/decode.h."""

    _fields_ = (
        ("width", ctypes.c_int), ("height", ctypes.c_int), ("has_alpha", ctypes.c_int),
        ("has_animation", ctypes.c_int), ("format", ctypes.c_int), ("pad", ctypes.c_uint32 * 5),
    )  # fmt: skip


@lru_cache(maxsize=1)
def libwebp() -> Any:
    """Return the process's libwebp with its two functions declared, or None."""
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
            features, decode = library.WebPGetFeaturesInternal, library.WebPDecodeRGBAInto
        except (OSError, AttributeError):
            continue
        features.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(_Features), ctypes.c_int]
        features.restype = ctypes.c_int
        decode.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        decode.restype = ctypes.c_void_p
        if library.WebPGetDecoderVersion() >= 0x010000:
            return library
    return None


def _candidates() -> list[str]:
    from PIL import features

    found: list[str] = []
    maps = Path("/proc/self/maps")
    if features.check("webp") and maps.exists():
        paths = (line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines())
        found += dict.fromkeys(path for path in paths if _LIBRARY.fullmatch(path))
    system = ctypes.util.find_library("webp")
    return found + ([system] if system else [])


def decode_rgba_into(data: bytes | memoryview, out: NDArray[np.uint8]) -> None:
    """Decode an encoded rgba plane to straight RGBA in `out`, uint8 [H, W, 4], contiguous.

    Raises:
        SampleError: if the bytes are not an 8-bit image of this size with four channels.
    """
    height, width = out.shape[:2]
    assert out.flags.c_contiguous
    assert out.shape == (height, width, 4)
    library = libwebp() if bytes(data[:4]) == b"RIFF" and bytes(data[8:12]) == b"WEBP" else None
    if library is None:
        image = decode_rgba(data)
        _check_size(image.shape[1], image.shape[0], out)
        out[...] = image
        return
    array, features = np.frombuffer(data, np.uint8), _Features()
    address = array.ctypes.data
    status = library.WebPGetFeaturesInternal(address, array.size, ctypes.byref(features), _DECODER_ABI)
    if status or features.has_animation or not features.has_alpha:
        raise SampleError(f"rgba plane of {array.size} bytes does not decode to an 8-bit RGBA image")
    _check_size(features.width, features.height, out)
    if not library.WebPDecodeRGBAInto(address, array.size, out.ctypes.data, out.nbytes, 4 * width):
        raise SampleError(f"rgba plane of {array.size} bytes does not decode to an 8-bit RGBA image")


def _check_size(width: int, height: int, out: NDArray[np.uint8]) -> None:
    if (height, width) != out.shape[:2]:
        raise SampleError(f"image of {width} x {height} px, camera of {out.shape[1]} x {out.shape[0]} px")
