"""Histories of a corpus against a model: any order of plan, render, fail, publish, read and crash.

The model is a few dictionaries and knows nothing of files: which objects a plan holds, what became of each, and what
each version showed when it was published. After every step the corpus must agree with it, nothing that was stored may
have changed or gone, and a step that a crash cut off must have happened wholly or not at all.

To add an operation: give `Model` what it must remember, write a rule that does it on the store and in the model, and,
if it may remove objects, take them out of `self.stored` there; whatever else goes missing fails the invariant.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from pipeline import garbage, receipt, version
from pipeline import plan as plans
from pipeline.plan import PlanSet, ShardPlan
from pipeline.reader import VersionReader
from pipeline.store import open_store
from pipeline.types import Failure, FailureKind, Sample, UserError
from tests import corpora
from tests.conftest import make_asset
from tests.crash.work import THINGS, install

_names = itertools.count()
Result = tuple[str, ...]
"""("failure", kind), or ("sample", variant): a renderer that is not reproducible makes one of two."""


class Crash(BaseException):
    """The process is gone: nothing that was to follow happens."""


def ball(uid: str, fingerprint: str, variant: int) -> Sample:
    """Return the sample of a ball in one of its two variants, which have so many views."""
    made = corpora.ball(uid, fingerprint)
    return replace(made, views=made.views[:variant])


@dataclass(slots=True)
class Model:
    """What a corpus should hold.

    Attributes:
        committed: plan_id of a shard -> uid -> what became of it.
        versions: what each version showed, oldest first: uid -> ("sample", variant) or ("failure", possible kinds).
        digests: of the versions.
    """

    plans: dict[str, PlanSet] = field(default_factory=dict)
    committed: dict[str, dict[str, Result]] = field(default_factory=dict)
    versions: list[dict[str, Result]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def merged(self, chosen: list[PlanSet]) -> dict[str, Result] | None:
        """Return what a version of these plans shows: a sample beats a failure; None where it must be refused."""
        found: dict[str, Result] = {}
        prints: dict[str, str] = {}
        for shard in [shard for plan in chosen for shard in plan.shards]:
            for uid, result in self.committed.get(shard.plan_id, {}).items():
                if prints.setdefault(uid, shard.fingerprint) != shard.fingerprint:
                    return None
                if uid in found and found[uid][0] == result[0] == "sample" and found[uid] != result:
                    return None  # two different samples of one object
                before = found.get(uid, result)
                if before[0] == result[0] == "failure":  # which of several is told is nobody's promise
                    found[uid] = ("failure", *sorted({*before[1:], *result[1:]}))
                elif result[0] == "sample":
                    found[uid] = result
        return found or None


class History(RuleBasedStateMachine):
    """One corpus in memory, and its model."""

    def __init__(self) -> None:
        super().__init__()
        self.store = open_store(f"memory://history-{next(_names)}")
        self.model = Model()
        self.stored: dict[str, int] = {}

    @rule(
        name=st.sampled_from("ab"), fingerprint=st.sampled_from("fg"), first=st.integers(0, 3), count=st.integers(1, 7)
    )
    def plan(self, name: str, fingerprint: str, first: int, count: int) -> None:
        """Freeze a plan; a plan that is there does not move, whatever the source lists now."""
        spec = corpora.SPEC.model_copy(update={"name": name})
        assets = [make_asset(f"ball-{i}") for i in range(first, first + count)]
        frozen = plans.freeze(self.store, spec, fingerprint, lambda: assets)
        known = self.model.plans.setdefault(frozen.id, frozen)
        assert (frozen.id, list(frozen.shards)) == (known.id, list(known.shards))

    @precondition(lambda self: self.model.plans)
    @rule(data=st.data())
    def render(self, data: st.DataObject) -> None:
        """Commit a shard, some of whose objects fail; one that is committed is adopted as it is."""
        shard, results = self._draw_results(data)
        done, ours = corpora.commit(self.store, shard, results)
        self._note(shard, results)
        assert ours or self.stored.get(receipt.receipt_key(shard.plan_id))
        self._agrees(shard, done)

    @precondition(lambda self: self.model.plans)
    @rule(data=st.data(), thing=st.sampled_from(["shard", "receipt", "tar"]), when=st.sampled_from(["before", "after"]))
    def crash_while_rendering(self, data: st.DataObject, thing: str, when: str) -> None:
        """Die at a point of a commit: the receipt is there and whole, or the shard does not count."""
        shard, results = self._draw_results(data)
        self._crash(
            f"{thing}:mid" if thing == "tar" else f"{thing}:{when}", lambda: corpora.commit(self.store, shard, results)
        )
        if self.store.size(receipt.receipt_key(shard.plan_id)) is not None:
            self._note(shard, results)
            self._agrees(shard, receipt.load(self.store, shard.plan_id))

    @precondition(lambda self: self.model.plans)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """Publish some plans: refused, unchanged, or the next number."""
        self._publish(self._draw_plans(data))

    @precondition(lambda self: self.model.plans)
    @rule(data=st.data(), thing=st.sampled_from(THINGS[3:]), when=st.sampled_from(["before", "after"]))
    def crash_while_publishing(self, data: st.DataObject, thing: str, when: str) -> None:
        """Die at a point of a publish; publishing the same again ends where it would have."""
        chosen = self._draw_plans(data)

        def attempt() -> None:
            try:
                version.publish(self.store, chosen)
            except UserError:
                assert self.model.merged(chosen) is None

        self._crash(f"{thing}:{when}", attempt)
        if version.latest_number(self.store) > len(self.model.versions):
            self._note_version(chosen)
        self._publish(chosen)

    @precondition(lambda self: self.model.versions)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """Read an object of any version: its pictures are those that were made."""
        number = data.draw(st.integers(1, len(self.model.versions)), label="version")
        reader = VersionReader(self.store, version.open_version(self.store, number))
        shown = self.model.versions[number - 1]
        samples = sorted(uid for uid, result in shown.items() if result[0] == "sample")
        assert reader.rows["uid"].to_pylist() == samples
        assert reader.num_failures == len(shown) - len(samples)
        if samples:
            row = data.draw(st.integers(0, len(samples) - 1), label="row")
            made = ball(samples[row], "f", int(shown[samples[row]][1]))
            found = reader.read_views(row, range(len(made.views)))
            assert [p["rgba"] for p in found.planes] == [view.planes["rgba"].data for view in made.views]
            assert len(found.header.cameras) == len(made.views)

    @rule()
    def collect(self) -> None:
        """Delete what nothing names, at once: orphans of crashes may go, what a receipt or a version names may not."""
        named = {f"manifests/{version.open_version(self.store, i + 1).manifest_sha256}.parquet"
                 for i in range(len(self.model.versions))}  # fmt: skip
        for plan_id in self.model.committed:
            done = receipt.load(self.store, plan_id)
            named |= {receipt.receipt_key(plan_id)} | {f"shards/{done.shard_sha256}.tar"}
        gone = {item.key for item in garbage.collect(self.store, grace_s=0, delete=True).items}
        assert not gone & named
        assert all(key.startswith(("shards/", "manifests/")) for key in gone)
        self.stored = {key: size for key, size in self.stored.items() if key not in gone}

    @invariant()
    def nothing_changes_or_goes(self) -> None:
        """What was stored is stored, and the versions are those that were published."""
        found = corpora.listing(self.store)
        assert {key: found.get(key) for key in self.stored} == self.stored
        self.stored = found
        assert version.latest_number(self.store) == len(self.model.versions)

    def teardown(self) -> None:
        """At the end every version is what it was, and every committed shard accounts for its plan."""
        for number, (digest, shown) in enumerate(zip(self.model.digests, self.model.versions), start=1):
            opened = version.open_version(self.store, number)
            assert opened.digest == digest
            rows = version.open_rows(self.store, opened).to_pylist()
            assert {row["uid"]: row["status"] for row in rows} == {uid: result[0] for uid, result in shown.items()}
            assert all(row["failure_kind"] in (None, *shown[row["uid"]][1:]) for row in rows)
        for plan in self.model.plans.values():
            for shard in plan.shards:
                if shard.plan_id in self.model.committed:
                    assert set(self.model.committed[shard.plan_id]) == {asset.uid for asset in shard.assets}

    def _draw_plans(self, data: st.DataObject) -> list[PlanSet]:
        names = data.draw(st.sets(st.sampled_from(sorted(self.model.plans)), min_size=1), label="plans")
        return [self.model.plans[name] for name in sorted(names)]

    def _draw_results(self, data: st.DataObject) -> tuple[ShardPlan, dict[str, Sample | Failure]]:
        frozen = self.model.plans[data.draw(st.sampled_from(sorted(self.model.plans)), label="plan")]
        shard = data.draw(st.sampled_from(frozen.shards), label="shard")
        uids = [asset.uid for asset in shard.assets]
        failing = data.draw(st.sets(st.sampled_from(uids)), label="failing")
        kind = data.draw(st.sampled_from([FailureKind.EMPTY_SCENE, FailureKind.RENDER_CRASH]), label="kind")
        variant = data.draw(st.sampled_from([1, 2, 2, 2]), label="variant")
        results: dict[str, Sample | Failure] = {}
        for uid in uids:
            made = ball(uid, shard.fingerprint, variant)
            results[uid] = Failure(uid=uid, kind=kind, message="as drawn") if uid in failing else made
        return shard, results

    def _note(self, shard: ShardPlan, results: dict[str, Sample | Failure]) -> None:
        """Remember a commit, unless one was there before."""
        self.model.committed.setdefault(
            shard.plan_id,
            {
                uid: ("failure", r.kind.value) if isinstance(r, Failure) else ("sample", str(len(r.views)))
                for uid, r in results.items()
            },
        )

    def _agrees(self, shard: ShardPlan, done: receipt.Receipt) -> None:
        wanted = self.model.committed[shard.plan_id]
        found = {row["uid"]: (row["status"], row["failure_kind"]) for row in done.rows.to_pylist()}
        assert found == {uid: (r[0], r[1] if r[0] == "failure" else None) for uid, r in wanted.items()}

    def _publish(self, chosen: list[PlanSet]) -> None:
        shown = self.model.merged(chosen)
        try:
            published, new = version.publish(self.store, chosen)
        except UserError:
            assert shown is None
            return
        assert shown is not None
        if new:
            self._note_version(chosen)
        assert published.number == len(self.model.versions)
        assert published.digest == self.model.digests[-1]
        assert published.counts["planned"] == len(shown)

    def _note_version(self, chosen: list[PlanSet]) -> None:
        shown = self.model.merged(chosen)
        assert shown is not None
        self.model.versions.append(shown)
        self.model.digests.append(version.open_version(self.store).digest)

    def _crash(self, point: str, action: object) -> None:
        def reach(here: str) -> None:
            if here == point:
                raise Crash

        remove = install(reach)
        try:
            action()  # type: ignore[operator]
        except Crash:
            pass
        finally:
            remove()


def run_history(examples: int, steps: int, seed: int, *, shrink: bool = True) -> None:
    """Run so many random histories; the first that disagrees with the model is made small, if `shrink`, and raised."""
    machine = hypothesis.seed(seed)(History)
    limits = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
    )  # fmt: skip
    real, version.code_commit = version.code_commit, lambda: "unknown"
    try:
        run_state_machine_as_test(machine, settings=limits)
    finally:
        version.code_commit = real
