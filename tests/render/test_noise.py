"""The estimate of a picture's noise, against synthetic truths whose error is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.sample import linear_to_srgb, premultiplied_linear_to_rgba8
from render import noise
from render.noise import OPAQUE_SPREAD, Error, Layer, Model, Quality

SIZE = 64
ROUNDING = 1 / 12 / 255**2  # mean square of what rounding to 8 bits adds
SCENES = ["bright", "dark", "edges"]


def layer_of(straight: np.ndarray, alpha: np.ndarray) -> Layer:
    return Layer((straight * alpha).astype(np.float32), alpha.astype(np.float32))


def truth_of(scene: str, height: int = SIZE, width: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Return straight linear colour [H, W, 3] and alpha [H, W, 1]."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    ramp = np.stack([x, y, 1 - x], axis=2)
    alpha = np.ones((height, width, 1))
    if scene == "dark":
        return 0.004 + 0.02 * ramp, alpha
    if scene == "edges":  # a soft disc with nothing around it
        alpha = np.clip(6 * (0.4 - np.hypot(x - 0.5, y - 0.5)), 0, 1)[..., None]
    return 0.15 + 0.6 * ramp, alpha


def noisy(rng: np.random.Generator, truth: tuple[np.ndarray, np.ndarray], sigma: float) -> Layer:
    """Return an unbiased render: relative noise of colour, and noise of coverage where an edge is."""
    straight, alpha = truth
    edge = (alpha > 0) & (alpha < 1)
    wobble = np.where(edge, 0.05 * np.minimum(alpha, 1 - alpha) * rng.standard_normal(alpha.shape), 0)
    return layer_of(straight * (1 + sigma * rng.standard_normal(straight.shape)), alpha + wobble)


def biased_picture(scene: str, seed: int = 5) -> tuple[Layer, Layer]:
    """Return (picture, truth): a picture 2 % too bright, as a denoiser makes it, with a little noise left."""
    rng, truth = np.random.default_rng(seed), truth_of(scene)
    return noisy(rng, (truth[0] * 1.02, truth[1]), 0.02), layer_of(*truth)


def true_errors(picture: Layer, truth: Layer) -> tuple[float, float]:
    """Return the mean squared errors (half, full) on white, with those of rounding."""
    difference = (noise.on_white(picture) - noise.on_white(truth)).astype(np.float64)
    height, width = (2 * (n // 2) for n in difference.shape[:2])
    blocks = difference[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    half = float((blocks**2).sum()) / max(blocks.size, 1)
    return half + ROUNDING / 4, float((difference**2).mean()) + ROUNDING


def draws(scene: str, sigma: float, count: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Return estimates [count, 2] of (half, full), their deviations, and the truth."""
    picture, truth = biased_picture(scene)
    rng, clean = np.random.default_rng(11), truth_of(scene)
    found = []
    for _ in range(count):
        probes = (noisy(rng, clean, sigma), noisy(rng, clean, sigma))
        quality = noise.estimate(picture, probes, SIZE * SIZE)
        found.append([(e.mse, e.deviation) for e in (quality.half, quality.full)])
    values = np.array(found)
    return values[..., 0], values[..., 1], true_errors(picture, truth)


@pytest.mark.parametrize("scene", SCENES)
def test_the_estimate_is_unbiased_though_the_probes_are_far_noisier_than_the_picture(scene: str) -> None:
    """Probes of 30 % noise: their own variance is a hundred times the error that is asked for."""
    estimates, _, truth = draws(scene, 0.3, 400)
    error_of_mean = estimates.std(axis=0) / math.sqrt(len(estimates))
    # The tangent at a picture 2 % off gives the curve's rise to about 2 %, so the square to about 4.
    np.testing.assert_array_less(np.abs(estimates.mean(axis=0) - truth), 4 * error_of_mean + 0.04 * np.array(truth))
    # The test can tell: the difference to one probe would be wrong by far more than its tolerance.
    probe = noisy(np.random.default_rng(3), truth_of(scene), 0.3)
    naive = true_errors(biased_picture(scene)[0], probe)
    assert all(n > 3 * t for n, t in zip(naive, truth, strict=True))


@pytest.mark.parametrize(("scene", "most"), [("bright", 0.80), ("dark", 0.80), ("edges", 0.95)])
def test_the_standard_error_covers_two_draws_of_three(scene: str, most: float) -> None:
    """A normal error lies within one deviation in 68 % of draws; blocks that differ make the deviation too wide."""
    estimates, deviations, _ = draws(scene, 0.3, 400)
    # Around the estimates' own mean: the tangent's error is not what the deviation speaks of.
    covered = (np.abs(estimates - estimates.mean(axis=0)) <= deviations).mean(axis=0)
    assert (covered > 0.60).all(), covered
    assert (covered < most).all(), covered
    # An edge may scatter more than the truth; a deviation that is ten times too small or large is none.
    ratio = np.sqrt((deviations**2).mean(axis=0)) / estimates.std(axis=0)
    assert (ratio > 0.85).all() and (ratio < 1.6).all(), ratio  # noqa: PT018 - one band


def test_half_resolution_halves_independent_noise_and_keeps_a_common_shift() -> None:
    straight, alpha = np.full((SIZE, SIZE, 3), 0.4), np.ones((SIZE, SIZE, 1))
    truth = layer_of(straight, alpha)
    white = layer_of(straight + 0.02 * np.random.default_rng(0).standard_normal(straight.shape), alpha)
    shifted = layer_of(straight + 0.02, alpha)
    by_noise, by_shift = (noise.estimate(x, (truth, truth), SIZE * SIZE) for x in (white, shifted))
    assert (by_noise.full.mse - ROUNDING) / (by_noise.half.mse - ROUNDING / 4) == pytest.approx(4, rel=0.1)
    assert by_shift.half.mse - ROUNDING / 4 == pytest.approx(by_shift.full.mse - ROUNDING, rel=1e-4)
    assert by_shift.full.deviation < 1e-4 * by_shift.full.mse


def test_probes_need_not_be_noisy_to_be_exact() -> None:
    for scene in SCENES:
        picture, truth = biased_picture(scene)
        quality = noise.estimate(picture, (truth, truth), SIZE * SIZE)
        assert (quality.half.mse, quality.full.mse) == pytest.approx(true_errors(picture, truth), rel=0.06)


def test_background_that_was_not_rendered_counts_as_pixels_without_error() -> None:
    picture, truth = biased_picture("bright")
    small, large = (noise.estimate(picture, (truth, truth), n) for n in (SIZE**2, 4 * SIZE**2))
    assert large.full.mse - ROUNDING == pytest.approx((small.full.mse - ROUNDING) / 4, rel=1e-6)
    assert large.half.mse - ROUNDING / 4 == pytest.approx((small.half.mse - ROUNDING / 4) / 4, rel=1e-6)
    assert large.full.deviation == pytest.approx(small.full.deviation / 4, rel=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (8, 1), (2, 2), (3, 5), (7, 8), (9, 17), (33, 31)])
def test_odd_sizes_leave_out_the_last_row_and_column_of_half_resolution(size: tuple[int, int]) -> None:
    """A view of odd size has parts that hold no whole block of 2 x 2, down to the one pixel at its corner."""
    straight, alpha = truth_of("bright", *size)
    truth, picture = layer_of(straight, alpha), layer_of(straight + 0.005, alpha)
    quality = noise.estimate(picture, (truth, truth), size[0] * size[1])
    assert quality.full.mse == pytest.approx(true_errors(picture, truth)[1], rel=0.06)
    if min(size) > 1:
        share = (size[0] // 2) * (size[1] // 2) / (size[0] * size[1] / 4)
        half = true_errors(picture, truth)[0] - ROUNDING / 4
        assert quality.half.mse - ROUNDING / 4 == pytest.approx(share * half, rel=0.06)
    assert all(math.isfinite(e.deviation) for e in (quality.half, quality.full))
    removed = noise.removed_noise(picture, truth.colour, size[0] * size[1])
    assert removed[1] == pytest.approx(quality.full.mse - ROUNDING, rel=1e-4)


def test_an_empty_picture_has_no_error_but_that_of_rounding() -> None:
    empty = layer_of(np.zeros((8, 8, 3)), np.zeros((8, 8, 1)))
    quality = noise.estimate(empty, (empty, empty), 64)
    assert quality == Quality(Error(pytest.approx(ROUNDING / 4), 0.0), Error(pytest.approx(ROUNDING), 0.0))
    assert noise.removed_noise(empty, empty.colour, 64) == (0.0, 0.0)
    assert quality.shortfall_db(40, 34, deviations=1) < -15


def test_what_the_picture_lacks_wholly_is_not_overlooked() -> None:
    """A speck that only the probes have seen counts as if it were black: never less than its true error."""
    straight, alpha = np.full((8, 8, 3), 0.2), np.zeros((8, 8, 1))
    empty = layer_of(straight, alpha)
    alpha[3, 3] = 0.8
    speck = layer_of(straight, alpha)
    found, truth = noise.estimate(empty, (speck, speck), 64), true_errors(empty, speck)
    assert found.full.mse >= truth[1]
    assert found.half.mse >= truth[0]


def test_burnt_out_pixels_have_no_error() -> None:
    """On white, 1.5 and 2.5 look the same: noise that clipping hides must cost no samples."""
    alpha = np.ones((8, 8, 1))
    picture = layer_of(np.full((8, 8, 3), 1.5), alpha)
    probes = tuple(layer_of(np.full((8, 8, 3), x), alpha) for x in (2.5, 3.5))
    assert noise.estimate(picture, (probes[0], probes[1]), 64).full.mse == pytest.approx(ROUNDING)


def test_on_white_is_what_the_encoded_picture_shows_on_white() -> None:
    rng = np.random.default_rng(2)
    straight, alpha = rng.random((16, 16, 3)) ** 2, rng.random((16, 16, 1))
    alpha[:4], alpha[4:8] = 0, 1
    encoded = premultiplied_linear_to_rgba8(np.concatenate([straight * alpha, alpha], axis=2).astype(np.float32)) / 255
    shown = encoded[..., :3] * encoded[..., 3:] + 1 - encoded[..., 3:]
    np.testing.assert_allclose(noise.on_white(layer_of(straight, alpha)), shown, atol=1.01 / 255)
    np.testing.assert_allclose(
        noise.on_white(layer_of(straight, np.ones_like(alpha))), linear_to_srgb(straight), atol=1e-6
    )


def test_removed_noise_is_the_mean_square_between_two_pictures_in_srgb() -> None:
    picture, truth = biased_picture("bright")
    half, full = noise.removed_noise(truth, picture.colour, SIZE * SIZE)
    expected = true_errors(picture, truth)
    assert (half, full) == pytest.approx((expected[0] - ROUNDING / 4, expected[1] - ROUNDING), rel=0.06)
    assert noise.removed_noise(truth, truth.colour, SIZE * SIZE) == (0.0, 0.0)


POSITIVE = st.floats(1e-9, 1.0)


@given(own=st.floats(-0.1, 1.0), deviation=st.floats(0, 1.0), expected=st.floats(0, 1.0))
def test_weighing_stays_between_both_and_grows_no_less_sure(own: float, deviation: float, expected: float) -> None:
    one = Error(own, deviation)
    both = noise.weigh(Quality(one, one), Quality(*[Error(expected, OPAQUE_SPREAD * expected)] * 2)).full
    slack = 1e-12 + 1e-9 * abs(own)
    assert min(own, expected) - slack <= both.mse <= max(own, expected) + slack
    assert 0 <= both.deviation <= deviation


def test_a_sure_estimate_stands_and_a_vague_one_yields() -> None:
    sure, vague = Error(2e-4, 1e-9), Error(2e-4, 1.0)
    weighed = noise.weigh(Quality(sure, vague), Quality(*[Error(1e-4, 3.5e-5)] * 2))
    assert weighed.half.mse == pytest.approx(2e-4, rel=1e-3)
    assert weighed.full.mse == pytest.approx(1e-4, rel=1e-3)


def quality_of(half: float, full: float) -> Quality:
    return Quality(Error(half, 0.0), Error(full, 0.0))


def errors(quality: Quality | None) -> tuple[float, float]:
    assert quality is not None
    return quality.half.mse, quality.full.mse


def test_the_model_knows_nothing_before_the_first_view() -> None:
    assert Model().expect(4, (1.0, 1.0)) is None


@given(half=POSITIVE, full=POSITIVE, removed=POSITIVE, factor=st.floats(0.1, 10))
def test_the_model_gives_back_what_it_was_told_in_proportion_to_the_noise(
    half: float, full: float, removed: float, factor: float
) -> None:
    model = Model()
    model.learn(8, (removed, 2 * removed), quality_of(half, full))
    found = errors(model.expect(8, (factor * removed, 2 * factor * removed)))
    assert found == pytest.approx((factor * half, factor * full), rel=1e-6)


def test_the_model_averages_views_asks_the_nearest_count_and_is_never_negative() -> None:
    model = Model()
    for error in (1.0, 3.0):
        model.learn(8, (1.0, 1.0), quality_of(error, 2 * error))
    model.learn(64, (1.0, 1.0), quality_of(-0.5, 7.0))
    assert errors(model.expect(8, (1.0, 1.0))) == pytest.approx((2.0, 4.0))
    assert errors(model.expect(20, (1.0, 1.0))) == pytest.approx((2.0, 4.0))  # by ratio: 2.5 below 3.2
    assert errors(model.expect(24, (1.0, 1.0))) == pytest.approx((0.0, 7.0))


COUNTS = st.integers(noise.MIN_SAMPLES, 5000)
SHORTFALLS = st.floats(-60, 60)
LIMITS = st.integers(8, 65536)


def ladder(most: int) -> list[int]:
    """Return the counts that may be tried, as the module's comment tells them."""
    counts = [*noise._LADDER]
    for power in range(1, 60):
        counts.append(2 * round(noise._LADDER[-1] * 1.25**power / 2))
    return [count for count in counts if count <= most]


def test_a_step_is_the_least_count_of_the_ladder_that_suffices() -> None:
    counts = ladder(10**6)
    for wanted in range(1, 2000):
        assert noise._step(wanted) == min(count for count in counts if count >= wanted)


@given(samples=COUNTS, shortfall=SHORTFALLS, limit=LIMITS)
def test_next_goes_up_to_a_step_of_the_ladder_and_never_over_the_limit(
    samples: int, shortfall: float, limit: int
) -> None:
    assume(samples < limit)
    found = noise.next_samples(samples, shortfall, limit)
    assert samples < found <= limit
    assert found == limit or found in ladder(10**6)


@given(samples=COUNTS, one=SHORTFALLS, other=SHORTFALLS, limit=LIMITS)
def test_a_greater_shortfall_never_asks_for_fewer_samples(samples: int, one: float, other: float, limit: int) -> None:
    assume(samples < limit)
    less, more = sorted((one, other))
    assert noise.next_samples(samples, less, limit) <= noise.next_samples(samples, more, limit)
    assert noise.first_samples(samples, less, limit) <= noise.first_samples(samples, more, limit)


@given(samples=COUNTS, shortfall=SHORTFALLS, limit=LIMITS)
def test_the_next_view_starts_no_higher_no_lower_than_the_least_and_relaxes_only_with_room(
    samples: int, shortfall: float, limit: int
) -> None:
    assume(samples <= limit)
    found = noise.first_samples(samples, shortfall, limit)
    assert noise.MIN_SAMPLES <= found <= samples
    if shortfall > -noise.RELAX_DB:
        assert found == samples


@given(limit=LIMITS)
def test_steps_reach_any_limit_and_end_there(limit: int) -> None:
    samples, num_steps = noise.MIN_SAMPLES, 0
    while samples < limit:
        samples, num_steps = noise.next_samples(samples, 3.0, limit), num_steps + 1
    assert samples == limit
    assert num_steps <= 4 + 2 * math.log2(limit)


@given(mse=st.floats(-1e-3, 1.0), deviation=st.floats(0, 0.1), more=st.floats(0, 3))
def test_shortfall_grows_with_the_target_and_with_the_doubt(mse: float, deviation: float, more: float) -> None:
    quality = Quality(Error(mse, deviation), Error(mse, deviation))
    base = quality.shortfall_db(40, 34)
    assert quality.shortfall_db(40 + more, 34) == pytest.approx(base + more)
    assert quality.shortfall_db(40, 34, more) >= base - 1e-9
    assert -50 - 1e-9 <= base <= 40.1


def test_a_model_that_was_told_vaguely_does_not_overrule_a_view() -> None:
    """An estimate below zero is noise: it must not make the next view, whose own probes say 35 dB, pass as perfect."""
    model, vague = Model(), Error(-1e-5, 1e-4)
    model.learn(8, (1e-3, 1e-3), Quality(vague, vague))
    bad = Error(3e-4, 1e-4)
    weighed = noise.weigh(Quality(bad, bad), model.expect(8, (1e-3, 1e-3)))
    assert weighed.shortfall_db(40, 34, deviations=1) > 0
