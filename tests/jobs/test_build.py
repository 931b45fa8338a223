"""The Ray job on a real local Ray, with producers that need no Blender."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs.build import build
from jobs.status import corpus_status, status_text
from pipeline import version
from pipeline.reader import VersionReader
from pipeline.receipt import load, receipt_key
from pipeline.spec import DatasetSpec, LimitSpec, ProceduralSource, ShardSpec
from pipeline.store import open_store
from tests.jobs import fakes


def make_spec(num_objects: int = 7, per_shard: int = 3) -> DatasetSpec:
    return DatasetSpec(
        name="fake",
        source=ProceduralSource(num_objects=num_objects),
        shards=ShardSpec(objects_per_shard=per_shard),
        limits=LimitSpec(max_attempts=2),
    )


def files(corpus: Path) -> dict[str, bytes]:
    return {str(p.relative_to(corpus)): p.read_bytes() for p in sorted(corpus.rglob("*")) if p.is_file()}


def test_every_object_is_accounted_for_and_running_again_does_nothing(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    first = build(make_spec(), str(corpus), "0-1", produce=fakes.produce, show_progress=False)
    assert (first.planned, first.samples, first.failures) == (6, 5, {"empty_scene": 1})
    assert first.accounted
    rest = build(make_spec(), str(corpus), produce=fakes.produce, show_progress=False)
    assert (rest.shards_asked, rest.shards_done_before, rest.shards_committed) == (3, 2, 1)
    before, begun = files(corpus), time.monotonic()
    again = build(make_spec(), str(corpus), produce=fakes.produce, show_progress=False)
    assert time.monotonic() - begun < 2, "nothing to do must not start Ray"
    assert (again.shards_committed, again.samples, again.accounted) == (0, 6, True)
    assert files(corpus) == before


def test_a_deleted_receipt_rebuilds_that_shard_with_the_same_bytes(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    build(make_spec(), str(corpus), produce=fakes.produce, show_progress=False)
    store = open_store(str(corpus))
    plan = version.plan_sets(store)[0]
    before = files(corpus)
    gone = load(store, plan.shards[1].plan_id)
    (corpus / receipt_key(gone.plan_id)).unlink()
    (corpus / "shards" / f"{gone.shard_sha256}.tar").unlink()
    again = build(make_spec(), str(corpus), produce=fakes.produce, show_progress=False)
    assert again.shards_committed == 1
    after = files(corpus)
    assert sorted(after) == sorted(before)
    assert {n: d for n, d in after.items() if n.startswith("shards/")} == {
        n: d for n, d in before.items() if n.startswith("shards/")
    }


def test_a_killed_worker_costs_its_object_only(tmp_path: Path) -> None:
    summary = build(make_spec(4, 4), str(tmp_path / "c"), produce=fakes.produce_deadly, show_progress=False)
    assert summary.accounted
    assert summary.failures == {"quarantined": 1, "internal": 1}
    store = open_store(str(tmp_path / "c"))
    rows = load(store, version.plan_sets(store)[0].shards[0].plan_id).rows.to_pylist()
    dead = next(row for row in rows if row["failure_kind"] == "quarantined")
    assert (dead["uid"], dead["attempts"]) == ("procedural-1", 2)


def test_a_killed_driver_loses_no_committed_shard(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    driver = start_driver(corpus)
    wait_for(
        lambda: len(list((corpus / "receipts").glob("*.parquet"))) >= 2 if (corpus / "receipts").exists() else False
    )
    driver.kill()
    driver.wait()
    # An assembly that outlives the driver for a moment may still be writing under a temporary name.
    kept = {name: digest for name, digest in files(corpus / "receipts").items() if name.endswith(".parquet")}
    summary = build(make_spec(24, 3), str(corpus), produce=fakes.produce_slowly, show_progress=False)
    assert summary.accounted
    assert summary.shards_done_before >= 2
    after = files(corpus / "receipts")
    assert {name: after[name] for name in kept} == kept
    clean = build(make_spec(24, 3), str(tmp_path / "clean"), produce=fakes.produce_slowly, show_progress=False)
    assert clean.accounted
    digests = []
    for name in ("corpus", "clean"):
        store = open_store(str(tmp_path / name))
        digests.append(version.publish(store, version.plan_sets(store))[0].digest)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_within_ten_seconds_and_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    corpus = tmp_path / "corpus"
    driver = start_driver(corpus)
    wait_for(lambda: any((corpus / "receipts").glob("*.parquet")) if (corpus / "receipts").exists() else False)
    tree = psutil.Process(driver.pid).children(recursive=True)
    begun = time.monotonic()
    driver.send_signal(number)
    assert driver.wait(timeout=20) != 0
    assert time.monotonic() - begun < 10
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not alive, [p.name() for p in alive]
    store = open_store(str(corpus))
    assert all(load(store, path.stem).rows.num_rows for path in (corpus / "receipts").glob("*.parquet"))


def test_status_tells_where_a_corpus_stands(tmp_path: Path) -> None:
    corpus = str(tmp_path / "c")
    build(make_spec(), corpus, "0,2", produce=fakes.produce, show_progress=False)
    found = corpus_status(open_store(corpus))
    plan = found["plans"][0]
    assert plan["missing_shards"] == "1"
    assert (plan["planned"], plan["samples"], plan["failures"]) == (7, 4, {})
    assert "missing SHARDS=1" in status_text(found)


def test_a_corpus_on_s3_is_built_and_read(s3_url: str) -> None:
    corpus = f"{s3_url}/built"
    assert build(make_spec(), corpus, produce=fakes.produce, show_progress=False).accounted
    store = open_store(corpus)
    version.publish(store, version.plan_sets(store))
    reader = VersionReader.open(corpus)
    assert len(reader) == 6
    assert len(reader.read_views(5, [0, 3]).planes) == 2


def start_driver(corpus: Path) -> subprocess.Popen[bytes]:
    code = (
        "from jobs.build import build\nfrom tests.jobs import fakes\nfrom tests.jobs.test_build import make_spec\n"
        f"build(make_spec(24, 3), {str(corpus)!r}, produce=fakes.produce_slowly, show_progress=False)\n"
    )
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": str(root)})


def wait_for(condition: object, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)
