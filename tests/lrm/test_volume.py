"""The reference renderer against cases that can be solved by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lrm.volume.reference import composite, intersect_box, jitter_offsets, render_rays, sample_triplane

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
@pytest.mark.parametrize("jitter", [None, 7])
def test_a_box_of_constant_density_lets_exp_minus_sigma_length_through(density: float, jitter: int | None) -> None:
    origins, directions = rays(([0, -3, 0], [0, 1, 0]), ([-2, -2, 0.3], [1, 1, 0]), ([9, -3, 0], [0, 1, 0]))
    field = Uniform(density)
    out = render_rays(PLANES, field, origins, directions, 16, jitter)
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


def test_jitter_fills_intervals_evenly_and_is_a_function_of_seed_ray_and_sample() -> None:
    ids = torch.arange(2000)
    offsets = jitter_offsets(2**62 - 5, ids, 50)
    assert 0 <= offsets.min() < 1e-4
    assert 1 - 1e-4 < offsets.max() < 1
    counts = torch.histc(offsets, 20, 0, 1)
    assert ((counts - 5000).abs() < 5 * math.sqrt(5000)).all()
    centred = offsets - 0.5
    for one, other in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):  # next ray, next sample
        assert abs((one * other).mean() * 12) < 5 / math.sqrt(one.numel())
    torch.testing.assert_close(jitter_offsets(2**62 - 5, ids[700:710], 50), offsets[700:710], rtol=0, atol=0)
    assert not torch.equal(jitter_offsets(2**62 - 6, ids, 50), offsets)
    assert not torch.equal(jitter_offsets(2**61 - 5, ids, 50), offsets)  # the upper half of the seed counts too
    assert jitter_offsets(None, ids[:2], 3).unique().tolist() == [0.5]
