"""The radiance field on a triplane and its picture, written for reading: the judge of any faster renderer.

Written from the mathematics. A point x of the box [-1, 1]^3 is projected on three planes, and the bilinear samples
are concatenated (LRM, section 3.3; Chan et al. 2022, equation 1, with a sum there):

    f(x) = [T_xy(x, y); T_xz(x, z); T_yz(y, z)]           (rgb, sigma)(x) = MLP(f(x)), no view direction

A ray r(t) = o + t d enters the box at t_n and leaves it at t_f. With N intervals of width delta = (t_f - t_n) / N and
one sample t_i in each, the emission-absorption integral becomes (Max 1995, equation 3; Mildenhall et al. 2020, 3):

    alpha_i = 1 - exp(-sigma_i delta)      T_i = exp(-sum_{j<i} sigma_j delta)      w_i = T_i alpha_i
    C = sum_i w_i c_i + (1 - sum_i w_i) * white

The quadrature is exact where the density is constant over each interval.

A sample lies in the middle of its interval, or, with a `jitter` seed, anywhere in it: at a place hashed from the seed,
the ray and the sample, so that nothing need be stored and every renderer on every device takes the same ones.

Cost, paper preset: 4 views x 128^2 rays x 128 samples = 8.4 M samples an object, 48.4 k multiply-adds each. Autograd
keeps about 13.8 GB of activations in bf16 for it. `lrm.volume.deferred` bounds that by rendering twice, a patch at a
time; `lrm.volume.fused` keeps nothing and computes less, on a GPU.

Not taken here, since they cost readability: dropping rays that miss the box, and folding the first layer of the MLP
into the planes (exact, as bilinear sampling is linear). The fused renderer does both.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrm.config import VolumeConfig

MASK_32 = 0xFFFFFFFF
PLANE_AXES = ((0, 1), (0, 2), (1, 2))
"""Axes of planes 0, 1, 2: the first runs along a plane's columns, the second along its rows."""


class Rendered(NamedTuple):
    """What rays see: rgb [..., 3] over white, alpha [...], and depth [...], the mean distance along the ray."""

    rgb: Tensor
    alpha: Tensor
    depth: Tensor


def intersect_box(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances [...] at which rays [..., 3] enter and leave [-1, 1]^3 (slab method, Kay and Kajiya 1986).

    Entry is 0 for an origin inside the box. A ray that misses the box, or has it behind, gets exit = entry.
    """
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    low, high = (-1 - origins) / safe, (1 - origins) / safe
    near = torch.minimum(low, high).amax(-1).clamp_min(0)
    far = torch.maximum(low, high).amin(-1)
    return near, torch.maximum(near, far)


def sample_triplane(planes: Tensor, points: Tensor) -> Tensor:
    """Return the features [B, M, 3C] of points [B, M, 3] on planes [B, 3, C, R, R], plane after plane.

    A plane's R texels tile [-1, 1], so texel i has its centre at (2i + 1) / R - 1; beyond the outer centres the
    border's value holds.
    """
    batch, _, channels, height, width = planes.shape
    grid = torch.stack([points[..., axes] for axes in PLANE_AXES], 1)  # [B, 3, M, 2]
    features = F.grid_sample(
        planes.reshape(batch * 3, channels, height, width),
        grid.reshape(batch * 3, -1, 1, 2),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return features.reshape(batch, 3 * channels, -1).transpose(1, 2)


class RadianceField(nn.Module):
    """The NeRF MLP: features [..., 3C] to rgb [..., 3] in [0, 1] and density [...] >= 0."""

    def __init__(self, plane_channels: int, config: VolumeConfig) -> None:
        super().__init__()
        widths = [3 * plane_channels] + [config.mlp_width] * (config.mlp_layers - 1) + [4]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.density_bias = config.density_bias

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return (rgb [..., 3], density [...]), both float32."""
        hidden = features
        for layer in self.layers[:-1]:
            hidden = F.relu(layer(hidden))
        out = self.layers[-1](hidden).float()
        return torch.sigmoid(out[..., :3]), F.softplus(out[..., 3] + self.density_bias)


def composite(rgb: Tensor, density: Tensor, delta: Tensor, distances: Tensor) -> Rendered:
    """Composite samples along rays over white.

    Args:
        rgb: [..., N, 3] colours, front to back.
        density: [..., N] per unit of length.
        delta: [...] or [..., N] widths of the intervals.
        distances: [..., N] distances of the samples from the ray's origin.
    """
    optical = density * (delta if delta.dim() == density.dim() else delta[..., None])
    before = torch.cumsum(optical, -1) - optical
    weights = torch.exp(-before) * -torch.expm1(-optical)
    alpha = weights.sum(-1)
    colour = (weights[..., None] * rgb).sum(-2) + (1 - alpha[..., None])
    return Rendered(colour, alpha, (weights * distances).sum(-1) / alpha.clamp_min(1e-6))


def jitter_offsets(jitter: int | None, ray_ids: Tensor, num_samples: int) -> Tensor:
    """Return the places [..., N] of samples in their intervals, in [0, 1), of rays numbered by ray_ids [...], int64.

    0.5 without a seed. With one, 24 bits of a 32-bit hash (MurmurHash3's finaliser, Appleby, public domain) of the
    seed's lower 62 bits, the ray's number and the sample's.
    """
    if jitter is None:
        return torch.full((*ray_ids.shape, num_samples), 0.5, device=ray_ids.device)
    low, high = split_seed(jitter)
    rays = _mix(_mix((ray_ids + low) & MASK_32) ^ high)
    steps = torch.arange(num_samples, device=ray_ids.device) * 0x9E3779B9
    return (_mix((rays[..., None] + steps) & MASK_32) >> 8).float() / 2**24


def split_seed(jitter: int) -> tuple[int, int]:
    """Return the two 31-bit halves of a seed that the hash takes."""
    return jitter & 0x7FFFFFFF, (jitter >> 31) & 0x7FFFFFFF


def _mix(bits: Tensor) -> Tensor:
    """MurmurHash3's finaliser on 32 bits in int64, whose overflow leaves the lower 32 bits right."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & MASK_32
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & MASK_32
    return bits ^ (bits >> 16)


def number_rays(origins: Tensor) -> Tensor:
    """Return the numbers [B, M], int64, by which rays [B, M, 3] are known to the jitter."""
    batch, num_rays = origins.shape[:2]
    return torch.arange(batch * num_rays, device=origins.device).reshape(batch, num_rays)


def render_rays(
    planes: Tensor,
    field: nn.Module,
    origins: Tensor,
    directions: Tensor,
    num_samples: int,
    jitter: int | None = None,
    ray_ids: Tensor | None = None,
) -> Rendered:
    """Render rays through triplanes, all at once.

    Args:
        planes: [B, 3, C, R, R].
        field: maps features [..., 3C] to (rgb [..., 3], density [...]).
        origins: [B, M, 3] in world units.
        directions: [B, M, 3], of unit length.
        num_samples: intervals a ray.
        jitter: seed of the samples' places in their intervals; None takes the middles.
        ray_ids: [B, M] numbers of the rays, where they are a part of a picture; None counts them, object by object.

    Returns:
        rgb [B, M, 3], alpha [B, M], depth [B, M].
    """
    near, far = intersect_box(origins, directions)
    delta = (far - near) / num_samples
    offsets = jitter_offsets(jitter, number_rays(origins) if ray_ids is None else ray_ids, num_samples)
    index = torch.arange(num_samples, device=origins.device, dtype=origins.dtype)
    distances = near[..., None] + (index + offsets) * delta[..., None]  # [B, M, N]
    points = origins[..., None, :] + distances[..., None] * directions[..., None, :]
    rgb, density = field(sample_triplane(planes, points.flatten(1, 2)))
    shape = distances.shape
    return composite(rgb.reshape(*shape, 3), density.reshape(shape), delta, distances)
