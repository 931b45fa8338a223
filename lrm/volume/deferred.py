"""Deferred back-propagation: a picture of any size with the memory of one patch (Zhang et al., ARF, 2022, section 4.2).

    forward    render the picture without a graph, patch after patch
    (caller)   loss of the whole picture, LPIPS too, and its gradient dL/dpicture
    backward   render each patch again, now with a graph, and back-propagate that patch's part of dL/dpicture

By the chain rule over pixels the gradients are those of autograd, up to the order of sums. Memory: the picture, one
patch's activations, and one gradient of the planes. Cost: one more forward rendering, a third more work.

Against checkpointing of every patch: no graph of patches is kept between the passes, and gradients add up in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lrm.volume.reference import Rendered, number_rays
from lrm.volume.reference import render_rays as render_patch


def render_rays(
    planes: Tensor,
    field: nn.Module,
    origins: Tensor,
    directions: Tensor,
    num_samples: int,
    jitter: int | None = None,
    *,
    patch_rays: int,
) -> Rendered:
    """Render rays as `reference.render_rays` does, `patch_rays` rays of each object at a time.

    Gradients flow to planes and to the field's parameters. Rays get none.

    Raises:
        ValueError: if rays require a gradient.
    """
    if origins.requires_grad or directions.requires_grad:
        raise ValueError("deferred back-propagation gives rays no gradient; use lrm.volume.reference")
    parameters = tuple(field.parameters())
    rendering = (field, origins, directions, num_samples, jitter, patch_rays)
    rgb, alpha, depth = _Deferred.apply(rendering, planes, *parameters)  # type: ignore[no-untyped-call]
    return Rendered(rgb, alpha, depth)


def _patches(rendering: Any) -> Any:
    """Yield each patch's slice of rays, and what renders it from planes."""
    field, origins, directions, num_samples, jitter, patch_rays = rendering
    ids = number_rays(origins)
    for start in range(0, origins.shape[1], patch_rays):
        rays = slice(start, start + patch_rays)

        def render(planes: Tensor, rays: slice = rays) -> Rendered:
            return render_patch(planes, field, origins[:, rays], directions[:, rays], num_samples, jitter, ids[:, rays])

        yield rays, render


class _Deferred(torch.autograd.Function):
    """(planes, parameters of the field) to (rgb, alpha, depth)."""

    @staticmethod
    def forward(ctx: Any, rendering: Any, planes: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Render without a graph."""
        device = planes.device.type
        ctx.rendering = rendering
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(planes, *parameters)
        pieces = [render(planes) for _, render in _patches(rendering)]  # autograd is off in here
        return tuple(torch.cat(parts, 1) for parts in zip(*pieces))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Render each patch again and add up its gradients."""
        planes, *parameters = ctx.saved_tensors
        leaf = planes.detach().requires_grad_(ctx.needs_input_grad[1])
        wanted = [tensor for tensor in (leaf, *parameters) if tensor.requires_grad]
        totals = [torch.zeros_like(tensor) for tensor in wanted]
        device, dtype, enabled = ctx.autocast
        for rays, render in _patches(ctx.rendering):
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                out = render(leaf)
            parts = [(value, grad[:, rays]) for value, grad in zip(out, grads) if value.requires_grad]
            if not parts:
                continue
            values, value_grads = zip(*parts)
            found = torch.autograd.grad(values, wanted, value_grads, allow_unused=True)
            for total, grad in zip(totals, found):
                if grad is not None:
                    total.add_(grad)
        given = iter(totals)
        return None, *(next(given) if tensor.requires_grad else None for tensor in (leaf, *parameters))
