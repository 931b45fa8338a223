"""What `make why` tells of one object."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import pytest

from jobs import runs
from jobs.kinds import MEANINGS
from jobs.logs import trace_of
from jobs.why import explain, why_text
from pipeline import plan as plans
from pipeline import version
from pipeline.store import Store, open_store
from pipeline.types import Failure, FailureKind, UserError
from tests import corpora

TOLD = {
    "worker": "node-7", "finished_at": "2026-01-01T00:00:09+00:00", "elapsed_s": 9.0, "device": "CPU",
    "seconds": {"render": 7.5, "encode": 1.5},
}  # fmt: skip


def built(store: Store) -> plans.PlanSet:
    """Five balls of which ball-1 fails for good and ball-2 at first; two versions, ball-0 withdrawn in the second."""
    plan = corpora.freeze(store)
    for shard in plan.shards:
        results = corpora.results_of(shard)
        for uid, result in results.items():
            results[uid] = replace(result, provenance=TOLD)
        if "ball-2" in results:
            results["ball-2"] = Failure(
                uid="ball-2", kind=FailureKind.RENDER_TIMEOUT, message="Blender took longer than 3600 s", attempts=2,
                log_tail="Fra:1 Mem:10M\nlast words", provenance=TOLD,
            )  # fmt: skip
        corpora.commit(store, shard, results)
    wanted = [asset for asset in plan.shards[0].assets if asset.uid == "ball-2"]
    delta = plans.draft(
        corpora.SPEC, "f", wanted, plan_set_id=plans.delta_id("f" * 16, 1), kind="delta", number=1, producer="blender 4"
    )
    delta, _ = plans.put(store, delta)
    corpora.commit(store, delta.shards[0])
    version.publish(store, version.plan_sets(store), corpora.SPEC)
    version.tombstone(store, ["ball-0"])
    return plan


def test_a_sample_is_told_with_all_its_places_and_drawn(any_store: Store, tmp_path: Path) -> None:
    plan = built(any_store)
    found = explain(any_store, "ball-0", tmp_path / "out")
    (row,) = found["rows"]
    assert (row["status"], row["shard"], row["plan_set"]) == ("sample", 0, plan.id)
    assert any_store.size(row["shard_key"]) == row["shard_bytes"]
    assert [(v["version"], v["status"], v["withdrawn_by_hand"]) for v in found["versions"]] == [
        (2, "failure", True), (1, "sample", False),
    ]  # fmt: skip
    picture = cv2.imread(found["sheet"])
    assert picture is not None
    assert picture.shape[1] == 2 * 192, "two views side by side"
    assert len({tuple(pixel) for pixel in picture[96, :192:8].tolist()}) > 1, "the ball is seen"
    text = why_text(found)
    for words in ("node-7", "render 7.50", "CC0-1.0", "withdrawn by hand", row["shard_key"], trace_of("f", "ball-0")):
        assert words in text


def test_a_failure_is_told_with_its_meaning_its_tries_and_its_log(any_store: Store) -> None:
    built(any_store)
    found = explain(any_store, "ball-2")
    first, second = sorted(found["rows"], key=lambda row: row["plan_kind"])
    assert (first["plan_kind"], first["failure_kind"], first["attempts"]) == ("base", "render_timeout", 2)
    assert (second["plan_kind"], second["status"]) == ("delta", "sample")
    text = why_text(found)
    for words in ("Blender took longer", "may end otherwise", "make retry", "| last words", "version 1: sample"):
        assert words in text


def test_an_open_object_says_who_has_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plan = corpora.freeze(store)
    assert "held by no run" in why_text(explain(store, "ball-4"))
    heart = runs.Heart(store, {"plan_sets": [plan.id]})
    heart.start()
    shards = [(plan.shards[1].plan_id, 1, 2, 0)]
    heart.tell({"state": "running", "reason": "", "shards": shards}, at_once=True)
    heart.end("stopped", "130 of the last 200 objects failed")
    assert "stopped: 130 of the last" in why_text(explain(store, "ball-4"))


def test_a_uid_that_is_not_there_is_one_line_with_a_hint(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(UserError, match="no plan yet"):
        explain(store, "ball-0")
    corpora.freeze(store)
    with pytest.raises(UserError, match="did you mean 'ball-"):
        explain(store, "bal-0")
    with pytest.raises(UserError, match="UID is empty"):
        explain(store, "")


def test_a_damaged_shard_costs_the_sheet_alone(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "c"))
    built(store)
    key = explain(store, "ball-0")["rows"][0]["shard_key"]
    path = tmp_path / "c" / key
    data = bytearray(path.read_bytes())
    data[2000:] = bytes(len(data) - 2000)
    path.write_bytes(data)
    found = explain(store, "ball-0", tmp_path / "out")
    assert found["sheet"].startswith("could not be drawn: ")
    assert not (tmp_path / "out").exists()


def test_every_kind_has_a_meaning_and_something_to_do() -> None:
    assert set(MEANINGS) == set(FailureKind)
    assert all(len(meaning) > 10 and len(to_do) > 5 for meaning, to_do in MEANINGS.values())
