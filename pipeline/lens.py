"""Camera models as COLMAP has them, and one resampling from a photo to a square pinhole view.

    target pixel -> tangent plane (x / z, y / z) -> the camera model -> pixel of the stored photo

Undistortion, crop, quarter turn and resize are this one map; colour, premultiplied by the mask, and the mask itself go
through it together. The forward model is all it takes, so every camera model of pycolmap works, and no iteration runs.

pycolmap evaluates a model in about 15 ns a point: 4 ms for 512^2, as much as decoding a photo of 1080 x 1920. A
lens is smooth, so we ask for it at 16 x 16 Chebyshev nodes and fill in the rest by two small matrix products, under
1 ms, exact to 0.01 px where the model behaves. Aliases would look like texture: a view that shrinks the photo is
filtered first, and a JPEG that would shrink to one half or less is already decoded to half its size.

Pixels: (0, 0) is the outer corner of the first one, as everywhere in the project; `cv2.remap` counts from its centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import pycolmap
from numpy.typing import NDArray

from pipeline.photos import MAX_PIXELS
from pipeline.types import AssetError, FailureKind, Float64

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]

MIN_FOCAL, MAX_FOCAL = 0.3, 5.0
"""Focal length over the longer side: 0.3 is a view of 118 degrees, 5 of 11. What lies beyond is no phone's."""

NUM_NODES = 16
_EDGE_POINTS = 12
_FAR = -1.0e4


@dataclass(frozen=True, slots=True, eq=False)
class Lens:
    """A camera model with its parameters: the tangent plane (x / z, y / z) to pixels and back."""

    camera: pycolmap.Camera
    width: int
    height: int
    edge: Float64
    """Points of the frame's four sides on the tangent plane [4, N, 2]: left, top, right, bottom."""

    @classmethod
    def of(cls, camera: pycolmap.Camera) -> Lens:
        """Return the lens of a pycolmap camera, copied: it may belong to a model that goes away."""
        copy = pycolmap.Camera(
            camera_id=1, model=camera.model, width=camera.width, height=camera.height, params=list(camera.params)
        )
        width, height = int(camera.width), int(camera.height)
        t = np.linspace(0, 1, _EDGE_POINTS)
        sides = [(0 * t, t * height), (t * width, 0 * t), (0 * t + width, t * height), (t * width, 0 * t + height)]
        edge = np.asarray(copy.cam_from_img(np.concatenate([np.stack(side, 1) for side in sides])), np.float64)
        return cls(copy, width, height, edge.reshape(4, _EDGE_POINTS, 2))

    @property
    def focal_px(self) -> float:
        """Mean focal length in pixels."""
        return float(self.camera.mean_focal_length())

    def pixels(self, plane: Float64) -> Float64:
        """Project tangent-plane points [N, 2] to pixels [N, 2] of the photo as it is stored."""
        homogeneous = np.concatenate([plane, np.ones((len(plane), 1))], 1)
        return np.asarray(self.camera.img_from_cam(homogeneous), np.float64).reshape(-1, 2)

    def plane(self, pixels: Float64) -> Float64:
        """Return the tangent-plane points [N, 2] of pixels [N, 2]; NaN where the model has no inverse."""
        return np.asarray(self.camera.cam_from_img(np.ascontiguousarray(pixels, np.float64)), np.float64).reshape(-1, 2)

    def check(self, name: str) -> None:
        """Refuse a lens that cannot be one, or that cannot be undone up to the frame's edge.

        Raises:
            AssetError: BAD_CAMERA, naming what was found.
        """
        what = f"camera {name}, {self.camera.model_name} {[round(float(x), 4) for x in self.camera.params]}"
        if self.camera.is_spherical():
            raise AssetError(FailureKind.BAD_CAMERA, f"{what}: a panorama is no view of an object")
        if self.width * self.height > MAX_PIXELS:
            message = f"{what}: {self.width} x {self.height} px; at most {MAX_PIXELS} pixels are allowed"
            raise AssetError(FailureKind.BAD_CAMERA, message)
        share = self.focal_px / max(self.width, self.height)
        if not MIN_FOCAL < share < MAX_FOCAL:
            message = f"{what}: focal length {share:.3g} of the longer side; {MIN_FOCAL} to {MAX_FOCAL} are allowed"
            raise AssetError(FailureKind.BAD_CAMERA, message)
        centre = np.array([self.camera.principal_point_x, self.camera.principal_point_y])
        if not ((centre > 0) & (centre < (self.width, self.height))).all():
            raise AssetError(FailureKind.BAD_CAMERA, f"{what}: principal point outside the frame")
        edge = self.edge.reshape(-1, 2)
        if not np.isfinite(edge).all():
            raise AssetError(FailureKind.BAD_CAMERA, f"{what}: the distortion cannot be undone up to the frame's edge")
        steps = np.linspace(0, 1, 33)[:, None, None] * edge[None]
        rays = self.pixels(steps.reshape(-1, 2)).reshape(len(steps), -1, 2) - centre
        outward = rays[-1] / np.maximum(np.linalg.norm(rays[-1], axis=-1, keepdims=True), 1e-9)
        if not (np.isfinite(rays).all() and (np.diff((rays * outward).sum(-1), axis=0) > 0).all()):
            raise AssetError(FailureKind.BAD_CAMERA, f"{what}: the distortion folds the frame over")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A square on the tangent plane of a camera: left and top corner, and side."""

    left: float
    top: float
    side: float

    def intrinsics(self, size_px: int) -> Float64:
        """Return K [3, 3] of this window as a picture of size_px."""
        focal = size_px / self.side
        return np.array([[focal, 0, -self.left * focal], [0, focal, -self.top * focal], [0, 0, 1]])

    def turned(self, turn: Float64) -> Window:
        """Return the window in the axes of a camera turned by quarter turns: plane' = turn[:2, :2] @ plane."""
        corners = np.array([[self.left, self.top], [self.left + self.side, self.top + self.side]]) @ turn[:2, :2].T
        left, top = corners.min(axis=0)
        return Window(left=float(left), top=float(top), side=self.side)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cutout:
    """The part of a mask that is not empty, at 1 / `shrink` of the camera's resolution.

    Attributes:
        alpha: [h, w] uint8.
        left, top: place of its first pixel in the shrunk frame.
        shrink: 1, 2, 4 or 8.
    """

    alpha: UInt8
    left: int
    top: int
    shrink: int

    @classmethod
    def of(cls, mask: UInt8, shrink: int) -> Cutout:
        """Cut a mask [H, W] of 0 and 255 to what it holds, averaged over shrink x shrink pixels."""
        if shrink > 1:
            rows, columns = (-size % shrink for size in mask.shape)
            if rows or columns:
                mask = np.asarray(cv2.copyMakeBorder(mask, 0, rows, 0, columns, cv2.BORDER_CONSTANT), np.uint8)
            size = (mask.shape[1] // shrink, mask.shape[0] // shrink)
            mask = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_AREA), np.uint8)
        left, top, width, height = cv2.boundingRect(mask)
        alpha = np.ascontiguousarray(mask[top : top + height, left : left + width])
        return cls(alpha=alpha, left=left, top=top, shrink=shrink)


def shrink_of(window: Window, lens: Lens, size_px: int) -> int:
    """Return the largest of 1, 2, 4, 8 by which the photo may be shrunk before it is resampled to size_px."""
    ratio = window.side * lens.focal_px / size_px
    return max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor <= ratio)


@lru_cache(maxsize=16)
def _interpolation(num: int) -> Float32:
    """Return [num, NUM_NODES]: from values at the Chebyshev nodes of [-1, 1] to those at `num` even cells' centres."""
    orders = np.arange(NUM_NODES)
    at_nodes = np.cos(orders[:, None] * (orders + 0.5) * np.pi / NUM_NODES)  # T_m at node k is cos(m (k + 1/2) pi / n)
    weights = at_nodes * np.where(orders == 0, 1, 2)[:, None] / NUM_NODES
    cells = np.arccos((np.arange(num) + 0.5) / num * 2 - 1)
    return np.asarray(np.cos(orders * cells[:, None]) @ weights, np.float32)


def lens_map(
    lens: Lens, window: Window, turn: Float64, num_px: int, scale: float = 1.0, start: tuple[float, float] = (0.0, 0.0)
) -> tuple[Float32, Float32]:
    """Return where in the photo each pixel centre of a view lies: x and y [num_px, num_px], scale * pixel - start.

    Pixels whose ray leaves the frame by more than its sides' outermost points lie at -10,000: a lens model may fold
    back into the frame what it never saw.

    Args:
        lens: of the photo.
        window: the view's square, in the axes of the turned camera.
        turn: [3, 3] quarter turn from the stored camera's axes to the view's.
        num_px: width and height of the view.
        scale: of a shrunk photo.
        start: x and y of the part of it that is looked at.
    """
    edge = lens.edge.reshape(-1, 2) @ turn[:2, :2].T
    cell = window.side / num_px
    corner = np.array([window.left, window.top])
    low = np.maximum(np.ceil((edge.min(axis=0) - corner) / cell - 0.5), 0).astype(int)
    high = np.minimum(np.floor((edge.max(axis=0) - corner) / cell - 0.5) + 1, num_px).astype(int)
    full = (high - low == num_px).all()
    maps: list[Float32] = [np.full((0 if full else num_px,) * 2, _FAR, np.float32) for _ in range(2)]
    if (high <= low).any():
        return maps[0], maps[1]
    count = high - low
    nodes = (1 + np.cos((np.arange(NUM_NODES) + 0.5) * np.pi / NUM_NODES)) / 2
    x, y = (corner[i] + cell * (low[i] + count[i] * nodes) for i in range(2))
    grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2) @ turn[:2, :2]  # the turn's inverse, applied to rows
    values = (lens.pixels(grid) * scale - start).reshape(NUM_NODES, NUM_NODES, 2).astype(np.float32)
    rows, columns = (_interpolation(int(number)) for number in (count[1], count[0]))
    for i in range(2):
        part = np.asarray(rows @ values[..., i] @ columns.T, np.float32)
        if full:
            maps[i] = part
        else:
            maps[i][low[1] : high[1], low[0] : high[0]] = part
    return maps[0], maps[1]


def sample_view(photo: UInt8, cutout: Cutout, lens: Lens, window: Window, turn: Float64, size_px: int) -> UInt8:
    """Resample a photo [H, W, 3] in BGR and its mask once, to a view of straight RGBA [size_px, size_px, 4].

    The photo may be shrunk: its pixels are `cutout.shrink` pixels of the camera wide.
    """
    rows, columns = cutout.alpha.shape
    part = photo[cutout.top : cutout.top + rows, cutout.left : cutout.left + columns]
    alpha = cutout.alpha[: part.shape[0], : part.shape[1]]
    source = cv2.cvtColor(part, cv2.COLOR_BGR2BGRA)
    if cutout.shrink == 1:  # the mask is 0 or 255 then
        source = cv2.bitwise_and(source, cv2.merge([alpha] * 4))
    else:
        source = cv2.multiply(source, cv2.merge([alpha] * 4), scale=1 / 255)
    sigma = filter_sigma(window.side * lens.focal_px / size_px / cutout.shrink)
    border = 1 if sigma > 0 else 0
    if border:
        source = cv2.copyMakeBorder(source, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
        source = cv2.GaussianBlur(source, (3, 3), sigma)
    start = (cutout.left + 0.5 - border, cutout.top + 0.5 - border)
    x, y = lens_map(lens, window, turn, size_px, 1 / cutout.shrink, start)
    out = cv2.remap(source, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(0, 0, 0, 0))
    return straight_rgba(np.asarray(out, np.uint8))


def filter_sigma(ratio: float) -> float:
    """Return the sigma of the filter of 3 taps that keeps a view from aliasing that takes `ratio` pixels for one.

    Its variance is that of a box of the ratio's width, less the pixel's own: then photo, filter and the bilinear
    sampling after it together blur as much as averaging the area would. The ratio is under 2 where the decoder has
    already halved what it could; 3 taps would not do beyond.
    """
    share = min(max(0.0, ratio**2 - 1) / 12 * 4 / 3, 0.4) / 2  # of each outer tap
    return math.sqrt(-1 / (2 * math.log(share / (1 - 2 * share)))) if share > 0.01 else 0.0


def straight_rgba(bgra: UInt8) -> UInt8:
    """Return premultiplied 8-bit BGRA [H, W, 4] as RGBA with straight alpha; where alpha is 0 so is the colour."""
    blue, green, red, alpha = cv2.split(bgra)
    colours = [cv2.divide(channel, alpha, scale=255) for channel in (red, green, blue)]  # by zero gives zero
    return np.asarray(cv2.merge([*colours, alpha]), np.uint8)
