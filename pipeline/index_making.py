"""Making the index of a version (`pipeline.index`) from its manifest.

The manifest is streamed to disk, checked against its digest, and read in batches, so that making the index of a million
objects does not need their manifest in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from obstore.exceptions import BaseError, NotFoundError

from pipeline.backends import short_error
from pipeline.index import ROWS_PER_BATCH
from pipeline.shard import DamagedDataError
from pipeline.store import Store, StoreError
from pipeline.types import UserError
from pipeline.version_record import Version, manifest_key

_NEEDED = ("uid", "key", "source", "status", "heldout", "num_views", "planes", "codecs", "shard_sha256", "shard_bytes",
           "offset", "lengths", "crc32s")  # fmt: skip
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.int16()),
        ("heldout", pa.bool_()),
        ("num_views", pa.int16()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("lengths", pa.list_(pa.int32())),
        ("crc32s", pa.list_(pa.uint32())),
        ("layout", pa.int16()),
    ]
)


@dataclass(slots=True)
class _Names:
    """Numbers of values in the order they are first met."""

    numbers: dict[Any, int] = field(default_factory=dict)

    def number(self, value: Any) -> int:
        return self.numbers.setdefault(value, len(self.numbers))


def make_index(store: Store, version: Version, path: Path) -> None:
    """Make the index file of a version from its manifest.

    Raises:
        UserError: if the manifest is missing or differs from its digest.
        DamagedDataError: if the manifest contradicts itself.
        StoreError: if it cannot be read.
    """
    manifest = path.with_suffix(".parquet")
    _download(store, version, manifest)
    write_index(_batches(manifest), version.tombstones, path)


def _download(store: Store, version: Version, path: Path) -> None:
    """Stream the manifest of a version to a file, checked against its digest."""
    key, digest, count = manifest_key(version.manifest_sha256), hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            for chunk in obstore.get(store.backend, key).stream(min_chunk_size=8 * 2**20):
                digest.update(chunk)
                count += file.write(chunk)
    except (NotFoundError, FileNotFoundError):
        raise UserError(
            f"corpus {store.url}: the manifest of version {version.number} is missing; restore it"
        ) from None
    except (BaseError, OSError) as error:
        raise StoreError(f"{store.url}: reading {key} failed: {short_error(error)}") from None
    if (digest.hexdigest(), count) != (version.manifest_sha256, version.manifest_bytes):
        raise UserError(f"corpus {store.url}: the manifest of version {version.number} differs from its digest")


def _batches(manifest: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(manifest, memory_map=True, pre_buffer=False) as file:
        yield from file.iter_batches(batch_size=4096, columns=list(_NEEDED), use_threads=False)


def write_index(batches: Iterator[pa.RecordBatch], tombstones: frozenset[str], path: Path) -> None:
    """Write the index file of a manifest's rows: those of samples that are not withdrawn."""
    names = {"sources": _Names(), "shards": _Names(), "layouts": _Names()}
    waiting: list[pa.RecordBatch] = []
    count = 0
    # Arrow's metadata stands at the head of a file and the names are known at its end: rows first, then all in place.
    rows = path.with_suffix(".rows")
    with pa.OSFile(str(rows), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for batch in batches:
            kept = _numbered(batch, tombstones, names)
            waiting.append(kept)
            count += kept.num_rows
            if count >= ROWS_PER_BATCH:
                waiting, count = _flush(writer, waiting, whole=False)
        _flush(writer, waiting, whole=True)
    metadata = {name: json.dumps(list(found.numbers)) for name, found in names.items()}
    with (
        pa.memory_map(str(rows)) as source,
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA.with_metadata(metadata)) as writer,
    ):
        reader = pa.ipc.open_file(source)
        for i in range(reader.num_record_batches):
            writer.write_batch(reader.get_batch(i).replace_schema_metadata(metadata))
    rows.unlink()


def _flush(writer: Any, waiting: list[pa.RecordBatch], *, whole: bool) -> tuple[list[pa.RecordBatch], int]:
    """Write the rows that fill batches of ROWS_PER_BATCH, all of them if `whole`; return what is left."""
    table = pa.Table.from_batches(waiting, _SCHEMA).combine_chunks()
    start = 0
    while table.num_rows - start >= ROWS_PER_BATCH or (whole and start < table.num_rows):
        piece = table.slice(start, ROWS_PER_BATCH).combine_chunks()
        writer.write_batch(pa.RecordBatch.from_arrays([c.chunk(0) for c in _fresh(piece).columns], schema=_SCHEMA))
        start += piece.num_rows
    rest = _fresh(table.slice(start))
    return rest.to_batches(), rest.num_rows


def _fresh(table: pa.Table) -> pa.Table:
    """Copy a slice, so that its lists begin at 0 and nothing larger is kept alive by it."""
    return table.take(pa.array(range(table.num_rows), pa.int64())).combine_chunks()


def _numbered(batch: pa.RecordBatch, tombstones: frozenset[str], names: Mapping[str, _Names]) -> pa.RecordBatch:
    live = pc.fill_null(pc.equal(batch.column("status"), "sample"), False)
    if tombstones:
        live = pc.and_not(live, pc.is_in(batch.column("uid"), pa.array(sorted(tombstones), pa.string())))
    kept = batch.filter(live)
    try:
        arrays = {
            "source": _numbers(kept, ("source",), names["sources"]),
            "shard": _numbers(kept, ("shard_sha256", "shard_bytes"), names["shards"]),
            "layout": _numbers(kept, ("planes", "codecs"), names["layouts"]),
        }
        out = [pa.array(arrays[f.name], f.type) if f.name in arrays else kept.column(f.name).cast(f.type)
               for f in _SCHEMA]  # fmt: skip
        made = pa.RecordBatch.from_arrays(out, schema=_SCHEMA)
        _check(made, names["layouts"])
    except (TypeError, pa.ArrowException) as error:
        raise DamagedDataError(f"manifest holds a sample without a usable member index: {error}") from None
    return made


def _numbers(batch: pa.RecordBatch, columns: Sequence[str], names: _Names) -> NDArray[np.int64]:
    """Return the number of each row's value in these columns; only values that differ become Python objects.

    Raises:
        TypeError: where a value is missing.
    """
    texts = []
    for name in columns:
        column = batch.column(name)
        if column.null_count:
            raise TypeError(f"{column.null_count} of its rows have no {name}")
        texts.append(pc.binary_join(column, "\0") if pa.types.is_list(column.type) else column.cast(pa.string()))
    codes = pc.binary_join_element_wise(*texts, "\1").dictionary_encode().indices.to_numpy()
    _, firsts = np.unique(codes, return_index=True)
    numbers = np.zeros(len(firsts), np.int64)
    for row in np.sort(firsts).tolist():
        value = tuple(tuple(x) if isinstance(x, list) else x for x in (batch.column(n)[row].as_py() for n in columns))
        numbers[codes[row]] = names.number(value if len(columns) > 1 else value[0])
    return np.asarray(numbers[codes], np.int64)


def _check(batch: pa.RecordBatch, layouts: _Names) -> None:
    widths = np.array([len(planes) for planes, _ in layouts.numbers], np.int64)
    if not batch.num_rows:
        return
    wanted = 1 + batch.column("num_views").to_numpy() * widths[batch.column("layout").to_numpy()]
    for name in ("lengths", "crc32s"):
        found = np.diff(batch.column(name).offsets.to_numpy())
        if (found != wanted).any():
            row = int(np.flatnonzero(found != wanted)[0])
            raise DamagedDataError(
                f"manifest: sample {batch.column('key')[row].as_py()} has {found[row]} {name}; its views need "
                f"{wanted[row]}"
            )
