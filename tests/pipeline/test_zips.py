"""Zips read in place: what zipfile writes is read alike, and what no honest tool writes is refused with a kind."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import zips
from pipeline.folders import DiskFolder
from pipeline.members import MemberReader, ZipMember
from pipeline.types import AssetError, FailureKind


def read_all(path: Path, max_bytes: int = 2**24) -> dict[str, bytes]:
    """Read every member of a zip as a capture's would be."""
    folder = DiskFolder(path.parent)
    directory = zips.find_directory(folder, path.name)
    members = {}
    for entry in zips.scan_directory(folder, path.name, directory):
        entry.check()
        name = entry.name.decode("utf-8", "surrogateescape")
        members[name] = ZipMember(folder=folder, zip_name=path.name, entry=entry, limit=directory.offset)
    reader = MemberReader("test", members, 2**30)
    return {name: reader.read(name, max_bytes) for name, one in members.items() if not one.entry.is_folder}


def write(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@settings(max_examples=30, deadline=None)
@given(
    files=st.dictionaries(st.text("abc/é ", min_size=1, max_size=8).map(lambda s: "d/" + s + ".x"), st.binary()),
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    comment=st.binary(max_size=40),
)
def test_what_zipfile_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], method: int, comment: bytes
) -> None:
    path = tmp_path_factory.mktemp("z") / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.comment = comment
        for name, data in files.items():
            archive.writestr(name, data)
    assert read_all(path) == files


def test_zip64_and_data_descriptors_are_read(tmp_path: Path) -> None:
    class Unseekable(io.RawIOBase):
        def __init__(self, raw: io.BufferedWriter) -> None:
            self.raw = raw

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            return self.raw.write(data)  # type: ignore[arg-type]

    path = tmp_path / "a.zip"
    with (
        path.open("wb") as raw,
        zipfile.ZipFile(Unseekable(raw), "w", zipfile.ZIP_DEFLATED) as archive,  # type: ignore[arg-type]
        archive.open("a/b.bin", "w", force_zip64=True) as member,
    ):
        member.write(b"abc" * 1000)
    assert read_all(path) == {"a/b.bin": b"abc" * 1000}


def test_a_zip64_directory_is_found_and_its_entries_are_read(tmp_path: Path) -> None:
    """By hand: sizes and offset of the entry, and all of the end record, stand in their zip64 fields."""
    name, data = b"0/00000001/images/a.jpg", b"hello" * 9
    crc = zlib.crc32(data)
    extra = struct.pack("<HHQQ", 1, 16, len(data), len(data))
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, crc, 2**32 - 1, 2**32 - 1, len(name), len(extra))
    local += name + extra + data
    wide = struct.pack("<HHQQQ", 1, 24, len(data), len(data), 0)
    entry = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, crc, 2**32 - 1, 2**32 - 1, len(name), len(wide), 0, 0, 0, 0,
        2**32 - 1,
    )  # fmt: skip
    entry += name + wide
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(entry), len(local))
    end += struct.pack("<4sLQL", b"PK\6\7", 0, len(local) + len(entry), 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    path = tmp_path / "a.zip"
    path.write_bytes(local + entry + end)
    assert zipfile.ZipFile(path).read(name.decode()) == data, "the file is a zip to others too"
    assert read_all(path) == {name.decode(): data}


def test_a_directory_longer_than_a_block_is_scanned_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zips, "_BLOCK_BYTES", 100)
    files = {f"d/{i:04d}": b"%d" % i for i in range(200)}
    path = write(tmp_path / "a.zip", files)
    assert read_all(path) == files
    folder = DiskFolder(tmp_path)
    directory = zips.find_directory(folder, "a.zip")
    entries = list(zips.scan_directory(folder, "a.zip", directory))
    for entry in entries[::50]:
        (data,) = folder.read_ranges("a.zip", [directory.offset + entry.position], [entry.span])
        (again,) = zips.parse_entries(data, "a.zip", base=entry.position)
        assert again == entry


def patched(path: Path, change: Callable[[bytearray, int], None]) -> Path:
    """Change the last central entry of a zip in place; `change` gets the file and the entry's offset."""
    data = bytearray(path.read_bytes())
    change(data, data.rindex(b"PK\1\2"))
    path.write_bytes(data)
    return path


def put(offset: int, layout: str, value: int) -> Callable[[bytearray, int], None]:
    return lambda data, entry: struct.pack_into(layout, data, entry + offset, value)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (put(8, "<H", 1), FailureKind.UNSUPPORTED_FORMAT, "encrypted"),
        (put(8, "<H", 0x40), FailureKind.UNSUPPORTED_FORMAT, "encrypted"),
        (put(10, "<H", 9), FailureKind.UNSUPPORTED_FORMAT, "method 9"),
        (put(10, "<H", 8), FailureKind.CORRUPT_FILE, "calls itself"),
        (put(16, "<L", 1), FailureKind.CHECKSUM_MISMATCH, "CRC-32"),
        (put(24, "<L", 500), FailureKind.CORRUPT_FILE, "stored in"),
        (put(38, "<L", 0o120777 << 16), FailureKind.CORRUPT_FILE, "symbolic link"),
        (put(42, "<L", 3), FailureKind.CORRUPT_FILE, "no member where it points"),
        (put(42, "<L", 2**31), FailureKind.CORRUPT_FILE, "directory"),
    ],
)
def test_entries_that_no_honest_tool_writes_are_refused(
    tmp_path: Path, change: Callable[[bytearray, int], None], kind: FailureKind, words: str
) -> None:
    path = patched(write(tmp_path / "a.zip", {"d/a": b"x" * 200, "d/b": b"y" * 200}), change)
    with pytest.raises(AssetError, match=words) as caught:
        read_all(path)
    assert caught.value.kind is kind


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\\b", "C:/x", "a/.."])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.zip", {"d/a": b"", name: b"x"})
    with pytest.raises(AssetError, match="not a plain relative path") as caught:
        read_all(path)
    assert caught.value.kind is FailureKind.CORRUPT_FILE


def test_bombs_are_refused_before_they_are_inflated(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", {"d/a": bytes(2**24)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(AssetError, match="ratio") as caught:
        read_all(path)
    assert caught.value.kind is FailureKind.TOO_LARGE


def test_a_member_that_inflates_to_more_than_it_says_is_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", {"d/a": bytes(2**24)}, zipfile.ZIP_DEFLATED)
    patched(path, put(24, "<L", 2**20))
    with pytest.raises(AssetError, match="other than") as caught:
        read_all(path)
    assert caught.value.kind in (FailureKind.CORRUPT_FILE,)


def test_sizes_counts_and_totals_are_bounded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", {"d/a": b"x" * 5000, "d/b": b"y" * 10})
    with pytest.raises(AssetError, match="5000 bytes; at most 4999") as caught:
        read_all(path, max_bytes=4999)
    assert caught.value.kind is FailureKind.TOO_LARGE
    folder = DiskFolder(tmp_path)
    directory = zips.find_directory(folder, "a.zip")
    entries = list(zips.scan_directory(folder, "a.zip", directory))
    members = {
        e.name.decode(): ZipMember(folder=folder, zip_name="a.zip", entry=e, limit=directory.offset) for e in entries
    }
    with pytest.raises(AssetError, match=r"5010 bytes; at most 5009 .*admission\.max_asset_bytes"):
        MemberReader("x", members, 5009)


def test_cut_zips_and_other_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", {"d/a": b"x" * 5000})
    whole = path.read_bytes()
    folder = DiskFolder(tmp_path)
    for data in (b"", b"<html>", whole[:-1], whole[:3000]):
        path.write_bytes(data)
        with pytest.raises(AssetError, match="cut short, or not a zip") as caught:
            zips.find_directory(folder, "a.zip")
        assert caught.value.kind is FailureKind.TRUNCATED
    path.write_bytes(b"in front" + whole)
    with pytest.raises(AssetError, match="does not end at"):
        zips.find_directory(folder, "a.zip")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_an_error_of_ours_or_other_bytes_that_pass_their_crc(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    path = write(folder / "a.zip", {"d/a": b"abc" * 30, "d/b": b"q" * 50}, zipfile.ZIP_DEFLATED)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        found = read_all(path)
    except AssetError:
        return
    assert set(found.values()) <= {b"abc" * 30, b"q" * 50}


def test_members_side_by_side_come_in_one_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zip", {f"d/{i}": bytes([i]) * 1000 for i in range(40)})
    asked: list[int] = []

    class Counting(DiskFolder):
        def read_ranges(self, name: str, starts: list[int], lengths: list[int]) -> list[bytes]:  # type: ignore[override]
            asked.extend(lengths)
            return super().read_ranges(name, starts, lengths)

    folder = Counting(tmp_path)
    directory = zips.find_directory(folder, path.name)
    members = {
        entry.name.decode(): ZipMember(folder=folder, zip_name=path.name, entry=entry, limit=directory.offset)
        for entry in zips.scan_directory(folder, path.name, directory)
    }
    asked.clear()
    reader = MemberReader("x", members, 2**20)
    assert [reader.read(f"d/{i}", 1000) for i in range(40)] == [bytes([i]) * 1000 for i in range(40)]
    assert len(asked) == 1
