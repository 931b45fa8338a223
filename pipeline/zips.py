"""Zips read in place: a capture's members come by byte range, out of archives of 80 GB, on disk or on object storage.

    | member | member | ... | central directory: one entry a member, in order | end record |
              ^ a capture's members, mostly side by side   ^ and its entries, side by side

`scan_directory` walks the central directory of an archive once, in blocks, holding one block: 164 thousand entries are
12 MB and take 0.3 s of one core. Whoever lists notes which run of the directory is a capture's; whoever reads the
capture later asks for that run alone, 4 KB, and for the members that its entries point to. So a worker never reads a
whole directory, and an index of 7 million files is two numbers a capture.

`zipfile` would read and hold every entry of a directory before it gives the first (87 MB for such an archive), and
cannot start from a part of it; its inflating is zlib's, which is used here alike.

A stranger made these files. Nothing is written to disk, so a name can do no harm as a path, but one that tries is
refused all the same, as are links, encryption, methods other than stored and deflated, entries that contradict their
member's own header, more bytes than were declared, wrong CRCs, and ratios that no picture has.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.folders import Folder
from pipeline.types import AssetError, FailureKind

MAX_RATIO = 200
"""Deflate reaches 1032:1 on zeros. Pictures are PNG or JPEG, which do not shrink, and models shrink to a third."""

RATIO_FREE_BYTES = 2**20
"""Members up to this size may have any ratio: they cannot hurt."""

_BLOCK_BYTES = 8 * 2**20
_MAX_DIRECTORY_BYTES = 4 * 2**30
_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LOCAL_SLACK_BYTES = 96  # what a member's own extra field may be longer than its entry's, usually: times, zip64
_NEVER = 0xFFFFFFFF
_STORED, _DEFLATED = 0, 8
_S_IFMT, _S_IFLNK = 0o170000, 0o120000


@dataclass(frozen=True, slots=True)
class Directory:
    """Where the central directory of a zip lies."""

    offset: int
    num_bytes: int
    num_entries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ZipEntry:
    """One entry of a central directory, unchecked: `check` says whether it may be read.

    Attributes:
        name: as stored, bytes.
        position: of the entry, in bytes from the directory's start.
        span: length of the entry itself in bytes.
        offset: of the member's local header in the zip.
    """

    name: bytes
    position: int
    span: int
    flags: int
    method: int
    crc32: int
    num_stored: int
    num_bytes: int
    attributes: int
    offset: int
    num_extra: int

    @property
    def is_folder(self) -> bool:
        """Whether this is a mere folder."""
        return self.name.endswith(b"/")

    @property
    def reach(self) -> int:
        """Return how many bytes from `offset` hold the member, if its own header is not unusually long."""
        return _LOCAL.size + len(self.name) + self.num_extra + _LOCAL_SLACK_BYTES + self.num_stored

    def check(self) -> None:
        """Raise AssetError CORRUPT_FILE, UNSUPPORTED_FORMAT or TOO_LARGE for an entry that is not to be read."""
        shown = repr(self.name[:100])[1:]
        parts = self.name.split(b"/")
        drive = len(self.name) > 1 and self.name[1:2] == b":"
        if self.name.startswith(b"/") or b".." in parts or b"\\" in self.name or b"\0" in self.name or drive:
            raise AssetError(FailureKind.CORRUPT_FILE, f"zip entry {shown} is not a plain relative path; refused")
        if (self.attributes >> 16) & _S_IFMT == _S_IFLNK:
            raise AssetError(FailureKind.CORRUPT_FILE, f"zip entry {shown} is a symbolic link; refused")
        if self.flags & 0x41:
            raise AssetError(
                FailureKind.UNSUPPORTED_FORMAT, f"zip entry {shown} is encrypted; decrypt the archive first"
            )
        if self.method not in (_STORED, _DEFLATED):
            raise AssetError(
                FailureKind.UNSUPPORTED_FORMAT,
                f"zip entry {shown} has compression method {self.method}; stored (0) and deflated (8) are read",
            )
        if self.method == _STORED and self.num_stored != self.num_bytes:
            raise AssetError(
                FailureKind.CORRUPT_FILE,
                f"zip entry {shown} is stored in {self.num_stored} bytes but says {self.num_bytes}",
            )
        if self.num_stored > self.num_bytes + self.num_bytes // 64 + 1024:
            raise AssetError(
                FailureKind.CORRUPT_FILE,
                f"zip entry {shown} takes {self.num_stored} bytes for {self.num_bytes}; no compressor does that",
            )
        if self.num_bytes > RATIO_FREE_BYTES and self.num_bytes > MAX_RATIO * self.num_stored:
            raise AssetError(
                FailureKind.TOO_LARGE,
                f"zip entry {shown} says that {self.num_stored} bytes become {self.num_bytes}; a ratio of at most "
                f"{MAX_RATIO} is allowed",
            )


def find_directory(folder: Folder, name: str) -> Directory:
    """Find the central directory of a zip, with or without zip64 records.

    Raises:
        AssetError: TRUNCATED where the end record is missing, CORRUPT_FILE where it contradicts the file.
    """
    size = folder.size(name)
    num_tail = min(size, _END.size + 0xFFFF + _LOCATOR64.size)
    (tail,) = folder.read_ranges(name, [size - num_tail], [num_tail])
    place = _end_record(tail)
    if place is None:
        raise AssetError(
            FailureKind.TRUNCATED, f"{name} ({size} bytes) has no end record: it is cut short, or not a zip"
        )
    _, disk, first_disk, here, total, num_bytes, offset, _ = _END.unpack_from(tail, place)
    end = size - num_tail + place
    if place >= _LOCATOR64.size and tail[place - _LOCATOR64.size :].startswith(b"PK\x06\x07"):
        _, _, where, _ = _LOCATOR64.unpack_from(tail, place - _LOCATOR64.size)
        if where + _END64.size > end:
            raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: its zip64 record would lie at byte {where} of {size}")
        (record,) = folder.read_ranges(name, [where], [_END64.size])
        signature, _, _, _, disk, first_disk, here, total, num_bytes, offset = _END64.unpack(record)
        if signature != b"PK\x06\x06":
            raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: there is no zip64 record at byte {where}")
        end = where
    if (disk, first_disk) != (0, 0) or here != total:
        raise AssetError(FailureKind.UNSUPPORTED_FORMAT, f"{name} is one part of a zip in several; join them first")
    if offset + num_bytes != end or num_bytes > _MAX_DIRECTORY_BYTES or total * _ENTRY.size > num_bytes:
        raise AssetError(
            FailureKind.CORRUPT_FILE,
            f"{name}: a directory of {total} entries in {num_bytes} bytes at byte {offset} does not end at {end}",
        )
    return Directory(offset, num_bytes, total)


def scan_directory(folder: Folder, name: str, directory: Directory) -> Iterator[ZipEntry]:
    """Yield the entries of a zip in order, holding one block of the directory at a time.

    Raises:
        AssetError: CORRUPT_FILE where the directory does not hold the entries that it says.
    """
    data, start, left, count = b"", 0, directory.num_bytes, 0
    while left or data:
        take = min(left, _BLOCK_BYTES)
        if take:
            data += folder.read_ranges(name, [directory.offset + directory.num_bytes - left], [take])[0]
            left -= take
        used = 0
        for entry in parse_entries(data, name, base=start, whole=left == 0):
            used = entry.position + entry.span - start
            count += 1
            yield entry
        if used == 0:
            raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: its directory breaks off at entry {count}")
        data, start = data[used:], start + used
    if count != directory.num_entries:
        raise AssetError(
            FailureKind.CORRUPT_FILE, f"{name}: its directory holds {count} entries, it says {directory.num_entries}"
        )


def parse_entries(data: bytes, name: str, *, base: int = 0, whole: bool = True) -> Iterator[ZipEntry]:
    """Yield the entries that stand one after the other in a part of a central directory.

    Args:
        data: starts with an entry.
        name: of the zip, for messages.
        base: position of the part's first byte in the directory.
        whole: whether the last entry must end with the data; else it may be cut off, and is left out.

    Raises:
        AssetError: CORRUPT_FILE.
    """
    position, size = 0, len(data)
    while position < size:
        if position + _ENTRY.size <= size:
            (
                signature, _, _, flags, method, _, _, crc32, num_stored, num_bytes, num_name, num_extra, num_comment,
                _, _, attributes, offset,
            ) = _ENTRY.unpack_from(data, position)  # fmt: skip
            if signature != b"PK\x01\x02":
                raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: no entry where the directory should have one")
            span = _ENTRY.size + num_name + num_extra + num_comment
            if position + span <= size:
                first = position + _ENTRY.size
                if _NEVER in (num_stored, num_bytes, offset):
                    extra = data[first + num_name : first + num_name + num_extra]
                    num_bytes, num_stored, offset = _zip64(extra, num_bytes, num_stored, offset, name)
                yield ZipEntry(
                    name=data[first : first + num_name], position=base + position, span=span, flags=flags,
                    method=method, crc32=crc32, num_stored=num_stored, num_bytes=num_bytes, attributes=attributes,
                    offset=offset, num_extra=num_extra,
                )  # fmt: skip
                position += span
                continue
        if whole:
            raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: the last entry of its directory is cut off")
        return


def member_data(entry: ZipEntry, data: bytes | memoryview) -> bytes:
    """Return the content of a member, inflated and checked.

    Args:
        data: of the zip from `entry.offset` on; `header_bytes(data) + entry.num_stored` bytes are needed.

    Raises:
        AssetError: CORRUPT_FILE, TRUNCATED, or CHECKSUM_MISMATCH.
    """
    shown = repr(entry.name[-100:])[1:]
    if not header_bytes(data):
        raise AssetError(FailureKind.CORRUPT_FILE, f"zip entry {shown}: there is no member where it points to")
    fields = _LOCAL.unpack_from(data)
    flags, method, num_name, num_extra = fields[2], fields[3], fields[9], fields[10]
    name = bytes(data[_LOCAL.size : _LOCAL.size + num_name])
    if name != entry.name or method != entry.method or (flags & 0x41) != (entry.flags & 0x41):
        raise AssetError(FailureKind.CORRUPT_FILE, f"zip entry {shown}: its member calls itself {name[:60]!r}; refused")
    start = _LOCAL.size + num_name + num_extra
    stored = memoryview(data)[start : start + entry.num_stored]
    if len(stored) < entry.num_stored:
        raise AssetError(
            FailureKind.TRUNCATED, f"zip entry {shown}: {len(stored)} of {entry.num_stored} bytes are there"
        )
    content = bytes(stored) if entry.method == _STORED else _inflate(stored, entry.num_bytes, shown)
    if zlib.crc32(content) != entry.crc32:
        raise AssetError(FailureKind.CHECKSUM_MISMATCH, f"zip entry {shown}: its bytes differ from their CRC-32")
    return content


def header_bytes(data: bytes | memoryview) -> int:
    """Return the length of a local header, its name and extra field included; 0 if there is none."""
    if len(data) < _LOCAL.size or data[:4] != b"PK\x03\x04":
        return 0
    fields = _LOCAL.unpack_from(data)
    return _LOCAL.size + int(fields[9]) + int(fields[10])


def _inflate(stored: memoryview, num_bytes: int, shown: str) -> bytes:
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One byte more than declared shows a member that would go on; nothing beyond it is made.
        content = engine.decompress(stored, num_bytes + 1)
    except zlib.error as error:
        raise AssetError(FailureKind.CORRUPT_FILE, f"zip entry {shown} does not inflate: {error}") from None
    if len(content) != num_bytes or not (engine.eof or engine.decompress(engine.unconsumed_tail, 1) == b""):
        raise AssetError(
            FailureKind.CORRUPT_FILE, f"zip entry {shown} inflates to other than the {num_bytes} bytes that it says"
        )
    return content


def _zip64(extra: bytes, num_bytes: int, num_stored: int, offset: int, name: str) -> tuple[int, int, int]:
    """Return sizes and offset with those that did not fit in 32 bits taken from the zip64 field."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        if kind == 1:
            wide = list(struct.unpack_from(f"<{min(length, len(extra) - place - 4) // 8}Q", extra, place + 4))
            try:
                return tuple(wide.pop(0) if value == _NEVER else value for value in (num_bytes, num_stored, offset))  # type: ignore[return-value]
            except IndexError:
                break
        place += 4 + length
    raise AssetError(FailureKind.CORRUPT_FILE, f"{name}: an entry lacks its zip64 field")


def _end_record(tail: bytes) -> int | None:
    """Return where the end record starts in the last bytes of a zip: its comment must reach to the end."""
    place = len(tail) - _END.size
    while (place := tail.rfind(b"PK\x05\x06", 0, place + 4)) >= 0:
        if place + _END.size <= len(tail) and place + _END.size + _END.unpack_from(tail, place)[7] == len(tail):
            return place
        place -= 1
    return None
