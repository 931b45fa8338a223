"""The driver's loop of a run: what is in flight, which shards are open, what is made again.

The driver holds references only: a sample goes from the worker that made it to the worker that assembles its shard
through Ray's object store. Attempts are counted here and in `jobs.produce`, never by Ray (`max_retries=0`): an object
whose worker dies `limits.max_attempts` times becomes a Failure of kind `quarantined`, so a poison asset cannot loop.

Nodes come and go. The driver looks every NODES_EVERY_S seconds: a new node widens the window of objects in flight; with
a dead one go the results that lay on it, and these objects alone are made again. The loss of a node is not held against
an object as the death of its worker is, up to MAX_NODE_LOSSES; nor is what Ray ends for want of memory on its node.
What takes several times as long as others is late: it is sent once more, the first result counts, and it no longer
takes the place of another object. A node that is slow, or was cut off (Ray may wait minutes for what it sent there,
even once it knows the node to be dead), so holds neither a shard nor the run.

Results wait in Ray's object store until their shard is assembled. Where they fill half of it, only the shard that is
first in line gets more objects, so that the store is bounded by that half and one shard. Assembly reserves no CPU: it
would wait behind every queued object, whose results pile up meanwhile; there are as many at once as nodes.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayError, RayTaskError
from tqdm import tqdm

from jobs.nodes import NodeFacts, agree, count_slots, living, skew
from jobs.produce import Producer
from jobs.watch import Watch, assembled, watched
from pipeline import receipt
from pipeline.plan import PlanSet, ShardPlan
from pipeline.spec import DatasetSpec
from pipeline.store import Store
from pipeline.types import Asset, Failure, FailureKind, Sample, UserError
from render.supervisor import FullDiskError

MAX_SHARD_TRIES = 3
MAX_FULL_DISKS = 3
"""So often an object may be broken off by a full disk on which there was room again once its files were gone."""
MAX_NODE_LOSSES = 5
"""So many nodes may die under an object, or a shard, before the object is quarantined, or the run ends."""
NODES_EVERY_S = 2.0
FORGIVEN_S = 30.0
"""A worker that died so shortly before a node did may have died with it."""
LATE_FACTOR = 4.0
LATE_S = 60.0
LATE_AFTER_LOSS_S = 10.0
"""An object, or an assembly, is late once it took so many times what nine in ten of the last ones took from being sent
to being done, and LATE_S at least; LATE_AFTER_LOSS_S if a node was lost meanwhile."""
MAX_COPIES = 3
STORE_SHARE = 0.5
"""Share of the cluster's object store that results of shards behind the first may fill."""
INLINE_BYTES = 100 * 1024
"""Ray sends smaller results to the driver; larger ones lie on the node that made them, and die with it."""

logger = logging.getLogger(__name__)

Todo = list[tuple[PlanSet, int]]
"""Shards to make. The assets of one are read from its plan when it is opened: as objects they take a KB each."""


@dataclass(slots=True)
class Summary:
    """What a run did; `as_json` is the last line of `make render ... --json`."""

    corpus: str
    plan_set: str
    fingerprint: str
    planned: int = 0
    samples: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    shards_asked: int = 0
    shards_done_before: int = 0
    shards_committed: int = 0
    views_rendered: int = 0
    elapsed_s: float = 0.0

    def count(self, done: receipt.Tally) -> None:
        """Add the counts of a committed shard."""
        self.samples += done.samples
        self.failures.update(done.failures)

    @property
    def accounted(self) -> bool:
        """Whether every planned object ended as a sample or a failure."""
        return self.samples + sum(self.failures.values()) == self.planned

    def as_json(self) -> dict[str, Any]:
        """Return the summary as a JSON object."""
        return {
            "corpus": self.corpus,
            "plan_set": self.plan_set,
            "fingerprint": self.fingerprint,
            "planned": self.planned,
            "samples": self.samples,
            "failures": dict(sorted(self.failures.items())),
            "shards": {
                "asked": self.shards_asked,
                "done_before": self.shards_done_before,
                "committed": self.shards_committed,
            },
            "elapsed_s": round(self.elapsed_s, 3),
            "views_per_s": round(self.views_rendered / self.elapsed_s, 3) if self.elapsed_s > 0 else 0.0,
        }


@dataclass(slots=True, eq=False)
class _OpenShard:
    """A shard whose objects are being made, or whose tar is being assembled."""

    plan: ShardPlan
    waiting: list[Asset]
    results: dict[str, _Result] = field(default_factory=dict)  # by uid
    tries: int = 1
    losses: int = 0
    is_held_up: bool = False  # for want of room on a disk
    assembly: Any = None  # reference of the one that is under way


@dataclass(frozen=True, slots=True)
class _Result:
    """Where the Sample or Failure of an object lies: on `node`, unless it is small."""

    reference: Any
    node: str
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """An object that is being made."""

    shard: _OpenShard
    asset: Asset
    reference: Any
    sent_s: float


@ray.remote(max_retries=0, num_returns=2)  # type: ignore[untyped-decorator]
def _make(
    produce: Producer, spec: DatasetSpec, fingerprint: str, wanted: Mapping[str, str], asset: Asset
) -> tuple[dict[str, Any], Any]:
    """Return (what the driver needs to know, the result itself) of one object."""
    agree(wanted)
    status, result = watched(produce, spec, fingerprint, asset)
    return status | {"node_id": ray.get_runtime_context().get_node_id(), "clock_s": time.time()}, result


@ray.remote(max_retries=0)  # type: ignore[untyped-decorator]
def _assemble(
    spec: DatasetSpec, store: Store, plan: ShardPlan, uids: Sequence[str], *results: Sample | Failure
) -> receipt.Tally:
    """Store and commit one shard, whose results come by reference; returns the counts that count."""
    return assembled(spec, store, plan, dict(zip(uids, results)))


def blames_node(error: BaseException) -> bool:
    """Whether an error tells of the node that a task ran on, and nothing of the task.

    Ray's memory monitor is among them: it ends the newest task of a full node, whoever filled it. An object that is
    itself too large is found out by its supervisor (`limits.memory_bytes`), and typed.
    """
    return isinstance(error, NodeDiedError | OutOfMemoryError)


class Driver:
    """The loop: keep objects in flight, hand finished shards to assembly, count what dies."""

    def __init__(
        self,
        spec: DatasetSpec,
        store: Store,
        fingerprint: str,
        produce: Producer,
        summary: Summary,
        bar: tqdm[Any],
        watch: Watch,
        wanted: Mapping[str, str],
    ) -> None:
        self.spec, self.store, self.summary, self.bar, self.watch = spec, store, summary, bar, watch
        self.is_joined = bool(wanted)
        self.given = tuple(ray.put(value) for value in (produce, spec, fingerprint, dict(wanted)))
        # One name for all: Ray keeps counters by name, 5 KB for each, for as long as the driver lives.
        self.options = {
            "num_cpus": spec.workers.num_cpus, "num_gpus": spec.workers.num_gpus, "memory": spec.task_memory_bytes,
            "name": "make object",
        }  # fmt: skip
        self.make = _make.options(**self.options)
        self.open: dict[str, _OpenShard] = {}  # by plan id, first come first
        self.making: dict[Any, _Task] = {}  # by status reference
        self.assembling: dict[Any, tuple[_OpenShard, float]] = {}  # by reference; when it was sent
        self.deaths: Counter[str] = Counter()
        self.losses: Counter[str] = Counter()
        self.broken_off: Counter[str] = Counter()
        self.late: set[Any] = set()  # references of `making`
        self.kinds: Counter[str] = Counter(summary.failures)
        self.lasted: deque[float] = deque(maxlen=200)  # seconds from sent to done, of the last objects
        self.stored: deque[float] = deque(maxlen=50)  # and of the last assemblies
        self.said_out_of_memory, self.clocks = False, set[str]()  # nodes whose clock is known to be right
        self.lost_s = -math.inf  # when a node was last found to be gone
        self.recent_deaths: list[tuple[float, str]] = []
        self.nodes: set[str] = set()
        self.window, self.store_bytes, self.held_bytes, self.looked = 2, 0.0, 0, -NODES_EVERY_S

    def run(self, todo: Todo) -> None:
        """Make every shard of `todo`, in its order."""
        upcoming = list(reversed(todo))
        while upcoming or self.open:
            self._look_at_nodes()
            while upcoming and len(self.open) < self._most_open():
                frozen, index = upcoming.pop()
                plan = frozen.shards[index]
                self.open[plan.plan_id] = _OpenShard(plan=plan, waiting=list(reversed(plan.assets)))
            queues = {"making": len(self.making), "assembling": len(self.assembling), "to_come": len(upcoming)}
            if self.watch.tick(self.open.values(), **queues):
                self._submit()
            if not self.making and not self.assembling:  # paused
                time.sleep(1.0)
                continue
            done = self._wait()
            for reference in done:
                if reference in self.making:
                    self._made(reference)
                else:
                    self._assembled(reference)
            self.bar.set_postfix_str(self._postfix(), refresh=not done and sys.stderr.isatty())

    def _wait(self) -> list[Any]:
        """Return all that is done, once something is; after a second nothing."""
        references = [*self.making, *self.assembling]
        done, rest = ray.wait(references, num_returns=1, timeout=1.0, fetch_local=False)
        if done and rest:  # a wait costs by what is waited for: take everything at once
            done += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        return list(done)

    def _most_open(self) -> int:
        """Return how many shards may be open: what the spec says, or what the window needs and one that ends."""
        return max(self.spec.workers.open_shards, 1 + -(-self.window // self.spec.shards.objects_per_shard))

    def _look_at_nodes(self) -> None:
        """Follow nodes that came or went, and double what a slow one holds; every NODES_EVERY_S seconds."""
        if time.monotonic() - self.looked < NODES_EVERY_S:
            return
        self.looked = time.monotonic()
        nodes = living()
        shares = [dict(node["Resources"]) for node in nodes]
        slots = count_slots(shares, self.spec.workers, self.spec.task_memory_bytes)
        # One running and one queued a slot: none waits for the driver, and little is lost.
        self.window = 2 * max(1, slots)
        self.store_bytes = STORE_SHARE * sum(share.get("object_store_memory", 0.0) for share in shares)
        now_living = {str(node["NodeID"]) for node in nodes}
        if self.nodes and now_living != self.nodes:
            gone = self.nodes - now_living
            said = f"{len(now_living)} node(s), {slots} object(s) at once"
            logger.info("nodes: %d came, %d went: %s", len(now_living - self.nodes), len(gone), said)
            if gone:
                self.lost_s = time.monotonic()
                self._forgive()
                for shard in self.open.values():
                    self._drop_lost(shard, now_living)
        self.nodes = now_living
        self._find_late()

    def _forgive(self) -> None:
        """Take back deaths of the last seconds: of a node that dies the workers may go first."""
        for when, uid in self.recent_deaths:
            if time.monotonic() - when < FORGIVEN_S and self.deaths[uid]:
                self.deaths[uid] -= 1
                self.losses[uid] += 1
        self.recent_deaths.clear()

    def _drop_lost(self, shard: _OpenShard, now_living: set[str]) -> None:
        """Queue the objects again whose results lay on a node that is gone."""
        lost = {u for u, r in shard.results.items() if r.num_bytes >= INLINE_BYTES // 2 and r.node not in now_living}
        self._forget(shard, lost)

    def _forget(self, shard: _OpenShard, uids: set[str]) -> None:
        for uid in uids:
            self.held_bytes -= shard.results.pop(uid).num_bytes
        self.bar.update(-len(uids))
        shard.waiting += [asset for asset in reversed(shard.plan.assets) if asset.uid in uids]

    def _find_late(self) -> None:
        """Send once more what is late."""
        self.late = {ref for ref, task in self.making.items() if self._is_late(task.sent_s, self.lasted)}
        on_time = {self.making[ref].asset.uid for ref in self.making.keys() - self.late}
        copies = Counter(task.asset.uid for task in self.making.values())
        for task in [self.making[ref] for ref in self.late]:
            uid, shard = task.asset.uid, task.shard
            wanted = self.open.get(shard.plan.plan_id) is shard and uid not in shard.results
            if wanted and uid not in on_time and copies[uid] < MAX_COPIES:
                logger.info("object %s is late (%.0f s): sent once more", uid, time.monotonic() - task.sent_s)
                on_time.add(uid)
                self._send(shard, task.asset, scheduling_strategy="SPREAD")
        for shard, sent_s in self.assembling.values():
            if shard.assembly is not None and self._is_late(sent_s, self.stored):
                logger.info("shard %d: its assembly is late: sent once more", shard.plan.index)
                shard.assembly = None

    def _is_late(self, sent_s: float, lasted: Sequence[float]) -> bool:
        usual = sorted(lasted)[int(0.9 * len(lasted))] if lasted else LATE_S
        least = LATE_AFTER_LOSS_S if sent_s < self.lost_s else LATE_S
        return time.monotonic() - sent_s > max(least, LATE_FACTOR * usual)

    def _submit(self) -> None:
        for place, shard in enumerate(self.open.values()):
            while shard.waiting and len(self.making) - len(self.late) < self.window:
                if place and self.held_bytes > self.store_bytes:
                    break
                self._send(shard, shard.waiting.pop())
            if shard.assembly is None and len(shard.results) == len(shard.plan.assets):
                self._assemble(shard)

    def _send(self, shard: _OpenShard, asset: Asset, **more: Any) -> None:
        task = _make.options(**self.options, **more) if more else self.make
        status, result = task.remote(*self.given, asset)
        self.making[status] = _Task(shard, asset, result, time.monotonic())

    def _assemble(self, shard: _OpenShard) -> None:
        if sum(other.assembly is not None for other in self.open.values()) >= max(1, len(self.nodes)):
            return
        uids = [asset.uid for asset in shard.plan.assets]
        references = [shard.results[uid].reference for uid in uids]
        task = _assemble.options(num_cpus=0, name="assemble shard")
        shard.assembly = task.remote(self.given[1], self.store, shard.plan, uids, *references)
        self.assembling[shard.assembly] = (shard, time.monotonic())

    def _made(self, reference: Any) -> None:
        task = self.making.pop(reference)
        self.late.discard(reference)
        shard, uid = task.shard, task.asset.uid
        try:
            status = ray.get(reference)
        except RayError as error:
            self._died(task, error)
            return
        self._check_clock(task, status)
        if uid in shard.results or self.open.get(shard.plan.plan_id) is not shard:
            return  # the other one of two was first
        if self.watch.full(status):
            self._gave_back(task, status)
            return
        shard.results[uid] = _Result(task.reference, status["node_id"], status["bytes"])
        self.lasted.append(time.monotonic() - task.sent_s)
        self.held_bytes += status["bytes"]
        self._count(status)

    def _gave_back(self, task: _Task, status: Mapping[str, Any]) -> None:
        """Make an object that found no room after the rest of its shard; it may be the one that takes the room."""
        uid = task.asset.uid
        self.broken_off[uid] += status["suspect"]
        times = self.broken_off[uid]
        if times >= MAX_FULL_DISKS:
            found = f"met a full disk {times} times: {status['full']}"
            if not self.spec.workers.min_free_bytes:  # nothing tells then whether others took the room
                raise UserError(f"object {uid} {found}")
            self._give_up(task.shard, Failure(uid=uid, kind=FailureKind.TOO_LARGE, message=found, attempts=times))
        elif not any(other.asset is task.asset for other in self.making.values()):
            task.shard.waiting.insert(0, task.asset)

    def _check_clock(self, task: _Task, status: Mapping[str, Any]) -> None:
        """Raise UserError if the clock of a node is off that has made its first object: it may have come later."""
        node_id, now = status["node_id"], time.time()
        if not self.is_joined or node_id in self.clocks:
            return
        theirs = NodeFacts(host=status["node"], versions={}, clock_s=status["clock_s"])
        line = skew(theirs, now - (time.monotonic() - task.sent_s), now, status["node"])
        if line is not None:
            raise UserError(line)
        self.clocks.add(node_id)

    def _count(self, status: Mapping[str, Any]) -> None:
        self.summary.views_rendered += status["views"]
        if status["kind"] is not None:
            self.kinds[status["kind"]] += 1
        self.bar.update(1)
        self.watch.ended(status)

    def _died(self, task: _Task, error: RayError) -> None:
        """Try an object again whose worker died, or quarantine it; what the user must mend ends the run."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        shard, asset = task.shard, task.asset
        self.watch.died(asset, error)
        with_node = blames_node(error)
        if isinstance(error, OutOfMemoryError):
            self._say_out_of_memory(error)
        counts = self.losses if with_node else self.deaths
        counts[asset.uid] += 1
        if asset.uid in shard.results or any(other.asset is asset for other in self.making.values()):
            return  # sent twice, and the other one is there or on its way
        if not with_node:
            self.recent_deaths.append((time.monotonic(), asset.uid))
        if counts[asset.uid] < (MAX_NODE_LOSSES if with_node else self.spec.limits.max_attempts):
            shard.waiting.append(asset)
            return
        self._quarantine(shard, asset, error, counts[asset.uid])

    def _say_out_of_memory(self, error: RayError) -> None:
        """Say once what to do where Ray ends tasks because their node has no memory left."""
        if not self.said_out_of_memory:
            workers, limits = self.spec.task_memory_bytes / 2**20, self.spec.limits.memory_bytes / 2**20
            tqdm.write(
                f"a node ran out of memory and Ray ended a task on it; its object is made again. A task reserves "
                f"{workers:.0f} MiB (workers.memory_bytes), and its child may hold {limits:.0f} MiB "
                f"(limits.memory_bytes): bring them together. {str(error).strip().splitlines()[0]}",
                file=sys.stderr,
            )
        self.said_out_of_memory = True

    def _quarantine(self, shard: _OpenShard, asset: Asset, error: RayError, times: int) -> None:
        raised = isinstance(error, RayTaskError)
        kind = FailureKind.INTERNAL if raised else FailureKind.QUARANTINED
        if isinstance(error, OutOfMemoryError):
            kind = FailureKind.OUT_OF_MEMORY
        who = "node" if isinstance(error, NodeDiedError) else "worker"
        failure = Failure(
            uid=asset.uid,
            kind=kind,
            message=f"its {who} {'raised' if raised else 'died'} {times} times: {type(error).__name__}",
            log_tail=str(error),
            attempts=times,
        )
        self._give_up(shard, failure)

    def _give_up(self, shard: _OpenShard, failure: Failure) -> None:
        """Take a failure that no worker returned for the result of an object."""
        shard.results[failure.uid] = _Result(ray.put(failure), "", 0)
        self._count({"kind": failure.kind.value, "views": 0})

    def _assembled(self, reference: Any) -> None:
        shard, sent_s = self.assembling.pop(reference)
        is_current = bool(shard.assembly == reference)
        if is_current:
            shard.assembly = None
        if self.open.get(shard.plan.plan_id) is not shard:
            return  # the other one of two was first
        try:
            done = ray.get(reference)
        except RayError as error:
            if is_current:
                self._not_assembled(shard, error)
            return
        self.stored.append(time.monotonic() - sent_s)
        self.summary.shards_committed += 1
        self.summary.count(done)
        self.watch.committed(done)
        self.held_bytes -= sum(result.num_bytes for result in shard.results.values())
        del self.open[shard.plan.plan_id]

    def _not_assembled(self, shard: _OpenShard, error: RayError) -> None:
        """Assemble again; what a node took with it is made again first."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, FullDiskError):  # the next try waits for room too, on this node or another
            if not shard.is_held_up:
                tqdm.write(f"shard {shard.plan.index} waits: {cause}; it goes on when there is room", file=sys.stderr)
            shard.is_held_up = True
            return
        lost = blames_node(cause) or isinstance(cause, ObjectLostError)
        if lost:
            shard.losses += 1
        tries, limit = (shard.losses, MAX_NODE_LOSSES) if lost else (shard.tries, MAX_SHARD_TRIES)
        if tries >= limit:
            raise UserError(
                f"shard {shard.plan.index} could not be stored in {tries} tries: {str(cause).strip()}; "
                "nothing of it was committed; mend the cause and run the same command again"
            ) from None
        said = str(cause).strip().split("\n", 1)[0]
        tqdm.write(f"shard {shard.plan.index}: not stored, trying again: {said}", file=sys.stderr)
        self.watch.retried(shard.plan, cause)
        if not lost:
            shard.tries += 1
        if not lost or isinstance(cause, OutOfMemoryError):
            time.sleep(2.0**tries)
        num_results = len(shard.results)
        self.looked = -NODES_EVERY_S
        self._look_at_nodes()
        if isinstance(cause, ObjectLostError) and len(shard.results) == num_results:
            self._forget(shard, set(shard.results))  # lost otherwise than by a node that we know to be dead

    def _postfix(self) -> str:
        failed = ", ".join(f"{kind} {count}" for kind, count in sorted(self.kinds.items()))
        return f"failed: {failed}" if failed else "failed: 0"
