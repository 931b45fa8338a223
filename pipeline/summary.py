"""What the receipts of a corpus count, without opening each of them every time; and plans without their assets.

    summaries/<count>-<sha256>.parquet     the tallies of so many receipts, content-addressed, created once

A look at a corpus lists its receipts (1000 a request), takes the newest summary, and reads the footers of those
receipts alone that the summary does not hold. Where these are many (more than one in SHARE of the receipts, FEW at
least) it stores a summary of all, so that the next look is cheap: a corpus that grows to N receipts holds about
SHARE * ln(N / FEW) summaries, and a look never reads more than one receipt in SHARE, whoever made it.

A summary is a memory and no evidence. An entry counts only while the receipt it was made from is listed with the same
length and the same time of change, so a receipt that is deleted, made anew or restored is read again; a summary that
does not match the digest in its name is passed over; and nothing but looking reads one. Deleting them all costs time.
Two launchers may store summaries at once: both are true, and the younger is taken.

The road not taken: counters that every commit adds to. They need a lock or a store with transactions, and drift once a
commit is counted twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import parquet, receipt
from pipeline.canonical import canonical_json, check_schema
from pipeline.plan import plan_key
from pipeline.receipt import NodeWork, Tally, Work
from pipeline.store import ObjectInfo, Store, StoreError
from pipeline.types import UserError

SHARE = 16
FEW = 256
_THREADS = 32
_PREFIX = "summaries/"
_ENDING = ".parquet"
_COLUMNS = pa.schema(
    [
        ("plan_id", pa.string()),
        ("num_bytes", pa.int64()),
        ("modified_us", pa.int64()),
        ("fingerprint", pa.string()),
        ("planned", pa.int64()),
        ("samples", pa.int64()),
        ("failures", pa.string()),  # JSON: kind -> count
        ("retryable", pa.int64()),
        ("shard_sha256", pa.string()),
        ("shard_bytes", pa.int64()),
        ("timed", pa.int64()),  # these five: `receipt.Work`
        ("cpu_s", pa.float64()),
        ("gpu_s", pa.float64()),
        ("begun_s", pa.float64()),
        ("ended_s", pa.float64()),
        ("nodes", pa.list_(pa.string())),  # these four: its nodes
        ("node_objects", pa.list_(pa.int64())),
        ("node_samples", pa.list_(pa.int64())),
        ("node_busy_s", pa.list_(pa.float64())),
    ]
)
_NODES = ("nodes", "node_objects", "node_samples", "node_busy_s")
_SCALARS = tuple(name for name in _COLUMNS.names if name not in _NODES)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """The tallies of a corpus.

    Attributes:
        tallies: by plan id, of every receipt that is there; without nodes, of which there may be one an object.
        rows: the same as a table of `_COLUMNS`, nodes and all.
        num_read: receipts whose footer was read; the others came from a summary.
    """

    tallies: Mapping[str, Tally]
    rows: pa.Table
    num_read: int

    def nodes(self, plan_ids: Iterable[str]) -> dict[str, NodeWork]:
        """Return what each node did for some shards, by name."""
        mine = self.rows.filter(pc.is_in(self.rows["plan_id"], pa.array(list(plan_ids), pa.string())))
        flat = pa.table({name: pc.list_flatten(mine[name]) for name in _NODES})
        sums = flat.group_by("nodes").aggregate([(name, "sum") for name in _NODES[1:]]).sort_by("nodes")
        columns = [sums[name].to_pylist() for name in ("nodes", *(f"{name}_sum" for name in _NODES[1:]))]
        return {
            node: NodeWork(objects=objects, samples=samples, busy_s=busy_s)
            for node, objects, samples, busy_s in zip(*columns)
        }


def count(store: Store, *, keep: bool = True) -> Counted:
    """Return the tally of every receipt of a corpus. For writers and tools: it lists.

    Args:
        keep: store a summary where it pays; one that cannot be stored is no error.

    Raises:
        DamagedDataError: if a receipt's footer is not readable.
    """
    listed = {
        item.key.removeprefix("receipts/").removesuffix(_ENDING): item
        for item in store.list("receipts/")
        if item.key.endswith(_ENDING)
    }
    known = _known(store, listed) if len(listed) >= FEW else _COLUMNS.empty_table()
    missing = sorted(listed.keys() - set(known["plan_id"].to_pylist()))

    def read(plan_id: str) -> Tally | None:
        try:
            return receipt.tally(store, plan_id, listed[plan_id].num_bytes)
        except FileNotFoundError:  # collected since it was listed
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [tally for tally in pool.map(read, missing) if tally is not None]
    fresh = pa.Table.from_pylist([_row(tally, listed[tally.plan_id]) for tally in found], schema=_COLUMNS)
    rows = pa.concat_tables([known, fresh]).sort_by("plan_id")
    if keep and len(missing) >= max(FEW, len(listed) / SHARE):
        _keep(store, rows)
    return Counted(tallies=_tallies(rows), rows=rows, num_read=len(missing))


def _stamp(item: ObjectInfo) -> tuple[int, int]:
    return item.num_bytes, round(item.modified_s * 1e6)


def _known(store: Store, listed: Mapping[str, ObjectInfo]) -> pa.Table:
    """Return what the newest readable summary says of receipts that are still as it saw them."""
    stored = [item for item in store.list(_PREFIX) if item.key.endswith(_ENDING)]
    for item in sorted(stored, key=lambda item: (item.modified_s, item.key), reverse=True)[:3]:
        try:
            data = store.get(item.key)
            if not item.key.endswith(f"-{hashlib.sha256(data).hexdigest()}{_ENDING}"):
                raise ValueError("it does not match its digest")
            rows = parquet.read(data).select(_COLUMNS.names).cast(_COLUMNS)
            stamps = zip(*(rows[name].to_pylist() for name in ("plan_id", "num_bytes", "modified_us")))
            same = [(one := listed.get(name)) is not None and _stamp(one) == (size, us) for name, size, us in stamps]
            kept = rows.filter(pa.array(same, pa.bool_()))
            _tallies(kept)  # so that what is no tally is found here
        except (StoreError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError) as error:
            _log.warning("corpus %s: %s is passed over: %s", store.url, item.key, str(error).split("\n", 1)[0])
        else:
            return kept
    return _COLUMNS.empty_table()


def _tallies(rows: pa.Table) -> dict[str, Tally]:
    """Return the tallies of a table by plan id, without their nodes."""
    out: dict[str, Tally] = {}
    for values in zip(*(rows[name].to_pylist() for name in _SCALARS)):
        row = dict(zip(_SCALARS, values))
        kinds = row["failures"]
        out[row["plan_id"]] = Tally(
            plan_id=row["plan_id"],
            fingerprint=row["fingerprint"],
            planned=row["planned"],
            samples=row["samples"],
            failures={} if kinds == "{}" else {str(kind): int(n) for kind, n in json.loads(kinds).items()},
            retryable=row["retryable"],
            shard_sha256=row["shard_sha256"],
            shard_bytes=row["shard_bytes"],
            work=Work(
                objects=row["timed"], cpu_s=row["cpu_s"], gpu_s=row["gpu_s"], begun_s=row["begun_s"],
                ended_s=row["ended_s"],
            ),
        )  # fmt: skip
    return out


def _row(tally: Tally, item: ObjectInfo) -> dict[str, Any]:
    """Return the row of a tally that was read from the receipt that is listed so."""
    num_bytes, modified_us = _stamp(item)
    work, nodes = tally.work, tally.work.nodes.values()
    return {
        "plan_id": tally.plan_id, "num_bytes": num_bytes, "modified_us": modified_us,
        "fingerprint": tally.fingerprint, "planned": tally.planned, "samples": tally.samples,
        "failures": canonical_json(dict(tally.failures)).decode(), "retryable": tally.retryable,
        "shard_sha256": tally.shard_sha256, "shard_bytes": tally.shard_bytes,
        "timed": work.objects, "cpu_s": work.cpu_s, "gpu_s": work.gpu_s, "begun_s": work.begun_s,
        "ended_s": work.ended_s, "nodes": list(work.nodes), "node_objects": [one.objects for one in nodes],
        "node_samples": [one.samples for one in nodes], "node_busy_s": [one.busy_s for one in nodes],
    }  # fmt: skip


def _keep(store: Store, rows: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(rows, sink, compression="zstd", compression_level=3)
    data = sink.getvalue()
    try:
        store.create(f"{_PREFIX}{rows.num_rows:09d}-{hashlib.sha256(data).hexdigest()}{_ENDING}", data)
    except StoreError as error:  # who may only read pays with time
        _log.info("a summary was not kept: %s", error)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outline:
    """A plan set without its assets: see `pipeline.plan.PlanSet` for the fields.

    Attributes:
        plan_ids: of each shard, in order.
        sizes: [shards] objects of each.
    """

    id: str
    name: str
    kind: str
    fingerprint: str
    spec_json: str
    plan_ids: Sequence[str]
    sizes: NDArray[np.int64]

    @property
    def num_assets(self) -> int:
        """Number of planned objects."""
        return int(self.sizes.sum())


def outlines(store: Store) -> list[Outline]:
    """Return the outline of every plan set of a corpus, by name: two of its ten columns are read. For tools."""
    found = sorted((item for item in store.list("plans/") if item.key.endswith(_ENDING)), key=lambda item: item.key)
    return [outline(store, item.key.removeprefix("plans/").removesuffix(_ENDING), item.num_bytes) for item in found]


def outline(store: Store, plan_set_id: str, num_bytes: int) -> Outline:
    """Return the outline of a plan set whose file has this length.

    Raises:
        UserError: if the plan is damaged, or was written under another schema.
    """
    where = f"corpus {store.url}: plan {plan_set_id}"
    try:
        with parquet.opened(RangedFile(store, plan_key(plan_set_id), num_bytes), checksums=True) as file:
            stored = file.schema_arrow.metadata or {}
            table = file.read(columns=["shard", "plan_id"], use_threads=False)
        told = {
            name: stored.get(name.encode(), b"").decode() for name in ("schema", "name", "fingerprint", "spec", "kind")
        }
        check_schema(told["schema"], store.url, f"plan {plan_set_id}")
        shards = table["shard"].to_numpy()
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        if not len(shards) or not (shards[starts] == np.arange(len(starts))).all():
            raise ValueError("its shards do not count up from 0")
        return Outline(
            id=plan_set_id,
            name=told["name"],
            kind=told["kind"] or "base",
            fingerprint=told["fingerprint"],
            spec_json=told["spec"],
            plan_ids=table["plan_id"].take(pa.array(starts)).to_pylist(),
            sizes=np.diff(starts, append=len(shards)),
        )
    except (UserError, StoreError):
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        text = str(error).split("\n", 1)[0]
        raise UserError(f"{where} is damaged ({text}); restore it, or render into another CORPUS") from None


class RangedFile(io.RawIOBase):
    """An object of a store as a file that is read by ranges, for readers that want a few columns of a large one."""

    def __init__(self, store: Store, key: str, num_bytes: int) -> None:
        self._store, self._key, self._size, self._at = store, key, num_bytes, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte; return its place."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with what follows; return how much there was."""
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            buffer[:length] = self._store.get_ranges(self._key, [self._at], [length])[0]
            self._at += length
        return length
