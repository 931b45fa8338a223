"""Where the object of a capture is, which way is up, and how large it is: from poses, points and masks. Numpy only.

**Up.** Whoever walks round an object holds the camera level, so the camera's x axis stays at right angles to gravity,
whatever the pitch: up is the direction in which the x axes vary least, the eigenvector of the mean of x x^T with the
smallest eigenvalue. In a capture that is stored sideways the y axes do so instead. The ratio of the two smallest
eigenvalues tells which holds, and how well: under 0.05 it is believed, else up is the mean of -y and is marked. The
mean alone is off by the common pitch where an orbit is not closed: 23 degrees on real captures, against 0.5 to 4.

**Centre and size.** COLMAP's points are of the whole scene: boxes over all of them span ten times the object. A point
is the object's if at least half of its observations lie in masks, and at least 80 % of the views whose frame it falls
into have it in their mask. The box is that of these points but for strays, as matches go wrong. Where a model has too
few such points, the rays through the masks' centroids give the centre, and the masks' sizes the size; that the rays
meet proves that the masks show one thing. The optical axes would miss the object by up to a fifth of its half size.

**The world.** X' = scale G (X - o), with G turning up to +z and the first camera towards -y.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.types import Float64

MAX_UP_RATIO = 0.05
MIN_TRACK_SHARE, MIN_SEEN_SHARE = 0.5, 0.8
LEAST_POINTS = 20
"""Fewer voted points give no box."""
MIN_AXES_SPREAD = 1e-3
"""Least second eigenvalue of the cameras' axes that up is told by: some 2 degrees of turning."""
MIN_RAY_SPREAD_RAD = 0.04
"""Least scatter of rays that meet in a point worth believing: a sweep of 5 degrees or so."""
STRAY = 0.15

IDENTITY = np.eye(3)
LEFT_IS_UP = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
RIGHT_IS_UP = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
"""Quarter turns from the stored camera's axes to those of an upright one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Up:
    """The up axis of a capture.

    Attributes:
        axis: [3] unit vector in the model's world; its sign is not decided yet where `sideways`.
        sideways: whether frames are stored on their side.
        ratio: of the two smallest eigenvalues of the axes that won, 0 is perfect.
        sure: whether the ratio is good enough; else `axis` is the mean of the cameras' up and `sideways` is False.
    """

    axis: Float64
    sideways: bool
    ratio: float
    sure: bool


def find_up(rotations: Float64) -> Up:
    """Find up from camera_from_world rotations [N, 3, 3]."""
    x, y = rotations[:, 0], rotations[:, 1]
    values, vectors = np.linalg.eigh(np.stack([axes.T @ axes / len(axes) for axes in (x, y)]))
    ratios = np.maximum(values[:, 0], 0) / np.maximum(values[:, 1], 1e-12)
    best = int(np.argmin(ratios))
    mean = -y.mean(axis=0)
    # Axes that are all alike say nothing of the plane that they lie in.
    if ratios[best] < MAX_UP_RATIO and values[best, 1] > MIN_AXES_SPREAD and len(rotations) >= 3:
        axis = vectors[best][:, 0]
        if best == 0 and axis @ mean < 0:
            axis = -axis
        return Up(axis=axis, sideways=best == 1, ratio=float(ratios[best]), sure=True)
    length = float(np.linalg.norm(mean))
    axis = mean / length if length > 0.1 else -y[0]
    return Up(axis=axis, sideways=False, ratio=float(ratios[best]), sure=False)


def settle_sideways(up: Up, rotations: Float64, centres: Float64, centre: Float64, rest: Float64) -> tuple[Up, Float64]:
    """Decide which of the two sides is up where frames lie on their side; return that and the quarter turn [3, 3].

    An object stands above its floor, so the points near it that are not its own lie below its centre; where there are
    too few, cameras stand higher than what they look at.

    Args:
        up: as found.
        rotations: camera_from_world [N, 3, 3].
        centres: of the cameras [N, 3].
        centre: of the object [3].
        rest: points that are not the object's [Q, 3].
    """
    if not up.sideways:
        return up, IDENTITY
    axis, reach = up.axis, float(np.median(np.linalg.norm(centres - centre, axis=1)))
    near = rest[np.linalg.norm(rest - centre, axis=1) < reach]
    height = float(np.median((near - centre) @ axis)) if len(near) >= LEAST_POINTS else 0.0
    if abs(height) < 0.02 * reach:
        height = -float(((centres - centre) @ axis).mean())
    if height > 0:
        axis = -axis
    turn = RIGHT_IS_UP if float(rotations[:, 0].mean(axis=0) @ axis) > 0 else LEFT_IS_UP
    return Up(axis=axis, sideways=True, ratio=up.ratio, sure=up.sure), turn


@dataclass(slots=True, eq=False)
class Votes:
    """Counts over the views, each [P]: observations, those in a mask, views that see the point, those in a mask."""

    observed: Float64
    observed_in: Float64
    seen: Float64
    seen_in: Float64

    @classmethod
    def none(cls, num_points: int) -> Votes:
        """Return empty counts."""
        return cls(*(np.zeros(num_points) for _ in range(4)))

    def of_object(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Return which points [P] are the object's."""
        tracked = (self.observed > 0) & (self.observed_in >= MIN_TRACK_SHARE * self.observed)
        out: np.ndarray[tuple[int], np.dtype[np.bool_]] = tracked & (self.seen_in >= MIN_SEEN_SHARE * self.seen)
        return out


def without_strays(points: Float64) -> Float64:
    """Return the points [N, 3] but those far outside the box of their 1st to 99th percentiles.

    The percentiles alone would shave 5 % off an object whose ends hold few points, all points would let one wrong match
    decide its size: what lies within 15 % of the box's longest side around it stays.
    """
    low, high = np.percentile(points, (1, 99), axis=0)
    reach = STRAY * float((high - low).max())
    out: Float64 = points[((points >= low - reach) & (points <= high + reach)).all(axis=1)]
    return out


def meeting_point(origins: Float64, directions: Float64) -> tuple[Float64, float]:
    """Return the point nearest to lines in the least squares sense [3], and its root mean square distance to them.

    Args:
        origins: [N, 3].
        directions: [N, 3] unit vectors.
    """
    away = np.eye(3) - directions[:, :, None] * directions[:, None, :]
    point = np.linalg.lstsq(away.sum(axis=0), (away @ origins[..., None]).sum(axis=0)[:, 0], rcond=None)[0]
    miss = np.linalg.norm((away @ (point - origins)[..., None])[..., 0], axis=1)
    return point, float(np.sqrt((miss**2).mean()))


def spread_of(directions: Float64) -> float:
    """Return how far unit vectors [N, 3] scatter around their main axis, root mean square, in radians if small."""
    values = np.linalg.eigvalsh(directions.T @ directions / len(directions))
    return float(np.sqrt(max(values[0] + values[1], 0.0)))


def world_rotation(up: Float64, first_centre: Float64, centre: Float64) -> Float64:
    """Return G [3, 3] with rows x, y, z: up is z, and the first camera stands on the side of -y."""
    away = first_centre - centre
    level = away - (away @ up) * up
    if np.linalg.norm(level) < 1e-9 * max(1.0, float(np.linalg.norm(away))):
        level = np.cross(up, np.eye(3)[int(np.argmin(np.abs(up)))])
    y = -level / np.linalg.norm(level)
    return np.stack([np.cross(y, up), y, up])


def spread(directions: Float64, number: int) -> list[int]:
    """Choose `number` of unit vectors [N, 3], spread evenly: each next one is the farthest from all chosen before.

    The first one begins, ties go to the lower index, the answer is sorted.
    """
    chosen, nearest = [0], directions @ directions[0]
    while len(chosen) < min(number, len(directions)):
        nearest[chosen] = np.inf
        chosen.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest, directions @ directions[chosen[-1]])
    return sorted(chosen)


def widest_angle_deg(directions: Float64) -> float:
    """Return the widest angle between two of unit vectors [N, 3], in degrees."""
    return float(np.degrees(np.arccos(np.clip((directions @ directions.T).min(), -1, 1))))


def growth(corners_px: list[Float64], focal_centres: list[tuple[Float64, Float64]]) -> float:
    """Return by how much the box [-1, 1]^3 must grow until its outline covers the masks in 95 % of the views.

    A mask outside the outline of the box proves that the object leaves the box, where its points are too few to show
    it; the reverse proves nothing, so this never shrinks one.

    Args:
        corners_px: hull of each mask [N, 2] on the tangent plane of its view.
        focal_centres: rotation [3, 3] and translation [3] of each view, from the normalised world.
    """
    cube = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T
    factors = np.arange(1.0, 1.62, 0.02)
    needed = []
    for hull, (rotation, translation) in zip(corners_px, focal_centres):
        for factor in factors:
            camera = factor * cube @ rotation.T + translation
            if (camera[:, 2] < 1e-3).any() or _covers(camera[:, :2] / camera[:, 2:], hull):
                break
        needed.append(factor)
    return float(np.quantile(needed, 0.95, method="lower")) if needed else 1.0


def _covers(points: Float64, hull: Float64) -> bool:
    """Whether the convex hull of points [8, 2] holds all but 2 % of its size of every point of hull [N, 2].

    Both are convex, so it is enough that no direction separates them; 32 directions are looked at.
    """
    angle = np.arange(32) * np.pi / 16
    normals = np.stack([np.cos(angle), np.sin(angle)])
    outer, inner = (points @ normals).max(axis=0), (hull @ normals).max(axis=0)
    size = float((outer + np.roll(outer, 16)).max())
    return bool((inner <= outer + 0.02 * size).all())
