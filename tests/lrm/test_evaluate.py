"""Evaluation: which objects and views, that predictions and truths are of one place, and what is left out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from jobs.cli import app
from lrm import evaluate as evaluation
from lrm import image_metrics
from lrm.cameras import camera_numbers
from lrm.data import normalized_poses
from lrm.evaluate import Evaluator, choose_rows, choose_views, eval_config, evaluate
from lrm.preview import predict_views
from lrm.train import train
from pipeline import plan, receipt, version
from pipeline.reader import VersionReader
from pipeline.sample import depth_to_u16, encode_data
from pipeline.spec import DatasetSpec, ProceduralSource, ShardSpec, SplitSpec
from pipeline.store import open_store
from pipeline.types import Camera, Sample, UserError, derive_seed
from tests.conftest import make_asset, make_sample
from tests.lrm.conftest import build_corpus, nano_config

NUM_OBJECTS, NUM_VIEWS = 12, 6
LITTLE = ("image_px=20", "input_views=2", "reference_views=4", "resolution=20", "surface_points=400", "level=0.3")


def ball_radius(uid: str) -> float:
    """Radius of `make_sample`'s ball."""
    rng = np.random.default_rng(derive_seed("fake", uid))
    rng.integers(40, 256, (8, 3))
    return float(0.6 + 0.3 * rng.random())


def ball_depth(camera: Camera, radius: float) -> np.ndarray:
    """Planar depth [H, W] of a ball at the origin; 0 beside it."""
    rows, columns = np.mgrid[: camera.height, : camera.width] + 0.5
    local = np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(camera.intrinsics).T
    centre = -camera.world_from_camera[:3, :3].T @ camera.world_from_camera[:3, 3]
    # |t local - centre| = radius, z of local being 1: t is the depth.
    a, b, c = (local**2).sum(-1), local @ centre, centre @ centre - radius**2
    inside = b**2 - a * c
    return np.where(inside > 0, (b - np.sqrt(np.maximum(inside, 0))) / a, 0)


def with_depth(sample: Sample) -> Sample:
    radius, views = ball_radius(sample.asset.uid), []
    for view in sample.views:
        depth = encode_data("depth", depth_to_u16(ball_depth(view.camera, radius), 8192.0), "png", 8192.0)
        views.append(dataclasses.replace(view, planes={**view.planes, "depth": depth}))
    return dataclasses.replace(sample, views=tuple(views))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Balls with depth planes, some of them held out."""
    folder = tmp_path_factory.mktemp("depth")
    spec = DatasetSpec(
        name="balls", source=ProceduralSource(num_objects=NUM_OBJECTS), shards=ShardSpec(objects_per_shard=6),
        split=SplitSpec(heldout_per_mille=400),
    )  # fmt: skip
    store = open_store(str(folder))
    frozen = plan.freeze(store, spec, "f", lambda: [make_asset(f"ball-{i}") for i in range(NUM_OBJECTS)])
    for shard in frozen.shards:
        samples = {
            asset.uid: with_depth(make_sample(asset.uid, num_views=NUM_VIEWS, size_px=48, asset=asset))
            for asset in shard.assets
        }
        receipt.commit_shard(store, shard, samples, folder)
    version.publish(store, [frozen])
    return str(folder)


@pytest.fixture(scope="module")
def trained(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(nano_config("train.steps=30", "data.input_distance=2.0"), corpus, None, out)
    return out


def test_the_objects_are_those_that_the_version_s_rule_holds_out(corpus: str) -> None:
    reader = VersionReader.open(corpus)
    uids = reader.rows["uid"].to_pylist()
    rule = reader.version.spec
    found = [uids[row] for row in choose_rows(reader, eval_config())]
    assert found == [uid for uid in uids if rule.is_heldout(uid)]
    assert 2 <= len(found) < NUM_OBJECTS
    few = [uids[row] for row in choose_rows(reader, eval_config(["max_objects=2"]))]
    assert set(few) < set(found)
    assert [uids[row] for row in choose_rows(reader, eval_config(["max_objects=2", "seed=5"]))] != few
    assert len(choose_rows(reader, eval_config(["split=train"]))) == NUM_OBJECTS - len(found)


def test_a_version_that_holds_nothing_out_is_refused(tmp_path: Path) -> None:
    reader = VersionReader.open(build_corpus(tmp_path, num_objects=2, num_views=2, size_px=16))
    with pytest.raises(UserError, match="version 1 has no sample in its heldout split; it holds out 0 of 1000 uids"):
        choose_rows(reader, eval_config())


def test_views_are_drawn_by_seed_and_uid_alone() -> None:
    config = eval_config()
    views = choose_views("a", 32, config)
    assert len(set(views)) == 15
    assert choose_views("a", 32, config) == views != choose_views("b", 32, config)
    assert choose_views("a", 32, eval_config(["seed=1"])) != views
    assert choose_views("a", 32, eval_config(["reference_views=20"]))[:15] == views
    assert sorted(choose_views("a", 4, config)) == [0, 1, 2, 3]


def test_what_cannot_be_asked_for_is_said() -> None:
    with pytest.raises(UserError, match="input_views 9 are more than reference_views 4"):
        eval_config(["input_views=9", "reference_views=4"])
    with pytest.raises(UserError, match="unknown key 'metric'"):
        eval_config(["metric=psnr"])


def test_the_whole_verb(corpus: str, trained: Path, tmp_path: Path) -> None:
    sets = [part for item in LITTLE for part in ("--set", item)]
    arguments = ["evaluate", "--checkpoint", str(trained), "--corpus", corpus, "--json", *sets]
    told = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "a")])
    assert told.exit_code == 0, told.output
    record = json.loads(told.stdout.splitlines()[-1])
    assert set(record["left_out"]) == {"lpips", "clip", "fid"}
    assert "run make weights" in record["left_out"]["lpips"]
    assert "left out: fid" in told.stderr
    assert "trained on another version" not in told.stderr
    table = pq.read_table(tmp_path / "a" / "objects.parquet")
    rows = table.to_pylist()
    assert len(rows) == record["num_objects"] == len(choose_rows(VersionReader.open(corpus), eval_config()))
    for name in ("psnr_db", "psnr_all_db", "ssim", "ssim_all", "chamfer", "f_0.05", "f_0.2"):
        assert record[name] == pytest.approx(np.mean([row[name] for row in rows]), abs=1e-6)
    assert record["no_surface"] == 0
    assert 5 < record["psnr_db"] < 40
    protocol = json.loads(table.schema.metadata[b"protocol"])
    assert protocol == record["protocol"]
    assert (protocol["seed"], protocol["step"], protocol["input_views"]) == (0, 30, 2)
    assert "nothing fitted" in protocol["alignment"]
    assert (tmp_path / "a" / "table.txt").read_text() in told.stderr + "\n"
    again = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "b")])
    assert again.exit_code == 0
    for name in ("objects.parquet", "examples.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_object_s_figures_are_those_of_its_views_predicted_by_another_path(corpus: str, trained: Path) -> None:
    reader, config = VersionReader.open(corpus), eval_config(LITTLE)
    evaluator = Evaluator(trained, reader, config)
    row = evaluator.rows[0]
    record = evaluator.measure(row)
    views, novel, everything = record["views"], [], []
    for fed in (0, 1):
        order = [views[fed], *views]  # what is fed first, then all, among them the fed one
        _, truths, predicted = predict_views(evaluator.model, evaluator.run, reader, row, order, 20)
        errors = [np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(truths, predicted)]
        each = [-10 * np.log10(error) for error in errors]
        everything.append(np.mean(each))
        novel.append(np.mean([value for i, value in enumerate(each) if i != fed]))
    assert record["psnr_db"] == pytest.approx(np.mean(novel), abs=1e-4)
    assert record["psnr_all_db"] == pytest.approx(np.mean(everything), abs=1e-4)


def test_points_go_back_to_where_all_cameras_saw_them(corpus: str, trained: Path) -> None:
    """The input's world is turned and scaled; a camera of either world sees a point at the same pixel."""
    evaluator = Evaluator(trained, VersionReader.open(corpus), eval_config(LITTLE))
    item = evaluator.load(evaluator.rows[1])
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 3))
    for fed in (0, 3):
        back = evaluator.to_object(points, item, fed)
        order = [fed, *(i for i in range(len(item.views)) if i != fed)]
        cameras = [item.read.cameras[i] for i in order]
        poses = normalized_poses(cameras, evaluator.run.data, item.read.source)
        assert np.linalg.norm(poses[0][:3, 3]) == pytest.approx(2.0)  # scaled, not only turned
        for camera, pose in zip(cameras, poses):
            theirs = dataclasses.replace(camera, world_from_camera=pose)
            np.testing.assert_allclose(camera.project(back), theirs.project(points), atol=1e-6)
        assert camera_numbers(poses[0], cameras[0].intrinsics, 48, 48)[7] == pytest.approx(-2.0)


def test_the_true_surface_is_the_ball(corpus: str, trained: Path) -> None:
    evaluator = Evaluator(trained, VersionReader.open(corpus), eval_config([*LITTLE, "surface_points=100000"]))
    item = evaluator.load(evaluator.rows[0])
    assert item.surface is not None
    assert len(item.surface) > 1000
    radii = np.linalg.norm(item.surface, axis=1)
    np.testing.assert_allclose(radii, ball_radius(item.uid), atol=2e-3)


def test_a_perfect_prediction_has_perfect_figures(
    corpus: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Perfect(Evaluator):
        """Predicts the truth: its own views, and a field whose surface is the ball."""

        def predict(self, item: evaluation._Object, fed: int) -> tuple[torch.Tensor, torch.Tensor]:
            _, planes = super().predict(item, fed)
            self.item, self.fed = item, fed
            return item.true.clone(), planes

        def density(self, _: torch.nn.Module, resolution: int) -> torch.Tensor:
            scale = 2.0 / np.linalg.norm(self.item.read.cameras[self.fed].world_from_camera[:3, 3])
            places = torch.linspace(-1, 1, resolution)
            radius = torch.stack(torch.meshgrid(places, places, places, indexing="ij")).norm(dim=0)
            return torch.nn.functional.softplus(100 * (scale * ball_radius(self.item.uid) - radius) + 0.3)

    monkeypatch.setattr(evaluation, "Evaluator", Perfect)
    perfect: list[Perfect] = []
    monkeypatch.setattr(Perfect, "__init__", lambda self, *a: (Evaluator.__init__(self, *a), perfect.append(self))[0])
    monkeypatch.setattr(evaluation.mesh, "triplane_density_grid", lambda _, field, n: perfect[0].density(field, n))
    settings = [*LITTLE, "level=0.8", "resolution=64", "surface_points=4000", "max_objects=2"]
    result = evaluate(trained, corpus, None, tmp_path, eval_config(settings))
    assert result.means["psnr_db"] == 100
    assert result.means["ssim"] == pytest.approx(1)
    assert result.means["chamfer"] == pytest.approx(0, abs=0.08)  # two drawings of one surface, some 0.03 apart
    assert float(result.means["f_0.1"] or 0) > 0.97  # six views do not see all of a ball
    assert float(result.means["f_0.2"] or 0) > 0.99


def test_weights_that_are_there_are_used(
    corpus: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    (tmp_path / evaluation.WEIGHTS_NAME).write_bytes(b"checked by test_inception")
    pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    monkeypatch.setattr(evaluation, "load_inception", lambda _: pooled)
    loaded = evaluation.load_model(trained)._replace(version_digest="0" * 64)
    monkeypatch.setattr(evaluation, "load_model", lambda _: loaded)
    monkeypatch.setenv(image_metrics.ENVIRONMENT, str(tmp_path))
    settings = [*LITTLE, "meshes=false", "max_objects=3"]
    result = evaluate(trained, corpus, None, tmp_path / "out", eval_config(settings))
    assert set(result.left_out) == {"lpips", "chamfer", "f_score"}
    assert result.left_out["chamfer"] == "meshes=false"
    assert "trained on another version" in result.as_text()
    assert -1 <= float(result.means["clip"] or -2) < 1
    # FID by hand of the same features: all novel views, a true one as often as it was predicted.
    evaluator = Evaluator(trained, VersionReader.open(corpus), eval_config(settings))
    ours, theirs = [], []
    for row in evaluator.rows:
        item = evaluator.load(row)
        for fed in (0, 1):
            novel = [i for i in range(4) if i != fed]
            ours.append(pooled(image_metrics.eight_bits(evaluator.predict(item, fed)[0][novel])))
            theirs.append(pooled(image_metrics.eight_bits(item.true[novel])))
    wanted = image_metrics.frechet_distance(*(torch.cat(parts).numpy() for parts in (ours, theirs)))
    assert result.means["fid"] == pytest.approx(wanted, rel=1e-6)
