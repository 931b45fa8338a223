"""`make bench-ingest`: captures from zip to shard, beside the least that such work can cost, alternating.

    python -m tests.bench.ingest [--captures 100] [--frames 30] [--rounds 5] [--cores 2] [--distinct 3]

Captures are made as MVImgNet's: 30 JPEGs of 1080 x 1920 with the noise of a phone's video, masks as PNG beside them, a
SIMPLE_RADIAL COLMAP model of a thousand points, all in a zip. A few different ones are made and stand in the zip often.

Ours is the job's own path: entries from the zip's directory, members by range, a supervised child a core, the shard
written, verified, stored and its receipt committed. The limit is what nobody can leave out: decode each of the same
JPEGs, remap it once to 512^2, and encode that with its alpha as WebP, by OpenCV alone, a thread a core, from memory.
The two take turns, round by round. Memory is that of this process and its children together, polled; growth is the
children's from their tenth capture to their last, never recycled between.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import struct
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
from numpy.typing import NDArray

from jobs.ingest_worker import IngestWorker
from jobs.produce import producer_of
from pipeline import plan as plans
from pipeline.receipt import commit_shard
from pipeline.sample import decode_rgba
from pipeline.sources import open_captures
from pipeline.spec import DatasetSpec, LimitSpec, MvimgnetSource, ShardSpec, WorkerSpec
from pipeline.store import open_store
from pipeline.types import Asset, Sample

WIDTH, HEIGHT, FOCAL, RADIAL = 1080, 1920, 1500.0, 0.05
JPEG_QUALITY = 90
DISTANCE = 4.5
NUM_POINTS = 1000
SIZE_PX = 512


def main() -> None:
    """Measure, and print one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captures", type=int, default=100)
    parser.add_argument("--frames", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--distinct", type=int, default=3, help="different captures in the zip")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="lrm-bench-") as folder:
        made = make_zip(Path(folder) / "mvi_00.zip", args.captures, args.frames, args.distinct)
        print(json.dumps(measure(Path(folder), made, args.captures, args.rounds, args.cores)))


def measure(
    folder: Path, made: Sequence[Sequence[bytes]], num_captures: int, num_rounds: int, num_cores: int
) -> dict[str, Any]:
    """Return the benchmark's record; `made` are the JPEGs of the captures of the zip in `folder`."""
    num_frames = len(made[0])
    spec = DatasetSpec(
        name="bench",
        source=MvimgnetSource(path=str(folder)),
        limits=LimitSpec(objects_per_child=10**6),
        shards=ShardSpec(objects_per_shard=10**5),
        workers=WorkerSpec(num_cpus=1),
    )
    fingerprint = spec.fingerprint(producer_of(spec)[1])
    source = open_captures(spec)
    assets = source.list_assets()
    store = open_store(str(folder / "corpus"))
    ours, limit = [], []
    memory = _Memory()
    with memory, _Workers(spec, fingerprint, num_cores) as workers:
        warm = workers.ingest(source.open_capture, assets[: 2 * num_cores])
        pictures = [decode_rgba(view.planes["rgba"].data) for view in warm[0].views]
        size = math.ceil(len(assets) / num_rounds)
        for start in range(0, len(assets), size):
            part = assets[start : start + size]
            begun = time.perf_counter()
            samples = workers.ingest(source.open_capture, part)
            shard = plans.deal(part, len(part), fingerprint)[0]
            commit_shard(store, shard, {one.asset.uid: one for one in samples}, folder)
            ours.append(sum(len(one.views) for one in samples) / (time.perf_counter() - begun))
            assert all(len(one.views) == num_frames for one in samples), "a frame was dropped"
            limit.append(measure_limit([made[i % len(made)] for i in range(len(part))], pictures, num_cores))
            print(
                f"{start + len(part)} captures: {ours[-1]:.2f}, {limit[-1]:.2f} frames/s", file=sys.stderr, flush=True
            )
        growth = workers.growth()
    frames_per_s, limit_per_s = statistics.median(ours), statistics.median(limit)
    return {
        "benchmark": "ingest",
        "producer": producer_of(spec)[1],
        "num_cores": num_cores,
        "captures": num_captures,
        "frames": num_frames,
        "frame_bytes": round(statistics.mean(len(data) for data in made[0])),
        "frames_per_s": round(frames_per_s, 2),
        "limit_frames_per_s": round(limit_per_s, 2),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, limit)), 3),
        "rounds": [[round(a, 2), round(b, 2)] for a, b in zip(ours, limit)],
        "peak_rss_bytes": memory.peak_bytes,
        "rss_growth": round(growth, 4),
    }


def measure_limit(captures: Sequence[Sequence[bytes]], pictures: Sequence[NDArray[np.uint8]], num_cores: int) -> float:
    """Return frames a second of decode, one remap and encode, a thread a core."""
    grid = (np.arange(SIZE_PX, dtype=np.float32) + 0.5) * (1000 / SIZE_PX)
    x, y = np.meshgrid(grid + np.float32(40.25), grid + np.float32(460.25))
    alphas = [picture[..., 3] for picture in pictures]

    def one(frames: Sequence[bytes]) -> None:
        for data, alpha in zip(frames, alphas):
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            view = cv2.remap(image, x, y, cv2.INTER_LINEAR)
            bgra = cv2.merge([*cv2.split(view), alpha])
            bgra[alpha == 0] = 0
            cv2.imencode(".webp", bgra, [cv2.IMWRITE_WEBP_QUALITY, 95])

    begun = time.perf_counter()
    with ThreadPoolExecutor(num_cores) as pool:
        list(pool.map(one, captures))
    return sum(min(len(frames), len(alphas)) for frames in captures) / (time.perf_counter() - begun)


class _Workers:
    """A supervised child a core, each with a thread of this process."""

    def __init__(self, spec: DatasetSpec, fingerprint: str, num_cores: int) -> None:
        self._idle = [IngestWorker(spec, fingerprint=fingerprint, num_threads=1) for _ in range(num_cores)]
        self._all = list(self._idle)
        self._pool = ThreadPoolExecutor(num_cores)
        self._seen: dict[int, list[int]] = {}

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        for worker in self._all:
            worker.close()

    def ingest(self, open_capture: Callable[[Asset], Any], assets: Sequence[Asset]) -> list[Sample]:
        """Return the samples of captures, in order."""

        def one(asset: Asset) -> Sample:
            worker = self._idle.pop()
            try:
                sample = worker.ingest(asset, open_capture(asset))
                assert worker._child is not None
                self._seen.setdefault(worker._child.pid, []).append(worker._child.memory_bytes())
            finally:
                self._idle.append(worker)
            return sample

        return list(self._pool.map(one, assets))

    def growth(self) -> float:
        """Return the largest growth of a child from its tenth capture to its last ones, as a share."""
        return max(
            statistics.median(seen[-5:]) / seen[min(9, len(seen) - 1)] - 1 for seen in self._seen.values() if seen
        )


@dataclass
class _Memory:
    """The most that this process and its children held together, looked at ten times a second."""

    peak_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> _Memory:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.1):
            total = 0
            for one in [process, *process.children(recursive=True)]:
                try:
                    total += one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def make_zip(path: Path, num_captures: int, num_frames: int, num_distinct: int) -> list[list[bytes]]:
    """Write an MVImgNet zip; return the JPEGs of its different captures."""
    different = [make_capture(seed, num_frames) for seed in range(min(num_distinct, num_captures))]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i in range(num_captures):
            files = different[i % len(different)]
            for name, data in files.items():
                archive.writestr(f"7/{i:08x}/{name}", data)
    return [[data for name, data in files.items() if name.startswith("images/")] for files in different]


def make_capture(seed: int, num_frames: int) -> dict[str, bytes]:
    """Return the files of one capture: a mottled ball on a mottled floor, seen from a circle."""
    rng = np.random.default_rng(seed)
    texture, backdrop = _mottled(rng, 1024, 2048), _mottled(rng, HEIGHT, WIDTH)
    rays = _rays()
    points = rng.normal(size=(NUM_POINTS, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    files: dict[str, bytes] = {}
    views = []
    for i in range(num_frames):
        angle = 2 * math.pi * i / num_frames
        rotation, centre = _pose(angle, 0.35 + 0.1 * math.sin(3 * angle))
        image, mask = _picture(rays, rotation, centre, texture, np.roll(backdrop, 37 * i, axis=1))
        noisy = np.clip(image + rng.normal(0, 4, image.shape[:2])[..., None], 0, 255).astype(np.uint8)
        files[f"images/{i:03d}.jpg"] = _encoded(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        files[f"masks/{i:03d}.jpg.png"] = _encoded(".png", mask, [])
        views.append((f"{i:03d}.jpg", rotation, centre))
    return files | _model(views, points, rng)


def _encoded(ending: str, image: NDArray[Any], flags: list[int]) -> bytes:
    return bytes(cv2.imencode(ending, image, flags)[1].tobytes())


def _mottled(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Return a picture [height, width, 3] with detail at every size, as photos have."""
    out = np.full((height, width, 3), 128, np.float32)
    for octave in range(1, 8):
        small = rng.normal(0, 1, (2 + height >> (8 - octave), 2 + width >> (8 - octave), 3)).astype(np.float32)
        out += 60 / octave * cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return out


def _rays() -> NDArray[np.float32]:
    """Return the undistorted direction of each pixel's centre, [HEIGHT, WIDTH, 2] at z = 1, by fixed point."""
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5 - WIDTH / 2, np.arange(HEIGHT) + 0.5 - HEIGHT / 2)
    distorted = np.stack([x, y], -1) / FOCAL
    out = distorted.copy()
    for _ in range(20):
        out = distorted / (1 + RADIAL * (out**2).sum(-1, keepdims=True))
    return out.astype(np.float32)


def _pose(angle: float, height: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return camera-from-world rotation [3, 3] and centre [3] of a camera that looks at the origin."""
    centre = DISTANCE * np.array([math.cos(angle), math.sin(angle), height]) / math.hypot(1, height)
    z = -centre / np.linalg.norm(centre)
    x = np.cross(z, [0, 0, 1.0])
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z]), centre


def _picture(
    rays: NDArray[np.float32],
    rotation: NDArray[np.float64],
    centre: NDArray[np.float64],
    texture: NDArray[np.float32],
    backdrop: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Ray-cast the unit ball over the backdrop; BGR [H, W, 3] and the mask [H, W]."""
    r = rotation.astype(np.float32)
    direction = np.concatenate([rays, np.ones_like(rays[..., :1])], -1) @ r
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    c = centre.astype(np.float32)
    b = direction @ c
    inside = b**2 - (c @ c - 1)
    hit = inside > 0
    points = c + direction * (-b - np.sqrt(np.maximum(inside, 0)))[..., None]
    u = (np.arctan2(points[..., 1], points[..., 0]) / (2 * np.pi) + 0.5) * (texture.shape[1] - 1)
    v = np.arccos(np.clip(points[..., 2], -1, 1)) / np.pi * (texture.shape[0] - 1)
    ball = cv2.remap(texture, u.astype(np.float32), v.astype(np.float32), cv2.INTER_LINEAR)
    return np.where(hit[..., None], ball, backdrop), hit.astype(np.uint8) * 255


def _model(
    views: Sequence[tuple[str, NDArray[np.float64], NDArray[np.float64]]],
    points: NDArray[np.float64],
    rng: np.random.Generator,
) -> dict[str, bytes]:
    """Return a COLMAP model in binary: one shared camera, and the points that each view sees."""
    camera = struct.pack("<QiiQQ4d", 1, 1, 2, WIDTH, HEIGHT, FOCAL, WIDTH / 2, HEIGHT / 2, RADIAL)
    tracks: list[list[tuple[int, int]]] = [[] for _ in points]
    images = [struct.pack("<Q", len(views))]
    often = np.sum([points @ centre > 1.05 for _, _, centre in views], axis=0) > 1
    for number, (name, rotation, centre) in enumerate(views, 1):
        seen = np.flatnonzero(often & (points @ centre > 1.05))
        local = (points[seen] - centre) @ rotation.T
        plane = local[:, :2] / local[:, 2:]
        pixels = plane * (1 + RADIAL * (plane**2).sum(1, keepdims=True)) * FOCAL + [WIDTH / 2, HEIGHT / 2]
        pixels += rng.normal(0, 0.5, pixels.shape)
        images.append(struct.pack("<i4d3di", number, *_quaternion(rotation), *(-rotation @ centre), 1))
        images.append(name.encode() + b"\0" + struct.pack("<Q", len(seen)))
        for place, (point, (x, y)) in enumerate(zip(seen, pixels)):
            images.append(struct.pack("<ddq", x, y, point + 1))
            tracks[point].append((number, place))
    used = [int(i) for i in np.flatnonzero(often)]
    cloud = [struct.pack("<Q", len(used))]
    for i in used:
        cloud.append(struct.pack("<Q3d3BdQ", i + 1, *points[i], 128, 128, 128, 0.6, len(tracks[i])))
        cloud += [struct.pack("<ii", *pair) for pair in tracks[i]]
    names = ("cameras", "images", "points3D")
    return {f"sparse/0/{n}.bin": data for n, data in zip(names, (camera, b"".join(images), b"".join(cloud)))}


def _quaternion(rotation: NDArray[np.float64]) -> tuple[float, float, float, float]:
    vector = cv2.Rodrigues(rotation)[0].ravel()
    angle = float(np.linalg.norm(vector))
    x, y, z = (vector / max(angle, 1e-12) * math.sin(angle / 2)).tolist()
    return math.cos(angle / 2), x, y, z


if __name__ == "__main__":
    main()
