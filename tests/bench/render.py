"""`make bench-render`: our renderer against the way public scripts do it, alternating, asset by asset.

    python -m tests.bench.render [--only NAME,...] [--views 32] [--baseline-views 2] [--no-quality] ...

Speed at 512^2: both take the whole machine, one after the other. Ours is measured from the request to the last encoded
byte of all views, in one worker that goes on from asset to asset. The baseline renders a few views in a process of its
own; its rate for all views is (start, import and normalisation once, views at the median). Quality at 256^2: every view
that has a converged reference (`tests.bench.reference`; made first if missing, which takes hours), on white, in 8 bits.
Memory: a child after 5 and after 50 assets, never recycled between. Split: all cores as one worker with all threads,
and as one worker a core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from pipeline.quality import on_white_psnr
from pipeline.sample import decode_rgba
from pipeline.spec import DatasetSpec, ProceduralSource, RenderSpec
from pipeline.types import Sample, derive_seed
from render import producer
from render.cameras import cameras_for
from render.worker import RenderWorker
from tests.bench.assets import BenchAsset, bench_assets
from tests.bench.reference import RESOLUTION_PX, load_reference

NUM_THREADS = os.cpu_count() or 1
MEMORY_ASSETS = 50


def main() -> None:
    """Measure, and print one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="assets whose name holds one of these parts")
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--baseline-views", type=int, default=2)
    for part in ("speed", "quality", "split", "memory"):
        parser.add_argument(f"--no-{part}", action="store_true", help=f"leave the part on {part} out")
    args = parser.parse_args()
    assets = bench_assets(args.only)
    result: dict[str, Any] = {"benchmark": "render", "producer": producer(), "num_threads": NUM_THREADS}
    if not args.no_speed:
        result |= measure_speed(assets, args.resolution, args.views, args.baseline_views)
    if not args.no_quality:
        result |= measure_quality(assets)
    if not args.no_split:
        result |= measure_split(assets, args.resolution)
    if not args.no_memory:
        result |= measure_memory(assets)
    print(json.dumps(result, sort_keys=True))


def measure_speed(assets: list[BenchAsset], resolution: int, num_views: int, baseline_views: int) -> dict[str, Any]:
    """Return views per second of both, and where our time goes."""
    spec = _spec(RenderSpec(resolution_px=resolution, num_views=num_views))
    rows, peak = [], 0
    with RenderWorker(spec, fingerprint="bench", num_threads=NUM_THREADS) as worker:
        for one in tqdm(assets, desc="speed", unit="asset"):
            begun = time.perf_counter()
            sample = worker.render(one.asset, one.path)
            ours_s = time.perf_counter() - begun
            peak = max(peak, *(_peak_rss(child) for child in psutil.Process().children()))
            theirs = run_baseline(one, spec.render, baseline_views)
            theirs_s = theirs["process_s"] - sum(theirs["view_s"]) + num_views * statistics.median(theirs["view_s"])
            rows.append(_row(one, sample, ours_s, theirs_s))
    ours, theirs_all = sum(row["ours_s"] for row in rows), sum(row["baseline_s"] for row in rows)
    return {
        "resolution_px": resolution,
        "num_views": num_views,
        "num_assets": len(rows),
        "views_per_s": round(num_views * len(rows) / ours, 3),
        "baseline_views_per_s": round(num_views * len(rows) / theirs_all, 3),
        "ratio_by_asset": {row["asset"]: round(row["baseline_s"] / row["ours_s"], 2) for row in rows},
        "ratio_geomean": round(
            math.exp(statistics.mean(math.log(row["baseline_s"] / row["ours_s"]) for row in rows)), 2
        ),
        "sampling_share": round(sum(row["sampling_s"] for row in rows) / ours, 3),
        "denoise_share": round(sum(row["denoise_s"] for row in rows) / ours, 3),
        "fixed_share": round(sum(row["fixed_s"] for row in rows) / ours, 3),
        "fixed_s_per_object": round(statistics.mean(row["fixed_s"] for row in rows), 3),
        "peak_rss_bytes": peak,
        "by_asset": rows,
    }


def _row(one: BenchAsset, sample: Sample, ours_s: float, theirs_s: float) -> dict[str, Any]:
    seconds = sample.provenance["seconds"]
    known = {
        name: seconds.get(name, 0.0) for name in ("start", "import", "textures", "sampling", "denoise", "estimate")
    }
    return {
        "asset": one.asset.uid,
        "num_triangles": sample.quality["num_triangles"],
        "ours_s": round(ours_s, 3),
        "baseline_s": round(theirs_s, 3),
        "sampling_s": round(known["sampling"], 3),
        "denoise_s": round(known["denoise"] + known["estimate"], 3),
        # The file's own import is its textures' decoding too.
        # Reset, freezing, synchronisation, readback, what of encoding nothing overlaps: all but what is named.
        "fixed_s": round(ours_s - sum(known.values()), 3),
        "samples_median": statistics.median(sample.quality["views"]["samples"]),
    }


def run_baseline(one: BenchAsset, spec: RenderSpec, num_views: int) -> dict[str, Any]:
    """Render the first views of an asset as public scripts do; return the seconds of the process and its parts."""
    cameras = cameras_for(spec, derive_seed("camera", spec.seed, one.asset.uid))[:num_views]
    listed = [{"pose": c.world_from_camera.tolist(), "focal": float(c.intrinsics[0, 0]) / c.width} for c in cameras]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cameras.json").write_text(json.dumps(listed))
        command = [sys.executable, "-m", "tests.bench.baseline", str(one.path or one.asset.uri), one.asset.format]
        command += [f"{folder}/cameras.json", folder, str(spec.resolution_px)]
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"TMPDIR": folder})
        process_s = time.perf_counter() - begun
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"the baseline failed on {one.asset.uid}:\n{done.stderr[-2000:]}")
    return {**json.loads(lines[-1]), "process_s": process_s}


def measure_quality(assets: list[BenchAsset]) -> dict[str, Any]:
    """Return the PSNR of views against converged references, as training sees them."""
    spec = _spec(RenderSpec(resolution_px=RESOLUTION_PX))
    for one in assets:
        make = [sys.executable, "-m", "tests.bench.reference", "--only", one.asset.uid]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    half, full, by_asset = [], [], {}
    with RenderWorker(spec, fingerprint="bench", num_threads=NUM_THREADS) as worker:
        for one in tqdm(assets, desc="quality", unit="asset"):
            sample = worker.render(one.asset, one.path)
            pairs = [compare_view(sample, one, spec.render, view) for view in range(spec.render.num_views)]
            known = [pair for pair in pairs if pair is not None]
            half += [pair[0] for pair in known]
            full += [pair[1] for pair in known]
            by_asset[one.asset.uid] = {
                "half_min_db": round(min(pair[0] for pair in known), 2),
                "full_min_db": round(min(pair[1] for pair in known), 2),
                "samples_median": statistics.median(sample.quality["views"]["samples"]),
                "num_views": len(known),
            }
    return {
        "psnr_half_min_db": round(min(half), 2),
        "psnr_min_db": round(min(full), 2),
        "psnr_median_db": round(statistics.median(full), 2),
        "psnr_num_views": len(half),
        "quality_by_asset": by_asset,
    }


def compare_view(sample: Sample, one: BenchAsset, spec: RenderSpec, view: int) -> tuple[float, float] | None:
    """Return (half, full) PSNR on white in dB of a view, from its 8-bit pixels; None without a reference."""
    reference = load_reference(one, spec, view)
    if reference is None:
        return None
    return on_white_psnr(decode_rgba(sample.views[view].planes["rgba"].data), reference)


def measure_memory(assets: list[BenchAsset]) -> dict[str, Any]:
    """Return how a child's memory grows from asset to asset."""
    spec = _spec(RenderSpec(resolution_px=128, num_views=2, samples=1))
    rss = []
    with RenderWorker(spec, fingerprint="bench", num_threads=NUM_THREADS) as worker:
        for i in tqdm(range(MEMORY_ASSETS), desc="memory", unit="asset"):
            one = assets[i % len(assets)]
            worker.render(one.asset, one.path)
            rss.append(sum(child.memory_info().rss for child in psutil.Process().children()))
    # The child is the same throughout: it is replaced after its last asset only.
    return {"rss_after_5_bytes": rss[4], "rss_after_50_bytes": rss[-2], "rss_growth": round(rss[-2] / rss[4], 3)}


def measure_split(assets: list[BenchAsset], resolution: int) -> dict[str, Any]:
    """Return the throughput of all cores as one worker with all threads, and as workers of one thread each."""
    spec = _spec(RenderSpec(resolution_px=resolution, num_views=8))
    seconds: dict[str, list[float]] = {"one": [], "many": []}
    for _ in range(2):  # in turn, so that a machine that slows down slows both
        for name, num_workers in (("one", 1), ("many", NUM_THREADS)):
            waiting = queue.SimpleQueue[BenchAsset]()
            workers = [
                RenderWorker(spec, fingerprint="bench", num_threads=NUM_THREADS // num_workers)
                for _ in range(num_workers)
            ]
            for worker in workers:  # a first asset each, so that no start of Blender is timed
                worker.render(assets[0].asset, assets[0].path)
            for one in assets:
                waiting.put(one)
            begun = time.perf_counter()
            with ThreadPoolExecutor(num_workers) as pool:
                list(pool.map(_drain, workers, itertools.repeat(waiting)))
            seconds[name].append(time.perf_counter() - begun)
            for worker in workers:
                worker.close()
    one_s, many_s = (statistics.median(seconds[name]) for name in ("one", "many"))
    return {
        "one_worker_s": round(one_s, 2),
        "single_thread_workers_s": round(many_s, 2),
        "split_gain": round(one_s / many_s, 3),
    }


def _drain(worker: RenderWorker, waiting: queue.SimpleQueue[BenchAsset]) -> None:
    while True:
        try:
            one = waiting.get_nowait()
        except queue.Empty:
            return
        worker.render(one.asset, one.path)


def _peak_rss(process: psutil.Process) -> int:
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _spec(render: RenderSpec) -> DatasetSpec:
    return DatasetSpec(name="bench", source=ProceduralSource(), render=render)


if __name__ == "__main__":
    main()
