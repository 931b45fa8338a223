"""Cameras as the model sees them: normalised poses, exact intrinsics under resize and crop, rays.

**Normalisation.** LRM turns the world so that the input camera stands on -y with its vertical axis along +z, and
every other camera follows. With C the camera centre, d = |C| and u the camera's up (minus its y axis in the world):

    y = -C / d        z = normalise(u - (u . y) y)        x = y x z        Q = rows (x, y, z), det Q = +1
    world_from_camera <- Q world_from_camera    for all views

Q turns about the world's origin, where the object is: the input camera lands on (0, -d, 0) and keeps its small
off-axis tilt, if it has one, so that no picture changes. Forcing the optical axis through the origin instead would
move the object of a real capture by up to 0.67 of its half size.

**Distance.** The paper puts the input camera of a rendered object at distance 2. A rotation cannot do that: pictures
stay true only if the world is scaled by 2 / d with it (camera centres too, intrinsics kept). For renders at d = 1.5 to
3.0 this makes the object 0.67 to 1.33 times its size, so that an object that fills [-1, 1]^3 leaves the box that the
renderer integrates over, and its other views cannot be explained. We therefore keep d by default, for renders as for
captures: one rule for both, sizes stay in the box, and the 20 camera numbers tell the model the distance.
`distance=2.0` gives the paper's reading, and a fixed camera to assume where an image comes without one. It is for
renders only: the paper's [0, -dis, 0] of video keeps the captured distance, 3.4 to 7.3 half sizes of the object, and
`input_distance` says so by the sample's source.
Either way a turned box has corners up to sqrt(3) from the origin; what a preset's objects put there is lost.

**Pixels.** The origin is the image's top-left corner, so a resize from W to W' scales the first row of K by W' / W and
a crop at x0 subtracts x0 from the principal point: no half-pixel terms.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.types import CAPTURE_SOURCES, Float64

CAMERA_NUMBERS = 20


def normalizing_rotation(world_from_camera: Float64) -> Float64:
    """Return Q [3, 3]: the rotation about the origin that puts this camera [4, 4] on (0, -d, 0), its up towards +z.

    Raises:
        ValueError: if the camera stands at the origin or looks along its own vertical, so that Q does not exist.
    """
    centre, up = world_from_camera[:3, 3], -world_from_camera[:3, 1]
    distance = float(np.linalg.norm(centre))
    if distance < 1e-6:
        raise ValueError("input camera stands at the world origin; it cannot be normalised")
    y = -centre / distance
    z = up - (up @ y) * y
    length = float(np.linalg.norm(z))
    if length < 1e-6:
        raise ValueError("input camera's vertical points at the world origin; it cannot be normalised")
    z /= length
    return np.stack([np.cross(y, z), y, z])


def normalize_cameras(world_from_camera: Float64, input_view: int, distance: float | None = None) -> Float64:
    """Turn all cameras [V, 4, 4] so that camera `input_view` stands on (0, -d, 0) with its vertical along +z.

    Args:
        world_from_camera: [V, 4, 4] rigid motions, OpenCV axes.
        input_view: index of the input camera.
        distance: None keeps d; a number scales the world, and so all camera centres, until d is this.
    """
    out = world_from_camera.copy()
    out[:, :3] = normalizing_rotation(world_from_camera[input_view]) @ world_from_camera[:, :3]
    if distance is not None:
        out[:, :3, 3] *= distance / np.linalg.norm(out[input_view, :3, 3])
    return out


def input_distance(source: str, distance: float | None) -> float | None:
    """Return the distance to bring a sample's input camera to: the one asked for, but a captured camera keeps its own.

    A capture's distance and focal length were measured, and go together: scaled to 2, an object photographed from 6
    half sizes would fill a third of the box.

    Args:
        source: of the sample, such as "objaverse" or "mvimgnet".
        distance: as for `normalize_cameras`.
    """
    return None if source in CAPTURE_SOURCES else distance


def resize_intrinsics(intrinsics: Float64, scale_x: float, scale_y: float) -> Float64:
    """Return K [3, 3] of an image resized by W' / W and H' / H."""
    out: Float64 = np.diag([scale_x, scale_y, 1.0]) @ intrinsics
    return out


def crop_intrinsics(intrinsics: Float64, left_px: float, top_px: float) -> Float64:
    """Return K [3, 3] of the part of an image that begins at (left, top)."""
    out = intrinsics.copy()
    out[0, 2] -= left_px
    out[1, 2] -= top_px
    return out


def camera_numbers(world_from_camera: Float64, intrinsics: Float64, width: int, height: int) -> Float64:
    """Return the 20 numbers [20] that condition the decoder: the pose row by row, then fx/W, fy/H, cx/W, cy/H."""
    k = intrinsics
    tail = [k[0, 0] / width, k[1, 1] / height, k[0, 2] / width, k[1, 2] / height]
    return np.concatenate([world_from_camera.reshape(16), tail])


def pixel_rays(world_from_camera: Tensor, intrinsics: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return origins and unit directions of the rays through all pixel centres.

    Args:
        world_from_camera: [..., 4, 4], OpenCV axes.
        intrinsics: [..., 3, 3] in pixels, without skew.
        height: rows of the image.
        width: columns of the image.

    Returns:
        origins [..., H * W, 3] and directions [..., H * W, 3], row by row.
    """
    device, dtype = world_from_camera.device, world_from_camera.dtype
    rows = torch.arange(height, device=device, dtype=dtype) + 0.5
    columns = torch.arange(width, device=device, dtype=dtype) + 0.5
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    k = intrinsics[..., None, None]
    x = (u - k[..., 0, 2, :, :]) / k[..., 0, 0, :, :]
    y = (v - k[..., 1, 2, :, :]) / k[..., 1, 1, :, :]
    local = torch.stack([x, y, torch.ones_like(x)], -1).flatten(-3, -2)  # [..., HW, 3]
    directions = local @ world_from_camera[..., :3, :3].transpose(-1, -2)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    return world_from_camera[..., None, :3, 3].expand_as(directions), directions
