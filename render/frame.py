"""Pixels out of Blender: an uncompressed multilayer EXR in anonymous memory, read where it lies.

`Render Result` gives its pixels to no script when Blender has no window, so the render is saved: to a memfd, so that no
image file touches a disk. The file is read as the format's specification lays it out,

    | magic, version | attributes: name, type, size, value | offsets: u64 a row | rows: y, size, channel by channel |

which takes 3 ms for the four channels of a picture of 512^2; loading it as a Blender image takes 10 ms, and Blender
opens only one layer of several.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_MAGIC = b"v/1\x01"
_OTHER_LAYOUTS = 0x200 | 0x800 | 0x1000  # bits of the version: tiles, deep data, several parts
_MAX_HEADER_BYTES = 2**16


class FrameError(RuntimeError):
    """Blender wrote something else than the uncompressed float EXR that was asked for."""


class Frame:
    """The memory that renders are saved into; `close` frees it."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("lrm-frame")

    def close(self) -> None:
        """Free the memory."""
        os.close(self._fd)

    def take(self, scene: Any, *, layers: bool) -> Passes:
        """Save what was rendered last and return its passes; without `layers` the combined one alone, in half the time.

        They hold until the next call, which writes into the same memory.
        """
        import bpy

        from render import versions

        versions.set_exr_output(scene.render.image_settings, layers=layers)
        bpy.data.images["Render Result"].save_render(f"/proc/self/fd/{self._fd}", scene=scene)
        return Passes(mmap.mmap(self._fd, os.fstat(self._fd).st_size, access=mmap.ACCESS_READ))


class Passes:
    """The passes of one render; the arrays that it gives are copies."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        try:
            attributes, start = _header(data)
        except (IndexError, ValueError, struct.error):
            raise FrameError(f"Blender wrote an EXR whose header ends early, after {len(data)} bytes") from None
        self._channels = _channel_names(attributes["channels"])
        left, top, right, bottom = struct.unpack("<4i", attributes["dataWindow"])
        self._height, width = bottom - top + 1, right - left + 1
        if attributes["compression"] != b"\0" or attributes["lineOrder"] != b"\0":
            raise FrameError("Blender wrote a compressed or reordered EXR")
        start += 8 * self._height  # rows stand one after the other: their offsets say nothing new
        row = 2 + len(self._channels) * width
        if len(data) < start + 4 * self._height * row:
            raise FrameError(f"Blender wrote an EXR that ends early, after {len(data)} bytes")
        values = np.frombuffer(data, np.float32, count=self._height * row, offset=start)
        self._planar = values.reshape(self._height, row)[:, 2:].reshape(self._height, len(self._channels), width)

    def get(self, name: str, channels: str) -> NDArray[np.float32]:
        """Return a pass as [H, W, C], top row first, such as get("Combined", "RGBA").

        Raises:
            FrameError: if the render has no such pass.
        """
        planes = []
        for channel in channels:
            found = [c for c in self._channels if c.rsplit(".", 2)[1:] == [name, channel]]
            if not found and name == "Combined" and channel in self._channels:
                found = [channel]  # a file without layers
            if len(found) != 1:
                raise FrameError(f"the render has no pass {name}.{channel}; it has {', '.join(self._channels)}")
            planes.append(self._planar[:, self._channels.index(found[0])])
        # Several times faster than strided copies by numpy.
        return np.asarray(cv2.merge(planes), np.float32).reshape(*planes[0].shape, len(planes))


def _header(data: mmap.mmap | bytes) -> tuple[dict[str, bytes], int]:
    """Return the attributes and where the offsets start."""
    head = bytes(data[:_MAX_HEADER_BYTES])
    if head[:4] != _MAGIC:
        raise FrameError(f"Blender wrote {head[:4]!r} instead of an EXR")
    if struct.unpack_from("<I", head, 4)[0] & _OTHER_LAYOUTS:
        raise FrameError("Blender wrote a tiled, deep or multipart EXR")
    attributes, at = {}, 8
    while head[at]:
        name_end = head.index(b"\0", at)
        type_end = head.index(b"\0", name_end + 1)
        (size,) = struct.unpack_from("<i", head, type_end + 1)
        attributes[head[at:name_end].decode()] = head[type_end + 5 : type_end + 5 + size]
        at = type_end + 5 + size
    return attributes, at + 1


def _channel_names(value: bytes) -> list[str]:
    names, at = [], 0
    while value[at]:
        end = value.index(b"\0", at)
        if struct.unpack_from("<i", value, end + 1)[0] != 2:
            raise FrameError(f"channel {value[at:end]!r} is not 32-bit float")
        names.append(value[at:end].decode())
        at = end + 17
    return names
