"""Canonical tars: the same samples give the same bytes.

A shard is a plain POSIX (ustar) tar. Every member has mtime, uid and gid 0, no user or group name, and mode 0644:

    offset 0      header of {key}.json (512 bytes)
    offset 512    the JSON, padded with zeros to a multiple of 512
    ...           header and bytes of {key}.000.rgba.webp, and so on, sample after sample
    end           two zero blocks, padded to 10240 bytes

The index of a sample (offset, length and crc32 of each member) is made while writing and lives in the receipt, so that
a reader can fetch 4 of 32 views by range and check them; a tar that was cut at a member boundary is a valid tar, and
only the index can tell. Every byte of such a tar follows from its index and its members, so verifying compares them
all, headers and padding included.

Headers are made here, byte for byte those of `tarfile` (a test compares them): a shard has two thousand, and `tarfile`
builds each through a dozen calls. SHA-256 (2 GB/s) is the slow part, so it runs in a thread behind the writer, on the
same bytes in memory, and that thread also reads them back from the file and compares: writing and checking a shard take
as long as the slower of the two threads. More threads were slower, as each hand-over of the interpreter's lock can wait
for 5 ms. webdataset's TarWriter makes the same bytes but its import pulls in torch, which costs
1.2 s and 190 MiB in every worker that has it installed.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from pipeline.sample import (
    MAX_JSON_BYTES,
    MAX_VIEWS,
    SampleError,
    decode_rgba,
    parse_sample_json,
    sample_members,
    sample_metadata,
)
from pipeline.types import Sample

MODE = 0o644
BLOCK = tarfile.BLOCKSIZE
RECORD = tarfile.RECORDSIZE
"""Tars end at a multiple of this."""

_QUEUED = 4
"""Samples that may wait to be hashed: each is 1 to 4 MB."""

_CHECKERS = 2
"""Threads that take CRCs while a shard is verified."""


class DamagedDataError(ValueError):
    """Stored bytes are not what was written: names the shard and the sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberIndex:
    """Where the members of one sample lie in its shard: JSON first, then views by planes.

    Attributes:
        planes: plane names in order.
        codecs: file ending of each plane.
        num_views: number of views.
        offset: first byte of the JSON in the tar; the other members follow without a gap, each behind its header.
        lengths: [1 + num_views * len(planes)] in bytes.
        crc32s: [same].
    """

    planes: tuple[str, ...]
    codecs: tuple[str, ...]
    num_views: int
    offset: int
    lengths: tuple[int, ...]
    crc32s: tuple[int, ...]

    def __post_init__(self) -> None:
        count = 1 + self.num_views * len(self.planes)
        if not (1 <= self.num_views <= MAX_VIEWS and self.planes and len(self.codecs) == len(self.planes)):
            raise DamagedDataError(f"index of {self.num_views} views, planes {self.planes}, codecs {self.codecs}")
        if len(self.lengths) != count or len(self.crc32s) != count or self.offset < 0 or min(self.lengths) < 0:
            raise DamagedDataError(f"index has {len(self.lengths)} lengths, {len(self.crc32s)} crc32s; needs {count}")

    @property
    def offsets(self) -> tuple[int, ...]:
        """First byte of each member's data in the tar."""
        starts = [self.offset]
        for length in self.lengths[:-1]:
            starts.append(starts[-1] + -(-length // BLOCK) * BLOCK + BLOCK)
        return tuple(starts)

    def position(self, view: int, plane: str) -> int:
        """Return the place of a view's plane in the three lists."""
        if not 0 <= view < self.num_views:
            raise IndexError(f"view {view} is not in 0..{self.num_views - 1}")
        return 1 + view * len(self.planes) + self.planes.index(plane)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A finished tar on local disk, with its digest and the index of each sample by key."""

    path: Path
    sha256: str
    num_bytes: int
    index: dict[str, MemberIndex]


class _CheckedFile:
    """Writes pieces to a file; a thread behind it hashes them, reads them back and compares."""

    def __init__(self, raw: IO[bytes], behind: ThreadPoolExecutor, name: str) -> None:
        self.raw, self.behind, self.name = raw, behind, name
        self.digest = hashlib.sha256()
        self.count = 0
        self.waiting: deque[Future[None]] = deque()

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # a raw file may take less than it is given, such as on a disk that is almost full
            rest = rest[self.raw.write(rest) :]
        self.waiting.append(self.behind.submit(self._check, data, self.count))
        self.count += len(data)
        if len(self.waiting) > _QUEUED:
            self.waiting.popleft().result()

    def _check(self, data: bytes, start: int) -> None:
        self.digest.update(data)
        found = os.pread(self.raw.fileno(), len(data), start)
        while len(found) < len(data) and (more := os.pread(self.raw.fileno(), len(data), start + len(found))):
            found += more
        if found != data:
            raise DamagedDataError(f"{self.name}: bytes {start} to {start + len(data)} are not what was written")

    def hexdigest(self) -> str:
        while self.waiting:
            self.waiting.popleft().result()
        return self.digest.hexdigest()


def write_shard(samples: Iterable[Sample], path: Path) -> Shard:
    """Write samples to a tar at `path`, which must not exist, and read it back; on an exception the file is removed.

    Raises:
        SampleError: if a sample is malformed or a key comes twice.
        DamagedDataError: if the file does not hold what was written.
    """
    index: dict[str, MemberIndex] = {}
    try:
        with path.open("x+b", buffering=0) as raw, ThreadPoolExecutor(1) as behind:
            sink = _CheckedFile(raw, behind, path.name)
            for sample in samples:
                key, entry, data = _pack(sample)
                if key in index:
                    raise SampleError(f"sample key {key!r} comes twice in one shard")
                index[key] = replace(entry, offset=sink.count + BLOCK)
                sink.write(data)
            sink.write(end_of_archive(sink.count))
            sha256 = sink.hexdigest()
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Shard(path=path, sha256=sha256, num_bytes=sink.count, index=index)


def _pack(sample: Sample) -> tuple[str, MemberIndex, bytes]:
    metadata = sample_metadata(sample)
    members = list(sample_members(sample, metadata))
    pieces, lengths = list[bytes](), list[int]()
    for name, data in members:
        pieces += (member_header(name, len(data)), data, bytes(-len(data) % BLOCK))
        lengths.append(len(data))
    if lengths[0] > MAX_JSON_BYTES:
        raise SampleError(f"{members[0][0]} has {lengths[0]} bytes; at most {MAX_JSON_BYTES} are allowed")
    first = sample.views[0].planes
    entry = MemberIndex(
        planes=tuple(first),
        codecs=tuple(plane.codec for plane in first.values()),
        num_views=len(sample.views),
        offset=BLOCK,
        lengths=tuple(lengths),
        crc32s=(
            zlib.crc32(members[0][1]),
            *(plane["crc32"] for view in metadata["views"] for plane in view["planes"].values()),
        ),
    )
    return sample.key, entry, b"".join(pieces)


def member_header(name: str, num_bytes: int) -> bytes:
    """Return the ustar header of a member of a shard.

    Layout, numbers in octal: name (100 bytes), mode (8), uid (8), gid (8), size (12), mtime (12), checksum (8), type
    (1), link (100), "ustar" "00", owner (32), group (32), device (16, left empty), prefix (155). The checksum is the
    sum of the header's bytes, its own taken as blanks.

    Raises:
        SampleError: if the name or the size does not fit.
    """
    text = name.encode("ascii")
    if not 0 < len(text) <= 100 or not 0 <= num_bytes < 8**11:
        raise SampleError(f"member {name!r} of {num_bytes} bytes does not fit a tar header")
    header = bytearray(_BLANK_HEADER)
    header[: len(text)] = text
    header[124:135] = b"%011o" % num_bytes
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def _blank_header() -> bytes:
    header = bytearray(BLOCK)
    header[100:108] = b"%07o\0" % MODE
    for start, end in ((108, 116), (116, 124), (136, 148)):
        header[start : end - 1] = b"0" * (end - start - 1)
    header[148:156] = b" " * 8
    header[156:157] = tarfile.REGTYPE
    header[257:265] = b"ustar\x0000"
    return bytes(header)


_BLANK_HEADER = _blank_header()


def end_of_archive(count: int) -> bytes:
    """Return what ends a tar of so many bytes: two zero blocks, and zeros up to a whole record."""
    return bytes(2 * BLOCK + -(count + 2 * BLOCK) % RECORD)


def stretch(entry: MemberIndex) -> tuple[int, int]:
    """Return where a sample begins and ends in its tar: its first header, and the padding of its last member."""
    return entry.offset - BLOCK, entry.offsets[-1] + -(-entry.lengths[-1] // BLOCK) * BLOCK


def verify_shard(path: Path, index: dict[str, MemberIndex], *, decode: bool = False) -> None:
    """Read a tar again and check every byte of it against its index: names, order, metadata, lengths, digests.

    Args:
        decode: also decode every rgba plane.

    Raises:
        DamagedDataError: naming the shard and the sample.
    """
    count, begins = 0, []
    for key, entry in index.items():
        start, end = stretch(entry)
        if start != count:
            raise DamagedDataError(f"{path.name}: sample {key} is said to begin at {start} instead of {count}")
        begins.append((start, key, entry))
        count = end

    def check(item: tuple[int, str, MemberIndex]) -> None:
        start, key, entry = item
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            data = memoryview(_read(file, stretch(entry)[1] - start))
        _check_stretch(data, path.name, key, entry, decode)

    try:
        with ThreadPoolExecutor(_CHECKERS) as pool:
            for _ in pool.map(check, begins):
                pass
        with path.open("rb", buffering=0) as file:
            file.seek(count)
            _check_end(_read(file, RECORD + 2 * BLOCK), path.name, count)
    except OSError as error:
        raise DamagedDataError(f"{path.name}: not a readable tar: {error}") from None


def _read(file: IO[bytes], num_bytes: int) -> bytes:
    """Return up to so many bytes, fewer at the end of the file only."""
    pieces = []
    while num_bytes and (piece := file.read(num_bytes)):
        pieces.append(piece)
        num_bytes -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check_end(tail: bytes, shard: str, count: int) -> None:
    if tail == end_of_archive(count):
        return
    try:
        name = tarfile.TarInfo.frombuf(tail[:BLOCK], "utf-8", "surrogateescape").name
    except tarfile.TarError:
        raise DamagedDataError(f"{shard}: not a readable tar: its end is not that of an archive") from None
    raise DamagedDataError(f"{shard}: member {name!r} is not in the index")


def _check_stretch(data: memoryview, shard: str, key: str, entry: MemberIndex, decode: bool) -> None:
    """Check the bytes of one sample."""
    start = 0
    for i, (length, crc32) in enumerate(zip(entry.lengths, entry.crc32s)):
        name, end = member_name(key, i, entry), start + BLOCK + length
        header, part, padding = (
            data[start : start + BLOCK],
            data[start + BLOCK : end],
            data[end : end + -length % BLOCK],
        )
        if header != member_header(name, length):
            raise _wrong_header(bytes(header), shard, key, i, name, entry)
        if len(part) != length or zlib.crc32(part) != crc32 or bytes(padding) != bytes(-length % BLOCK):
            raise DamagedDataError(f"{shard}: sample {key}: {name} differs from its index in place, length or crc32")
        if i == 0:
            _check_json(part, shard, key, name, entry)
        if i > 0 and decode and entry.planes[(i - 1) % len(entry.planes)] == "rgba":
            _check_picture(part, shard, key, name)
        start = end + -length % BLOCK


def _wrong_header(found: bytes, shard: str, key: str, position: int, name: str, entry: MemberIndex) -> DamagedDataError:
    if len(found) < BLOCK or not any(found):
        return DamagedDataError(f"{shard}: sample {key} has {position} of {len(entry.lengths)} members")
    try:
        other = tarfile.TarInfo.frombuf(found, "utf-8", "surrogateescape").name
    except tarfile.TarError as error:
        return DamagedDataError(f"{shard}: not a readable tar: sample {key}: {name}: {error}")
    return DamagedDataError(f"{shard}: sample {key}: found member {other!r}, or its header, differs from {name!r}")


def _check_json(part: memoryview, shard: str, key: str, name: str, entry: MemberIndex) -> None:
    try:
        header = parse_sample_json(bytes(part))
    except SampleError as error:
        raise DamagedDataError(f"{shard}: sample {key}: {name}: {error}") from None
    if header.key != key or len(header.cameras) != entry.num_views:
        raise DamagedDataError(f"{shard}: sample {key}: its JSON says {header.key}, {len(header.cameras)} views")


def _check_picture(part: memoryview, shard: str, key: str, name: str) -> None:
    try:
        decode_rgba(bytes(part))
    except SampleError as error:
        raise DamagedDataError(f"{shard}: sample {key}: {name}: {error}") from None


def member_name(key: str, position: int, entry: MemberIndex) -> str:
    """Return the name of the member at a position of a sample's index."""
    if position == 0:
        return f"{key}.json"
    view, plane = divmod(position - 1, len(entry.planes))
    return f"{key}.{view:03d}.{entry.planes[plane]}.{entry.codecs[plane]}"


def check_part(data: bytes | memoryview, length: int, crc32: int, shard: str, name: str) -> None:
    """Raise DamagedDataError unless the bytes have this length and crc32."""
    if len(data) != length or zlib.crc32(data) != crc32:
        raise DamagedDataError(
            f"shard {shard}: {name}: {len(data)} bytes that differ from the {length} that were written"
        )


def shard_key(sha256: str) -> str:
    """Return the key of a shard in a corpus."""
    return f"shards/{sha256}.tar"
