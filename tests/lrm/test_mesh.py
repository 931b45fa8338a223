"""Meshes of fields whose surface is known: place, size, colour, and which side is up, out and front."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor

from lrm import mesh as meshes
from lrm.mesh import Mesh
from lrm.volume.reference import RadianceField
from pipeline.sample import srgb_to_linear
from pipeline.types import UserError
from tests.lrm.conftest import nano_config

CENTRE, RADIUS, SHARPNESS, LEVEL = torch.tensor([0.2, -0.1, 0.3]), 0.45, 60.0, 20.0
"""Densities are softplus(SHARPNESS times the depth under the surface + LEVEL), whose LEVEL is the surface itself."""


def ball(points: Tensor) -> tuple[Tensor, Tensor]:
    """A ball, red above and blue below, its front (-y) greener than its back."""
    local = points - CENTRE
    up = (local[:, 2:] > 0).float()
    green = torch.where(local[:, 1:2] < 0, 0.75, 0.25)
    rgb = torch.cat([0.9 * up, green.expand(len(points), 1), 0.8 * (1 - up)], 1)
    return rgb, torch.nn.functional.softplus(SHARPNESS * (RADIUS - local.norm(dim=1)) + LEVEL)


def box(points: Tensor) -> tuple[Tensor, Tensor]:
    """A box of half sides 0.3, 0.5, 0.7, grey."""
    outside = (points.abs() - torch.tensor([0.3, 0.5, 0.7])).amax(1)
    return torch.full_like(points, 0.5), torch.nn.functional.softplus(LEVEL - SHARPNESS * outside)


def surface_of(field: meshes.Field, resolution: int = 64) -> Mesh:
    return meshes.extract_surface(meshes.density_grid(field, resolution), LEVEL)


def as_trimesh(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def reopened(data: bytes) -> trimesh.Trimesh:
    return trimesh.load(io.BytesIO(data), file_type="glb", process=False).to_mesh()


def test_a_ball_is_watertight_and_outward_at_its_place_and_of_its_size() -> None:
    found = as_trimesh(surface_of(ball))
    assert found.is_watertight
    assert found.is_winding_consistent
    assert found.volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.01)  # positive: faces look outward
    np.testing.assert_allclose(found.center_mass, CENTRE, atol=1e-3)
    radii = np.linalg.norm(found.vertices - CENTRE.numpy(), axis=1)
    assert np.abs(radii - RADIUS).max() < 0.1 * 2 / 63  # a tenth of the grid's spacing


def test_a_box_has_its_sides() -> None:
    found = as_trimesh(surface_of(box, 81))
    assert found.is_watertight
    np.testing.assert_allclose(found.bounds, [[-0.3, -0.5, -0.7], [0.3, 0.5, 0.7]], atol=2e-3)


def test_a_surface_that_the_box_cuts_is_closed_there() -> None:
    def wall(points: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(points), torch.nn.functional.softplus(SHARPNESS * (0.5 - points[:, 0]) + LEVEL)

    found = as_trimesh(surface_of(wall, 33))
    assert found.is_watertight
    np.testing.assert_allclose(found.bounds, [[-1, -1, -1], [0.5, 1, 1]], atol=1e-3)


def test_a_field_without_a_surface_is_refused_with_what_there_is() -> None:
    thin = torch.full((8, 8, 8), 0.25)
    with pytest.raises(UserError, match=r"the density reaches 0\.25 at most, below level 20"):
        meshes.extract_surface(thin, LEVEL)


@pytest.mark.parametrize("resolution", [9, 24])
def test_the_grid_of_a_triplane_is_the_field_asked_point_by_point(resolution: int) -> None:
    config = nano_config().model
    torch.manual_seed(0)
    field = RadianceField(config.decoder.plane_channels, config.volume)
    for layer in field.layers:
        torch.nn.init.normal_(layer.bias)
    planes = torch.randn(3, config.decoder.plane_channels, 12, 12)
    ours = meshes.triplane_density_grid(planes, field, resolution)
    theirs = meshes.density_grid(meshes.triplane_field(planes, field), resolution)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    assert ours.std() > 0.1


def test_a_textured_glb_has_the_field_s_colours_everywhere_and_stands_upright() -> None:
    surface = surface_of(ball, 32)
    loaded = reopened(meshes.glb_bytes(surface, meshes.bake_texture(ball, surface, 512)))
    assert isinstance(loaded.visual, trimesh.visual.TextureVisuals)
    points, faces = trimesh.sample.sample_surface(loaded, 4000, seed=0)
    corners = loaded.triangles[faces]
    weights = trimesh.triangles.points_to_barycentric(corners, points)
    uv = (weights[..., None] * loaded.visual.uv[loaded.faces[faces]]).sum(1)
    seen = bilinear(loaded.visual.material.baseColorTexture, uv)
    # glTF: y up, front +z. Keep away from the seams of the colours, a texel or so wide.
    x, y, z = points.T
    world = np.stack([x, -z, y], 1) - CENTRE.numpy()
    clear = (np.abs(world[:, 1]) > 0.04) & (np.abs(world[:, 2]) > 0.04)
    wanted, _ = ball(torch.from_numpy(world + CENTRE.numpy()).float())
    assert clear.mean() > 0.6
    assert np.abs(seen[clear] - 255 * wanted.numpy()[clear]).max() < 1.5
    assert seen[(world[:, 2] > 0.1) & clear, 0].min() > 200  # red above: up is up
    loaded.merge_vertices(merge_tex=True, merge_norm=True)
    assert loaded.is_watertight
    assert loaded.volume > 0


def bilinear(image: Image.Image, uv: np.ndarray) -> np.ndarray:
    """Read a texture as a viewer does, v counted from the bottom as trimesh has it."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    x, y = uv[:, 0] * pixels.shape[1] - 0.5, (1 - uv[:, 1]) * pixels.shape[0] - 0.5
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - x0)[:, None], (y - y0)[:, None]
    x1, y1 = np.minimum(x0 + 1, pixels.shape[1] - 1), np.minimum(y0 + 1, pixels.shape[0] - 1)
    top = pixels[y0, x0] * (1 - fx) + pixels[y0, x1] * fx
    return top * (1 - fy) + (pixels[y1, x0] * (1 - fx) + pixels[y1, x1] * fx) * fy


def test_a_glb_with_vertex_colours_holds_them_linear() -> None:
    surface = surface_of(ball, 24)
    colours = meshes.field_colours(ball, surface.vertices)
    scene = trimesh.load(io.BytesIO(meshes.glb_bytes(surface, colours=colours)), file_type="glb", process=False)
    (loaded,) = scene.geometry.values()
    x, y, z = loaded.vertices.T
    rgb, _ = ball(torch.from_numpy(np.stack([x, -z, y], 1)).float())
    wanted = srgb_to_linear(np.rint(rgb.numpy() * 255) / 255)
    assert np.abs(loaded.visual.vertex_attributes["color"][:, :3] / 255 - wanted).max() < 0.51 / 255
    assert loaded.is_watertight


def test_a_texture_grows_until_cells_hold_a_face_and_no_further() -> None:
    for num_faces, wanted_px in ((2, 64), (5001, 256), (100_000, 1024)):
        cells, cell_px, side = meshes.texture_layout(num_faces, wanted_px)
        assert cells * cells * 2 >= num_faces
        assert cell_px >= meshes.MIN_CELL_PX
        assert side >= cells * cell_px
        assert side >= wanted_px
    with pytest.raises(UserError, match="8192 are allowed"):
        meshes.texture_layout(10_000_000, 1024)


def test_density_of_a_half_opaque_interval() -> None:
    level = meshes.half_opaque_density(128)
    assert 1 - math.exp(-level * 2 / 128) == pytest.approx(0.5)
