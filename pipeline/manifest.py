"""Manifests: the rows of many receipts, merged by a pure function into one content-addressed Parquet file.

Under one fingerprint a sample beats a failure, and two different samples of one uid are an error, never a choice.

A version obeys the admission rules of the spec that it records. So the rules on pictures are judged again here, by the
quality records that the rows hold, and duplicates, which no renderer can know of, are decided here. What is refused is
withdrawn: its row becomes a failure that keeps the quality record and points to no shard. The bytes stay in the shard,
which is content-addressed and shared with other versions; readers that go by rows never see them. Stricter rules and
another duplicate distance thus cost a new version and no rendering.

Judging a million records of 32 views takes about a minute (they are JSON), finding duplicates among them minutes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import SCHEMA
from pipeline.phash import find_duplicates, hash_words, is_hash
from pipeline.quality import Refusal, judge
from pipeline.receipt import ROWS, VOLATILE, Receipt, load
from pipeline.spec import DatasetSpec
from pipeline.store import Store
from pipeline.types import FailureKind, UserError

STABLE = pa.schema([field for field in ROWS if field.name not in VOLATILE] + [pa.field("heldout", pa.bool_())])
READ_THREADS = 16

WHOLE_FORMATS = frozenset({"glb", "stl", "ply", "usdz", "capture"})
"""Formats whose main file is the whole object: equal files are equal objects. An OBJ or glTF names side files, and its
digest does not cover them. The digest of a capture covers all that was read of it (`pipeline.members`)."""

_POINTERS = ("num_views", "planes", "codecs", "shard_sha256", "shard_bytes", "offset", "lengths", "crc32s")


def manifest_key(sha256: str) -> str:
    """Return the key of a manifest in a corpus."""
    return f"manifests/{sha256}.parquet"


def load_receipts(store: Store, plan_ids: Sequence[str]) -> list[Receipt]:
    """Read the receipts of these plans that exist, in the order given."""

    def one(plan_id: str) -> Receipt | None:
        try:
            return load(store, plan_id)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return [receipt for receipt in pool.map(one, plan_ids) if receipt is not None]


def merge(receipts: Sequence[Receipt], spec: DatasetSpec) -> pa.Table:
    """Merge receipts into one table of the stable columns, sorted by source and uid: a pure function.

    One row an object of the receipts, so that samples + failures are what was planned, whatever the rules of
    `spec.admission` withdraw.

    Raises:
        UserError: if a uid has two different samples, or rows under two fingerprints.
    """
    stable = [name for name in STABLE.names if name != "heldout"]
    table = pa.concat_tables([receipt.rows.select(stable).replace_schema_metadata(None) for receipt in receipts])
    order = pc.sort_indices(
        table, sort_keys=[("source", "ascending"), ("uid", "ascending"), ("status", "descending"), ("key", "ascending")]
    )
    table = table.take(order)  # "sample" sorts above "failure" in descending order
    names, sources = table["uid"].to_pylist(), table["source"].to_pylist()
    status, shards = table["status"].to_pylist(), table["shard_sha256"].to_pylist()
    prints, offsets = table["fingerprint"].to_pylist(), table["offset"].to_pylist()
    keep: list[int] = []
    for i, (name, source) in enumerate(zip(names, sources)):
        if keep and (names[keep[-1]], sources[keep[-1]]) == (name, source):
            first = keep[-1]
            if prints[i] != prints[first]:
                raise UserError(
                    f"asset {name!r} of source {source} was rendered under two fingerprints, by two specs or releases; "
                    "name the spec to publish with SPEC= (and the SET= that it was rendered with)"
                )
            if status[i] == "sample" and (shards[i], offsets[i]) != (shards[first], offsets[first]):
                raise UserError(
                    f"asset {name!r} of source {source} has two different samples under one fingerprint; "
                    "name the spec to publish with SPEC="
                )
            continue
        keep.append(i)
    table = admit(table.take(pa.array(keep, pa.int64())), spec)
    heldout = pa.array([spec.is_heldout(uid) for uid in table["uid"].to_pylist()], pa.bool_())
    return table.append_column("heldout", heldout).cast(STABLE)


def admit(table: pa.Table, spec: DatasetSpec) -> pa.Table:
    """Withdraw the samples that the spec's rules on pictures refuse, then the duplicates among the others."""
    rules, refused = spec.admission, dict[int, Refusal]()
    admitted, hashes = list[int](), list[str | None]()
    for row, (status, text) in enumerate(zip(table["status"].to_pylist(), table["quality"].to_pylist())):
        if status != "sample":
            continue
        record = json.loads(text) if text else {}
        record = record if isinstance(record, dict) else {}
        refusal = judge(record, rules)
        if refusal is not None:
            refused[row] = refusal
            continue
        admitted.append(row)
        hashes.append(record["phash"] if is_hash(record.get("phash")) else None)
    if rules.duplicate_distance is not None:
        refused |= _duplicates(table, admitted, hashes, rules.duplicate_distance)
    return _withdraw(table, refused) if refused else table


def _duplicates(
    table: pa.Table, rows: Sequence[int], hashes: Sequence[str | None], distance: int
) -> dict[int, Refusal]:
    """Return the rows that repeat an earlier one: by equal files first, then by hashes within `distance` bits.

    Of equal files the first answers for all: whatever it is a duplicate of, they are.
    """
    digests, formats = table["asset_sha256"].to_pylist(), table["format"].to_pylist()
    uids, sources = table["uid"].to_pylist(), table["source"].to_pylist()
    first_of: dict[str, int] = {}
    owner: dict[int, int] = {}
    for row in rows:
        if digests[row] is not None and formats[row] in WHOLE_FORMATS:
            first = first_of.setdefault(digests[row], row)
            if first != row:
                owner[row] = first
    hashed = [(row, text) for row, text in zip(rows, hashes) if text is not None and row not in owner]
    places = np.array([row for row, _ in hashed], np.int64)
    found = find_duplicates(hash_words([text for _, text in hashed]), distance)
    near = {int(places[i]): int(places[found[i]]) for i in np.flatnonzero(found >= 0)}
    out = {}
    for row, first in (owner | near).items():
        stays = near.get(first, first)
        how = "the same file as" if row in owner else f"within {distance} bits of"
        message = f"{how} {uids[stays]!r} of source {sources[stays]}, which stays (admission.duplicate_distance)"
        out[row] = Refusal(FailureKind.DUPLICATE, message)
    return out


def _withdraw(table: pa.Table, refused: Mapping[int, Refusal]) -> pa.Table:
    """Return the table with these rows turned from samples into failures; what they measured stays as evidence."""
    hit = np.zeros(table.num_rows, bool)
    hit[list(refused)] = True
    mask = pa.array(hit)
    values: dict[str, Any] = {
        "status": pa.array(["failure"] * table.num_rows),
        "retryable": pa.array([False] * table.num_rows),
        "failure_kind": pa.array([refused[i].kind.value if hit[i] else None for i in range(len(hit))], pa.string()),
        "message": pa.array([refused[i].message if hit[i] else None for i in range(len(hit))], pa.string()),
    }
    for place, field in enumerate(table.schema):
        if field.name in _POINTERS:
            replacement = pa.nulls(table.num_rows, field.type)
        elif field.name in values:
            replacement = values[field.name]
        else:
            continue
        table = table.set_column(place, field, pc.if_else(mask, replacement, table[field.name]))
    return table


def to_parquet(table: pa.Table) -> tuple[bytes, str]:
    """Return the file of a manifest and its sha256."""
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"schema": str(SCHEMA)}), sink, compression="zstd")
    data = sink.getvalue()
    return data, hashlib.sha256(data).hexdigest()
