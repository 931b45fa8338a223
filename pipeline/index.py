"""The index of a version: what a reader needs of every sample, in one memory-mapped Arrow file a node.

A manifest holds all that is known of an object (licences, quality, provenance); a reader needs where its bytes lie and
how to check them, about 330 bytes of a sample of 32 views. Those columns are copied once a node into

    <cache>/index/<version digest>-<layout>.arrow     Arrow IPC, record batches of ROWS_PER_BATCH rows

    column       key    source  heldout  num_views  shard  offset  lengths      crc32s        layout
    type         str    int16   bool     int16      int32  int64   list<int32>  list<uint32>  int16
    metadata     source names, (sha256, bytes) of shards, (planes, codecs) of layouts, as JSON

and mapped by every process that reads the version: ranks and workers share its pages, none holds a table of its own;
lengths and checksums are read from it as they are needed.
Rows keep the manifest's order, so a row number means the same everywhere. The file is made beside its name and renamed;
a reader that finds it there uses it, else `pipeline.index_making` makes it.

Road not taken: shared memory segments. They have names that outlive crashed processes, and no page cache behind them.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.shard import MemberIndex, member_name, shard_key
from pipeline.store import Store
from pipeline.types import UserError
from pipeline.version_record import Version

ROWS_PER_BATCH = 1 << 15
LAYOUT = 1
KEEP_S = 30 * 86400.0


def default_cache_dir() -> Path:
    """Return the folder of what a node keeps between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lrm-corpus"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One member of a sample in its shard: what to ask for, and what must come back. `position` 0 is the JSON."""

    position: int
    start: int
    length: int
    crc32: int


def _values(column: Any, kind: type[np.integer[Any]]) -> NDArray[Any]:
    """Return the numbers of a column without nulls, uncopied.

    Arrow's own `to_numpy` imports pandas where there is one: 0.25 s and 40 MB in every process that opens a version.
    """
    start = column.offset * np.dtype(kind).itemsize
    return np.frombuffer(column.buffers()[1], kind, len(column), start)


def _flags(column: Any) -> NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(column.buffers()[1], np.uint8), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(bool)


@dataclass(frozen=True, slots=True)
class _Lists:
    """The lists of numbers of one record batch: offsets [n + 1] mapped, values read from the file where they are
    needed.

    Lengths and checksums are nine tenths of an index. Mapped, an epoch in random order would leave all of them resident
    in every process; read, they stay in the page cache, once a node, for 2 us a list.
    """

    offsets: NDArray[np.int32]
    start: int
    kind: type[np.integer[Any]]

    @classmethod
    def of(cls, column: Any, base: int, kind: type[np.integer[Any]]) -> _Lists:
        """Find the values of a list column in the file that is mapped at `base`."""
        return cls(_values(column.offsets, np.int32), column.buffers()[3].address - base, kind)

    def read(self, descriptor: int, place: int) -> tuple[int, ...]:
        """Return the list at a place."""
        begin, end = self.offsets[place : place + 2].tolist()
        data = os.pread(descriptor, 4 * (end - begin), self.start + 4 * begin)
        return tuple(np.frombuffer(data, self.kind).tolist())


class SampleIndex:
    """The samples of a version by row. Numpy views of a mapped file: cheap to open, shared between processes.

    Attributes:
        sources: names of sources.
        shards: (sha256, bytes) of every shard.
        source: [n] int16, index into `sources`.
        heldout: [n] bool.
        num_views: [n] int16.
        shard: [n] int32, index into `shards`.
    """

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as source:
            base = source.read_buffer(8).address
            table = pa.ipc.open_file(source).read_all()
        self._file = path.open("rb", buffering=0)
        metadata = {name.decode(): value for name, value in (table.schema.metadata or {}).items()}
        self.sources: tuple[str, ...] = tuple(json.loads(metadata["sources"]))
        self.shards: list[tuple[str, int]] = [(sha256, size) for sha256, size in json.loads(metadata["shards"])]
        self._layouts = [(tuple(planes), tuple(codecs)) for planes, codecs in json.loads(metadata["layouts"])]
        self._batches = table.to_batches()
        self.source = self._column("source", np.int16)
        self.num_views = self._column("num_views", np.int16)
        self.shard = self._column("shard", np.int32)
        self._layout = self._column("layout", np.int16)
        flags = [_flags(batch.column("heldout")) for batch in self._batches]
        self.heldout: NDArray[np.bool_] = np.concatenate(flags) if flags else np.zeros(0, bool)
        self._offsets = [_values(batch.column("offset"), np.int64) for batch in self._batches]
        self._lengths = [_Lists.of(batch.column("lengths"), base, np.int32) for batch in self._batches]
        self._crc32s = [_Lists.of(batch.column("crc32s"), base, np.uint32) for batch in self._batches]

    def _column(self, name: str, kind: type[np.integer[Any]]) -> NDArray[Any]:
        parts = [_values(batch.column(name), kind) for batch in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, kind)

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        batch, place = divmod(row, ROWS_PER_BATCH)
        return str(self._batches[batch].column("key")[place].as_py())

    def shard_key(self, row: int) -> str:
        """Return the key of the shard that holds a sample."""
        return shard_key(self.shards[self.shard[row]][0])

    def member_index(self, row: int) -> MemberIndex:
        """Return where the members of a sample lie."""
        batch, place = divmod(row, ROWS_PER_BATCH)
        planes, codecs = self._layouts[self._layout[row]]
        return MemberIndex(
            planes=planes,
            codecs=codecs,
            num_views=int(self.num_views[row]),
            offset=int(self._offsets[batch][place]),
            lengths=self._lengths[batch].read(self._file.fileno(), place),
            crc32s=self._crc32s[batch].read(self._file.fileno(), place),
        )

    def parts(self, row: int, views: Sequence[int], planes: Sequence[str] = ("rgba",)) -> list[Part]:
        """Return the JSON of a sample, then the planes of these views in the order asked for."""
        entry = self.member_index(row)
        try:
            places = [0, *(entry.position(view, plane) for view in views for plane in planes)]
        except (IndexError, ValueError):
            raise UserError(
                f"sample {self.key(row)}: views {list(views)} with planes {list(planes)} are asked for; it has views "
                f"0 to {entry.num_views - 1} with planes {list(entry.planes)}"
            ) from None
        starts = entry.offsets
        return [Part(position=p, start=starts[p], length=entry.lengths[p], crc32=entry.crc32s[p]) for p in places]

    def part_name(self, row: int, part: Part) -> str:
        """Return the name of a member in its shard. Keys serve to name damage alone: their pages stay untouched."""
        return member_name(self.key(row), part.position, self.member_index(row))

    def num_bytes(self, row: int, views: Sequence[int], planes: Sequence[str] = ("rgba",)) -> int:
        """Return the bytes that `parts` would ask for."""
        return sum(part.length for part in self.parts(row, views, planes))


def open_index(store: Store, version: Version, cache_dir: Path | None = None) -> SampleIndex:
    """Map the index of a version, making it first if this node has none.

    Args:
        cache_dir: folder for it; default the node's cache.

    Raises:
        UserError: if the manifest is missing or differs from its digest.
        DamagedDataError: if the manifest contradicts itself.
    """
    folder = (cache_dir or default_cache_dir()) / "index"
    path = folder / f"{version.digest[:40]}-{LAYOUT}.arrow"
    if not path.exists():
        from pipeline.index_making import make_index  # Parquet, Arrow's functions: most nodes have an index

        folder.mkdir(parents=True, exist_ok=True)
        _forget_old(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as scratch:
            made = Path(scratch) / path.name
            make_index(store, version, made)
            made.replace(path)
    with contextlib.suppress(OSError):
        os.utime(path)
    return SampleIndex(path)


def _forget_old(folder: Path) -> None:
    """Remove indexes that no reader opened for KEEP_S; those that are mapped stay readable all the same."""
    for old in folder.glob("*.arrow"):
        with contextlib.suppress(FileNotFoundError):
            if old.stat().st_mtime < time.time() - KEEP_S:
                old.unlink()
