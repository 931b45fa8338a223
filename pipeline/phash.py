"""Perceptual hashes of objects, and the search for duplicates among millions of them.

The pictures of two samples cannot be compared: cameras and lights are drawn per uid. So the hash is made of four data
views, the same for every object and without light: the albedo from the front, the right, the back and the top. Each
view gives 64 bits, 256 in all, written as 64 hex digits:

    28 bits   silhouette: 14 cosine coefficients of order 1 to 4, two bits each
    18 bits   pattern: 9 coefficients of order 1 to 3 of the luminance, less its mean over the object
    18 bits   mean colour: luminance and the chroma axes Cb and Cr, 6 bits each, as thermometers

A coefficient's two bits are "clearly positive" and "clearly negative". The usual perceptual hash keeps the sign alone,
which is noise where a coefficient is near zero, and in pictures of objects most are: things are symmetric, and stand on
plain ground. The cosines of a view are centred on its silhouette and scaled by the silhouettes' second moment: neither
the camera's distance nor a shift counts, and unlike a bounding box moments do not hang on the outermost pixel.
The thermometers of the four views are interleaved, and so are one scale of four times as
many steps, of which a small change crosses one rather than four.

Measured at 64 px on 31 procedural objects (seeds 0 to 30) and 37 real files. One object: exported at other scales and
places, 0 bits apart; rendered with 2 instead of 16 samples from 2 % further away, median 4, 96 % within 8, 11 at most;
with hard edges 3 at most; moved by a pixel, 1 at most. Different objects: procedural pairs at least 21, median 49; real
ones at least 14 (two plain grey sticks). Colour channels exchanged: median 19, 85 % beyond 8; the others average to
grey. Hence NEAR_DISTANCE. Not recognised: an object that is turned or posed otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Float64

NUM_BITS = 256

NEAR_DISTANCE = 8
"""The distance to try first: most re-exports of an object lie within it, and no two different objects were seen to."""

MAX_DISTANCE = 12
"""The largest distance that is searched: beyond it different objects meet, and the search's cost explodes."""

_NUM_VIEWS = 4
_SILHOUETTE_ORDER, _PATTERN_ORDER = 4, 3
_COLOUR_BITS = 6
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as the chroma factors below
_CB, _CR = 0.564, 0.713

_HALF_SIDE = 1.75
"""Half the side of the square that the cosines span, in root mean square distances of the silhouette's pixels."""

_DEAD_ZONE = 0.6
"""A coefficient is clear from this share of the root mean square of its group on."""

_SILHOUETTE_FLOOR = 0.1
"""And from this share of the largest silhouette's area on: a card seen edge on is there or not by a hair."""

_PATTERN_FLOOR = 0.0055
"""And from this mean over the square on: below, a pattern is fainter than 2 of 255 levels."""

_CHROMA_KNEE = 0.04
"""Chroma c counts as c / (|c| + knee): mean colours crowd around grey, and so must the thermometer's marks."""

_FEW_PIXELS = 0.02
"""A view that shows less than this share of its pixels takes the other views' mean colour on."""

_HASH = re.compile(r"[0-9a-f]{64}")

_BLOCK = 512
_MAX_CANDIDATES = 2**21


def perceptual_hash(views: NDArray[np.uint8]) -> str:
    """Return the hash of an object, 64 hex digits, by its data views [4, S, S, 4]: straight RGBA, S = 64 by custom."""
    if views.ndim != 4 or views.shape[0] != _NUM_VIEWS or views.shape[1] != views.shape[2] or views.shape[3] != 4:
        raise ValueError(f"data views have shape {views.shape}; [4, S, S, 4] is required")
    values = views.astype(np.float64) / 255
    alpha, colours = values[..., 3], values[..., :3] * values[..., 3:]
    area = alpha.sum(axis=(1, 2))
    bases, square = _bases(alpha, area)
    silhouette_floor = max(_SILHOUETTE_FLOOR * float(area.max()) / square, 1e-9)
    mean = colours.sum(axis=(0, 1, 2)) / max(float(area.sum()), 1e-9)
    few = _FEW_PIXELS * views.shape[1] ** 2
    bits = []
    for view in range(_NUM_VIEWS):
        luminance = colours[view] @ _LUMA  # premultiplied by alpha, as the mean that is taken off
        pattern = luminance - alpha[view] * luminance.sum() / max(float(area[view]), 1e-9)
        colour = (colours[view].sum(axis=(0, 1)) + few * mean) / (area[view] + few)
        bits += [
            _clear_bits(*bases[view], alpha[view], _SILHOUETTE_ORDER, silhouette_floor),
            _clear_bits(*bases[view], pattern, _PATTERN_ORDER, _PATTERN_FLOOR),
            _colour_bits(colour, view),
        ]
    return np.packbits(np.concatenate(bits)).tobytes().hex()


def _bases(alpha: Float64, area: Float64) -> tuple[list[tuple[Float64, Float64]], float]:
    """Return the cosines of order 0 to 4 over rows and columns, [5, S] each, of the views [4, S, S]; and their square.

    They are centred on the view's silhouette. Their square, given as its area in pixels, is the same in all views: by
    the mean squared distance of the silhouettes' pixels from their centres.
    """
    size = alpha.shape[1]
    place = np.arange(size) + 0.5
    profiles = np.stack([alpha.sum(axis=2), alpha.sum(axis=1)], axis=1)  # [4, 2, S]: over rows, over columns
    centres = np.where(area > 0, (profiles @ place).T / np.maximum(area, 1e-9), size / 2).T  # [4, 2]
    offsets = place - centres[..., None]
    moment = float((profiles * offsets**2).sum()) / max(float(area.sum()), 1e-9)
    half = max(1.0, _HALF_SIDE * moment**0.5)
    phase = (offsets / half + 1) / 2
    basis = np.cos(np.pi * np.arange(_SILHOUETTE_ORDER + 1)[:, None] * phase[:, :, None])  # [4, 2, 5, S]
    basis *= ((phase >= 0) & (phase <= 1))[:, :, None] / (2 * half)
    return [(rows, columns) for rows, columns in basis], (2 * half) ** 2


def _clear_bits(rows: Float64, columns: Float64, image: Float64, order: int, floor: float) -> NDArray[np.bool_]:
    """Return which coefficients of an image [S, S] are clearly positive, then which are clearly negative."""
    coefficients = rows @ image @ columns.T
    pairs = [(u, total - u) for total in range(1, order + 1) for u in range(total + 1)]
    # Coefficients of pictures fall off with their frequency; this makes them alike, so that one mark fits all.
    values = np.array([coefficients[u, v] * np.hypot(u, v) for u, v in pairs])
    mark = max(_DEAD_ZONE * float(np.sqrt((values**2).mean())), floor)
    return np.concatenate([values > mark, values < -mark])


def _colour_bits(colour: Float64, view: int) -> NDArray[np.bool_]:
    luminance = float(colour @ _LUMA)
    bits = [_thermometer(luminance, 0.0, 1.0, view)]
    for chroma in ((colour[2] - luminance) * _CB, (colour[0] - luminance) * _CR):
        bent = float(chroma / (abs(chroma) + _CHROMA_KNEE))
        bits.append(_thermometer(bent, -0.85, 0.85, view))
    return np.concatenate(bits)


def _thermometer(value: float, low: float, high: float, view: int) -> NDArray[np.bool_]:
    """Return which of the view's marks the value exceeds: every fourth of a scale that the four views share."""
    steps = np.arange(_COLOUR_BITS) * _NUM_VIEWS + view + 0.5
    marks = low + (high - low) * steps / (_COLOUR_BITS * _NUM_VIEWS)
    return np.asarray(value > marks)


def hash_distance(a: str, b: str) -> int:
    """Return in how many of 256 bits two hashes differ."""
    return (int(a, 16) ^ int(b, 16)).bit_count()


def is_hash(value: object) -> bool:
    """Whether a value is a perceptual hash in hex."""
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def hash_words(hashes: list[str]) -> NDArray[np.uint64]:
    """Return hashes in hex as words [N, 4]."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), ">u8").astype(np.uint64).reshape(-1, 4)


def find_duplicates(words: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """Decide which of N hashes stay, the earlier before the later.

    A hash that lies within `distance` of an earlier one that stays is its duplicate; all others stay. So a chain of
    near objects does not collapse into its first, and what stays is pairwise further apart than `distance`.

    Exact, and not all pairs: the bits are dealt into distance + 1 bands, and two hashes within the distance agree
    wholly on one band at least (pigeonhole). The first half is settled, its stayers are joined with the second half on
    each band, and what finds none is settled in turn: a cluster of m near hashes costs m candidates, not m squared.
    A million hashes made of real ones (median distance 63 bits, 5 % duplicates) take 4 minutes of one busy core and
    0.5 GiB at a distance of 8. Single-index hashing on 16-bit words would try a hundred times as many pairs: most bits
    are the same for most objects.

    Args:
        words: [N, 4], in the order of precedence.
        distance: 0 to MAX_DISTANCE bits.

    Returns:
        [N] index of the hash that each is a duplicate of, the first such; -1 for those that stay.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance {distance} is not 0 to {MAX_DISTANCE} bits")
    if len(words) == 0:
        return np.empty(0, np.int64)
    _, first, inverse = np.unique(words, axis=0, return_index=True, return_inverse=True)
    firsts = np.sort(first)  # equal hashes share their fate: search among the first of each
    owner_of_first = firsts.copy()
    if distance:
        found = _Search(words[firsts], distance).owner
        owner_of_first = np.where(found < 0, firsts, firsts[found])
    owner = owner_of_first[np.searchsorted(firsts, first[inverse.reshape(-1)])]
    return np.asarray(np.where(owner == np.arange(len(words)), -1, owner), np.int64)


class _Search:
    """One search among different hashes [N, 4]; `owner` [N] is filled from the first to the last."""

    def __init__(self, words: NDArray[np.uint64], distance: int) -> None:
        self.words, self.distance = words, distance
        self.bands = _bands(words, distance + 1)
        self.owner = np.full(len(words), -1, np.int64)
        self._settle(np.arange(len(words)))

    def _settle(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Decide rows [R], ascending, that no stayer before them owns; return those that stay."""
        if len(rows) <= _BLOCK:
            return self._settle_block(rows)
        left = self._settle(rows[: len(rows) // 2])
        right = rows[len(rows) // 2 :]
        self.owner[right] = self._join(left, right)
        return np.concatenate([left, self._settle(right[self.owner[right] < 0])])

    def _settle_block(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        words = self.words[rows]
        bits = np.zeros((len(rows), len(rows)), np.int64)
        for word in words.T:
            bits += _popcount(word[:, None] ^ word[None])
        near = np.tril(bits <= self.distance, -1)
        stays = np.ones(len(rows), bool)
        for row in np.flatnonzero(near.any(axis=1)):
            owners = np.flatnonzero(near[row] & stays)
            if len(owners):
                stays[row] = False
                self.owner[rows[row]] = rows[owners[0]]
        stayers: NDArray[np.int64] = rows[stays]
        return stayers

    def _join(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return for each right row the first left row within the distance, -1 where there is none."""
        none = np.iinfo(np.int64).max
        best = np.full(len(right), none)
        for band in self.bands:
            order = np.argsort(band[left], kind="stable")
            keys = band[left][order]
            low = np.searchsorted(keys, band[right], "left")
            count = np.searchsorted(keys, band[right], "right") - low
            for who, at in _pairs(low, count):
                a, b = left[order[at]], who
                keep = self._near(a, right[b])
                np.minimum.at(best, b[keep], a[keep])
        return np.asarray(np.where(best == none, -1, best), np.int64)

    def _near(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which of the pairs (a, b) are within the distance, giving up on most after the first word."""
        alive, bits = np.arange(len(a)), np.zeros(len(a), np.int64)
        for word in self.words.T:
            bits = bits + _popcount(word[a[alive]] ^ word[b[alive]])
            near = bits <= self.distance
            alive, bits = alive[near], bits[near]
        return alive


def _pairs(low: NDArray[np.int64], count: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (row i, place low[i] ... low[i] + count[i] - 1) as two long lists, some millions at a time."""
    rows = np.flatnonzero(count)
    ends = np.cumsum(count[rows])
    start = 0
    while start < len(rows):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _MAX_CANDIDATES, "right")))
        part = rows[start:stop]
        who = np.repeat(part, count[part])
        begin = np.repeat(np.cumsum(count[part]) - count[part], count[part])
        yield who, low[who] + np.arange(len(who)) - begin
        start = stop


def _bands(words: NDArray[np.uint64], num_bands: int) -> list[NDArray[np.uint64]]:
    """Deal the 256 bits into bands, the most telling ones first and in turn; return each band's keys [N].

    Bits that are nearly the same for all objects, or follow from others, would make poor keys if they stood together.
    A band keeps 64 of its bits at most: two hashes that agree on the band agree on them.
    """
    data = np.ascontiguousarray(words.astype(">u8")).view(np.uint8).reshape(len(words), -1)
    bits = np.unpackbits(data, axis=1)
    share = bits.mean(axis=0)
    order = np.argsort(-share * (1 - share), kind="stable")
    bands = []
    for band in range(num_bands):
        packed = np.packbits(bits[:, order[band::num_bands][:64]], axis=1)
        padded = np.zeros((len(words), 8), np.uint8)
        padded[:, : packed.shape[1]] = packed
        bands.append(padded.view(">u8").reshape(-1).astype(np.uint64))
    return bands


def _popcount(x: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Count the ones of 64-bit words by the usual halving; numpy has no function for it before its version 2."""
    u = np.uint64
    x = x - ((x >> u(1)) & u(0x5555555555555555))
    x = (x & u(0x3333333333333333)) + ((x >> u(2)) & u(0x3333333333333333))
    x = (x + (x >> u(4))) & u(0x0F0F0F0F0F0F0F0F)
    return ((x * u(0x0101010101010101)) >> u(56)).astype(np.int64)
