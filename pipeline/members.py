"""The bytes of one capture's files, wherever they lie: in zips, on disk, or on object storage; bounded and accounted.

Members of zips lie side by side, so they come in spans of up to 16 MB, one ranged read each: a capture of 30 frames
takes one or two. Files on storage of their own are asked for ahead, eight at a time. What was read is digested: a
sample's `asset_sha256` is that of the lines

    <sha256 of the bytes> <name>\\n

of every member that was read, sorted by name, names relative to the capture ("images/001.jpg"), in UTF-8 with
surrogateescape. Equal digests mean that the same frames, masks and models went in.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.capture import CaptureFiles
from pipeline.folders import Folder
from pipeline.types import AssetError, FailureKind
from pipeline.zips import ZipEntry, header_bytes, member_data

MAX_MEMBERS = 20_000
SPAN_BYTES = 16 * 2**20
HELD_BYTES = 64 * 2**20
_MAX_GAP_BYTES = 2**18
_AHEAD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipMember:
    """A member of a zip; `limit` is the first byte that no member can reach: where the zip's directory starts."""

    folder: Folder
    zip_name: str
    entry: ZipEntry
    limit: int

    @property
    def num_bytes(self) -> int:
        """Size of the content."""
        return self.entry.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMember:
    """A file of its own."""

    folder: Folder
    name: str
    num_bytes: int


Member = ZipMember | FileMember


@dataclass(frozen=True, slots=True)
class _Span:
    """A part of a zip that is read at once."""

    folder: Folder
    zip_name: str
    start: int
    end: int


class MemberReader:
    """Reads members by name, for one thread at a time."""

    def __init__(self, uid: str, members: Mapping[str, Member], max_total_bytes: int) -> None:
        """Take the members of a capture.

        Raises:
            AssetError: TOO_LARGE for too many members, or too many bytes in all.
        """
        self._uid, self._members = uid, members
        total = sum(member.num_bytes for member in members.values())
        if len(members) > MAX_MEMBERS:
            raise AssetError(
                FailureKind.TOO_LARGE, f"{len(members)} files; at most {MAX_MEMBERS} are allowed a capture"
            )
        if total > max_total_bytes:
            raise AssetError(
                FailureKind.TOO_LARGE,
                f"its {len(members)} files have {total} bytes; at most {max_total_bytes} are allowed "
                "(admission.max_asset_bytes)",
            )
        self._digests: dict[str, str] = {}
        self._spans = _plan_spans(members)
        self._held: OrderedDict[_Span, bytes] = OrderedDict()
        remote = [name for name, one in members.items() if isinstance(one, FileMember) and one.folder.is_remote]
        self._order = {name: i for i, name in enumerate(remote)}
        self._remote = remote
        self._ahead: dict[str, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(_AHEAD, "capture-read") if remote else None

    def close(self) -> None:
        """End what is being read ahead."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the content of a member.

        Raises:
            AssetError: NOT_FOUND, TOO_LARGE, CORRUPT_FILE, UNSUPPORTED_FORMAT, CHECKSUM_MISMATCH, TRUNCATED,
                ACCESS_DENIED or NETWORK; names the member.
        """
        member = self._members.get(name)
        if member is None:
            raise AssetError(FailureKind.NOT_FOUND, f"{name!a} is no file of {self._uid}")
        if member.num_bytes > max_bytes:
            raise AssetError(
                FailureKind.TOO_LARGE, f"{name!a} has {member.num_bytes} bytes; at most {max_bytes} are allowed"
            )
        data = (
            self._read_zip(name, member) if isinstance(member, ZipMember) else self._read_file(name, member, max_bytes)
        )
        self._digests[name] = hashlib.sha256(data).hexdigest()
        return data

    def digest(self) -> str:
        """Return the sha256 of what was read so far, as the module says."""
        lines = sorted((name, digest) for name, digest in self._digests.items())
        text = "".join(f"{digest} {name}\n" for name, digest in lines)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def _read_file(self, name: str, member: FileMember, max_bytes: int) -> bytes:
        if self._pool is None or name not in self._order:
            return member.folder.read(member.name, max_bytes)
        place = self._order[name]
        for other in self._remote[place : place + _AHEAD]:
            if other in self._digests or other in self._ahead:
                continue
            one = self._members[other]
            assert isinstance(one, FileMember)
            self._ahead[other] = self._pool.submit(one.folder.read, one.name, one.num_bytes)
        asked = self._ahead.pop(name, None)
        return member.folder.read(member.name, max_bytes) if asked is None else asked.result()

    def _read_zip(self, name: str, member: ZipMember) -> bytes:
        span = self._spans[name]
        whole = self._span(span)
        start = member.entry.offset - span.start
        data = memoryview(whole)[start : min(start + member.entry.reach, len(whole))]
        needed = header_bytes(data) + member.entry.num_stored
        if len(data) < needed <= member.limit - member.entry.offset:
            data = memoryview(member.folder.read_ranges(member.zip_name, [member.entry.offset], [needed])[0])
        return member_data(member.entry, data)

    def _span(self, span: _Span) -> bytes:
        if span.end <= span.start:
            raise AssetError(FailureKind.CORRUPT_FILE, f"{span.zip_name}: a member would lie in the zip's directory")
        if span not in self._held:
            while self._held and sum(map(len, self._held.values())) + span.end - span.start > HELD_BYTES:
                self._held.popitem(last=False)
            (data,) = span.folder.read_ranges(span.zip_name, [span.start], [span.end - span.start])
            self._held[span] = data
        return self._held[span]


@dataclass(frozen=True, slots=True)
class OpenCapture:
    """A capture's files, and what reads them: `reader.digest()` tells what was read, `reader.close()` ends it."""

    files: CaptureFiles
    reader: MemberReader


def _plan_spans(members: Mapping[str, Member]) -> dict[str, _Span]:
    """Return the span that each member of a zip is read with."""
    zipped = [(name, one) for name, one in members.items() if isinstance(one, ZipMember)]
    zipped.sort(key=lambda item: (id(item[1].folder), item[1].zip_name, item[1].entry.offset))
    groups: list[tuple[ZipMember, int, list[str]]] = []  # first member, end, names
    for name, one in zipped:
        end = max(one.entry.offset, min(one.entry.offset + one.entry.reach, one.limit))
        if groups:
            first, last, names = groups[-1]
            same = (first.folder, first.zip_name) == (one.folder, one.zip_name)
            if same and one.entry.offset - last <= _MAX_GAP_BYTES and end - first.entry.offset <= SPAN_BYTES:
                groups[-1] = (first, max(last, end), [*names, name])
                continue
        groups.append((one, end, [name]))
    spans = {}
    for first, end, names in groups:
        span = _Span(first.folder, first.zip_name, first.entry.offset, end)
        spans.update(dict.fromkeys(names, span))
    return spans
