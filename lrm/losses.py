"""The loss of LRM (section 3.4, equation 1): the mean over views of MSE + lambda LPIPS. Only the MSE is built yet."""

from __future__ import annotations

import torch
from torch import Tensor


def mse_loss(rendered: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error [] of patches [B, V, 3, P, P] in [0, 1], over objects, views and pixels alike."""
    return torch.mean((rendered - target) ** 2)


def psnr_db(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]; at most 100."""
    return -10 * float(torch.log10(torch.tensor(max(mse, 1e-10), dtype=torch.float64)))
