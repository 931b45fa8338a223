"""What a corpus should hold, as dictionaries: the model that histories are held to. It knows nothing of files.

A corpus is what each committed shard says of each object. From that follow, by the rules restated here,

    what a version shows      a sample beats a failure, a younger plan an older one, the source's bytes all others; two
                              fingerprints or two different samples of one file must be refused; the dead stay dead
    what a rebuild makes      what is listed, neither held nor dead nor planned and open, and has not failed for good
    what a collection takes   what no version names and no receipt needs, if it is older than the grace

`tests.crash.history` does each thing to the store and to the model, and compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.plan import PlanSet, ShardPlan

Result = tuple[str, ...]
"""("sample", variant, sha256 of its file): a renderer that is not reproducible makes one of two variants;
("failure", kind), or in a version all kinds that may be told."""

RETRYABLE = {"empty_scene": False, "network": True}
TRIES = 3
COPY = 10**6
"""Copies stand in front of what they are copies of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of one planned object."""

    sha256: str
    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Lacking:
    """What a rebuild will do: freeze `pending` under the name `plan`, and make the shards `open`."""

    plan: str
    pending: list[str]
    open: set[str]


@dataclass(slots=True)
class Model:
    """What a corpus should hold.

    Attributes:
        plans: by name.
        committed: plan_id of a shard -> uid -> what became of it.
        shard_keys: plan_id of a committed shard -> key of its tar, if it holds a sample.
        source: what the source lists: uid -> sha256 of the file.
        fails: uids that fail when they are made, with the kind.
        dead: uids that were withdrawn by hand.
        versions: what each version shows, oldest first, by uid.
        digests: of the versions.
    """

    plans: dict[str, PlanSet] = field(default_factory=dict)
    committed: dict[str, dict[str, Done]] = field(default_factory=dict)
    shard_keys: dict[str, str | None] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    fails: dict[str, str] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    versions: list[dict[str, Result]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def shards(self, *kinds: str) -> dict[str, tuple[PlanSet, ShardPlan]]:
        """Return every planned shard of plans of these kinds by its plan_id."""
        return {s.plan_id: (p, s) for p in self.plans.values() if p.kind in kinds for s in p.shards}

    def merged(self, chosen: Sequence[PlanSet], source: Mapping[str, str] | None = None) -> dict[str, Result] | None:
        """Return what a version of these plans shows, or None where it must be refused.

        Args:
            source: the objects and files that it shall hold; default all that were made.
        """
        ranks: dict[str, int] = {}
        prints: dict[str, str] = {}
        for plan in chosen:
            for shard in plan.shards:
                rank = plan.number + (COPY if plan.kind == "compact" else 0)
                ranks[shard.plan_id] = max(rank, ranks.get(shard.plan_id, 0))
                prints[shard.plan_id] = plan.fingerprint
        found: dict[str, list[tuple[int, str, Done]]] = {}
        for plan_id, rank in ranks.items():
            for uid, done in self.committed.get(plan_id, {}).items():
                if source is None or source.get(uid) == done.sha256:
                    found.setdefault(uid, []).append((rank, prints[plan_id], done))
        shown: dict[str, Result] = {}
        for uid, rows in found.items():
            result = self._one_of(rows)
            if result is None:
                return None
            shown[uid] = ("failure", "withdrawn") if uid in self.dead and result[0] == "sample" else result
        return shown if ranks.keys() & self.committed.keys() else None

    @staticmethod
    def _one_of(rows: list[tuple[int, str, Done]]) -> Result | None:
        if len({fingerprint for _, fingerprint, _ in rows}) > 1:
            return None
        samples = [(rank, done) for rank, _, done in rows if done.result[0] == "sample"]
        if not samples:
            top = max(rank for rank, _, _ in rows)
            return ("failure", *sorted({done.result[1] for rank, _, done in rows if rank == top}))
        made = [(rank, done) for rank, done in samples if rank < COPY] or samples
        top = max(rank for rank, _ in made)
        newest = {done.sha256 for rank, done in made if rank == top}
        if len(newest) > 1:
            return None
        contents = {done.result for _, done in samples if done.sha256 in newest}
        return contents.pop() if len(contents) == 1 else None

    def lacking(self, fingerprint: str, base: str, name: str, kinds: Sequence[str] | None = None) -> Lacking:
        """Return what a rebuild of the spec `name`, whose base plan is called `base`, finds to do."""
        made = [p for p in self.plans.values() if p.fingerprint == fingerprint and p.kind != "compact"]
        held, planned, open_, read = set[str](), set[str](), set[str](), set[str]()
        last: dict[str, str] = {}
        tries: dict[str, int] = {}
        for plan in sorted(made, key=lambda p: (p.number, p.id)):
            for shard in [s for s in plan.shards if s.plan_id not in read]:
                read.add(shard.plan_id)
                for uid, done in self.committed.get(shard.plan_id, {}).items():
                    if self.source.get(uid) != done.sha256:
                        continue
                    if done.result[0] == "sample":
                        held.add(uid)
                    else:
                        last[uid] = done.result[1]
                        tries[uid] = tries.get(uid, 0) + RETRYABLE[done.result[1]]
        wanted = self.source.keys() - held - self.dead
        for plan in made:
            for shard in plan.shards:
                mine = {a.uid for a in shard.assets if self.source.get(a.uid) == a.sha256}
                if shard.plan_id not in self.committed and (plan.kind == "delta" or plan.name == name):
                    planned |= mine
                    if mine & wanted:
                        open_.add(shard.plan_id)
        if kinds is None:
            again = {uid for uid in last if RETRYABLE[last[uid]] and tries[uid] < TRIES} | (wanted - last.keys())
        else:
            again = {uid for uid in last if last[uid] in kinds}
        deltas = [p.number for p in made if p.kind == "delta"]
        nothing = not (deltas or held or last or planned or base in self.plans)
        number = 1 + max(deltas, default=0)
        return Lacking(
            plan=base if nothing else f"delta-{fingerprint[:16]}-{number:06d}",
            pending=sorted((wanted - planned) & again),
            open=open_,
        )

    def needed(self, named: set[str]) -> set[str]:
        """Return the keys of shards and receipts that nobody may take: `named` by versions, or needed by receipts."""
        copied = {
            (self.plans[p.id].fingerprint, uid, done)
            for plan_id, (p, _) in self.shards("compact").items()
            for uid, done in self.committed.get(plan_id, {}).items()
        }
        keys = {f"receipts/{plan_id}.parquet" for plan_id in self.shards("base", "delta", "compact")}
        for plan_id, (plan, _) in self.shards("base", "delta", "compact").items():
            key = self.shard_keys.get(plan_id)
            alone = any(
                done.result[0] == "sample" and uid not in self.dead and (plan.fingerprint, uid, done) not in copied
                for uid, done in self.committed.get(plan_id, {}).items()
            )
            if key is not None and (alone or plan.kind == "compact"):
                keys.add(key)
        return keys | named
