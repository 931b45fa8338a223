"""Masks of a capture's frames: where they come from, and whether they can be believed.

A data set's masks are a network's output. A mask is refused by what it shows alone if it covers less than 1 % or more
than 64 % of its frame, or if its largest piece is less than 60 % of it; specks are wiped away. A mask that its frame
cuts says nothing about what lies outside: the sides are noted, and the view will end at the frame instead of calling
the unknown background. What needs the model (agreement with its points, jumps of the object's size) is judged in
`pipeline.mvimgnet`, once the object's place is known.

Where a data set has no masks a hook makes them: the `rembg` package, or any command that reads {image} and writes
{mask}. The paper used rembg for all captures. A hook's text is part of the spec's fingerprint, and stands in the row.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import math
import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.photos import MAX_FRAME_BYTES, decode_mask
from pipeline.spec import split_command
from pipeline.types import AssetError, FailureKind, Float64, UserError

UInt8 = NDArray[np.uint8]

MIN_AREA, MAX_AREA = 0.01, 0.64
"""Share of the frame: from a tenth to eight tenths of its sides, the range that published users of such masks keep."""
MIN_PIECE = 0.6
"""Least share of the mask that is one piece; a second object as large as the first gives 0.5."""
SPECK = 0.02
"""Pieces under this share of the mask are not the object: one far away would shift the crop and the box."""
BORDER = 0.003
"""A mask so near its frame's edge, in shares of the longer side, is cut by it: 6 px of 1920."""
COMMAND_TIMEOUT_S = 120.0
"""Less than the silence that a child may keep by default, so that one frame is lost and not its capture."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskFacts:
    """What one mask shows, in pixels of the mask's own frame.

    Attributes:
        area: share of the frame that is object.
        piece: share of the object that is its largest piece.
        cut: whether the left, top, right, bottom side of the frame cuts the object.
        hull: [N, 2] corners of the convex hull, pixel corners counted from the frame's.
        centroid: [2].
        fault: why the mask cannot be believed, or None.
    """

    area: float
    piece: float
    cut: tuple[bool, bool, bool, bool]
    hull: Float64
    centroid: Float64
    fault: str | None


def clean(mask: UInt8, threshold: int) -> tuple[UInt8, MaskFacts]:
    """Threshold a mask [H, W], wipe its specks away and measure it; returns 0 and 255, and the facts.

    Pieces are found on a grid of a quarter of the resolution, where a cell counts if any of its pixels does: gaps
    under 4 px do not part an object, and it costs 1 ms instead of 8.
    """
    binary = np.asarray(cv2.threshold(mask, threshold, 255, cv2.THRESH_BINARY)[1], np.uint8)
    height, width = binary.shape
    total = cv2.countNonZero(binary)
    if total == 0:
        empty = np.zeros((0, 2))
        return binary, MaskFacts(
            area=0.0, piece=0.0, cut=(False,) * 4, hull=empty, centroid=np.zeros(2), fault="the mask is empty"
        )
    small = cv2.resize(binary, (math.ceil(width / 4), math.ceil(height / 4)), interpolation=cv2.INTER_AREA)
    number, labels, stats, _ = cv2.connectedComponentsWithStats((small > 0).astype(np.uint8))
    sizes = stats[1:, cv2.CC_STAT_AREA] / max(1, stats[1:, cv2.CC_STAT_AREA].sum())
    piece = float(sizes.max())
    if number > 2 and (sizes < SPECK).any():
        kept = np.concatenate([[0], np.where(sizes < SPECK, 0, 255)]).astype(np.uint8)[labels]
        binary &= np.asarray(cv2.resize(kept, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
        small = cv2.bitwise_and(small, kept)
        total = cv2.countNonZero(binary)
    area = total / binary.size
    left, top, across, down = cv2.boundingRect(binary)
    near = max(1, round(BORDER * max(width, height)))
    cut = (left < near, top < near, left + across > width - near, top + down > height - near)
    fault = None
    if not MIN_AREA <= area <= MAX_AREA:
        fault = f"the mask covers {area:.1%} of its frame; {MIN_AREA:.0%} to {MAX_AREA:.0%} are allowed"
    elif piece < MIN_PIECE:
        fault = f"the mask's largest piece is {piece:.0%} of it; {MIN_PIECE:.0%} are required"
    moments = cv2.moments(small)
    centroid = (np.array([moments["m10"], moments["m01"]]) / moments["m00"] + 0.5) * (
        width / small.shape[1],
        height / small.shape[0],
    )
    return binary, MaskFacts(area=area, piece=piece, cut=cut, hull=hull_of(binary), centroid=centroid, fault=fault)


def hull_of(binary: UInt8) -> Float64:
    """Return the corners [N, 2] of the convex hull of a mask's pixels, whose corners count from the frame's."""
    contours, _ = cv2.findContours(binary, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return np.zeros((0, 2))
    centres = cv2.convexHull(np.concatenate(contours)).reshape(-1, 2)
    corners = np.concatenate([centres + offset for offset in ((0, 0), (1, 0), (0, 1), (1, 1))])
    return np.asarray(cv2.convexHull(corners.astype(np.int32)).reshape(-1, 2), np.float64)


def hook_name(command: str) -> str:
    """Return how a row calls the hook: rembg with its version, or the command."""
    if command != "rembg":
        return f"command: {command}"
    return f"rembg {_rembg_version()}"


def hook_mask(command: str, frame: bytes, name: str) -> UInt8:
    """Make the mask [H, W] uint8 of a frame by the spec's hook.

    Args:
        command: "rembg", or a command line with {image} and {mask}, run without a shell.
        frame: the frame's file.
        name: of the frame, for messages and the file ending.

    Raises:
        AssetError: NO_MASK where the hook fails on this frame, with the tail of what it said.
        UserError: where the hook cannot be run at all.
    """
    if command == "rembg":
        return _rembg_mask(frame, name)
    try:
        words = split_command(command)
    except ValueError as error:
        raise UserError(f"capture.{error}") from None
    with tempfile.TemporaryDirectory(prefix="mask-") as folder:
        ending = PurePosixPath(name).suffix.lower()
        image = Path(folder) / f"image{ending if ending.isascii() and ending[1:].isalnum() else '.jpg'}"
        mask = Path(folder) / "mask.png"
        image.write_bytes(frame)
        words = [word.replace("{image}", str(image)).replace("{mask}", str(mask)) for word in words]
        _run(words, name)
        if not mask.is_file() or mask.stat().st_size > MAX_FRAME_BYTES:
            raise AssetError(FailureKind.NO_MASK, f"capture.mask_command wrote no mask for {name!a}")
        return decode_mask(mask.read_bytes(), name)


def try_hook(command: str) -> str:
    """Run the hook once, on a picture of a grey disc; return what it said if it failed on it, else "".

    Raises:
        UserError: where it cannot be run at all, or its network cannot be loaded.
    """
    disc = cv2.circle(np.full((64, 64, 3), 230, np.uint8), (32, 32), 16, (90, 90, 90), -1)
    try:
        hook_mask(command, cv2.imencode(".png", disc)[1].tobytes(), "test.png")
    except AssetError as error:
        return f"{error.message}: {error.log_tail.strip().rpartition(chr(10))[2][-200:]}".rstrip(": ")
    return ""


def _run(words: list[str], name: str) -> None:
    """Run a hook with no input, its output to a file of which only the tail is read: it may write without end."""
    with tempfile.TemporaryFile() as said:
        try:
            hook = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"capture.mask_command: {words[0]!r} cannot be run: {error}; give an absolute path to a program "
                "(folders that it needs beside its own go into workers.readable)"
            ) from None
        try:
            status = hook.wait(COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            message = f"capture.mask_command took over {COMMAND_TIMEOUT_S:g} s on {name!a}"
            raise AssetError(FailureKind.NO_MASK, message) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(hook.pid, signal.SIGKILL)  # also what it left running
            hook.wait()
        if status != 0:
            said.seek(max(0, said.seek(0, io.SEEK_END) - 4000))
            tail = said.read().decode("utf-8", "replace")
            message = f"capture.mask_command ended with status {status} on {name!a}"
            raise AssetError(FailureKind.NO_MASK, message, tail)


@cache
def _rembg_version() -> str:
    try:
        return importlib.metadata.version("rembg")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "capture.mask_command 'rembg': the package is not installed; pip install '.[matting]', or name a command"
        ) from None


@cache
def _rembg() -> tuple[Any, Any]:
    """Return the package and one session: its network is loaded once a process."""
    _rembg_version()
    module: Any = importlib.import_module("rembg")
    try:
        return module, module.new_session()
    except Exception as error:  # noqa: BLE001 - its download and its runtime raise what they like; none of it is a frame's
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"capture.mask_command 'rembg': its network cannot be loaded ({found}); captures are read without network, "
            "so fetch it once before: python -c 'import rembg; rembg.new_session()'"
        ) from None


def _rembg_mask(frame: bytes, name: str) -> UInt8:
    module, session = _rembg()
    with Image.open(io.BytesIO(frame)) as image:  # rembg itself would apply the EXIF orientation of bytes
        mask = np.asarray(module.remove(image.convert("RGB"), session=session, only_mask=True))
    if mask.ndim != 2:
        raise AssetError(FailureKind.NO_MASK, f"rembg made a mask of shape {mask.shape} for {name!a}")
    return np.ascontiguousarray(mask, np.uint8)
