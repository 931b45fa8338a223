"""What watches a run: one object in a worker's hands, and the whole of it in the driver's.

`watched` wraps every producer. It waits for room on the node's disks, gives the object its trace, notes in the result
where, how long and with what it was made, and tells the driver a few numbers beside the reference to the result.

`Watch` is the driver's side. It feeds what it hears to the metrics (`jobs.metrics`), to the sign of life that `make
status` reads (`jobs.runs`), to the structured log (`jobs.logs`), and to the two rules that stop or pause a run
(`jobs.guard`). The driver's loop calls it at most twice an object, at some microseconds each.
"""

from __future__ import annotations

import datetime
import logging
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self

from tqdm import tqdm

from jobs import guard, logs, runs
from jobs.guard import DiskGuard, FailureGuard, RunStoppedError
from jobs.metrics import RunMetrics
from jobs.produce import close_worker, on_this_node
from pipeline import receipt, summary
from pipeline.plan import ShardPlan
from pipeline.receipt import Tally
from pipeline.spec import DatasetSpec
from pipeline.store import Store, StoreError
from pipeline.types import Asset, Failure, Sample
from render.confine import full_disk
from render.process import ScratchFolder
from render.supervisor import FullDiskError, Supervisor

ROOM_WAIT_S = 20.0
"""How long a task waits for room on its node before it gives the object back to the driver, which says so."""
FORGET_S = 300.0
"""After so long without a word a node no longer counts as one that waits."""
TICK_S = 0.5

_log = logging.getLogger(__name__)
_disks: dict[str, DiskGuard] = {}


class OpenShard(Protocol):
    """What is looked at of a shard that the driver has open."""

    plan: ShardPlan
    waiting: list[Asset]
    results: dict[str, Any]


def watched(
    produce: Callable[[DatasetSpec, str, Asset], Sample | Failure], spec: DatasetSpec, fingerprint: str, asset: Asset
) -> tuple[dict[str, Any], Sample | Failure | None]:
    """Make one object in a worker.

    Returns:
        What the driver needs to know, and the result; None where there was no room on the node's disks (`full`), be it
        that the object took the room itself (`suspect`) or not.
    """
    logs.setup()
    node, trace = socket.gethostname(), logs.trace_of(fingerprint, asset.uid)
    disk = _wait_for_room(spec)
    if found := disk.full():
        return {"full": found, "node": node, "suspect": False}, None
    with logs.tracing(trace):
        logs.event("object_started", uid=asset.uid, source=asset.source, format=asset.format)
        begun, children = time.monotonic(), Supervisor.num_started
        try:
            result = produce(spec, fingerprint, asset)
        except FullDiskError as error:
            logs.event("disk", full=str(error))
            close_worker()  # and with it what the object wrote
            time.sleep(guard.LOOK_S)
            # Where there is no room even so, others took it, and the guard makes the next object wait.
            return {"full": str(error), "node": node, "suspect": not disk.full()}, None
        elapsed_s = round(time.monotonic() - begun, 3)
        where = {
            "worker": node, "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "elapsed_s": elapsed_s, "cpus": spec.workers.num_cpus, "gpus": spec.workers.num_gpus, "trace": trace,
        }  # fmt: skip
        result = replace(result, provenance=where | dict(result.provenance))
        told = _told(result) | {"node": node, "children": Supervisor.num_started - children}
        told["seconds"] = {"task": elapsed_s} | _stages(result)
        _say_ended(asset, result, told)
        return told, result


def assembled(spec: DatasetSpec, store: Store, plan: ShardPlan, results: Mapping[str, Sample | Failure]) -> Tally:
    """Write, verify, store and commit one shard in a worker; returns the counts that count.

    Raises:
        FullDiskError: if others have taken the room on the node's disks that its tar needs.
    """
    disk = _wait_for_room(spec)
    if found := disk.full():
        raise FullDiskError(on_this_node(found))
    try:
        return _committed(store, plan, results)
    except StoreError as error:
        if (full := full_disk(error.__cause__)) is None:
            raise
        time.sleep(guard.LOOK_S)
        if disk.full():
            raise FullDiskError(on_this_node(full)) from None
        raise


def _committed(store: Store, plan: ShardPlan, results: Mapping[str, Sample | Failure]) -> Tally:
    scratch = ScratchFolder(None, prefix="lrm-shard-")  # also removes what a killed worker left: tars are large
    try:
        return receipt.tally_of(receipt.commit_shard(store, plan, results, scratch.path)[0])
    finally:
        scratch.close()


def _wait_for_room(spec: DatasetSpec) -> DiskGuard:
    """Return the guard of this process's disks once there is room, or when it has waited for long enough."""
    disk = _disks.setdefault(spec.model_dump_json(), DiskGuard(guard.worker_folders(spec), spec.workers.min_free_bytes))
    if disk.full():
        close_worker()  # what its last object left behind may be what takes the room
    until = time.monotonic() + ROOM_WAIT_S
    disk.wait(lambda found: logs.event("disk", full=found), lambda: time.monotonic() > until)
    return disk


def _told(result: Sample | Failure) -> dict[str, Any]:
    if isinstance(result, Failure):
        return {"kind": result.kind.value, "views": 0, "bytes": 0}
    num_bytes = sum(len(plane.data) for view in result.views for plane in view.planes.values())
    return {"kind": None, "views": len(result.views), "bytes": num_bytes}


def _stages(result: Sample | Failure) -> dict[str, float]:
    told = result.provenance.get("seconds")
    stages = told.items() if isinstance(told, Mapping) else ()
    return {str(name)[:20]: float(s) for name, s in stages if isinstance(s, int | float) and name != "total"}


def _say_ended(asset: Asset, result: Sample | Failure, told: Mapping[str, Any]) -> None:
    if isinstance(result, Failure):
        logs.event(
            "object_failed", uid=asset.uid, kind=result.kind.value, attempts=result.attempts, message=result.message,
            seconds=told["seconds"], children=told["children"],
        )  # fmt: skip
    else:
        logs.event(
            "object_done", uid=asset.uid, views=told["views"], bytes=told["bytes"], seconds=told["seconds"],
            children=told["children"],
        )  # fmt: skip


class Watch:
    """Watches one run of the driver; a context manager around it.

    Args:
        todo: shards that are to be made.
        planned, done: objects that were asked for, and how many of them are committed already.
        nodes: of the cluster, at the start.
        plan_sets: what the shards belong to.
    """

    def __init__(
        self,
        spec: DatasetSpec,
        store: Store,
        todo: Sized,
        *,
        planned: int,
        done: int,
        nodes: Sequence[str],
        plan_sets: Sequence[str],
    ) -> None:
        self._store = store
        self._metrics = RunMetrics()
        self._failures = FailureGuard(spec.workers.max_failure_share, spec.workers.failure_window)
        self._disk = DiskGuard(guard.driver_folders(store), spec.workers.min_free_bytes)
        self._heart = runs.Heart(store, {"plan_sets": list(plan_sets), "nodes": list(nodes)})
        self._to_come, self._planned, self._done = len(todo), planned, done
        self._samples, self._kinds = 0, Counter[str]()
        self._waiting: dict[str, tuple[str, float]] = {}  # node -> which disk of it is full, and when it said so
        self._full, self._ticked_s = "", -1e9
        self._last_told: tuple[str, ...] = ()
        self._counting: threading.Thread | None = None
        self._commits, self._count_at = 0, summary.FEW

    def __enter__(self) -> Self:
        logs.event(
            "run_started", run=self._heart.id, corpus=self._store.url, shards=self._to_come, planned=self._planned
        )
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._counting is not None and error is None:
            self._counting.join(timeout=runs.END_S)
        states = ((KeyboardInterrupt, "interrupted"), (RunStoppedError, "stopped"), (BaseException, "failed"))
        state = "ended" if error is None else next(word for one, word in states if isinstance(error, one))
        reason = "" if error is None else logs.redact(" ".join(str(error).split()))
        logs.event("run_ended", run=self._heart.id, state=state, reason=reason)
        self._heart.end(state, reason)

    def tick(self, shards: Iterable[OpenShard], *, making: int, assembling: int, to_come: int) -> bool:
        """Look at the driver's queues; return whether it may start new work: not while a disk of its own is full."""
        now = time.monotonic()
        if now - self._ticked_s < TICK_S:
            return not self._full
        self._ticked_s = now
        self._look_at_disk()
        for node in [node for node, (_, said_s) in self._waiting.items() if now - said_s > FORGET_S]:
            del self._waiting[node]  # gone, or given nothing to do: one that waits says so each time it is asked
        opened = list(shards)
        queues = {
            "waiting": sum(len(shard.waiting) for shard in opened), "making": making, "assembling": assembling,
            "open_shards": len(opened), "shards_to_come": to_come,
        }  # fmt: skip
        for name, length in queues.items():
            self._metrics.set("lrm_queue_length", length, queue=name)
        gauges = {
            "lrm_objects_planned": self._planned, "lrm_objects_done": self._done, "lrm_paused": bool(self._full),
            "lrm_failure_share": self._failures.share, "lrm_nodes_waiting": len(self._waiting),
        }  # fmt: skip
        for name, value in gauges.items():
            self._metrics.set(name, float(value))
        state = "paused" if self._full else "running"
        reason = self._full or "; ".join(f"{node}: {found}" for node, (found, _) in self._waiting.items())
        told = {
            "state": state, "reason": reason, "making": making, "samples": self._samples,
            "failures": dict(self._kinds),
            "shards": [(s.plan.plan_id, s.plan.index, len(s.plan.assets), len(s.results)) for s in opened],
        }  # fmt: skip
        changed = (state, reason, *(shard.plan.plan_id for shard in opened))
        self._heart.tell(told, at_once=changed != self._last_told)
        self._last_told = changed
        return not self._full

    def _look_at_disk(self) -> None:
        found = self._disk.full()
        if bool(found) != bool(self._full):
            _say(f"paused: {found}; goes on when there is room" if found else "goes on: there is room again")
            logs.event("paused" if found else "resumed", reason=found)
        self._full = found

    def full(self, told: Mapping[str, Any]) -> bool:
        """Whether a task gave its object back for want of room on its node; said once a node."""
        node = str(told.get("node", ""))
        if "full" not in told:
            if self._waiting.pop(node, None):
                _say(f"{node} goes on: there is room again")
            return False
        if node not in self._waiting:
            _say(f"{node} waits: {told['full']}; it goes on when there is room")
        self._waiting[node] = (str(told["full"]), time.monotonic())
        return True

    def ended(self, told: Mapping[str, Any]) -> None:
        """Take note of an object that ended.

        Raises:
            RunStoppedError: if too many of the last ones failed.
        """
        self._metrics.ended(told)
        if told["kind"] is None:
            self._samples += 1
        else:
            self._kinds[told["kind"]] += 1
        self._failures.saw(told["kind"])

    def died(self, asset: Asset, error: Exception) -> None:
        """Take note of a task whose process died."""
        self._metrics.add("lrm_worker_deaths")
        logs.event("worker_died", uid=asset.uid, error=type(error).__name__)

    def retried(self, plan: ShardPlan, cause: object) -> None:
        """Take note of a shard that was not stored."""
        self._metrics.add("lrm_shard_retries")
        logs.event("shard_retried", shard=plan.index, plan_id=plan.plan_id, cause=str(cause))

    def committed(self, done: Tally) -> None:
        """Take note of a shard that was committed."""
        self._done += done.planned
        self._metrics.add("lrm_shards_committed")
        self._metrics.add("lrm_shard_bytes", done.shard_bytes)
        logs.event("shard_committed", plan_id=done.plan_id, samples=done.samples, failures=dict(done.failures))
        self._commits += 1
        if self._commits >= self._count_at and (self._counting is None or not self._counting.is_alive()):
            self._commits = 0
            self._counting = threading.Thread(target=self._count, name="count-receipts", daemon=True)
            self._counting.start()

    def _count(self) -> None:
        """Store a summary of the receipts, so that the next look at the corpus is quick."""
        try:
            self._count_at = max(summary.FEW, len(summary.count(self._store).tallies) // summary.SHARE)
        except (StoreError, ValueError) as error:
            _log.info("receipts were not summed up: %s", error)


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
