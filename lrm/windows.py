"""What a loader holds at a time: how many bytes it reads ahead, and the memory of its batches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AHEAD_S = 0.25
"""What is decoded in so many seconds is read ahead. An answer that takes longer is asked for a second time
(`pipeline.shard_reads`), so this covers what one request may be late."""
LEAST_AHEAD_BYTES = 16 * 2**20
"""What is read ahead in any case: enough for 128 requests of 128 KB under way."""
_PAUSE_S = 1.0


class ReadingWindow:
    """How many bytes may be read ahead: what the decoders use up in AHEAD_S, between LEAST_AHEAD_BYTES and a limit.

    A window of one size is too large on a slow machine and too small on a fast one: 64 MiB are half a second's work of
    two cores and a twentieth of twenty cores. Too large costs more than memory: what fills it takes processor and
    network from the samples that are waited for, for the whole of a short run, and is thrown away at its end.

    Args:
        most_bytes: the limit.
        clock: seconds.
    """

    def __init__(self, most_bytes: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._most_bytes, self._clock = most_bytes, clock
        self._bytes_per_s, self._noted_s, self._num_bytes = 0.0, clock(), 0

    @property
    def num_bytes(self) -> int:
        """Bytes that may be on their way or wait for a decoder."""
        return min(self._most_bytes, max(LEAST_AHEAD_BYTES, int(AHEAD_S * self._bytes_per_s)))

    def note_decoded(self, num_bytes: int) -> None:
        """Count bytes that were decoded, in any thread's turn; the speed is that of the last AHEAD_S or so.

        Time in which nobody wanted a batch is no measure of how fast they are decoded: a pause starts anew.
        """
        now_s = self._clock()
        passed_s = now_s - self._noted_s
        self._num_bytes += num_bytes
        if passed_s > _PAUSE_S:
            self._noted_s, self._num_bytes = now_s, 0
        elif passed_s > AHEAD_S:
            self._bytes_per_s = self._num_bytes / passed_s
            self._noted_s, self._num_bytes = now_s, 0


class BatchArrays:
    """Memory of batches. A set that the consumer has dropped is used again: fresh pages cost as much as a copy.

    Pinned memory comes from torch's own caching allocator, which waits for copies that are still under way.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[tuple[int, ...], type[np.generic]]], num: int, most: int, *, pin: bool
    ) -> None:
        self._shapes = {name: ((num, *shape), kind) for name, (shape, kind) in shapes.items()}
        self._pin, self._most = pin, most
        self._known: list[tuple[dict[str, NDArray[Any]], int]] = []

    @staticmethod
    def _references(arrays: dict[str, NDArray[Any]]) -> int:
        return sum(sys.getrefcount(array) for array in arrays.values())

    def take(self) -> tuple[dict[str, NDArray[Any]], dict[str, Tensor]]:
        """Return arrays to write, and the tensors over them."""
        if self._pin:
            tensors = {
                name: torch.empty(shape, dtype=torch.from_numpy(np.empty(0, kind)).dtype, pin_memory=True)
                for name, (shape, kind) in self._shapes.items()
            }
            return {name: tensor.numpy() for name, tensor in tensors.items()}, tensors
        for arrays, unused in self._known:
            if self._references(arrays) == unused:
                return dict(arrays), {name: torch.from_numpy(array) for name, array in arrays.items()}
        arrays = {name: np.empty(shape, kind) for name, (shape, kind) in self._shapes.items()}
        if len(self._known) < self._most:  # a consumer that keeps batches gets memory of its own
            self._known.append((arrays, self._references(arrays)))
        return dict(arrays), {name: torch.from_numpy(array) for name, array in arrays.items()}
