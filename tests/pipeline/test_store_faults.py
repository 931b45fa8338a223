"""A bad store between us and a real one: replies that are lost, refusals, slowness, bodies that are cut."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import backends, receipt, store, version
from pipeline.reader import VersionReader
from pipeline.receipt import DamagedDataError
from pipeline.store import Outcome, Store, StoreError, UnknownOutcomeError, open_store
from pipeline.types import Failure, FailureKind, UserError
from tests import corpora
from tests.pipeline.test_store import blob
from tests.proxy import Fault, Proxy, Request, Rule, fault_proxy

BOUND_S = 15.0
counter = iter(range(1000))


@pytest.fixture
def proxy(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the real server; stores opened now go through it, with short patience."""
    monkeypatch.setattr(backends, "MAX_RETRIES", 2)
    monkeypatch.setattr(backends, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(backends, "MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr(backends, "REQUEST_TIMEOUT_S", 0.8)
    monkeypatch.setattr(store, "CREATE_BACKOFF_S", 0.02)
    monkeypatch.setattr(version, "code_commit", lambda: "unknown")  # asks git twice
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture
def bad(proxy: Proxy, s3_url: str) -> Store:
    """A corpus behind the proxy."""
    return open_store(f"{s3_url}/bad-{next(counter)}")


def writes(proxy: Proxy, part: str) -> list[str]:
    return [what for method, path, what in proxy.log if method == "PUT" and part in path]


@pytest.mark.parametrize("part", ["plans/", "shards/", "receipts/", "manifests/", "versions/000001.json", "shards.txt"])
@pytest.mark.parametrize("whole", [False, True], ids=["once", "always"])
def test_a_lost_reply_is_success_and_leaves_one_copy(bad: Store, proxy: Proxy, part: str, whole: bool) -> None:
    """The write is carried out and nobody says so: once, and for every write of that kind."""
    rule = proxy.harm(Fault(lose=True), method="PUT", part=part, times=None if whole else 1)
    plan = corpora.freeze(bad)
    done = [corpora.commit(bad, shard)[0] for shard in plan.shards]
    published, new = version.publish(bad, [plan])
    assert rule.hits
    assert (new, published.number, published.counts["samples"]) == (True, 1, 4)
    found = corpora.listing(bad)
    assert sorted(key.split("/")[0] for key in found) == (
        ["manifests", "plans"] + ["receipts"] * 2 + ["shards"] * 2 + ["versions"] * 2
    )
    assert all(receipt.load(bad, one.plan_id).rows.equals(one.rows) for one in done)
    assert not [path for method, path, _ in proxy.log if method in ("DELETE", "POST")], "nothing is deleted on doubt"
    assert len(VersionReader(bad, published)) == 4


def test_a_lost_reply_does_not_make_the_probe_refuse_a_good_store(bad: Store, proxy: Proxy) -> None:
    proxy.harm(Fault(lose=True), method="PUT", part=".probe/", times=2)
    bad.probe()
    assert len(writes(proxy, ".probe/")) >= 3


def test_a_lost_reply_of_a_blob_in_parts(bad: Store, proxy: Proxy, tmp_path: Path) -> None:
    key, path = blob(tmp_path / "blob", 40 * 2**20)
    proxy.harm(Fault(lose=True), method="POST", part=key, query="uploadId")
    proxy.harm(Fault(lose=True), method="PUT", part=key, query="partNumber=2")
    assert bad.create_blob(key, path, 40 * 2**20) is Outcome.CREATED
    assert corpora.listing(bad) == {key: 40 * 2**20}
    assert bad.sweep_uploads(0) == []


def test_a_blob_in_parts_that_fails_leaves_no_upload(bad: Store, proxy: Proxy, tmp_path: Path) -> None:
    key, path = blob(tmp_path / "blob", 40 * 2**20)
    proxy.harm(Fault(status=503), method="PUT", part=key, query="partNumber=2", times=None)
    with pytest.raises(StoreError, match=f"creating {key} failed 4 times"):
        bad.create_blob(key, path, 40 * 2**20)
    assert corpora.listing(bad) == {}
    assert bad.sweep_uploads(0) == []


def test_a_reply_that_is_lost_when_another_attempt_has_won_adopts_the_winner(
    bad: Store, proxy: Proxy, s3_url: str
) -> None:
    plan = corpora.freeze(bad)
    shard = plan.shards[0]
    late = {a.uid: Failure(uid=a.uid, kind=FailureKind.RENDER_CRASH, message="late") for a in shard.assets}
    first, ours = corpora.commit(bad, shard)
    assert ours
    proxy.harm(Fault(lose=True), method="PUT", part="receipts/", times=None)
    second, ours = corpora.commit(bad, shard, late)
    assert not ours
    assert second.rows.equals(first.rows)


def test_an_outcome_that_cannot_be_learnt_is_an_error_of_its_own(bad: Store, proxy: Proxy) -> None:
    proxy.harm(Fault(lose=True), method="PUT", part="k", times=None)
    proxy.harm(Fault(status=500), method="GET", part="k", times=None)
    with pytest.raises(UnknownOutcomeError, match=r"is not known.*Nothing was deleted; run the same command again"):
        bad.create("k", b"1")
    proxy.rules.clear()
    assert bad.get("k") == b"1", "it had been carried out, and stays"
    assert bad.create("k", b"1") is Outcome.SAME


@pytest.mark.parametrize("status", [500, 503, 429, 409])
def test_a_passing_refusal_is_tried_again(bad: Store, proxy: Proxy, status: int) -> None:
    proxy.harm(Fault(status=status), method="PUT", times=2 if status != 409 else 1)
    assert bad.create("k", b"1") is Outcome.CREATED
    if status != 409:  # a read never meets 409
        proxy.harm(Fault(status=status), method="GET", times=2)
        proxy.harm(Fault(status=status), method="HEAD", times=2)
        assert (bad.get("k"), bad.size("k"), bad.get_ranges("k", [0], [1])) == (b"1", 1, [b"1"])


@pytest.mark.parametrize("status", [500, 503, 429, 409, 400, 403])
def test_a_lasting_refusal_of_writes_is_a_typed_error_in_bounded_time(bad: Store, proxy: Proxy, status: int) -> None:
    proxy.harm(Fault(status=status), method="PUT", times=None)
    begun = time.monotonic()
    with pytest.raises(StoreError, match=r"creating k (failed 4 times|was refused)") as info:
        bad.create("k", b"1")
    assert not isinstance(info.value, UnknownOutcomeError)
    assert time.monotonic() - begun < BOUND_S
    assert len(writes(proxy, "/k")) <= 4 * 4
    assert "\n" not in str(info.value)
    proxy.rules.clear()
    assert corpora.listing(bad) == {}


READS: dict[str, Callable[[Store], object]] = {
    "get": lambda s: s.get("k"),
    "ranges": lambda s: s.get_ranges("k", [0, 150_000], [100_000, 100_000]),
    "sha256": lambda s: s.sha256("k"),
    "size": lambda s: s.size("k"),
    "list": lambda s: list(s.list("")),
}


@pytest.mark.parametrize("status", [500, 503, 429, 400, 403])
@pytest.mark.parametrize("name", READS)
def test_a_lasting_refusal_of_reads_is_a_typed_error_in_bounded_time(
    bad: Store, proxy: Proxy, name: str, status: int
) -> None:
    proxy.harm(Fault(status=status), times=None)
    begun = time.monotonic()
    with pytest.raises(StoreError) as info:
        READS[name](bad)
    assert not isinstance(info.value, FileNotFoundError), "a store that fails must not look like one without the object"
    assert time.monotonic() - begun < BOUND_S


FAULTS = {
    "reset": Fault(reset_after=70_000),
    "closed": Fault(close_after=70_000),
    "shorter": Fault(claim=70_000),
    "empty": Fault(claim=0),
    "slow": Fault(delay_s=1.2),
}


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["get", "ranges", "sha256"])
def test_no_cut_read_is_accepted(bad: Store, proxy: Proxy, name: str, fault: str, times: int | None) -> None:
    """A body that is cut comes whole by another request, or ends in a typed error, and never short.

    A whole read of an object that the store itself calls shorter cannot be told by its length: digests are for that.
    """
    data = os.urandom(300_000)
    bad.create("k", data)
    whole = READS[name](bad)
    proxy.harm(FAULTS[fault], method="GET", times=times)
    begun = time.monotonic()
    error, found = None, None
    try:
        found = READS[name](bad)
    except StoreError as caught:
        error = caught
    assert time.monotonic() - begun < BOUND_S
    told_shorter = name == "get" and fault in ("shorter", "empty")
    assert error is not None or found == whole or told_shorter
    assert not isinstance(error, FileNotFoundError)
    assert "\n" not in str(error)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("part", ["plans/", "receipts/", "manifests/", "versions/"])
def test_a_record_that_comes_short_is_never_believed(bad: Store, proxy: Proxy, part: str, share: float) -> None:
    plan = corpora.freeze(bad)
    for shard in plan.shards:
        corpora.commit(bad, shard)
    version.publish(bad, [plan])
    length = next(size for key, size in corpora.listing(bad).items() if key.startswith(part))
    proxy.rules.append(Rule(lambda r: r.method == "GET" and part in r.path, Fault(claim=int(share * length)), None))
    with pytest.raises((UserError, DamagedDataError, StoreError)) as info:
        _read_all(bad, part)
    assert "\n" not in str(info.value)


def _read_all(corpus: Store, part: str) -> None:
    if part in ("manifests/", "versions/"):
        _ = VersionReader(corpus, version.open_version(corpus, 1)).rows
    else:
        for plan in version.plan_sets(corpus):
            for shard in plan.shards:
                receipt.load(corpus, shard.plan_id)


def test_a_slow_write_is_not_taken_for_a_failure(bad: Store, proxy: Proxy) -> None:
    """The client gives up waiting, the write arrives afterwards: found on reading back, or met by the next try."""
    proxy.harm(Fault(delay_s=1.2), method="PUT")
    assert bad.create("k", b"1") in (Outcome.CREATED, Outcome.SAME)
    time.sleep(1.0)
    assert bad.get("k") == b"1"


def test_a_server_that_goes_away_in_the_middle_costs_nothing_that_was_committed(bad: Store, proxy: Proxy) -> None:
    plan = corpora.freeze(bad)
    first, _ = corpora.commit(bad, plan.shards[0])
    proxy.harm(Fault(status=503), times=None)
    with pytest.raises(StoreError):
        corpora.commit(bad, plan.shards[1])
    proxy.rules.clear()
    assert receipt.load(bad, plan.shards[0].plan_id).rows.equals(first.rows)
    corpora.commit(bad, plan.shards[1])
    assert version.publish(bad, [plan])[0].counts["planned"] == 5


def test_a_request_of_the_proxy_is_what_the_client_sent(bad: Store, proxy: Proxy) -> None:
    """The harness itself: with no rule the proxy changes nothing, and a rule that never matches counts no hit."""
    never: Callable[[Request], bool] = lambda r: False  # noqa: E731
    proxy.rules.append(Rule(never, Fault(status=500), None))
    data = os.urandom(100_000)
    assert bad.create("k", data) is Outcome.CREATED
    assert bad.get("k") == data
    assert proxy.rules[0].hits == 0
    assert [(m, w) for m, _, w in proxy.log] == [("PUT", "200"), ("GET", "200")]
