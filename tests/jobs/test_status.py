"""What `make status` tells, and that it stays true whatever its summaries say."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import runs
from jobs.status import corpus_status, status_text
from pipeline import plan as plans
from pipeline import receipt, summary
from pipeline.plan import PlanSet
from pipeline.receipt import NodeWork, Work, load, receipt_key, tally_of
from pipeline.spec import DatasetSpec, ProceduralSource, ShardSpec, WorkerSpec
from pipeline.store import Store, open_store
from pipeline.types import Failure, FailureKind, Sample
from tests import corpora
from tests.conftest import make_asset

SPEC = DatasetSpec(
    name="priced",
    source=ProceduralSource(num_objects=6),
    shards=ShardSpec(objects_per_shard=3),
    workers=WorkerSpec(num_cpus=2, price_per_cpu_hour=0.5),
)


def freeze(store: Store, count: int = 6) -> PlanSet:
    return plans.freeze(store, SPEC, "f", lambda: [make_asset(f"ball-{i}") for i in range(count)])


def timed(shard: plans.ShardPlan, node: str, ended: str, elapsed_s: float) -> dict[str, Sample | Failure]:
    """Results of a shard, each of which took so long on a node of two CPUs an object."""
    told = {"worker": node, "finished_at": ended, "elapsed_s": elapsed_s, "cpus": 2.0, "gpus": 0.0}
    return {
        uid: replace(result, provenance=dict(result.provenance) | told)
        for uid, result in corpora.results_of(shard).items()
    }


def test_status_tells_speed_time_left_cost_and_nodes(any_store: Store) -> None:
    plan = freeze(any_store, 9)
    corpora.commit(any_store, plan.shards[0], timed(plan.shards[0], "n1", "2026-01-01T00:10:00+00:00", 300.0))
    corpora.commit(any_store, plan.shards[1], timed(plan.shards[1], "n2", "2026-01-01T00:15:00+00:00", 600.0))
    found = corpus_status(any_store)
    (one,) = found["plans"]
    assert (one["planned"], one["samples"], one["failures"], one["open"]) == (9, 5, {"empty_scene": 1}, 3)
    assert one["missing_shards"] == "2"
    # From 00:05 to 00:15 six objects came to an end, and three are left.
    assert one["objects_per_s"] == pytest.approx(6 / 600, abs=1e-4)
    assert one["time_left_s"] == pytest.approx(300, abs=1)
    # 3 * 300 s + 3 * 600 s on two CPUs at 0.50 an hour
    assert one["cost"]["cpu_hours"] == pytest.approx(1.5)
    assert one["cost"]["so_far"] == pytest.approx(0.75)
    assert one["cost"]["left"] == pytest.approx(0.375)
    assert found["nodes"]["n2"] == {
        "objects": 3, "samples": 3, "failures": 0, "busy_s": 1800.0, "seconds_per_object": 600.0,
    }  # fmt: skip
    assert found["nodes"]["n1"]["failures"] == 1
    text = status_text(found)
    assert "9 planned, 5 samples, 1 failures, 3 open" in text
    assert "cost 0.75 so far, 0.375 to go" in text
    dearer = corpus_status(any_store, ["workers.price_per_cpu_hour=1.0"])
    assert dearer["plans"][0]["cost"]["so_far"] == pytest.approx(1.5)


def test_objects_of_the_last_receipt_with_a_kind_of_failure_are_named(any_store: Store) -> None:
    plan, begun = freeze(any_store, 12), "2026-01-01T00:0{}:00+00:00"
    for index, kinds in enumerate(([], ["network", "too_large"], ["network"], ["network"] * 3)):
        shard = plan.shards[index]
        results = timed(shard, "n1", begun.format((1, 3, 5, 4)[index]), 1.0)
        told = dict(next(iter(results.values())).provenance)
        for asset, kind in zip(shard.assets, kinds):
            results[asset.uid] = Failure(
                uid=asset.uid, kind=FailureKind(kind), message="it broke", provenance=told
            )  # fmt: skip
        corpora.commit(any_store, shard, results)
    found = corpus_status(any_store)
    (one,) = found["plans"]
    last = plan.shards[2].assets[0].uid
    assert one["failed_lately"]["network"] == [last], "of the receipt that ended last, though others have more"
    assert one["failed_lately"]["too_large"] == [plan.shards[1].assets[1].uid]
    assert sum(one["failures"].values()) == 7
    assert f"     5 network, such as {last}\n" in status_text(found)
    path = receipt_key(plan.plan_ids[1])
    data = any_store.get(path)
    corpora.overwrite(any_store, path, data[:4] + bytes(100) + data[104:])
    assert not corpus_status(any_store)["plans"][0]["failed_lately"]["too_large"], (
        "names are a help; verify tells the damage"
    )


def test_a_delta_is_told_behind_the_plans_whose_objects_it_makes_anew(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    freeze(store)
    found = corpus_status(store)
    (base,) = found["plans"]
    text = status_text(found | {"plans": [base | {"plan_set": "again", "kind": "delta"}, base]})
    first, second = (line for line in text.splitlines() if "views of" in line)
    assert first.startswith(base["plan_set"])
    assert second.startswith("again: ")
    assert second.endswith("; a delta: older plans still count its objects as they first ended")


def test_receipts_of_releases_that_noted_no_times_leave_speed_and_cost_out(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plan = freeze(store)
    corpora.commit(store, plan.shards[0])  # made-up results name no worker
    one = corpus_status(store)["plans"][0]
    assert (one["objects_per_s"], one["time_left_s"], one["cost"]["objects_timed"]) == (None, None, 0)
    assert one["samples"] == 2


def test_a_run_is_running_while_it_beats_then_stale_and_gone_when_it_ends(any_store: Store) -> None:
    plan = freeze(any_store)
    shards = [(plan.shards[1].plan_id, 1, 3, 2)]
    heart = runs.Heart(any_store, {"plan_sets": [plan.id], "nodes": ["n1"]}, beat_s=0.2)
    heart.start()
    heart.tell({"state": "running", "reason": "", "shards": shards, "making": 1}, at_once=True)
    deadline = time.monotonic() + 20
    while not (found := corpus_status(any_store))["plans"][0]["running"]["objects"]:
        assert time.monotonic() < deadline
    assert found["plans"][0]["running"] == {"objects": 3, "made": 2, "shards": "1"}
    assert found["runs"][0]["state"] == "running"
    time.sleep(1.0)
    assert len(list(any_store.list("runs/"))) <= 2, "old beats are removed"
    heart._beat = lambda: None  # type: ignore[method-assign]  # it falls silent
    time.sleep(1.7)  # S3 tells whole seconds
    found = corpus_status(any_store)
    assert found["plans"][0]["stale"]["shards"] == "1"
    assert found["plans"][0]["running"]["objects"] == 0
    assert "SHARDS=1, their run fell silent" in status_text(found)
    corpora.commit(any_store, plan.shards[1])
    assert corpus_status(any_store)["plans"][0]["stale"]["objects"] == 0, "a receipt counts, whoever died"
    heart.end("ended")
    assert not list(any_store.list("runs/")), "a run that ended well leaves nothing"


def test_a_stopped_run_says_why_until_the_next_run_of_its_plan(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plan = freeze(store)
    first = runs.Heart(store, {"plan_sets": [plan.id]})
    first.start()
    first.end("stopped", "too many failures")
    other = runs.Heart(store, {"plan_sets": ["another"]})
    other.start()
    other.end("ended")
    assert [(run.state, run.reason) for run in runs.look(store)] == [("stopped", "too many failures")]
    assert "stopped: too many failures" in status_text(corpus_status(store))
    again = runs.Heart(store, {"plan_sets": [plan.id]})
    again.start()
    again.end("ended")
    assert not runs.look(store)


def test_what_is_no_sign_of_life_is_passed_over(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    freeze(store)
    for name, data in {"a": b"\xff", "b": b"[1]", "c": b"[" * 100_000, "d": b'{"host": 1}'}.items():
        store.create(f"runs/{name}/000001.json", data)
    assert corpus_status(store)["runs"] == []


# Summaries.


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summaries from four receipts on, so that a test needs few."""
    monkeypatch.setattr(summary, "FEW", 4)


def committed(store: Store, num_shards: int) -> PlanSet:
    plan = freeze(store, 3 * num_shards)
    for shard in plan.shards:
        corpora.commit(store, shard, timed(shard, "n1", "2026-01-01T00:10:00+00:00", 5.0))
    return plan


def truth(store: Store, plan: PlanSet) -> dict[str, receipt.Tally]:
    names = [name for name in plan.plan_ids if store.size(receipt_key(name)) is not None]
    tallies = {name: tally_of(load(store, name)) for name in names}
    return {name: replace(tally, work=replace(tally.work, nodes={})) for name, tally in tallies.items()}


@pytest.mark.usefixtures("few")
def test_a_second_look_reads_no_receipt_and_says_the_same(any_store: Store) -> None:
    plan = committed(any_store, 5)
    first = summary.count(any_store)
    again = summary.count(any_store)
    assert (first.num_read, again.num_read) == (5, 0)
    assert first.tallies == again.tallies == truth(any_store, plan)
    assert first.nodes(plan.plan_ids) == again.nodes(plan.plan_ids)
    assert again.nodes(plan.plan_ids[1:])["n1"] == NodeWork(objects=12, samples=11, busy_s=60.0)
    assert again.nodes([]) == {}
    assert len(list(any_store.list("summaries/"))) == 1


@pytest.mark.usefixtures("few")
def test_a_receipt_that_is_deleted_or_made_anew_is_never_remembered(any_store: Store) -> None:
    plan = committed(any_store, 5)
    summary.count(any_store)
    import obstore

    obstore.delete(any_store.backend, receipt_key(plan.plan_ids[0]))
    obstore.delete(any_store.backend, receipt_key(plan.plan_ids[1]))
    if any_store.url.startswith("s3"):
        time.sleep(1.1)  # S3 tells whole seconds
    shard = plan.shards[1]
    failed = {
        a.uid: Failure(uid=a.uid, kind=FailureKind.NETWORK, message="no route", provenance={"worker": "n1"})
        for a in shard.assets
    }
    corpora.commit(any_store, shard, failed)
    found = summary.count(any_store)
    assert found.tallies == truth(any_store, plan)
    assert plan.plan_ids[0] not in found.tallies
    assert found.tallies[plan.plan_ids[1]].failures == {"network": 3}
    assert found.num_read == 1


@pytest.mark.usefixtures("few")
def test_a_damaged_or_lying_summary_is_passed_over(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plan = committed(store, 5)
    summary.count(store)
    (path,) = (tmp_path / "summaries").iterdir()
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    (tmp_path / "summaries" / f"000000009-{'0' * 64}.parquet").write_bytes(b"PAR1")
    assert summary.count(store).tallies == truth(store, plan)
    path.write_bytes(sound)
    os.utime(path, (time.time() + 9, time.time() + 9))
    assert summary.count(store).num_read == 0


@pytest.mark.usefixtures("few")
def test_a_corpus_that_grows_is_summed_up_rarely_and_read_little(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plan = freeze(store, 3 * 40)
    read = 0
    for shard in plan.shards:
        corpora.commit(store, shard)
        read = summary.count(store).num_read
        assert read <= max(summary.FEW, len(list((tmp_path / "receipts").iterdir())) / summary.SHARE)
    assert 5 <= len(list((tmp_path / "summaries").iterdir())) <= 12
    assert summary.count(store).tallies == truth(store, plan)


def test_a_corpus_that_cannot_be_written_is_still_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "FEW", 4)
    store = open_store(str(tmp_path))
    plan = committed(store, 5)
    (tmp_path / "summaries").write_text("a file where the folder should be")
    assert summary.count(store).tallies == truth(store, plan)


@pytest.mark.parametrize(("seconds", "told"), [(0.0001, "3000 objects/s"), (1.6, "1.88 objects/s")])
def test_a_speed_is_told_without_an_exponent(tmp_path: Path, seconds: float, told: str) -> None:
    store = open_store(str(tmp_path))
    plan = freeze(store, 3)
    corpora.commit(store, plan.shards[0], timed(plan.shards[0], "n1", "2026-01-01T00:10:00+00:00", seconds))
    assert told in status_text(corpus_status(store))


def test_an_outline_is_the_plan_without_its_assets(any_store: Store) -> None:
    plan = freeze(any_store, 8)
    (outline,) = summary.outlines(any_store)
    assert list(outline.plan_ids) == plan.plan_ids
    assert outline.sizes.tolist() == [3, 3, 2]
    assert (outline.id, outline.kind, outline.num_assets, outline.spec_json) == (plan.id, "base", 8, plan.spec_json)


COUNTS, SECONDS = st.integers(0, 10**6), st.integers(0, 2 * 10**9).map(float)
NODES = st.dictionaries(st.text(max_size=20), st.builds(NodeWork, objects=COUNTS, samples=COUNTS, busy_s=SECONDS))
WORK = st.builds(
    Work, objects=COUNTS, cpu_s=SECONDS, gpu_s=SECONDS, begun_s=SECONDS, ended_s=SECONDS, nodes=NODES
)  # fmt: skip


@given(WORK)
def test_work_comes_back_as_it_was_written(work: Work) -> None:
    assert receipt.parse_work(receipt.work_json(work)) == work


ANY_JSON = st.recursive(
    st.none() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
TOLD = st.fixed_dictionaries(
    {"worker": ANY_JSON, "finished_at": ANY_JSON | st.datetimes().map(str), "elapsed_s": ANY_JSON, "cpus": ANY_JSON}
)


@given(ANY_JSON | TOLD)
def test_strange_provenance_is_left_out_of_the_work(told: object) -> None:
    row = {"status": "sample", "provenance": json.dumps(told)}
    work = receipt.work_of([row, row])
    assert receipt.parse_work(receipt.work_json(work)) == work


@given(ANY_JSON)
def test_strange_work_in_a_footer_is_a_typed_error(told: object) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError, OverflowError)):
        receipt.parse_work(json.dumps(told))
