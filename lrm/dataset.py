"""The loader as a `torch.utils.data.IterableDataset`, with a place that StatefulDataLoader saves and other runs take
up.

    dataset = ViewDataset("s3://bucket/corpus", 7, batch_size=64, rank=rank, ranks=ranks)
    loader = StatefulDataLoader(dataset, batch_size=None, num_workers=4, multiprocessing_context="spawn")

The dataset yields whole batches, so `batch_size=None`. Worker w of W makes every W-th batch of the rank, which is the
order in which a DataLoader takes them, so batches leave in the loader's order whatever W is.

Two kinds of state. StatefulDataLoader saves one for each worker, and takes it up with the same number of workers.
`place_of` makes the one place of the run out of it, a few hundred bytes, which any number of ranks and workers and any
batch size takes up by `dataset.load_state_dict` before the DataLoader is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from lrm.data import Background, PlainViews
from lrm.loader import Batch, BatchLoader, LoaderOptions, Preparer
from pipeline.reader import CacheSettings, VersionReader
from pipeline.types import UserError


class ViewDataset(IterableDataset[Batch]):
    """Batches of views of a version; see `lrm.data` for their fields.

    Iterating goes on from the place that was loaded, or that the last iteration came to. With `options.whole_epochs` an
    iteration ends with its epoch, else never.
    """

    def __init__(
        self,
        corpus: str,
        version: int | None = None,
        *,
        batch_size: int,
        num_views: int = 4,
        image_px: int = 512,
        background: Background | None = "white",
        rank: int = 0,
        ranks: int = 1,
        options: LoaderOptions | None = None,
        cache: CacheSettings | None = None,
        preparer: Preparer | None = None,
    ) -> None:
        self._reader = VersionReader.open(corpus, version, cache)
        self._preparer = preparer or PlainViews(num_views, image_px, background)
        self._options = options or LoaderOptions(num_threads=1)
        self._batch_size, self._rank, self._ranks = batch_size, rank, ranks
        self._loader: BatchLoader | None = None
        self._loader_pid = 0
        self._state: Mapping[str, Any] | None = None
        len(self._reader.index)  # here, so that forked workers share it

    def _place(self) -> Mapping[str, Any] | None:
        return self._state if self._loader is None else self._loader.state_dict()

    def _open(self) -> BatchLoader:
        if self._loader is not None and self._loader_pid != os.getpid():
            # The copy of a fork: its threads stayed in the parent, its place counts.
            self._state, self._loader = self._place(), None
        if self._loader is None:
            info = get_worker_info()
            self._loader_pid = os.getpid()
            self._loader = BatchLoader(
                self._reader, self._preparer, self._options,
                batch_size=self._batch_size, rank=self._rank, ranks=self._ranks,
                worker=info.id if info else 0, workers=info.num_workers if info else 1,
            )  # fmt: skip
            if self._state is not None:
                self._loader.load_state_dict(self._state)
                self._state = None
        return self._loader

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._open())

    def state_dict(self) -> dict[str, Any]:
        """Return the place: of this worker inside a DataLoader's worker, of the run elsewhere."""
        return self._open().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state_dict` or `place_of` returned.

        Raises:
            UserError: if it is of another version, order or worker.
        """
        if get_worker_info() is None and self._loader is None:
            self._state = dict(state)  # opened where it is used: perhaps in workers that are yet to come
        else:
            self._open().load_state_dict(state)

    def close(self) -> None:
        """End the threads of this process. Iterating again goes on from where it came to."""
        if self._loader is not None:
            self._state = self._place()
            self._loader.close()
            self._loader = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loader": None, "_state": self._place()}


def place_of(loader_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the place of the run out of a StatefulDataLoader's state: where its next batch begins.

    Raises:
        UserError: if the state holds no place of a ViewDataset, or was saved between snapshots.
    """
    found = list(_places(loader_state))
    if not found:
        raise UserError("the state holds no place of a ViewDataset; give what StatefulDataLoader.state_dict returned")
    if any(_values(loader_state, "_steps_since_snapshot")):
        raise UserError("the state was saved between two snapshots; use StatefulDataLoader(snapshot_every_n_steps=1)")
    first = min(found, key=lambda place: (place["epoch"], place["position"]))
    return {name: value for name, value in first.items() if name not in ("worker", "workers")}


def _places(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, Mapping):
        if "version_digest" in value and "position" in value:
            yield dict(value)
        else:
            for item in value.values():
                yield from _places(item)


def _values(value: Any, name: str) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from [item] if key == name else _values(item, name)
