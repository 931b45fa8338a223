"""Which sample comes when: a pure function of (seed, epoch, position). No state, no clock, no worker count.

An epoch has one slot a training row and copy of its source: sources are mixed by `source_copies`, inside the same
permutation, so an epoch holds each row exactly that often. Position p of an epoch takes slot perm(p), where perm is a
keyed permutation of [0, n): a balanced Feistel network over the next even number of bits, walked along its cycle until
it lands below n (fewer than 4 steps on average). It needs no table, costs about 20 us a lookup and is the same on every
machine and library version. `numpy.random.permutation` would cost 8 bytes a row and epoch, and numpy promises no
stream stability across its versions.

Views and crops are drawn from the same key, so a run is repeatable pixel by pixel, and any rank or thread can compute
any position on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.types import UserError, derive_seed

_MASK64 = 2**64 - 1
_FEISTEL_ROUNDS = 8


def mix64(value: int) -> int:
    """Return the splitmix64 finaliser of a 64-bit value (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def permute(position: int, length: int, key: int) -> int:
    """Return the image of `position` under the keyed permutation of [0, length)."""
    if not 0 <= position < length:
        raise ValueError(f"position {position} is outside [0, {length})")
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    value = position
    while True:
        left, right = value >> half_bits, value & mask
        for round_index in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (mix64(mix64(key ^ (round_index << 56)) ^ right) & mask)
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

    def choose(self, num: int, bound: int) -> list[int]:
        """Return `num` different integers of [0, bound), in random order (partial Fisher-Yates)."""
        pool = list(range(bound))
        for i in range(num):
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleOrder:
    """The order of one version under one seed.

    Attributes:
        slots: [n] row of every slot of an epoch.
        num_views: [rows] views of every row of the version.
        views_per_sample: views to draw from each, the input view included.
        seed: seed of the order.
    """

    slots: NDArray[np.int64]
    num_views: NDArray[np.int64]
    views_per_sample: int
    seed: int

    @classmethod
    def build(
        cls,
        *,
        sources: Sequence[str],
        heldout: Sequence[bool],
        num_views: Sequence[int],
        source_copies: Mapping[str, int],
        views_per_sample: int,
        seed: int,
    ) -> SampleOrder:
        """Build the order over the rows that are not held out, each as often as its source is copied."""
        copies = [0 if held else source_copies.get(source, 1) for source, held in zip(sources, heldout)]
        counts = np.asarray(num_views, np.int64)
        slots = np.repeat(np.arange(len(copies), dtype=np.int64), copies)
        if not len(slots):
            raise UserError(
                f"version has {len(sources)} samples and none to train on; all are held out or copied 0 times"
            )
        short = np.unique(slots[counts[slots] < views_per_sample])
        if len(short):
            raise UserError(
                f"{len(short)} samples have fewer than {views_per_sample} views (row {short[0]} has "
                f"{counts[short[0]]}); lower data.side_views"
            )
        return cls(slots=slots, num_views=counts, views_per_sample=views_per_sample, seed=seed)

    def __len__(self) -> int:
        return len(self.slots)

    def draw(self, consumed: int, attempt: int = 0) -> Draw:
        """Return the draw after `consumed` samples: epoch consumed // len, position consumed % len.

        Attempt 0 is the order itself. A higher attempt names the substitute of a damaged sample, another slot of the
        same epoch, and is as pure as the order.
        """
        epoch, position = divmod(consumed, len(self.slots))
        key = derive_seed("order", self.seed, epoch)
        if attempt:
            position = KeyedDraws(derive_seed("substitute", self.seed, consumed, attempt)).below(len(self.slots))
        row = int(self.slots[permute(position, len(self.slots), key)])
        draws = KeyedDraws(derive_seed("views", self.seed, epoch, position, attempt))
        views = draws.choose(self.views_per_sample, int(self.num_views[row]))
        return Draw(row=row, views=tuple(views), crop_key=derive_seed("crops", self.seed, epoch, position, attempt))
