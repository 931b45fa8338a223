"""`make bench-corpus`: what a corpus of a million objects costs its tools, on a folder; and shard assembly.

    python -m tests.bench.corpus [--objects 1000000] [--folder DIR]

Receipts are made up, 64 objects each with quality records of 32 views as Blender renders give them (4 KB), each shard a
file of 64 bytes. Then every step runs in a process of its own, whose time and peak memory (children's
added) count; its processor time is told too, for machines that do other work besides:

    plan      deal listed assets and freeze the plan
    merge     read every receipt, judge every record, merge to one table
    publish   the rest: look for every shard, store the manifest, create the version
    status    tell where the corpus stands: the first look, which reads every receipt's footer, and the next
    open      what a reader does first: the first on its node, which makes the index, and any later one
    look      what a rebuild does first: compare the source with the receipts
    diff      against a version in which 1 % of the objects were made again from other files

Files were just written, so they come from the page cache. Assembly: encoded samples to a stored, verified shard with
its receipt, against the same bytes through SHA-256 and one write, alternating: a write that a power cut cannot undo, as
ours is (`assemble_limit`), and one that ends in the page cache (`assemble_limit_unsynced`). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.status import corpus_status
from pipeline import SCHEMA, diff, manifest, rebuild, receipt, version
from pipeline import plan as plans
from pipeline.canonical import canonical_json
from pipeline.listing import Listing
from pipeline.reader import VersionReader
from pipeline.spec import DatasetSpec, ProceduralSource
from pipeline.store import Store, open_store
from pipeline.types import Asset, Plane, View
from tests.conftest import make_sample

SPEC = DatasetSpec(name="bench", source=ProceduralSource(num_objects=1))
FINGERPRINT = SPEC.fingerprint("bench 1")
VIEWS = 32
FAILED = 0.02
CHANGED = 0.01
POOL = 4096
MAX_WORKERS = 16
STEPS = ("plan", "receipts", "publish", "status", "open", "look", "changed", "republish", "diff")


def assets(count: int, *, changed: bool = False) -> list[Asset]:
    """Return made-up assets, sorted by uid as Objaverse's are; with `changed` 1 % of them have other bytes."""
    names = sorted(hashlib.blake2b(f"{i}".encode(), digest_size=16).hexdigest() for i in range(count))
    other = int(1 / CHANGED)
    return [
        Asset(
            uid=name, source="objaverse", uri=f"https://hub.example/objaverse/glbs/000-{i % 160:03d}/{name}.glb",
            format="glb", license="CC-BY-4.0" if i % 5 else "CC-BY-NC-4.0", attribution=f"artist {i % 1000}",
            sha256=name + ("1" if changed and i % other == 0 else "0") * 32, num_bytes=1_000_000 + i,
        )
        for i, name in enumerate(names)
    ]  # fmt: skip


def quality_pool() -> list[str]:
    """Return quality records as a render of 32 views gives them, all different."""
    rng = np.random.default_rng(0)
    names = ("alpha_coverage", "black", "clipped", "colour_spread", "cropped", "thickness")
    out = []
    for _ in range(POOL):
        views: dict[str, Any] = {name: (rng.random(VIEWS) * 0.4).tolist() for name in names[:3]}
        views |= {name: np.round(rng.random(VIEWS) * 0.4, 6).tolist() for name in names[3:]}
        views |= {"samples": rng.integers(4, 30, VIEWS).tolist(), "border_touch": (rng.random(VIEWS) > 0.9).tolist()}
        record = {
            "albedo_spread": round(float(rng.random()), 6), "border_touch_share": 0.1, "colour_spread": 0.3,
            "bounds_max": rng.random(3).tolist(), "bounds_min": (-rng.random(3)).tolist(), "flags": ["touches_border"],
            "frame": 1, "largest_texture_px": 2048, "mean_alpha_coverage": float(rng.random() * 0.3 + 0.05),
            "mean_clipped": float(rng.random() * 0.01), "mean_cropped": float(rng.random() * 0.01),
            "num_images": 3, "num_materials": 4, "num_meshes": 22, "num_triangles": int(rng.integers(1e6)),
            "num_triangles_file": int(rng.integers(1e6)), "phash": rng.bytes(32).hex(), "pose": "first_frame",
            "reversed_normals_share": float(rng.random()), "stray": {"area_share": 0.0, "num_triangles": 0},
            "textures_scaled": 0, "thickness_median": 0.2, "thickness_min": 0.1, "transparent": False,
            "untextured": False, "views": views,
        }  # fmt: skip
        out.append(canonical_json(record).decode())
    return out


def write_receipts(corpus: str, plan_set: str, part: int, parts: int) -> None:
    """Write the receipts and shards of every `parts`-th shard of a plan."""
    store = open_store(corpus)
    root = Path(corpus)
    plan = plans.load(store, plan_set)
    pool = pa.array(quality_pool())
    for index in range(part, len(plan.starts), parts):
        rows = plan.shard_table(index)
        plan_id = rows["plan_id"][0].as_py()
        data = (plan_id * 2)[:64].encode()
        sha256 = hashlib.sha256(data).hexdigest()
        (root / "shards" / f"{sha256}.tar").write_bytes(data)
        table, kinds = receipt_rows(rows, pool, np.random.default_rng(index), sha256)
        metadata = {
            "schema": str(SCHEMA), "plan_id": plan_id, "fingerprint": plan.fingerprint, "shard_sha256": sha256,
            "shard_bytes": "64", "planned": str(rows.num_rows), "samples": str(rows.num_rows - sum(kinds.values())),
            "failures": canonical_json({"kinds": kinds, "retryable": kinds.get("render_timeout", 0)}).decode(),
            "work": receipt.work_json(receipt.work_of(table.select(["status", "provenance"]).to_pylist())),
        }  # fmt: skip
        pq.write_table(
            table.replace_schema_metadata(metadata), root / receipt.receipt_key(plan_id), compression="zstd",
            use_dictionary=False, write_statistics=False, write_page_checksum=True,
        )  # fmt: skip


def receipt_rows(
    rows: pa.Table, pool: pa.Array, rng: np.random.Generator, sha256: str
) -> tuple[pa.Table, dict[str, int]]:
    """Return the rows of a made-up receipt, and its failures by kind."""
    count = rows.num_rows
    failed = rng.random(count) < FAILED
    kind = np.where(rng.random(count) < 0.5, "empty_scene", "render_timeout")
    members = 1 + VIEWS
    lengths = rng.integers(20_000, 120_000, (count, members)).astype(np.int32)
    starts = np.arange(0, (count + 1) * members, members, dtype=np.int32)

    def of_samples(values: pa.Array) -> pa.Array:
        return pa.array([None if f else v for f, v in zip(failed, values.to_pylist())], values.type)

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return of_samples(pa.ListArray.from_arrays(pa.array(starts), pa.array(values.ravel(), kind)))

    def same(value: Any, kind: pa.DataType) -> pa.Array:
        return of_samples(pa.array([value] * count, kind))

    types = {field.name: field.type for field in receipt.ROWS}
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(axis=1) + members * 1024)[:-1]]) + 512
    columns = {
        name: rows[name].combine_chunks() for name in ("uid", "source", "uri", "format", "license", "attribution")
    }
    columns |= {
        "key": columns["uid"],
        "asset_sha256": rows["sha256"].combine_chunks(),
        "asset_bytes": rows["num_bytes"].combine_chunks(),
        "fingerprint": pa.array([FINGERPRINT] * count),
        "status": pa.array(np.where(failed, "failure", "sample")),
        "failure_kind": pa.array(kind, mask=~failed),
        "retryable": pa.array(kind == "render_timeout", mask=~failed),
        "message": pa.array(["no mesh is in the file"] * count, mask=~failed),
        "seed": of_samples(pa.array(rng.integers(0, 2**62, count))),
        "quality": of_samples(pool.take(pa.array(rng.integers(0, POOL, count)))),
        "num_views": same(VIEWS, types["num_views"]),
        "planes": same(["rgba"], types["planes"]),
        "codecs": same(["webp"], types["codecs"]),
        "shard_sha256": same(sha256, types["shard_sha256"]),
        "shard_bytes": same(64, types["shard_bytes"]),
        "offset": of_samples(pa.array(offsets)),
        "lengths": lists(lengths, pa.int32()),
        "crc32s": lists(rng.integers(0, 2**32, (count, members), dtype=np.uint32), pa.uint32()),
        "attempts": pa.array(np.ones(count, np.int32)),
        "log_tail": pa.array(["Fra:1 Mem:10M"] * count, mask=~failed),
        "provenance": pa.array([_provenance(i) for i in rng.integers(0, 200, count)]),
    }
    kinds = {name: int(((kind == name) & failed).sum()) for name in ("empty_scene", "render_timeout")}
    return pa.table({name: columns[name] for name in receipt.ROWS.names}, schema=receipt.ROWS), kinds


def _provenance(node: int) -> str:
    told = {"attempts": 1, "device": "CPU", "worker": f"node-{node}", "elapsed_s": 31.5, "cpus": 1.0, "gpus": 0.0}
    return canonical_json(told | {"finished_at": f"2026-11-20T{node % 24:02d}:00:00+00:00"}).decode()


def make_receipts(corpus: str, plan_set: str) -> None:
    """Write all receipts of a plan with every core."""
    for name in ("shards", "receipts"):
        (Path(corpus) / name).mkdir(exist_ok=True)
    parts = min(MAX_WORKERS, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_receipts, args=(corpus, plan_set, i, parts)) for i in range(parts)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def listing(count: int, *, changed: bool) -> Listing:
    """Return the listing of the source."""
    return Listing.of(plans.assets_table(assets(count, changed=changed)))


def look(store: Store, count: int, *, changed: bool) -> rebuild.Survey:
    """Compare the source with the corpus."""
    return rebuild.survey(store, SPEC, FINGERPRINT, listing(count, changed=changed), version.plan_sets(store))


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Measure a block."""
    begun = time.perf_counter()
    yield
    into[name] = time.perf_counter() - begun


def step(name: str, corpus: str, count: int) -> dict[str, Any]:
    """Run one step here; return its times."""
    store, out = open_store(corpus), dict[str, Any]()
    if name == "plan":
        listed = assets(count)
        with timed(out, "plan_s"):
            plans.put(store, plans.draft(SPEC, FINGERPRINT, listed))
    elif name == "receipts":
        make_receipts(corpus, SPEC.plan_set_id(FINGERPRINT))
    elif name in ("publish", "republish"):
        wanted = listing(count, changed=True) if name == "republish" else None
        merging = manifest.merge_plans

        def merge(*arguments: Any) -> manifest.Merged:
            with timed(out, "merge_s"):
                return merging(*arguments)

        manifest.merge_plans = merge  # type: ignore[assignment]
        with timed(out, "publish_s"):
            made, _ = version.publish(store, version.plan_sets(store), SPEC, listing=wanted)
        out["publish_s"] -= out["merge_s"]
        out |= {"samples": made.counts["samples"], "manifest_bytes": made.manifest_bytes}
    elif name == "status":
        with timed(out, "status_first_s"):
            corpus_status(store)
        with timed(out, "status_s"):
            found = corpus_status(store)
        out["shards"] = sum(plan["shards"]["committed"] for plan in found["plans"])
    elif name == "open":
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-", dir=Path(corpus).parent)
        for key in ("open_s", "open_again_s"):
            with timed(out, key):
                out["rows"] = len(VersionReader.open(corpus).index)
    elif name == "look":
        with timed(out, "look_s"):
            found_ = look(store, count, changed=False)
        out["pending"] = found_.pending.num_rows
    elif name == "changed":
        survey = look(store, count, changed=True)
        plan, _ = rebuild.freeze_pending(store, SPEC, FINGERPRINT, survey, "bench 1")
        make_receipts(corpus, plan.id)
        out["made"] = survey.pending.num_rows
    elif name == "diff":
        versions = version.open_version(store, 1), version.open_version(store, 2)
        with timed(out, "diff_s"):
            difference = diff.diff(store, *versions)
        out["changed"] = difference.counts["changed_asset"]
    return out


def run_step(name: str, corpus: str, count: int) -> dict[str, Any]:
    """Run one step in a process of its own; add the most memory that it and its children held at a time."""
    command = [sys.executable, "-m", "tests.bench.corpus", "--step", name, "--folder", corpus, "--objects", str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak, top = 0, psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                tree = [top, *top.children(recursive=True)]
                peak = max(peak, sum(one.memory_info().rss for one in tree))
            time.sleep(0.1)
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 0, f"step {name} failed"
    found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    found["peak_rss_bytes"] = max(peak, found["peak_rss_bytes"])
    print(name, json.dumps(found), file=sys.stderr, flush=True)
    return found


def costs() -> dict[str, float]:
    """Return the most memory that this process held, and its processor time, children included."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = sum(use.ru_utime + use.ru_stime for use in (own, children))
    return {"peak_rss_bytes": own.ru_maxrss * 1024, "cpu_seconds": round(seconds, 2)}


def assemble(folder: Path, rounds: int = 15, objects: int = 32) -> dict[str, float]:
    """Measure shard assembly against hashing and writing its bytes once; MB/s of the encoded bytes, medians."""
    rng = np.random.default_rng(0)
    store = open_store(str(folder / "assembled"))
    spans: dict[str, list[float]] = {"ours": [], "limit": [], "unsynced": []}
    total = 0
    for turn in range(rounds):
        made = [_encoded(f"round-{turn}-{i}", rng) for i in range(objects)]
        payload = [plane.data for sample in made for view in sample.views for plane in view.planes.values()]
        total = sum(map(len, payload))
        (plan,) = plans.deal([sample.asset for sample in made], objects, "f")
        scratch = folder / f"scratch-{turn}"
        scratch.mkdir()
        jobs: list[tuple[str, Callable[[], object]]] = [
            ("ours", lambda m=made, s=scratch, p=plan: receipt.commit_shard(store, p, {x.asset.uid: x for x in m}, s)),
            ("limit", lambda p=payload, s=scratch: _hash_and_write(p, s / "limit", sync=True)),
            ("unsynced", lambda p=payload, s=scratch: _hash_and_write(p, s / "unsynced", sync=False)),
        ]  # type: ignore[misc]
        for name, job in jobs if turn % 2 else jobs[::-1]:
            begun = time.perf_counter()
            job()
            spans[name].append(time.perf_counter() - begun)
        shutil.rmtree(scratch)
    speeds = {name: total / 1e6 / float(np.median(values)) for name, values in spans.items()}
    return {
        "assemble_mb_per_s": round(speeds["ours"], 1),
        "assemble_limit_mb_per_s": round(speeds["limit"], 1),
        "assemble_limit_unsynced_mb_per_s": round(speeds["unsynced"], 1),
        "assemble_ratio": round(speeds["ours"] / speeds["limit"], 3),
        "assemble_shard_mb": round(total / 1e6, 1),
    }


def _encoded(uid: str, rng: np.random.Generator) -> Any:
    """Return a sample of 32 views whose planes are random bytes of a render's size; nothing decodes them."""
    few = make_sample(uid, num_views=2, size_px=16)
    views = tuple(
        View(
            index=i, camera=few.views[i % 2].camera,
            planes={"rgba": Plane(codec="webp", data=rng.bytes(int(rng.integers(30_000, 80_000))))},
        )
        for i in range(VIEWS)
    )  # fmt: skip
    return type(few)(
        asset=few.asset, spec_fingerprint="f", seed=few.seed, normalization=few.normalization, views=views,
        quality={"mean_alpha_coverage": 0.5}, provenance={"attempts": 1},
    )  # fmt: skip


def _hash_and_write(payload: list[bytes], path: Path, *, sync: bool) -> None:
    digest = hashlib.sha256()
    with path.open("wb", buffering=2**20) as file:
        for data in payload:
            digest.update(data)
            file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def main() -> None:
    """Run every step, or the one that is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where the corpus is made and left; default a temporary folder")
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--only-assembly", action="store_true")
    options = parser.parse_args()
    if options.step:
        found = step(options.step, options.folder, options.objects)
        print(json.dumps(found | costs()))
        return
    folder = Path(options.folder or tempfile.mkdtemp(prefix="lrm-bench-corpus-"))
    try:
        out: dict[str, Any] = {"objects": options.objects, "cpus": os.cpu_count(), "machine": platform.machine()}
        if not options.only_assembly:
            found = {name: run_step(name, str(folder / "corpus"), options.objects) for name in STEPS}
            measured = [name for name in STEPS if name not in ("receipts", "changed")]
            for name in measured:
                again = "re" if name == "republish" else ""
                out |= {again + key: round(value, 2) for key, value in found[name].items() if key.endswith("_s")}
            out |= {
                "peak_rss_bytes": max(found[name]["peak_rss_bytes"] for name in measured),
                "peak_rss_bytes_by_step": {name: found[name]["peak_rss_bytes"] for name in measured},
                "cpu_s_by_step": {name: found[name]["cpu_seconds"] for name in measured},
                "manifest_bytes": found["publish"]["manifest_bytes"],
                "shards": found["status"]["shards"],
                "changed": found["diff"]["changed"],
            }
        print(json.dumps(out | assemble(folder)))
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
