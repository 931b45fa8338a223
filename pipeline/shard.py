"""Canonical tars: the same samples give the same bytes.

A shard is a plain POSIX (ustar) tar. Every member has mtime, uid and gid 0, no user or group name, and mode 0644:

    offset 0      header of {key}.json (512 bytes)
    offset 512    the JSON, padded with zeros to a multiple of 512
    ...           header and bytes of {key}.000.rgba.webp, and so on, sample after sample
    end           two zero blocks, padded to 10240 bytes

The index of a sample (offset, length and crc32 of each member) is made while writing and lives in the receipt, so that
a reader can fetch 4 of 32 views by range and check them; a tar that was cut at a member boundary is a valid tar, and
only the index can tell. Written with `tarfile`: webdataset's TarWriter makes the same bytes but its import pulls in
torch, which costs 1.2 s and 190 MiB in every worker that has it installed.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.sample import MAX_VIEWS, SampleError, decode_rgba, parse_sample_json, sample_members
from pipeline.types import Sample

MODE = 0o644
BLOCK = tarfile.BLOCKSIZE


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


class _HashingFile(io.RawIOBase):
    """Counts and hashes what passes through to a file."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.digest = hashlib.sha256()
        self.count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.raw.write(data)
        self.digest.update(data)
        self.count += len(data)
        return len(data)


def write_shard(samples: Iterable[Sample], path: Path) -> Shard:
    """Write samples to a tar at `path`, which must not exist; on an exception the file is removed.

    Raises:
        SampleError: if a sample is malformed or a key comes twice.
    """
    index: dict[str, MemberIndex] = {}
    try:
        with path.open("xb", buffering=2**20) as raw:
            sink = _HashingFile(raw)
            with tarfile.open(fileobj=sink, mode="w|", format=tarfile.USTAR_FORMAT, bufsize=2**16) as tar:
                for sample in samples:
                    if sample.key in index:
                        raise SampleError(f"sample key {sample.key!r} comes twice in one shard")
                    index[sample.key] = _write_sample(tar, sample)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Shard(path=path, sha256=sink.digest.hexdigest(), num_bytes=sink.count, index=index)


def _write_sample(tar: tarfile.TarFile, sample: Sample) -> MemberIndex:
    offset, lengths, crc32s = tar.offset + BLOCK, [], []  # type: ignore[attr-defined]
    for name, data in sample_members(sample):
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = len(data), 0, MODE
        tar.addfile(info, io.BytesIO(data))
        lengths.append(len(data))
        crc32s.append(zlib.crc32(data))
    first = sample.views[0].planes
    return MemberIndex(
        planes=tuple(first),
        codecs=tuple(plane.codec for plane in first.values()),
        num_views=len(sample.views),
        offset=offset,
        lengths=tuple(lengths),
        crc32s=tuple(crc32s),
    )


def verify_shard(path: Path, index: dict[str, MemberIndex], *, decode: bool = False) -> None:
    """Read a tar again and check it against its index: names, order, metadata, lengths, digests.

    Raises:
        DamagedDataError: naming the shard and the sample.
    """
    expected = [(key, i, start, entry) for key, entry in index.items() for i, start in enumerate(entry.offsets)]
    try:
        with tarfile.open(path, mode="r:") as tar:
            for key, i, start, entry in expected:
                member = tar.next()
                if member is None:
                    raise DamagedDataError(f"{path.name}: sample {key} has {i} of {len(entry.lengths)} members")
                _check_member(tar, member, path.name, key, i, start, entry, decode)
            if (extra := tar.next()) is not None:
                raise DamagedDataError(f"{path.name}: member {extra.name!r} is not in the index")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DamagedDataError(f"{path.name}: not a readable tar: {error}") from None


def _check_member(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    shard: str,
    key: str,
    i: int,
    start: int,
    entry: MemberIndex,
    decode: bool,
) -> None:
    name = member_name(key, i, entry)
    if member.name != name or not member.isreg() or (member.mtime, member.uid, member.gid) != (0, 0, 0):
        raise DamagedDataError(f"{shard}: sample {key}: found member {member.name!r}, expected {name!r}")
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if member.offset_data != start or len(data) != entry.lengths[i] or zlib.crc32(data) != entry.crc32s[i]:
        raise DamagedDataError(f"{shard}: sample {key}: {name} differs from its index in place, length or crc32")
    try:
        if i == 0:
            header = parse_sample_json(data)
            if header.key != key or len(header.cameras) != entry.num_views:
                raise DamagedDataError(
                    f"{shard}: sample {key}: its JSON says {header.key}, {len(header.cameras)} views"
                )
        elif decode and entry.planes[(i - 1) % len(entry.planes)] == "rgba":
            decode_rgba(data)
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
