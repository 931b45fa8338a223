"""A corpus with a source, a producer and a launcher that are made up: pure numpy, no Ray, no Blender."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from pipeline import plan as plans
from pipeline import rebuild, receipt, version
from pipeline.listing import Listing
from pipeline.rebuild import Survey
from pipeline.spec import DatasetSpec, ProceduralSource, ShardSpec
from pipeline.store import Store
from pipeline.types import Asset, Failure, FailureKind, Sample
from pipeline.version import Version
from tests.conftest import make_asset, make_sample

SPEC = DatasetSpec(name="fake", source=ProceduralSource(num_objects=5), shards=ShardSpec(objects_per_shard=3))


class CrashError(Exception):
    """The launcher dies here."""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def changed_spec(spec: DatasetSpec = SPEC, **sections: dict[str, object]) -> DatasetSpec:
    """The spec with some keys of some sections set."""
    data = spec.model_dump()
    return DatasetSpec.model_validate(data | {name: data[name] | values for name, values in sections.items()})


@lru_cache(maxsize=512)
def tiny_sample(asset: Asset, fingerprint: str) -> Sample:
    """A sample whose pictures follow from the asset's bytes and the fingerprint."""
    uid = f"{asset.uid} {asset.sha256} {fingerprint}"
    return make_sample(uid, asset=asset, num_views=3, size_px=32, fingerprint=fingerprint)


@dataclass
class Workshop:
    """What the world does to a corpus: a source that changes, objects that fail, a launcher that dies.

    Attributes:
        source: assets by uid.
        fails: uids that fail when they are made, and how.
        made: every (uid, digest) that was made, in order.
        crash_after: shards that are committed before the launcher dies.
    """

    store: Store
    spec: DatasetSpec = SPEC
    source: dict[str, Asset] = field(default_factory=dict)
    fails: dict[str, FailureKind] = field(default_factory=dict)
    made: list[tuple[str, str]] = field(default_factory=list)
    crash_after: int | None = None

    def put(self, uids: Iterable[str], content: str = "", **changes: object) -> None:
        """Add objects to the source, or change them."""
        for uid in uids:
            values = {"sha256": digest(uid + content)} | changes
            self.source[uid] = make_asset(uid, **values)

    @property
    def fingerprint(self) -> str:
        return self.spec.fingerprint("fake 1")

    @property
    def listing(self) -> Listing:
        return Listing.of(plans.assets_table([self.source[uid] for uid in sorted(self.source)]))

    def look(self, kinds: tuple[str, ...] | None = None) -> Survey:
        newest = version.latest_number(self.store)
        tombstones = version.open_version(self.store, newest).tombstones if newest else ()
        return rebuild.survey(
            self.store, self.spec, self.fingerprint, self.listing, version.plan_sets(self.store),
            tombstones=tombstones, kinds=kinds,
        )  # fmt: skip

    def make(self, shard: plans.ShardPlan) -> None:
        """Make and commit one shard."""
        results: dict[str, Sample | Failure] = {}
        for asset in shard.assets:
            if asset.uid in self.fails:
                results[asset.uid] = Failure(uid=asset.uid, kind=self.fails[asset.uid], message="as asked")
                continue
            results[asset.uid] = tiny_sample(asset, shard.fingerprint)
            self.made.append((asset.uid, str(asset.sha256)))
        with tempfile.TemporaryDirectory() as folder:
            receipt.commit_shard(self.store, shard, results, Path(folder))

    def rebuild(self, kinds: tuple[str, ...] | None = None) -> Survey:
        """What `make dataset` does, without Ray; returns what it saw at first."""
        first = found = self.look(kinds)
        while found.pending.num_rows:
            if rebuild.freeze_pending(self.store, self.spec, self.fingerprint, found, "fake 1")[1]:
                break
            found = self.look(kinds)
        committed = 0
        for plan, indexes in self.look().open_work:
            for index in indexes:
                if committed == self.crash_after:
                    raise CrashError
                self.make(plan.shards[index])
                committed += 1
        return first

    def publish(self) -> Version:
        mine = [p for p in version.plan_sets(self.store) if p.fingerprint == self.fingerprint]
        return version.publish(self.store, mine, self.spec, listing=self.listing)[0]

    def dataset(self) -> Version:
        self.rebuild()
        return self.publish()
