"""Rebuilds pay for what changed, and for nothing else; versions, diffs, tombstones, compaction, collection."""

from __future__ import annotations

import contextlib
import io
import itertools
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import compact, diff, garbage, rebuild, receipt, version
from pipeline import plan as plans
from pipeline.reader import VersionReader
from pipeline.shard import DamagedDataError, shard_key
from pipeline.spec import AdmissionSpec
from pipeline.store import Store, open_store
from pipeline.types import FailureKind, UserError
from pipeline.version import Version
from tests import corpora
from tests.conftest import make_sample
from tests.pipeline.histories import SPEC, CrashError, Workshop, changed_spec

NAMES = [f"ball-{i:02d}" for i in range(10)]


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


@pytest.fixture
def shop(store: Store) -> Workshop:
    """Ten objects in four shards, and version 1."""
    shop = Workshop(store)
    shop.put(NAMES)
    assert shop.dataset().counts["samples"] == 10
    return shop


def uids(store: Store, one: Version) -> list[str]:
    return list(VersionReader(store, one).rows["uid"].to_pylist())


def changes(store: Store, a: Version, b: Version) -> dict[str, list[str]]:
    found = diff.diff(store, a, b)
    return {name: table["uid"].to_pylist() for name, table in found.objects.items() if table.num_rows}


def listing(store: Store) -> list[str]:
    return sorted(item.key for item in store.list(""))


def test_a_rebuild_of_the_same_does_nothing(shop: Workshop) -> None:
    before, made = listing(shop.store), len(shop.made)
    assert shop.dataset().number == 1
    assert (listing(shop.store), len(shop.made)) == (before, made)


def test_a_knob_that_changes_no_pixels_rebuilds_nothing(shop: Workshop) -> None:
    made = list(shop.made)
    shop.spec = changed_spec(
        split={"salt": "other"}, limits={"deadline_s": 7}, fetch={"max_tries": 2}, workers={"open_shards": 9},
        admission={"duplicate_distance": 3}, shards={"objects_per_shard": 2},
    )  # fmt: skip
    found = shop.rebuild()
    assert shop.made == made
    assert (found.counts["held"], found.pending.num_rows, found.open_work) == (10, 0, [])
    second = shop.publish()
    assert second.spec.split.salt == "other"
    shards = [version.shards_of(shop.store, number) for number in (1, second.number)]
    assert shards[0] == shards[1], "shards are referred to, not written again"


def test_one_more_percent_of_assets_makes_exactly_those(shop: Workshop) -> None:
    shop.put(f"more-{i}" for i in range(90))
    first = shop.dataset()
    before = list(shop.made)
    shop.put(["new-0"])
    found = shop.rebuild()
    assert found.counts | {"new": 1, "held": 100, "listed": 101} == found.counts
    assert shop.made[len(before) :] == [("new-0", shop.source["new-0"].sha256)]
    assert changes(shop.store, first, shop.publish()) == {"added": ["new-0"]}


def test_another_sample_count_makes_all_and_says_how_many(shop: Workshop) -> None:
    shop.spec = changed_spec(render={"samples": 64})
    found = shop.look()
    assert rebuild.as_text(found.counts, 4) == "10 listed: to make 10 object(s), 40 views (10 new); none held"
    first = version.open_version(shop.store, 1)
    second = shop.dataset()
    assert len(shop.made) == 20
    assert second.record["fingerprints"] == [shop.fingerprint]
    assert second.record["producers"] == ["fake 1"]
    assert changes(shop.store, first, second) == {"rerendered": NAMES}
    shop.spec = SPEC
    assert shop.dataset().counts["samples"] == 10
    assert len(shop.made) == 20, "back again: what was made before is still held"


def test_a_changed_file_is_made_again_and_its_old_sample_is_left_behind(shop: Workshop) -> None:
    first = version.open_version(shop.store, 1)
    shop.put(["ball-03"], content="other")
    found = shop.rebuild()
    assert found.counts["changed"] == 1
    assert shop.made[10:] == [("ball-03", shop.source["ball-03"].sha256)]
    second = shop.publish()
    assert changes(shop.store, first, second) == {"changed_asset": ["ball-03"]}
    counts = diff.diff(shop.store, first, second).counts
    assert counts["new_shards"] == 1
    assert 0 < counts["new_sample_bytes"] < counts["new_shard_bytes"]
    assert version.publish(shop.store, version.plan_sets(shop.store))[0].counts["samples"] == 10, (
        "without a listing the file that was planned last counts"
    )


def test_what_the_source_drops_or_the_licence_forbids_leaves_without_work(shop: Workshop) -> None:
    first = version.open_version(shop.store, 1)
    made = list(shop.made)
    del shop.source["ball-00"]
    shop.put(["ball-01"], license="CC-BY-NC-4.0")
    shop.put(["ball-02"], license="CC-BY-4.0")
    shop.spec = changed_spec(admission={"licenses": "commercial"})
    second = shop.dataset()
    assert shop.made == made
    assert changes(shop.store, first, second) == {
        "removed": ["ball-00", "ball-01"], "newly_failed": ["ball-01"], "relicensed": ["ball-02"],
    }  # fmt: skip
    assert second.counts["failures"] == {"licence_excluded": 1}
    assert second.record["license_policy"] == "commercial"
    shop.spec = SPEC
    assert shop.dataset().counts["samples"] == 9, "a policy that admits it again brings it back"
    assert shop.made == made


def test_a_retryable_failure_is_tried_again_three_times_and_its_receipt_stays(store: Store) -> None:
    shop = Workshop(store, fails={"ball-01": FailureKind.RENDER_TIMEOUT, "ball-02": FailureKind.EMPTY_SCENE})
    shop.put(NAMES[:3])
    assert shop.dataset().counts["failures"] == {"empty_scene": 1, "render_timeout": 1}
    receipts = {key: store.get(key) for key in listing(store) if key.startswith("receipts/")}
    tried = []
    for _ in range(4):
        tried.append(shop.rebuild().counts["retried"])
    assert tried == [1, 1, 0, 0], "two rebuilds try again, the first try was the third of RETRY_ROUNDS"
    assert rebuild.RETRY_ROUNDS == 3
    shop.fails.clear()
    assert shop.rebuild().counts["failed"] == 2
    found = shop.rebuild(kinds=("render_timeout",))
    assert found.counts["retried"] == 1
    assert shop.made[-1][0] == "ball-01"
    assert uids(store, shop.publish()) == ["ball-00", "ball-01"], "a sample beats a failure"
    shop.rebuild(kinds=("empty_scene",))
    assert uids(store, shop.publish()) == NAMES[:3]
    assert {key: store.get(key) for key in receipts} == receipts


def test_a_retry_of_a_whole_shard_is_other_work(store: Store) -> None:
    """The same assets, index and fingerprint: only the name of the plan tells a second try from the first."""
    shop = Workshop(store, fails=dict.fromkeys(NAMES[:3], FailureKind.NETWORK))
    shop.put(NAMES[:3])
    shop.dataset()
    shop.fails.clear()
    assert shop.dataset().counts["samples"] == 3


def test_a_refusal_is_tried_again_when_its_rule_lets_more_in(store: Store) -> None:
    shop = Workshop(store, changed_spec(admission={"min_thickness": 0.05}), fails={"ball-01": FailureKind.THIN})
    shop.put(NAMES[:3])
    shop.dataset()
    shop.spec = changed_spec(admission={"min_thickness": 0.06})
    assert shop.look().counts["failed"] == 1
    shop.spec = changed_spec(admission={"min_thickness": 0.01})
    assert shop.look().counts["relaxed"] == 1
    shop.fails.clear()
    assert shop.dataset().counts["samples"] == 3


@pytest.mark.parametrize("kind", list(FailureKind))
def test_rules_that_did_not_change_relax_nothing(kind: FailureKind) -> None:
    rules = AdmissionSpec(licenses="commercial")
    assert not rebuild.relaxes(kind, rules, rules, "CC-BY-NC-4.0")


def test_a_launcher_that_died_leaves_work_that_the_next_finishes(shop: Workshop) -> None:
    shop.put(f"late-{i}" for i in range(7))
    shop.crash_after = 1
    with pytest.raises(CrashError):
        shop.rebuild()
    shop.put(["later"])
    shop.crash_after = None
    found = shop.rebuild()
    assert (found.counts["open"], found.counts["new"]) == (4, 1)
    assert sorted(uid for uid, _ in shop.made) == sorted(shop.source), "each object once"
    assert shop.publish().counts["samples"] == 18


def test_two_launchers_agree_on_the_delta(shop: Workshop) -> None:
    shop.put(["x", "y"])
    mine = shop.look()
    other = Workshop(shop.store, source=dict(shop.source))
    other.put(["z"])
    theirs = other.look()
    first, ours = rebuild.freeze_pending(shop.store, SPEC, shop.fingerprint, mine, "")
    assert ours
    assert not shop.look().pending.num_rows, "what is planned is not planned again"
    lost, ours = rebuild.freeze_pending(shop.store, SPEC, shop.fingerprint, theirs, "")
    assert (ours, lost.table.equals(first.table)) == (False, True)
    found = other.rebuild()
    assert (found.counts["open"], found.counts["new"]) == (2, 1)
    shop.rebuild()
    assert sorted(uid for uid, _ in shop.made + other.made) == sorted(other.source)


def test_two_different_samples_of_one_object_are_an_error(shop: Workshop, tmp_path: Path) -> None:
    """Another plan of the fingerprint holds other pictures of the same file, as two GPUs would make."""
    spec = changed_spec(split={"salt": "x"}).model_copy(update={"name": "second"})
    frozen = plans.freeze(shop.store, spec, shop.fingerprint, lambda: [shop.source["ball-04"]])
    other = make_sample("other pictures", asset=shop.source["ball-04"], num_views=1, fingerprint=shop.fingerprint)
    receipt.commit_shard(shop.store, frozen.shards[0], {"ball-04": other}, tmp_path)
    with pytest.raises(UserError, match="'ball-04' of source fake has two different samples under one fingerprint"):
        shop.publish()


def test_a_tombstone_withdraws_from_the_next_version_and_all_later_ones(shop: Workshop) -> None:
    second, new = version.tombstone(shop.store, ["ball-05"])
    assert (new, second.number, second.tombstones) == (True, 2, {"ball-05"})
    assert "ball-05" not in uids(shop.store, second)
    assert second.counts["failures"] == {"withdrawn": 1}
    assert version.tombstone(shop.store, ["ball-05"]) == (second, False)
    assert "ball-05" in uids(shop.store, version.open_version(shop.store, 1)), "a version never changes"
    shop.put(["new"])
    third = shop.dataset()
    assert third.tombstones == {"ball-05"}
    assert uids(shop.store, third) == sorted({*NAMES, "new"} - {"ball-05"})
    shop.put(["ball-05"], content="sent in again")
    assert shop.look().counts["withdrawn"] == 1
    assert "ball-05" not in uids(shop.store, shop.dataset())
    assert version.publish(shop.store, version.plan_sets(shop.store))[0].tombstones == {"ball-05"}
    with pytest.raises(UserError, match=r"has no object 'nobody'; check UID="):
        version.tombstone(shop.store, ["nobody"])


def test_compaction_copies_bytes_and_later_versions_read_the_copies(shop: Workshop) -> None:
    for uid in ("ball-00", "ball-01", "ball-04"):
        last, _ = version.tombstone(shop.store, [uid])
    before = {uid: VersionReader(shop.store, last).read_views(i, [0]) for i, uid in enumerate(uids(shop.store, last))}
    made = list(shop.made)
    done = compact.compact(shop.store, dead_share=0.5)
    assert (done.shards_before, done.samples, done.shards_after) == (1, 1, 1)
    done = compact.compact(shop.store, dead_share=0.2)
    assert (done.shards_before, done.samples) == (1, 2)
    assert compact.compact(shop.store, dead_share=0.2).samples == 0
    assert shop.made == made
    reader = VersionReader(shop.store, done.version)
    after = {uid: reader.read_views(i, [0]) for i, uid in enumerate(reader.rows["uid"].to_pylist())}
    assert after.keys() == before.keys()
    assert all(after[uid].planes == before[uid].planes for uid in after)
    assert all(after[uid].header.metadata == before[uid].header.metadata for uid in after)
    assert changes(shop.store, last, done.version) == {"moved": ["ball-02", "ball-03", "ball-05"]}
    assert not version.verify_version(shop.store, deep=True).problems
    assert shop.dataset().number == done.version.number, "the next rebuild finds the copies"
    for sha256 in version.shards_of(shop.store, done.version.number):
        with tarfile.open(fileobj=io.BytesIO(shop.store.get(shard_key(sha256)))) as tar:
            assert {member.name.split(".")[0] for member in tar}.isdisjoint({"ball-00", "ball-01", "ball-04"})


def test_a_compaction_that_died_goes_on_where_it_was(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    for uid in NAMES[1::3] + NAMES[2::3]:
        version.tombstone(shop.store, [uid])
    commit, calls = compact.commit_rows, itertools.count()

    def dying(*arguments: object) -> object:
        if next(calls) == 0:  # the shard is stored, its receipt is not
            raise CrashError
        return commit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(compact, "commit_rows", dying)
    with pytest.raises(CrashError):
        compact.compact(shop.store)
    compacted = [p for p in version.plan_sets(shop.store) if p.kind == "compact"]
    assert shop.dataset().counts["samples"] == 4, "a half compaction harms nobody"
    monkeypatch.setattr(compact, "commit_rows", commit)
    done = compact.compact(shop.store)
    assert done.samples >= 1
    assert len(compacted) == 1
    assert not version.verify_version(shop.store, deep=True).problems


def test_a_damaged_sample_is_not_copied(store: Store) -> None:
    shop = Workshop(store)
    shop.put(NAMES[:3])
    shop.dataset()
    version.tombstone(shop.store, ["ball-00", "ball-01"])
    key = next(store.list("shards/")).key
    data = bytearray(store.get(key))
    row = VersionReader(shop.store, version.open_version(shop.store)).rows.to_pylist()[0]
    data[row["offset"] + 3] ^= 1
    corpora.overwrite(store, key, bytes(data))
    before = listing(shop.store)
    with pytest.raises(DamagedDataError, match=r"ball-02\.json"):
        compact.compact(shop.store)
    assert [key for key in listing(shop.store) if not key.startswith("plans/")] == [
        key for key in before if not key.startswith("plans/")
    ]


HOUR = 3600.0


def test_collection_keeps_roots_and_the_young_and_is_a_dry_run(shop: Workshop) -> None:
    store = shop.store
    version.tombstone(store, ["ball-00", "ball-01"])
    compact.compact(store)
    orphans = {
        "shards/" + "a" * 64 + ".tar": b"left by a dead worker",
        "manifests/" + "b" * 64 + ".parquet": b"left by a dead publisher",
        "receipts/" + "c" * 64 + ".parquet": b"of a plan that is gone",
    }
    for key, data in orphans.items():
        store.create(key, data)
    store.create("notes/readme.txt", b"not ours")
    before = listing(store)
    assert garbage.collect(store, delete=True).items == (), "all is younger than a week"
    later = time.time() + 2 * HOUR
    dry = garbage.collect(store, grace_s=HOUR, now_s=later)
    assert {item.key for item in dry.items} == set(orphans)
    assert listing(store) == before, "nothing is deleted unless asked for"
    gone = garbage.collect(store, grace_s=HOUR, delete=True, now_s=later)
    assert gone.deleted
    assert listing(store) == sorted(set(before) - set(orphans))
    for number in (1, 2, 3):
        assert not version.verify_version(store, number, deep=True).problems


def test_a_shard_that_was_copied_out_goes_once_no_version_names_it(store: Store) -> None:
    """Versions are for ever, so this corpus is made as one whose version 1 came after the compaction."""
    shop = Workshop(store)
    shop.put(NAMES)
    shop.dataset()
    version.tombstone(shop.store, ["ball-00", "ball-01"])
    compact.compact(shop.store)
    newest = version.open_version(shop.store)
    old = set(version.shards_of(shop.store, 1)) - set(version.shards_of(shop.store, newest.number))
    assert len(old) == 1
    for ending in ("json", "shards.txt"):
        corpora.overwrite(store, f"versions/000001.{ending}", store.get(f"versions/000003.{ending}"))
        for number in (2, 3):
            corpora.remove(store, f"versions/{number:06d}.{ending}")
    found = garbage.collect(shop.store, grace_s=0, delete=True, now_s=time.time() + 1)
    assert {shard_key(sha256) for sha256 in old} <= {item.key for item in found.items}
    assert shop.dataset().counts["samples"] == 8, "its receipts stay and harm nobody"
    assert not version.verify_version(shop.store, deep=True).problems


def test_a_rule_that_kills_a_sample_does_not_free_its_bytes(shop: Workshop) -> None:
    """A laxer rule would bring it back: only a tombstone or a copy frees the bytes of a receipt."""
    shop.put(["ball-00", "ball-01", "ball-02"], license="CC-BY-NC-4.0")
    shop.spec = changed_spec(admission={"licenses": "commercial"})
    shop.dataset()
    compact.compact(shop.store, dead_share=0.1)
    garbage.collect(shop.store, grace_s=0, delete=True, now_s=time.time() + HOUR)
    shop.spec = SPEC
    assert shop.dataset().counts["samples"] == 10
    assert len(shop.made) == 10


def test_verify_names_what_is_wrong(store: Store) -> None:
    shop = Workshop(store)
    shop.put(NAMES)
    shop.dataset()
    found = version.verify_version(shop.store, deep=True)
    assert (found.shards, found.digested, found.decoded_samples, found.problems) == (4, 4, 10, ())
    rows = VersionReader(shop.store, version.open_version(shop.store)).rows.to_pylist()
    key = shard_key(rows[4]["shard_sha256"])
    whole = store.get(key)
    flipped = bytearray(whole)
    flipped[rows[4]["offset"] + 10] ^= 1
    corpora.overwrite(store, key, bytes(flipped))
    assert "holds other bytes" in version.verify_version(shop.store).problems[0]
    problems = version.verify_version(shop.store, deep=True).problems
    assert len(problems) == 2
    assert "ball-04.json" in problems[1]
    shop.put(["new"])
    shop.rebuild()
    with pytest.raises(UserError, match="holds other bytes than its name says"):
        version.publish(shop.store, version.plan_sets(shop.store), SPEC, deep=True)
    corpora.overwrite(store, key, whole[:-1024])
    assert "its receipt says" in version.verify_version(shop.store).problems[0]
    with pytest.raises(UserError, match="nothing was published"):
        shop.publish()
    corpora.overwrite(store, key, whole)
    corpora.remove(store, "versions/000001.shards.txt")
    assert "does not list" in version.verify_version(shop.store).problems[0]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["put", "change", "drop", "fail", "mend", "tombstone", "compact", "gc", "crash", "dataset"]),
        st.integers(0, 7),
    ),
    min_size=4,
    max_size=14,
)


@settings(max_examples=25, deadline=None)
@given(actions=ACTIONS)
def test_any_history_ends_in_what_a_dict_says(actions: list[tuple[str, int]]) -> None:
    """Whatever happened before: a version holds exactly what the source lists and does not fail, each made once."""
    shop = Workshop(open_store(corpora.memory_url()), changed_spec(shards={"objects_per_shard": 2}))
    shop.put(NAMES[:4])
    dead, versions, states = set[str](), list[Version](), list[dict[str, str | None]]()
    for action, i in [*actions, ("dataset", 0)]:
        uid = NAMES[i]
        if action == "put" and uid not in shop.source:
            shop.put([uid])
        elif action == "change" and uid in shop.source:
            shop.put([uid], content=f"{len(shop.made)}")
        elif action == "drop" and len(shop.source) > 1:
            shop.source.pop(uid, None)
        elif action == "fail":
            shop.fails[uid] = FailureKind.EMPTY_SCENE if i % 2 else FailureKind.NETWORK
        elif action == "mend":
            shop.fails.pop(uid, None)
        elif action == "tombstone" and versions and states[-1].get(uid):
            versions.append(version.tombstone(shop.store, [uid])[0])
            dead.add(uid)
            states.append({name: content for name, content in states[-1].items() if name != uid})
        elif action == "compact" and versions:
            versions.append(compact.compact(shop.store, dead_share=0.3).version)
            states.append(states[-1])
        elif action == "gc":
            garbage.collect(shop.store, grace_s=0, delete=True, now_s=time.time() + HOUR)
        elif action == "crash":
            shop.crash_after = i % 3
            with contextlib.suppress(CrashError):
                shop.rebuild()
            shop.crash_after = None
        elif action == "dataset":
            versions.append(shop.dataset())
            states.append(check_against_source(shop, versions[-1], dead))
    assert len(set(shop.made)) == len(shop.made), "nothing was made twice"
    for one, state in zip(versions, states):
        rows = VersionReader(shop.store, one).rows
        held = dict(zip(rows["uid"].to_pylist(), rows["asset_sha256"].to_pylist()))
        assert held == {uid: content for uid, content in state.items() if content}, "a version never changes"
        assert not version.verify_version(shop.store, one.number, deep=True).problems
    for a, b in itertools.pairwise(range(len(versions))):
        found = changes(shop.store, versions[a], versions[b])
        before, after = ({uid for uid, content in states[i].items() if content} for i in (a, b))
        assert (before - set(found.get("removed", ()))) | set(found.get("added", ())) == after


def check_against_source(shop: Workshop, one: Version, dead: set[str]) -> dict[str, str | None]:
    """Check a version against the source; return the digest of each object's sample, None for a failure."""
    rows = version.open_rows(shop.store, one).to_pylist()
    state = {row["uid"]: row["asset_sha256"] if row["status"] == "sample" else None for row in rows}
    assert set(state) <= set(shop.source)
    assert set(shop.source) - set(state) <= dead, "every listed object has a row"
    held = set(shop.made)
    for uid, asset in shop.source.items():
        if uid in dead:
            assert state.get(uid) is None
        elif (uid, asset.sha256) in held:
            assert state[uid] == asset.sha256
        else:
            assert state[uid] is None
            assert uid in shop.fails or uid in {row["uid"] for row in rows if row["failure_kind"]}
    return state
