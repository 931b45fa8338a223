"""Produce shards on Ray: one task an object, one task a shard, a bounded number of shards open, lowest index first.

This is what comes before the driver's loop (`jobs.driver`): the plan, the shards that are asked for, the nodes. Losing
the driver loses the open shards only; committed shards are found again by their receipts, and running the same command
resumes. At most `workers.open_shards` are open, or as many as it takes to keep every node at work.

A plan is frozen when all that can be checked was checked: the list of shards, the nodes, the border round hostile
files, and for a GPU that Blender sees it. A mistake leaves nothing behind.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from jobs.driver import Driver, Summary, Todo
from jobs.nodes import ray_session, versions
from jobs.produce import Producer, check_device, needs_trial, producer_of
from jobs.watch import Watch
from pipeline import plan as plans
from pipeline import receipt
from pipeline.manifest import READ_THREADS, receipt_sizes
from pipeline.plan import PlanSet
from pipeline.redistribution import licenses_of_source, refuse_public
from pipeline.sources import list_assets
from pipeline.spec import DatasetSpec
from pipeline.store import Store, open_store
from pipeline.types import UserError

logger = logging.getLogger(__name__)


def freeze_plan(spec: DatasetSpec, store: Store) -> PlanSet:
    """Return the frozen plan of a spec for this machine's producer, making it if there is none."""
    name = producer_of(spec)[1]
    return plans.freeze(store, spec, spec.fingerprint(name), lambda: list_assets(spec), name)


def build(
    spec: DatasetSpec,
    corpus: str,
    shards: str = "all",
    *,
    plan_set: str | None = None,
    produce: Producer | None = None,
    show_progress: bool = True,
) -> Summary:
    """Render or ingest the asked shards of a dataset into a corpus, skipping those already committed.

    Args:
        shards: "all", "7", "0-63" or "3,9": indexes of the frozen plan.
        plan_set: name of a frozen plan, such as a delta; default the spec's own, frozen now if there is none.
        produce: what turns an asset into a result, default the spec's; tests pass one without Blender.

    Raises:
        UserError: in one line, for a spec, store or shard list that cannot be used.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after children are ended; committed shards stay.
    """
    store = open_store(corpus)
    store.probe()
    maker, name = producer_of(spec)
    produce = produce or maker
    fingerprint = spec.fingerprint(name)
    if plan_set is not None:
        plan: PlanSet | None = _load_plan(store, plan_set, fingerprint)
    else:
        plan = plans.find(store, spec, fingerprint)
    if plan is not None:
        return run(spec, store, lambda: [(plan, plans.parse_shards(shards, len(plan.shards)))], produce, show_progress)
    drafted = plans.draft(spec, fingerprint, list_assets(spec), producer=name)
    plans.parse_shards(shards, len(drafted.shards))

    def freeze() -> Work:
        frozen = plans.put(store, drafted)[0]
        return [(frozen, plans.parse_shards(shards, len(frozen.shards)))]

    return run(spec, store, freeze, produce, show_progress, is_frozen=False)


def _load_plan(store: Store, name: str, fingerprint: str) -> PlanSet:
    try:
        plan = plans.load(store, name)
    except FileNotFoundError:
        raise UserError(f"corpus {store.url}: there is no plan {name}; `make status` names those that are") from None
    if plan.fingerprint != fingerprint or plan.kind == "compact":
        raise UserError(
            f"corpus {store.url}: plan {name} is not one of these settings and this Blender; give the SPEC= and SET= "
            "that it was made with"
        )
    return plan


Work = list[tuple[PlanSet, list[int]]]
"""Frozen plans, and which of their shards are asked for."""


def run(
    spec: DatasetSpec,
    store: Store,
    freeze: Callable[[], Work],
    produce: Producer,
    show_progress: bool = True,
    *,
    is_frozen: bool = True,
) -> Summary:
    """Make the shards that `freeze` returns, less those already committed.

    Args:
        freeze: returns the work; where it is not frozen yet, it is called once the workers' place and device are known
            to be there.
    """
    begun = time.monotonic()
    refuse_public(store, licenses_of_source(spec), f"spec {spec.name}")
    _check_workers(spec)
    fingerprint = spec.fingerprint(producer_of(spec)[1])
    summary = Summary(corpus=store.url, plan_set="", fingerprint=fingerprint)
    todo = _todo(store, freeze(), summary) if is_frozen else []
    if todo or not is_frozen:
        with ray_session(spec) as is_joined:
            if not is_frozen:
                _check_device(spec, fingerprint, produce)
                todo = _todo(store, freeze(), summary)
            wanted = versions() if is_joined else {}
            with _progress(summary, show_progress) as bar, _watch(spec, store, todo, summary) as watch:
                Driver(spec, store, fingerprint, produce, summary, bar, watch, wanted).run(todo)
    summary.elapsed_s = time.monotonic() - begun
    return summary


def _watch(spec: DatasetSpec, store: Store, todo: Sized, summary: Summary) -> Watch:
    done = summary.samples + sum(summary.failures.values())
    nodes = sorted({str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]})
    plan_sets = [name for name in summary.plan_set.split(", ") if name]
    return Watch(spec, store, todo, planned=summary.planned, done=done, nodes=nodes, plan_sets=plan_sets)


def _check_workers(spec: DatasetSpec) -> None:
    if spec.is_captured and spec.workers.device != "cpu":
        raise UserError(
            f"spec {spec.name}: workers.device is {spec.workers.device!r}, but captures are read on the CPU; set "
            "workers.device = 'cpu' and workers.num_gpus = 0"
        )


def _check_device(spec: DatasetSpec, fingerprint: str, produce: Producer) -> None:
    """Try the border, Blender where a GPU is asked for, which Ray may see and Blender not, and a hook for masks."""
    if not needs_trial(produce):
        return
    workers = spec.workers
    task = _try_device.options(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus, name="look for the device")
    try:
        if said := ray.get(task.remote(spec, fingerprint)):
            logging.getLogger(__name__).warning("on a test picture, %s", said)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except RayError as error:
        logger.warning("the device could not be looked for: %s", str(error).split("\n", 1)[0])


@ray.remote(max_retries=0)  # type: ignore[untyped-decorator]
def _try_device(spec: DatasetSpec, fingerprint: str) -> str:
    return check_device(spec, fingerprint)


def _todo(store: Store, work: Work, summary: Summary) -> Todo:
    """Count what is asked for, and the receipts that exist; return the shards that have none."""
    todo: Todo = []
    summary.plan_set = ", ".join(plan.id for plan, _ in work)
    present = receipt_sizes(store)
    for plan, indexes in work:
        names = plan.plan_ids
        done = [names[i] for i in indexes if names[i] in present]
        summary.shards_asked += len(indexes)
        summary.planned += sum(plan.shard_table(i).num_rows for i in indexes)
        summary.shards_done_before += len(done)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for tally in pool.map(lambda plan_id: receipt.tally(store, plan_id, present[plan_id]), done):
                summary.count(tally)
        todo += [(plan, i) for i in indexes if names[i] not in present]
    return todo


@contextmanager
def _progress(summary: Summary, show: bool) -> Iterator[tqdm[Any]]:
    done = summary.samples + sum(summary.failures.values())
    # In a log file a bar that redraws itself is a line each time.
    pace = {} if sys.stderr.isatty() else {"mininterval": 20.0, "ascii": True}
    options = {"unit": "obj", "desc": "objects", "disable": not show, "smoothing": 0.1} | pace
    with tqdm(total=summary.planned, initial=done, **options) as bar:
        yield bar
