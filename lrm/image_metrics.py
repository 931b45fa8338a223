"""Measures of predicted views against true ones, and of two sets of views against each other.

All take pictures [..., 3, H, W] of sRGB values in [0, 1] over white.

    PSNR   -10 log10 mean (x - y)^2, a view at a time
    SSIM   Wang et al. 2004: Gaussian window of sigma 1.5, K = (0.01, 0.03), population moments; by scikit-image,
           whose mean leaves out a border of 5 px, over the three channels
    LPIPS  VGG16, version 0.1 (`lrm.losses`)
    CLIP   cosine between CLIP's embeddings of the two pictures, resized bicubically to the network's side
    FID    of Inception features, as two Gaussians (Heusel et al. 2017):

               |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

With A the centred features of a set over sqrt(n - 1), S = A^T A, and the last trace is the sum of the singular values
of A1 A2^T: exact, without the square root of a matrix that is singular whenever there are fewer views than features.

Weights come from a folder (`metric_weights_dir`), never from a hub: `clip/`, a model of transformers, and Inception's
file. What is not there is left out, by name. torchvision is used by none of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

from lrm.losses import psnr_db
from pipeline.index import default_cache_dir
from pipeline.types import UserError

ENVIRONMENT = "LRM_METRIC_WEIGHTS"
CLIP_FOLDER = "clip"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Statistics of the pictures that CLIP was trained with (Radford et al. 2021, the released code)."""


def metric_weights_dir(configured: str = "") -> Path:
    """Return the folder of weights: the configured one, that of LRM_METRIC_WEIGHTS, or one in the cache."""
    named = configured or os.environ.get(ENVIRONMENT, "")
    return Path(named).expanduser() if named else default_cache_dir() / "metrics"


def psnr(predicted: Tensor, true: Tensor) -> list[float]:
    """Return the PSNR in dB of each picture of [V, 3, H, W]; at most 100."""
    errors = ((predicted.double() - true.double()) ** 2).mean((-3, -2, -1))
    return [psnr_db(float(error)) for error in errors]


def ssim(predicted: Tensor, true: Tensor) -> list[float]:
    """Return the structural similarity of each picture of [V, 3, H, W], 11 px at least."""
    pairs = zip(predicted.double().cpu().numpy(), true.double().cpu().numpy())
    return [
        float(
            structural_similarity(
                x, y, channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
        )
        for x, y in pairs
    ]


class ClipImages:
    """CLIP's image half, from a folder that transformers wrote."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import CLIPVisionModelWithProjection

        try:
            network = CLIPVisionModelWithProjection.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{folder}: no CLIP of transformers ({reason}); move it away to leave CLIP out") from None
        self.network = network.to(device).eval()
        self.image_px = int(network.config.image_size)
        c = network.config
        self.name = f"CLIP of {c.num_hidden_layers} layers, width {c.hidden_size}, {c.patch_size} px patches"
        self.name += f", {c.image_size} px, {c.projection_dim} numbers"

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Return unit embeddings [N, E] of pictures [N, 3, H, W]."""
        size = (self.image_px, self.image_px)
        resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (torch.tensor(value, device=images.device).reshape(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
        embedded: Tensor = self.network((resized - mean) / std).image_embeds.float()
        return F.normalize(embedded, dim=-1)

    def similarity(self, predicted: Tensor, true: Tensor) -> list[float]:
        """Return the cosine of each pair of pictures of [N, 3, H, W]."""
        cosines: list[float] = (self.embed(predicted) * self.embed(true)).sum(-1).cpu().tolist()
        return cosines


def frechet_distance(ours: NDArray[np.floating[Any]], theirs: NDArray[np.floating[Any]]) -> float:
    """Return the Frechet distance between Gaussians fitted to features [N, D] and [M, D], two of each at least.

    Raises:
        ValueError: if a set is too small for a covariance.
    """
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"sets of {len(ours)} and {len(theirs)} features; a covariance needs two of each")
    means = [np.mean(features, 0, dtype=np.float64) for features in (ours, theirs)]
    roots = [_root(features - mean) for features, mean in zip((ours, theirs), means)]
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    spread = sum(float((root**2).sum()) for root in roots)
    return max(0.0, float(((means[0] - means[1]) ** 2).sum() + spread - 2 * shared))


def _root(centred: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return A, D rows at most, with A^T A the covariance of centred features [N, D]."""
    scaled = centred.astype(np.float64) / np.sqrt(len(centred) - 1)
    if len(scaled) <= scaled.shape[1]:
        return np.asarray(scaled)
    return np.asarray(np.linalg.qr(scaled, mode="r"), np.float64)


def in_batches(images: Tensor, size: int = 16) -> Sequence[Tensor]:
    """Return pictures [N, ...] in groups, so that a network's memory does not grow with N."""
    return [images[start : start + size] for start in range(0, len(images), size)]


def eight_bits(images: Tensor) -> Tensor:
    """Round pictures in [0, 1] to what a PNG of them would hold."""
    return (images.clamp(0, 1) * 255).round() / 255
