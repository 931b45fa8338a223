"""Every parser of bytes from outside, fuzzed: typed errors only, in bounded time and memory.

Sample JSON, glTF documents and GLB headers are fuzzed beside their own tests; here are tars, receipts, plans, versions,
manifests' rows, and a server's XML.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import tarfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import plan as plans
from pipeline import receipt, uploads, version
from pipeline.canonical import canonical_json, digest_json
from pipeline.reader import DamagedDataError
from pipeline.shard import BLOCK, MemberIndex, verify_shard, write_shard
from pipeline.store import Store, StoreError, open_store
from pipeline.types import UserError
from tests import corpora
from tests.conftest import make_sample

TYPED = (UserError, DamagedDataError, StoreError)


@contextlib.contextmanager
def one_line(*kinds: type[Exception]) -> Iterator[list[str]]:
    """Take an error of these kinds, whose text must be one line; any other fails the test."""
    said: list[str] = []
    try:
        yield said
    except kinds as error:
        said.append(str(error))
    assert all("\n" not in text for text in said)


QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

odd_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([10**400, "9" * 400, -1, 2**31, 2**63, "\x00", "\ud800", [], {}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def spoil(data: st.DataObject, whole: bytes) -> bytes:
    """Flip, cut, double or overwrite some bytes."""
    out = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(out) - 1)))
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "zero", "noise"]))
        if how == "flip" and out:
            out[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del out[at:]
        elif how == "insert":
            out[at:at] = out[: data.draw(st.integers(0, 600))]
        elif how == "zero":
            length = len(out[at : at + 64])
            out[at : at + length] = bytes(length)
        else:
            noise = data.draw(st.binary(max_size=24))
            out[at : at + len(noise)] = noise
    return bytes(out)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = open_store(str(tmp_path_factory.mktemp("parsed") / "c"))
    plan = corpora.freeze(store)
    for one in plan.shards:
        corpora.commit(store, one)
    version.publish(store, [plan])
    return store


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, MemberIndex]]:
    path = tmp_path_factory.mktemp("tar") / "s.tar"
    shard = write_shard([make_sample(f"ball-{i}", num_views=2, size_px=16) for i in range(2)], path)
    return path.read_bytes(), shard.index


@QUICK
@given(st.data())
def test_any_damage_to_a_tar_is_a_typed_error(
    tar: tuple[bytes, dict[str, MemberIndex]], tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(spoil(data, tar[0]))
    with one_line(DamagedDataError) as said:
        verify_shard(path, tar[1], decode=True)
    assert not said or said[0].startswith("x.tar")


@QUICK
@given(fields=st.dictionaries(st.integers(0, 500), st.binary(min_size=1, max_size=12), max_size=5), rest=st.binary())
def test_any_tar_header_with_a_right_checksum_is_a_typed_error(
    tar: tuple[bytes, dict[str, MemberIndex]], tmp_path: Path, fields: dict[int, bytes], rest: bytes
) -> None:
    """Headers that pass tar's own checksum: absurd sizes, links, sparse and extended members, devices."""
    header = bytearray(tar[0][:BLOCK])
    for at, value in fields.items():
        header[at : at + len(value)] = value
    header = header[:BLOCK].ljust(BLOCK, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(header) + rest + bytes(1024))
    with pytest.raises(DamagedDataError):
        verify_shard(path, tar[1])


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE, tarfile.REGTYPE])
def test_a_header_that_claims_gigabytes_costs_neither_memory_nor_time(
    tar: tuple[bytes, dict[str, MemberIndex]], tmp_path: Path, kind: bytes
) -> None:
    info = tarfile.TarInfo("ball-0.json")
    info.size, info.type = 8 * 2**30 - 1, kind
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + tar[0])
    tracemalloc.start()
    begun = time.monotonic()
    with pytest.raises(DamagedDataError):
        verify_shard(path, tar[1])
    assert time.monotonic() - begun < 5
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def key_of(corpus: Store, part: str) -> str:
    return next(item.key for item in corpus.list(part))


@QUICK
@given(st.data())
def test_any_damage_to_a_receipt_is_a_typed_error(corpus: Store, data: st.DataObject) -> None:
    key = key_of(corpus, "receipts/")
    plan_id = Path(key).stem
    with one_line(*TYPED):
        done = receipt.from_parquet(spoil(data, corpus.get(key)), plan_id, corpus.url)
        for row in done.rows.to_pylist():
            if row["status"] == "sample":
                receipt.member_index(row)
            receipt.quality_of(row)


def altered(data: st.DataObject, whole: bytes) -> bytes:
    """Rewrite a Parquet file with a column dropped, doubled, emptied or of another type, or other metadata."""
    table = pq.read_table(io.BytesIO(whole))
    metadata = dict(table.schema.metadata or {})
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(table.column_names))
        at = table.column_names.index(name)
        how = data.draw(st.sampled_from(["drop", "null", "type", "rows", "metadata", "lose"]))
        if how == "drop" and table.num_columns > 1:
            table = table.drop_columns([name])
        elif how == "null":
            table = table.set_column(at, name, pa.nulls(table.num_rows, table.schema.field(at).type))
        elif how == "type":
            value = data.draw(
                st.sampled_from([["x"] * table.num_rows, [-1] * table.num_rows, [[2**31]] * table.num_rows,
                                 [b"\xff\xfe"] * table.num_rows, [2.5] * table.num_rows])
            )  # fmt: skip
            table = table.set_column(at, name, pa.array(value))
        elif how == "rows":
            table = table.slice(0, data.draw(st.integers(0, table.num_rows)))
        elif how == "metadata" and metadata:
            field = data.draw(st.sampled_from(sorted(metadata)))
            metadata[field] = data.draw(st.sampled_from([b"", b"-1", b"\xff", b"nan", b"9" * 30, b"{}", b"1"]))
        elif metadata:
            metadata.pop(data.draw(st.sampled_from(sorted(metadata))))
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink)
    return sink.getvalue()


@QUICK
@given(st.data())
def test_a_receipt_of_other_contents_is_a_typed_error_or_consistent(corpus: Store, data: st.DataObject) -> None:
    key = key_of(corpus, "receipts/")
    with one_line(*TYPED):
        done = receipt.from_parquet(altered(data, corpus.get(key)), Path(key).stem, corpus.url)
        for row in done.rows.to_pylist():
            if row["status"] == "sample":
                receipt.member_index(row)
            receipt.quality_of(row)


@QUICK
@given(st.data())
def test_any_damage_to_a_plan_is_a_typed_error_or_the_same_plan(corpus: Store, data: st.DataObject) -> None:
    key = key_of(corpus, "plans/")
    whole = corpus.get(key)
    change = data.draw(st.sampled_from([spoil, altered]))
    with one_line(UserError):
        found = plans.from_parquet(change(data, whole), Path(key).stem, corpus.url)
        wanted = plans.from_parquet(whole, Path(key).stem, corpus.url)
        assert list(found.shards) == list(wanted.shards)[: len(found.shards)], (
            "a shard's work cannot change under its digest"
        )


@QUICK
@given(st.data())
def test_any_version_record_is_a_typed_error_or_valid(tmp_path: Path, corpus: Store, data: st.DataObject) -> None:
    """Also one whose digest fits: a record of another program, or of nobody."""
    record: Any = json.loads(corpus.get(version.version_key(1)))
    change = data.draw(st.sampled_from(["bytes", "value", "signed"]))
    raw = b""
    if change == "bytes":
        raw = spoil(data, canonical_json(record))
    else:
        target = record = copy.deepcopy(record)
        for _ in range(data.draw(st.integers(0, 2))):
            inner = [value for value in target.values() if isinstance(value, dict) and value]
            if inner:
                target = data.draw(st.sampled_from(inner))
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(odd_values)
        if change == "signed":
            body = {name: value for name, value in record.items() if name not in version.NOT_IN_DIGEST}
            try:
                record["digest"] = digest_json(body)
            except ValueError:  # NaN has no canonical form
                return
        raw = json.dumps(record).encode("utf-8", "surrogatepass")
    folder = tmp_path / "c/versions"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "000001.json").write_bytes(raw)
    store = open_store(str(tmp_path / "c"))
    with one_line(*TYPED):
        version.open_rows(store, version.open_version(store, 1))


@pytest.mark.parametrize("odd", ["Infinity", "-Infinity", "NaN", "1e999", "[" * 5000 + "]" * 5000])
def test_what_has_no_canonical_text_is_no_version(tmp_path: Path, corpus: Store, odd: str) -> None:
    text = corpus.get(version.version_key(1)).decode().replace('"heldout":0', f'"heldout":{odd}')
    assert odd in text
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions/000001.json").write_text(text)
    with pytest.raises(UserError, match=r"version 1 is not readable: .*(not a finite number|nested too deeply)"):
        version.open_version(open_store(str(tmp_path)), 1)


@QUICK
@given(st.dictionaries(st.sampled_from(["planes", "codecs", "num_views", "offset", "lengths", "crc32s"]), odd_values))
def test_any_row_of_a_manifest_is_a_typed_error_or_an_index(corpus: Store, changes: dict[str, Any]) -> None:
    rows = version.open_rows(corpus, version.open_version(corpus)).to_pylist()
    row = next(row for row in rows if row["status"] == "sample")
    try:
        entry = receipt.member_index(row | changes)
    except DamagedDataError:
        return
    assert len(entry.offsets) == 1 + entry.num_views * len(entry.planes)


LISTED = b"""<?xml version="1.0"?><ListMultipartUploadsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
<IsTruncated>false</IsTruncated><Upload><Key>p/k</Key><UploadId>1</UploadId><Initiated>2026-01-02T03:04:05.000Z</Initiated>
</Upload></ListMultipartUploadsResult>"""


@QUICK
@given(st.data())
def test_any_list_of_uploads_is_a_typed_error_or_a_list(data: st.DataObject) -> None:
    change = data.draw(st.booleans())
    body = spoil(data, LISTED) if change else data.draw(st.binary(max_size=100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "_request", lambda *_, **__: body)
        with one_line(uploads.UploadsError):
            found = list(uploads.list_uploads("s3://b/p"))
            assert all(one.key.startswith("p/") for one in found)


def test_a_list_of_uploads_that_grows_by_its_entities_is_refused() -> None:
    lines = [f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12)]
    bomb = f'<!DOCTYPE x [<!ENTITY a0 "0123456789">{"".join(lines)}]><x>&a11;</x>'.encode()
    with pytest.raises(uploads.UploadsError):
        uploads._parse(bomb)
