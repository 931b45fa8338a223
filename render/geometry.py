"""Bounds of a scene from its triangles, in float64: numpy only, so that it can be tested without Blender.

Published assets hold strays: a speck 5000 units from a tree shrinks the tree to a pixel once a box is put around both.
Along each axis the triangles' intervals are merged into clusters that gaps separate; clusters that are together tiny
in area and far from the main one are dropped. The road not taken, percentiles of vertices, cuts thin parts (an
aerial, a sword) that belong to the object.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Float64

STRAY_AREA_SHARE = 0.01
STRAY_DISTANCE = 2.0
_MAX_ROUNDS = 12

MAX_POINTS = 2_000_000
"""The most points that a placed surface is described by; 32 views project so many in about 2 s."""

HULL_CELL = 1 / 512
"""Grid of the cells that stand for the hull of more points: a cell's diagonal is under 1/256 world unit."""

WEIGHT_CELL = 1 / 128
"""Grid of the cells that bear their area, or a power of two times it where those are still too many."""

_COARSE_CELL = 1 / 64

_OCTANT_CELLS = 32
"""Cells a side of the grid that tells inner points from outer ones: 3 ms for 100k points, which leaves a tenth."""

# Lines of the grid, each once: the axes, the diagonals of faces and of the cube, and the knight's moves between them.
_DIRECTIONS = np.array([d for d in product(range(-2, 3), repeat=3) if 1 in map(abs, d) and d > (0, 0, 0)])
_HALF = 2**20

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Triangles:
    """Axis-aligned boxes and areas of triangles: lo [T, 3], hi [T, 3], area [T], float64, world units."""

    lo: Float64
    hi: Float64
    area: Float64

    def __len__(self) -> int:
        return len(self.area)

    @classmethod
    def from_mesh(cls, vertices: Float64, triangles: NDArray[np.int32], matrix: Float64) -> Triangles:
        """Take vertices [V, 3] in local units, vertex indexes [T, 3] and world_from_local [4, 4]."""
        world = vertices @ matrix[:3, :3].T + matrix[:3, 3]
        a, b, c = (world[triangles[:, i]] for i in range(3))
        # Pairwise minima are several times faster than a reduction over an axis of three.
        low, high = np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c)
        return cls(low, high, np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2)

    @classmethod
    def concatenate(cls, parts: list[Triangles]) -> Triangles:
        """Put several lists of triangles one after the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("lo", "hi", "area")))


def bounds(triangles: Triangles, keep: BoolArray) -> tuple[Float64, Float64]:
    """Return the corners [3] and [3] of the box around the kept triangles; there must be one."""
    return triangles.lo[keep].min(axis=0), triangles.hi[keep].max(axis=0)


def find_strays(triangles: Triangles) -> BoolArray:
    """Return a mask [T] of triangles that are far from the object and next to nothing of it.

    A cluster is stray if it lies more than STRAY_DISTANCE main extents from the main cluster (the one of the largest
    area); all strays of an axis must hold less than STRAY_AREA_SHARE of the area, or none is dropped. An axis is
    looked at again after another has dropped something, since the main extent may have shrunk.
    """
    stray = np.zeros(len(triangles), bool)
    quiet = 0
    for i in range(_MAX_ROUNDS):
        found = _strays_along(triangles, ~stray, i % 3)
        quiet = 0 if found.any() else quiet + 1
        stray |= found
        if quiet == 3:
            break
    return stray


def _strays_along(triangles: Triangles, keep: BoolArray, axis: int) -> BoolArray:
    out = np.zeros(len(triangles), bool)
    rows = np.flatnonzero(keep)
    order = rows[np.argsort(triangles.lo[rows, axis], kind="stable")]
    lo, reach = triangles.lo[order, axis], np.maximum.accumulate(triangles.hi[order, axis])
    starts = np.flatnonzero(np.concatenate([[True], lo[1:] > reach[:-1]]))
    if len(starts) == 1:
        return out
    ends = np.concatenate([starts[1:], [len(order)]])
    area = np.add.reduceat(triangles.area[order], starts)
    main = int(area.argmax())
    members = order[starts[main] : ends[main]]
    extent = float((triangles.hi[members].max(axis=0) - triangles.lo[members].min(axis=0)).max())
    distance = np.maximum(lo[starts] - reach[ends[main] - 1], lo[starts[main]] - reach[ends - 1])
    far = distance > STRAY_DISTANCE * extent
    # The total is over all triangles, so that no number of rounds can drop more than one share an axis.
    if far.any() and area[far].sum() < STRAY_AREA_SHARE * triangles.area.sum():
        for cluster in np.flatnonzero(far):
            out[order[starts[cluster] : ends[cluster]]] = True
    return out


def surface_points(vertices: Float64, triangles: NDArray[np.int32], matrix: Float64) -> tuple[Float64, Float64]:
    """Return the vertices [U, 3] that triangles use, in the world, and the area [U] that each bears.

    A triangle's area is shared by its three corners. Vertices that no triangle uses are left out: loose ones are not
    rendered. Arguments are as those of `Triangles.from_mesh`.
    """
    world = vertices @ matrix[:3, :3].T + matrix[:3, 3]
    a, b, c = (world[triangles[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    used = np.zeros(len(vertices), bool)
    used[triangles.reshape(-1)] = True
    weights = np.bincount(triangles.reshape(-1), np.repeat(area / 3, 3), minlength=len(vertices))
    return world[used], weights[used]


def outer_points(points: Float64) -> Float64:
    """Return those of points [N, 3] that may be corners of their convex hull, in their order.

    A point that has others in all eight octants around it is inside: whichever way a plane through it faces, one of
    them lies before it. Octants are told by cells of a grid, strictly, so that rounding cannot matter.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    cell = np.maximum((high - low).max() / _OCTANT_CELLS, np.finfo(np.float64).tiny)
    index = np.minimum(((points - low) / cell).astype(np.int64), _OCTANT_CELLS - 1)
    flat = np.ravel_multi_index(tuple(index.T), (_OCTANT_CELLS,) * 3)
    # With a rim of empty cells, "beyond this cell along an axis" is a shift.
    occupied = np.zeros((_OCTANT_CELLS + 2,) * 3, bool)
    occupied[1:-1, 1:-1, 1:-1] = (np.bincount(flat, minlength=_OCTANT_CELLS**3) > 0).reshape((_OCTANT_CELLS,) * 3)
    inside = np.ones((_OCTANT_CELLS,) * 3, bool)
    for flips in product((1, -1), repeat=3):
        turned = tuple(slice(None, None, flip) for flip in flips)
        reached = occupied[turned]
        for axis in range(3):
            reached = np.logical_or.accumulate(reached, axis=axis)
        inside &= reached[:-2, :-2, :-2][turned]
    outer: BoolArray = ~inside.reshape(-1)[flat]
    return np.asarray(points[outer], np.float64)


def thin(points: Float64, weights: Float64, max_points: int = MAX_POINTS) -> tuple[Float64, Float64]:
    """Return the points [N, 3] and weights [N] as they are, or at most about max_points that stand for them.

    In place of too many stand two kinds of points. One bears all the weight: of each occupied cell of a grid the mean
    of its points, weighted, and the sum of their weights. The other bears none and holds the hull: the corners of
    outermost cells of HULL_CELL, so that the convex hull, and with it the box around any projection, contains every
    point given and reaches no further than a cell's diagonal beyond them. Cells are doubled while still too many.
    """
    if len(points) <= max_points:
        return points, weights
    corners = _hull_corners(points, max_points // 2)
    cell = WEIGHT_CELL
    while True:
        _, group = np.unique(_pack(np.floor(points / cell).astype(np.int64)), return_inverse=True)
        if group.max() < max_points // 2 or cell > 0.25:
            break
        cell *= 2
    total = np.bincount(group, weights)
    # A cell of no area at all still has a place.
    share = np.where(total[group] > 0, weights, 1.0)
    sums = np.stack([np.bincount(group, share * points[:, i]) for i in range(3)], axis=1)
    mean = sums / np.bincount(group, share)[:, None]
    return np.concatenate([mean, corners]), np.concatenate([total, np.zeros(len(corners))])


def _hull_corners(points: Float64, max_corners: int) -> Float64:
    """Return the corners [C, 3] of grid cells whose convex hull holds all points [N, 3] of [-2, 2]^3."""
    outer = points[~_surrounded(points)]
    offsets = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    cell = HULL_CELL
    while True:
        cells = _line_ends(np.floor(outer / cell).astype(np.int64))
        corners = _line_ends((cells[:, None] + offsets).reshape(-1, 3))
        if len(corners) <= max_corners or cell > 0.25:
            return corners.astype(np.float64) * cell
        cell *= 2


def _surrounded(points: Float64) -> BoolArray:
    """Return a mask [N] of points whose coarse cell has others beyond it in each of the eight octants.

    Whatever the direction, the one in the octant of its signs reaches further than the cell: it lies in their hull.
    """
    cells = np.floor(points / _COARSE_CELL).astype(np.int64)
    cells -= cells.min(axis=0)
    occupied = np.zeros(cells.max(axis=0) + 3, bool)  # with an empty border, so that there is always a cell beyond
    occupied[tuple((cells + 1).T)] = True
    inside = np.ones_like(occupied)
    for signs in np.ndindex(2, 2, 2):
        flip = tuple(slice(None, None, -1 if sign else 1) for sign in signs)
        reached = occupied[flip]
        for axis in range(3):
            reached = np.logical_or.accumulate(reached, axis=axis)
        beyond = np.zeros_like(reached)
        beyond[1:, 1:, 1:] = reached[:-1, :-1, :-1]
        inside &= beyond[flip]
    surrounded: BoolArray = inside[tuple((cells + 1).T)]
    return surrounded


def _line_ends(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the cells [C, 3], each once, that end a line of the grid along every one of many directions.

    Cells between the two ends of a line lie in the hull of the ends, and so do those between cells that are dropped
    later: each further direction thins what the others left.
    """
    cells = _unpack(np.unique(_pack(cells)))
    for direction in _DIRECTIONS:
        pivot = int(np.flatnonzero(np.abs(direction) == 1)[0])
        step = cells[:, pivot] * direction[pivot]
        line = _pack(cells - step[:, None] * direction)
        order = np.lexsort((step, line))
        ends = np.ones(len(order), bool)
        ends[1:-1] = (line[order][1:-1] != line[order][:-2]) | (line[order][1:-1] != line[order][2:])
        cells = cells[order[ends]]
    return cells


def _pack(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return one integer [N] for each triple [N, 3] of integers within 2^20 of 0."""
    shifted = cells + _HALF
    packed: NDArray[np.int64] = (shifted[:, 0] << 42) | (shifted[:, 1] << 21) | shifted[:, 2]
    return packed


def _unpack(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    mask = 2 * _HALF - 1
    cells: NDArray[np.int64] = np.stack([codes >> 42, (codes >> 21) & mask, codes & mask], axis=1) - _HALF
    return cells
