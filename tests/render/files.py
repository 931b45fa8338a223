"""Small asset files, written by hand: what is in them is known to the last vertex."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

CUBE_VERTICES = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)], np.float32)
CUBE_TRIANGLES = np.array(
    [
        [0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
        [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3],
    ],
    np.uint32,
)  # fmt: skip
OCTAHEDRON_VERTICES = np.array(
    [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], np.float32
)  # fmt: skip
OCTAHEDRON_TRIANGLES = np.array(
    [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]], np.uint32
)


class Glb:
    """A GLB under construction: accessors, meshes and nodes are added, then it is written."""

    def __init__(self) -> None:
        self.binary = b""
        self.more_buffers: list[dict[str, Any]] = []
        self.document: dict[str, Any] = {
            "asset": {"version": "2.0"}, "scene": 0, "scenes": [], "nodes": [], "meshes": [],
            "accessors": [], "bufferViews": [],
        }  # fmt: skip

    def accessor(self, values: np.ndarray[Any, Any], kind: str) -> int:
        """Add an accessor over float32, uint32 or uint8 values."""
        component = {"f": 5126, "u": 5125 if values.itemsize == 4 else 5121}[values.dtype.kind]
        data = np.ascontiguousarray(values).tobytes()
        views, accessors = self.document["bufferViews"], self.document["accessors"]
        views.append({"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data)})
        accessors.append({"bufferView": len(views) - 1, "componentType": component, "count": len(values), "type": kind})
        if kind == "VEC3" and component == 5126 and np.isfinite(values).all():
            accessors[-1] |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        self.binary += data + b"\0" * (-len(data) % 4)
        return len(accessors) - 1

    def mesh(
        self,
        vertices: np.ndarray[Any, Any] = CUBE_VERTICES,
        triangles: np.ndarray[Any, Any] = CUBE_TRIANGLES,
        mode: int = 4,
        material: int | None = None,
        **attributes: int,
    ) -> int:
        """Add a mesh of one primitive; attributes are accessors by name."""
        primitive = {
            "attributes": {"POSITION": self.accessor(vertices.astype(np.float32), "VEC3"), **attributes},
            "indices": self.accessor(triangles.astype(np.uint32).reshape(-1), "SCALAR"),
            "mode": mode,
        }
        if material is not None:
            primitive["material"] = material
        self.document["meshes"].append({"primitives": [primitive]})
        return len(self.document["meshes"]) - 1

    def node(self, **fields: Any) -> int:
        self.document["nodes"].append(fields)
        return len(self.document["nodes"]) - 1

    def animation(self, node: int, path: str, times_s: Sequence[float], values: Any) -> None:
        """Add an animation of one channel: `path` is translation, weights and so on; values is [num_times, ...]."""
        rows = np.asarray(values, np.float32)
        kind = {"translation": "VEC3", "scale": "VEC3", "rotation": "VEC4", "weights": "SCALAR"}[path]
        sampler = {"input": self.accessor(np.float32(times_s), "SCALAR"), "output": self.accessor(rows, kind)}
        channel = {"sampler": 0, "target": {"node": node, "path": path}}
        self.document.setdefault("animations", []).append({"samplers": [sampler], "channels": [channel]})

    def scene(self, *nodes: int) -> None:
        self.document["scenes"].append({"nodes": list(nodes)})

    def write(self, path: Path) -> Path:
        document = {**self.document, "buffers": [{"byteLength": len(self.binary)}, *self.more_buffers]}
        text = json.dumps({name: value for name, value in document.items() if value != []}).encode()
        text += b" " * (-len(text) % 4)
        body = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(self.binary), b"BIN\0")
        path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(body) + len(self.binary)) + body + self.binary)
        return path


def one_mesh_glb(path: Path, vertices: np.ndarray[Any, Any] = CUBE_VERTICES, **node: Any) -> Path:
    """Write a GLB of one cube-like mesh on one node."""
    glb = Glb()
    glb.scene(glb.node(mesh=glb.mesh(vertices), **node))
    return glb.write(path)


def write_obj(
    path: Path,
    parts: Sequence[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Sequence[float]]],
    smooth: bool = False,
) -> Path:
    """Write an OBJ and its MTL; a part is (vertices [V, 3], triangles [T, 3], linear diffuse colour [3])."""
    lines, materials, first = [f"mtllib {path.stem}.mtl"], [], 1
    for i, (vertices, triangles, colour) in enumerate(parts):
        materials.append(f"newmtl m{i}\nKd {' '.join(map(str, colour))}\nKs 0 0 0\nillum 1\n")
        lines += [f"o part{i}", f"usemtl m{i}", f"s {int(smooth)}"]
        lines += [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in vertices]
        lines += [f"f {a + first} {b + first} {c + first}" for a, b, c in triangles]
        first += len(vertices)
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".mtl").write_text("\n".join(materials))
    return path


def ball(num_rings: int = 24) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return vertices [V, 3] and triangles [T, 3] of a unit sphere of latitude rings."""
    columns = 2 * num_rings
    theta = np.linspace(0, np.pi, num_rings + 1)[:, None]
    phi = np.linspace(0, 2 * np.pi, columns, endpoint=False)[None]
    grid = np.stack(np.broadcast_arrays(np.sin(theta) * np.cos(phi), np.cos(theta), np.sin(theta) * np.sin(phi)), -1)
    triangles = []
    for i in range(num_rings):
        for j in range(columns):
            a, b = i * columns + j, i * columns + (j + 1) % columns
            triangles += [[a, b, b + columns], [a, b + columns, a + columns]]
    return grid.reshape(-1, 3), np.array(triangles)
