"""What a source lists now, beside what a corpus holds: whose bytes are the same, in columns.

An object is known by source and uid. Its bytes are the same if the digests are; a catalogue that knows no digest is
taken to mean the bytes that were fetched, unless lengths differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_STATED = ("license", "attribution", "uri")


def object_keys(table: pa.Table) -> Any:
    """Return one text a row that tells objects apart: source and uid."""
    columns = [table[name].combine_chunks().cast(pa.large_string()) for name in ("source", "uid")]
    return pc.binary_join_element_wise(*columns, pa.scalar("\x1f", pa.large_string()))


def last_of_each(table: pa.Table) -> pa.Table:
    """Return the last row of each object: of one that was planned again, the bytes that were planned last."""
    codes = np.asarray(object_keys(table).dictionary_encode().indices.to_numpy(), np.int64)
    last = np.zeros(codes.max(initial=-1) + 1, np.int64)
    last[codes] = np.arange(len(codes))  # of several the last one counts
    return table.take(pa.array(np.sort(last)))


def same_bytes(theirs: Any, their_bytes: Any, ours: Any, our_bytes: Any) -> NDArray[np.bool_]:
    """Return for each row whether two assets are the same bytes, as far as digests and lengths [N] are known."""
    by_digest = pc.equal(theirs, ours)
    by_length = pc.fill_null(pc.equal(their_bytes, our_bytes), True)
    return np.asarray(pc.coalesce(by_digest, by_length).to_numpy(zero_copy_only=False), bool)


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """The assets of a source.

    Attributes:
        table: columns of `pipeline.plan.assets_table`, one row an object.
        keys: `object_keys` of it.
    """

    table: pa.Table
    keys: Any

    @classmethod
    def of(cls, table: pa.Table) -> Listing:
        """Return the listing of a table of assets."""
        table = table.combine_chunks()
        return cls(table, object_keys(table))

    def places(self, rows: pa.Table, sha256: str = "asset_sha256", num_bytes: str = "asset_bytes") -> NDArray[np.int64]:
        """Return for each row the place of its object in the listing; -1 where it is not there with these bytes."""
        found = pc.index_in(object_keys(rows), self.keys)
        place = pa.array(np.asarray(pc.fill_null(found, 0).to_numpy(zero_copy_only=False), np.int64))
        if not self.table.num_rows:
            return np.full(rows.num_rows, -1, np.int64)
        mine = self.table.select(["sha256", "num_bytes"]).take(place)
        same = same_bytes(
            rows[sha256].combine_chunks(),
            rows[num_bytes].combine_chunks(),
            mine["sha256"].combine_chunks(),
            mine["num_bytes"].combine_chunks(),
        )
        listed = np.asarray(pc.is_valid(found).to_numpy(zero_copy_only=False), bool)
        return np.where(listed & same, place.to_numpy(), -1)

    def restrict(self, tables: list[pa.Table]) -> None:
        """Keep the rows of listed objects in each table, with licence, credit line and address as the source has them.

        All are looked up at once: every look-up makes the listing's hash table anew, half a second of a million.
        """
        names = ["source", "uid", "asset_sha256", "asset_bytes"]
        places = self.places(pa.concat_tables([table.select(names) for table in tables])) if tables else None
        for i, table in enumerate(tables):
            assert places is not None
            mine, places = places[: table.num_rows], places[table.num_rows :]
            kept = table.take(pa.array(np.flatnonzero(mine >= 0)))
            stated = self.table.select(_STATED).take(pa.array(mine[mine >= 0]))
            for name in _STATED:
                at = kept.schema.get_field_index(name)
                kept = kept.set_column(at, kept.schema.field(at), stated[name].combine_chunks())
            tables[i] = kept
