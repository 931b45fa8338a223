"""Processes that race on one plan and on one version number: one wins, the others adopt it, no byte changes."""

from __future__ import annotations

import json
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from typing import Any

from pipeline import receipt, version
from pipeline.store import Store, open_store
from pipeline.types import Failure, FailureKind, Sample
from tests import corpora
from tests.crash.work import _CONTEXT, start

WRITERS = 4


def commit_as(url: str, number: int, barrier: Barrier, answers: Any) -> None:
    """Commit the first shard as writer `number`, whose samples lack one that others have."""
    store = open_store(url)
    shard = corpora.freeze(store).shards[0]
    results: dict[str, Sample | Failure] = {}
    for uid, result in corpora.results_of(shard).items():
        results[uid] = replace(result, provenance={"worker": str(number), "attempts": 1})
    if number % 2:
        results["ball-0"] = Failure(uid="ball-0", kind=FailureKind.RENDER_CRASH, message=f"writer {number}")
    barrier.wait(60)
    done, ours = corpora.commit(store, shard, results)
    answers.put((number, ours, done.rows.to_pylist()))


def publish_as(url: str, number: int, barrier: Barrier, answers: Any) -> None:
    """Publish what is committed; writers 2 and 3 with another rule, and so another version."""
    store = open_store(url)
    plan = corpora.freeze(store)
    spec = corpora.SPEC
    if number > 1:
        spec = spec.model_validate(spec.model_dump() | {"admission": {"duplicate_distance": number}})
    barrier.wait(60)
    published, new = version.publish(store, [plan], spec)
    answers.put((number, new, published.number, published.digest))


def race(function: Any, url: str) -> list[Any]:
    """Run a function in WRITERS processes that begin at one moment; return their answers by number."""
    barrier, answers = _CONTEXT.Barrier(WRITERS), _CONTEXT.Queue()
    processes = [start(function, url, number, barrier, answers) for number in range(WRITERS)]
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return sorted(found, key=lambda answer: answer[0])


def test_one_receipt_counts_and_the_others_adopt_it(shared_store: Store) -> None:
    corpora.freeze(shared_store)
    answers = race(commit_as, shared_store.url)
    winners = [number for number, ours, _ in answers if ours]
    assert len(winners) == 1
    assert all(rows == answers[0][2] for _, _, rows in answers)
    stored = receipt.load(shared_store, corpora.freeze(shared_store).shards[0].plan_id).rows.to_pylist()
    workers = {json.loads(row["provenance"])["worker"] for row in stored if row["status"] == "sample"}
    assert workers == {str(winners[0])}
    assert len(list(shared_store.list("receipts/"))) == 1
    assert len(list(shared_store.list("shards/"))) <= 2, "one of each content; the loser's is an orphan"


def test_version_numbers_are_given_once_and_without_a_gap(shared_store: Store) -> None:
    plan = corpora.freeze(shared_store)
    for shard in plan.shards:
        corpora.commit(shared_store, shard)
    answers = race(publish_as, shared_store.url)
    by_digest: dict[str, set[int]] = {}
    for _, _, number, digest in answers:
        by_digest.setdefault(digest, set()).add(number)
    assert len(by_digest) == 3, "writers 0 and 1 publish the same, 2 and 3 something of their own"
    numbers = sorted(number for found in by_digest.values() for number in found)
    assert numbers == list(range(1, len(numbers) + 1))
    assert version.latest_number(shared_store) == len(numbers)
    for digest, found in by_digest.items():
        assert all(version.open_version(shared_store, number).digest == digest for number in found)
    claimed = {number for _, new, number, _ in answers if new}
    assert claimed == set(numbers), "each is somebody's; equal ones of the same second are both their writers'"
