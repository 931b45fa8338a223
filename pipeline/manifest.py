"""Manifests: the rows of many receipts, merged by a pure function into one content-addressed Parquet file.

Under one fingerprint a sample beats a failure, and two different samples of one uid are an error, never a choice.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import SCHEMA
from pipeline.receipt import ROWS, VOLATILE, Receipt, load
from pipeline.spec import DatasetSpec
from pipeline.store import Store
from pipeline.types import UserError

STABLE = pa.schema([field for field in ROWS if field.name not in VOLATILE] + [pa.field("heldout", pa.bool_())])
READ_THREADS = 16


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
    table = table.take(pa.array(keep, pa.int64()))
    heldout = pa.array([spec.is_heldout(uid) for uid in table["uid"].to_pylist()], pa.bool_())
    return table.append_column("heldout", heldout).cast(STABLE)


def to_parquet(table: pa.Table) -> tuple[bytes, str]:
    """Return the file of a manifest and its sha256."""
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"schema": str(SCHEMA)}), sink, compression="zstd")
    data = sink.getvalue()
    return data, hashlib.sha256(data).hexdigest()
