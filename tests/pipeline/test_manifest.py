"""Merging as columns says what merging row by row would."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import manifest, receipt, version
from pipeline.canonical import canonical_json
from pipeline.diff import same_contents
from pipeline.listing import Listing, last_of_each
from pipeline.plan import assets_table
from pipeline.quality import judge
from pipeline.spec import AdmissionSpec
from pipeline.store import open_store
from pipeline.types import FailureKind
from tests.conftest import make_asset
from tests.pipeline.histories import SPEC, Workshop, changed_spec

SHARES = st.floats(0, 1) | st.just(1.0)
VIEWS = st.fixed_dictionaries(
    {}, optional={name: st.lists(SHARES, min_size=3, max_size=3) for name in ("alpha_coverage", "black", "clipped")}
)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "mean_alpha_coverage": st.floats(0, 1), "thickness_min": st.floats(0, 1), "views": VIEWS,
        "flags": st.lists(st.sampled_from(["single_colour", "untextured"]), max_size=2),
        "num_triangles": st.integers(0, 9),
        "nested": st.fixed_dictionaries({"a": st.integers(), "views": VIEWS}), "zeta": st.text(max_size=5),
        "phash": st.just("0" * 64), "text": st.sampled_from([',"views":{', "}", "{"]),
    },
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(record=RECORDS)
def test_a_cut_record_is_judged_like_the_whole(record: dict[str, Any]) -> None:
    text = canonical_json(record).decode()
    head, seen = manifest._split_record(text)
    assert json.loads(head) == {name: value for name, value in record.items() if name != "views"}
    for rules in (AdmissionSpec(), AdmissionSpec(min_thickness=0.5, admit_untextured=False, min_alpha_coverage=0.5)):
        assert judge(seen, rules) == judge(record, rules)


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(*(st.lists(st.integers(0, 2), max_size=3) for _ in range(2))), max_size=8))
def test_contents_are_compared_member_by_member(pairs: list[tuple[list[int], list[int]]]) -> None:
    def table(which: int) -> pa.Table:
        values = [pair[which] for pair in pairs]
        return pa.table(
            {
                "lengths": pa.array([[1] * len(one) for one in values], pa.list_(pa.int32())),
                "crc32s": pa.array(values, pa.list_(pa.uint32())),
            }
        )

    assert same_contents(table(0), table(1)).tolist() == [a == b for a, b in pairs]


@settings(max_examples=100, deadline=None)
@given(names=st.lists(st.sampled_from("abcd"), max_size=12))
def test_the_last_row_of_each_object_counts(names: list[str]) -> None:
    table = pa.table(
        {"source": ["s"] * len(names), "uid": pa.array(names, pa.string()), "at": pa.array(range(len(names)))}
    )
    assert last_of_each(table)["at"].to_pylist() == sorted({name: i for i, name in enumerate(names)}.values())


DIGESTS = st.none() | st.sampled_from(["1" * 64, "2" * 64])
SIZES = st.none() | st.integers(1, 2)


@settings(max_examples=150, deadline=None)
@given(theirs=st.tuples(DIGESTS, SIZES), ours=st.tuples(DIGESTS, SIZES), listed=st.booleans())
def test_an_object_is_found_where_its_bytes_are_the_same(
    theirs: tuple[str | None, int | None], ours: tuple[str | None, int | None], listed: bool
) -> None:
    listing = Listing.of(assets_table([make_asset("x"), make_asset("a", sha256=ours[0], num_bytes=ours[1])]))
    rows = pa.table(
        {
            "source": ["fake"], "uid": ["a" if listed else "b"],
            "asset_sha256": pa.array([theirs[0]], pa.string()), "asset_bytes": pa.array([theirs[1]], pa.int64()),
        }
    )  # fmt: skip
    if None not in (theirs[0], ours[0]):
        same = theirs[0] == ours[0]
    else:
        same = None in (theirs[1], ours[1]) or theirs[1] == ours[1]
    assert listing.places(rows).tolist() == [1 if listed and same else -1]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("manifest") / "corpus"
    fails = {"b-03": FailureKind.RENDER_TIMEOUT, "b-04": FailureKind.EMPTY_SCENE}
    shop = Workshop(open_store(str(folder)), changed_spec(shards={"objects_per_shard": 4}), fails=fails)
    shop.put(f"b-{i:02d}" for i in range(14))
    shop.dataset()
    return shop


def test_processes_merge_what_threads_do(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = version.plan_sets(shop.store)
    threads = manifest.merge_plans(shop.store, plans, SPEC).table
    monkeypatch.setattr(manifest, "_MANY_RECEIPTS", 1)
    monkeypatch.setattr(manifest, "_BATCH", 2)
    assert manifest.merge_plans(shop.store, plans, SPEC).table.equals(threads)
    receipts = manifest.load_receipts(shop.store, plans[0].plan_ids)
    assert manifest.merge(receipts, SPEC).equals(threads)


def test_a_footer_tells_what_the_rows_do(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    for plan_id, num_bytes in manifest.receipt_sizes(shop.store).items():
        done = receipt.load(shop.store, plan_id)
        assert receipt.tally(shop.store, plan_id, num_bytes) == receipt.tally_of(done)
        with monkeypatch.context() as patch:
            patch.setattr(receipt, "_FOOTER_BYTES", 64)  # less than the footer: the whole file is read
            assert receipt.tally(shop.store, plan_id, num_bytes) == receipt.tally_of(done)


def test_a_receipt_of_before_is_counted_by_its_rows(shop: Workshop, tmp_path: Path) -> None:
    plan_id, _ = next(iter(manifest.receipt_sizes(shop.store).items()))
    table = pq.read_table(pa.BufferReader(shop.store.get(receipt.receipt_key(plan_id))))
    metadata = {name: value for name, value in table.schema.metadata.items() if name != b"failures"}
    path = tmp_path / "old" / receipt.receipt_key(plan_id)
    path.parent.mkdir(parents=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)
    old = open_store(str(tmp_path / "old"))
    assert receipt.tally(old, plan_id, path.stat().st_size) == receipt.tally_of(receipt.load(shop.store, plan_id))


def test_views_stay_in_the_receipt_and_out_of_the_manifest(shop: Workshop) -> None:
    rows = version.open_rows(shop.store, version.open_version(shop.store))
    assert rows.schema.equals(manifest.STABLE)
    assert not any("views" in (text or "") for text in rows["quality"].to_pylist())
    assert math.isclose(json.loads(rows["quality"][0].as_py())["mean_alpha_coverage"], 0.5)
    assert np.all(np.diff([int(uid[2:]) for uid in rows["uid"].to_pylist()]) == 1)
