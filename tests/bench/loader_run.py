"""One run of one contestant in a process of its own: `python -m tests.bench.loader_run '{"contestant": ..., ...}'`.

Steady speed skips the first batches, in which buffers fill and every contestant's prefetch pays out, then counts
objects until the time or the batches are used up. Speed from the start counts an epoch's 64 batches from the moment the
contestant is made: where a cache is empty, what is downloaded before the first batch is part of the work. Prints one
JSON line.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

SKIPPED_BATCHES = 8


def main(argument: str) -> None:
    """Run and print."""
    job = json.loads(argument)
    if job["contestant"].startswith("limit"):
        print(json.dumps(run_limit(job)))
        return
    from tests.bench.loader_peers import BATCH, CONTESTANTS, PICKED, Setting, ours_stats

    setting = Setting(Path(job["root"]), job["remote"], Path(job["scratch"]), tuple(job.get("shard_urls", ())))
    begun, cpu = time.perf_counter(), 0.0
    batches = iter(CONTESTANTS[job["contestant"]](setting))
    result: dict[str, Any] = {}
    with PeakMemory() as memory:
        for number in range(SKIPPED_BATCHES + job["batches"]):
            batch = next(batches)
            assert tuple(batch["rgba"].shape) == (BATCH, PICKED, 512, 512, 4), batch["rgba"].shape
            assert tuple(batch["world_from_camera"].shape) == (BATCH, PICKED, 4, 4)
            now = time.perf_counter()
            if number == 0:
                result["first_batch_s"] = round(now - begun, 3)
            if number == SKIPPED_BATCHES - 1:
                start, cpu, wire = now, cpu_seconds(), ours_stats()
            elif number >= SKIPPED_BATCHES and now - start > job["seconds"]:
                break
    count = (number - SKIPPED_BATCHES + 1) * BATCH
    steady, whole = round(count / (now - start), 2), round((number + 1) * BATCH / (now - begun), 2)
    result |= {"steady_objects_per_s": steady, "from_start_objects_per_s": whole, "objects": count}
    result["objects_per_s"] = whole if job["from_start"] else steady
    result["cpu_s_per_object"] = round((cpu_seconds() - cpu) / count, 5)
    result |= {"peak_memory_bytes": memory.peak, "total_objects": (number + 1) * BATCH}
    stats = ours_stats()
    if stats and wire["num_bytes"] < stats["num_bytes"]:
        result["requests_per_object"] = round((stats["requests"] - wire["requests"]) / count, 2)
        result["wire_bytes_per_object"] = round((stats["wire_bytes"] - wire["wire_bytes"]) / count)
        result["needed_bytes_per_object"] = round((stats["num_bytes"] - wire["num_bytes"]) / count)
    print(json.dumps(result), flush=True)
    # An orderly end: a peer that is killed leaves shared memory that its next run trips over. Some take long, though.
    ender = threading.Timer(10, os._exit, (0,))
    ender.daemon = True
    ender.start()


def cpu_seconds() -> float:
    """Return CPU seconds of this process and of its children, living ones included."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


class PeakMemory:
    """Highest sum of private and shared-once memory (PSS) of this process and its children, looked at every two
    seconds: looking costs CPU."""

    def __init__(self) -> None:
        self.peak = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._end.wait(2.0):
            total = 0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, OSError):
                    continue
            self.peak = max(self.peak, total)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def run_limit(job: dict[str, Any]) -> dict[str, Any]:
    """Decode the same bytes from memory with two threads: `limit` by OpenCV alone, `limit_libwebp` by our decoder."""
    import cv2
    import numpy as np

    from lrm.order import KeyedDraws
    from lrm.webp import decode_rgba_into
    from pipeline.reader import VersionReader

    cv2.setNumThreads(0)
    reader, draws = VersionReader.open(str(Path(job["root"]) / "corpus"), 1), KeyedDraws(1)
    rows = [draws.below(len(reader)) for _ in range(96)]
    objects = [[bytes(p["rgba"]) for p in reader.read_views(row, draws.choose(4, 32)).planes] for row in rows]
    outs = threading.local()

    def by_opencv(views: list[bytes]) -> None:
        for data in views:
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)

    def by_libwebp(views: list[bytes]) -> None:
        if not hasattr(outs, "rgba"):
            outs.rgba = np.empty((512, 512, 4), np.uint8)
        for data in views:
            decode_rgba_into(data, outs.rgba)

    decode = by_libwebp if job["contestant"] == "limit_libwebp" else by_opencv
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(decode, objects[:16]))
        begun, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begun < job["seconds"]:
            list(pool.map(decode, objects))
            count += len(objects)
        seconds = time.perf_counter() - begun
    mean = sum(len(data) for views in objects for data in views) / len(objects) / 4
    cpu = (time.process_time() - cpu) / count
    return {
        "objects_per_s": round(count / seconds, 2),
        "cpu_s_per_object": round(cpu, 5),
        "bytes_per_view": round(mean),
    }


if __name__ == "__main__":
    main(sys.argv[1])
