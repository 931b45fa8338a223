"""Camera poses of a sample, and what of an object they frame: numpy only, pure functions of (spec, seed).

Each preset is a row of `PRESETS`, whose numbers are those of a published recipe; what is ours is how they are drawn.
Public scripts draw directions as normalised points of a cube, which puts 45 % of the azimuths within 15 degrees of a
cube diagonal where 33 % belong. Here azimuth is uniform and height is uniform in the interval that the radius allows:
by Archimedes' hat-box theorem that is uniform by area over the allowed zone of the sphere. No draw is rejected and
each view has a generator of its own, so view i of a sample does not depend on how many views there are.

The sizes to keep in mind: at distance r a field of view f shows a centred ball of radius r sin(f / 2) whole. The object
fills [-1, 1]^3, whose corners are 1.73 from the origin. `lrm` shows balls of 0.63 to 1.27 and so cuts most objects in
its near views, as the paper's did; `openlrm` 1.05 to 1.44; `instantmesh` 0.85 to 1.48; `uncropped` never less than
1.73. `cropped_share` measures the cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from pipeline.spec import RenderSpec
from pipeline.types import Camera, Float64, derive_seed

NEAR_PLANE = 0.01
"""Depth in world units before which nothing is drawn, as the renderer is told."""

BOX_RADIUS = math.sqrt(3)
"""Radius of the ball around [-1, 1]^3, the place of every object."""

FRAME_MARGIN_PX = 2.0
"""Least distance of the box from the border where a preset promises the object whole.

Points reach 0.75 px beyond themselves through the pixel filter, and a border pixel's centre is 0.5 px inside the frame:
at 2 px the border stays empty, and a picture that touches its border shows a fault.
"""

CANONICAL_PX, NUM_SIDES = 64, 4
"""Width and height, and number, of the views by which duplicates are told."""

MAX_DEPTH_SCALE, _MAX_UINT16 = 8192.0, 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraPreset:
    """A camera recipe: centres are drawn from a part of a shell around the origin, and look at the origin.

    Attributes:
        radius_range: least and greatest distance from the origin in world units; None where it follows from the field
            of view, `UNCROPPED_SLACK` wide, so that nothing of the box is cut.
        height_range: least and greatest world z of the centre; in units of the radius where `radius_range` is None.
        fov_deg: field of view, horizontal and vertical, where the spec gives none.
        front_first: whether view 0 stands in front of the object, on the world's -y axis.
    """

    radius_range: tuple[float, float] | None
    height_range: tuple[float, float]
    fov_deg: float
    front_first: bool = False


PRESETS: Mapping[str, CameraPreset] = MappingProxyType(
    {
        "lrm": CameraPreset(radius_range=(1.5, 3.0), height_range=(-0.75, 1.60), fov_deg=50.0),
        "openlrm": CameraPreset(
            radius_range=(1.9, 2.6),
            height_range=(-0.75, 1.60),
            fov_deg=math.degrees(2 * math.atan(32 / 2 / 24)),
            front_first=True,
        ),
        "instantmesh": CameraPreset(radius_range=(2.0, 3.5), height_range=(-0.75, 1.60), fov_deg=50.0),
        "uncropped": CameraPreset(radius_range=None, height_range=(-0.75 / 2.25, 1.60 / 2.25), fov_deg=50.0),
    }
)
"""The recipes that `RenderSpec.preset` names, and where their numbers stand.

- `lrm`: LRM (arXiv 2311.04400), section 4.1: distance 1.5 to 3.0, height -0.75 to 1.60. The paper states no field of
  view; 50 degrees is what InstantMesh's authors give for their renders by "the setting of LRM".
- `openlrm`: OpenLRM's scripts/data/objaverse/blender_script.py: distance 1.9 to 2.6, height -0.75 to 1.60, a lens of
  24 mm on a sensor of 32 mm, so fx = 0.75 width (OpenLRM issue 6) and 67.38 degrees. Its first view stands in front of
  the object, at (0, -r, 0) with r drawn like the others': OpenLRM trains on it as the canonical source view, so ours
  does too.
- `instantmesh`: InstantMesh issue 13: distance 2.0 to 3.5, height -0.75 to 1.6, 50 degrees.
- `uncropped`: our own. As in TRELLIS's conditioning views the distance is radius of the ball around the box / sin(half
  the field of view), here less `FRAME_MARGIN_PX`, times 1 to 1 + `UNCROPPED_SLACK`. Elevations are uniform by area
  between the heights of `lrm` at its mean distance of 2.25, -19.5 to 45.3 degrees: 52 % of the sphere, as over the
  distances of `lrm` 54 %.
"""

UNCROPPED_SLACK = 0.1
"""How much farther than it must be a camera of `uncropped` may stand, as a share of the distance."""

_CHUNK = 1 << 13
"""Points projected at once, few enough to stay in a core's cache: a million points take 6 ms, at once 11 ms."""

_FLIP_YZ = np.diag([1.0, -1.0, -1.0, 1.0])


def flip_camera_axes(world_from_camera: Float64) -> Float64:
    """Convert a pose [4, 4] from OpenCV axes (x right, y down, z forward) to OpenGL's and Blender's, or back.

    OpenGL cameras have x right, y up and look along -z; the conversion is its own inverse.
    """
    flipped: Float64 = np.asarray(world_from_camera, np.float64) @ _FLIP_YZ
    return flipped


def look_at(centre: Float64) -> Float64:
    """Return world_from_camera [4, 4], OpenCV axes, of a camera at `centre` [3] that looks at the origin.

    The image's up is the world's +z, so that camera y has no positive world z. At a pole of the sphere, where that
    leaves the roll open, the image's up is the world's +y.
    """
    centre = np.asarray(centre, np.float64)
    distance = _length(centre)
    if not distance > 0:
        raise ValueError(f"a camera at {centre.tolist()} cannot look at the origin")
    forward = -centre / distance
    right = np.cross(forward, [0.0, 0.0, 1.0])
    if _length(right) < 1e-9:
        right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= _length(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = centre
    return pose


def _length(vector: Float64) -> float:
    """Return the length of a vector [3], the same to the last bit on every machine.

    `np.linalg.norm` asks BLAS, which rounds by the kernel that it picks for the processor.
    """
    x, y, z = vector.tolist()
    return math.sqrt(x * x + y * y + z * z)


def intrinsics(resolution_px: int, fov_deg: float) -> Float64:
    """Return the pinhole matrix [3, 3] in pixels: square pixels, principal point in the middle of the image."""
    focal_px = resolution_px / 2 / math.tan(math.radians(fov_deg) / 2)
    return np.array([[focal_px, 0, resolution_px / 2], [0, focal_px, resolution_px / 2], [0, 0, 1]], np.float64)


def fov_deg(spec: RenderSpec) -> float:
    """Return the field of view in degrees, horizontal and vertical: the spec's, else its preset's."""
    return PRESETS[spec.preset].fov_deg if spec.fov_deg is None else spec.fov_deg


def radius_range(spec: RenderSpec) -> tuple[float, float]:
    """Return the least and greatest distance of a camera from the origin, in world units."""
    preset = PRESETS[spec.preset]
    if preset.radius_range is not None:
        return preset.radius_range
    # The cone of directions that stay FRAME_MARGIN_PX off the border, and a ball that touches it from inside.
    half_px = spec.resolution_px / 2
    slope = math.tan(math.radians(fov_deg(spec)) / 2) * (half_px - FRAME_MARGIN_PX) / half_px
    # Fields of view near 180 degrees would put the near plane into the box.
    nearest = max(BOX_RADIUS / math.sin(math.atan(slope)), BOX_RADIUS + 2 * NEAR_PLANE)
    return nearest, nearest * (1 + UNCROPPED_SLACK)


def max_depth(spec: RenderSpec) -> float:
    """Return the greatest planar depth that a point of [-1, 1]^3 can have before any camera of the spec."""
    return radius_range(spec)[1] + BOX_RADIUS


def depth_scale(spec: RenderSpec) -> float:
    """Return the stored units of a 16-bit depth plane per world unit: stored = round(depth * scale).

    8192, which holds depths below 8; where the far cameras need less, the largest power of two at which they fit.
    """
    return min(MAX_DEPTH_SCALE, 2.0 ** math.floor(math.log2(_MAX_UINT16 / max_depth(spec))))


def sample_centres(spec: RenderSpec, seed: int) -> Float64:
    """Draw the camera centres [num_views, 3] of a sample."""
    return np.stack([_sample_centre(spec, seed, view) for view in range(spec.num_views)])


def _sample_centre(spec: RenderSpec, seed: int, view: int) -> Float64:
    preset = PRESETS[spec.preset]
    rng = np.random.default_rng(derive_seed("camera", seed, view))
    radius = rng.uniform(*radius_range(spec))
    if preset.front_first and view == 0:
        return np.array([0.0, -radius, 0.0])
    unit = 1.0 if preset.radius_range is not None else radius
    low, high = preset.height_range
    z = rng.uniform(max(low * unit, -radius), min(high * unit, radius))
    azimuth = rng.uniform(0.0, 2 * math.pi)
    planar = math.sqrt(max(0.0, radius * radius - z * z))
    return np.array([planar * math.cos(azimuth), planar * math.sin(azimuth), z])


def cameras_for(spec: RenderSpec, seed: int) -> list[Camera]:
    """Return the cameras of a sample: a pure function of the spec's pixel part and the sample's seed."""
    matrix = intrinsics(spec.resolution_px, fov_deg(spec))
    return [
        Camera(
            world_from_camera=look_at(centre),
            intrinsics=matrix.copy(),
            width=spec.resolution_px,
            height=spec.resolution_px,
        )
        for centre in sample_centres(spec, seed)
    ]


def canonical_cameras() -> list[Camera]:
    """Return four cameras that are the same for every object: front (-y), right (+x), back (+y), top (+z), 64 px."""
    distance = BOX_RADIUS / math.sin(math.radians(25))
    centres = distance * np.array([[0.0, -1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    matrix = intrinsics(CANONICAL_PX, 50.0)
    return [
        Camera(world_from_camera=look_at(c), intrinsics=matrix.copy(), width=CANONICAL_PX, height=CANONICAL_PX)
        for c in centres
    ]


def cropped_share(camera: Camera, points: Float64, weights: Float64) -> float:
    """Return the share of an object's surface, by weight, that the frame cuts off; what hides what does not matter.

    Args:
        camera: the view.
        points: world points [N, 3] on the surface, such as the centres of its triangles.
        weights: what each stands for [N], not negative, such as the areas of the triangles.

    A point is cut off where it projects outside the image, or is no farther than `NEAR_PLANE`.

    Raises:
        ValueError: for shapes that do not fit, or weights of which none is positive or one is negative or not finite.
    """
    weights = np.asarray(weights, np.float64)
    if weights.shape != (len(points),):
        raise ValueError(f"weights have shape {list(weights.shape)}; [{len(points)}], one a point, is required")
    total = float(weights.sum())
    if not (0 < total < math.inf and weights.min() >= 0):
        raise ValueError(f"weights with sum {total:g} are not the areas of a surface: finite and positive is required")
    outside = 0.0
    for start in range(0, len(points), _CHUNK):
        x, y, depth = _project(camera, points[start : start + _CHUNK])
        seen = (depth > NEAR_PLANE) & (x >= 0) & (y >= 0) & (x < camera.width * depth) & (y < camera.height * depth)
        outside += float(weights[start : start + _CHUNK] @ ~seen)
    return min(1.0, outside / total)


def border(camera: Camera, points: Float64, margin_px: float) -> tuple[int, int, int, int]:
    """Return the pixels that a surface can reach: a half-open box (x0, y0, x1, y1) inside the image.

    It holds each projected point [N, 3] and `margin_px` around it, and so every triangle between them: projection keeps
    lines straight as long as all of it is in front of the camera. Where any point is not, no farther than `NEAR_PLANE`,
    the box is the whole image. Where it would lie outside the image it is the one pixel nearest to it, for a renderer
    that cannot draw nothing.
    """
    if not len(points):
        return 0, 0, 1, 1
    low, high = np.full(2, math.inf), np.full(2, -math.inf)
    for start in range(0, len(points), _CHUNK):
        x, y, depth = _project(camera, points[start : start + _CHUNK])
        if not depth.min() > NEAR_PLANE:
            return 0, 0, camera.width, camera.height
        x /= depth
        y /= depth
        low = np.minimum(low, (x.min(), y.min()))
        high = np.maximum(high, (x.max(), y.max()))
    last = np.array([camera.width - 1, camera.height - 1])
    # A point on the line between two pixels belongs to the second, as in the half-open box.
    first = np.clip(np.floor(low - margin_px), 0, last).astype(int)
    final = np.clip(np.floor(high + margin_px), 0, last).astype(int)
    return int(first[0]), int(first[1]), int(final[0]) + 1, int(final[1]) + 1


def _project(camera: Camera, points: Float64) -> Float64:
    """Return x * depth, y * depth and depth [3, N] of world points [N, 3], x and y in pixels."""
    pose = camera.world_from_camera
    matrix = camera.intrinsics @ pose[:3, :3].T
    projected: Float64 = matrix @ np.asarray(points, np.float64).T
    projected -= (matrix @ pose[:3, 3])[:, None]
    return projected
