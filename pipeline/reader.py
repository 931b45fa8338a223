"""The reading side: a version's rows, and ranged, checked reads of single views. No torch, no listing.

One sample of 32 views at 512^2 is 1 to 4 MB; a training step needs 4 views and the cameras. `read_views` asks for
the JSON and just these planes, in one call that joins near ranges, and checks every length and crc32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.manifest import STABLE
from pipeline.receipt import member_index, quality_of
from pipeline.sample import SampleError, SampleHeader, parse_sample_json
from pipeline.shard import DamagedDataError, check_part, member_name, shard_key
from pipeline.store import Store, open_store
from pipeline.version import Version, open_rows, open_version

__all__ = ["DamagedDataError", "VersionReader", "ViewsRead"]

_HEAVY = ("quality", "message", "failure_kind", "retryable")
"""Columns of failures, and the bulkiest one: a million quality records have 0.8 GB, and a training run reads none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ViewsRead:
    """Some views of a sample. `header` holds the cameras of all views; `planes` follow the order asked for."""

    header: SampleHeader
    planes: list[dict[str, bytes]]
    num_bytes: int


class VersionReader:
    """Reads one version of a corpus. Safe to share between threads; pickles as its URL and number.

    Attributes:
        rows: one row a sample (failures and tombstones left out), sorted by source and uid; `quality` stands apart.
    """

    def __init__(self, store: Store, version: Version) -> None:
        self.store = store
        self.version = version
        self.rows = self._live(tuple(name for name in STABLE.names if name not in _HEAVY))
        self.num_failures = int(version.counts["planned"]) - self.rows.num_rows

    def _live(self, columns: Sequence[str]) -> pa.Table:
        rows = open_rows(self.store, self.version, list(dict.fromkeys((*columns, "status", "uid"))))
        live = pc.equal(rows["status"], "sample")
        if self.version.tombstones:
            live = pc.and_not(live, pc.is_in(rows["uid"], pa.array(sorted(self.version.tombstones))))
        if not pc.all(live).as_py():
            rows = rows.filter(live)
        return rows.select(columns).combine_chunks()

    def quality(self) -> list[dict[str, Any]]:
        """Return the quality record of each row, without the figures of single views; reads the manifest again."""
        return [quality_of(row) for row in self._live(("quality",)).to_pylist()]

    @classmethod
    def open(cls, corpus: str, version: int | None = None) -> VersionReader:
        """Open a version of a corpus by URL or folder; None takes the newest.

        Raises:
            UserError: in one line, if the corpus or the version is not there.
        """
        store = open_store(corpus, must_exist=True)
        return cls(store, open_version(store, version))

    def __reduce__(self) -> tuple[object, ...]:
        return VersionReader.open, (self.store.url, self.version.number)

    @property
    def number(self) -> int:
        """Number of the version."""
        return self.version.number

    @property
    def digest(self) -> str:
        """Digest of all that the version holds."""
        return self.version.digest

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def read_views(self, row: int, views: Sequence[int], planes: Sequence[str] = ("rgba",)) -> ViewsRead:
        """Read the cameras of a sample and the planes of some of its views.

        Args:
            row: row of `rows`.
            views: view indexes, in the order wanted.
            planes: plane names.

        Raises:
            DamagedDataError: if what is read is not what was written, naming shard and sample.
            StoreError, FileNotFoundError: if it cannot be read at all.
        """
        record = self.rows.slice(row, 1).to_pylist()[0]
        entry, shard = member_index(record), shard_key(record["shard_sha256"])
        positions = [0, *(entry.position(view, plane) for view in views for plane in planes)]
        offsets = entry.offsets
        parts = self.store.get_ranges(shard, [offsets[p] for p in positions], [entry.lengths[p] for p in positions])
        for position, part in zip(positions, parts):
            name = member_name(record["key"], position, entry)
            check_part(part, entry.lengths[position], entry.crc32s[position], shard, name)
        try:
            header = parse_sample_json(parts[0])
        except SampleError as error:
            raise DamagedDataError(f"{shard}: sample {record['key']}: {error}") from None
        width = len(planes)
        found = [dict(zip(planes, parts[1 + i * width : 1 + (i + 1) * width])) for i in range(len(views))]
        return ViewsRead(header=header, planes=found, num_bytes=sum(len(part) for part in parts))
