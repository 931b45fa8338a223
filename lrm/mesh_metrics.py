"""How far a surface is from the true one: Chamfer distance and F-score of points drawn from both.

With P and Q the points of the two surfaces, and d(p, Q) the Euclidean distance to the nearest point of Q:

    Chamfer      mean_p d(p, Q) + mean_q d(q, P)
    precision_t  share of p in P (predicted) with d(p, Q) < t        recall_t  share of q in Q with d(q, P) < t
    F_t          2 precision recall / (precision + recall)

in units of the world, whose box [-1, 1]^3 holds the object. Points of a mesh are drawn uniformly by area.

The true surface is what the depth planes of all views see: every pixel's point, thinned to one a voxel of a fine grid,
so that density follows area and not the number of views, and then drawn from. What no view sees is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

from lrm.mesh import Mesh
from lrm.pixels import Float32
from pipeline.types import Camera, Float64

VOXEL = 2 / 256
"""Side of the voxels that thin the true points: a pixel at 512 px and distance 2 is 0.0036 wide."""


def sample_surface(mesh: Mesh, count: int, seed: int) -> Float64:
    """Return points [count, 3] drawn uniformly by area; a pure function of its arguments."""
    rng = np.random.default_rng(seed)
    a, b, c = (mesh.vertices[mesh.faces[:, i]].astype(np.float64) for i in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    total = np.cumsum(areas)
    face = np.minimum(np.searchsorted(total, rng.random(count) * total[-1], side="right"), len(areas) - 1)
    u, v = rng.random((2, count))
    folded = u + v > 1  # the other half of the parallelogram, folded back
    u, v = np.where(folded, 1 - u, u)[:, None], np.where(folded, 1 - v, v)[:, None]
    points: Float64 = a[face] + u * (b - a)[face] + v * (c - a)[face]
    return points


def depth_points(depth: Float32, camera: Camera) -> Float64:
    """Return the world points [N, 3] of a planar depth picture [H, W], 0 being background, at pixel centres."""
    rows, columns = np.nonzero(depth)
    pixels = np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))], 1)
    local = pixels @ np.linalg.inv(camera.intrinsics).T * depth[rows, columns, None].astype(np.float64)
    points: Float64 = local @ camera.world_from_camera[:3, :3].T + camera.world_from_camera[:3, 3]
    return points


def thin(points: Float64, voxel: float = VOXEL) -> Float64:
    """Return the first point of each voxel, in the order of the voxels."""
    cells = np.floor(points / voxel).astype(np.int64)
    _, first = np.unique(cells, axis=0, return_index=True)
    return points[first]


def draw(points: Float64, count: int, seed: int) -> Float64:
    """Return `count` of the points, or all where there are no more."""
    if len(points) <= count:
        return points
    return points[np.sort(np.random.default_rng(seed).choice(len(points), count, replace=False))]


def surface_distances(predicted: Float64, true: Float64, thresholds: Sequence[float]) -> tuple[float, list[float]]:
    """Return the Chamfer distance of points [N, 3] and [M, 3], and the F-score at each threshold."""
    out, _ = cKDTree(true).query(predicted)
    back, _ = cKDTree(predicted).query(true)
    scores = []
    for threshold in thresholds:
        precision, recall = float((out < threshold).mean()), float((back < threshold).mean())
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return float(out.mean() + back.mean()), scores
