"""Corpora of ray-cast balls, written through the pipeline's own writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lrm.config import RunConfig, load_config
from pipeline import plan, receipt, version
from pipeline.reader import VersionReader
from pipeline.receipt import member_index
from pipeline.shard import shard_key
from pipeline.spec import DatasetSpec, ProceduralSource, ShardSpec, SplitSpec
from pipeline.store import open_store
from pipeline.types import Sample
from tests.conftest import make_asset, make_sample


def build_corpus(
    folder: Path,
    *,
    num_objects: int = 6,
    num_views: int = 8,
    size_px: int = 64,
    heldout_per_mille: int = 0,
    sources: Sequence[str] = ("fake",),
) -> str:
    """Write and publish a version of balls with coloured octants; returns the corpus' folder.

    Args:
        sources: names of sources, taken in turn.
    """
    spec = DatasetSpec(
        name="balls",
        source=ProceduralSource(num_objects=num_objects),
        shards=ShardSpec(objects_per_shard=4),
        split=SplitSpec(heldout_per_mille=heldout_per_mille),
    )
    store = open_store(str(folder))
    assets = [make_asset(f"ball-{i}", source=sources[i % len(sources)]) for i in range(num_objects)]
    frozen = plan.freeze(store, spec, "f", lambda: assets)
    for shard in frozen.shards:
        samples: dict[str, Sample] = {
            asset.uid: make_sample(asset.uid, num_views=num_views, size_px=size_px, asset=asset)
            for asset in shard.assets
        }
        receipt.commit_shard(store, shard, samples, folder)
    version.publish(store, [frozen])
    return str(folder)


@pytest.fixture(scope="session")
def ball_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six balls, eight views of 64 px each, none held out."""
    return build_corpus(tmp_path_factory.mktemp("balls"))


NANO = (
    "model.encoder.image_px=32", "model.encoder.patch_px=8", "model.encoder.width=32", "model.encoder.num_layers=1",
    "model.encoder.num_heads=2", "model.decoder.num_layers=1", "model.decoder.width=32", "model.decoder.num_heads=2",
    "model.decoder.token_grid=6", "model.decoder.plane_channels=6", "model.volume.mlp_layers=3",
    "model.volume.mlp_width=16", "model.volume.samples_per_ray=16", "data.side_views=2", "data.min_render_px=12",
    "data.max_render_px=24", "data.patch_px=8", "train.device=cpu", "train.num_threads=1", "train.batch_size=2",
    "train.warmup_steps=2", "train.log_every_steps=1", "train.checkpoint_every_steps=4", "train.steps=10",
)  # fmt: skip
"""Overrides of `tiny` that make a step take milliseconds."""


def nano_config(*overrides: str) -> RunConfig:
    """The tiny preset made smaller still, with further overrides."""
    return load_config("tiny", (*NANO, *overrides))


def damage_sample(corpus: str, row: int) -> str:
    """Flip bytes of every plane of a row's sample in its shard; returns the sample's key."""
    reader = VersionReader.open(corpus)
    record = reader.rows.slice(row, 1).to_pylist()[0]
    entry, path = member_index(record), Path(corpus) / shard_key(record["shard_sha256"])
    data = bytearray(path.read_bytes())
    for offset, length in list(zip(entry.offsets, entry.lengths))[1:]:
        data[offset + length // 2] ^= 0xFF
    path.chmod(0o644)
    path.write_bytes(data)
    return str(record["key"])
