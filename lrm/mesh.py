"""From a radiance field to a mesh with colours, and to a GLB file.

    planes [3, C, R, R]  --grid of N^3 densities-->  marching cubes  -->  vertices, faces  -->  texture  -->  GLB

**Densities on a grid.** On a regular grid the three planes need no sampling a point. Bilinear sampling is linear, so
the first layer of the MLP is folded into the planes (`lrm.volume.fused`), each folded plane is resampled once at the
grid's N^2 places, and the first layer at (x_i, y_j, z_k) is a sum of three rows:

    h_1 = P_xy[j, i] + P_xz[k, i] + P_yz[k, j]

The rest of the MLP runs a slab x_i at a time: memory is a few N^2 rows, and the 240-wide gather and product of each of
N^3 points (a third of the paper preset's work) are gone. It is the same function, held by a test.

**Surface.** Marching cubes (Lewiner et al. 2003, by scikit-image) at density `level`, over the density's inverse
softplus: that is what the MLP's last layer gives, and between two grid points it is nearer to linear than the density,
whose zeros all look alike. The grid spans [-1, 1]^3 with points on its faces and one more layer of empty points around,
so that a surface cut by the box is closed there. Meshes come out watertight.

**Texture.** Two triangles share a square cell of a picture: one below its diagonal and one above, with borders of
their own between them, so that bilinear filtering of one never meets the other. Each texel's place on its triangle is
known in closed form and its colour is asked of the field there. Linear in faces, and deterministic. Not taken: charts
(xatlas), which are nicer to paint on and far slower for meshes of this size.

World is z up with the input camera on -y; glTF is y up and its front is +z: (x, y, z) -> (x, z, -y), a turn, so that
faces stay outward. The material is unlit (KHR_materials_unlit): the colours are those of pictures, light included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import marching_cubes
from torch import Tensor, nn

from lrm.pixels import Float32
from lrm.volume.fused import fold_first_layer
from lrm.volume.reference import RadianceField, sample_triplane
from pipeline.sample import srgb_to_linear
from pipeline.types import UserError

Field = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Points [M, 3] in the world to sRGB colours [M, 3] in [0, 1] and densities [M]."""
Int64 = NDArray[np.int64]

GLTF_FROM_WORLD = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
"""z up with its front towards -y, to y up with its front towards +z."""

MIN_CELL_PX = 5
"""Least side of a texture cell: with fewer texels a triangle is one colour."""
MAX_TEXTURE_PX = 8192
"""Largest side that viewers are sure to take."""
CHUNK_POINTS = 2**18


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mesh:
    """A surface in the world: vertices [V, 3] float32, and faces [F, 3], counter-clockwise seen from outside."""

    vertices: Float32
    faces: Int64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texture:
    """A picture [S, S, 3] uint8 sRGB, and the place [F, 3, 2] of each face's corners in it, in texels from top left."""

    image: NDArray[np.uint8]
    corners: Float32


def triplane_field(planes: Tensor, field: nn.Module) -> Field:
    """Return what a triplane [3, C, R, R] and its MLP hold at points."""

    def ask(points: Tensor) -> tuple[Tensor, Tensor]:
        rgb, density = field(sample_triplane(planes[None], points[None]))
        return rgb[0], density[0]

    return ask


def grid_places(resolution: int, device: torch.device | None = None) -> Tensor:
    """Return the places [N] of a grid's points along each axis, both faces of the box included."""
    return torch.linspace(-1, 1, resolution, device=device)


@torch.no_grad()
def density_grid(field: Field, resolution: int, device: torch.device | None = None) -> Tensor:
    """Return densities [N, N, N], by x, y, z, of any field, asked a chunk at a time."""
    places = grid_places(resolution, device)
    plane = torch.cartesian_prod(places, places)
    out = torch.empty(resolution, resolution**2, device=device)
    for i, x in enumerate(places):
        points = torch.cat([x.expand(len(plane), 1), plane], 1)
        for start in range(0, len(points), CHUNK_POINTS):
            part = slice(start, start + CHUNK_POINTS)
            out[i, part] = field(points[part])[1]
    return out.reshape(resolution, resolution, resolution)


@torch.no_grad()
def triplane_density_grid(planes: Tensor, field: RadianceField, resolution: int) -> Tensor:
    """Return densities [N, N, N], by x, y, z, of a triplane [3, C, R, R], by three resampled planes."""
    first, *hidden, last = field.layers
    assert isinstance(first, nn.Linear)
    folded = fold_first_layer(planes[None].float(), first.weight.float(), first.bias.float())[0]  # [3, R, R, W]
    places = grid_places(resolution, planes.device)
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    grid = torch.stack([columns, rows], -1).expand(3, -1, -1, -1)
    maps = F.grid_sample(
        folded.permute(0, 3, 1, 2), grid, mode="bilinear", padding_mode="border", align_corners=False
    ).permute(0, 2, 3, 1)  # [3, second axis of the plane, first axis, W]
    xy, xz, yz = maps
    out = torch.empty(resolution, resolution, resolution, device=planes.device)
    step = max(1, CHUNK_POINTS // resolution)  # rows of y at a time
    for i in range(resolution):
        for start in range(0, resolution, step):
            y = slice(start, start + step)
            state = F.relu(xy[y, None, i] + xz[None, :, i] + yz[:, y].transpose(0, 1))  # [y, z, W]
            for layer in hidden:
                state = F.relu(layer(state))
            out[i, y] = F.softplus(last(state)[..., 3].float() + field.density_bias)
    return out


def half_opaque_density(samples_per_ray: int) -> float:
    """Return the density at which one interval of the training's quadrature, across the box, is half opaque.

    1 - exp(-sigma delta) = 1/2 with delta = 2 / samples: ln 2 * samples / 2. A model that learnt surfaces with so many
    samples had to reach about that within one of them.
    """
    return math.log(2) * samples_per_ray / 2


def extract_surface(density: Tensor, level: float) -> Mesh:
    """Return the surface of density = level of a grid [N, N, N] over [-1, 1]^3.

    Raises:
        UserError: if no density of the grid reaches the level.
    """
    highest = float(density.max())
    if not level < highest:
        raise UserError(
            f"no surface: the density reaches {highest:.3g} at most, below level {level:.3g}; train longer, or set "
            f"level={highest / 2:.2g} to see what there is"
        )
    inside = density > level
    lows, highs = [], []
    for axis in range(3):  # a box around what is inside, one point of the outside more: the rest holds no surface
        others = [other for other in range(3) if other != axis]
        hit = torch.nonzero(inside.amax(others)).flatten()
        lows.append(max(0, int(hit[0]) - 1))
        highs.append(min(density.shape[axis], int(hit[-1]) + 2))
    part = density[tuple(slice(low, high) for low, high in zip(lows, highs))]
    raw = _inverse_softplus(part.double()).float().cpu().numpy()
    edge = _inverse_softplus(torch.tensor(level, dtype=torch.float64)).item()
    padded = np.pad(raw, 1, constant_values=raw.min() if raw.min() < edge else edge - 1)
    vertices, faces, _, _ = marching_cubes(padded, edge, gradient_direction="ascent", allow_degenerate=False)
    spacing = 2 / (density.shape[0] - 1)
    placed = np.clip((vertices - 1 + lows) * spacing - 1, -1, 1)
    return Mesh(vertices=placed.astype(np.float32), faces=faces.astype(np.int64))


def _inverse_softplus(density: Tensor) -> Tensor:
    """Return x with softplus(x) = density; densities under 1e-9 count as that."""
    clamped = density.clamp_min(1e-9)
    return clamped + torch.log(-torch.expm1(-clamped))


@torch.no_grad()
def field_colours(field: Field, points: Float32, device: torch.device | None = None) -> NDArray[np.uint8]:
    """Return sRGB colours [M, 3] uint8 of points [M, 3], asked a chunk at a time."""
    out = np.empty((len(points), 3), np.uint8)
    for start in range(0, len(points), CHUNK_POINTS):
        part = slice(start, start + CHUNK_POINTS)
        rgb, _ = field(torch.from_numpy(points[part]).to(device))
        out[part] = (rgb.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return out


def texture_layout(num_faces: int, texture_px: int) -> tuple[int, int, int]:
    """Return cells along a side, texels along a cell, and the picture's side for so many faces.

    The picture grows beyond `texture_px` where cells would have fewer than 5 texels.

    Raises:
        UserError: if it would grow beyond 8192.
    """
    cells = max(1, math.ceil(math.sqrt((num_faces + 1) // 2)))
    cell_px = max(MIN_CELL_PX, texture_px // cells)
    side = max(texture_px, cells * cell_px)
    if side > MAX_TEXTURE_PX:
        raise UserError(
            f"{num_faces} faces need a texture of {side} px, and {MAX_TEXTURE_PX} are allowed; "
            "set colours=vertices, or a lower resolution"
        )
    return cells, cell_px, side


def bake_texture(field: Field, mesh: Mesh, texture_px: int, device: torch.device | None = None) -> Texture:
    """Paint each face's half cell with the field's colours at the places its texels stand for.

    Below the diagonal, texel (a, b) of a cell of c texels stands for v0 + a / L (v1 - v0) + b / L (v2 - v0) with
    L = c - 3; texels with a + b <= L lie on the face and those with a + b = L + 1 are the border that filtering reads.
    Above it the same cell is read from the other corner.
    """
    cells, cell_px, side = texture_layout(len(mesh.faces), texture_px)
    leg = cell_px - 3
    a, b = (axis.ravel() for axis in np.meshgrid(np.arange(leg + 2), np.arange(leg + 2)))
    a, b = a[a + b <= leg + 1], b[a + b <= leg + 1]
    weights = np.stack([1 - (a + b) / leg, a / leg, b / leg], 1).astype(np.float32)  # [K, 3]
    image = np.full((side, side, 3), 255, np.uint8)
    number = np.arange(len(mesh.faces))
    left, top = number // 2 % cells * cell_px, number // 2 // cells * cell_px
    first, sign = np.where(number % 2, cell_px - 1, 0), np.where(number % 2, -1, 1)
    for start in range(0, len(mesh.faces), max(1, CHUNK_POINTS // len(a))):
        part = slice(start, start + max(1, CHUNK_POINTS // len(a)))
        points = np.einsum("kc,fcd->fkd", weights, mesh.vertices[mesh.faces[part]])
        columns = (left + first)[part, None] + sign[part, None] * a
        rows = (top + first)[part, None] + sign[part, None] * b
        colours = field_colours(field, points.reshape(-1, 3), device)
        image[rows.ravel(), columns.ravel()] = colours
    corner = np.array([[0, 0], [leg, 0], [0, leg]])
    origin = np.stack([left + first, top + first], 1)[:, None] + 0.5
    return Texture(image=image, corners=(origin + sign[:, None, None] * corner).astype(np.float32))


def glb_bytes(mesh: Mesh, texture: Texture | None = None, colours: NDArray[np.uint8] | None = None) -> bytes:
    """Return a GLB of a mesh with a texture, or with sRGB colours [V, 3] of its vertices.

    A GLB's vertex colours are linear: they are turned into that, in 8 bits, which shows as bands in dark colours.
    """
    placed = mesh.vertices @ GLTF_FROM_WORLD.T
    if texture is not None:
        # trimesh counts v from the picture's bottom, as OpenGL does, and turns it round on writing.
        uv = texture.corners.reshape(-1, 2) / texture.image.shape[0]
        uv[:, 1] = 1 - uv[:, 1]
        material = trimesh.visual.material.PBRMaterial(
            baseColorTexture=Image.fromarray(texture.image), metallicFactor=0.0, roughnessFactor=1.0
        )
        shown = trimesh.Trimesh(
            placed[mesh.faces.ravel()], np.arange(mesh.faces.size).reshape(-1, 3), process=False,
            visual=trimesh.visual.TextureVisuals(uv=uv, material=material),
        )  # fmt: skip
    else:
        if colours is None:
            raise ValueError("a GLB needs a texture or colours of vertices")
        linear = np.rint(srgb_to_linear(colours.astype(np.float32) / 255) * 255).astype(np.uint8)
        shown = trimesh.Trimesh(placed, mesh.faces, vertex_colors=linear, process=False)
    data: bytes = trimesh.exchange.gltf.export_glb(trimesh.Scene(shown), tree_postprocessor=_as_painted)
    return data


def _as_painted(tree: dict[str, Any]) -> None:
    """Show colours as they are, and read the texture without mipmaps, whose texels would mix neighbouring cells."""
    tree.setdefault("materials", [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}])
    for material in tree["materials"]:
        material.setdefault("extensions", {})["KHR_materials_unlit"] = {}
    tree.setdefault("extensionsUsed", []).append("KHR_materials_unlit")
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            primitive.setdefault("material", 0)
    if tree.get("textures"):
        linear, clamp = 9729, 33071
        tree["samplers"] = [{"magFilter": linear, "minFilter": linear, "wrapS": clamp, "wrapT": clamp}]
        for texture in tree["textures"]:
            texture["sampler"] = 0


def write_glb(path: Path, mesh: Mesh, texture: Texture | None = None, colours: NDArray[np.uint8] | None = None) -> None:
    """Write `glb_bytes` to a file, which is whole or not there."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(glb_bytes(mesh, texture, colours))
    part.replace(path)
