"""`make bench-jobs`: what the system itself costs, beside the producer; and a farm of 200 nodes by simulation.

    python -m tests.bench.jobs [--objects 400] [--memory-objects 100000] [--nodes 200]

A fake producer sleeps 0 s or 0.2 s and returns a sample of random bytes, 32 views of 26 KB as plain assets take at 512
px. The real job makes N and then 3 N of them through plan, Ray, assembly and receipts on a folder, with one local
worker; what an object costs is the slope between the two, so that the start of Ray does not count, and the overhead is
that less the producer's 0.2 s. Beside it, measured in the same run: the driver's processor time an object, and what
assembly alone takes, in this process.

Driver memory: the real job over 100 thousand planned objects of which all fail, so that they take no bytes and every
loop of the driver is run; peak resident bytes of the driver, whose tables do not know what became of an object.

The simulation (tests/bench/simulation.py) takes the measured costs. Requests to the store are those that a commit of
one shard makes of a real S3 server, counted by a proxy. `breaks_at_nodes` is the first doubling of nodes at which a
slot does less than nine tenths of the work it does at first, and `breaks_by` what is then at its limit. Prints one JSON
line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.build import build
from pipeline import plan as plans
from pipeline import receipt
from pipeline.spec import DatasetSpec, ProceduralSource, ShardSpec, WorkerSpec
from pipeline.store import open_store
from pipeline.types import Asset, Failure, FailureKind, Plane, Sample
from tests.bench.simulation import Farm, simulate
from tests.conftest import make_asset, make_sample
from tests.proxy import fault_proxy
from tests.s3 import BUCKET, s3_server

VIEWS, VIEW_BYTES = 32, 26_000
MADE_S = 0.2
OBJECT_S = 0.9 * VIEWS
"""Seconds a core of a real object: 0.9 s a view at 512 px, as `make bench-render` measures."""

_made: dict[str, Sample] = {}


def _sample(fingerprint: str, asset: Asset) -> Sample:
    """Return a sample of random bytes, made once a process."""
    if fingerprint not in _made:
        rng = np.random.default_rng(0)
        made = make_sample("bench", num_views=VIEWS, size_px=16, fingerprint=fingerprint)
        views = [
            replace(view, planes={"rgba": Plane(data=rng.bytes(VIEW_BYTES), codec=view.planes["rgba"].codec)})
            for view in made.views
        ]
        _made[fingerprint] = replace(made, views=tuple(views))
    return replace(_made[fingerprint], asset=asset)


def produce_at_once(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make an object in no time."""
    return _sample(fingerprint, asset)


def produce_in_a_while(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make an object in MADE_S seconds, without the processor."""
    time.sleep(MADE_S)
    return _sample(fingerprint, asset)


def fail_at_once(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Fail in no time."""
    return Failure(uid=asset.uid, kind=FailureKind.EMPTY_SCENE, message="as asked")


PRODUCERS: dict[str, Callable[[DatasetSpec, str, Asset], Sample | Failure]] = {
    "at_once": produce_at_once,
    "in_a_while": produce_in_a_while,
    "failing": fail_at_once,
}


def job(producer: str, objects: int, workers: int) -> dict[str, float]:
    """Run the real job once, in this process; returns what it took."""
    module = importlib.import_module("tests.bench.jobs")  # by its name: workers do not know what ran as __main__
    cpus = (os.cpu_count() or 1) / workers
    spec = DatasetSpec(
        name="bench", source=ProceduralSource(num_objects=objects), shards=ShardSpec(objects_per_shard=64),
        workers=WorkerSpec(num_cpus=cpus, memory_bytes=2**28, max_failure_share=1),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lrm-bench-") as folder:
        done = build(spec, f"{folder}/corpus", produce=module.PRODUCERS[producer], show_progress=False)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "accounted": float(done.accounted and done.planned == objects),
        "elapsed_s": done.elapsed_s,
        "cpu_s": used.ru_utime + used.ru_stime,
        "rss_bytes": used.ru_maxrss * 1024.0,
    }


def run_job(producer: str, objects: int, workers: int = 1) -> dict[str, float]:
    """Run `job` in a process of its own, which is the driver."""
    command = [sys.executable, "-m", "tests.bench.jobs", "--job", producer, str(objects), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if not found["accounted"]:
        raise RuntimeError(f"{command} did not account for every object")
    return found


def slope(producer: str, objects: int) -> dict[str, float]:
    """Return seconds, and the driver's processor seconds, that one object more costs."""
    few, many = run_job(producer, objects), run_job(producer, 3 * objects)
    return {name: (many[name] - few[name]) / (2 * objects) for name in ("elapsed_s", "cpu_s")}


def assembly(objects: int = 64, rounds: int = 3) -> float:
    """Return the seconds an object that assembly takes by itself: the median of some shards on a folder."""
    took = []
    with tempfile.TemporaryDirectory(prefix="lrm-bench-") as folder:
        store = open_store(f"{folder}/corpus")
        for number in range(rounds):
            shard = _shard(number, objects)
            results = {asset.uid: _sample("f", asset) for asset in shard.assets}
            begun = time.monotonic()
            receipt.commit_shard(store, shard, results, Path(folder))
            took.append((time.monotonic() - begun) / objects)
    return sorted(took)[rounds // 2]


def _shard(number: int, objects: int) -> plans.ShardPlan:
    assets = [make_asset(f"bench-{number}-{i}") for i in range(objects)]
    spec = DatasetSpec(name=f"bench-{number}", source=ProceduralSource(num_objects=1))
    return plans.draft(spec, "f", assets, producer="bench").shards[0]


def store_requests(objects: int = 64) -> int:
    """Return how many requests a commit of one shard makes of a real S3 server."""
    with tempfile.TemporaryDirectory(prefix="lrm-bench-") as folder, s3_server(Path(folder) / "s3") as environment:
        os.environ.update(environment)
        with fault_proxy(environment["AWS_ENDPOINT_URL"]) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy.url
            store = open_store(f"s3://{BUCKET}/bench")
            store.probe()
            before = len(proxy.log)
            shard = _shard(0, objects)
            results = {asset.uid: _sample("f", asset) for asset in shard.assets}
            receipt.commit_shard(store, shard, results, Path(folder))
            return len(proxy.log) - before


def farm(costs: dict[str, float], nodes: int) -> dict[str, Any]:
    """Simulate a farm of so many nodes with the measured costs, and double it until it breaks."""
    given = Farm(
        nodes=nodes, objects=nodes * 16 * 60, object_s=OBJECT_S, driver_s=costs["driver_cpu_s_per_object"],
        assemble_s=costs["assembly_s_per_object"], requests_per_shard=costs["store_requests_per_shard"],
    )  # fmt: skip
    found = simulate(given)
    # Spot nodes live for some hours, and often die together with others of their kind.
    spot = simulate(replace(given, node_mtbf_s=4 * 3600.0))
    # Short runs in which nothing dies, so that all that changes is the driver's share.
    calm = replace(given, node_mtbf_s=1e12, driver_mtbf_s=1e12, objects=nodes * 16 * 8)
    first, breaks, by = simulate(calm)["efficiency"], 0, ""
    for times in (2, 4, 8, 16):
        more = simulate(replace(calm, nodes=times * nodes, objects=times * calm.objects))
        if more["efficiency"] < 0.9 * first:
            breaks, by = times * nodes, "driver" if more["driver_busy"] > 0.8 else "assembly"
            break
    return {
        "simulated_nodes": nodes,
        "simulated_efficiency": round(found["efficiency"], 4),
        "simulated": {name: round(value, 5) for name, value in found.items()},
        "simulated_spot": {name: round(value, 5) for name, value in spot.items()},
        "breaks_at_nodes": breaks,
        "breaks_by": by,
    }


def main() -> None:
    """Run the benchmark, or one job of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=192)
    parser.add_argument("--memory-objects", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--job", nargs=3, help="for this benchmark's own use")
    args = parser.parse_args()
    if args.job:
        print(json.dumps(job(args.job[0], int(args.job[1]), int(args.job[2]))))
        return
    at_once, in_a_while = slope("at_once", args.objects), slope("in_a_while", args.objects)
    many = run_job("failing", args.memory_objects, workers=os.cpu_count() or 1)
    costs = {
        "driver_cpu_s_per_object": max(1e-6, in_a_while["cpu_s"]),
        "assembly_s_per_object": assembly(),
        "store_requests_per_shard": float(store_requests()),
    }
    out = {
        "objects": args.objects,
        "bytes_per_object": VIEWS * VIEW_BYTES,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "overhead_s_per_object": in_a_while["elapsed_s"] - MADE_S,
        "at_once_s_per_object": at_once["elapsed_s"],
        "objects_per_s": 1 / at_once["elapsed_s"],
        "driver_rss_bytes": int(many["rss_bytes"]),
        "memory_objects": args.memory_objects,
        "memory_objects_per_s": args.memory_objects / many["elapsed_s"],
        **costs,
    }
    print(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in out.items()} | farm(costs, args.nodes)))


if __name__ == "__main__":
    main()
