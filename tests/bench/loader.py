"""`make bench-loader`: our loader against the public ones, alternating, in every kind of store.

    python -m tests.bench.loader [--settings local_warm,s3_20ms] [--contestants ours,litdata] [--rounds 2] [--seconds 6]

Every run is a process of its own (`tests.bench.loader_run`) over the corpus of `tests.bench.loader_corpus`; contestants
and what each may do are told in `tests.bench.loader_peers`. Settings:

    local_warm   the local folder, in the page cache
    local_cold   the same, its pages dropped before every run (posix_fadvise, which asks; other files are left alone)
    s3           SeaweedFS on loopback; peers that cache begin with an empty cache, as in a first epoch
    s3_20ms      the same, each request held back 20 ms by `tests.bench.proxy`

In the remote settings objects/s are of the whole epoch from the start, in the local ones steady (`loader_run` tells how
each is counted; both figures are in the rows, and `slow_store_ratio` is of steady speeds). Both remote settings go
through the proxy, which counts what each contestant moves; it, the store and the contestant share the machine's cores.
`ours_cached` finds its cache filled in the local settings and empty in the remote ones. The limit is decoding the same
bytes from memory with OpenCV, two threads; beside it our decoder's own.

A run takes about 10 s: all of it, 2 rounds of 11 contestants in 4 settings, about 12 minutes once the corpus is there.

The last line is one JSON object. `ratio_best_peer_min`: objects/s of ours, ranged, over the best peer, least of all
settings; `ratio_best_peer_min_best_mode`: of the better of our two modes; `ratio_best_peer_min_steady`: by steady
speed, which leaves out what a caching peer downloaded before it was counted; `ratio_limit_local`: ours over the limit,
warm; `wire_ratio_max`: bytes read over bytes needed, ranged; `slow_store_ratio`: ours with 20 ms over ours without.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from tests.bench.loader_corpus import build
from tests.bench.loader_peers import CONTESTANTS, PEERS
from tests.bench.proxy import DelayProxy
from tests.s3 import BUCKET, s3_server

SETTINGS = ("local_warm", "local_cold", "s3", "s3_20ms")
LIMITS = ("limit", "limit_libwebp")
DELAY_S = 0.02
RUN_TIMEOUT_S = 180.0


def main() -> None:
    """Measure, and print one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--contestants", default="", help="parts of names; default all that import")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="longest time to count objects in one run")
    parser.add_argument("--batches", type=int, default=52, help="most batches to count; an epoch has 64")
    args = parser.parse_args()
    chosen = [name for name in (*LIMITS, *CONTESTANTS) if _imports(name) and _is_chosen(name, args.contestants)]
    settings = args.settings.split(",")
    if unknown := set(settings) - set(SETTINGS):
        parser.error(f"unknown settings {sorted(unknown)}; known: {', '.join(SETTINGS)}")
    peers = [name for name in ("litdata", "streaming") if any(name in one for one in chosen)]
    root = build(tuple(peers))
    begun, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory(dir=root, prefix="scratch-") as scratch, ExitStack() as stack:
        remote = None
        if any(name.startswith("s3") for name in settings):
            remote = stack.enter_context(_remote(root, peers, Path(scratch)))
        bench = Bench(root, Path(scratch), remote, args.seconds, args.batches)
        for name in settings:
            rows.append(bench.measure(name, chosen, args.rounds))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps(summary(rows) | {"wall_s": round(time.perf_counter() - begun)}, sort_keys=True))


def _imports(name: str) -> bool:
    needs = name.partition("_")[0]
    return name not in PEERS or importlib.util.find_spec(needs) is not None


def _is_chosen(name: str, parts: str) -> bool:
    return not parts or any(part in name for part in parts.split(","))


@contextmanager
def _remote(root: Path, peers: list[str], scratch: Path) -> Iterator[tuple[DelayProxy, dict[str, str]]]:
    """Start the store, fill it and put the proxy before it; yields the proxy and the environment of its clients."""
    with s3_server(scratch / "s3", num_volumes=24) as environment:
        os.environ.update(environment)
        _upload(root, ["corpus", *peers])
        port = urlsplit(environment["AWS_ENDPOINT_URL"]).port
        assert port is not None
        with DelayProxy(port) as proxy:
            yield proxy, environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}


def _upload(root: Path, names: list[str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import obstore

    from pipeline.store import open_store

    store = open_store(f"s3://{BUCKET}/bench")
    paths = [p for name in names for p in sorted((root / name).rglob("*")) if p.is_file() and p.name != ".done"]
    with ThreadPoolExecutor(2) as pool:
        put = lambda path: obstore.put(store.backend, str(path.relative_to(root)), path, use_multipart=False)  # noqa: E731
        list(tqdm(pool.map(put, paths), total=len(paths), desc="fill the store", unit="file"))


class Bench:
    """Runs contestants in turn and gathers what they print."""

    def __init__(
        self,
        root: Path,
        scratch: Path,
        remote: tuple[DelayProxy, dict[str, str]] | None,
        seconds: float,
        batches: int,
    ) -> None:
        self._root, self._scratch, self._remote = root, scratch, remote
        self._seconds, self._batches = seconds, batches
        self._local_cache = scratch / "local"
        self._warmed: set[str] = set()
        self._num_runs = 0

    def measure(self, name: str, contestants: list[str], rounds: int) -> dict[str, Any]:
        """Return the row of a setting: the best of the rounds, by contestant."""
        remote = name.startswith("s3")
        found: dict[str, list[dict[str, Any]]] = {one: [] for one in contestants}
        for number in range(rounds):
            for one in tqdm(contestants, desc=f"{name}, round {number + 1}", unit="run"):
                if one not in LIMITS or name == "local_warm":
                    found[one].append(self._run(name, one))
        row: dict[str, Any] = {
            "store": "s3" if remote else "folder",
            "delay_s": DELAY_S if name == "s3_20ms" else 0.0,
            "cache_state": "empty" if remote else ("dropped pages" if name == "local_cold" else "warm pages"),
            "name": name,
            "contestants": {one: _best(runs) for one, runs in found.items() if runs},
        }
        return row

    def _run(self, name: str, contestant: str) -> dict[str, Any]:
        remote, environment = name.startswith("s3"), os.environ.copy()
        self._num_runs += 1
        shutil.rmtree(self._scratch / f"run-{self._num_runs - 1}", ignore_errors=True)
        scratch = self._scratch / f"run-{self._num_runs}" if remote else self._local_cache
        scratch.mkdir(parents=True, exist_ok=True)
        job: dict[str, Any] = {
            "contestant": contestant, "root": str(self._root), "scratch": str(scratch), "from_start": remote,
            "seconds": 4 * self._seconds if remote else self._seconds, "batches": 56 if remote else self._batches,
            "remote": f"s3://{BUCKET}/bench" if remote else "",
        }  # fmt: skip
        before = (0, 0)
        if remote:
            assert self._remote is not None
            proxy, more = self._remote
            proxy.delay_s = DELAY_S if name == "s3_20ms" else 0.0
            before = (proxy.num_bytes, proxy.num_requests)
            environment |= more
            job["shard_urls"] = self._signed(more) if contestant.startswith("webdataset") else []
        elif contestant == "ours_cached":
            self._fill_cache(scratch / "cache")
        if not remote and (name == "local_cold" or contestant not in self._warmed):
            _touch_pages(self._root, scratch, drop=name == "local_cold")
            self._warmed = set() if name == "local_cold" else set(CONTESTANTS) | set(LIMITS)
        done = self._spawn(job, environment)
        if remote and "total_objects" in done:
            assert self._remote is not None
            done["moved_bytes_per_object"] = round((self._remote[0].num_bytes - before[0]) / done["total_objects"])
        return done

    @staticmethod
    def _spawn(job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        command = [sys.executable, "-m", "tests.bench.loader_run", json.dumps(job)]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                out, err = process.communicate(timeout=RUN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                out, err = "", f"no result within {RUN_TIMEOUT_S:g} s"
            finally:
                _kill_group(process.pid)
        lines = [line for line in out.splitlines() if line.startswith("{")]
        if not lines:
            return {"error": err.strip()[-400:]}
        result: dict[str, Any] = json.loads(lines[-1])
        return result

    def _signed(self, environment: dict[str, str]) -> list[str]:
        """Return URLs of the shards that need no credentials: plain webdataset reads S3 by curl."""
        import obstore

        from pipeline.store import open_store

        before = os.environ.copy()
        os.environ.update(environment)
        try:
            store = open_store(f"s3://{BUCKET}/bench")
        finally:
            os.environ.clear()
            os.environ.update(before)
        paths = sorted((self._root / "corpus" / "shards").glob("*.tar"))
        keys = [str(path.relative_to(self._root)) for path in paths]
        return list(obstore.sign(store.backend, "GET", keys, timedelta(hours=2)))

    def _fill_cache(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self._root / "corpus" / "shards").glob("*.tar"):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _touch_pages(root: Path, scratch: Path, *, drop: bool) -> None:
    """Ask the kernel to drop the pages of the data files, or read them in."""
    for folder in (root / "corpus", root / "litdata", root / "streaming", scratch / "cache"):
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    if drop:
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    else:
                        while file.read(2**24):
                            pass


def _best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest run: of everyone's, so that one that the machine disturbed counts for nobody."""
    whole = [run for run in runs if "error" not in run]
    if not whole:
        return {"error": runs[0]["error"]}
    speeds = [run["objects_per_s"] for run in whole]
    return max(whole, key=lambda run: run["objects_per_s"]) | {"all_objects_per_s": speeds}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings and the ratios over them; a ratio whose parts were not measured is None."""

    def rate(row: dict[str, Any], name: str, figure: str = "objects_per_s") -> float | None:
        return row["contestants"].get(name, {}).get(figure)

    def least(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(min(known), 3) if known else None

    ranged, best_mode, wire = list[float | None](), list[float | None](), list[float]()
    for row in rows:
        peers = {name: value for name in PEERS if (value := rate(row, name))}
        ours, cached = rate(row, "ours"), rate(row, "ours_cached")
        steady = [value for name in PEERS if (value := rate(row, name, "steady_objects_per_s"))]
        if steady and (own := rate(row, "ours", "steady_objects_per_s")):
            row["ratio_best_peer_steady"] = round(own / max(steady), 3)
        if peers and ours:
            best = max(peers, key=lambda name: peers[name])
            row["best_peer"], row["ratio_best_peer"] = best, round(ours / peers[best], 3)
            ranged.append(ours / peers[best])
            best_mode.append(max(ours, cached or 0) / peers[best])
        figures = row["contestants"].get("ours", {})
        if "wire_bytes_per_object" in figures:
            wire.append(figures["wire_bytes_per_object"] / figures["needed_bytes_per_object"])
    by_name = {row["name"]: row for row in rows}

    def over(first: tuple[str, str], second: tuple[str, str], figure: str = "objects_per_s") -> float | None:
        pairs = (first, second)
        a, b = (rate(by_name[setting], one, figure) if setting in by_name else None for setting, one in pairs)
        return round(a / b, 3) if a and b else None

    return {
        "benchmark": "loader",
        "num_cores": os.cpu_count(),
        "settings": rows,
        "ratio_best_peer_min": least(ranged),
        "ratio_best_peer_min_best_mode": least(best_mode),
        "ratio_best_peer_min_steady": least([row.get("ratio_best_peer_steady") for row in rows]),
        "ratio_limit_local": over(("local_warm", "ours"), ("local_warm", "limit")),
        "ratio_limit_libwebp_local": over(("local_warm", "ours"), ("local_warm", "limit_libwebp")),
        "wire_ratio_max": round(max(wire), 4) if wire else None,
        "slow_store_ratio": over(("s3_20ms", "ours"), ("s3", "ours"), "steady_objects_per_s"),
        "threads_or_processes": over(("local_warm", "ours"), ("local_warm", "ours_workers")),
    }


if __name__ == "__main__":
    main()
