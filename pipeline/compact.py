"""Compaction: shards of which a version uses little are written anew, by copying bytes.

Samples die in their shards: withdrawn by hand, refused by stricter rules, rendered again from another file. A plain
WebDataset reader still meets them, and storage still holds them. Where dead bytes are more than a given share, the
live samples of the newest version are copied into new shards, in the order of the version, and the next version points
there.

    tar of a sample    a header block and padded data, member after member, from `offset - 512` to the end of the last
    new shard          such stretches, one behind the other, and the end of an archive: the same bytes as if the samples
                       had been written for the first time

Nothing is decoded or rendered. Every member is checked against its CRC-32 while it is copied, and the new shard is read
again before it is stored. The plan of a compaction is a function of the version and the settings, so one that was
killed goes on where it was; its receipts hold the rows of the old ones with new places. The old shards stay until a
collection finds that nothing names them, and an older version does.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import manifest, version
from pipeline import plan as plans
from pipeline.canonical import digest_json
from pipeline.plan import ShardPlan
from pipeline.receipt import commit_rows, load, member_index, tally
from pipeline.shard import (
    BLOCK,
    RECORD,
    DamagedDataError,
    MemberIndex,
    Shard,
    check_part,
    end_of_archive,
    member_name,
    shard_key,
    stretch,
    verify_shard,
)
from pipeline.store import Store
from pipeline.types import Asset
from pipeline.version import Version

DEFAULT_DEAD_SHARE = 0.5
_PLACE = ("shard_sha256", "shard_bytes", "offset")
Place = tuple[str, int, int]
"""Where a sample lies: `_PLACE`."""
Origin = tuple[str, str, str, int]
"""Source, uid, and the shard and offset that it had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """What a compaction did: shards left, samples copied, shards written, and the version that points there."""

    shards_before: int
    samples: int
    shards_after: int
    bytes_before: int
    bytes_after: int
    version: Version
    new: bool

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        names = ("shards_before", "samples", "shards_after", "bytes_before", "bytes_after", "new")
        return {name: getattr(self, name) for name in names} | {"version": self.version.number}


def sparse_shards(rows: pa.Table, dead_share: float) -> dict[str, int]:
    """Return the shards, with their bytes, of which more than this share is not of a live sample."""
    live = rows.select(["shard_sha256", "shard_bytes", "lengths"]).filter(pc.is_valid(rows["shard_sha256"]))
    lengths = live["lengths"].combine_chunks()
    padded = (pc.list_flatten(lengths).to_numpy().astype(np.int64) + 2 * BLOCK - 1) // BLOCK * BLOCK
    counts = pc.list_value_length(lengths).to_numpy()
    totals = np.add.reduceat(padded, np.concatenate([[0], np.cumsum(counts)[:-1]])) if len(counts) else padded
    table = live.select(["shard_sha256", "shard_bytes"]).append_column("used", pa.array(totals))
    found = table.group_by(["shard_sha256", "shard_bytes"]).aggregate([("used", "sum")]).to_pylist()
    return {
        group["shard_sha256"]: group["shard_bytes"]
        for group in sorted(found, key=lambda group: str(group["shard_sha256"]))
        if 1 - group["used_sum"] / max(1, group["shard_bytes"] - RECORD) > dead_share
    }


def compact(store: Store, *, dead_share: float = DEFAULT_DEAD_SHARE) -> Compacted:
    """Copy the live samples of the newest version out of shards full of dead bytes, and publish a version that says so.

    Raises:
        DamagedDataError: if a sample that is to be copied differs from its row; nothing of its shard is stored.
        UserError: if there is no version.
    """
    base = version.open_version(store)
    rows = version.open_rows(store, base)
    sparse = sparse_shards(rows, dead_share)
    moving = rows.filter(pc.is_in(rows["shard_sha256"], pa.array(list(sparse), pa.string())))
    moved: dict[Origin, Place] = {}
    written: dict[str, int] = {}
    if sparse:
        receipts = _receipts_of(store, base, set(sparse))
        groups = moving.group_by(["fingerprint", "source"]).aggregate([]).sort_by("source").to_pylist()
        for group in groups:
            mask = pc.and_(*(pc.equal(moving[name], value) for name, value in group.items()))
            places = moving.select(["source", "uid", "shard_sha256", "offset"]).filter(mask)
            for shard, placed in _rewrite(store, base, group, places, receipts, dead_share):
                written[shard.sha256] = shard.num_bytes
                moved |= placed
    published, new = version.repoint(store, lambda newest: _repoint(version.open_rows(store, newest), moved))
    return Compacted(
        shards_before=len(sparse),
        samples=len(moved),
        shards_after=len(written),
        bytes_before=sum(sparse.values()),
        bytes_after=sum(written.values()),
        version=published,
        new=new,
    )


def _receipts_of(store: Store, base: Version, shards: set[str]) -> dict[str, list[str]]:
    """Return the plan ids of the receipts that tell of each of these shards."""
    present = manifest.receipt_sizes(store)
    out: dict[str, list[str]] = {}
    for plan in version.plan_sets(store):
        if plan.fingerprint not in base.record["fingerprints"]:
            continue
        for plan_id in plan.plan_ids:
            if plan_id in present:
                sha256 = tally(store, plan_id, present[plan_id]).shard_sha256
                if sha256 in shards:
                    out.setdefault(sha256, []).append(plan_id)
    return out


def _rewrite(
    store: Store,
    base: Version,
    group: Mapping[str, str],
    places: pa.Table,
    receipts: Mapping[str, Sequence[str]],
    dead_share: float,
) -> Iterator[tuple[Shard, dict[Origin, Place]]]:
    """Yield each new shard of a fingerprint and source, committed, with the new place of every sample in it."""

    @functools.lru_cache(maxsize=32)
    def samples(sha256: str) -> dict[int, dict[str, Any]]:
        """Return the whole rows of a shard's samples by offset, as a receipt holds them."""
        out: dict[int, dict[str, Any]] = {}
        for plan_id in receipts.get(sha256, ()):
            rows = load(store, plan_id).rows
            out |= {row["offset"]: row for row in rows.filter(pc.equal(rows["status"], "sample")).to_pylist()}
        return out

    def whole(place: Mapping[str, Any]) -> dict[str, Any]:
        row = samples(place["shard_sha256"]).get(place["offset"])
        if row is None or row["uid"] != place["uid"]:
            raise DamagedDataError(
                f"{shard_key(place['shard_sha256'])}: no receipt tells of {place['uid']!r} there; "
                "restore receipts/ and plans/"
            )
        return row

    def assets() -> Iterator[Asset]:
        for place in places.to_pylist():
            yield _asset(whole(place))

    spec = base.spec
    settings = [base.digest, dead_share, spec.shards.objects_per_shard, group["source"]]
    name = f"compact-{group['fingerprint'][:16]}-{base.number:06d}-{digest_json(settings)[:8]}"
    drafted = plans.draft(
        spec, group["fingerprint"], list(assets()), plan_set_id=name, kind="compact", number=base.number
    )
    start = 0
    for plan in plans.put(store, drafted)[0].shards:
        part = places.slice(start, len(plan.assets)).to_pylist()
        start += len(part)
        yield _commit_copy(store, plan, [whole(place) for place in part])


def _asset(row: Mapping[str, Any]) -> Asset:
    same = {name: row[name] for name in ("uid", "source", "uri", "format", "license", "attribution")}
    return Asset(**same, sha256=row["asset_sha256"], num_bytes=row["asset_bytes"])


def _commit_copy(store: Store, plan: ShardPlan, rows: Sequence[Mapping[str, Any]]) -> tuple[Shard, dict[Origin, Place]]:
    with tempfile.TemporaryDirectory(prefix="lrm-compact-") as folder:
        shard = copy_samples(store, rows, Path(folder) / f"{plan.plan_id}.tar")
        verify_shard(shard.path, shard.index)
        store.create_blob(shard_key(shard.sha256), shard.path, shard.num_bytes)
    placed, moved = [], {}
    for row in rows:
        where = dict(zip(_PLACE, (shard.sha256, shard.num_bytes, shard.index[row["key"]].offset)))
        placed.append({**row, **where})
        old = (row["source"], row["uid"], row["shard_sha256"], row["offset"])
        moved[old] = (shard.sha256, shard.num_bytes, shard.index[row["key"]].offset)
    commit_rows(store, plan, placed, shard)
    return shard, moved


def copy_samples(store: Store, rows: Sequence[Mapping[str, Any]], path: Path) -> Shard:
    """Copy samples, by their rows, from their shards into a new tar at `path`, in order.

    Raises:
        DamagedDataError: if a member differs from its row.
    """
    index: dict[str, MemberIndex] = {}
    digest, count = hashlib.sha256(), 0
    with path.open("xb") as file:
        for row in rows:
            entry = member_index(row)
            start, end = stretch(entry)
            (data,) = store.get_ranges(shard_key(row["shard_sha256"]), [start], [end - start])
            for i, (at, length, crc32) in enumerate(zip(entry.offsets, entry.lengths, entry.crc32s)):
                part = data[at - start : at - start + length]
                check_part(part, length, crc32, str(row["shard_sha256"])[:12], member_name(row["key"], i, entry))
            index[row["key"]] = replace(entry, offset=count + BLOCK)
            file.write(data)
            digest.update(data)
            count += len(data)
        end_blocks = end_of_archive(count)
        file.write(end_blocks)
        digest.update(end_blocks)
    return Shard(path=path, sha256=digest.hexdigest(), num_bytes=count + len(end_blocks), index=index)


def _repoint(rows: pa.Table, moved: Mapping[Origin, Place]) -> pa.Table:
    """Return the rows with samples at their new places."""
    if not moved:
        return rows
    old = rows.select(["source", "uid", *_PLACE]).to_pydict()
    keys = zip(old["source"], old["uid"], old["shard_sha256"], old["offset"])
    places = [moved.get(key) for key in keys]
    for i, name in enumerate(_PLACE):
        at = rows.schema.get_field_index(name)
        values = [old[name][row] if place is None else place[i] for row, place in enumerate(places)]
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    return rows


def as_text(done: Compacted) -> str:
    """Return what was done in a line."""
    if not done.shards_before:
        return f"nothing to compact: no shard of version {done.version.number} is that empty"
    return (
        f"version {done.version.number}: {done.samples} samples copied out of {done.shards_before} shard(s) of "
        f"{done.bytes_before / 1e6:.1f} MB into {done.shards_after} of {done.bytes_after / 1e6:.1f} MB; the old "
        "ones go with a collection once no version and no receipt needs them"
    )
