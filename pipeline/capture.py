"""The files of one capture: frames, masks and COLMAP models, wherever they lie.

A source knows layouts (zips, trees, object storage) and joins frames and masks by name; what follows knows geometry
and sees this. Nothing here imports pycolmap, which puts signal handlers of its own into the process that does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import cv2

CAPTURE_REVISION = 2
"""Raise it when code changes what a capture's pixels, cameras or figures become."""


def producer() -> str:
    """Return the name and versions that decide a capture's pixels."""
    try:
        colmap = version("pycolmap")
    except PackageNotFoundError:
        colmap = "none"
    jpeg = version("simplejpeg")
    return f"captures revision {CAPTURE_REVISION}, OpenCV {cv2.__version__}, pycolmap {colmap}, simplejpeg {jpeg}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureFiles:
    """One capture, unread. Members are opaque to all but `read`.

    Names may hold bytes that are not UTF-8, as surrogates (PEP 383).

    Attributes:
        uid: of the asset, for messages.
        frames: name of a frame relative to its image folder, as a COLMAP model says it -> member.
        masks: name of a frame -> member of its mask (grey, or RGBA whose alpha is the mask); may be empty, and may
            name frames that are not there.
        models: COLMAP models by the name of their folder ("0", "1", ...), each file name ("cameras.bin") -> member.
        read: (member, most bytes) -> content; raises AssetError where the member is damaged, missing or larger.
    """

    uid: str
    frames: Mapping[str, str]
    masks: Mapping[str, str]
    models: Mapping[str, Mapping[str, str]]
    read: Callable[[str, int], bytes]
