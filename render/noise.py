"""How noisy a picture is, measured without knowing the picture it should be: numpy only.

The error that counts is the one that training sees: 8-bit sRGB, composited on white, at full resolution and after
2 x 2 averaging. Two probes, renders of one sample a pixel with seeds of their own, give it without a reference:

    E[(x - p1)(x - p2)] = (x - truth)^2        for independent, unbiased p1 and p2, whatever x is

so the mean of that product over the picture is an unbiased estimate of the squared error of x, the denoiser's bias
included. A difference of two halves of one render would measure variance only, and wrongly: halves of a Sobol sequence
are not independent. The probes are brought to sRGB by the tangent at x, since the curve of a noisy value is not the
noisy value of the curve. With 60 000 covered pixels and probes of 20 dB the estimate's own error is near -45 dB, well
under the targets of -40 and -34. Cost: 2 samples a pixel, and 20 ms a view of 512^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

MIN_SAMPLES = 4
"""Samples a pixel that a view takes at least: fewer leave coverage in steps that edges show."""

_LADDER = (4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Sample counts that are tried; beyond the last they go on by factors of 1.25."""

DB_PER_DOUBLING = 2.4
"""What twice the samples bring: 2 to 4 dB were measured for denoised views (3 without); a low guess asks for more."""

MARGIN_DB = 0.25
"""What an estimate must exceed its target by: its own error, and that of looking again until it passes."""

RELAX_DB = 2.5
"""A view that passes by more than this lets the next one start a step lower."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A picture over white, and its coverage.

    Attributes:
        colour: [H, W, 3], scene-linear, composited on white.
        alpha: [H, W, 1] in [0, 1].
    """

    colour: Float32
    alpha: Float32


@dataclass(frozen=True, slots=True)
class Psnr:
    """Estimated PSNR of a whole view on white in dB: after 2 x 2 averaging, and at full resolution."""

    half_db: float
    full_db: float

    def shortfall_db(self, half_db: float, full_db: float) -> float:
        """Return by how many dB the worse of both misses its target; negative where both are exceeded."""
        return max(half_db - self.half_db, full_db - self.full_db)


def on_white(layer: Layer) -> Float32:
    """Return the picture as training composites it: straight sRGB times alpha plus white; [H, W, 3] in [0, 1]."""
    return np.asarray(_srgb(_straight(layer)) * layer.alpha + (1 - layer.alpha), np.float32)


def estimate(picture: Layer, probes: tuple[Layer, Layer], num_pixels: int) -> Psnr:
    """Estimate the PSNR of a picture from two independent probes of the same view.

    Args:
        picture: what was made, by any means that does not look at the probes.
        probes: two unbiased renders of the same pixels, independent of each other and of the picture.
        num_pixels: pixels of the whole view; what lies outside the arrays is background without error. The arrays
            start at an even row and column, so that their 2 x 2 blocks are the view's.
    """
    covered = (picture.alpha > 0) | (probes[0].alpha > 0) | (probes[1].alpha > 0)
    if not covered.any():
        return Psnr(math.inf, math.inf)
    straight = _straight(picture)
    slope = _srgb_slope(straight)
    by_alpha = np.where(picture.alpha > 0, _srgb(straight) - 1 + slope * (1 - straight), -1.0).astype(np.float32)
    # Differences to the probes, not the pictures themselves: what the tangent is taken at cancels.
    first, second = (
        np.asarray(slope * (picture.colour - probe.colour) + by_alpha * (picture.alpha - probe.alpha), np.float32)
        for probe in probes
    )
    full = float(np.vdot(first, second)) / (3 * num_pixels)
    half = float(np.vdot(_average(first), _average(second))) / (3 * num_pixels / 4)
    rounding = 1 / (12 * 255**2)  # of 8-bit output
    return Psnr(_db(half + rounding / 4), _db(full + rounding))


def next_samples(samples: int, shortfall_db: float, max_samples: int) -> int:
    """Return how many samples should make up for a shortfall: more than `samples`, on the ladder, at most the limit."""
    wanted = samples * 2 ** (min(shortfall_db, 20.0) / DB_PER_DOUBLING)
    # At most fourfold at once: an estimate from few samples overshoots.
    return max(samples + 1, _step(min(wanted, 4.0 * samples), max_samples)) if samples < max_samples else max_samples


def first_samples(samples: int, shortfall_db: float, max_samples: int) -> int:
    """Return how many samples the next view of the same object should start with, after one that took `samples`."""
    if shortfall_db > -RELAX_DB:
        return samples
    return max(MIN_SAMPLES, _step(samples * 2 ** ((shortfall_db + 1.0) / 4.0), max_samples))


def _step(wanted: float, max_samples: int) -> int:
    """Return the least count of the ladder that is at least `wanted`."""
    for count in _LADDER:
        if count >= wanted:
            return min(count, max_samples)
    power = math.ceil(math.log(wanted / _LADDER[-1]) / math.log(1.25))
    return min(2 * round(_LADDER[-1] * 1.25**power / 2), max_samples)


def _straight(layer: Layer) -> Float32:
    return np.asarray((layer.colour - (1 - layer.alpha)) / np.maximum(layer.alpha, 1e-6), np.float32)


def _srgb(linear: Float32) -> Float32:
    x = np.clip(linear, 0.0, 1.0)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.power(x, 1 / 2.4, dtype=np.float32) - 0.055).astype(
        np.float32
    )


def _srgb_slope(linear: Float32) -> Float32:
    """Return the derivative of the clipped sRGB curve: 0 outside [0, 1]."""
    x = np.clip(linear, 0.0031308, 1.0)
    slope = np.where(linear <= 0.0031308, 12.92, (1.055 / 2.4) * np.power(x, 1 / 2.4 - 1, dtype=np.float32))
    return np.where((linear >= 0) & (linear <= 1), slope, 0.0).astype(np.float32)


def _average(x: Float32) -> Float32:
    """Return means of 2 x 2 blocks; an odd last row or column is left out."""
    height, width = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
    x = x[:height, :width]
    return np.asarray((x[0::2, 0::2] + x[1::2, 0::2] + x[0::2, 1::2] + x[1::2, 1::2]) / 4, np.float32)


def _db(mse: float) -> float:
    return -10 * math.log10(max(mse, 1e-9))
