"""The EXR that Blender saves, read where it lies: files written by hand, to the byte."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from render.frame import FrameError, Passes

FLOAT, HALF = 2, 1
RGBA = ["ViewLayer.Combined.A", "ViewLayer.Combined.B", "ViewLayer.Combined.G", "ViewLayer.Combined.R"]


def exr(
    channels: Sequence[str],
    values: np.ndarray[Any, Any],
    *,
    kind: int = FLOAT,
    flags: int = 0,
    window: tuple[int, int] = (0, 0),
    **attributes: bytes,
) -> bytes:
    """Return an uncompressed file of values [H, C, W] float32, channels in the order that is given."""
    height, _, width = values.shape
    left, top = window
    listed = b"".join(name.encode() + b"\0" + struct.pack("<iB3xii", kind, 0, 1, 1) for name in channels) + b"\0"
    box = struct.pack("<4i", left, top, left + width - 1, top + height - 1)
    fields: Mapping[str, tuple[bytes, bytes]] = {
        "channels": (b"chlist", listed),
        "compression": (b"compression", b"\0"),
        "dataWindow": (b"box2i", box),
        "displayWindow": (b"box2i", box),
        "lineOrder": (b"lineOrder", b"\0"),
    } | {name: (b"string", value) for name, value in attributes.items()}
    out = b"v/1\x01" + struct.pack("<I", 2 | flags)
    for name, (type_name, value) in fields.items():
        out += name.encode() + b"\0" + type_name + b"\0" + struct.pack("<i", len(value)) + value
    out += b"\0"
    rows = [struct.pack("<ii", top + y, row.nbytes) + row.tobytes() for y, row in enumerate(values.astype("<f4"))]
    starts = np.cumsum([8 * height + len(out), *[len(row) for row in rows[:-1]]])
    return out + struct.pack(f"<{height}Q", *starts) + b"".join(rows)


def numbered(height: int, num_channels: int, width: int) -> np.ndarray[Any, Any]:
    """Return values [H, C, W], each its own place: 100 row + 10 channel + column."""
    row, channel, column = np.ogrid[:height, :num_channels, :width]
    return np.asarray(100 * row + 10 * channel + column, np.float32)


def test_rows_and_channels_come_in_their_order() -> None:
    found = Passes(exr(RGBA, numbered(2, 4, 3))).get("Combined", "RGBA")
    assert (found.shape, found.dtype) == ((2, 3, 4), np.float32)
    for y in range(2):
        for x in range(3):
            assert found[y, x].tolist() == [100 * y + 30 + x, 100 * y + 20 + x, 100 * y + 10 + x, 100 * y + x]
    assert found.flags.c_contiguous


def test_arrays_are_copies() -> None:
    data = bytearray(exr(RGBA, numbered(2, 4, 3)))
    found = Passes(memoryview(data)).get("Combined", "A")  # type: ignore[arg-type]
    data[-48:] = bytes(48)
    assert found[1, 0, 0] == 100


def test_a_window_that_does_not_start_at_the_origin() -> None:
    found = Passes(exr(RGBA, numbered(2, 4, 3), window=(-5, 70))).get("Combined", "A")
    assert found[..., 0].tolist() == [[0, 1, 2], [100, 101, 102]]


def test_passes_whose_names_end_alike_are_told_apart() -> None:
    """With the denoiser's guides stored, "Normal" is the end of "Denoising Normal"."""
    names = ["L.Denoising Normal.X", "L.Depth.Z", "L.Normal.X"]
    passes = Passes(exr(names, numbered(1, 3, 1)))
    assert passes.get("Normal", "X").item() == 20
    assert passes.get("Denoising Normal", "X").item() == 0
    assert passes.get("Depth", "Z").item() == 10


def test_a_layers_name_may_hold_dots() -> None:
    """A .blend file names its view layers as it likes."""
    passes = Passes(exr(["a.b.Combined.A", "a.b.Combined.R"], numbered(1, 2, 1)))
    assert passes.get("Combined", "RA").tolist() == [[[10, 0]]]


def test_what_blender_writes_beside_the_layers_is_no_pass() -> None:
    names = ["Composite.Combined.R", "Combined.R", "R"]
    with pytest.raises(FrameError, match=r"no pass Depth\.Z"):
        Passes(exr(names, numbered(1, 3, 1))).get("Depth", "Z")


@pytest.mark.parametrize(("name", "channels"), [("Combined", "RGBX"), ("Depth", "Z"), ("combined", "A"), ("ined", "A")])
def test_a_pass_or_a_channel_that_is_not_there_is_named(name: str, channels: str) -> None:
    with pytest.raises(FrameError, match=rf"no pass {name}\.[XZA]; it has ViewLayer.Combined.A, "):
        Passes(exr(RGBA, numbered(1, 4, 1))).get(name, channels)


def test_a_channel_of_two_layers_is_refused() -> None:
    with pytest.raises(FrameError, match=r"no pass Combined\.R; it has a\.Combined\.R"):
        Passes(exr(["a.Combined.R", "b.Combined.R"], numbered(1, 2, 1))).get("Combined", "R")


def test_other_files_are_refused() -> None:
    good = exr(RGBA, numbered(2, 4, 3))
    for data in (b"", b"v/1", b"\x89PNG\r\n\x1a\n", b"X" + good[1:]):
        with pytest.raises(FrameError, match="instead of an EXR"):
            Passes(data)
    for change in ({"compression": b"\3"}, {"lineOrder": b"\1"}):
        with pytest.raises(FrameError, match="compressed or reordered"):
            Passes(exr(RGBA, numbered(2, 4, 3), **change))
    with pytest.raises(FrameError, match=r"ViewLayer\.Combined\.A.* is not 32-bit float"):
        Passes(exr(RGBA, numbered(2, 4, 3), kind=HALF))


@pytest.mark.parametrize("flags", [0x200, 0x800, 0x1000])
def test_tiles_deep_data_and_several_parts_are_refused(flags: int) -> None:
    """Blender 5 writes a part for each pass unless told otherwise: the first header alone would be read as all."""
    with pytest.raises(FrameError, match="tiled, deep or multipart"):
        Passes(exr(RGBA, numbered(2, 4, 3), flags=flags))
    assert Passes(exr(RGBA, numbered(2, 4, 3), flags=0x400)).get("Combined", "A").shape == (2, 3, 1)  # long names


@pytest.mark.parametrize("num_bytes", [5, 40, 200, -50, -4])
def test_a_file_that_ends_early_is_refused(num_bytes: int) -> None:
    with pytest.raises(FrameError, match=r"EXR (that|whose header) ends early, after \d+ bytes"):
        Passes(exr(RGBA, numbered(2, 4, 3))[:num_bytes])
