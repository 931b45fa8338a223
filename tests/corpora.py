"""Small corpora of made-up balls: a plan, its results, its commits. Pure functions of their arguments."""

from __future__ import annotations

import functools
import tempfile
import uuid
from pathlib import Path

import obstore

from pipeline import plan as plans
from pipeline import receipt
from pipeline.plan import PlanSet, ShardPlan
from pipeline.spec import DatasetSpec, ProceduralSource, ShardSpec
from pipeline.store import Store
from pipeline.types import Failure, FailureKind, Sample
from tests.conftest import make_asset, make_sample

SPEC = DatasetSpec(name="fake", source=ProceduralSource(num_objects=5), shards=ShardSpec(objects_per_shard=3))


def memory_url() -> str:
    """Return the URL of an empty corpus in memory; names are not counted, since all tests of a process share them."""
    return f"memory://{uuid.uuid4()}"


def freeze(store: Store, count: int = 5, fingerprint: str = "f") -> PlanSet:
    """Freeze a plan of so many balls, three a shard."""
    return plans.freeze(store, SPEC, fingerprint, lambda: [make_asset(f"ball-{i}") for i in range(count)])


@functools.lru_cache(maxsize=256)
def ball(uid: str, fingerprint: str) -> Sample:
    """Return the small sample of a ball, made once a process."""
    return make_sample(uid, fingerprint=fingerprint, num_views=2, size_px=16)


def results_of(shard: ShardPlan) -> dict[str, Sample | Failure]:
    """Make every ball of a shard; those whose number ends in 1 fail."""
    return {
        asset.uid: Failure(uid=asset.uid, kind=FailureKind.EMPTY_SCENE, message="no mesh")
        if asset.uid.endswith("1")
        else ball(asset.uid, shard.fingerprint)
        for asset in shard.assets
    }


def commit(
    store: Store, shard: ShardPlan, results: dict[str, Sample | Failure] | None = None
) -> tuple[receipt.Receipt, bool]:
    """Commit a shard from a scratch folder of its own."""
    with tempfile.TemporaryDirectory(prefix="lrm-test-") as scratch:
        return receipt.commit_shard(store, shard, results or results_of(shard), Path(scratch))


def overwrite(store: Store, key: str, data: bytes) -> None:
    """Put other bytes under a key, as damage does: past the store's own methods, which never overwrite."""
    if store.local_root is not None:
        (store.local_root / key).write_bytes(data)
    else:
        obstore.put(store.backend, key, data)


def remove(store: Store, key: str) -> None:
    """Take an object away behind the pipeline's back."""
    obstore.delete(store.backend, key)


def listing(store: Store) -> dict[str, int]:
    """Return every object of a store with its length."""
    return {item.key: item.num_bytes for item in store.list("")}
