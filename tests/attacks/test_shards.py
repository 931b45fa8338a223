"""A corpus made by an attacker: shards, receipts and versions that fit one another and mean harm.

Bytes that do not fit (flips, cuts, wrong digests, swapped and added members, headers that claim gigabytes, records of
any contents) are the business of tests/pipeline/test_damage.py, test_parsers.py and tests/lrm/test_loader.py. Here the
attacker knows the format and signs what he wrote, so that every digest is right.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrm.data import view_loader
from lrm.loader import LoaderOptions
from pipeline import receipt, version
from pipeline.canonical import digest_json
from pipeline.reader import DamagedDataError, VersionReader
from pipeline.sample import SampleError, decode_rgba
from pipeline.shard import BLOCK, shard_key
from pipeline.store import Store, StoreError, open_store
from pipeline.types import Plane, Sample, UserError, View
from tests import corpora
from tests.attacks.outside import png
from tests.conftest import make_sample
from tests.lrm.conftest import build_corpus

SIZE_PX = 16
TYPED = (UserError, DamagedDataError, StoreError)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self._mark, "unpickled")


def with_plane(data: bytes, uid: str) -> Sample:
    """A sample of a ball whose pictures are these bytes."""
    honest = make_sample(uid, num_views=2, size_px=SIZE_PX)
    views = tuple(
        View(index=v.index, camera=v.camera, planes={"rgba": Plane(codec="webp", data=data)}) for v in honest.views
    )
    values = {name: getattr(honest, name) for name in ("asset", "seed", "normalization", "quality", "lights")}
    return Sample(spec_fingerprint="f", views=views, **values)


def published(folder: Path, data: bytes) -> str:
    """Write and publish a corpus whose every picture is these bytes, with all digests right."""
    store = open_store(str(folder))
    frozen = corpora.freeze(store, 3)
    for shard in frozen.shards:
        results = {asset.uid: with_plane(data, asset.uid) for asset in shard.assets}
        corpora.commit(store, shard, results)
    version.publish(store, [frozen])
    return str(folder)


def read_all(corpus: str) -> None:
    with view_loader(
        corpus, num_views=2, image_px=SIZE_PX, background=None, batch_size=1,
        options=LoaderOptions(max_damaged_samples=0),
    ) as loader:  # fmt: skip
        next(loader)


def test_a_pickle_in_the_place_of_a_picture_is_damage_and_never_loaded(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    corpus = published(tmp_path / "corpus", pickle.dumps(Trap(mark)))
    with pytest.raises(DamagedDataError):
        read_all(corpus)
    checked = version.verify_version(open_store(corpus), deep=True)
    assert checked.problems
    assert not mark.exists()


def test_pickle_members_beside_the_pictures_are_never_loaded(tmp_path: Path) -> None:
    """A plain reader of WebDataset would decode `.pickle` and `.pth`; ours goes by its index."""
    mark = tmp_path / "mark"
    corpus = build_corpus(tmp_path / "corpus", num_objects=4, num_views=2, size_px=SIZE_PX)
    VersionReader.open(corpus).index  # noqa: B018
    bait = pickle.dumps(Trap(mark))
    for path in (Path(corpus) / "shards").glob("*.tar"):
        whole = path.read_bytes()
        end = whole.rstrip(b"\0")
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name in ("ball-0.pickle", "ball-0.pth", "ball-0.pyd"):
                info = tarfile.TarInfo(name)
                info.size = len(bait)
                tar.addfile(info, io.BytesIO(bait))
        path.chmod(0o644)
        path.write_bytes(end + b"\0" * (-len(end) % BLOCK) + sink.getvalue())
    read_all(corpus)
    assert not mark.exists()


def webp_of(width: int, height: int) -> bytes:
    """The header of a lossless WebP with alpha."""
    bits = (width - 1) | (height - 1) << 14 | 1 << 28
    body = b"VP8L" + struct.pack("<IBI", 5, 0x2F, bits) + b"\0"
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("data", [png(30_000, 30_000, rows=2), webp_of(16_000, 16_000)], ids=["png", "webp"])
def test_a_picture_of_absurd_size_is_refused_by_its_header(tmp_path: Path, data: bytes) -> None:
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(SampleError, match="a view has at most 4096 x 4096"):
        decode_rgba(data)
    with pytest.raises(DamagedDataError):
        read_all(published(tmp_path / "corpus", data))
    assert time.monotonic() - begun < 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 5 * 10**8


def forge_rows(store: Store, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the rows of every receipt, keeping its schema and its metadata."""
    for item in list(store.list("receipts/")):
        table = pq.read_table(io.BytesIO(store.get(item.key)))
        rows = table.to_pylist()
        for row in rows:
            if row["status"] == "sample":
                change(row)
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sink)
        path = Path(store.url.removeprefix("file://")) / item.key
        path.chmod(0o644)
        path.write_bytes(sink.getvalue())


FORGERIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a view of two gigabytes": lambda row: row["lengths"].__setitem__(1, 2**31 - 1),
    "a view before the shard": lambda row: row.__setitem__("offset", -(2**40)),
    "a view beyond the shard": lambda row: row.__setitem__("offset", 2**62),
    "a million views": lambda row: row.__setitem__("num_views", 10**6),
    "views that overlap": lambda row: row["lengths"].__setitem__(1, row["lengths"][1] + 10_000),
    "a shard by a path": lambda row: row.__setitem__("shard_sha256", "../../../etc/passwd"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_receipt_is_refused_when_it_is_published_or_read(tmp_path: Path, name: str) -> None:
    store = open_store(str(tmp_path / "corpus"))
    frozen = corpora.freeze(store, 3)
    for shard in frozen.shards:
        corpora.commit(store, shard)
    forge_rows(store, FORGERIES[name])
    begun = time.monotonic()

    def publish_and_read() -> None:
        version.publish(store, [frozen])
        read_all(str(tmp_path / "corpus"))

    with pytest.raises(TYPED) as caught:
        publish_and_read()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 10


def forge_version(store: Store, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the version's record and sign it anew: its digest is no secret's."""
    key = version.version_key(1)
    record: dict[str, Any] = json.loads(store.get(key))
    change(record)
    body = {name: value for name, value in record.items() if name not in version.NOT_IN_DIGEST}
    record["digest"] = digest_json(body)
    path = Path(store.url.removeprefix("file://")) / key
    path.chmod(0o644)
    path.write_text(json.dumps(record))


def test_a_forged_version_names_no_file_outside_the_corpus(tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path / "corpus", num_objects=4, num_views=2, size_px=SIZE_PX)
    store = open_store(corpus)
    (tmp_path / "secret.parquet").write_bytes(b"a canary")
    for manifest in ("../../secret", "/etc/passwd", "..", "x" * 10_000, "a\nb", 3, None):
        forge_version(store, lambda record, manifest=manifest: record.__setitem__("manifest", manifest))
        with pytest.raises(TYPED) as caught:
            read_all(corpus)
        assert "canary" not in str(caught.value)
        assert len(str(caught.value)) < 2000


def test_crc_of_the_bait_is_what_the_index_says(tmp_path: Path) -> None:
    """The attacker's corpus is consistent: only what the bytes are is wrong."""
    data = pickle.dumps(Trap(tmp_path / "mark"))
    corpus = published(tmp_path / "corpus", data)
    row = next(row for row in VersionReader.open(corpus).rows.to_pylist() if row["status"] == "sample")
    entry = receipt.member_index(row)
    content = (Path(corpus) / shard_key(row["shard_sha256"])).read_bytes()
    assert content[entry.offsets[1] : entry.offsets[1] + entry.lengths[1]] == data
    assert entry.crc32s[1] == zlib.crc32(data)
