"""The reference renderer against cases that can be solved by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lrm.config import VolumeConfig
from lrm.volume.reference import RadianceField, composite, intersect_box, render_rays, sample_triplane

PLANES = torch.zeros(1, 3, 2, 4, 4)


class Uniform(nn.Module):
    """A field of one colour and density."""

    def __init__(self, density: float, colour: tuple[float, float, float] = (0.2, 0.4, 0.6)) -> None:
        super().__init__()
        self.density, self.colour = density, torch.tensor(colour)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        shape = features.shape[:-1]
        return self.colour.expand(*shape, 3), torch.full(shape, self.density)


def rays(*pairs: tuple[list[float], list[float]]) -> tuple[Tensor, Tensor]:
    origins, directions = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float32) for i in (0, 1))
    return origins[None], (directions / directions.norm(dim=-1, keepdim=True))[None]


def test_box_entry_and_exit() -> None:
    origins, directions = rays(
        ([0, -3, 0], [0, 1, 0]),  # through the middle
        ([0, 0, 0], [0, 0, 1]),  # from inside
        ([0, -3, 0], [0, -1, 0]),  # away
        ([5, -3, 0], [0, 1, 0]),  # past
        ([-2, -2, 0], [1, 1, 0]),  # along a diagonal
        ([2, 0, 2], [-1, 0, -1]),
    )
    near, far = intersect_box(origins, directions)
    root2 = math.sqrt(2)
    torch.testing.assert_close(near[0, [0, 1, 4, 5]], torch.tensor([2.0, 0.0, root2, root2]))
    torch.testing.assert_close(far[0, [0, 1, 4, 5]], torch.tensor([4.0, 1.0, 3 * root2, 3 * root2]))
    assert (far[0, 2:4] == near[0, 2:4]).all()


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0, 20.0])
@pytest.mark.parametrize("chunk_rays", [0, 2])
def test_a_box_of_constant_density_lets_exp_minus_sigma_length_through(density: float, chunk_rays: int) -> None:
    origins, directions = rays(([0, -3, 0], [0, 1, 0]), ([-2, -2, 0.3], [1, 1, 0]), ([9, -3, 0], [0, 1, 0]))
    field = Uniform(density)
    out = render_rays(PLANES, field, origins, directions, 16, chunk_rays=chunk_rays)
    through = torch.exp(-density * torch.tensor([[2.0, 2 * math.sqrt(2), 0.0]]))
    torch.testing.assert_close(out.alpha, 1 - through)
    torch.testing.assert_close(out.rgb, (1 - through)[..., None] * field.colour + through[..., None])


def test_depth_is_where_the_light_stops() -> None:
    origins, directions = rays(([0, -3, 0], [0, 1, 0]))
    out = render_rays(PLANES, Uniform(1e4), origins, directions, 200)
    assert out.depth.item() == pytest.approx(2.0, abs=0.01)
    assert out.alpha.item() == pytest.approx(1.0)


def test_two_layers_composite_front_to_back() -> None:
    rgb = torch.tensor([[[1.0, 0, 0], [0, 0, 1.0]]])
    density, delta = torch.tensor([[math.log(2), math.log(4)]]), torch.tensor([1.0])
    out = composite(rgb, density, delta, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(out.rgb, torch.tensor([[0.5 + 0.125, 0.125, 0.375 + 0.125]]))
    torch.testing.assert_close(out.depth, torch.tensor([(0.5 + 2 * 0.375) / 0.875]))


def test_planes_are_read_along_their_axes() -> None:
    """Plane k holds one world coordinate a channel; sampling must give back the point."""
    size = 8
    centres = (2 * torch.arange(size) + 1) / size - 1
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    planes = torch.stack([columns, rows]).expand(1, 3, 2, size, size)
    points = torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(0)) * 1.7 - 0.85
    x, y, z = points.unbind(-1)
    torch.testing.assert_close(sample_triplane(planes, points), torch.stack([x, y, x, z, y, z], -1))


def test_chunks_give_the_same_picture_and_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    field = RadianceField(2, VolumeConfig(mlp_layers=3, mlp_width=8, samples_per_ray=6))
    planes = torch.randn(2, 3, 2, 4, 4, generator=generator)
    origins = torch.tensor([0.0, -2.5, 0]).expand(2, 10, 3)
    directions = nn.functional.normalize(
        torch.randn(2, 10, 3, generator=generator) * 0.3 + torch.tensor([0, 1.0, 0]), dim=-1
    )
    offsets = torch.rand(2, 10, 6, generator=generator)
    results = []
    for chunk_rays in (0, 3):
        leaf = planes.clone().requires_grad_()
        out = render_rays(leaf, field, origins, directions, 6, offsets, chunk_rays)
        out.rgb.square().sum().backward()
        results.append((*out, leaf.grad))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(whole, chunked)
