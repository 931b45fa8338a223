"""Random killing with an oracle, in short; `make test-crash TIME_S=600` is the long form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import receipt, version
from pipeline.store import open_store
from tests import corpora
from tests.crash.storm import (
    OBJECTS,
    Oracle,
    endpoint,
    ray_storm,
    storm,
    undisturbed_digest,
    weather,
)
from tests.crash.work import start, work
from tests.proxy import fault_proxy


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_digest(tmp_path_factory.mktemp("undisturbed") / "c", OBJECTS)


def test_writers_that_are_killed_at_random_leave_what_an_undisturbed_run_leaves(tmp_path: Path, digest: str) -> None:
    told = storm(str(tmp_path / "c"), 4.0, 1, digest)
    assert told["killed"] >= 5


def test_writers_that_are_killed_over_a_store_that_fails_at_random(s3_url: str, digest: str) -> None:
    server = os.environ["AWS_ENDPOINT_URL"]
    with fault_proxy(server) as proxy, endpoint(proxy.url):
        weather(proxy, 2)
        told = storm(f"{s3_url}/storm", 5.0, 2, digest, server)
        assert sum(rule.hits for rule in proxy.rules) >= 5
    assert told["killed"] >= 3


def test_workers_and_driver_of_the_job_killed_at_random(tmp_path: Path) -> None:
    told = ray_storm(tmp_path, 5.0, 3)
    assert told.get("workers", 0) >= 2


def test_any_number_of_writers_in_any_order_gives_the_same_corpus(tmp_path: Path, digest: str) -> None:
    """One writer, and four at once that take the shards in orders of their own: the same names, the same version."""
    together = [start(work, str(tmp_path / "four"), OBJECTS, seed) for seed in range(4)]
    for process in together:
        process.join(120)
        assert process.exitcode == 0
    undisturbed_digest(tmp_path / "one", OBJECTS)
    one, four = (open_store(str(tmp_path / name)) for name in ("one", "four"))
    assert corpora.listing(one) == corpora.listing(four)
    assert version.open_version(four).digest == digest
    for item in one.list("shards/"):
        assert one.get(item.key) == four.get(item.key)


def test_the_oracle_sees_what_it_should(tmp_path: Path, digest: str) -> None:
    """An oracle that cannot fail proves nothing: a changed, a lost, a doubled and a missing record each end it."""
    undisturbed_digest(tmp_path / "c", OBJECTS)
    store = open_store(str(tmp_path / "c"))
    oracle = Oracle(store)
    oracle.settle(OBJECTS, digest)
    with pytest.raises(AssertionError):
        oracle.settle(OBJECTS, "0" * 64)
    with pytest.raises(AssertionError):
        oracle.settle(OBJECTS + 1, digest)
    key = receipt.receipt_key(version.plan_sets(store)[0].shards[0].plan_id)
    path = tmp_path / "c" / key
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(AssertionError, match=key):
        oracle.look()
    path.unlink()
    with pytest.raises(AssertionError, match=key):
        oracle.look()
    path.write_bytes(data)
    oracle.look()
    next((tmp_path / "c/shards").iterdir()).write_bytes(b"half")
    with pytest.raises(AssertionError):
        oracle.settle(OBJECTS, digest)
