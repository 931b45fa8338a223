"""The fused renderer: what `reference` computes, in one Triton kernel forward and one backward.

Three things make it cheaper, and the first two are exact:

1. The first layer is folded into the planes. Bilinear sampling is linear and its weights add up to 1, so

       W1 [bilinear(T_xy); bilinear(T_xz); bilinear(T_yz)] + b1 = sum_k bilinear(W1_k T_k) + b1 = sum_k bilinear(P_k)

   with b1 inside P_xy. The product runs once a texel (12,288 of them in the paper's preset) instead of once a sample
   (8.4 M an object): 33.0 k multiply-adds a sample instead of 48.4 k, and 3 x 64 channels to gather instead of 3 x 80.
2. A tile of rays that all miss the box is written without a look at the planes.
3. Nothing but the result is kept: the backward pass computes activations again, a tile at a time, so memory does not
   depend on the number of samples. `lrm.volume.kernels` says how a tile is done.

Products take bfloat16 and add up in float32; positions, weights of the quadrature and all sums are float32. With
precision "fp32" nothing is rounded, which is for tests: such products do not use tensor cores.

Against `reference` in float32, over random sizes: `tests/lrm/test_volume_fused.py` states the tolerances.

Gradients of planes and MLP are added with atomics, so their last bits depend on the order of programs. Additions to the
planes are summed over a tile first: by the bounds of the tiles of 4 views of the paper's preset (patches of 128^2 of
views of 128, 256 and 384 px, cameras 1.5 to 3 from the origin) 0.9, 0.6 and 0.6 texels a sample, not 12.

Measured on an H200, paper preset, 4 objects of 4 views of 128^2 rays of 128 samples: forward 9.3 ms, backward 56.7 ms;
the reference 188 and 652 ms, 12.7 times as long, and 93 GB above its inputs, 950 times as much. Gradients are as far
from those of the reference in float32 as autocast's are (planes: 0.017 of their norm, both).

As compiled for sm_90: forward 4 warps, no spills, 76 KB of shared memory, so 2 programs a multiprocessor; backward 8
warps of 255 registers and 182 KB, so 1 program. It waits more than it computes: by counters of the version before this
one, a scheduler issued in one cycle of five. What was tried there, a pass of all 8 hidden layers (spills; 166 ms for 8
objects, now 109), tiles of 16 rays by 8 samples (128) and 64 by 2 (123), passes of 3 (137) and 5 layers (109), windows
of 8 x 8 texels (over 276), tiles in a scattered order (no difference).

An A100 has too little shared memory for the backward pass of the paper preset, which `refusal` says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lrm.volume.reference import RadianceField, Rendered, split_seed

Precision = Literal["bf16", "fp32"]
WIDTHS = (16, 32, 64)
WINDOW_SIDE = 4
NUM_STAGES = 2


class Tiling(NamedTuple):
    """A tile's rays are rows x columns neighbouring pixels, so that its samples lie within few texels of each plane."""

    rows: int
    columns: int
    steps: int
    warps: int


FORWARD = Tiling(rows=4, columns=4, steps=4, warps=4)
BACKWARD = Tiling(rows=4, columns=8, steps=4, warps=8)
MAX_LAYERS_A_PASS = 4
"""Hidden layers whose gradients one pass of the backward kernel takes; the registers hold no more."""


def refusal(field: torch.nn.Module, device: torch.device) -> str | None:
    """Return why the fused renderer cannot render a field on a device, or None if it can."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    interpreted = triton.knobs.runtime.interpret
    if device.type != "cuda" and not interpreted:
        return f"it runs on a CUDA GPU, not on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or later"
    if not isinstance(field, RadianceField):
        return "the field is not a RadianceField"
    width = _linears(field)[0].out_features
    if width not in WIDTHS:
        return f"the MLP's width is {width}, and {WIDTHS} are built"
    num_hidden = len(field.layers) - 2
    if device.type == "cuda":
        needed = shared_bytes(num_hidden, 1, width, torch.cuda.get_device_capability(device)[0])
        there = _shared_bytes_of(device)
        if needed > there:
            return f"{num_hidden + 2} layers of {width} need {needed} bytes of shared memory, and this GPU has {there}"
    return None


def _linears(field: RadianceField) -> list[nn.Linear]:
    return [layer for layer in field.layers if isinstance(layer, nn.Linear)]


def shared_bytes(num_hidden: int, layers: int, width: int, major: int) -> int:
    """Return the shared memory that a pass of the backward kernel over some layers needs at most, as compiled.

    Weights, the activations and rows of ones of the layers of the pass, and the rest. Hopper's products, of compute
    capability 9, read an operand as it lies or transposed; others keep a copy of it.
    """
    rows = BACKWARD.rows * BACKWARD.columns * BACKWARD.steps
    weights = (2 if major == 9 else 4) * num_hidden * width**2
    return weights + 2 * rows * (width * (layers + 1) + 16 * layers) + 20480


def layers_a_pass(num_hidden: int, width: int, device: torch.device) -> int:
    """Return how many hidden layers' gradients a pass of the backward kernel takes: what the shared memory holds."""
    if device.type != "cuda":
        return MAX_LAYERS_A_PASS
    major, there = torch.cuda.get_device_capability(device)[0], _shared_bytes_of(device)
    fitting = (n for n in range(MAX_LAYERS_A_PASS, 1, -1) if shared_bytes(num_hidden, n, width, major) <= there)
    return next(fitting, 1)


def _shared_bytes_of(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    out: int = properties.shared_memory_per_block_optin
    return out


def render_rays(
    planes: Tensor,
    field: RadianceField,
    origins: Tensor,
    directions: Tensor,
    num_samples: int,
    jitter: int | None = None,
    *,
    image_px: tuple[int, int] | None = None,
    precision: Precision = "bf16",
) -> Rendered:
    """Render rays through triplanes, as `reference.render_rays` does.

    Args:
        planes: [B, 3, C, R, R].
        field: the MLP; its weights and the planes get gradients.
        origins: [B, M, 3] in world units; gets no gradient.
        directions: [B, M, 3], of unit length; gets no gradient.
        num_samples: intervals a ray.
        jitter: seed of the samples' places in their intervals; None takes the middles.
        image_px: rows and columns of the pictures that the rays are, row by row and picture after picture. None if they
            are not pictures: any order gives the same result, but neighbours are cheaper.
        precision: what products take.

    Returns:
        rgb [B, M, 3], alpha [B, M], depth [B, M].

    Raises:
        ValueError: if rays require a gradient, or the field or device is refused.
    """
    reason = refusal(field, planes.device)
    if origins.requires_grad or directions.requires_grad:
        reason = "it gives rays no gradient"
    if reason is not None:
        raise ValueError(f"the fused renderer cannot be used: {reason}; use lrm.volume.reference")
    image_px = image_px or (1, origins.shape[1])
    orders = [_tile_order(origins.shape[1], image_px, tiling, planes.device) for tiling in (FORWARD, BACKWARD)]
    with torch.autocast(planes.device.type, enabled=False):
        first, *hidden, last = _linears(field)
        folded = fold_first_layer(planes.float(), first.weight.float(), first.bias.float())
        width = first.out_features
        weights = torch.stack([layer.weight for layer in hidden]) if hidden else planes.new_zeros(0, width, width)
        biases = torch.stack([layer.bias for layer in hidden]) if hidden else planes.new_zeros(0, width)
        out_weight, out_bias = F.pad(last.weight, (0, 0, 0, 12)), F.pad(last.bias, (0, 12))
        settings = (num_samples, field.density_bias, jitter, precision)
        rays = (origins.float().contiguous(), directions.float().contiguous(), *orders)
        tensors = (tensor.float().contiguous() for tensor in (folded, weights, biases, out_weight, out_bias))
        sums = _Fused.apply(settings, rays, *tensors)  # type: ignore[no-untyped-call]
        alpha = sums[..., 3]
        return Rendered(sums[..., :3] + (1 - alpha[..., None]), alpha, sums[..., 4] / alpha.clamp_min(1e-6))


def fold_first_layer(planes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return planes [B, 3, R, R, W] whose samples add up to the first layer's output, of planes [B, 3, C, R, R].

    Args:
        planes: [B, 3, C, R, R].
        weight: [W, 3C].
        bias: [W]; it goes into the first plane.
    """
    by_plane = weight.reshape(len(weight), 3, -1)  # [W, 3, C]
    folded = torch.einsum("bkcyx,wkc->bkyxw", planes, by_plane)
    return folded + torch.stack([bias, torch.zeros_like(bias), torch.zeros_like(bias)])[:, None, None]


@lru_cache(maxsize=8)
def _tile_order(num_rays: int, image_px: tuple[int, int], tiling: Tiling, device: torch.device) -> Tensor:
    """Return the rays of each tile, [tiles * rows * columns] int32, tile after tile; -1 fills the tiles at edges."""
    rows, columns = image_px
    if num_rays % (rows * columns):
        raise ValueError(f"{num_rays} rays are not a number of pictures of {rows} x {columns}")
    high, wide = (tiling.rows, tiling.columns) if rows >= tiling.rows else (1, tiling.rows * tiling.columns)
    rays = torch.arange(num_rays, dtype=torch.int32).reshape(-1, rows, columns)
    padded = F.pad(rays, (0, -columns % wide, 0, -rows % high), value=-1)
    pictures, down, across = len(padded), padded.shape[1] // high, padded.shape[2] // wide
    tiles = padded.reshape(pictures, down, high, across, wide)
    return tiles.permute(0, 1, 3, 2, 4).reshape(-1).to(device)


class _Fused(torch.autograd.Function):
    """(folded planes, hidden weights, hidden biases, output weight, output bias) to sums along rays [B, M, 5]."""

    @staticmethod
    def forward(ctx: Any, settings: Any, rays: Any, *tensors: Tensor) -> Tensor:
        """Launch a program a tile."""
        from lrm.volume import kernels

        planes, weights, biases, out_weight, out_bias = _operands(tensors, settings[3])
        origins, directions, order, _ = rays
        batch, num_rays = origins.shape[:2]
        tiles = order.numel() // (FORWARD.rows * FORWARD.columns)
        sums = planes.new_zeros(batch, num_rays, kernels.NUM_SUMS, dtype=torch.float32)
        ctx.settings, ctx.rays = settings, rays
        ctx.save_for_backward(*tensors, sums)
        if batch * tiles:
            kernels.forward_kernel[(batch * tiles,)](
                planes, weights, biases, out_weight, out_bias, origins, directions, order, sums,
                tiles, num_rays, *_arguments(planes, settings), **_constants(planes, weights, settings, FORWARD),
            )  # fmt: skip
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        """Launch as many programs as the GPU holds at a time; each takes its share of tiles."""
        from lrm.volume import kernels

        *tensors, sums = ctx.saved_tensors
        planes, weights, biases, out_weight, out_bias = _operands(tensors, ctx.settings[3])
        origins, directions, _, order = ctx.rays
        batch, num_rays = origins.shape[:2]
        tiles = order.numel() // (BACKWARD.rows * BACKWARD.columns)
        grads = [torch.zeros_like(tensor) for tensor in tensors]
        num_tiles = batch * tiles
        num_programs = min(num_tiles, _num_programs(planes.device))
        if num_tiles == 0:
            return None, None, *grads
        step = layers_a_pass(weights.shape[0], weights.shape[1], planes.device)
        for high in range(weights.shape[0], 0, -step) or [0]:
            low = max(0, high - step)
            kernels.backward_kernel[(num_programs,)](
                planes, weights, biases, out_weight, out_bias, origins, directions, order, sums,
                grad_sums.float().contiguous(), *grads,
                tiles, num_tiles, num_rays, *_arguments(planes, ctx.settings),
                **_constants(planes, weights, ctx.settings, BACKWARD), LOW=low, HIGH=high,
            )  # fmt: skip
        return None, None, *grads


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _operands(tensors: Sequence[Tensor], precision: Precision) -> list[Tensor]:
    """Return planes, weights, biases, out_weight, out_bias as the kernels read them."""
    out = list(tensors)
    for index in (0, 1, 3) if precision == "bf16" else ():
        out[index] = out[index].bfloat16()
        if _interpreted():
            out[index] = out[index].float()
    return out


def _arguments(planes: Tensor, settings: Any) -> tuple[int | float, ...]:
    num_samples, density_bias, jitter, _ = settings
    low, high = split_seed(jitter or 0)
    return num_samples, planes.shape[2], density_bias, low, high, 0


def _constants(planes: Tensor, weights: Tensor, settings: Any, tiling: Tiling) -> dict[str, Any]:
    precision = "bf16-emulated" if settings[3] == "bf16" and _interpreted() else settings[3]
    return {
        "NUM_HIDDEN": weights.shape[0], "WIDTH": planes.shape[-1], "RAYS": tiling.rows * tiling.columns,
        "STEPS": tiling.steps, "SIDE": WINDOW_SIDE, "JITTER": settings[2] is not None, "PRECISION": precision,
        "num_warps": tiling.warps, "num_stages": NUM_STAGES,
    }  # fmt: skip


def _num_programs(device: torch.device) -> int:
    """Return the programs of the backward pass: one a multiprocessor, whose registers its gradients fill."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
