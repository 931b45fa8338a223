"""Histories of a corpus against a model: any order of plan, render, fail, publish, rebuild, retry, withdraw, compact,
collect, read and crash, while the source changes and time passes.

The model (`tests.crash.model`) is a few dictionaries and knows nothing of files. After every step the corpus must agree
with it: plans, receipts and versions that have appeared are those that the step may leave, whether it ended or a crash
cut it off; nothing that was stored has changed, and nothing has gone but what a collection may take.

To add an operation: write a rule that does it on the store through `_attempt` and hands `_absorb` what it may leave.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from pipeline import compact, garbage, rebuild, receipt, version
from pipeline import plan as plans
from pipeline.listing import Listing
from pipeline.plan import PlanSet, ShardPlan
from pipeline.reader import VersionReader
from pipeline.rebuild import Survey
from pipeline.store import ObjectInfo, Store, open_store
from pipeline.types import Asset, Failure, FailureKind, Sample, UserError
from tests import corpora
from tests.conftest import make_asset, make_sample
from tests.crash.model import RETRYABLE, Done, Lacking, Model, Result
from tests.crash.work import THINGS, install

UIDS = [f"ball-{i}" for i in range(6)]
HOUR = 3600.0

NAMES, PRINTS = st.sampled_from("ab"), st.sampled_from("ffffg")
POINTS = ["tar:mid", "delete:before", *(f"{thing}:{when}" for thing in THINGS for when in ("before", "after"))]
CRASHES = st.one_of(st.none(), st.none(), st.tuples(st.sampled_from(POINTS), st.integers(0, 1)))
Crashing = tuple[str, int] | None
"""Die at the n-th passing of a point, or do not."""


class Crash(BaseException):
    """The process is gone: nothing that was to follow happens."""


def file_of(uid: str, content: int) -> str:
    """The digest of an object's file in one of its contents."""
    return hashlib.sha256(f"{uid} {content}".encode()).hexdigest()


def asset_of(uid: str, sha256: str) -> Asset:
    """An object of the source as its file is."""
    return make_asset(uid, sha256=sha256)


@functools.lru_cache(maxsize=256)
def ball(uid: str, sha256: str, fingerprint: str, variant: int) -> Sample:
    """Return the sample of a ball in one of its two variants, which have so many views.

    It is so large that a shard of two, one dead, is worth a compaction: the end of a tar may take 10 KiB of zeros.
    """
    made = make_sample(
        f"{uid} {sha256} {fingerprint}", asset=asset_of(uid, sha256), fingerprint=fingerprint, num_views=2, size_px=48
    )
    return replace(made, views=made.views[:variant])


class AgedStore(Store):
    """A store whose objects are as old as the history says."""

    clock_s = 0.0
    born_s: dict[str, float]

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for item in super().list(prefix):
            yield replace(item, modified_s=self.born_s.get(item.key, self.clock_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaves:
    """What a step may leave behind.

    Attributes:
        plans: the assets of each plan that may appear.
        results: what became of the objects of a shard that may be committed.
        shows: what a version shows that may appear, asked once plans and receipts are known.
    """

    plans: Mapping[str, Sequence[str]] = field(default_factory=dict)
    results: Callable[[PlanSet, ShardPlan], Mapping[str, Done]] = lambda *_: {}
    shows: Callable[[], Mapping[str, Result] | None] = lambda: None


class History(RuleBasedStateMachine):
    """One corpus, and its model."""

    new_url: Callable[[], str] = staticmethod(corpora.memory_url)

    def __init__(self) -> None:
        super().__init__()
        real = open_store(self.new_url())
        self.store = AgedStore(real.url, real.backend, real.local_root)
        self.store.born_s = {}
        fails = {UIDS[1]: "network", UIDS[2]: "empty_scene"}
        self.model = Model(source={uid: file_of(uid, 0) for uid in UIDS[:4]}, fails=fails)
        self.stored: dict[str, int] = {}

    # the world around it

    @rule(
        files=st.dictionaries(st.sampled_from(UIDS), st.sampled_from([None, 0, 1, 1]), max_size=3),
        fails=st.none() | st.dictionaries(st.sampled_from(UIDS), st.sampled_from(sorted(RETRYABLE)), max_size=3),
        hours=st.sampled_from([0, 1, 5, 30]),
    )
    def world_changes(self, files: dict[str, int | None], fails: dict[str, str] | None, hours: int) -> None:
        """The source lists other objects or other files, other objects fail, and what is stored grows older."""
        source = self.model.source | {uid: "" if i is None else file_of(uid, i) for uid, i in files.items()}
        self.model.source = {uid: sha256 for uid, sha256 in source.items() if sha256} or self.model.source
        self.model.fails = self.model.fails if fails is None else fails
        self.store.clock_s += hours * HOUR

    # what is done to the corpus

    @rule(name=NAMES, fingerprint=PRINTS, crash=CRASHES)
    def plan(self, name: str, fingerprint: str, crash: Crashing) -> None:
        """Freeze a plan; a plan that is there does not move, whatever the source lists now."""
        spec = corpora.SPEC.model_copy(update={"name": name})
        key = spec.plan_set_id(fingerprint)
        known = self.model.plans.get(key)

        def action() -> None:
            frozen = plans.freeze(self.store, spec, fingerprint, self._assets)
            assert known is None or (frozen.id, frozen.table) == (known.id, known.table)

        whole = self._attempt(crash, action)
        self._absorb(Leaves(plans={} if known else {key: sorted(self.model.source)}))
        assert key in self.model.plans or not whole

    @precondition(lambda self: self.model.plans)
    @rule(data=st.data(), variant=st.sampled_from([2] * 7 + [1]), crash=CRASHES)
    def render(self, data: st.DataObject, variant: int, crash: Crashing) -> None:
        """Commit a shard, some of whose objects fail; one that is committed is adopted as it is."""
        shards = self.model.shards("base", "delta")
        if not shards:
            return
        _, shard = shards[data.draw(st.sampled_from(sorted(shards)), label="shard")]
        whole = self._attempt(crash, lambda: self._commit(shard, variant))
        self._absorb(Leaves(results=lambda p, s: self._results(s, variant) if s.plan_id == shard.plan_id else {}))
        assert shard.plan_id in self.model.committed or not whole

    @precondition(lambda self: self.model.plans)
    @rule(data=st.data(), crash=CRASHES)
    def publish(self, data: st.DataObject, crash: Crashing) -> None:
        """Publish some plans: refused, unchanged, or the next number; after a crash once more."""
        names = data.draw(st.sets(st.sampled_from(sorted(self.model.plans)), min_size=1), label="plans")
        chosen = [self.model.plans[name] for name in sorted(names)]
        self._publish(crash, lambda: version.publish(self.store, chosen), lambda: self.model.merged(chosen))

    @rule(name=NAMES, fingerprint=PRINTS, variant=st.sampled_from([2] * 7 + [1]), crash=CRASHES)
    def dataset(self, name: str, fingerprint: str, variant: int, crash: Crashing) -> None:
        """Bring the corpus to what a spec and the source say: make exactly what is lacking, and publish."""
        spec = corpora.SPEC.model_copy(update={"name": name})
        todo = self.model.lacking(fingerprint, spec.plan_set_id(fingerprint), name)

        def make() -> None:
            self._make(name, fingerprint, todo, None, variant)

        whole = self._attempt(crash, make)
        self._absorb(self._rebuilt(todo, variant))
        if not whole:
            return
        self._made(todo)
        mine = [p for p in self.model.plans.values() if p.fingerprint == fingerprint]
        listing = Listing.of(plans.assets_table(self._assets()))
        self._publish(
            crash,
            lambda: version.publish(self.store, mine, spec, listing=listing),
            lambda: self.model.merged(mine, self.model.source),
        )

    @rule(days=st.sampled_from([1, 1, 4]))
    def routine(self, days: int) -> None:
        """The same spec is built every day, and nothing goes wrong."""
        for _ in range(days):
            self.dataset(name="a", fingerprint="f", variant=2, crash=None)

    @rule(withdrawn=st.none() | st.sampled_from(UIDS))
    def weekly(self, withdrawn: str | None) -> None:
        """The corpus is tidied: an object withdrawn, shards compacted, an old stray collected, and not a young one."""
        self.store.clock_s += 3 * HOUR
        if self.model.versions and withdrawn in self.model.versions[-1]:
            self._tombstone([withdrawn], None)
            self.compact(dead_share=0.0, crash=None)
        for delete in (False, True):
            self.collect(grace_h=2, delete=delete, crash=None, strays={0: 0, 1: 30})

    @precondition(lambda self: self.model.committed)
    @rule(name=NAMES, fingerprint=PRINTS, kinds=st.sampled_from([("empty_scene",), ("network", "empty_scene")]),
          crash=CRASHES)  # fmt: skip
    def retry(self, name: str, fingerprint: str, kinds: tuple[str, ...], crash: Crashing) -> None:
        """Try again what failed with some kinds, in a delta of its own."""
        spec = corpora.SPEC.model_copy(update={"name": name})
        todo = self.model.lacking(fingerprint, spec.plan_set_id(fingerprint), name, kinds)
        whole = self._attempt(crash, lambda: self._make(name, fingerprint, todo, kinds, 2))
        self._absorb(self._rebuilt(replace(todo, open=set()), 2))
        if whole:
            self._made(replace(todo, open=set()))

    @precondition(lambda self: self.model.versions)
    @rule(data=st.data(), crash=CRASHES)
    def tombstone(self, data: st.DataObject, crash: Crashing) -> None:
        """Withdraw objects from the next version and all later ones, made again or not."""
        known = sorted(self.model.versions[-1].keys() | self.model.dead)
        if not known:
            return
        self._tombstone(data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=2), label="uids"), crash)

    def _tombstone(self, uids: list[str], crash: Crashing) -> None:
        dead = self.model.dead | set(uids)
        shows: dict[str, Result] = {
            uid: ("failure", "withdrawn") if uid in dead and result[0] == "sample" else result
            for uid, result in self.model.versions[-1].items()
        }
        before = len(self.model.versions)
        self._publish(crash, lambda: version.tombstone(self.store, uids), lambda: shows, dead=dead)
        assert (len(self.model.versions) > before) == (dead != self.model.dead)
        self.model.dead = dead

    @precondition(lambda self: self.model.versions)
    @rule(dead_share=st.sampled_from([0.0, 0.3, 0.6]), crash=CRASHES)
    def compact(self, dead_share: float, crash: Crashing) -> None:
        """Copy what lives out of shards that are full of the dead: the next version shows the same."""
        newest = self.model.versions[-1]
        number = len(self.model.versions)

        def copies(plan: PlanSet, shard: ShardPlan) -> dict[str, Done]:
            if (plan.kind, plan.number) != ("compact", number):
                return {}
            assert all(newest[asset.uid][0] == "sample" for asset in shard.assets)
            return {a.uid: Done(sha256=newest[a.uid][2], result=newest[a.uid]) for a in shard.assets}

        def action() -> tuple[version.Version, bool]:
            done = compact.compact(self.store, dead_share=dead_share)
            return done.version, done.new

        self._publish(crash, action, lambda: newest, results=copies)
        assert not version.verify_version(self.store, deep=True).problems

    @rule(grace_h=st.sampled_from([0, 2, 24]), delete=st.booleans(), crash=CRASHES,
          strays=st.dictionaries(st.integers(0, 9), st.sampled_from([0, 1, 3, 30]), max_size=2))  # fmt: skip
    def collect(self, grace_h: int, delete: bool, crash: Crashing, strays: dict[int, int]) -> None:
        """Take what nothing names and is old enough: exactly that, and nothing in a dry run.

        Args:
            strays: what writers left that died, or lost a race with other pixels, so many hours ago.
        """
        for which, age_h in strays.items():
            data = f"stray {which}".encode()
            key = f"{('shards/{}.tar', 'manifests/{}.parquet')[which % 2]}".format(hashlib.sha256(data).hexdigest())
            if key not in self.stored:
                self.store.create(key, data)
                self.stored[key], self.store.born_s[key] = len(data), self.store.clock_s - age_h * HOUR
        named = set[str]()
        for i in range(len(self.model.versions)):
            one = version.open_version(self.store, i + 1)
            named |= {f"manifests/{one.manifest_sha256}.parquet"}
            named |= {f"shards/{text}.tar" for text in version.open_rows(self.store, one)["shard_sha256"].to_pylist()}
        old = {key for key in self.stored if self.store.born_s[key] <= self.store.clock_s - grace_h * HOUR}
        needed = self.model.needed(named)
        loose = {key for key in old if key.startswith(("shards/", "manifests/", "receipts/"))} - needed
        found = set[str]()

        def action() -> None:
            done = garbage.collect(self.store, grace_s=grace_h * HOUR, delete=delete, now_s=self.store.clock_s)
            found.update(item.key for item in done.items)

        whole = self._attempt(crash, action)
        assert not whole or found == loose
        gone = self.stored.keys() - corpora.listing(self.store).keys()
        assert gone == (loose if whole and delete else gone & loose if delete else set())
        self.stored = {key: size for key, size in self.stored.items() if key not in gone}
        self.store.born_s = {key: born for key, born in self.store.born_s.items() if key not in gone}

    @precondition(lambda self: self.model.versions)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """Read an object of any version: its pictures are those that were made."""
        number = data.draw(st.integers(1, len(self.model.versions)), label="version")
        opened = version.open_version(self.store, number)
        reader = VersionReader(self.store, opened)
        shown = self.model.versions[number - 1]
        samples = sorted(uid for uid, result in shown.items() if result[0] == "sample")
        assert reader.rows["uid"].to_pylist() == samples
        assert reader.num_failures == len(shown) - len(samples)
        if samples:
            row = data.draw(st.integers(0, len(samples) - 1), label="row")
            _, variant, sha256 = shown[samples[row]]
            made = ball(samples[row], sha256, opened.record["fingerprints"][0], int(variant))
            found = reader.read_views(row, range(len(made.views)))
            if len(opened.record["fingerprints"]) == 1:
                assert [p["rgba"] for p in found.planes] == [view.planes["rgba"].data for view in made.views]
            assert len(found.header.cameras) == len(made.views)

    # what must hold

    @invariant()
    def nothing_changes_or_goes(self) -> None:
        """What was stored is stored, and the versions are those that were published."""
        found = corpora.listing(self.store)
        assert {key: found.get(key) for key in self.stored} == self.stored
        self.stored = found
        for key in found:
            self.store.born_s.setdefault(key, self.store.clock_s)
        assert version.latest_number(self.store) == len(self.model.versions)

    def teardown(self) -> None:
        """At the end every version is what it was, and every committed shard accounts for its plan."""
        for number, (digest, shown) in enumerate(zip(self.model.digests, self.model.versions), start=1):
            opened = version.open_version(self.store, number)
            assert opened.digest == digest
            self._shows(opened, shown)
            assert not version.verify_version(self.store, number, deep=True).problems
        for plan_id, (_, shard) in self.model.shards("base", "delta", "compact").items():
            if plan_id in self.model.committed:
                assert set(self.model.committed[plan_id]) == {asset.uid for asset in shard.assets}

    # how it is done

    def _assets(self) -> list[Asset]:
        return [asset_of(uid, sha256) for uid, sha256 in sorted(self.model.source.items())]

    def _results(self, shard: ShardPlan, variant: int) -> dict[str, Done]:
        """Return what becomes of a shard's objects if they are made now."""
        out = {}
        for asset in shard.assets:
            sha256, kind = str(asset.sha256), self.model.fails.get(asset.uid)
            result: Result = ("failure", kind) if kind else ("sample", str(variant), sha256)
            out[asset.uid] = Done(sha256=sha256, result=result)
        return out

    def _commit(self, shard: ShardPlan, variant: int) -> None:
        results: dict[str, Sample | Failure] = {}
        for uid, done in self._results(shard, variant).items():
            results[uid] = (
                Failure(uid=uid, kind=FailureKind(done.result[1]), message="as drawn")
                if done.result[0] == "failure"
                else ball(uid, done.sha256, shard.fingerprint, variant)
            )
        ours = corpora.commit(self.store, shard, results)[1]
        assert ours is (shard.plan_id not in self.model.committed)

    def _survey(self, name: str, fingerprint: str, kinds: tuple[str, ...] | None) -> Survey:
        spec = corpora.SPEC.model_copy(update={"name": name})
        newest = version.latest_number(self.store)
        tombstones = version.open_version(self.store, newest).tombstones if newest else ()
        return rebuild.survey(
            self.store, spec, fingerprint, Listing.of(plans.assets_table(self._assets())),
            version.plan_sets(self.store), tombstones=tombstones, kinds=kinds,
        )  # fmt: skip

    def _make(self, name: str, fingerprint: str, todo: Lacking, kinds: tuple[str, ...] | None, variant: int) -> None:
        """What `make dataset` and `make retry` do, without Ray."""
        spec = corpora.SPEC.model_copy(update={"name": name})
        found = self._survey(name, fingerprint, kinds)
        assert found.pending["uid"].to_pylist() == todo.pending
        assert {plan.plan_ids[i] for plan, places in found.open_work for i in places} == todo.open
        work: list[ShardPlan] = []
        if todo.pending:
            frozen, ours = rebuild.freeze_pending(self.store, spec, fingerprint, found, "")
            assert (frozen.id, ours) == (todo.plan, True)
            work = list(frozen.shards)
        if kinds is None:
            opened = self._survey(name, fingerprint, None)
            assert not opened.pending.num_rows
            work = [plan.shards[i] for plan, places in opened.open_work for i in places]
        for shard in work:
            self._commit(shard, variant)

    def _made(self, todo: Lacking) -> None:
        """Everything that was to be made is committed."""
        planned = self.model.plans[todo.plan].plan_ids if todo.pending else []
        assert todo.open | set(planned) <= self.model.committed.keys()

    def _rebuilt(self, todo: Lacking, variant: int) -> Leaves:
        def results(plan: PlanSet, shard: ShardPlan) -> dict[str, Done]:
            allowed = plan.id == todo.plan or shard.plan_id in todo.open
            return self._results(shard, variant) if allowed else {}

        return Leaves(plans={todo.plan: todo.pending} if todo.pending else {}, results=results)

    def _publish(
        self,
        crash: Crashing,
        action: Callable[[], tuple[version.Version, bool]],
        shows: Callable[[], Mapping[str, Result] | None],
        *,
        results: Callable[[PlanSet, ShardPlan], Mapping[str, Done]] = lambda *_: {},
        dead: set[str] | None = None,
    ) -> None:
        """Do what makes a version; after a crash do it again, which must end where it would have."""
        for trial in (crash, None):
            answers: list[tuple[version.Version, bool] | None] = []

            def attempt(answers: list[tuple[version.Version, bool] | None] = answers) -> None:
                try:
                    answers.append(action())
                except UserError:
                    answers.append(None)

            before = len(self.model.versions)
            whole = self._attempt(trial, attempt)
            self._absorb(Leaves(results=results, shows=shows), dead)
            if not whole:
                continue
            shown = shows()
            assert (answers[0] is None) == (shown is None)
            if answers[0] is not None and shown is not None:
                published, new = answers[0]
                assert new == (len(self.model.versions) > before)
                assert (published.number, published.digest) == (len(self.model.versions), self.model.digests[-1])
                self._shows(published, shown)
            return

    def _absorb(self, leaves: Leaves, dead: set[str] | None = None) -> None:
        """Take plans, receipts and versions that have appeared into the model, if the step may leave them."""
        compacting = leaves.shows() is not None
        listed = corpora.listing(self.store)
        for name in _names_of(listed, "plans/") - self.model.plans.keys():
            found = plans.load(self.store, name)
            if not (found.kind == "compact" and compacting):
                assert found.table["uid"].to_pylist() == list(leaves.plans[found.id])
                files = [self.model.source[uid] for uid in leaves.plans[found.id]]
                assert found.table["sha256"].to_pylist() == files
            self.model.plans[found.id] = found
        shards = self.model.shards("base", "delta", "compact")
        for plan_id in _names_of(listed, "receipts/") - self.model.committed.keys():
            done = receipt.load(self.store, plan_id)
            wanted = dict(leaves.results(*shards[plan_id]))
            assert {row["uid"]: _done(row) for row in done.rows.to_pylist()} == wanted
            self.model.committed[plan_id] = wanted
            self.model.shard_keys[plan_id] = done.shard_sha256 and f"shards/{done.shard_sha256}.tar"
        if version.latest_number(self.store) > len(self.model.versions):
            shown, opened = leaves.shows(), version.open_version(self.store)
            assert shown is not None
            self._shows(opened, shown)
            assert opened.tombstones == (self.model.dead if dead is None else dead)
            self.model.versions.append(dict(shown))
            self.model.digests.append(opened.digest)

    def _shows(self, opened: version.Version, shown: Mapping[str, Result]) -> None:
        rows = {row["uid"]: _done(row).result for row in version.open_rows(self.store, opened).to_pylist()}
        assert rows.keys() == shown.keys()
        for uid, result in shown.items():
            if result[0] == "sample":
                assert rows[uid] == result
            else:  # which of several failures is told is nobody's promise
                assert rows[uid][0] == "failure"
                assert rows[uid][1] in result[1:]
        assert opened.counts["planned"] == len(shown)
        assert opened.counts["samples"] == sum(result[0] == "sample" for result in shown.values())

    def _attempt(self, crash: Crashing, action: Callable[[], object]) -> bool:
        """Do something, and die at a point of it if asked; returns whether it came to its end."""
        passed = itertools.count()

        def reach(here: str) -> None:
            if crash is not None and here == crash[0] and next(passed) == crash[1]:
                raise Crash

        def delete(store: Store, key: str) -> None:
            reach("delete:before")
            real(store, key)

        remove, real = install(reach), garbage._delete
        garbage._delete = delete
        try:
            action()
        except Crash:
            return False
        finally:
            garbage._delete = real
            remove()
        return True


def _names_of(listed: Iterable[str], prefix: str) -> set[str]:
    return {key.removeprefix(prefix).removesuffix(".parquet") for key in listed if key.startswith(prefix)}


def _done(row: Mapping[str, object]) -> Done:
    sha256 = str(row["asset_sha256"])
    if row["status"] == "sample":
        return Done(sha256=sha256, result=("sample", str(row["num_views"]), sha256))
    return Done(sha256=sha256, result=("failure", str(row["failure_kind"])))


def run_history(
    examples: int, steps: int, seed: int, *, shrink: bool = True, new_url: Callable[[], str] | None = None
) -> None:
    """Run so many random histories; the first that disagrees with the model is made small, if `shrink`, and raised.

    Args:
        new_url: gives each history its corpus; default one in memory.
    """
    kind = History if new_url is None else type("History", (History,), {"new_url": staticmethod(new_url)})
    machine = hypothesis.seed(seed)(kind)
    limits = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
    )  # fmt: skip
    real, version.code_commit = version.code_commit, lambda: "unknown"
    try:
        run_state_machine_as_test(machine, settings=limits)
    finally:
        version.code_commit = real
