"""Every byte region of a shard flipped or cut: verification and ranged reads refuse it, or give what was written."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import receipt, version
from pipeline.reader import DamagedDataError, VersionReader
from pipeline.sample import SampleError
from pipeline.shard import BLOCK, MemberIndex, Shard, shard_key, verify_shard, write_shard
from pipeline.store import Store, StoreError
from pipeline.types import Plane, Sample, UserError
from tests import corpora
from tests.conftest import make_sample


def small(uid: str) -> Sample:
    return make_sample(uid, num_views=2, size_px=16)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    return write_shard([small("ball-0"), small("ball-2")], tmp_path_factory.mktemp("whole") / "whole.tar")


@pytest.mark.parametrize("fault", ["flipped", "cut"])
def test_a_disk_that_keeps_other_bytes_is_noticed_while_writing(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pread

    def forgetful(fd: int, count: int, start: int) -> bytes:
        data = bytearray(real(fd, count, start))
        if fault == "cut":
            return bytes(data[: max(0, 3000 - start)])
        data[-1] ^= 1
        return bytes(data)

    monkeypatch.setattr(os, "pread", forgetful)
    with pytest.raises(DamagedDataError, match=r"new\.tar: bytes 0 to .* are not what was written"):
        write_shard([small("ball-0"), small("ball-2")], tmp_path / "new.tar")
    assert not list(tmp_path.iterdir())


def members(path: Path) -> dict[str, bytes] | None:
    """What a plain reader of tars finds, or None."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            return {one.name: file.read() for one in tar if (file := tar.extractfile(one))}
    except (tarfile.TarError, OSError, EOFError):
        return None


def regions(shard: Shard) -> Iterator[tuple[str, int]]:
    """Yield (region, offset) of places to flip: each field of each header, and through each member's data."""
    fields = {"name": 0, "mode": 100, "uid": 108, "gid": 116, "size": 124, "mtime": 136, "checksum": 148, "type": 156,
              "link": 157, "magic": 257, "version": 263, "user": 265, "group": 297, "device": 329, "prefix": 345,
              "pad": 500}  # fmt: skip
    for entry in shard.index.values():
        for start, length in zip(entry.offsets, entry.lengths):
            for name, offset in fields.items():
                yield name, start - BLOCK + offset
            for offset in {0, 1, length // 3, length // 2, length - 2, length - 1}:
                yield "data", start + offset
            if length % BLOCK:
                yield "padding", start + length
    yield "end", shard.num_bytes - 1
    yield "end", shard.num_bytes - 10000


def test_a_flip_anywhere_is_refused(shard: Shard, tmp_path: Path) -> None:
    path = tmp_path / "flipped.tar"
    whole = shard.path.read_bytes()
    refused = 0
    for region, offset in regions(shard):
        for bit in (0x01, 0x80):
            data = bytearray(whole)
            data[offset] ^= bit
            path.write_bytes(data)
            said = ""
            try:
                verify_shard(path, shard.index)
            except DamagedDataError as error:
                refused, said = refused + 1, str(error)
            assert said.startswith("flipped.tar"), f"{region} at {offset}: a flipped bit was not seen"
    assert refused > 200


def test_a_cut_anywhere_is_refused(shard: Shard, tmp_path: Path) -> None:
    """At every block and beside it, so at every member boundary too, where a cut tar is a valid tar."""
    path = tmp_path / "cut.tar"
    whole = shard.path.read_bytes()
    last = list(shard.index.values())[-1]
    end = last.offsets[-1] + last.lengths[-1]
    boundaries = {start - BLOCK for entry in shard.index.values() for start in entry.offsets}
    places = {place + delta for place in range(0, end, BLOCK) for delta in (-1, 0, 1)} | {end - 1}
    assert boundaries <= places
    for place in sorted(p for p in places if 0 <= p < end):
        path.write_bytes(whole[:place])
        with pytest.raises(DamagedDataError) as info:
            verify_shard(path, shard.index)
        assert str(info.value).startswith("cut.tar")
        if not whole[place:end].strip(b"\0"):
            continue  # what was cut off were zeros
        path.write_bytes(whole[:place] + bytes(10240))  # as a writer that was closed in order would leave it
        with pytest.raises(DamagedDataError):
            verify_shard(path, shard.index)
    path.write_bytes(bytes(1024))
    with pytest.raises(DamagedDataError, match="ball-0 has 0 of 3 members"):
        verify_shard(path, shard.index)


def test_members_that_are_swapped_doubled_or_added_are_refused(shard: Shard, tmp_path: Path) -> None:
    path = tmp_path / "other.tar"
    found = members(shard.path)
    assert found is not None
    names = list(found)
    orders = [names[::-1], [names[0], names[0], *names[1:]], [*names, "ball-9.json"], names[3:] + names[:3]]
    for order in orders:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in order:
                info = tarfile.TarInfo(name)
                info.size = len(found.get(name, b""))
                tar.addfile(info, io.BytesIO(found.get(name, b"")))
        with pytest.raises(DamagedDataError, match=r"other\.tar"):
            verify_shard(path, shard.index)


def test_an_error_page_in_the_place_of_an_image_is_refused(tmp_path: Path) -> None:
    """The digest fits, since the page is what was written: only decoding tells."""
    sample = small("ball-0")
    page = Plane(codec="webp", data=b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>")
    bad = replace(sample, views=(sample.views[0], replace(sample.views[1], planes={"rgba": page})))
    shard = write_shard([bad], tmp_path / "page.tar")
    with pytest.raises(DamagedDataError, match=r"page\.tar: sample ball-0: ball-0\.001\.rgba\.webp"):
        verify_shard(shard.path, shard.index, decode=True)


def test_a_wrong_view_count_and_a_dotted_key_are_refused(tmp_path: Path) -> None:
    sample = small("ball-0")
    shard = write_shard([sample], tmp_path / "count.tar")
    entry = shard.index["ball-0"]
    fewer = MemberIndex(
        planes=entry.planes, codecs=entry.codecs, num_views=1, offset=entry.offset, lengths=entry.lengths[:2],
        crc32s=entry.crc32s[:2],
    )  # fmt: skip
    with pytest.raises(DamagedDataError, match=r"count\.tar: sample ball-0: .*2 views"):
        verify_shard(shard.path, {"ball-0": fewer})
    with pytest.raises(DamagedDataError, match="needs 5"):
        replace(entry, num_views=4)
    with pytest.raises(SampleError):
        write_shard([replace(sample, views=())], tmp_path / "none.tar")
    assert "." not in replace(sample.asset, uid="a.b/c.glb").key


@pytest.fixture
def corpus(any_store: Store) -> Store:
    plan = corpora.freeze(any_store)
    for one in plan.shards:
        corpora.commit(any_store, one)
    version.publish(any_store, [plan])
    return any_store


def test_a_reader_gives_what_was_written_or_names_shard_and_sample(corpus: Store) -> None:
    """Over a stored shard, flipped or cut in the middle of every block: never another byte, never a short plane."""
    reader = VersionReader(corpus, version.open_version(corpus))
    name = reader.rows["shard_sha256"][0].as_py()
    whole = corpus.get(shard_key(name))
    wanted = {row: reader.read_views(row, [1, 0]).planes for row in range(2)}
    entries = [receipt.member_index(row) for row in reader.rows.slice(0, 2).to_pylist()]
    end = entries[-1].offsets[-1] + entries[-1].lengths[-1]
    harmless = refused = 0
    for place in range(BLOCK // 2, end, BLOCK // 2):
        flipped = bytearray(whole)
        flipped[place] ^= 0x40
        for data in (bytes(flipped), whole[:place]):
            corpora.overwrite(corpus, shard_key(name), data)
            for row, planes in wanted.items():
                said, found = name, planes
                try:
                    found = reader.read_views(row, [1, 0]).planes
                    harmless += 1
                except (DamagedDataError, StoreError) as error:
                    refused += 1
                    said = str(error)
                assert found == planes
                assert name in said
                assert "\n" not in said
    assert refused > 20
    assert harmless > 20


@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "empty"])
def test_publish_refuses_a_shard_of_another_length_and_says_whose_it_is(corpus: Store, damage: str) -> None:
    done = receipt.load(corpus, version.plan_sets(corpus)[0].shards[1].plan_id)
    key = shard_key(str(done.shard_sha256))
    data = corpus.get(key)
    corpora.remove(corpus, key)
    if damage != "missing":
        corpora.overwrite(corpus, key, {"cut": data[:-1], "longer": data + b"x", "empty": b""}[damage])
    with pytest.raises(
        UserError, match=rf"{key} \('ball-3' and 1 more\).*remove {receipt.receipt_key(done.plan_id)} and"
    ):
        version.publish(corpus, version.plan_sets(corpus))
