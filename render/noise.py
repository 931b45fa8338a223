"""How noisy a picture is, measured without knowing the picture it should be: numpy only.

The error that counts is the one that training sees: 8-bit sRGB, composited on white, at full resolution and after
2 x 2 averaging. Two probes, renders of few samples with seeds of their own, give it without a reference:

    E[(x - p1)(x - p2)] = (x - truth)^2        for independent, unbiased p1 and p2, whatever x is

so the mean of that product over a picture is an unbiased estimate of the squared error of x, the denoiser's bias
included. A difference of two halves of one render would measure variance only, and wrongly: halves of a Sobol sequence
are not independent. Probes are brought to sRGB by the tangent at x, since the curve of a noisy value is not the noisy
value of the curve.

How sure the estimate is, shows in the scatter of the product over blocks of the picture. Matt surfaces need one sample
a probe; highlights on dark ones would need many. But the views of one object are alike: what the denoiser took away
from a view, which is known well, says what it left, up to a factor that all views so far tell together (`Model`). Both
are weighed by their certainty. Probes cost 2 samples a pixel and 30 ms a view of 512^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.sample import linear_to_srgb

Float32 = NDArray[np.float32]

MIN_SAMPLES = 4
"""Samples a pixel that a view takes at least: fewer leave coverage in steps that edges show."""

_LADDER = (4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Sample counts that are tried; beyond the last they go on by factors of 1.25."""

DB_PER_DOUBLING = 2.8
"""What twice the samples bring: 2 to 4 dB were measured for denoised views, 3 for others."""

RELAX_DB = 2.0
"""A view that passes by more than this lets the next one start lower."""

_BLOCK = 8
OPAQUE_SPREAD, WHITE_SPREAD = 0.5, 0.8
"""Share by which views of one object differ from what they tell together; more, where they are see-through on white."""

WHITE_MARGIN_DB = 1.0
"""What a see-through picture must exceed its target by: its colour and coverage come from two renders, and where a dark
edge has coarse coverage the tangent is off; 1.4 dB were seen at 4 samples, 0.5 at 16."""

_ROUNDING = 1 / (12 * 255**2)  # squared error of 8-bit output


@dataclass(frozen=True, slots=True)
class Layer:
    """A picture and its coverage.

    Attributes:
        colour: [H, W, 3], scene-linear, premultiplied by alpha.
        alpha: [H, W, 1] in [0, 1].
    """

    colour: Float32
    alpha: Float32


@dataclass(frozen=True, slots=True)
class Error:
    """A mean squared error on white, and the standard error with which it is known; 1 is white squared."""

    mse: float
    deviation: float

    @property
    def pessimistic(self) -> Error:
        """The error one standard error above the estimate, itself taken as certain."""
        return Error(max(self.mse, 0.0) + self.deviation, 0.0)

    @property
    def psnr_db(self) -> float:
        """The error as PSNR in dB; at most 90."""
        return -10 * math.log10(max(self.mse, 1e-9))


@dataclass(frozen=True, slots=True)
class Quality:
    """Errors of a whole view: after 2 x 2 averaging, and at full resolution."""

    half: Error
    full: Error

    def shortfall_db(self, half_db: float, full_db: float, deviations: float = 0.0) -> float:
        """Return by how many dB the worse of both misses its target, at so many standard errors above the estimate."""
        pairs = ((half_db, self.half), (full_db, self.full))
        return max(target - Error(max(e.mse + deviations * e.deviation, 0), 0).psnr_db for target, e in pairs)


def on_white(layer: Layer) -> Float32:
    """Return the picture as training composites it: straight sRGB times alpha plus white; [H, W, 3] in [0, 1]."""
    return np.asarray(linear_to_srgb(_straight(layer)) * layer.alpha + (1 - layer.alpha), np.float32)


@dataclass(slots=True)
class Model:
    """What the views of one object have told: how the error left is to the noise removed, by number of samples."""

    spread: float = OPAQUE_SPREAD
    # Rows: error, its variance, noise removed; columns: half, full.
    _sums: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def expect(self, samples: int, removed: tuple[float, float]) -> Quality | None:
        """Return the errors to expect of a view from which so much noise was removed; None if no view has told."""
        if not self._sums:
            return None
        nearest = min(self._sums, key=lambda known: abs(math.log(known / samples)))
        error, variance, noise = self._sums[nearest]
        factor = np.array(removed) / np.maximum(noise, 1e-12)
        mse = np.maximum(error, 0) * factor
        deviation = np.hypot(self.spread * mse, np.sqrt(variance) * factor)
        half, full = (Error(float(m), float(d)) for m, d in zip(mse, deviation))
        return Quality(half, full)

    def learn(self, samples: int, removed: tuple[float, float], own: Quality) -> None:
        """Add what a view's own probes said."""
        errors = own.half, own.full
        told = np.array([[e.mse for e in errors], [e.deviation**2 for e in errors], removed])
        self._sums[samples] = self._sums.get(samples, np.zeros((3, 2))) + told


def estimate(picture: Layer, probes: tuple[Layer, Layer], num_pixels: int) -> Quality:
    """Estimate the errors of a picture from two independent probes of the same view.

    Args:
        picture: what was made, by any means that does not look at the probes.
        probes: two unbiased renders of the same pixels, independent of each other and of the picture.
        num_pixels: pixels of the whole view; what lies outside the arrays is background without error. The arrays
            start at an even row and column, so that their 2 x 2 blocks are the view's.
    """
    straight = _straight(picture)
    slope = _slope(picture, straight)
    by_alpha = np.where(picture.alpha > 0, linear_to_srgb(straight) - 1 - slope * straight, np.float32(-1))
    # Differences to the probes, not the pictures themselves: what the tangent is taken at cancels.
    first, second = (
        np.asarray(slope * (picture.colour - probe.colour) + by_alpha * (picture.alpha - probe.alpha), np.float32)
        for probe in probes
    )
    half = _mean(_average(first) * _average(second), num_pixels / 4, _BLOCK // 2)
    full = _mean(first * second, num_pixels, _BLOCK)
    return Quality(
        Error(half.mse + _ROUNDING / 4, half.deviation),
        Error(full.mse + _ROUNDING, full.deviation),
    )


def removed_noise(picture: Layer, noisy: Float32, num_pixels: int) -> tuple[float, float]:
    """Return the mean square of what denoising took from a picture [H, W, 3], in sRGB: (half, full)."""
    difference = np.asarray(_slope(picture, _straight(picture)) * (noisy - picture.colour), np.float32)
    average = _average(difference)
    return (
        float(np.vdot(average, average)) / (3 * num_pixels / 4),
        float(np.vdot(difference, difference)) / (3 * num_pixels),
    )


def weigh(own: Quality, expected: Quality) -> Quality:
    """Return what a view's own estimate and the expectation from other views say together, each by its certainty."""
    return Quality(_weigh(own.half, expected.half), _weigh(own.full, expected.full))


def _weigh(own: Error, expected: Error) -> Error:
    variance = max(expected.deviation, 1e-9) ** 2
    trust = variance / (variance + own.deviation**2)
    return Error(expected.mse + trust * (own.mse - expected.mse), math.sqrt(trust) * own.deviation)


def next_samples(samples: int, shortfall_db: float, max_samples: int) -> int:
    """Return how many samples should make up for a shortfall: more than `samples`, on the ladder, at most the limit."""
    # At most threefold at once: an estimate from few samples overshoots.
    wanted = samples * min(2 ** (shortfall_db / DB_PER_DOUBLING), 3.0)
    return min(max(samples + 1, _step(max(wanted, samples + 1))), max_samples)


def first_samples(samples: int, shortfall_db: float, max_samples: int) -> int:
    """Return how many samples the next view of the same object should start with, after one that took `samples`."""
    if shortfall_db > -RELAX_DB:
        return samples
    return min(max(MIN_SAMPLES, _step(samples * 2 ** ((shortfall_db + 0.5) / 4))), samples, max_samples)


def _step(wanted: float) -> int:
    """Return the least count of the ladder that is at least `wanted`."""
    for count in _LADDER:
        if count >= wanted:
            return count
    power = 1
    while (count := 2 * round(_LADDER[-1] * 1.25**power / 2)) < wanted:
        power += 1
    return count


def _mean(product: Float32, num_pixels: float, block: int) -> Error:
    """Return the mean of a product [H, W, 3] over a view, and its standard error from the scatter over blocks."""
    height, width = product.shape[:2]
    sums = np.add.reduceat(
        np.add.reduceat(product.sum(axis=2), range(0, height, block), axis=0), range(0, width, block), axis=1
    )
    scatter = float(np.vdot(sums, sums)) - float(sums.sum()) ** 2 / max(sums.size, 1)
    norm = 3 * num_pixels
    return Error(float(sums.sum()) / norm, math.sqrt(max(scatter, 0.0)) / norm)


def _straight(layer: Layer) -> Float32:
    return np.asarray(layer.colour / np.maximum(layer.alpha, 1e-6), np.float32)


def _slope(picture: Layer, straight: Float32) -> Float32:
    """Return the derivative of the clipped sRGB curve at straight colours: 0 outside [0, 1], and where nothing is."""
    x = np.clip(straight, 0.0031308, 1.0)
    slope = np.where(straight <= 0.0031308, 12.92, (1.055 / 2.4) * np.power(x, 1 / 2.4 - 1, dtype=np.float32))
    shown = (straight >= 0) & (straight <= 1) & (picture.alpha > 0)
    return np.where(shown, slope, 0.0).astype(np.float32)


def _average(x: Float32) -> Float32:
    """Return means of 2 x 2 blocks; an odd last row or column is left out."""
    height, width = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
    x = x[:height, :width]
    return np.asarray((x[0::2, 0::2] + x[1::2, 0::2] + x[0::2, 1::2] + x[1::2, 1::2]) / 4, np.float32)
