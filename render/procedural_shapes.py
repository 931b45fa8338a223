"""Meshes with texture coordinates for the procedural source, in numpy alone.

Almost everything is one construction: a grid of points [rows, columns, 3] whose columns close to a ring, so lathes,
lofts, prisms, boxes, tubes and tori share one code path for faces, caps and coordinates. Coordinates are in surface
lengths: one repeat of the texture is one unit of the surface, rounded to whole repeats round a ring, so that textures
that tile have no seam there and keep their proportions. Faces are wound counter-clockwise seen from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int = NDArray[np.int64]
End = Literal["cap", "pole", "open"]
TAU = 2 * np.pi


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mesh:
    """Polygons with texture coordinates.

    Attributes:
        vertices: [V, 3].
        corners: [L] vertex numbers, face after face.
        sizes: [F] corners of each face.
        uv: [L, 2] in repeats of the texture.
        slots: [F] number of each face's material within its part.
    """

    vertices: Float64
    corners: Int
    sizes: Int
    uv: Float64
    slots: Int

    @property
    def bounds(self) -> Float64:
        """Lowest and highest corner [2, 3] of the box that holds the mesh."""
        return np.stack([self.vertices.min(0), self.vertices.max(0)])

    @property
    def num_triangles(self) -> int:
        """Triangles after splitting every face."""
        return int((self.sizes - 2).sum())

    def moved(self, x: float = 0, y: float = 0, z: float = 0) -> Mesh:
        """Return the mesh shifted by (x, y, z)."""
        return self.shifted(np.array([x, y, z], np.float64))

    def shifted(self, offset: Float64) -> Mesh:
        """Return the mesh shifted by a vector [3]."""
        return replace(self, vertices=self.vertices + offset)

    def transformed(self, matrix: Float64) -> Mesh:
        """Return the mesh under a linear map [3, 3]; a map that mirrors turns the faces round as well."""
        mesh = replace(self, vertices=self.vertices @ matrix.T)
        if np.linalg.det(matrix) > 0:
            return mesh
        starts = np.cumsum(self.sizes) - self.sizes
        first = np.repeat(starts, self.sizes)
        order = 2 * first + np.repeat(self.sizes, self.sizes) - 1 - np.arange(len(self.corners))
        return replace(mesh, corners=self.corners[order], uv=self.uv[order])

    def scaled(self, x: float, y: float | None = None, z: float | None = None) -> Mesh:
        """Return the mesh scaled along each axis, or by x along all of them."""
        return self.transformed(np.diag([x, x if y is None else y, x if z is None else z]).astype(np.float64))

    def turned(self, axis: str, angle_rad: float) -> Mesh:
        """Return the mesh turned about a coordinate axis ("x", "y" or "z")."""
        return self.transformed(rotation(axis, angle_rad))

    def with_slot(self, slot: int) -> Mesh:
        """Return the mesh with all its faces in one material slot."""
        return replace(self, slots=np.full(len(self.sizes), slot, np.int64))

    def fitted(self, x: float, y: float, z: float) -> Mesh:
        """Return the mesh scaled into a box of these sizes, centred over the origin and standing on z = 0."""
        low, high = self.bounds
        scale = np.array([x, y, z]) / np.maximum(high - low, 1e-9)
        middle = (low + high) / 2
        return self.moved(-middle[0], -middle[1], -low[2]).scaled(*(float(s) for s in scale))


def rotation(axis: str, angle_rad: float) -> Float64:
    """Return the rotation [3, 3] about a coordinate axis."""
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def join(meshes: Sequence[Mesh]) -> Mesh:
    """Return one mesh that holds all of these; material slots are kept."""
    offsets = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes])
    return Mesh(
        vertices=np.concatenate([mesh.vertices for mesh in meshes]),
        corners=np.concatenate([mesh.corners + offset for mesh, offset in zip(meshes, offsets)]),
        sizes=np.concatenate([mesh.sizes for mesh in meshes]),
        uv=np.concatenate([mesh.uv for mesh in meshes]),
        slots=np.concatenate([mesh.slots for mesh in meshes]),
    )


def around(mesh: Mesh, count: int, phase_rad: float = 0.0) -> Mesh:
    """Return `count` copies of a mesh turned evenly about the z axis."""
    return join([mesh.turned("z", phase_rad + TAU * i / count) for i in range(count)])


def mirrored(mesh: Mesh) -> Mesh:
    """Return a mesh together with its mirror image in the plane x = 0."""
    return join([mesh, mesh.scaled(-1, 1, 1)])


def _lengths(points: Float64, axis: int) -> Float64:
    """Return running lengths along an axis of points [m, n, 3], [m, n] starting at 0."""
    length = np.linalg.norm(np.diff(points, axis=axis), axis=-1)
    pad = [(0, 0), (0, 0)]
    pad[axis] = (1, 0)
    return np.asarray(np.pad(np.cumsum(length, axis=axis), pad))


def surface(points: Float64, start: End = "cap", end: End = "cap", loop: bool = False) -> Mesh:
    """Return the closed-ring surface through points [rows, columns, 3].

    Args:
        points: rows are rings, counter-clockwise seen against the direction in which rows advance.
        start: how the first ring ends: a flat face, a point, or a hole.
        end: the same for the last ring.
        loop: whether the last ring joins the first one, as on a torus.
    """
    rows, columns = points.shape[:2]
    ids = np.arange(rows * columns).reshape(rows, columns)
    around_lengths = _lengths(np.concatenate([points, points[:, :1]], 1), 1)
    widest = around_lengths[int(np.argmax(around_lengths[:, -1]))]
    repeats = max(1, round(float(widest[-1])))
    u = widest / max(float(widest[-1]), 1e-9) * repeats
    wrapped = np.concatenate([points, points[:1]], 0) if loop else points
    v = _lengths(wrapped, 0).mean(1)
    if loop:
        v *= max(1, round(float(v[-1]))) / max(float(v[-1]), 1e-9)
        ids = np.concatenate([ids, ids[:1]], 0)
    else:
        ids = ids.copy()
        ids[0] = ids[0, 0] if start == "pole" else ids[0]
        ids[-1] = ids[-1, 0] if end == "pole" else ids[-1]
    right = np.concatenate([ids[:, 1:], ids[:, :1]], 1)
    quads = np.stack([ids[:-1], right[:-1], right[1:], ids[1:]], -1).reshape(-1, 4)
    tex_u, tex_v = np.meshgrid(u, v)
    corners_uv = np.stack([tex_u, tex_v], -1)
    quads_uv = np.stack([corners_uv[:-1, :-1], corners_uv[:-1, 1:], corners_uv[1:, 1:], corners_uv[1:, :-1]], 2)
    keep = quads != np.roll(quads, 1, axis=1)  # a pole makes two corners of a quad one vertex
    corner_lists, uv_lists, sizes = [quads[keep]], [quads_uv.reshape(-1, 4, 2)[keep]], [keep.sum(1)]
    for ring, kind, row in ((ids[0][::-1], start, points[0][::-1]), (ids[-1], end, points[-1])):
        if kind == "cap" and not loop:
            corner_lists.append(ring)
            uv_lists.append(_flat_uv(row))
            sizes.append(np.array([columns]))
    return _compact(
        points.reshape(-1, 3), np.concatenate(corner_lists), np.concatenate(sizes), np.concatenate(uv_lists)
    )


def _flat_uv(ring: Float64) -> Float64:
    """Return planar coordinates [n, 2], in lengths about the middle, of a flat ring [n, 3]."""
    centered = ring - ring.mean(0)
    normal = np.cross(centered, np.roll(centered, -1, 0)).sum(0)
    normal /= max(float(np.linalg.norm(normal)), 1e-12)
    helper = np.array([1.0, 0, 0]) if abs(normal[0]) < 0.8 else np.array([0.0, 1, 0])
    across = np.cross(normal, helper)
    across /= np.linalg.norm(across)
    return np.asarray(np.stack([centered @ np.cross(across, normal), centered @ across], -1) + 0.5)


def _compact(vertices: Float64, corners: Int, sizes: Int, uv: Float64) -> Mesh:
    """Return a mesh without the vertices that no face uses."""
    used, renumbered = np.unique(corners, return_inverse=True)
    slots = np.zeros(len(sizes), np.int64)
    return Mesh(vertices=vertices[used], corners=renumbered.reshape(-1), sizes=sizes, uv=uv, slots=slots)


def spline(knots: Float64, count: int) -> Float64:
    """Return `count` points [count, d] of the Catmull-Rom curve through knots [k, d]."""
    padded = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    t = np.linspace(0, len(knots) - 1, count)
    i = np.minimum(t.astype(np.int64), len(knots) - 2)
    f = (t - i)[:, None]
    a, b, c, d = (padded[i + k] for k in range(4))
    curve: Float64 = b + 0.5 * f * (c - a + f * (2 * a - 5 * b + 4 * c - d + f * (3 * (b - c) + d - a)))
    return curve


def circle(count: int = 48) -> Float64:
    """Return the unit circle [count, 2]."""
    angle = np.arange(count) * TAU / count
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def polar(radius: Callable[[Float64], Float64], count: int = 96) -> Float64:
    """Return the closed outline [count, 2] of radius(angle)."""
    angle = np.arange(count) * TAU / count
    return np.asarray(circle(count) * radius(angle)[:, None])


def supershape_radius(angle: Float64, lobes: float, n1: float, n2: float, n3: float) -> Float64:
    """Return the radius of Gielis' superformula (https://doi.org/10.3732/ajb.90.3.333) at angles in radians."""
    term = np.abs(np.cos(lobes * angle / 4)) ** n2 + np.abs(np.sin(lobes * angle / 4)) ** n3
    return np.asarray(np.maximum(term, 1e-6) ** (-1 / n1))


def rounded_rectangle(x: float, y: float, radius: float, steps: int = 4) -> Float64:
    """Return the outline [4 * steps, 2] of an x by y rectangle with round corners."""
    radius = min(radius, 0.49 * x, 0.49 * y)
    corners = []
    for quarter, (sx, sy) in enumerate(((1, 1), (-1, 1), (-1, -1), (1, -1))):
        angle = (quarter + np.linspace(0, 1, steps)) * np.pi / 2
        middle = np.array([sx * (x / 2 - radius), sy * (y / 2 - radius)])
        corners.append(middle + radius * np.stack([np.cos(angle), np.sin(angle)], -1))
    return np.concatenate(corners)


def prism(outline: Float64, height: float, bevel: float = 0.0, *, rows: int = 1, twist_rad: float = 0.0,
          top: float = 1.0, bulge: float = 0.0) -> Mesh:  # fmt: skip
    """Return an outline [n, 2] swept up from z = 0, with bevelled rims.

    Args:
        outline: counter-clockwise in the xy plane.
        height: along z.
        bevel: width of the rims.
        rows: steps along the height; a twist needs many.
        twist_rad: turn of the top against the foot.
        top: scale of the top against the foot.
        bulge: how much wider the middle is.
    """
    half = (outline.max(0) - outline.min(0)) / 2
    bevel = min(bevel, 0.45 * height, 0.45 * float(half.min()))
    t = np.linspace(0, 1, rows + 1)
    z = bevel + t * (height - 2 * bevel)
    size = np.ones((rows + 1, 2))
    if bevel > 0:
        inset = 1 - bevel / half
        t, z = np.concatenate([[0], t, [1]]), np.concatenate([[0], z, [height]])
        size = np.concatenate([inset[None], size, inset[None]])
    size = size * (1 + (top - 1) * t + bulge * np.sin(np.pi * t))[:, None]
    angle = twist_rad * t
    scaled = outline[None] * size[:, None]
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x, y = c * scaled[..., 0] - s * scaled[..., 1], s * scaled[..., 0] + c * scaled[..., 1]
    return surface(np.stack([x, y, np.broadcast_to(z[:, None], x.shape)], -1))


def box(x: float, y: float, z: float, bevel: float = 0.04) -> Mesh:
    """Return a bevelled box, centred over the origin and standing on z = 0."""
    return prism(rounded_rectangle(x, y, bevel * 1.3), z, bevel)


def cylinder(radius: float, height: float, bevel: float = 0.03, count: int = 40) -> Mesh:
    """Return a bevelled cylinder that stands on z = 0."""
    return prism(circle(count) * radius, height, bevel)


def lathe(profile: Float64, count: int = 64, flute: Callable[[Float64, Float64], Float64] | None = None) -> Mesh:
    """Return the solid of revolution of a profile [m, 2] of (radius, z), from its foot outwards.

    Args:
        profile: ends with a radius of 0 become points, others flat faces.
        count: columns.
        flute: factor on the radius as a function of angle [1, n] in radians and z [m, 1].
    """
    angle = np.arange(count) * TAU / count
    radius, z = profile[:, :1], profile[:, 1:]
    ring = radius * (np.ones((1, count)) if flute is None else flute(angle[None], z))
    points = np.stack([ring * np.cos(angle), ring * np.sin(angle), np.broadcast_to(z, ring.shape)], -1)
    ends: list[End] = ["pole" if r < 1e-6 else "cap" for r in (profile[0, 0], profile[-1, 0])]
    return surface(points, ends[0], ends[1])


def tube(path: Float64, radius: float | Float64, count: int = 16, loop: bool = False) -> Mesh:
    """Return a round tube of radius (a number or [m]) along a path [m, 3], with flat ends unless it is a loop.

    The rings are carried along without twist (parallel transport); a loop's leftover turn is spread over its length.
    """
    ahead = np.roll(path, -1, 0) - np.roll(path, 1, 0) if loop else np.gradient(path, axis=0)
    tangent = ahead / np.linalg.norm(ahead, axis=1, keepdims=True)
    helper = np.eye(3)[int(np.argmin(np.abs(tangent[0])))]
    first = np.cross(tangent[0], helper)
    normals = [first / np.linalg.norm(first)]
    for t in np.concatenate([tangent[1:], tangent[:1]]) if loop else tangent[1:]:
        carried = normals[-1] - t * (normals[-1] @ t)
        normals.append(carried / np.linalg.norm(carried))
    normal = np.stack(normals[: len(path)])
    binormal = np.cross(tangent, normal)
    left_over = np.arctan2(normals[-1] @ binormal[0], normals[-1] @ normal[0]) if loop else 0.0
    angle = np.arange(count) * TAU / count - (left_over * np.arange(len(path)) / len(path))[:, None]
    reach = np.broadcast_to(np.asarray(radius, np.float64), (len(path),))[:, None, None]
    ring = np.cos(angle)[..., None] * normal[:, None] + np.sin(angle)[..., None] * binormal[:, None]
    return surface(path[:, None] + reach * ring, loop=loop)


def torus(major: float, minor: float, columns: int = 64, rows: int = 24) -> Mesh:
    """Return a torus about the z axis."""
    return tube(np.concatenate([circle(columns) * major, np.zeros((columns, 1))], 1), minor, rows, loop=True)


def blob(radius: Callable[[Float64], Float64], steps: int = 20) -> Mesh:
    """Return the star-shaped solid of radius(directions [V, 3]) -> [V] over a cube whose faces hold the texture."""
    line = np.tan(np.linspace(-np.pi / 4, np.pi / 4, steps + 1))  # equal angles, so that faces keep their size
    a, b = np.meshgrid(line, line)
    flat = np.stack([a, b, np.ones_like(a)], -1).reshape(-1, 3)
    turns = [np.eye(3), rotation("x", np.pi)] + [
        rotation("z", k * np.pi / 2) @ rotation("y", np.pi / 2) for k in range(4)
    ]
    points = np.concatenate([flat @ turn.T for turn in turns])
    points, welded = np.unique(np.round(points, 9), axis=0, return_inverse=True)
    welded = welded.reshape(6, steps + 1, steps + 1)
    directions = points / np.linalg.norm(points, axis=1, keepdims=True)
    vertices = directions * radius(directions)[:, None]
    quads = np.stack([welded[:, :-1, :-1], welded[:, :-1, 1:], welded[:, 1:, 1:], welded[:, 1:, :-1]], -1)
    span = np.linspace(0, 1, steps + 1) * max(1.0, round(float(np.abs(vertices).max()) * 1.5))
    u, v = np.meshgrid(span, span)
    grid = np.stack([u, v], -1)
    uv = np.stack([grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]], 2)
    uv = np.broadcast_to(uv, (6, *uv.shape)).reshape(-1, 2)
    corners = quads.reshape(-1)
    return Mesh(vertices=vertices, corners=corners, sizes=np.full(len(corners) // 4, 4), uv=uv,
                slots=np.zeros(len(corners) // 4, np.int64))  # fmt: skip


def sphere(radius: float = 1.0, steps: int = 16) -> Mesh:
    """Return a sphere about the origin."""
    return blob(lambda directions: np.full(len(directions), radius), steps)


def superquadric(p: float, q: float, steps: int = 20) -> Mesh:
    """Return a unit superellipsoid: 2, 2 is a sphere, large exponents make a box, ones below 1 make spikes."""

    def radius(d: Float64) -> Float64:
        x, y, z = np.abs(d.T) + 1e-9
        return np.asarray(((x**p + y**p) ** (q / p) + z**q) ** (-1 / q))

    return blob(radius, steps)


def height_field(heights: Float64, x: float, y: float) -> Mesh:
    """Return a slab of x by y standing on z = 0 whose top follows heights [n, n], all above 0."""
    n = len(heights)
    px, py = np.meshgrid(np.linspace(-x / 2, x / 2, n), np.linspace(-y / 2, y / 2, n))
    points = np.stack([px, py, heights], -1)
    ids = np.arange(n * n).reshape(n, n)
    quads = np.stack([ids[:-1, :-1], ids[:-1, 1:], ids[1:, 1:], ids[1:, :-1]], -1).reshape(-1)
    top_uv = (points.reshape(-1, 3)[quads] / max(x, y) + 0.5)[:, :2]
    top = _compact(points.reshape(-1, 3), quads, np.full(len(quads) // 4, 4), top_uv)
    rim = np.concatenate([points[0, :-1], points[:-1, -1], points[-1, :0:-1], points[:0:-1, 0]])
    foot = rim * (1, 1, 0)
    walls = surface(np.stack([foot, rim]), "cap", "open")
    return join([top, walls])
