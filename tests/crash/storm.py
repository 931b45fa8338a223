"""Random killing with an oracle: writers of one corpus die at any moment, over a store that fails at random.

    PYTHONPATH=. python -m tests.crash.storm --time-s 600 --seed 1

runs storm after storm, each with a corpus and a seed of its own: four writers without Ray on a folder, and on S3 behind
a proxy that lies; histories against a model; then the real job on Ray, on a folder or S3, workers and driver killed.
After each the oracle holds the corpus to this: each planned object is there once, as a sample or a failure; no record
that was ever seen has changed or gone; the version is the one of an undisturbed run; nothing half-made and no process
is left. It prints one JSON line, and ends with status 1 at the first violation, naming the seed of that storm.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from pipeline import receipt, version
from pipeline.store import Store, StoreError, open_store
from pipeline.types import UserError
from tests.crash.history import run_history
from tests.crash.work import check_whole, run, start, wait_until, work
from tests.proxy import Fault, Proxy, Rule, fault_proxy
from tests.s3 import BUCKET, s3_server

WRITERS = 4
OBJECTS = 12
TYPED_EXIT = 3
ROOT = Path(__file__).resolve().parents[2]
KINDS = ("folder", "s3", "history", "ray", "folder", "s3", "history", "ray-s3")


def write(url: str, count: int, seed: int) -> None:
    """Work as one of several writers; what the store does wrong ends it with a status of its own."""
    try:
        work(url, count, seed)
    except (StoreError, UserError) as error:
        print(f"writer {seed}: {error}", file=sys.stderr)
        sys.exit(TYPED_EXIT)


class Oracle:
    """What was seen of a corpus; what is seen later must agree."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.seen: dict[str, str] = {}

    def look(self) -> None:
        """Read every record that counts, and compare with what it was; none may have gone."""
        found = {}
        for prefix in ("plans/", "receipts/", "versions/"):
            for item in self.store.list(prefix):
                found[item.key] = hashlib.sha256(self.store.get(item.key)).hexdigest()
        for key, digest in self.seen.items():
            assert found.get(key) == digest, f"{key} was {digest}, is {found.get(key)}"
        self.seen = found

    def settle(self, count: int, digest: str | None, *, allowed: frozenset[str] = frozenset({"empty_scene"})) -> None:
        """Hold a finished corpus to everything it must be."""
        self.look()
        check_whole(self.store)
        rows = [
            row
            for plan in version.plan_sets(self.store)
            for shard in plan.shards
            for row in receipt.load(self.store, shard.plan_id).rows.to_pylist()
        ]
        assert Counter(row["uid"] for row in rows).most_common(1)[0][1] == 1
        assert len(rows) == count
        assert {row["failure_kind"] for row in rows if row["status"] == "failure"} <= allowed
        newest = version.open_version(self.store)
        assert newest.counts["samples"] + sum(newest.counts["failures"].values()) == count
        assert digest is None or newest.digest == digest
        self.store.sweep_uploads(0, delete=True)
        assert self.store.sweep_uploads(0) == []


def undisturbed_digest(folder: Path, count: int) -> str:
    """Return the digest of the version that nobody disturbed."""
    assert run(work, str(folder), count) == 0
    return version.open_version(open_store(str(folder))).digest


def storm(url: str, seconds: float, seed: int, digest: str, oracle_url: str | None = None) -> dict[str, int]:
    """Kill and replace writers of one corpus for so long, then let them finish; returns what happened.

    Args:
        oracle_url: endpoint by which the oracle looks, past the proxy that the writers use.
    """
    rng, told = random.Random(seed), Counter[str]()
    with endpoint(oracle_url):
        oracle = Oracle(open_store(url))
    writers = [start(write, url, OBJECTS, rng.randrange(10**6)) for _ in range(WRITERS)]
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            time.sleep(rng.uniform(0.0, 0.15))
            place = rng.randrange(WRITERS)
            if writers[place].exitcode is None:
                writers[place].kill()
                told["killed"] += 1
            writers[place].join()
            told[{0: "finished", -9: "died", TYPED_EXIT: "refused"}[writers[place].exitcode or 0]] += 1
            writers[place] = start(write, url, OBJECTS, rng.randrange(10**6))
            if rng.random() < 0.2:
                oracle.look()
        for writer in writers:
            writer.join(300)
            assert writer.exitcode in (0, TYPED_EXIT), f"a writer ended with {writer.exitcode}"
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    with endpoint(oracle_url):
        assert run(write, url, OBJECTS, seed) == 0
    oracle.settle(OBJECTS, digest)
    return dict(told)


@contextlib.contextmanager
def endpoint(url: str | None) -> Iterator[None]:
    """Open S3 stores by this endpoint meanwhile."""
    before = os.environ.get("AWS_ENDPOINT_URL")
    if url is not None:
        os.environ["AWS_ENDPOINT_URL"] = url
    try:
        yield
    finally:
        if url is not None and before is not None:
            os.environ["AWS_ENDPOINT_URL"] = before


def weather(proxy: Proxy, seed: int, chance: float = 0.08) -> None:
    """Make the proxy fail at random: each request has this chance of one kind of harm."""
    rng = random.Random(seed)
    kinds = [Fault(status=503), Fault(status=500), Fault(status=429), Fault(lose=True), Fault(reset_after=100),
             Fault(close_after=300), Fault(delay_s=0.3)]  # fmt: skip

    for kind in kinds:
        proxy.rules.append(Rule(lambda _: rng.random() < chance / len(kinds), kind, None))
    meeting = Fault(status=409)
    proxy.rules.append(Rule(lambda r: r.method == "PUT" and rng.random() < chance / len(kinds), meeting, None))


DRIVER = """
import sys
from jobs.build import build
from pipeline import version
from pipeline.store import StoreError, open_store
from pipeline.types import UserError
from tests.crash.storm import TYPED_EXIT, ray_spec
from tests.jobs import fakes
try:
    build(ray_spec(), sys.argv[1], produce=fakes.produce_slowly, show_progress=False)
    store = open_store(sys.argv[1])
    version.publish(store, version.plan_sets(store))
except (StoreError, UserError) as error:
    print(error, file=sys.stderr)
    sys.exit(TYPED_EXIT)
"""
RAY_OBJECTS = 24
WORKERS = ("ray::make", "ray::assemble")
"""Names of workers at work. Ray's agents, whose death ends their node, are named "ray::" too; and ray.init of Ray 2.60
waits for ever if the idle workers that it starts with are killed before they have registered."""


def ray_spec() -> Any:
    """The spec of the job on Ray: objects are tried often enough that kills do not quarantine them."""
    from pipeline.spec import DatasetSpec, LimitSpec, ProceduralSource, ShardSpec

    return DatasetSpec(
        name="storm",
        source=ProceduralSource(num_objects=RAY_OBJECTS),
        shards=ShardSpec(objects_per_shard=3),
        limits=LimitSpec(max_attempts=10),
    )


def ray_storm(folder: Path, seconds: float, seed: int, url: str | None = None) -> dict[str, int]:
    """Kill Ray's workers and the driver of the real job for so long from the first worker on, then let it finish.

    Args:
        folder: for the driver's words.
        url: of the corpus; default one in the folder.
    """
    rng, told = random.Random(seed), Counter[str]()
    url = url or str(folder / "corpus")
    oracle = Oracle(open_store(url))
    tree: set[int] = set()

    def drive() -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with (folder / "driver.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-c", DRIVER, url], cwd=ROOT, env=environment, stderr=log)

    driver = drive()
    until, since = 0.0, 0  # known once Ray is up; looks since this driver's workers are there
    while (not until or time.monotonic() < until) and driver.poll() is None:
        time.sleep(rng.uniform(0.1, 0.6))
        below = family_of(driver.pid)
        tree |= {one.pid for one in below}
        workers = [one for one in below if name_of(one).startswith(WORKERS)]
        since = since + 1 if workers else 0
        if since > 3 and rng.random() < 0.15:
            driver.kill()
            driver.wait()
            told["drivers"] += 1
            driver, since = drive(), 0
        elif workers:
            until = until or time.monotonic() + seconds
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(workers).kill()
                told["workers"] += 1
        oracle.look()
    tree |= {one.pid for one in family_of(driver.pid)}
    code = driver.wait(300)
    for _ in range(3):  # a driver whose shard lost its assembler three times says so, and is run again
        if code == 0:
            break
        assert code == TYPED_EXIT, f"the driver ended with {code}: {(folder / 'driver.log').read_text()[-2000:]}"
        told["refused"] += 1
        said = (folder / "driver.log").read_text(errors="replace").strip().splitlines()
        print(f"the driver gave up: {said[-1] if said else 'without a word'}", file=sys.stderr)
        code = drive().wait(300)
    assert code == 0
    oracle.settle(RAY_OBJECTS, None, allowed=frozenset({"empty_scene", "quarantined"}))
    wait_until(lambda: not [pid for pid in tree if living(pid) and not agent(pid)], 30)
    return dict(told)


def agent(pid: int) -> bool:
    """Whether it is one of Ray's agents: of a driver that was killed they end by themselves, some minute later."""
    with contextlib.suppress(psutil.Error):
        return name_of(psutil.Process(pid)).startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
    return False


def family_of(pid: int) -> list[psutil.Process]:
    """Return the living descendants of a process."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def name_of(process: psutil.Process) -> str:
    """Return the command of a process, empty if it has gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def living(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def main() -> int:
    """Run storms until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-s", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    until, told, rounds = time.monotonic() + args.time_s, Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="lrm-storm-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        os.environ.update(stack.enter_context(s3_server(folder / "s3")))
        server = os.environ["AWS_ENDPOINT_URL"]
        digest = undisturbed_digest(folder / "undisturbed", OBJECTS)
        seed = args.seed
        while time.monotonic() < until:
            seed += 1
            kind = KINDS[(seed - args.seed - 1) % len(KINDS)]
            begun = time.monotonic()
            happened: dict[str, int]
            try:
                if kind == "folder":
                    happened = storm(str(folder / f"c{seed}"), 5.0, seed, digest)
                elif kind == "s3":
                    with fault_proxy(server) as proxy, endpoint(proxy.url):
                        weather(proxy, seed)
                        happened = storm(f"s3://{BUCKET}/c{seed}", 8.0, seed, digest, server)
                        happened["faults"] = sum(rule.hits for rule in proxy.rules)
                elif kind == "history":
                    run_history(examples=15, steps=40, seed=seed)
                    happened = {"histories": 15}
                else:
                    (folder / f"r{seed}").mkdir()
                    url = f"s3://{BUCKET}/r{seed}" if kind == "ray-s3" else None
                    happened = ray_storm(folder / f"r{seed}", 20.0, seed, url)
            except AssertionError as error:
                print(f"VIOLATION on {kind} of seed {seed}: {error}", file=sys.stderr)
                return 1
            rounds[kind] += 1
            told.update(happened)
            print(f"{kind} {seed}: {happened}, {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps({"violations": 0, "rounds": dict(rounds), "seed": args.seed, **told}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
