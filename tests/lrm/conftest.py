"""Corpora of ray-cast balls, written through the pipeline's own writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import plan, receipt, version
from pipeline.spec import DatasetSpec, ProceduralSource, ShardSpec, SplitSpec
from pipeline.store import open_store
from pipeline.types import Sample
from tests.conftest import make_asset, make_sample

CorpusMaker = Callable[..., str]


def build_corpus(
    folder: Path, *, num_objects: int = 6, num_views: int = 8, size_px: int = 64, heldout_per_mille: int = 0
) -> str:
    """Write and publish a version of balls with coloured octants; returns the corpus' folder."""
    spec = DatasetSpec(
        name="balls",
        source=ProceduralSource(num_objects=num_objects),
        shards=ShardSpec(objects_per_shard=4),
        split=SplitSpec(heldout_per_mille=heldout_per_mille),
    )
    store = open_store(str(folder))
    assets = [make_asset(f"ball-{i}") for i in range(num_objects)]
    frozen = plan.freeze(store, spec, "f", lambda: assets)
    for shard in frozen.shards:
        samples: dict[str, Sample] = {
            asset.uid: make_sample(asset.uid, num_views=num_views, size_px=size_px) for asset in shard.assets
        }
        receipt.commit_shard(store, shard, samples, folder)
    version.publish(store, [frozen])
    return str(folder)


@pytest.fixture(scope="session")
def ball_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six balls, eight views of 64 px each, none held out."""
    return build_corpus(tmp_path_factory.mktemp("balls"))
