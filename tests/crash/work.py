"""What the crash tests do to a corpus, in processes of its own that may be killed at a named point.

    probe, freeze the plan, commit each shard that has no receipt, publish

That is the work of `make render` and `make publish` without Ray and Blender, by the same functions. Points are named by
what is being written and lie around the store's own methods, wrapped here: nothing in the pipeline knows of them.

    tar:mid        one sample of the shard is in its tar
    plan:before    plan, shard, receipt, manifest, version or list (of shards): before it is put,
    plan:mid       with all bytes written but not yet under its name (a folder alone has such a moment),
    plan:after     and when it is there, but nobody was told

A point may name which of several: `receipt:after:1` is the second receipt.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from pipeline import folder, receipt, version
from pipeline import shard as shards
from pipeline.store import Store, open_store
from tests import corpora

THINGS = ("plan", "shard", "receipt", "manifest", "version", "list")
POINTS = ("tar:mid", *(f"{thing}:{when}" for thing in THINGS for when in ("before", "mid", "after")))
_CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.crash.work"])
for _number in range(12):  # made once where processes are forked from: they are about writing, not about making
    corpora.ball(f"ball-{_number}", "f")


def thing_of(key: str) -> str:
    """Return what a key of a corpus holds; other keys (of probes) have no name."""
    if key.endswith(".shards.txt"):
        return "list"
    kind = key.split("/", maxsplit=1)[0].removesuffix("s")
    return kind if kind in THINGS else ""


def install(reach: Callable[[str], None]) -> Callable[[], None]:
    """Call `reach` with the name of each point that this process comes to; returns what takes the wrappers off."""
    undo: list[tuple[Any, str, Any]] = []

    def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, make(getattr(owner, name)))

    def around(real: Any) -> Any:
        @functools.wraps(real)
        def method(self: Store, key: str, *rest: Any) -> Any:
            if not thing_of(key):
                return real(self, key, *rest)
            reach(f"{thing_of(key)}:before")
            outcome = real(self, key, *rest)
            reach(f"{thing_of(key)}:after")
            return outcome

        return method

    def between(real: Any) -> Any:
        def link(source: Any, target: Any) -> None:
            key = "/".join(Path(target).parts[-2:])
            if thing_of(key):
                reach(f"{thing_of(key)}:mid")
            real(source, target)

        return link

    def after_sample(real: Any) -> Any:
        def write(*arguments: Any) -> Any:
            entry = real(*arguments)
            reach("tar:mid")
            return entry

        return write

    for name in ("create", "create_blob"):
        wrap(Store, name, around)
    wrap(folder.os, "link", between)
    wrap(shards, "_pack", after_sample)

    def remove() -> None:
        for owner, name, real in reversed(undo):
            setattr(owner, name, real)

    return remove


def kill_at(point: str) -> None:
    """Die by SIGKILL at a point such as "shard:before" or "receipt:after:1"."""
    name, _, which = point.partition(":")[2].partition(":")
    wanted, number = f"{point.split(':', maxsplit=1)[0]}:{name}", int(which or 0)
    seen: Counter[str] = Counter()

    def reach(here: str) -> None:
        if here == wanted:
            if seen[here] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[here] += 1

    install(reach)


def work(url: str, count: int = 5, seed: int | None = None) -> None:
    """Bring a corpus of so many balls to a published version; a seed shuffles the order of the shards."""
    store = open_store(url)
    store.probe()
    plan = corpora.freeze(store, count)
    shards = list(plan.shards)
    if seed is not None:
        random.Random(seed).shuffle(shards)
    for shard in shards:
        try:
            receipt.load(store, shard.plan_id)
        except FileNotFoundError:
            corpora.commit(store, shard)
    version.publish(store, [plan])


def _child(
    function: Callable[..., None], arguments: tuple[Any, ...], environment: Mapping[str, str], point: str
) -> None:
    os.environ.update(environment)
    version.code_commit = lambda: "unknown"  # type: ignore[assignment]  # asks git twice
    if point:
        kill_at(point)
    function(*arguments)


def start(function: Callable[..., None], *arguments: Any, point: str = "") -> ForkServerProcess:
    """Start a function of this package in a process of its own; the variables of S3 go with it.

    The process is forked from a server that has imported everything and opened nothing, in some 20 ms.
    """
    values = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    process = _CONTEXT.Process(target=_child, args=(function, arguments, values, point))
    process.start()
    return process


def run(function: Callable[..., None], *arguments: Any, point: str = "", timeout_s: float = 120.0) -> int:
    """Run a function in a process of its own; returns its exit code, negative for a signal."""
    process = start(function, *arguments, point=point)
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{function.__name__} ran for more than {timeout_s} s")
    return process.exitcode


def check_whole(store: Store) -> None:
    """Assert that whatever stands in a corpus is whole: no half file, no receipt without its shard."""
    for item in store.list(""):
        name = Path(item.key).stem
        if item.key.startswith(("shards/", "manifests/")):
            assert hashlib.sha256(store.get(item.key)).hexdigest() == name, item.key
        elif item.key.startswith("receipts/"):
            done = receipt.load(store, name)
            assert done.shard_sha256 is None or store.size(f"shards/{done.shard_sha256}.tar") == done.shard_bytes
    for plan in version.plan_sets(store):
        assert plan.num_assets
    for number in range(1, version.latest_number(store) + 1):
        version.open_rows(store, version.open_version(store, number))


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for a condition; raise TimeoutError after so long."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("it never came true")
        time.sleep(0.05)
