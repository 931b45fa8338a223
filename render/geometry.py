"""Bounds of a scene from its triangles, in float64: numpy only, so that it can be tested without Blender.

Published assets hold strays: a speck 5000 units from a tree shrinks the tree to a pixel once a box is put around both.
Along each axis the triangles' intervals are merged into clusters that gaps separate; clusters that are together tiny
in area and far from the main one are dropped. The road not taken, percentiles of vertices, cuts thin parts (an
aerial, a sword) that belong to the object.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Float64

STRAY_AREA_SHARE = 0.01
STRAY_DISTANCE = 2.0
_MAX_ROUNDS = 12

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
