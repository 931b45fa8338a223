"""Scenes of rectangles whose every pixel is known: written as glTF, met by each pixel's ray in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.types import Camera, Float64, Sample
from tests.render.files import Glb

Array = np.ndarray[Any, Any]


@dataclass(slots=True, eq=False)
class Quad:
    """A rectangle in Blender's axes of the file (z up): corner + s * u + t * v, s and t in [0, 1].

    Attributes:
        material: of the glTF file.
        texture: [H, W, 3 or 4] uint8 sRGB, its first row at t = 0, not filtered; None for none.
        reverse: turn the face inside out.
    """

    corner: Sequence[float]
    u: Sequence[float]
    v: Sequence[float]
    material: dict[str, Any] = field(default_factory=dict)
    texture: Array | None = None
    reverse: bool = False


def matt(colour: Sequence[float], alpha: float = 1.0, **more: Any) -> dict[str, Any]:
    """Return a material that only scatters, of a linear colour."""
    return {
        "pbrMetallicRoughness": {
            "baseColorFactor": [*colour, alpha], "metallicFactor": more.pop("metallic", 0.0), "roughnessFactor": 1.0
        },
        "alphaMode": "OPAQUE" if alpha == 1 else "BLEND",
        "doubleSided": True,
        "extensions": {"KHR_materials_specular": {"specularFactor": 0.0}},
    } | more  # fmt: skip


def write_quads(path: Path, quads: Sequence[Quad]) -> Path:
    """Write a GLB of the rectangles, a mesh and a material each."""
    glb = Glb()
    document = glb.document
    document["extensionsUsed"] = ["KHR_materials_specular", "KHR_materials_transmission", "KHR_materials_unlit"]
    materials = document.setdefault("materials", [])
    nodes = []
    for quad in quads:
        material = {**quad.material}
        if quad.texture is not None:
            inner = {"baseColorTexture": {"index": _add_texture(glb, quad.texture)}}
            material["pbrMetallicRoughness"] = {**material.get("pbrMetallicRoughness", {}), **inner}
        materials.append(material)
        corner, u, v = (np.asarray(x, float) for x in (quad.corner, quad.u, quad.v))
        corners = np.array([corner, corner + u, corner + u + v, corner + v])
        triangles = np.array([[0, 1, 2], [0, 2, 3]])[:, :: -1 if quad.reverse else 1]
        uv = glb.accessor(np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32), "VEC2")
        mesh = glb.mesh(corners[:, [0, 2, 1]] * [1, 1, -1], triangles, material=len(materials) - 1, TEXCOORD_0=uv)
        nodes.append(glb.node(mesh=mesh))
    glb.scene(*nodes)
    return glb.write(path)


def _add_texture(glb: Glb, pixels: Array) -> int:
    """Add an image and a texture of it that is not filtered; return the texture."""
    swap = cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
    data = cv2.imencode(".png", cv2.cvtColor(pixels, swap))[1].tobytes()
    document = glb.document
    document["bufferViews"].append({"buffer": 0, "byteOffset": len(glb.binary), "byteLength": len(data)})
    glb.binary += data + b"\0" * (-len(data) % 4)
    images, textures = document.setdefault("images", []), document.setdefault("textures", [])
    document["samplers"] = [{"magFilter": 9728, "minFilter": 9728, "wrapS": 33071, "wrapT": 33071}]
    images.append({"bufferView": len(document["bufferViews"]) - 1, "mimeType": "image/png"})
    textures.append({"source": len(images) - 1, "sampler": 0})
    return len(textures) - 1


def rays(camera: Camera) -> Float64:
    """Return the world direction [H, W, 3] of the ray through each pixel's centre, 1 long along the camera's z."""
    x, y = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    pixels = np.stack([x, y, np.ones_like(x)], axis=2)
    directions: Float64 = pixels @ np.linalg.inv(camera.intrinsics).T @ camera.world_from_camera[:3, :3].T
    return directions


def unproject(camera: Camera, depth: Array) -> Float64:
    """Return world points [H, W, 3] of planar depths [H, W]."""
    points: Float64 = camera.world_from_camera[:3, 3] + rays(camera) * np.asarray(depth, np.float64)[..., None]
    return points


@dataclass(slots=True, eq=False)
class Hits:
    """Where each pixel's ray meets each rectangle: planar depth, s and t, [Q, H, W] each, and unit normals [Q, 3]."""

    depth: Float64
    s: Float64
    t: Float64
    normal: Float64

    def inside(self, margin: float = 0.0) -> Array:
        """Return where rays meet rectangles [Q, H, W], a margin of them left out, or added if it is negative."""
        low, high = margin, 1 - margin
        within = (self.s >= low) & (self.s <= high) & (self.t >= low) & (self.t <= high)
        return np.asarray(within & (self.depth > 0))


def cast(sample: Sample, view: int, quads: Sequence[Quad]) -> Hits:
    """Intersect the rays of a view with rectangles, which the sample's normalization has placed."""
    camera, norm = sample.views[view].camera, sample.normalization
    directions, origin = rays(camera), camera.world_from_camera[:3, 3]
    depth, s, t, normals = [], [], [], []
    for quad in quads:
        u, v = (norm.scale * norm.rotation @ np.asarray(x, float) for x in (quad.u, quad.v))
        corner = norm.scale * norm.rotation @ np.asarray(quad.corner, float) + norm.translation
        normal = np.cross(u, v)
        normals.append(normal / np.linalg.norm(normal))
        with np.errstate(divide="ignore"):
            z = ((corner - origin) @ normal) / (directions @ normal)
        offset = origin + directions * z[..., None] - corner
        depth.append(z)
        s.append(offset @ u / (u @ u))
        t.append(offset @ v / (v @ v))
    return Hits(np.stack(depth), np.stack(s), np.stack(t), np.stack(normals))
