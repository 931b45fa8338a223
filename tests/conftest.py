"""Fixtures that several layers use: made samples, and the shared real files where they are present."""

from __future__ import annotations

import atexit
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.sample import encode_rgba
from pipeline.store import Store, open_store
from pipeline.types import Asset, Camera, Normalization, Sample, View, derive_seed
from tests.s3 import BUCKET, s3_server

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Ray 2.60 and others phone home unless told otherwise; tests need no network.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# Readers keep an index of each version they open in the node's cache: of test corpora, not in the user's.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lrm-test-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# Without a GPU, Triton's kernels are run by its interpreter, which it must be told before it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_assets() -> Path:
    """The folder of real 3D files; the test is skipped where it is absent."""
    path = SHARED / "assets"
    if not path.is_dir():
        pytest.skip("shared/assets is not present")
    return path


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a bucket on a real S3 server that lives as long as the test session."""
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        yield f"s3://{BUCKET}"
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


_store_names = itertools.count()


@pytest.fixture(params=["folder", "memory", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty corpus on each kind of store: what holds on one must hold on all."""
    if request.param == "folder":
        return open_store(str(tmp_path / "corpus"))
    root = "memory:/" if request.param == "memory" else request.getfixturevalue("s3_url")
    return open_store(f"{root}/any-{next(_store_names)}")


def orbit_camera(azimuth_rad: float, height: float, distance: float, size_px: int, fov_deg: float = 50.0) -> Camera:
    """A camera that looks at the origin, made without the project's own camera code."""
    radius = math.sqrt(distance**2 - height**2)
    centre = np.array([radius * math.cos(azimuth_rad), radius * math.sin(azimuth_rad), height])
    forward = -centre / np.linalg.norm(centre)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = centre
    focal = size_px / 2 / math.tan(math.radians(fov_deg) / 2)
    k = np.array([[focal, 0, size_px / 2], [0, focal, size_px / 2], [0, 0, 1]])
    return Camera(world_from_camera=pose, intrinsics=k, width=size_px, height=size_px)


def ball_image(camera: Camera, radius: float, colours: np.ndarray) -> np.ndarray:
    """Ray-cast a ball at the origin whose eight octants have the colours [8, 3]; straight RGBA uint8 [H, W, 4]."""
    size = camera.width
    grid = np.arange(size) + 0.5
    pixels = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    rays = np.concatenate([pixels, np.ones((len(pixels), 1))], 1) @ np.linalg.inv(camera.intrinsics).T
    rays = rays @ camera.world_from_camera[:3, :3].T
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    centre = camera.world_from_camera[:3, 3]
    b = rays @ centre
    disc = b**2 - centre @ centre + radius**2
    hit = disc > 0
    points = centre + rays * (-b - np.sqrt(np.where(hit, disc, 0)))[:, None]
    octant = (points > 0) @ np.array([1, 2, 4])
    image = np.zeros((size * size, 4), np.uint8)
    shade = 0.6 + 0.4 * np.clip(points[:, 2] / radius, -1, 1)
    image[hit, :3] = (colours[octant[hit]] * shade[hit, None]).astype(np.uint8)
    image[hit, 3] = 255
    return image.reshape(size, size, 4)


def make_asset(uid: str, **changes: object) -> Asset:
    """An asset of a made-up source."""
    values: dict[str, object] = {
        "uid": uid, "source": "fake", "uri": f"fake:{uid}", "format": "procedural", "license": "CC0-1.0",
        "attribution": "nobody", "sha256": "0" * 64, "num_bytes": 1,
    }  # fmt: skip
    return Asset(**(values | changes))  # type: ignore[arg-type]


def make_sample(
    uid: str = "ball-0", *, num_views: int = 4, size_px: int = 32, fingerprint: str = "f", asset: Asset | None = None
) -> Sample:
    """A sample of a ball with eight coloured octants; a pure function of its arguments."""
    seed = derive_seed("fake", uid)
    rng = np.random.default_rng(seed)
    colours = rng.integers(40, 256, (8, 3))
    radius = 0.6 + 0.3 * rng.random()
    views = []
    for i in range(num_views):
        camera = orbit_camera(
            2 * math.pi * (i + rng.random()) / num_views, rng.uniform(-0.7, 1.4), rng.uniform(1.6, 3.0), size_px
        )
        plane = encode_rgba(ball_image(camera, radius, colours), "webp")
        views.append(View(index=i, camera=camera, planes={"rgba": plane}))
    return Sample(
        asset=asset or make_asset(uid),
        spec_fingerprint=fingerprint,
        seed=seed,
        normalization=Normalization(scale=1.0, rotation=np.eye(3), translation=np.zeros(3)),
        views=tuple(views),
        quality={"mean_alpha_coverage": 0.5},
        provenance={"seconds": {"render": 0.1}, "attempts": 1},
    )
