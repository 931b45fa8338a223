"""Real 3D files through the whole job: Ray, fetch, checks, Blender, shards.

What each broken file must end as stands here by name, with the cause that a person found in it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.build import build
from pipeline import manifest, version
from pipeline.spec import DatasetSpec, DirectorySource, FetchSpec, ObjaverseSource, RenderSpec, ShardSpec
from pipeline.store import open_store
from tests.conftest import SHARED
from tests.mirror import Mirror
from tests.render.conftest import BLENDER_5

SMALL = RenderSpec(resolution_px=160, samples=3, denoise=False)  # thin tubes vanish in smaller pictures

BROKEN = {
    "broken/IndexOutOfRange.gltf": "corrupt_file",
    "broken/RecursiveNodes.gltf": "corrupt_file",
    "broken/bufferview-out-of-range.glb": "corrupt_file",
    "broken/corrupt-draco-stream.glb": "partial_import",
    "broken/corrupt-texture-bytes.glb": "missing_texture",
    "broken/decimal-comma-teapots.DAE": "empty_scene",
    "broken/empty-default-scene.glb": "empty_scene",
    "broken/git-lfs-pointer.glb": "not_an_asset",
    "broken/gltf1-version-BoxTextured.glb": "unsupported_format",
    "broken/gzip-encoded.glb": "not_an_asset",
    "broken/html-error-page.glb": "not_an_asset",
    "broken/infinite-positions-BoxWithInfinites.glb": "degenerate_geometry",
    "broken/json-error-body.glb": "not_an_asset",
    "broken/missing-bin-chunk.glb": "corrupt_file",
    "broken/missing-external-buffer.gltf": "missing_resource",
    "broken/no-mesh.glb": "empty_scene",
    "broken/sceneWrongType.gltf": "corrupt_file",
    "broken/trailing-garbage.glb": "corrupt_file",
    "broken/truncated-half.glb": "truncated",
    "broken/truncated-header.glb": "truncated",
    "broken/truncated-in-json.glb": "truncated",
    "broken/zero-byte.glb": "empty_file",
    "broken/zero-extent.glb": "degenerate_geometry",
}


def outcomes(corpus: Path) -> dict[str, str]:
    """Return uid -> "sample" or the kind of failure, from the receipts."""
    store = open_store(str(corpus))
    plan = version.plan_sets(store)[0]
    receipts = manifest.load_receipts(store, [shard.plan_id for shard in plan.shards])
    rows = [row for receipt in receipts for row in receipt.rows.to_pylist()]
    assert all(row["num_views"] == 32 for row in rows if row["status"] == "sample")
    return {row["uid"]: row["failure_kind"] or "sample" for row in rows}


def check_shards(corpus: Path) -> int:
    """Run the independent checker over all shards; return the number of samples it saw."""
    shards = sorted(str(path) for path in (corpus / "shards").iterdir())
    checker = SHARED / "tools" / "check_corpus.py"
    done = subprocess.run(
        [sys.executable, str(checker), "--preset", "lrm", *shards],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return int(json.loads(done.stdout.splitlines()[-1])["samples"])


@pytest.mark.blender
@pytest.mark.timeout(1200)
def test_every_shared_asset_ends_as_a_sample_or_a_true_failure(shared_assets: Path, tmp_path: Path) -> None:
    spec = DatasetSpec(
        name="assets",
        source=DirectorySource(path=str(shared_assets)),
        render=SMALL,
        shards=ShardSpec(objects_per_shard=16),
    )
    summary = build(spec, str(tmp_path / "corpus"), show_progress=False)
    assert summary.accounted
    with (shared_assets / "MANIFEST.csv").open(encoding="utf-8") as file:
        listed = {row["file"] for row in csv.DictReader(file)}
    expected = {name: BROKEN.get(name, "sample") for name in listed}
    if BLENDER_5:
        lost = {name for name in listed if name.lower().endswith((".dae", "-draco.glb", "-draco-stream.glb"))}
        expected |= dict.fromkeys(lost, "unsupported_format")
    assert outcomes(tmp_path / "corpus") == expected
    assert check_shards(tmp_path / "corpus") == sum(kind == "sample" for kind in expected.values())


BAD = {
    "404": "not_found",
    "410": "not_found",
    "401": "access_denied",
    "403": "access_denied",
    "429": "network",
    "500": "network",
    "stall": "network",
    "reset": "network",
    "drip": "network",
    "redirect-loop": "network",
    "redirect-file": "access_denied",
    "cut": "truncated",
    "cut-no-length": "truncated",
    "html": "not_an_asset",
    "lfs": "not_an_asset",
    "json": "not_an_asset",
    "gzip": "not_an_asset",
    "empty": "empty_file",
    "wrong-bytes": "checksum_mismatch",
    "too-long": "checksum_mismatch",
}
PASSING = {0: "429-once", 1: "500-once", 2: "cut-once"}  # what the genuine objects must survive


@pytest.mark.blender
def test_objaverse_over_http_survives_twenty_bad_objects(shared_assets: Path, tmp_path: Path) -> None:
    genuine = {path.stem: path.read_bytes() for path in sorted((shared_assets / "objaverse").glob("*.glb"))}
    assert len(genuine) == 3
    filler = (shared_assets / "low-poly-tree.glb").read_bytes()
    bad = {hashlib.md5(fault.encode()).hexdigest(): fault for fault in BAD}
    faults = bad | {uid: PASSING[i] for i, uid in enumerate(genuine)}
    excluded, unlisted = "e" * 32, "f" * 32
    objects = genuine | dict.fromkeys(bad, filler) | {excluded: filler}
    licenses = {excluded: "by-nc"}
    with Mirror(objects, licenses=licenses, faults=faults) as mirror:
        spec = DatasetSpec.model_validate(
            {
                "name": "objaverse",
                "source": ObjaverseSource(uids=(*objects, unlisted), base_url=mirror.url),
                "render": SMALL,
                "shards": {"objects_per_shard": 8},
                "admission": {"licenses": "commercial"},
                "fetch": FetchSpec(
                    cache_dir=str(tmp_path / "cache"), connect_timeout_s=1, read_timeout_s=1, deadline_s=6,
                    max_tries=3, backoff_s=0.05,
                ),
            }
        )  # fmt: skip
        summary = build(spec, str(tmp_path / "corpus"), show_progress=False)
        assert not mirror.requests_for(excluded), "an excluded licence must not be downloaded"
    assert summary.accounted
    expected = {uid: BAD[fault] for uid, fault in bad.items()} | dict.fromkeys(genuine, "sample")
    expected |= {excluded: "licence_excluded", unlisted: "licence_excluded"}
    found = outcomes(tmp_path / "corpus")
    assert found == expected
    assert check_shards(tmp_path / "corpus") == 3
