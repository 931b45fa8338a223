"""Shards, byte by byte: headers are tarfile's, every damage is found, a shard of copies is a shard."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sample import SampleError, sample_members
from pipeline.shard import MODE, DamagedDataError, Shard, member_header, verify_shard, write_shard
from tests.conftest import make_sample

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_.", min_size=1, max_size=100)


@settings(max_examples=200, deadline=None)
@given(name=NAMES, size=st.integers(0, 8**11 - 1))
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, MODE
    assert member_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_name_or_size_that_does_not_fit_is_refused() -> None:
    for name, size in (("a" * 101, 1), ("", 1), ("a", 8**11)):
        with pytest.raises(SampleError, match="does not fit a tar header"):
            member_header(name, size)


@pytest.mark.parametrize("num_views", [1, 3, 5])
def test_a_shard_is_what_tarfile_would_write(tmp_path: Path, num_views: int) -> None:
    samples = [make_sample(f"ball-{i}", num_views=num_views, size_px=16) for i in range(3)]
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for name, data in sample_members(sample):
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.mode = len(data), 0, MODE
                tar.addfile(info, io.BytesIO(data))
    shard = write_shard(samples, tmp_path / "x.tar")
    assert shard.path.read_bytes() == sink.getvalue()
    assert shard.num_bytes == len(sink.getvalue())
    verify_shard(shard.path, shard.index, decode=True)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    samples = [make_sample(f"ball-{i}", num_views=2, size_px=16) for i in range(2)]
    return write_shard(samples, tmp_path_factory.mktemp("shard") / "x.tar")


@settings(max_examples=150, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(shard: Shard, at: float, bit: int) -> None:
    """In a member, a header, the padding behind a member or the end of the archive."""
    data = bytearray(shard.path.read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    damaged = shard.path.with_name("damaged.tar")
    damaged.write_bytes(data)
    with pytest.raises(DamagedDataError, match=r"damaged\.tar"):
        verify_shard(damaged, shard.index)


@settings(max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True))
def test_any_cut_and_any_addition_is_found(shard: Shard, at: float) -> None:
    data = shard.path.read_bytes()
    damaged = shard.path.with_name("cut.tar")
    for other in (data[: int(at * len(data))], data + bytes(1 + int(at * 20480))):
        damaged.write_bytes(other)
        with pytest.raises(DamagedDataError, match=r"cut\.tar"):
            verify_shard(damaged, shard.index)


def test_a_cut_at_a_member_says_how_many_are_there(shard: Shard, tmp_path: Path) -> None:
    entry = shard.index["ball-1"]
    path = tmp_path / "cut.tar"
    path.write_bytes(shard.path.read_bytes()[: entry.offsets[2] - 512])
    with pytest.raises(DamagedDataError, match="sample ball-1 has 2 of 3 members"):
        verify_shard(path, shard.index)
    path.write_bytes(shard.path.read_bytes())
    with pytest.raises(DamagedDataError, match=r"member 'ball-1\.json' is not in the index"):
        verify_shard(path, {"ball-0": shard.index["ball-0"]})


def test_an_exception_leaves_no_file(tmp_path: Path) -> None:
    good = make_sample("ball-0", num_views=1, size_px=16)
    with pytest.raises(SampleError, match="comes twice"):
        write_shard([good, good], tmp_path / "x.tar")
    with pytest.raises(SampleError, match=r"are not 0\.\.N-1"):
        write_shard([replace(good, views=())], tmp_path / "x.tar")
    assert list(tmp_path.iterdir()) == []
