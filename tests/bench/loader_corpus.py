"""The corpus of `make bench-loader`: 512 samples of 32 views at 512^2, and the same bytes in each peer's format.

Rendering 16,384 views would take hours, so a pool is rendered once, 12 procedural objects by 16 views, and 1,536
pictures are made of it: each is a pool view flipped, turned, scaled by 0.6 to 0.95 and turned in hue, all drawn from
its number, then encoded losslessly like any other view, so no two hold the same bytes. Samples are 32 of these by a
keyed permutation: a picture stands in ten or eleven samples, beside others each time, and no format here stores equal
pictures once. A view has about the bytes of a textured asset (the benchmark prints the mean). Cameras are a pool
object's own and do not fit the changed pictures: this corpus is for speed alone.

Kept under ~/.cache/lrm-corpus/bench/loader (3 x 1.5 GB) and made only where missing: the pool takes about 7 minutes of
one core, the pictures 4, the copies 2.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from lrm.order import KeyedDraws, permute
from pipeline import plan, receipt, version
from pipeline.reader import VersionReader
from pipeline.sample import decode_rgba, encode_rgba
from pipeline.spec import DatasetSpec, ProceduralSource, RenderSpec, ShardSpec, SplitSpec
from pipeline.store import open_store
from pipeline.types import Asset, Camera, Normalization, Plane, Sample, View, derive_seed
from render.cameras import cameras_for
from tests.bench.assets import cache_dir

NUM_OBJECTS, POOL_VIEWS = 12, 16
NUM_PICTURES, NUM_SAMPLES, NUM_VIEWS, SIZE_PX = 1536, 512, 32, 512
OBJECTS_PER_SHARD = 32
CHUNK_BYTES = 64 * 2**20


def corpus_dir() -> Path:
    """Return the folder of the corpus and its copies."""
    return cache_dir() / "loader"


def build(peers: tuple[str, ...]) -> Path:
    """Make what is missing; returns the folder: `corpus` in our format, one folder for each peer beside it."""
    root = corpus_dir()
    if not (root / "corpus" / "versions" / "000001.json").exists():
        _write_corpus(root / "corpus", _pictures(root / "pictures"))
    reader = VersionReader.open(str(root / "corpus"))
    for name in peers:
        done = root / name / ".done"
        if not done.exists():
            shutil.rmtree(root / name, ignore_errors=True)
            _WRITERS[name](root / name, _samples(reader))
            done.touch()
    return root


def _pool(folder: Path) -> list[np.ndarray]:
    """Return the pool's views as straight RGBA, rendering what is missing."""
    spec = DatasetSpec(
        name="bench-loader",
        source=ProceduralSource(num_objects=NUM_OBJECTS),
        render=RenderSpec(resolution_px=SIZE_PX, num_views=POOL_VIEWS, samples=4),
    )
    folder.mkdir(parents=True, exist_ok=True)
    paths = [[folder / f"{i:02d}-{j:02d}.webp" for j in range(POOL_VIEWS)] for i in range(NUM_OBJECTS)]
    missing = [i for i, views in enumerate(paths) if not all(path.exists() for path in views)]
    if missing:
        from render.worker import RenderWorker

        with RenderWorker(spec, fingerprint="bench", num_threads=os.cpu_count() or 1) as worker:
            for i in tqdm(missing, desc="render the pool", unit="object"):
                asset = Asset(uid=f"procedural-{i}", source="bench", uri=f"procedural:{i}", format="procedural")
                sample = worker.render(asset, None)
                assert isinstance(sample, Sample), sample
                for view, path in zip(sample.views, paths[i]):
                    path.write_bytes(view.planes["rgba"].data)
    return [decode_rgba(path.read_bytes()) for views in paths for path in views]


def make_picture(number: int, pool: list[np.ndarray]) -> np.ndarray:
    """Return picture `number` as straight RGBA uint8 [H, W, 4]: a pool view moved, turned in hue."""
    draws = KeyedDraws(derive_seed("bench-loader", number))
    rgba = pool[number % len(pool)].astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    if draws.below(2):
        rgba = rgba[:, ::-1]
    scale, angle = 0.6 + 0.35 * draws.below(1000) / 1000, 360 * draws.below(1000) / 1000
    turn = cv2.getRotationMatrix2D((SIZE_PX / 2, SIZE_PX / 2), angle, scale)
    rgba = cv2.warpAffine(np.ascontiguousarray(rgba), turn, (SIZE_PX, SIZE_PX), flags=cv2.INTER_LINEAR)
    alpha = rgba[..., 3:].clip(0, 1)
    colour = rgba[..., :3] / np.maximum(alpha, 1e-6)
    hue = 2 * math.pi * draws.below(1000) / 1000  # a rotation about the grey axis
    cosine, sine = math.cos(hue), math.sin(hue) / math.sqrt(3)
    mix = np.full((3, 3), (1 - cosine) / 3) + cosine * np.eye(3) + sine * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    out = np.concatenate([(colour @ mix.T.astype(np.float32)).clip(0, 1), alpha], -1)
    out = np.rint(out * 255).astype(np.uint8)
    out[out[..., 3] == 0] = 0
    return out


def _pictures(folder: Path) -> list[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(NUM_PICTURES) if not (folder / f"{i:04d}.webp").exists()]
    if missing:
        pool = _pool(cache_dir() / "loader-pool")

        def make(number: int) -> None:
            data = encode_rgba(make_picture(number, pool), "webp").data
            temporary = folder / f".{number:04d}.tmp"
            temporary.write_bytes(data)
            temporary.rename(folder / f"{number:04d}.webp")

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(tqdm(threads.map(make, missing), total=len(missing), desc="encode pictures", unit="picture"))
    return [(folder / f"{i:04d}.webp").read_bytes() for i in range(NUM_PICTURES)]


def _write_corpus(folder: Path, pictures: list[bytes]) -> None:
    spec = DatasetSpec(
        name="bench-loader",
        source=ProceduralSource(num_objects=NUM_SAMPLES),
        render=RenderSpec(resolution_px=SIZE_PX, num_views=NUM_VIEWS),
        shards=ShardSpec(objects_per_shard=OBJECTS_PER_SHARD),
        split=SplitSpec(heldout_per_mille=0),
    )
    shutil.rmtree(folder, ignore_errors=True)
    store = open_store(str(folder))
    assets = [
        Asset(uid=f"bench-{i:04d}", source="bench", uri=f"bench:{i}", format="procedural") for i in range(NUM_SAMPLES)
    ]
    frozen = plan.freeze(store, spec, "bench", lambda: assets)
    numbers = {asset.uid: i for i, asset in enumerate(assets)}
    for shard in tqdm(frozen.shards, desc="write shards", unit="shard"):
        samples = {
            a.uid: _sample(a, numbers[a.uid], cameras_for(spec.render, numbers[a.uid]), pictures) for a in shard.assets
        }
        receipt.commit_shard(store, shard, samples, folder)
    version.publish(store, [frozen])
    for leftover in folder.glob("*.tar"):
        leftover.unlink()


def _sample(asset: Asset, number: int, cameras: list[Camera], pictures: list[bytes]) -> Sample:
    """Sample n holds pictures perm(32 n) to perm(32 n + 31), the permutation repeating every NUM_PICTURES places."""
    places = range(number * NUM_VIEWS, (number + 1) * NUM_VIEWS)
    views = []
    for i, place in enumerate(places):
        turn, rest = divmod(place, NUM_PICTURES)
        data = pictures[permute(rest, NUM_PICTURES, turn)]
        views.append(View(index=i, camera=cameras[i], planes={"rgba": Plane(codec="webp", data=data)}))
    return Sample(
        asset=asset,
        spec_fingerprint="bench",
        seed=number,
        normalization=Normalization(scale=1.0, rotation=np.eye(3), translation=np.zeros(3)),
        views=tuple(views),
        provenance={"attempts": 1},
    )


def _samples(reader: VersionReader) -> Iterator[dict[str, bytes]]:
    """Yield each sample as the peers store it: `json`, and `000` to `031` as encoded."""
    for row in tqdm(range(len(reader)), desc="copy for a peer", unit="sample"):
        read = reader.read_views(row, range(NUM_VIEWS))
        yield {"json": read.json_bytes} | {f"{i:03d}": bytes(p["rgba"]) for i, p in enumerate(read.planes)}


def _write_litdata(folder: Path, samples: Iterator[dict[str, bytes]]) -> None:
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    writer = BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES)
    for i, sample in enumerate(samples):
        writer[i] = list(sample.values())  # dicts become Arrow rows, which 0.2.76 cannot read back from its cache
    writer.done()
    writer.merge()


def _write_streaming(folder: Path, samples: Iterator[dict[str, bytes]]) -> None:
    from tests.bench.loader_peers import import_streaming

    columns = {"json": "bytes"} | {f"{i:03d}": "bytes" for i in range(NUM_VIEWS)}
    with import_streaming().MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK_BYTES) as writer:
        for sample in samples:
            writer.write(sample)


_WRITERS = {"litdata": _write_litdata, "streaming": _write_streaming}

if __name__ == "__main__":
    print(build(()))
