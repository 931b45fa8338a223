"""One object, over and over: what the whole chain must be able to learn before anything else is asked of it.

The object is four balls of different colours and sizes, ray-cast without the project's own cameras: its first sixteen
views train `tiny`, given the first of them, and the other views judge it. Poses, their normalisation, intrinsics of
resized views, box, planes and quadrature must all agree, or unseen views do not come out. The run is seeded and has a
fixed number of steps; its time box is of CPU time, so that a machine with other work does not fail it.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lrm.checkpoint import load_model
from lrm.config import load_config
from lrm.preview import predict_views, psnr
from lrm.train import train
from pipeline import plan, receipt, version
from pipeline.reader import VersionReader
from pipeline.sample import encode_rgba
from pipeline.spec import DatasetSpec, ProceduralSource, SplitSpec
from pipeline.store import open_store
from pipeline.types import Camera, Normalization, Sample, View
from tests.conftest import make_asset, orbit_camera

SEEN, UNSEEN = 16, 8
IMAGE_PX = 32
CPU_S = 120.0
BALLS = (  # centre, radius, colour
    ((0.0, 0.0, -0.25), 0.45, (200, 60, 50)),
    ((0.35, 0.3, 0.35), 0.30, (60, 110, 210)),
    ((-0.5, 0.2, 0.3), 0.22, (70, 170, 80)),
    ((0.1, -0.55, 0.25), 0.18, (230, 190, 60)),
)


def picture(camera: Camera) -> NDArray[np.uint8]:
    """Ray-cast the balls, darker below: straight RGBA [H, W, 4]."""
    grid = np.arange(camera.width) + 0.5
    pixels = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    rays = np.concatenate([pixels, np.ones((len(pixels), 1))], 1) @ np.linalg.inv(camera.intrinsics).T
    rays = rays @ camera.world_from_camera[:3, :3].T
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    nearest, image = np.full(len(rays), np.inf), np.zeros((len(rays), 4), np.uint8)
    for centre, radius, colour in BALLS:
        origin = camera.world_from_camera[:3, 3] - centre
        b = rays @ origin
        inside = b**2 - origin @ origin + radius**2
        distance = -b - np.sqrt(np.where(inside > 0, inside, np.nan))
        hit = distance < nearest  # not where it is NaN
        height = (origin[2] + distance * rays[:, 2])[hit] / radius
        image[hit, :3] = np.array(colour) * (0.75 + 0.25 * height[:, None])
        image[hit, 3] = 255
        nearest[hit] = distance[hit]
    return image.reshape(camera.height, camera.width, 4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One object in a version of its own; returns the corpus' folder."""
    folder, rng, asset = tmp_path_factory.mktemp("one"), np.random.default_rng(7), make_asset("balls")
    views = []
    for index in range(SEEN + UNSEEN):
        azimuth = 2 * np.pi * (index / SEEN if index < SEEN else rng.random())
        camera = orbit_camera(azimuth, rng.uniform(-0.7, 1.6), rng.uniform(2.4, 3.0), 2 * IMAGE_PX)
        views.append(View(index=index, camera=camera, planes={"rgba": encode_rgba(picture(camera), "webp")}))
    sample = Sample(
        asset=asset, spec_fingerprint="f", seed=0, views=tuple(views), quality={}, provenance={"attempts": 1},
        normalization=Normalization(scale=1.0, rotation=np.eye(3), translation=np.zeros(3)),
    )  # fmt: skip
    spec = DatasetSpec(name="one", source=ProceduralSource(num_objects=1), split=SplitSpec(heldout_per_mille=0))
    store = open_store(str(folder))
    frozen = plan.freeze(store, spec, "f", lambda: [asset])
    receipt.commit_shard(store, frozen.shards[0], {asset.uid: sample}, folder)
    version.publish(store, [frozen])
    return str(folder)


def test_one_object_is_learnt_and_its_unseen_views_come_out(corpus: str, tmp_path: Path) -> None:
    config = load_config("tiny", (
        f"data.max_views={SEEN}", "data.input_views=1", f"data.min_render_px={IMAGE_PX}",
        f"data.max_render_px={IMAGE_PX}", f"data.patch_px={IMAGE_PX}", "train.batch_size=1", "train.steps=170",
        "train.lr=4e-3", "train.device=cpu", "train.checkpoint_every_steps=1000",
    ))  # fmt: skip
    begun = time.process_time()
    result = train(config, corpus, None, tmp_path)
    assert result.steps_now == 170
    model, config, _ = load_model(tmp_path)
    reader = VersionReader.open(corpus)
    _, truths, predicted = predict_views(model, config, reader, 0, range(SEEN + UNSEEN), IMAGE_PX)
    found = [psnr(true, guess) for true, guess in zip(truths, predicted)]  # of views 1 to 23: 0 is the input
    elapsed = time.process_time() - begun
    print(
        f"seen {np.mean(found[: SEEN - 1]):.2f} dB, unseen {np.mean(found[SEEN - 1 :]):.2f} dB, {elapsed:.0f} s of CPU"
    )
    assert np.mean(found[: SEEN - 1]) >= 30, "training views"
    assert np.mean(found[SEEN - 1 :]) >= 24, "unseen views"
    assert elapsed < CPU_S
