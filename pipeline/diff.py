"""What changed between two versions, by object.

    added         a sample now, and none before
    removed       a sample before, and none now
    newly_failed  a failure now that was none before (so an object may be removed and newly failed), with its kind
    rerendered    a sample in both, of the same file, with other bytes
    changed_asset a sample in both, of another file
    relicensed    a sample in both, under another licence or credit line
    moved         the same bytes in another shard, as a compaction leaves them

samples(b) = samples(a) - removed + added. The two manifests are joined as columns on source and uid, and a sample is
compared by the lengths and CRC-32s of its members; only those that moved are looked at. A reader with a cache of shards
must fetch `new_shard_bytes` anew, one that reads ranges `new_sample_bytes` at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.listing import object_keys, same_bytes
from pipeline.store import Store
from pipeline.version import Version, open_rows

KINDS = ("added", "removed", "newly_failed", "rerendered", "changed_asset", "relicensed", "moved")
_COLUMNS = (
    "source", "uid", "status", "failure_kind", "license", "attribution", "asset_sha256", "asset_bytes", "fingerprint",
    "shard_sha256", "shard_bytes", "offset", "lengths", "crc32s",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Difference:
    """From version `a` to version `b`.

    Attributes:
        objects: for each of `KINDS` a table of source, uid, and what says more: failure_kind, license and old_license.
        counts: the number of rows of each, and new_shards, new_shard_bytes, new_sample_bytes.
    """

    a: Version
    b: Version
    objects: Mapping[str, pa.Table]
    counts: Mapping[str, int]

    def as_json(self, limit: int | None = None) -> dict[str, Any]:
        """Return it as a JSON object, with at most `limit` objects of each kind."""
        listed = {name: table.slice(0, limit).to_pylist() for name, table in self.objects.items()}
        return {"a": self.a.number, "b": self.b.number, "counts": dict(self.counts), "objects": listed}


def diff(store: Store, a: Version, b: Version) -> Difference:
    """Compare two versions of a corpus."""
    return diff_rows(a, b, open_rows(store, a, _COLUMNS), open_rows(store, b, _COLUMNS))


def diff_rows(a: Version, b: Version, old: pa.Table, new: pa.Table) -> Difference:
    """Compare the rows of two versions."""
    old, new = old.combine_chunks(), new.combine_chunks()
    old_keys, new_keys = object_keys(old), object_keys(new)
    before = _places(new_keys, old_keys)  # for each new row its old one, or -1
    after = _places(old_keys, new_keys)
    del old_keys, new_keys
    was, now = _samples(old), _samples(new)
    was_sample = (before >= 0) & was[before] if old.num_rows else np.zeros(new.num_rows, bool)
    was_failure = (before >= 0) & ~was_sample
    is_sample = (after >= 0) & now[after] if new.num_rows else np.zeros(old.num_rows, bool)
    both = np.flatnonzero(now & was_sample)
    pairs = old.take(pa.array(before[both])), new.take(pa.array(both))
    changed = _changes(*pairs)
    fresh = np.flatnonzero(now & ~was_sample)
    objects = {
        "added": _table(new, fresh, "license"),
        "removed": _table(old, np.flatnonzero(was & ~is_sample), "license"),
        "newly_failed": _table(new, np.flatnonzero(~now & ~was_failure), "failure_kind"),
    }
    old_licence = pairs[0]["license"]
    for name, mask in changed.items():
        found = np.flatnonzero(mask)
        table = _table(pairs[1], found, "license")
        if name == "relicensed":
            table = table.append_column("old_license", old_licence.take(pa.array(found)))
        objects[name] = table
    fetched = np.concatenate([fresh, both[changed["rerendered"] | changed["changed_asset"]]])
    counts = {name: objects[name].num_rows for name in KINDS} | _bytes(old, new, fetched)
    return Difference(a=a, b=b, objects={name: objects[name] for name in KINDS}, counts=counts)


def _places(keys: Any, among: Any) -> NDArray[np.int64]:
    return np.asarray(pc.fill_null(pc.index_in(keys, among), -1).to_numpy(zero_copy_only=False), np.int64)


def _samples(rows: pa.Table) -> NDArray[np.bool_]:
    return np.asarray(pc.equal(rows["status"], "sample").to_numpy(zero_copy_only=False), bool)


def _changes(old: pa.Table, new: pa.Table) -> dict[str, NDArray[np.bool_]]:
    """Return what changed of samples that are in both, row by row."""
    same_place = _equal(old, new, "shard_sha256") & _equal(old, new, "offset")
    same_file = same_bytes(*(t[name].combine_chunks() for t in (old, new) for name in ("asset_sha256", "asset_bytes")))
    elsewhere = np.flatnonzero(~same_place)
    part = pa.array(elsewhere)
    differs = np.zeros(len(same_place), bool)
    differs[elsewhere] = ~same_contents(old.take(part), new.take(part))
    return {
        "rerendered": differs & same_file,
        "changed_asset": differs & ~same_file,
        "relicensed": ~(_equal(old, new, "license") & _equal(old, new, "attribution")),
        "moved": ~same_place & ~differs,
    }


def _equal(old: pa.Table, new: pa.Table, name: str) -> NDArray[np.bool_]:
    found = pc.fill_null(pc.equal(old[name], new[name]), False)
    return np.asarray(found.to_numpy(zero_copy_only=False), bool)


def same_contents(old: pa.Table, new: pa.Table) -> NDArray[np.bool_]:
    """Return for each row [N] of two tables whether their samples have members of the same lengths and CRC-32s."""
    if not old.num_rows:
        return np.zeros(0, bool)
    counts = [
        np.asarray(pc.list_value_length(t["lengths"]).to_numpy(zero_copy_only=False), np.int64) for t in (old, new)
    ]
    same = counts[0] == counts[1]
    at = np.flatnonzero(same & (counts[0] > 0))
    if not len(at):
        return np.asarray(same, bool)
    starts = np.concatenate([[0], np.cumsum(counts[0][at])[:-1]])
    for name in ("lengths", "crc32s"):
        flat = [pc.list_flatten(t[name].take(pa.array(at))).to_numpy() for t in (old, new)]
        same[at] &= np.add.reduceat(flat[0] != flat[1], starts) == 0
    return np.asarray(same, bool)


def _table(rows: pa.Table, places: NDArray[np.int64], *more: str) -> pa.Table:
    return rows.select(["source", "uid", *more]).take(pa.array(places))


def _bytes(old: pa.Table, new: pa.Table, fetched: NDArray[np.int64]) -> dict[str, int]:
    known = pc.unique(old["shard_sha256"].drop_null())
    shards = new.select(["shard_sha256", "shard_bytes"]).filter(pc.is_valid(new["shard_sha256"]))
    shards = shards.group_by(["shard_sha256", "shard_bytes"]).aggregate([])
    shards = shards.filter(pc.invert(pc.is_in(shards["shard_sha256"], known)))
    lengths = pc.list_flatten(new["lengths"].take(pa.array(fetched)))
    return {
        "new_shards": shards.num_rows,
        "new_shard_bytes": pc.sum(shards["shard_bytes"]).as_py() or 0,
        "new_sample_bytes": pc.sum(lengths.cast(pa.int64())).as_py() or 0,
    }


def as_text(found: Difference) -> str:
    """Return the difference as lines for people."""
    counts = found.counts
    lines = [f"version {found.a.number} to {found.b.number}:"]
    lines += [f"  {counts[name]:9d} {name.replace('_', ' ')}" for name in KINDS if counts[name]]
    if len(lines) == 1:
        lines.append("  no object differs")
    lines.append(
        f"  to fetch anew: {counts['new_shard_bytes'] / 1e6:.1f} MB in {counts['new_shards']} shard(s), of which "
        f"{counts['new_sample_bytes'] / 1e6:.1f} MB are new samples"
    )
    return "\n".join(lines)
