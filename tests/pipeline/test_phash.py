"""Perceptual hashes: near for one object made again, far for others; the search for duplicates against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import phash
from pipeline.phash import MAX_DISTANCE, NEAR_DISTANCE, find_duplicates, hash_distance, hash_words, perceptual_hash

Views = NDArray[np.uint8]
SEEDS = range(40)
FINE = 8  # pictures are drawn so many times larger and averaged, as a renderer averages its samples


def draw(seed: int, *, size: int = 64, scale: float = 1.0, shift_px: float = 0.0) -> Views:
    """Data views [4, S, S, 4] of a made-up object: a few ellipses and boxes of random place and colour."""
    rng = np.random.default_rng(seed)
    side = size * FINE
    views = []
    for _ in range(4):
        canvas = np.zeros((side, side, 4), np.float32)
        for _ in range(rng.integers(3, 7)):
            place = rng.uniform(-0.45, 0.45, 2)
            extent, angle = rng.uniform(0.12, 0.5, 2), rng.uniform(0, 180)
            colour = (*rng.uniform(0, 255, 3), 255.0)
            middle = (place * scale + 1) / 2 * side * 0.8 + 0.1 * side + shift_px * FINE
            lengths = extent * scale * side * 0.4
            if rng.random() < 0.5:
                axes = (int(lengths[0]), int(lengths[1]))
                cv2.ellipse(canvas, (int(middle[0]), int(middle[1])), axes, angle, 0, 360, colour, -1)
            else:
                corners = cv2.boxPoints((tuple(middle), tuple(2 * lengths), angle))
                cv2.fillPoly(canvas, [np.int32(corners)], colour)
        views.append(straight(cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)))
    return np.stack(views)


def straight(premultiplied: NDArray[np.float32]) -> Views:
    alpha = premultiplied[..., 3:] / 255
    out = np.zeros(premultiplied.shape, np.uint8)
    out[..., :3] = np.rint(np.clip(premultiplied[..., :3] / np.maximum(alpha, 1e-3), 0, 255))
    out[..., 3] = np.rint(premultiplied[..., 3])
    out[out[..., 3] == 0] = 0
    return out


def with_noise(views: Views, seed: int, sigma: float = 4.0) -> Views:
    noise = np.random.default_rng(seed).normal(0, sigma, views[..., :3].shape)
    out = views.copy()
    out[..., :3] = np.clip(np.rint(views[..., :3] + noise), 0, 255)
    out[views[..., 3] == 0] = 0
    return out


def hard_edges(views: Views) -> Views:
    out = views.copy()
    out[..., 3] = np.where(views[..., 3] > 127, 255, 0)
    out[out[..., 3] == 0] = 0
    return out


def test_a_hash_is_64_hex_digits_and_a_pure_function() -> None:
    text = perceptual_hash(draw(0))
    assert phash.is_hash(text)
    assert text == perceptual_hash(draw(0))
    assert not phash.is_hash(text.upper())
    assert not phash.is_hash(text[1:])
    assert hash_distance("f" * 64, "0" * 64) == 256 == phash.NUM_BITS
    assert [f"{word:016x}" for word in hash_words([text])[0]] == [text[i : i + 16] for i in range(0, 64, 16)]


REMADE: dict[str, Callable[[int], Views]] = {
    "moved by a pixel": lambda seed: draw(seed, shift_px=1.0),
    "smaller by 2 %": lambda seed: draw(seed, scale=0.98),
    "noisy": lambda seed: with_noise(draw(seed), seed),
    "hard edges": lambda seed: hard_edges(draw(seed)),
    "from twice as far": lambda seed: np.pad(draw(seed, size=32), ((0, 0), (16, 16), (16, 16), (0, 0))),
}


@pytest.mark.parametrize("how", REMADE)
def test_one_object_made_again_is_near(how: str) -> None:
    found = [hash_distance(perceptual_hash(draw(seed)), perceptual_hash(REMADE[how](seed))) for seed in SEEDS]
    assert np.mean(np.array(found) <= NEAR_DISTANCE) >= 0.9, found
    assert np.median(found) <= NEAR_DISTANCE / 2, found


def test_different_objects_are_far() -> None:
    hashes = [perceptual_hash(draw(seed)) for seed in SEEDS]
    assert min(hash_distance(a, b) for a, b in itertools.combinations(hashes, 2)) > MAX_DISTANCE


def test_the_order_of_views_and_a_turn_count() -> None:
    views = draw(3)
    assert hash_distance(perceptual_hash(views), perceptual_hash(views[[1, 0, 2, 3]])) > MAX_DISTANCE
    assert hash_distance(perceptual_hash(views), perceptual_hash(views[:, :, ::-1])) > MAX_DISTANCE


def flat(colour: tuple[int, int, int]) -> Views:
    """A centred box in one colour: symmetric, and without a pattern."""
    views = np.zeros((4, 64, 64, 4), np.uint8)
    views[:, 16:48, 12:52] = (*colour, 255)
    return views


@pytest.mark.parametrize(("a", "b"), [((200, 40, 40), (40, 40, 200)), ((90, 90, 90), (230, 230, 230))])
def test_a_recoloured_object_is_another(a: tuple[int, int, int], b: tuple[int, int, int]) -> None:
    assert hash_distance(perceptual_hash(flat(a)), perceptual_hash(flat(b))) > NEAR_DISTANCE


def test_a_shade_is_no_recolouring() -> None:
    """One scale for the four views: a small change crosses one mark of it, not the same mark in every view."""
    for level in range(3, 256):
        found = hash_distance(perceptual_hash(flat((level,) * 3)), perceptual_hash(flat((level - 3,) * 3)))
        assert found <= 2, f"grey {level} against {level - 3}"


@pytest.mark.parametrize("seed", range(8))
def test_noise_on_a_plain_symmetric_object_flips_next_to_nothing(seed: int) -> None:
    """Its coefficients are zero, and the sign of zero is noise: 50 bits and more, for a hash that keeps the sign."""
    views = flat((128, 128, 128))
    views[..., 3] = np.where(np.random.default_rng(seed).random((4, 64, 64)) < 0.01, 255, views[..., 3])
    views[:, :12] = views[:, 52:] = 0
    views[..., :3][views[..., 3] > 0] = 128
    views[:, :, :12] = views[:, :, 52:] = 0
    noisy = with_noise(views, seed, sigma=3.0)
    assert hash_distance(perceptual_hash(flat((128, 128, 128))), perceptual_hash(noisy)) <= 4


def test_a_view_without_the_object_is_no_harm() -> None:
    empty = np.zeros((4, 64, 64, 4), np.uint8)
    assert phash.is_hash(perceptual_hash(empty))
    card = flat((200, 40, 40))
    card[1:3] = 0
    line = card.copy()
    line[1:3, 16:48, 31] = (255, 255, 255, 255)  # a card seen edge on: a pixel's width, lit otherwise
    assert hash_distance(perceptual_hash(card), perceptual_hash(line)) <= NEAR_DISTANCE


@pytest.mark.parametrize("shape", [(3, 64, 64, 4), (4, 64, 32, 4), (4, 64, 64, 3), (64, 64, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is required"):
        perceptual_hash(np.zeros(shape, np.uint8))


def brute_force(words: NDArray[np.uint64], distance: int) -> list[int]:
    """The definition: in order, a hash is owned by the first that stays and is near."""
    values = [int.from_bytes(row.astype(">u8").tobytes(), "big") for row in words]
    owner: list[int] = []
    for j, value in enumerate(values):
        near = [i for i in range(j) if owner[i] < 0 and (values[i] ^ value).bit_count() <= distance]
        owner.append(near[0] if near else -1)
    return owner


@st.composite
def crowds(draw: st.DrawFn) -> tuple[NDArray[np.uint64], int]:
    """Hashes in a few crowds whose members differ in up to a few bits more than the distance, some of them equal."""
    distance = draw(st.integers(0, MAX_DISTANCE))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, num_crowds = draw(st.integers(0, 60)), draw(st.integers(1, 6))
    full = np.iinfo(np.uint64).max
    centres = rng.integers(0, full, (num_crowds, 4), np.uint64, endpoint=True)
    words = centres[rng.integers(0, num_crowds, count)]
    for row in words:
        for bit in rng.integers(0, 256, rng.integers(0, distance + 3)):
            row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return words, distance


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(crowd=crowds(), block=st.integers(1, 70), candidates=st.integers(1, 50))
def test_duplicates_are_those_of_brute_force(
    crowd: tuple[NDArray[np.uint64], int], block: int, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phash, "_BLOCK", block)
    monkeypatch.setattr(phash, "_MAX_CANDIDATES", candidates)
    words, distance = crowd
    assert find_duplicates(words, distance).tolist() == brute_force(words, distance)


def test_a_chain_does_not_collapse_into_its_first() -> None:
    chain = np.zeros((4, 4), np.uint64)
    chain[:, 0] = [0b0, 0b11, 0b1111, 0b111111]
    assert find_duplicates(chain, 2).tolist() == [-1, 0, -1, 2]


@pytest.mark.parametrize("distance", [-1, MAX_DISTANCE + 1])
def test_a_distance_beyond_the_search_is_refused(distance: int) -> None:
    with pytest.raises(ValueError, match="is not 0 to"):
        find_duplicates(np.zeros((2, 4), np.uint64), distance)


def test_a_large_crowd_costs_its_size_not_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    words = np.repeat(rng.integers(0, 2**63, (1, 4)).astype(np.uint64), 6000, axis=0)
    for row in words[1:]:
        for bit in rng.integers(0, 256, 4):
            row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    looked_at = 0
    pairs = phash._pairs

    def counting(*arguments: Any) -> Any:
        nonlocal looked_at
        for who, at in pairs(*arguments):
            looked_at += len(who)
            yield who, at

    monkeypatch.setattr(phash, "_pairs", counting)
    assert find_duplicates(words, 8).tolist() == [-1] + [0] * 5999
    assert looked_at < 20 * len(words)
