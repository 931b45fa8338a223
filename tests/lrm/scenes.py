"""Random radiance fields and the cameras that look at them, and what a renderer makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from lrm.cameras import pixel_rays
from lrm.config import VolumeConfig
from lrm.volume.reference import RadianceField, Rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Rays of `views` pictures of `image_px` an object, some of which miss the box."""

    planes: Tensor
    field: RadianceField
    origins: Tensor
    directions: Tensor
    num_samples: int
    jitter: int | None
    image_px: tuple[int, int]


def make_scene(
    *, seed: int, batch: int = 1, views: int = 1, image_px: tuple[int, int] = (4, 4), resolution: int = 6,
    channels: int = 3, layers: int = 3, width: int = 16, num_samples: int = 5, jitter: int | None = None,
    focal: float = 1.2, density_bias: float = -1.0, device: str = "cpu",
) -> Scene:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    config = VolumeConfig(mlp_layers=layers, mlp_width=width, samples_per_ray=num_samples, density_bias=density_bias)
    field = RadianceField(channels, config)
    with torch.no_grad():
        for layer in field.layers:
            layer.weight.copy_(normal(*layer.weight.shape) * (2 / layer.in_features) ** 0.5)
            layer.bias.copy_(normal(*layer.bias.shape) * 0.3)
    centres = F.normalize(normal(batch, views, 3), dim=-1) * 2.5
    forward = F.normalize(normal(batch, views, 3) * 0.3 - centres, dim=-1)
    right = F.normalize(torch.linalg.cross(forward, normal(batch, views, 3)), dim=-1)
    pose = torch.eye(4).repeat(batch, views, 1, 1)
    pose[..., :3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward], -1)
    pose[..., :3, 3] = centres
    rows, columns = image_px
    size = max(image_px)
    k = torch.tensor([[focal * size, 0, columns / 2], [0, focal * size, rows / 2], [0, 0, 1]])
    origins, directions = (x.flatten(1, 2) for x in pixel_rays(pose, k.expand(batch, views, 3, 3), rows, columns))
    planes = normal(batch, 3, channels, resolution, resolution)
    return Scene(
        planes=planes.to(device), field=field.to(device), origins=origins.to(device), directions=directions.to(device),
        num_samples=num_samples, jitter=jitter, image_px=image_px,
    )  # fmt: skip


@st.composite
def scenes(draw: st.DrawFn, device: str = "cpu") -> Scene:
    """Scenes of every built width and depth, whose sizes divide by nothing."""
    return make_scene(
        seed=draw(st.integers(0, 2**31)),
        batch=draw(st.integers(1, 2)),
        views=draw(st.integers(1, 2)),
        image_px=draw(st.sampled_from([(1, 1), (2, 7), (5, 3), (4, 4)])),
        resolution=draw(st.integers(2, 11)),
        channels=draw(st.integers(1, 4)),
        layers=draw(st.integers(2, 5)),
        width=draw(st.sampled_from([16, 32, 64])),
        num_samples=draw(st.integers(2, 9)),
        jitter=draw(st.none() | st.integers(0, 2**63 - 1)),
        focal=draw(st.sampled_from([0.4, 1.2, 12.0])),  # most rays miss; some; neighbours within a texel
        density_bias=draw(st.sampled_from([-1.0, 3.0, -12.0])),  # mist; nearly a wall; alpha of 1e-5
        device=device,
    )


def outputs_and_gradients(scene: Scene, render: Callable[[Tensor, nn.Module], Rendered]) -> dict[str, Tensor]:
    """Return rgb, alpha, depth of a renderer, and the gradients of planes and layers of a random mix of them.

    A layer's gradient is that of [weight | bias] together: a bias' own is a sum whose terms may cancel by chance, and
    the rounding of the terms then is large beside it. Depth counts by its alpha, since it is a quotient by it.
    """
    generator = torch.Generator().manual_seed(1)
    planes = scene.planes.clone().requires_grad_()
    scene.field.zero_grad()
    out = render(planes, scene.field)
    values = (out.rgb, out.alpha, out.depth * out.alpha.detach())
    mixed = [(v * torch.randn(v.shape, generator=generator).to(v.device)).sum() for v in values]
    sum(mixed).backward()  # type: ignore[union-attr]
    gradients = {
        f"layer {i}": torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        for i, layer in enumerate(scene.field.layers)
    }
    assert planes.grad is not None
    return {**{n: v.detach() for n, v in out._asdict().items()}, "planes": planes.grad, **gradients}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted| by Euclidean norm; where nothing is wanted, |found|."""
    return float((found - wanted).norm() / (wanted.norm() if wanted.norm() > 0 else 1))
