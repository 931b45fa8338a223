"""The reading side: a version's rows, and ranged, checked reads of single views. No torch, no listing.

One sample of 32 views at 512^2 is 1 to 5 MB; a training step needs 4 views and the cameras. `read_views` asks for the
JSON and just these planes, joins near ranges, and checks every length and crc32. `request`, `fetch` and `collect` are
its parts, for callers that read ahead: bytes arrive by themselves, and are checked and parsed where they are used.

Two views of the rows: `index` (`pipeline.index`) is what reading needs, mapped and shared; `rows` is the whole table,
loaded when it is first asked for, for reports and tools. What only these need is imported there: opening a version to
read it loads none of the code that makes one, 0.14 s in every rank and worker.

A reader may be used from any number of threads. It pickles as its URL, number and cache. A process that was forked
while the parent had a remote store open must not go on with it (the store's client has threads that a fork does not
copy): such use is refused by name rather than left to hang.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.index import Part, SampleIndex, open_index
from pipeline.sample import SampleError, SampleHeader, parse_camera, parse_sample_json
from pipeline.shard import DamagedDataError, check_part
from pipeline.shard_cache import CachedReads, ShardCache
from pipeline.shard_reads import Buffer, FolderReads, ReadStats, RemoteReads, ShardReads, ShardRef
from pipeline.store import Store, open_store
from pipeline.types import Camera, UserError
from pipeline.version_record import Version, open_version

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["CacheSettings", "DamagedDataError", "Request", "VersionReader", "ViewsRead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """A node-local cache of whole shards: its folder, its limit, and how many shards a process works on at a time."""

    folder: Path
    max_bytes: int
    open_shards: int = 32


_HEAVY = ("quality", "message", "failure_kind", "retryable")
"""Columns of failures, and the bulkiest one: a million quality records have 0.8 GB, and a training run reads none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """What is to be read of a sample: its JSON and planes of some views."""

    row: int
    views: tuple[int, ...]
    planes: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.length for part in self.parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class ViewsRead:
    """Some views of a sample. `cameras` and `planes` follow the order asked for.

    Attributes:
        key: key of the sample.
        source: name of the source that listed it.
        cameras: of the views asked for.
        planes: encoded planes by name, of the views asked for.
        num_bytes: bytes of the JSON and the planes.
        json_bytes: the sample's JSON as it is stored.
    """

    key: str
    source: str
    cameras: tuple[Camera, ...]
    planes: list[dict[str, Buffer]]
    num_bytes: int
    json_bytes: bytes

    @cached_property
    def header(self) -> SampleHeader:
        """The whole JSON, parsed: the cameras of all views, and the rest of the metadata."""
        return parse_sample_json(self.json_bytes)


class VersionReader:
    """Reads one version of a corpus.

    Attributes:
        users: loaders that read by it now; the last of them to close closes it.
    """

    def __init__(self, store: Store, version: Version, cache: CacheSettings | None = None) -> None:
        self.store = store
        self.version = version
        self.cache = cache
        self._pid = os.getpid()
        self._reads: tuple[int, ShardReads] | None = None
        self._opening = threading.Lock()
        self.users: weakref.WeakSet[object] = weakref.WeakSet()

    @classmethod
    def open(cls, corpus: str, version: int | None = None, cache: CacheSettings | None = None) -> VersionReader:
        """Open a version of a corpus by URL or folder; None takes the newest.

        Raises:
            UserError: in one line, if the corpus or the version is not there.
        """
        store = open_store(corpus, must_exist=True)
        return cls(store, open_version(store, version), cache)

    def __reduce__(self) -> tuple[object, ...]:
        return VersionReader.open, (self.store.url, self.version.number, self.cache)

    def _live(self, columns: Sequence[str]) -> pa.Table:
        import pyarrow as pa
        import pyarrow.compute as pc

        from pipeline.version import open_rows

        rows = open_rows(self.store, self.version, list(dict.fromkeys((*columns, "status", "uid"))))
        live = pc.equal(rows["status"], "sample")
        if self.version.tombstones:
            live = pc.and_not(live, pc.is_in(rows["uid"], pa.array(sorted(self.version.tombstones))))
        if not pc.all(live).as_py():
            rows = rows.filter(live)
        return rows.select(columns).combine_chunks()

    @cached_property
    def rows(self) -> pa.Table:
        """One row a sample (failures and tombstones left out), sorted by source and uid, in memory; no `quality`."""
        from pipeline.manifest import STABLE

        return self._live(tuple(name for name in STABLE.names if name not in _HEAVY))

    def quality(self) -> list[dict[str, Any]]:
        """Return the quality record of each row, without the figures of single views; reads the manifest again."""
        from pipeline.receipt import quality_of

        return [quality_of(row) for row in self._live(("quality",)).to_pylist()]

    @property
    def num_failures(self) -> int:
        """Planned objects of the version that have no sample."""
        return int(self.version.counts["planned"]) - int(self.version.counts["samples"])

    @cached_property
    def index(self) -> SampleIndex:
        """What reading needs of every sample, by the same row numbers as `rows`."""
        return open_index(self.store, self.version)

    @property
    def number(self) -> int:
        """Number of the version."""
        return self.version.number

    @property
    def digest(self) -> str:
        """Digest of all that the version holds."""
        return self.version.digest

    @property
    def reads(self) -> ShardReads:
        """How bytes are got; its threads begin with its first use in a process."""
        reads = self._reads
        if reads is None or reads[0] != os.getpid():
            with self._opening:
                reads = self._reads
                if reads is None or reads[0] != os.getpid():
                    reads = self._reads = (os.getpid(), self._open_reads())
        return reads[1]

    def _open_reads(self) -> ShardReads:
        local = self.store.local_root is not None
        if os.getpid() != self._pid and (self.cache is not None or not local):
            raise UserError(
                f"corpus {self.store.url}: this process was forked from one that has the store open; start workers "
                'with multiprocessing_context="spawn" or "forkserver"'
            )
        beyond: ShardReads = FolderReads(self.store) if local else RemoteReads(self.store)
        if self.cache is None:
            return beyond
        cache = ShardCache(self.cache.folder, self.cache.max_bytes)
        return CachedReads(self.store, cache, beyond, self.cache.open_shards)

    @property
    def stats(self) -> ReadStats:
        """What this process has read."""
        return self.reads.stats

    def __len__(self) -> int:
        return len(self.index)

    def shard(self, number: int) -> ShardRef:
        """Return a shard by its number in the index."""
        return ShardRef(*self.index.shards[number])

    def request(self, row: int, views: Sequence[int], planes: Sequence[str] = ("rgba",)) -> Request:
        """Look up what the JSON of a sample and planes of some of its views are: no bytes are read yet.

        Raises:
            UserError: if the sample has no such view or plane.
        """
        parts = self.index.parts(row, views, planes)
        return Request(row=row, views=tuple(views), planes=tuple(planes), parts=tuple(parts))

    def fetch(self, request: Request) -> Future[list[Buffer]]:
        """Begin to read; `collect` checks what comes."""
        shard = self.shard(int(self.index.shard[request.row]))
        return self.reads.submit(shard, [p.start for p in request.parts], [p.length for p in request.parts])

    def collect(self, request: Request, future: Future[list[Buffer]]) -> ViewsRead:
        """Wait for what `fetch` brings, check and parse it.

        What was not written so is read once more, from the store itself: the node's disk or a connection may have
        spoilt it.

        Raises:
            CancelledError: if the reader was closed meanwhile, and there is something left to read.
            DamagedDataError: if it is not what was written, naming shard and sample.
            StoreError, FileNotFoundError: if it cannot be read at all.
        """
        try:
            return self._unpack(request, future)
        except DamagedDataError:
            if self._reads is None:
                raise CancelledError from None
            shard = self.shard(int(self.index.shard[request.row]))
            starts, lengths = [p.start for p in request.parts], [p.length for p in request.parts]
            return self._unpack(request, self.reads.submit_again(shard, starts, lengths))

    def _unpack(self, request: Request, future: Future[list[Buffer]]) -> ViewsRead:
        """Wait for what is read, check and parse it.

        Raises:
            DamagedDataError: if it is not what was written, naming shard and sample.
        """
        index, row = self.index, request.row
        try:
            data = future.result()
        except DamagedDataError as error:
            raise DamagedDataError(f"sample {index.key(row)}: {error}") from None
        for part, got in zip(request.parts, data):
            if len(got) != part.length or zlib.crc32(got) != part.crc32:
                check_part(got, part.length, part.crc32, index.shard_key(row), index.part_name(row, part))
        text, width = bytes(data[0]), len(request.planes)
        try:
            key, source, cameras = _cameras(text, request.views)
        except (SampleError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DamagedDataError(f"{index.shard_key(row)}: sample {index.key(row)}: {error}") from None
        starts = range(1, len(data), width)
        return ViewsRead(
            key=key,
            source=source,
            cameras=cameras,
            planes=[dict(zip(request.planes, data[start : start + width])) for start in starts],
            num_bytes=request.num_bytes,
            json_bytes=text,
        )

    def read_views(self, row: int, views: Sequence[int], planes: Sequence[str] = ("rgba",)) -> ViewsRead:
        """Read the cameras of a sample and the planes of some of its views.

        Args:
            row: row of `rows`.
            views: view indexes, in the order wanted.
            planes: plane names.

        Raises:
            DamagedDataError: if what is read is not what was written, naming shard and sample.
            StoreError, FileNotFoundError: if it cannot be read at all.
        """
        request = self.request(row, views, planes)
        return self.collect(request, self.fetch(request))

    def close(self) -> None:
        """End the threads that read and let go of cached shards; the next read begins them anew."""
        if self._reads is not None and self._reads[0] == os.getpid():
            self._reads[1].close()
        self._reads = None


def _cameras(text: bytes, views: Sequence[int]) -> tuple[str, str, tuple[Camera, ...]]:
    """Parse key, source and cameras of some views from a sample's JSON, whose crc32 was checked.

    `parse_sample_json` checks every field of 32 views, 2 ms; here only what is used is built.
    """
    meta: Mapping[str, Any] = json.loads(text)
    return str(meta["key"]), str(meta["source"]), tuple(parse_camera(meta["views"][view]) for view in views)
