"""`make dataset`: bring a corpus to what a spec says, paying only for what it lacks. `make retry`: try failures again.

    look     list the source, compare it with the receipts of the spec's fingerprint     pipeline.rebuild
    freeze   what is lacking becomes a delta plan, once the workers are known to be there
    make     every open shard that holds a wanted object, this delta's and those that others left
    publish  a version of exactly the listed objects

Each step may be repeated, or done by two launchers at a time: deltas are numbered by create-if-absent, shards are
committed once, and publishing the same again changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.build import Work, run
from jobs.driver import Summary
from jobs.produce import Producer, producer_of
from pipeline import rebuild, version
from pipeline.listing import Listing
from pipeline.plan import PlanSet, assets_table, check_keys
from pipeline.rebuild import Survey
from pipeline.sources import list_assets
from pipeline.spec import DatasetSpec
from pipeline.store import Store, open_store
from pipeline.types import UserError
from pipeline.version import Version

MAX_LOOKS = 10
"""How often another launcher may freeze the next delta before us until we give up."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What a rebuild did: `summary` is None if nothing was to be made, `version` if none was published."""

    found: Survey
    summary: Summary | None
    version: Version | None
    new: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        published = self.version and {
            "version": self.version.number, "digest": self.version.digest, "new": self.new,
            "counts": dict(self.version.counts),
        }  # fmt: skip
        return rebuild.as_json(self.found) | {
            "made": self.summary.as_json() if self.summary else None, "published": published,
        }  # fmt: skip


class Rebuild:
    """One spec, its source as it is now, and a corpus."""

    def __init__(self, spec: DatasetSpec, store: Store) -> None:
        self.spec, self.store = spec, store
        self.produce, self.producer = producer_of(spec)
        self.fingerprint = spec.fingerprint(self.producer)
        assets = list_assets(spec)
        if not assets:  # an empty version would be published of a source that is not there
            raise UserError(f"spec {spec.name}: the source lists no assets; check its path, uids or categories")
        check_keys(assets)
        self.listing = Listing.of(assets_table(assets))

    def look(self, kinds: tuple[str, ...] | None = None) -> Survey:
        """Compare the source with the corpus as it is now."""
        newest = version.latest_number(self.store)
        tombstones = version.open_version(self.store, newest).tombstones if newest else frozenset[str]()
        plan_sets = version.plan_sets(self.store)
        return rebuild.survey(
            self.store, self.spec, self.fingerprint, self.listing, plan_sets, tombstones=tombstones, kinds=kinds
        )

    def freeze(self, found: Survey, kinds: tuple[str, ...] | None = None) -> PlanSet | None:
        """Freeze what is pending; return the plan set that it stands in, None if nothing is (any more)."""
        for _ in range(MAX_LOOKS):
            if not found.pending.num_rows:
                return None
            plan, ours = rebuild.freeze_pending(self.store, self.spec, self.fingerprint, found, self.producer)
            if ours:
                return plan
            found = self.look(kinds)
        raise UserError(
            f"corpus {self.store.url}: other launchers froze {MAX_LOOKS} plans in the meantime; run the command again"
        )

    def make(
        self, found: Survey, kinds: tuple[str, ...] | None, produce: Producer | None, show_progress: bool
    ) -> Summary:
        """Freeze what is pending and make all open work."""

        def freeze() -> Work:
            plan = self.freeze(found, kinds)
            if kinds is None:
                return self.look().open_work
            return [(plan, list(range(len(plan.shards))))] if plan is not None else []

        spec = self.spec
        if kinds is not None or found.counts["retried"] > found.pending.num_rows / 2:
            # What failed before mostly fails again: that says nothing of a cause that would be worth stopping for.
            workers = spec.workers.model_copy(update={"max_failure_share": 1.0})
            spec = spec.model_copy(update={"workers": workers})
        return run(spec, self.store, freeze, produce or self.produce, show_progress, is_frozen=False)


def _views_of(spec: DatasetSpec) -> int | None:
    return spec.capture.num_views if spec.is_captured else spec.render.num_views


def _open(corpus: str) -> Store:
    store = open_store(corpus)
    store.probe()
    return store


def make_dataset(
    spec: DatasetSpec,
    corpus: str,
    *,
    dry_run: bool = False,
    deep: bool = False,
    produce: Producer | None = None,
    show_progress: bool = True,
    say: Say = lambda _: None,
) -> Rebuilt:
    """Bring a corpus to what a spec says, and publish it.

    Args:
        dry_run: only look; freezes, makes and publishes nothing.
        deep: decode every sample of the version before it is published.
        say: told in a line what will be made, before it is.

    Raises:
        UserError: in one line, for what the user can mend.
        KeyboardInterrupt: as `jobs.build.build`.
    """
    job = Rebuild(spec, _open(corpus))
    found = job.look()
    say(rebuild.as_text(found.counts, _views_of(spec)))
    if dry_run:
        return Rebuilt(found=found, summary=None, version=None)
    summary = None
    if found.pending.num_rows or found.open_work:
        summary = job.make(found, None, produce, show_progress)
    mine = [p for p in version.plan_sets(job.store) if p.fingerprint == job.fingerprint]
    published, new = version.publish(job.store, mine, spec, listing=job.listing, deep=deep)
    return Rebuilt(found=found, summary=summary, version=published, new=new)


def retry(
    spec: DatasetSpec,
    corpus: str,
    kinds: tuple[str, ...],
    *,
    produce: Producer | None = None,
    show_progress: bool = True,
    say: Say = lambda _: None,
) -> Rebuilt:
    """Try again the listed objects that failed with these kinds, in a delta of their own; publishes nothing."""
    job = Rebuild(spec, _open(corpus))
    if all(plan.fingerprint != job.fingerprint for plan in version.plan_sets(job.store)):
        raise UserError(
            f"corpus {job.store.url}: spec {spec.name} has no plan here under these settings; give the SPEC= and SET= "
            "that its objects were made with"
        )
    found = job.look(kinds)
    say(f"{found.pending.num_rows} object(s) failed with {', '.join(kinds)} and are tried again")
    summary = job.make(found, kinds, produce, show_progress) if found.pending.num_rows else None
    return Rebuilt(found=found, summary=summary, version=None)


def plan_delta(spec: DatasetSpec, corpus: str, say: Say) -> PlanSet | None:
    """Freeze what `make_dataset` would, and make nothing: for an array of jobs that share the shards out."""
    job = Rebuild(spec, _open(corpus))
    found = job.look()
    say(rebuild.as_text(found.counts, _views_of(spec)))
    return job.freeze(found)


def dump(result: Rebuilt) -> str:
    """Return a result as one line of JSON."""
    return json.dumps(result.as_json())
