"""Which renderer draws: the fused one where it can, else the reference, whole or by deferred back-propagation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrm.config import VolumeConfig
from lrm.volume import deferred, fused, reference
from lrm.volume.reference import Rendered
from pipeline.types import UserError


def uses_fused(field: nn.Module, config: VolumeConfig, device: torch.device) -> bool:
    """Tell whether the fused renderer is to be taken.

    `auto` takes it where products are bfloat16 anyway, under autocast, so that a float32 run stays one.

    Raises:
        UserError: if it is asked for and cannot be had.
    """
    if config.renderer == "auto":
        kind = device.type
        rounded = (
            kind == "cuda" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
        )
        return rounded and fused.refusal(field, device) is None
    if config.renderer == "fused" and (reason := fused.refusal(field, device)) is not None:
        raise UserError(f"model.volume.renderer 'fused': {reason}; set it to 'auto' or 'reference'")
    return config.renderer == "fused"


def render_rays(
    planes: Tensor,
    field: nn.Module,
    origins: Tensor,
    directions: Tensor,
    config: VolumeConfig,
    jitter: int | None = None,
    *,
    image_px: tuple[int, int] | None = None,
) -> Rendered:
    """Render rays [B, M, 3] through planes [B, 3, C, R, R]: see `reference.render_rays`, and `fused` for image_px."""
    samples = config.samples_per_ray
    if uses_fused(field, config, planes.device):
        assert isinstance(field, reference.RadianceField)
        return fused.render_rays(planes, field, origins, directions, samples, jitter, image_px=image_px)
    if 0 < config.chunk_rays < origins.shape[1]:
        return deferred.render_rays(planes, field, origins, directions, samples, jitter, patch_rays=config.chunk_rays)
    return reference.render_rays(planes, field, origins, directions, samples, jitter)
