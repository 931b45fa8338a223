"""Any picture to the input that the model was trained on: the object alone, in the middle, over white.

    file  ->  RGBA (its own alpha, or rembg's)  ->  square around the object's box  ->  [S, S, 3] over white

The model learnt from renders of objects that fill [-1, 1]^3, seen from a known camera. A photograph comes without one,
so a camera is assumed (`assumed_camera`) and the picture is cut so that it fits: the object's longer visible side takes
the share `fill` of the frame, and the camera stands where a side of 2, the box's, takes that share:

    d = 1 / (fill tan(fov / 2))            2.52 for fill 0.85 and 50 degrees, inside the 1.5 to 3.0 of the renders

A model trained with `data.input_distance` at a number was shown that distance alone, and gets it.
"""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from lrm.config import DataConfig
from lrm.pixels import Float32, over_white, resize_image
from pipeline.masks import hook_mask
from pipeline.types import AssetError, Camera, Float64, UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MIN_BOX_PX = 8
OBJECT_ALPHA = 127
"""An alpha above it is object, as for captures."""
WHITE_TOLERANCE = 8
"""Difference from white, of 255, up to which a pixel is background: JPEG's noise around edges stays below it."""

Background = Literal["cut", "white"]


def list_pictures(path: Path) -> list[Path]:
    """Return a picture, or the pictures of a folder, sorted by name.

    Raises:
        UserError: if there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"picture {path}: no such file or folder")
    found = sorted(item for item in path.iterdir() if item.suffix.lower() in ENDINGS and item.is_file())
    if not found:
        raise UserError(f"folder {path}: no picture in it; {', '.join(ENDINGS)} are read")
    return found


def read_cutout(path: Path, background: Background = "cut") -> NDArray[np.uint8]:
    """Return the object of a picture as straight RGBA [H, W, 4], upright by its EXIF orientation.

    Args:
        path: of the picture.
        background: cut takes the picture's alpha, or asks rembg where it has none; white says that the object already
            stands before white, and takes what is not white for it.

    Raises:
        UserError: naming the picture, if it cannot be read, or its object cannot be told from the rest.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"picture {path}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    rgba = np.array(image)
    if background == "white":
        rgba[..., :3] = np.rint(over_white(rgba) * 255)
        rgba[..., 3] = np.where((255 - rgba[..., :3]).max(-1) > WHITE_TOLERANCE, 255, 0)
    elif rgba[..., 3].min() == 255:
        rgba[..., 3] = _rembg_alpha(image, path)
    return rgba


def _rembg_alpha(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    if importlib.util.find_spec("rembg") is None:
        raise UserError(
            f"picture {path}: no pixel of it is transparent, and rembg is not installed to cut its object out; give a "
            "PNG with alpha, pip install '.[matting]', or set background=white if the object stands before white"
        )
    sink = io.BytesIO()
    image.convert("RGB").save(sink, "PNG")
    try:
        return hook_mask("rembg", sink.getvalue(), path.name)
    except (AssetError, OSError) as error:  # its network's weights are fetched on first use
        raise UserError(f"picture {path}: rembg failed: {' '.join(str(error).split())[:160]}") from None


def frame_object(rgba: NDArray[np.uint8], size_px: int, fill: float, name: str) -> Float32:
    """Return the object over white in a square [S, S, 3], its box in the middle, its longer side `fill` of the square.

    Raises:
        UserError: if there is hardly an object.
    """
    rows = np.flatnonzero((rgba[..., 3] > OBJECT_ALPHA).any(1))
    columns = np.flatnonzero((rgba[..., 3] > OBJECT_ALPHA).any(0))
    longer = 0 if len(rows) == 0 else max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    if longer < MIN_BOX_PX:
        raise UserError(f"picture {name}: its object is {longer} px long; at least {MIN_BOX_PX} are needed")
    side = math.ceil(longer / fill)
    top = round((rows[0] + rows[-1] + 1 - side) / 2)
    left = round((columns[0] + columns[-1] + 1 - side) / 2)
    square = np.ones((side, side, 3), np.float32)
    high, wide = rgba.shape[:2]
    y, x = slice(max(0, top), min(high, top + side)), slice(max(0, left), min(wide, left + side))
    square[y.start - top : y.stop - top, x.start - left : x.stop - left] = over_white(rgba[y, x])
    return resize_image(square, size_px, size_px)


def assumed_distance(data: DataConfig, fill: float, fov_deg: float) -> float:
    """Return the distance to assume of a camera that nobody measured; see the module's docstring."""
    if data.input_distance != "keep":
        return float(data.input_distance)
    return 1 / (fill * math.tan(math.radians(fov_deg) / 2))


def orbit_pose(azimuth_deg: float, elevation_deg: float, distance: float) -> Float64:
    """Return world_from_camera [4, 4] of a camera that looks at the origin; azimuth 0 is the input's place on -y.

    Azimuth grows counter-clockwise seen from above, so that 90 stands on +x.
    """
    azimuth, elevation = math.radians(azimuth_deg), math.radians(elevation_deg)
    level = math.cos(elevation)
    centre = np.array([math.sin(azimuth) * level, -math.cos(azimuth) * level, math.sin(elevation)])
    right = np.array([math.cos(azimuth), math.sin(azimuth), 0.0])
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(-centre, right), -centre], 1)
    pose[:3, 3] = distance * centre
    return pose


def orbit_camera(azimuth_deg: float, elevation_deg: float, distance: float, fov_deg: float, size_px: int) -> Camera:
    """Return a camera on an orbit, with a centred square picture."""
    focal = size_px / 2 / math.tan(math.radians(fov_deg) / 2)
    k = np.array([[focal, 0, size_px / 2], [0, focal, size_px / 2], [0, 0, 1.0]])
    pose = orbit_pose(azimuth_deg, elevation_deg, distance)
    return Camera(world_from_camera=pose, intrinsics=k, width=size_px, height=size_px)
