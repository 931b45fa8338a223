"""Manifests: the rows of many receipts, merged by a pure function into one content-addressed Parquet file.

Under one fingerprint a sample beats a failure, and two different samples of one uid are an error, never a choice. Two
copies of one sample (a compaction's) are no difference: the younger copy is named.

A version obeys the admission rules of the spec that it records. So the rules on licences, sizes and pictures are judged
again here, by what the rows hold, and duplicates, which no renderer can know of, are decided here. What is refused is
withdrawn: its row becomes a failure that keeps the quality record and points to no shard. The bytes stay in the shard,
which is content-addressed and shared with other versions; readers that go by rows never see them. Stricter rules and
another duplicate distance thus cost a new version and no rendering.

The figures of single views (`quality.views`, three quarters of a record) are judged here and left in the receipts and
in the shards' JSON: a manifest of a million objects would have 4 GB of them. What is left is merged as columns:
receipts are read and judged in batches, by processes where there are many, then sorted one column at a time, so that
one column at most is held twice: 1.6 KB an object. `make bench-corpus` measures it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import SCHEMA
from pipeline.admission import licence_admits
from pipeline.listing import Listing
from pipeline.phash import find_duplicates, hash_words, is_hash
from pipeline.plan import PlanSet
from pipeline.quality import Refusal, judge
from pipeline.receipt import ROWS, VOLATILE, Receipt, load
from pipeline.spec import AdmissionSpec, DatasetSpec
from pipeline.store import Store, StoreError
from pipeline.types import FailureKind, UserError
from pipeline.version_record import manifest_key

STABLE = pa.schema([field for field in ROWS if field.name not in VOLATILE] + [pa.field("heldout", pa.bool_())])
READ_THREADS = 16
COMPACT_RANK = 1_000_000
"""Rows of a compaction stand in front of those of any delta: they point to the copy that is to be read."""

WHOLE_FORMATS = frozenset({"glb", "stl", "ply", "usdz", "capture"})
"""Formats whose main file is the whole object: equal files are equal objects. An OBJ or glTF names side files, and its
digest does not cover them. The digest of a capture covers all that was read of it (`pipeline.members`)."""

_POINTERS = ("num_views", "planes", "codecs", "shard_sha256", "shard_bytes", "offset", "lengths", "crc32s")
_BATCH = 64
_MANY_RECEIPTS = 1024
"""From so many receipts on, processes that take a second to start pay."""
_ROWS_PER_GROUP = 65_536
_GROUPS_AT_ONCE = 1024
"""Objects with several rows that become Python objects at a time."""

_EXTRA = (
    pa.field("rank", pa.int32()),
    pa.field("refused_kind", pa.string()),
    pa.field("refused_message", pa.string()),
)
# 32-bit offsets end at 2 GiB of text in a column, and sorting joins its chunks.
_MERGED = pa.schema(
    [field.with_type(pa.large_string()) if field.name == "quality" else field for field in STABLE] + list(_EXTRA)
)
_LIST = re.compile(r'"(alpha_coverage|black)":(\[[^\]]*\])')


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """The rows of a version to be, one an object: sorted by source and uid, judged by the spec.

    Attributes:
        table: columns of `STABLE`.
        num_receipts: receipts that were read.
        fingerprints: of the rows, sorted.
    """

    table: pa.Table
    num_receipts: int
    fingerprints: tuple[str, ...]


class ContradictionError(UserError):
    """Two rows of one object cannot both be true."""

    def __init__(self, row: Mapping[str, Any], how: str) -> None:
        super().__init__(f"asset {row['uid']!r} of source {row['source']} {how}")
        self.source, self.uid = str(row["source"]), str(row["uid"])


def load_receipts(store: Store, plan_ids: Sequence[str]) -> list[Receipt]:
    """Read the receipts of these plans that exist, in the order given."""

    def one(plan_id: str) -> Receipt | None:
        try:
            return load(store, plan_id)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return [receipt for receipt in pool.map(one, plan_ids) if receipt is not None]


def receipt_sizes(store: Store) -> dict[str, int]:
    """Return the length of every receipt of a corpus by plan id: one listing. For writers and tools."""
    ending = ".parquet"
    return {
        item.key.removeprefix("receipts/").removesuffix(ending): item.num_bytes
        for item in store.list("receipts/")
        if item.key.endswith(ending)
    }


def rank_of(plan: PlanSet) -> int:
    """Return which of several rows of an object stands first: the highest; see `merge`."""
    return plan.number + (COMPACT_RANK if plan.kind == "compact" else 0)


def merge_plans(store: Store, plans: Sequence[PlanSet], spec: DatasetSpec, listing: Listing | None = None) -> Merged:
    """Read every receipt of these plans and merge their rows.

    Args:
        listing: the objects that are wanted; rows of others, and of other bytes, are left out, and the licence and the
            credit line are those that the source states now. Default: whatever the receipts hold.

    Raises:
        UserError: as `settle`.
        DamagedDataError: if a receipt is damaged.
    """
    ranks: dict[str, int] = {}
    for plan in plans:
        for plan_id in plan.plan_ids:
            ranks[plan_id] = max(rank_of(plan), ranks.get(plan_id, 0))
    present = receipt_sizes(store)
    work = [(plan_id, rank) for plan_id, rank in ranks.items() if plan_id in present]  # mostly sorted by uid already
    if not work:
        return Merged(table=STABLE.empty_table(), num_receipts=0, fingerprints=())
    batches = [work[i : i + _BATCH] for i in range(0, len(work), _BATCH)]
    pa.default_memory_pool().release_unused()  # what reading the plans took
    with _pool(store, len(work)) as pool:
        read = pool.map(_read_batch, *zip(*((store, batch, spec) for batch in batches)))
        tables = [_opened(data) for data in read]
    if listing is not None:
        listing.restrict(tables)
    try:
        table = settle(tables, spec)
    except ContradictionError as error:
        mine = [pc.and_(pc.equal(p.table["uid"], error.uid), pc.equal(p.table["source"], error.source)) for p in plans]
        names = [p.id for p, mask in zip(plans, mine) if p.kind != "compact" and pc.any(mask).as_py()]
        raise UserError(f"{error}; it stands in the plans {', '.join(names)}") from None
    prints = tuple(sorted(pc.unique(table["fingerprint"]).to_pylist()))
    return Merged(table=table, num_receipts=len(work), fingerprints=prints)


@contextmanager
def _pool(store: Store, num_receipts: int) -> Iterator[Executor]:
    """Yield what reads batches: processes where it pays (judging records is Python), threads elsewhere."""
    workers = min(16, os.cpu_count() or 1)
    if num_receipts < _MANY_RECEIPTS or workers == 1 or store.url.startswith("memory:"):
        with ThreadPoolExecutor(READ_THREADS) as threads:
            yield threads
        return
    # A fork would copy the threads' locks of the store's client.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as processes:
        yield processes


def _read_batch(store: Store, work: Sequence[tuple[str, int]], spec: DatasetSpec) -> bytes:
    """Return the judged rows of some receipts as one Arrow stream, compressed."""
    table = pa.concat_tables([prepare(load(store, plan_id).rows, spec, rank) for plan_id, rank in work])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _MERGED, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table.combine_chunks())
    return bytes(sink.getvalue())


def _opened(data: bytes) -> pa.Table:
    """Return the table of a stream: unpacked column by column into memory that is freed the same way.

    Pickled tables would lie in the heap in pieces of many sizes, which never gives them back: 1 GB of a million.
    """
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


def merge(receipts: Sequence[Receipt], spec: DatasetSpec) -> pa.Table:
    """Merge receipts into one table of the stable columns, sorted by source and uid: a pure function.

    One row an object of the receipts, so that samples + failures are what was planned, whatever the rules of
    `spec.admission` withdraw.

    Raises:
        UserError: if a uid has two different samples, or rows under two fingerprints.
    """
    return settle([prepare(receipt.rows, spec) for receipt in receipts], spec)


def prepare(rows: pa.Table, spec: DatasetSpec, rank: int = 0) -> pa.Table:
    """Return the stable columns of a receipt's rows with what the rules on pictures say of each.

    Columns `refused_kind` and `refused_message` are set where a rule refuses; `quality` loses `views`.
    """
    kinds, messages, records = list[str | None](), list[str | None](), list[str | None]()
    for status, text in zip(rows["status"].to_pylist(), rows["quality"].to_pylist()):
        head, record = _split_record(text) if text else (text, {})
        refusal = judge(record, spec.admission) or _too_many(record, spec.admission) if status == "sample" else None
        kinds.append(refusal.kind.value if refusal else None)
        messages.append(refusal.message if refusal else None)
        records.append(head)
    columns = {name: rows[name] for name in STABLE.names if name not in ("heldout", "quality")} | {
        "quality": pa.array(records, pa.large_string()),
        "heldout": pa.array([spec.is_heldout(uid) for uid in rows["uid"].to_pylist()], pa.bool_()),
        "rank": pa.array(np.full(rows.num_rows, rank, np.int32)),
        "refused_kind": pa.array(kinds, pa.string()),
        "refused_message": pa.array(messages, pa.string()),
    }
    return pa.table({name: columns[name] for name in _MERGED.names}, schema=_MERGED)


def _split_record(text: str) -> tuple[str, dict[str, Any]]:
    """Return the text of a quality record without `views`, and of the record what `judge` looks at.

    Records are canonical JSON, in which `views` comes last and holds lists of numbers: cutting the text there and
    reading two of the lists spares most of the parsing. Any other text is read in full.
    """
    start = text.find(',"views":{')
    if start > 0 and text.find("}", start) == len(text) - 2:
        head = text[:start] + "}"
        try:
            record = json.loads(head)
            lists = {name: json.loads(values) for name, values in _LIST.findall(text, start)}
        except ValueError:
            pass
        else:
            return head, record | {"views": lists}
    record = json.loads(text)
    if not isinstance(record, dict):
        return text, {}
    slim = {name: value for name, value in record.items() if name != "views"}
    return (text if len(slim) == len(record) else json.dumps(slim, sort_keys=True, separators=(",", ":"))), record


def _too_many(record: Mapping[str, Any], rules: AdmissionSpec) -> Refusal | None:
    found = max((record.get(name) or 0 for name in ("num_triangles", "num_triangles_file")), default=0)
    if not isinstance(found, int) or found <= rules.max_triangles:
        return None
    message = f"{found} triangles; at most {rules.max_triangles} are allowed (admission.max_triangles)"
    return Refusal(FailureKind.TOO_LARGE, message)


def settle(tables: list[pa.Table], spec: DatasetSpec) -> pa.Table:
    """Keep one row an object of prepared tables, sorted by source and uid, and withdraw what the spec does not admit.

    Args:
        tables: emptied, so that a column is freed once it is sorted.

    Raises:
        UserError: if a uid has two different samples, or rows under two fingerprints.
    """
    table = pa.concat_tables(tables)
    tables.clear()
    keys = ["source", "uid", "status", "rank", "shard_sha256", "offset"]
    # "sample" sorts above "failure" in descending order
    how = ["ascending", "ascending", "descending", "descending", "ascending", "ascending"]
    order = pc.sort_indices(table.select(keys), sort_keys=list(zip(keys, how)))
    narrow = table.select(["source", "uid"]).take(order)
    again = np.zeros(table.num_rows, bool)
    if table.num_rows > 1:
        same = [pc.equal(narrow[name][1:], narrow[name][:-1]) for name in ("source", "uid")]
        again[1:] = pc.and_(*same).to_numpy()
    del narrow
    if again.any():
        order = order.take(pa.array(_choose(table, order, again)))
    columns = dict(zip(table.column_names, table.columns))
    del table
    rows = order.to_numpy().astype(np.int64)
    return admit(pa.table({name: _gather(columns.pop(name), rows) for name in list(columns)}), spec)


def _gather(column: pa.ChunkedArray, rows: NDArray[np.int64]) -> pa.ChunkedArray:
    """Return the values of these rows, piece by piece; chunks that are no longer needed are let go on the way.

    Rows are nearly in order, as plans are, so a column is hardly held twice. `take` would hold it three times.
    """
    chunks, kind = list(column.chunks), column.type
    del column
    starts = np.cumsum([0, *map(len, chunks)])
    where = np.searchsorted(starts, rows, side="right") - 1
    last = np.full(len(chunks), -1)
    last[where] = np.arange(len(rows)) // _ROWS_PER_GROUP  # of several values for one place numpy keeps the last
    pieces = []
    for i in range(-(-len(rows) // _ROWS_PER_GROUP)):
        part = slice(i * _ROWS_PER_GROUP, (i + 1) * _ROWS_PER_GROUP)
        by_chunk = np.argsort(where[part], kind="stable")
        used, begins = np.unique(where[part][by_chunk], return_index=True)
        groups = np.split(rows[part][by_chunk], begins[1:])
        piece = pa.concat_arrays([chunks[k].take(pa.array(group - starts[k])) for k, group in zip(used, groups)])
        back = np.argsort(by_chunk)
        pieces.append(piece if (np.diff(back) > 0).all() else piece.take(pa.array(back)))
        for k in np.flatnonzero(last <= i):
            chunks[k] = None
        pa.default_memory_pool().release_unused()
    return pa.chunked_array(pieces, kind)


def _choose(table: pa.Table, order: pa.Array, again: Any) -> Any:
    """Return which places of `order` stay, where `again` marks rows of the same object as the row before."""
    keep = ~again
    firsts = np.flatnonzero(keep)
    counts = np.diff(np.append(firsts, len(again)))
    rows_of = order.to_numpy().astype(np.int64)
    names = ["uid", "source", "status", "fingerprint", "rank", "asset_sha256", "lengths", "crc32s"]
    groups = np.flatnonzero(counts > 1)
    for begin in range(0, len(groups), _GROUPS_AT_ONCE):
        some = groups[begin : begin + _GROUPS_AT_ONCE]
        places = np.concatenate([np.arange(firsts[i], firsts[i] + counts[i]) for i in some])
        found = pa.table({name: _gather(table[name], rows_of[places]) for name in names}).to_pylist()
        for i in some.tolist():
            rows, found = found[: counts[i]], found[counts[i] :]
            keep[firsts[i]], keep[firsts[i] + _first_of(rows)] = False, True
    return np.flatnonzero(keep)


def _first_of(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the row that counts of one object's, samples and young rows first.

    Raises:
        ContradictionError: if they contradict each other.
    """
    if len({row["fingerprint"] for row in rows}) > 1:
        raise ContradictionError(
            rows[0],
            "was rendered under two fingerprints, by two specs or releases; "
            "name the spec to publish with SPEC= (and the SET= that it was rendered with)",
        )
    samples = [row for row in rows if row["status"] == "sample"]
    if len(samples) < 2:
        return 0
    # A file that changed was rendered again by a later delta; copies of a compaction do not tell the order.
    made = [row for row in samples if row["rank"] < COMPACT_RANK] or samples
    newest = [row["asset_sha256"] for row in made if row["rank"] == made[0]["rank"]]
    chosen = [i for i, row in enumerate(samples) if row["asset_sha256"] == newest[0]]
    contents = {(tuple(samples[i]["lengths"]), tuple(samples[i]["crc32s"])) for i in chosen}
    if len(contents) > 1 or len(set(newest)) > 1:
        raise ContradictionError(
            rows[0], "has two different samples under one fingerprint; name the spec to publish with SPEC="
        )
    return chosen[0]


def admit(table: pa.Table, spec: DatasetSpec) -> pa.Table:
    """Withdraw the samples that the spec's rules refuse, then the duplicates among the others.

    Args:
        table: one row an object; with the columns of `prepare`, or those of `STABLE` alone.
    """
    rules, refused = spec.admission, dict[int, Refusal]()
    live = pc.equal(table["status"], "sample").to_numpy(zero_copy_only=False)
    for row, refusal in _judged(table, rules):
        if live[row]:
            refused.setdefault(row, refusal)
    if rules.duplicate_distance is not None:
        live[list(refused)] = False
        rows = [int(row) for row in np.flatnonzero(live)]
        refused |= _duplicates(table, rows, _hashes(table, rows), rules.duplicate_distance)
    table = table.select(STABLE.names)
    return withdraw(table, refused) if refused else table


def _judged(table: pa.Table, rules: AdmissionSpec) -> Iterator[tuple[int, Refusal]]:
    """Yield (row, refusal) by licence, then by size, then by what `prepare` found."""
    reasons = {text: licence_admits(rules.licenses, text) for text in pc.unique(table["license"]).to_pylist()}
    refused = [text for text, reason in reasons.items() if reason is not None]
    if refused:
        for row in _places(pc.is_in(table["license"], pa.array(refused, pa.string()))):
            yield row, Refusal(FailureKind.LICENCE_EXCLUDED, str(reasons[table["license"][row].as_py()]))
    for row in _places(pc.greater(table["asset_bytes"], rules.max_asset_bytes)):
        found = table["asset_bytes"][row].as_py()
        message = f"{found} bytes; at most {rules.max_asset_bytes} are allowed (admission.max_asset_bytes)"
        yield row, Refusal(FailureKind.TOO_LARGE, message)
    if "refused_kind" in table.column_names:
        for row in _places(pc.is_valid(table["refused_kind"])):
            kind, message = table["refused_kind"][row].as_py(), table["refused_message"][row].as_py()
            yield row, Refusal(FailureKind(kind), message)


def _places(mask: Any) -> list[int]:
    return [int(i) for i in np.flatnonzero(pc.fill_null(mask, False).to_numpy(zero_copy_only=False))]


def _hashes(table: pa.Table, rows: Sequence[int]) -> list[str | None]:
    found = pc.extract_regex(table["quality"].cast(pa.large_string()), r'"phash":"(?P<hash>[0-9a-f]{64})"')
    texts = pc.struct_field(found, "hash").take(pa.array(rows, pa.int64())).to_pylist()
    return [text if is_hash(text) else None for text in texts]


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


def withdraw(table: pa.Table, refused: Mapping[int, Refusal]) -> pa.Table:
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


def _write_rows(table: pa.Table, path: Path) -> None:
    schema = STABLE.with_metadata({"schema": str(SCHEMA)})
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, max(1, table.num_rows), _ROWS_PER_GROUP):
            part = table.slice(start, _ROWS_PER_GROUP).cast(STABLE).replace_schema_metadata(schema.metadata)
            writer.write_table(part)


def write_manifest(store: Store, table: pa.Table) -> tuple[str, int]:
    """Store the file of a manifest under its digest; return digest and length.

    Raises:
        UserError: if other bytes stand there.
        StoreError: if it cannot be stored, or first be written to the folder for temporary files.
    """
    handle, name = tempfile.mkstemp(prefix="lrm-manifest-", suffix=".parquet")
    os.close(handle)
    path = Path(name)
    try:
        try:
            _write_rows(table, path)
        except OSError as error:
            raise StoreError(f"manifest: {path} cannot be written: {error}; set TMPDIR to a larger folder") from None
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        num_bytes, key = path.stat().st_size, manifest_key(sha256)
        if store.size(key) is None:
            store.create_blob(key, path, num_bytes)
        if store.sha256(key) != (sha256, num_bytes):
            raise UserError(
                f"corpus {store.url}: {key} is damaged: it holds other bytes than this version's; "
                "move it away and publish again"
            )
        return sha256, num_bytes
    finally:
        path.unlink(missing_ok=True)
