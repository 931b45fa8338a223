"""Which sample comes when: a pure function of (seed, epoch, position). No state, no clock, no worker count.

An epoch has slots: each source enters it as often as `mix` says (1 unless named; the paper's epoch is Objaverse once
and MVImgNet three times), inside one permutation, so that sources are mixed at every scale. There are two orders:

- **full**, for ranged reads: position p takes slot perm(p), where perm is a keyed permutation of [0, n): a balanced
  Feistel network over the next even number of bits, walked along its cycle until it lands below n (fewer than 4 steps
  on average). It needs no table, costs about 20 us a lookup and is the same on every machine and library version.
- **blocks**, where whole shards are cached: the shards of all sources, copies included, are permuted anew each epoch,
  every `block_shards` of them make a block, and the slots of a block are permuted like the whole above. A node then
  works on one block of shards at a time, whatever the number of ranks, and never needs a shard twice an epoch unless
  its source is copied. Samples that share a shard stay within a block of each other; that is what it costs.

A mix of 0.25 takes another quarter of a source's rows in each epoch, all of them in four. Blocks take whole numbers
only.

Views, crops and backgrounds are drawn from the same key, so a run is repeatable pixel by pixel, and any rank, worker or
thread can compute any position on its own. Beside one int32 a training row and a few numbers a shard there is no
state: 4 MB for a million objects. `numpy.random.permutation` would cost 8 bytes a row and epoch, and numpy promises no
stream stability across its versions.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.types import SOURCES, UserError, derive_seed

_MASK64 = 2**64 - 1
_FEISTEL_ROUNDS = 8


def mix64(value: int) -> int:
    """Return the splitmix64 finaliser of a 64-bit value (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(mix64(key ^ (index << 56)) for index in range(_FEISTEL_ROUNDS))


def permute(position: int, length: int, key: int) -> int:
    """Return the image of `position` under the keyed permutation of [0, length)."""
    if not 0 <= position < length:
        raise ValueError(f"position {position} is outside [0, {length})")
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    mask, keys = (1 << half_bits) - 1, _round_keys(key)
    value = position
    while True:
        left, right = value >> half_bits, value & mask
        for round_key in keys:
            left, right = right, left ^ (mix64(round_key ^ right) & mask)
        value = (left << half_bits) | right
        if value < length:
            return value


class KeyedDraws:
    """A short stream of numbers that is a pure function of its key."""

    def __init__(self, key: int) -> None:
        self._key = key
        self._count = 0

    def below(self, bound: int) -> int:
        """Return the next integer of [0, bound); the bias is under bound / 2^64."""
        self._count += 1
        return (mix64(self._key ^ mix64(self._count)) * bound) >> 64

    def choose(self, num: int, bound: int, first_below: int = 0) -> list[int]:
        """Return `num` different integers of [0, bound), in random order (partial Fisher-Yates).

        The first of them lies below `first_below`, if that is given.
        """
        pool, begin = list(range(bound)), 0
        if 0 < first_below < bound:
            j, begin = self.below(first_below), 1
            pool[0], pool[j] = pool[j], pool[0]
        for i in range(begin, num):
            j = i + self.below(bound - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:num]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What stands at one position: a row, its views (the input view first), and the key of its crops."""

    row: int
    views: tuple[int, ...]
    crop_key: int

    @property
    def input_view(self) -> int:
        """The view that the model is given."""
        return self.views[0]


@dataclass(frozen=True, slots=True, eq=False)
class _Epoch:
    """The shards of one epoch in their order, for block order.

    Attributes:
        units: [u] index of the unit at each place.
        starts: [u + 1] first slot of each place; the last is the length of the epoch.
    """

    units: NDArray[np.int32]
    starts: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleOrder:
    """The order of one version under one seed. Build with `build`.

    Attributes:
        rows: [n] training rows, those of a source together, and in it those of a shard.
        source_starts: [s + 1] where each source begins in `rows`.
        slots: [s] slots that each source has in an epoch.
        unit_starts: [u + 1] where the rows of each shard of each source begin in `rows`.
        unit_shards: [u] number of the shard of each unit.
        unit_copies: [u] times each unit enters an epoch.
        num_views: [rows of the version] views of every row.
        views_per_sample: views to draw from each, the input view included.
        input_views: views that the input may be, the first of each object; 0 is all.
        seed: seed of the order.
        mix: times each source enters an epoch, by name, those of the version alone.
        block_shards: shards of a block; 0 is the full order.
    """

    rows: NDArray[np.int32]
    source_starts: tuple[int, ...]
    slots: tuple[int, ...]
    unit_starts: NDArray[np.int64]
    unit_shards: NDArray[np.int32]
    unit_copies: NDArray[np.int32]
    num_views: NDArray[np.int16]
    views_per_sample: int
    input_views: int
    seed: int
    mix: Mapping[str, float]
    block_shards: int

    @classmethod
    def build(
        cls,
        *,
        sources: Sequence[str],
        source: NDArray[np.integer[Any]],
        shard: NDArray[np.integer[Any]],
        heldout: NDArray[np.bool_],
        num_views: NDArray[np.int16],
        views_per_sample: int,
        seed: int,
        input_views: int = 0,
        mix: Mapping[str, float] | None = None,
        block_shards: int = 0,
    ) -> SampleOrder:
        """Build the order over the rows that are not held out.

        Args:
            sources: names of sources.
            source: [n] source of each row.
            shard: [n] shard of each row.
            heldout: [n] whether a row is kept out of training.
            num_views: [n].
            input_views: views that the input may be, the first of each object; 0 is all.
            mix: times each source enters an epoch; those not named enter once. A kind of source that the version
                lacks is passed over, so that one config serves many versions.

        Raises:
            UserError: if nothing is left to train on, a sample has too few views, or the mix does not fit the order or
                names what is no source.
        """
        if unknown := sorted(set(mix or {}).difference(sources, SOURCES)):
            raise UserError(
                f"data.source_copies (mix of a view_loader) names {unknown[0]!r}; the version holds "
                f"{', '.join(sources) or 'no source'}, and sources are {', '.join(SOURCES)}"
            )
        if bad := [name for name, copies in (mix or {}).items() if not 0 <= copies <= 1000]:
            raise UserError(f"data.source_copies of {bad[0]} is {(mix or {})[bad[0]]:g}; 0 to 1000 are allowed")
        weights = {name: float((mix or {}).get(name, 1)) for name in sources}
        fractions = [name for name, weight in weights.items() if weight != int(weight)]
        if block_shards and fractions:
            raise UserError(
                f"data.source_copies of {fractions[0]} is {weights[fractions[0]]:g}; whole numbers are needed where "
                "whole shards are cached (data.cache_dir)"
            )
        wanted = np.array([weights[name] > 0 for name in sources], bool)
        rows = np.flatnonzero(~heldout & wanted[source] if len(sources) else ~heldout).astype(np.int32)
        rows = rows[np.lexsort((shard[rows], source[rows]))]
        _check_views(rows, num_views, views_per_sample)
        ends = np.searchsorted(source[rows], np.arange(len(sources)), side="right")
        source_starts = (0, *(int(end) for end in ends))
        sizes = np.diff(source_starts)
        slots = tuple(round(weights[name] * int(size)) for name, size in zip(sources, sizes))
        if not sum(slots):
            raise UserError(
                f"version has {len(heldout)} samples and none to train on; all are held out or copied 0 times"
            )
        unit = np.flatnonzero(np.diff(shard[rows], prepend=-1) | np.diff(source[rows], prepend=-1))
        copies = np.array([int(weights[name]) for name in sources], np.int32)
        return cls(
            rows=rows,
            source_starts=source_starts,
            slots=slots,
            unit_starts=np.append(unit, len(rows)).astype(np.int64),
            unit_shards=shard[rows[unit]].astype(np.int32),
            unit_copies=copies[source[rows[unit]]],
            num_views=num_views,
            views_per_sample=views_per_sample,
            input_views=input_views,
            seed=seed,
            mix=weights,
            block_shards=block_shards,
        )

    def __len__(self) -> int:
        return sum(self.slots)

    def draw(self, consumed: int, attempt: int = 0) -> Draw:
        """Return the draw after `consumed` samples: epoch consumed // len, position consumed % len.

        Attempt 0 is the order itself. A higher attempt names the substitute of a damaged sample, another slot of the
        same epoch, and is as pure as the order.
        """
        epoch, position = divmod(consumed, len(self))
        place = position
        if attempt:
            place = KeyedDraws(derive_seed("substitute", self.seed, consumed, attempt)).below(len(self))
        row = self._blocked(epoch, place) if self.block_shards else self._permuted(epoch, place)
        draws = KeyedDraws(derive_seed("views", self.seed, epoch, place, attempt))
        views = draws.choose(self.views_per_sample, int(self.num_views[row]), self.input_views)
        return Draw(row=row, views=tuple(views), crop_key=derive_seed("crops", self.seed, epoch, place, attempt))

    def _permuted(self, epoch: int, position: int) -> int:
        slot = permute(position, len(self), derive_seed("order", self.seed, epoch))
        number = 0
        while slot >= self.slots[number]:  # few sources
            slot -= self.slots[number]
            number += 1
        start, end = self.source_starts[number : number + 2]
        place = (epoch * self.slots[number] + slot) % (end - start)
        if self.slots[number] % (end - start):
            place = permute(place, end - start, derive_seed("subset", self.seed, number))
        return int(self.rows[start + place])

    def _blocked(self, epoch: int, position: int) -> int:
        table = _epoch_table(self, epoch)
        first = bisect.bisect_right(table.starts, position) - 1
        first -= first % self.block_shards
        begin, end = (int(table.starts[min(i, len(table.units))]) for i in (first, first + self.block_shards))
        key = derive_seed("block", self.seed, epoch, first)
        slot = begin + permute(position - begin, end - begin, key)
        place = bisect.bisect_right(table.starts, slot) - 1
        return int(self.rows[self.unit_starts[table.units[place]] + slot - int(table.starts[place])])

    def block_of(self, consumed: int) -> int:
        """Return the number of the block that a position lies in, counted from the run's beginning."""
        epoch, position = divmod(consumed, len(self))
        table = _epoch_table(self, epoch)
        place = bisect.bisect_right(table.starts, position) - 1
        return epoch * self.num_blocks + place // self.block_shards

    @property
    def num_blocks(self) -> int:
        """Blocks of an epoch."""
        return -(-int(self.unit_copies.sum()) // self.block_shards)

    def shards_of_block(self, block: int) -> list[int]:
        """Return the shards of a block, counted from the run's beginning, each once."""
        epoch, number = divmod(block, self.num_blocks)
        units = _epoch_table(self, epoch).units[number * self.block_shards :][: self.block_shards]
        return list(dict.fromkeys(self.unit_shards[units].tolist()))


def _check_views(rows: NDArray[np.int32], num_views: NDArray[np.int16], wanted: int) -> None:
    short = rows[num_views[rows] < wanted]
    if len(short):
        raise UserError(
            f"{len(short)} samples have fewer than {wanted} views (row {short.min()} has "
            f"{num_views[short.min()]}); lower data.side_views (num_views of a view_loader)"
        )


@lru_cache(maxsize=4)
def _epoch_table(order: SampleOrder, epoch: int) -> _Epoch:
    """Permute the shards of an epoch: sorted by a keyed hash, which is stable across machines and versions."""
    units = np.repeat(np.arange(len(order.unit_copies), dtype=np.int32), order.unit_copies)
    key = derive_seed("shards", order.seed, epoch)
    with np.errstate(over="ignore"):
        value = np.arange(len(units), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(mix64(key))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
        value ^= value >> np.uint64(31)
    units = units[np.argsort(value, kind="stable")]
    sizes = np.diff(order.unit_starts)[units]
    return _Epoch(units, np.concatenate([[0], np.cumsum(sizes)]))
