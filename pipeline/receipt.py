"""Receipts: the commit of a shard.

    receipts/<plan_id>.parquet     one row a planned uid, created once; until it exists the shard does not count

A row tells all that is known of one object: the asset, then either where its sample lies and how to check it, or why
there is none. Columns in `VOLATILE` (attempts, seconds, worker, dates, log tails) differ from run to run; they stay in
the receipt and never reach a manifest, so that a corpus built twice gives one manifest digest.

The footer tells the counts and what the shard cost on which node, so `tally` learns where a shard stands from the last
16 KB of its receipt: a receipt of 64 objects has 150 KB (it keeps 32 views' figures of each) and takes 2 ms to read in
full, its footer 0.1 ms.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import SCHEMA, parquet
from pipeline.canonical import canonical_json, check_schema
from pipeline.plan import ShardPlan
from pipeline.sample import SampleError, asset_row
from pipeline.shard import DamagedDataError, MemberIndex, Shard, shard_key, write_shard
from pipeline.store import Outcome, Store, StoreError
from pipeline.types import Failure, Sample, UserError

ROWS = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("uri", pa.string()),
        ("format", pa.string()),
        ("license", pa.string()),
        ("attribution", pa.string()),
        ("asset_sha256", pa.string()),
        ("asset_bytes", pa.int64()),
        ("fingerprint", pa.string()),
        ("status", pa.string()),  # sample | failure
        ("failure_kind", pa.string()),
        ("retryable", pa.bool_()),
        ("message", pa.string()),
        ("seed", pa.int64()),
        ("quality", pa.string()),  # JSON
        ("num_views", pa.int32()),
        ("planes", pa.list_(pa.string())),
        ("codecs", pa.list_(pa.string())),
        ("shard_sha256", pa.string()),
        ("shard_bytes", pa.int64()),
        ("offset", pa.int64()),
        ("lengths", pa.list_(pa.int32())),
        ("crc32s", pa.list_(pa.uint32())),
        ("attempts", pa.int32()),
        ("log_tail", pa.string()),
        ("provenance", pa.string()),  # JSON: worker, device, seconds by stage, fetch date
    ]
)
_METADATA = (
    "schema",
    "plan_id",
    "fingerprint",
    "shard_sha256",
    "shard_bytes",
    "planned",
    "samples",
    "failures",
    "work",
)
_FOOTER_BYTES = 16 * 1024
_MOST = 2**53
_UNREADABLE = (pa.ArrowException, OSError, KeyError, ValueError, TypeError)
VOLATILE = ("attempts", "log_tail", "provenance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What became of one shard plan: `shard_sha256` is None if every object failed."""

    plan_id: str
    fingerprint: str
    shard_sha256: str | None
    shard_bytes: int
    rows: pa.Table


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWork:
    """What one node did for a shard: objects it ended, samples among them, seconds its tasks took."""

    objects: int
    samples: int
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a shard cost: the tasks that ended its objects; earlier tries whose process died are not in it.

    Attributes:
        objects: whose rows tell times.
        cpu_s: seconds times the CPUs that each task reserved; `gpu_s` times its share of a GPU.
        begun_s, ended_s: first start and last end by the nodes' clocks, seconds since 1970.
        nodes: by name.
    """

    objects: int = 0
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    begun_s: float = 0.0
    ended_s: float = 0.0
    nodes: Mapping[str, NodeWork] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The counts of a receipt, by its footer alone.

    Attributes:
        failures: failures by kind.
        retryable: how many of them may end otherwise.
        work: nothing in receipts of releases that did not note it.
    """

    plan_id: str
    fingerprint: str
    planned: int
    samples: int
    failures: Mapping[str, int]
    retryable: int
    shard_sha256: str | None
    shard_bytes: int
    work: Work = field(default_factory=Work)


def receipt_key(plan_id: str) -> str:
    """Return the key of a receipt in a corpus."""
    return f"receipts/{plan_id}.parquet"


def commit_shard(
    store: Store, plan: ShardPlan, results: Mapping[str, Sample | Failure], scratch_dir: Path
) -> tuple[Receipt, bool]:
    """Write, verify and store the tar of a plan, then create its receipt: the only commit point.

    Args:
        results: one Sample or Failure for each planned uid.
        scratch_dir: where the tar is written before it is stored; the caller removes it.

    Returns:
        The receipt that counts, and whether it is ours; another attempt may have been first, and is adopted.

    Raises:
        ValueError: if the results do not account for every planned uid; nothing is stored.
        StoreError, SampleError, DamagedDataError: naming the plan and its objects, if the shard cannot be written,
            verified or stored; no receipt is created.
    """
    planned = [asset.uid for asset in plan.assets]
    if sorted(planned) != sorted(results):
        raise ValueError(
            f"shard {plan.index}: {len(results)} results do not account for the {len(planned)} planned objects; "
            f"missing {sorted(set(planned) - set(results))[:5]}, unplanned {sorted(set(results) - set(planned))[:5]}"
        )
    samples = [result for uid in planned if isinstance(result := results[uid], Sample)]
    shard = None
    with _naming(plan, scratch_dir):
        if samples:
            shard = write_shard(samples, scratch_dir / f"{plan.plan_id}.tar")
            store.create_blob(shard_key(shard.sha256), shard.path, shard.num_bytes)
        rows = [_row(plan, results[asset.uid], shard, i) for i, asset in enumerate(plan.assets)]
        return commit_rows(store, plan, rows, shard)


@contextlib.contextmanager
def _naming(plan: ShardPlan, scratch_dir: Path) -> Iterator[None]:
    """Say in errors whose work it was."""
    first, last = plan.assets[0].uid, plan.assets[-1].uid
    objects = f"objects {first!r} to {last!r}" if len(plan.assets) > 1 else f"object {first!r}"
    what = f"shard {plan.index} of plan {plan.plan_id[:16]} ({objects})"
    try:
        yield
    except (StoreError, SampleError, DamagedDataError) as error:
        raise type(error)(f"{what}: {error}") from None
    except OSError as error:  # of the scratch folder: a store's own are StoreErrors
        raise StoreError(f"{what}: its tar could not be written to {scratch_dir}: {error}") from error


def commit_rows(
    store: Store, plan: ShardPlan, rows: Sequence[Mapping[str, Any]], shard: Shard | None
) -> tuple[Receipt, bool]:
    """Create the receipt of a shard that is stored already; return the one that counts, and whether it is ours."""
    data = to_parquet(plan, rows, shard)
    outcome = store.create(receipt_key(plan.plan_id), data)
    if outcome is Outcome.CONFLICT:
        return load(store, plan.plan_id), False
    return from_parquet(data, plan.plan_id, store.url), outcome is Outcome.CREATED


def _row(plan: ShardPlan, result: Sample | Failure, shard: Shard | None, i: int) -> dict[str, Any]:
    asset = result.asset if isinstance(result, Sample) else plan.assets[i]
    base = asset_row(asset)
    base["asset_sha256"], base["asset_bytes"] = base.pop("sha256"), base.pop("num_bytes")
    base |= {"key": asset.key, "fingerprint": plan.fingerprint}
    base["provenance"] = canonical_json(dict(result.provenance)).decode()
    if isinstance(result, Failure):
        return base | {
            "status": "failure",
            "failure_kind": result.kind.value,
            "retryable": result.retryable,
            "message": result.message,
            "attempts": result.attempts,
            "log_tail": result.log_tail,
        }
    assert shard is not None, "a sample without a shard"
    entry = shard.index[result.key]
    return base | {
        "status": "sample",
        "seed": result.seed,
        "quality": canonical_json(dict(result.quality)).decode(),
        "num_views": entry.num_views,
        "planes": list(entry.planes),
        "codecs": list(entry.codecs),
        "shard_sha256": shard.sha256,
        "shard_bytes": shard.num_bytes,
        "offset": entry.offset,
        "lengths": list(entry.lengths),
        "crc32s": list(entry.crc32s),
        "attempts": int(result.provenance.get("attempts", 1)),
    }


def to_parquet(plan: ShardPlan, rows: Sequence[Mapping[str, Any]], shard: Shard | None) -> bytes:
    """Return the file of a receipt."""
    num_samples = sum(row["status"] == "sample" for row in rows)
    kinds = Counter(row["failure_kind"] for row in rows if row["status"] == "failure")
    failures = {"kinds": dict(kinds), "retryable": sum(bool(row.get("retryable")) for row in rows)}
    metadata = {
        "schema": str(SCHEMA),
        "plan_id": plan.plan_id,
        "fingerprint": plan.fingerprint,
        "shard_sha256": shard.sha256 if shard else "",
        "shard_bytes": str(shard.num_bytes if shard else 0),
        "planned": str(len(plan.assets)),
        "samples": str(num_samples),
        "failures": canonical_json(failures).decode(),
        "work": work_json(work_of(rows)),
    }
    sink = io.BytesIO()
    table = pa.Table.from_pylist(list(rows), schema=ROWS.with_metadata(metadata))
    # Dictionaries and statistics of so few rows cost more time and bytes than they save.
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    return sink.getvalue()


def load(store: Store, plan_id: str) -> Receipt:
    """Read a receipt.

    Raises:
        FileNotFoundError: if the shard has not been committed.
    """
    return from_parquet(store.get(receipt_key(plan_id)), plan_id, store.url)


def from_parquet(data: bytes, plan_id: str, where: str) -> Receipt:
    """Read the file of a receipt and check it against itself."""
    try:
        file = parquet.opened(data, checksums=True)
        rows = file.read(columns=ROWS.names, use_threads=False)
        metadata = _metadata_of(file.metadata.metadata, plan_id, where)
        rows = rows.select(ROWS.names).replace_schema_metadata(None).cast(ROWS)
        consistent = (
            metadata["plan_id"] == plan_id
            and int(metadata["planned"]) == rows.num_rows
            and pc.sum(pc.equal(rows["status"], "sample")).as_py() == int(metadata["samples"])
        )
        num_bytes = int(metadata["shard_bytes"])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise unreadable(where, plan_id, error) from None
    if not consistent:
        raise _damaged(where, plan_id, "contradicts itself")
    return Receipt(
        plan_id=plan_id,
        fingerprint=metadata["fingerprint"],
        shard_sha256=metadata["shard_sha256"] or None,
        shard_bytes=num_bytes,
        rows=rows,
    )


def tally(store: Store, plan_id: str, num_bytes: int) -> Tally:
    """Return the counts of a receipt of this length, by one ranged read.

    Raises:
        DamagedDataError: if the footer is not readable.
        FileNotFoundError: if there is no such receipt.
    """
    start = max(0, num_bytes - _FOOTER_BYTES)
    tail = store.get_ranges(receipt_key(plan_id), [start], [num_bytes - start])[0] if num_bytes else b""
    if start and int.from_bytes(tail[-8:-4], "little") + 8 > len(tail):
        tail = store.get(receipt_key(plan_id))
    try:
        metadata = _metadata_of(pq.read_metadata(pa.BufferReader(tail)).metadata, plan_id, store.url)
        if not metadata["failures"]:  # written before the footer told them
            return tally_of(load(store, plan_id))
        failures = json.loads(metadata["failures"])
        found = Tally(
            plan_id=plan_id,
            fingerprint=metadata["fingerprint"],
            planned=int(metadata["planned"]),
            samples=int(metadata["samples"]),
            failures={str(kind): int(count) for kind, count in failures["kinds"].items()},
            retryable=int(failures["retryable"]),
            shard_sha256=metadata["shard_sha256"] or None,
            shard_bytes=int(metadata["shard_bytes"]),
            work=parse_work(metadata["work"]),
        )
    except (*_UNREADABLE, ArithmeticError, AttributeError, RecursionError) as error:
        raise unreadable(store.url, plan_id, error) from None
    counts = (found.samples, found.retryable, found.shard_bytes, found.work.objects, *found.failures.values())
    sound = all(0 <= count < _MOST for count in counts)
    if metadata["plan_id"] != plan_id or found.samples + sum(found.failures.values()) != found.planned or not sound:
        raise _damaged(store.url, plan_id, "contradicts itself")
    return found


def tally_of(receipt: Receipt) -> Tally:
    """Return the counts of a receipt by its rows."""
    rows = receipt.rows
    kinds = Counter(rows["failure_kind"].drop_null().to_pylist())
    return Tally(
        plan_id=receipt.plan_id,
        fingerprint=receipt.fingerprint,
        planned=rows.num_rows,
        samples=rows.num_rows - sum(kinds.values()),
        failures=dict(kinds),
        retryable=pc.sum(rows["retryable"]).as_py() or 0,
        shard_sha256=receipt.shard_sha256,
        shard_bytes=receipt.shard_bytes,
        work=work_of(rows.select(["status", "provenance"]).to_pylist()),
    )


def work_of(rows: Sequence[Mapping[str, Any]]) -> Work:
    """Return what a shard cost, by the provenance of its receipt's rows; rows that do not tell are left out."""
    nodes: dict[str, NodeWork] = {}
    spans, cpu_s, gpu_s = list[tuple[float, float]](), 0.0, 0.0
    for row in rows:
        try:
            told = json.loads(row["provenance"] or "{}")
            busy_s, cpus, gpus = (float(told.get(name, 0.0)) for name in ("elapsed_s", "cpus", "gpus"))
            ended_s = datetime.datetime.fromisoformat(told["finished_at"]).timestamp()
            node = str(told["worker"])[:100]
            finite = all(map(math.isfinite, (busy_s, cpus, gpus)))
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
            continue
        if not finite:
            continue
        spans.append((ended_s - busy_s, ended_s))
        cpu_s, gpu_s = cpu_s + busy_s * cpus, gpu_s + busy_s * gpus
        was = nodes.get(node, NodeWork(objects=0, samples=0, busy_s=0.0))
        nodes[node] = NodeWork(
            objects=was.objects + 1,
            samples=was.samples + (row["status"] == "sample"),
            busy_s=round(was.busy_s + busy_s, 3),
        )
    if not spans:
        return Work()
    return Work(
        objects=len(spans), cpu_s=round(cpu_s, 3), gpu_s=round(gpu_s, 3), nodes=nodes,
        begun_s=round(min(begun for begun, _ in spans), 3), ended_s=round(max(ended for _, ended in spans), 3),
    )  # fmt: skip


_WORK = ("objects", "cpu_s", "gpu_s", "begun_s", "ended_s")


def work_json(work: Work) -> str:
    """Return the work of a shard as its receipt's footer holds it: 20 bytes a node."""
    nodes = {name: [one.objects, one.samples, one.busy_s] for name, one in work.nodes.items()}
    return canonical_json({"all": [getattr(work, name) for name in _WORK], "nodes": nodes}).decode()


def parse_work(text: str) -> Work:
    """Read what `work_json` wrote; "" is nothing.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError: if it is something else.
    """
    if not text:
        return Work()
    told = json.loads(text)
    objects, *seconds = map(float, told["all"])
    nodes = {
        str(name): NodeWork(objects=int(count), samples=int(samples), busy_s=float(busy_s))
        for name, (count, samples, busy_s) in told["nodes"].items()
    }
    if not all(map(math.isfinite, (objects, *seconds, *(one.busy_s for one in nodes.values())))):
        raise ValueError("its work is not finite")
    if not all(0 <= count < _MOST for one in nodes.values() for count in (one.objects, one.samples)):
        raise ValueError("its nodes made an absurd number of objects")
    cpu_s, gpu_s, begun_s, ended_s = seconds
    return Work(objects=int(objects), cpu_s=cpu_s, gpu_s=gpu_s, begun_s=begun_s, ended_s=ended_s, nodes=nodes)


def _metadata_of(stored: Mapping[bytes, bytes] | None, plan_id: str, where: str) -> dict[str, str]:
    metadata = {name: (stored or {}).get(name.encode(), b"").decode() for name in _METADATA}
    check_schema(metadata["schema"], where, f"receipt {plan_id}")
    return metadata


def unreadable(where: str, plan_id: str, error: Exception) -> Exception:
    """Return the error of a receipt that another error kept from being read."""
    if isinstance(error, UserError | DamagedDataError):
        return error
    text = str(error).split("\n", 1)[0]
    return _damaged(where, plan_id, f"is not readable: {text}")


def _damaged(where: str, plan_id: str, how: str) -> DamagedDataError:
    remedy = f"restore it, or remove {receipt_key(plan_id)} and make its shard again"
    return DamagedDataError(f"corpus {where}: receipt {plan_id} {how}; {remedy}")


def member_index(row: Mapping[str, Any]) -> MemberIndex:
    """Return the member index that a sample's row holds.

    Raises:
        DamagedDataError: if the row contradicts itself.
    """
    try:
        return MemberIndex(
            planes=tuple(row["planes"]),
            codecs=tuple(row["codecs"]),
            num_views=int(row["num_views"]),
            offset=int(row["offset"]),
            lengths=tuple(row["lengths"]),
            crc32s=tuple(row["crc32s"]),
        )
    except DamagedDataError as error:
        raise DamagedDataError(f"row of {row.get('uid')!r}: {error}") from None
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise DamagedDataError(f"row of {row.get('uid')!r} has no usable member index: {error}") from None


def quality_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quality record of a row; empty for a failure."""
    try:
        value = json.loads(row["quality"]) if row["quality"] else {}
    except (ValueError, RecursionError) as error:
        raise DamagedDataError(f"row of {row.get('uid')!r}: its quality record is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}
