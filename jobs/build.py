"""Produce shards on Ray: one task an object, one task a shard, a bounded number of shards open, lowest index first.

The driver holds references only: a sample goes from the worker that made it to the worker that assembles its shard
through Ray's object store. Attempts are counted here and in `jobs.produce`, never by Ray (`max_retries=0`): an object
whose worker dies `limits.max_attempts` times becomes a Failure of kind `quarantined`, so a poison asset cannot loop.

Losing the driver loses the open shards only, at most `workers.open_shards` of them; committed shards are found again
by their receipts, and running the same command resumes.

A plan is frozen when all that can be checked was checked: the list of shards, the nodes, and for a GPU that Blender
sees it. A mistake leaves nothing behind.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from jobs.produce import Producer, check_device, ingest_capture, producer_of, render_asset
from pipeline import plan as plans
from pipeline import receipt
from pipeline.manifest import READ_THREADS, receipt_sizes
from pipeline.plan import PlanSet, ShardPlan
from pipeline.redistribution import licenses_of_source, refuse_public
from pipeline.sources import list_assets
from pipeline.spec import DatasetSpec, WorkerSpec
from pipeline.store import Store, open_store
from pipeline.types import Asset, Failure, FailureKind, Sample, UserError
from render.process import ScratchFolder

MAX_SHARD_TRIES = 3
OBJECT_STORE_BYTES = 2 * 2**30


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
    results: dict[str, Any] = field(default_factory=dict)  # uid -> reference to Sample | Failure
    tries: int = 1


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
        with _ray_session(spec):
            if not is_frozen:
                _check_device(spec, fingerprint, produce)
                todo = _todo(store, freeze(), summary)
            with _progress(summary, show_progress) as bar:
                _Driver(spec, store, fingerprint, produce, summary, bar).run(todo)
    summary.elapsed_s = time.monotonic() - begun
    return summary


def _check_workers(spec: DatasetSpec) -> None:
    if spec.is_captured and spec.workers.device != "cpu":
        raise UserError(
            f"spec {spec.name}: workers.device is {spec.workers.device!r}, but captures are read on the CPU; set "
            "workers.device = 'cpu' and workers.num_gpus = 0"
        )


def _check_device(spec: DatasetSpec, fingerprint: str, produce: Producer) -> None:
    """Try the border, and Blender where a GPU is asked for: Ray may believe in one that Blender does not see."""
    if produce not in (render_asset, ingest_capture):
        return
    workers = spec.workers
    task = _try_device.options(num_cpus=workers.num_cpus, num_gpus=workers.num_gpus, name="look for the device")
    try:
        ray.get(task.remote(spec, fingerprint))
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
    except RayError as error:
        logging.getLogger(__name__).warning("the device could not be looked for: %s", str(error).split("\n", 1)[0])


@ray.remote(max_retries=0)  # type: ignore[untyped-decorator]
def _try_device(spec: DatasetSpec, fingerprint: str) -> None:
    check_device(spec, fingerprint)


def _todo(store: Store, work: Work, summary: Summary) -> list[ShardPlan]:
    """Count what is asked for, and the receipts that exist; return the shards that have none."""
    todo: list[ShardPlan] = []
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
        todo += [plan.shards[i] for i in indexes if names[i] not in present]
    return todo


@contextmanager
def _progress(summary: Summary, show: bool) -> Iterator[tqdm[Any]]:
    done = summary.samples + sum(summary.failures.values())
    # In a log file a bar that redraws itself is a line each time.
    pace = {} if sys.stderr.isatty() else {"mininterval": 20.0, "ascii": True}
    options = {"unit": "obj", "desc": "objects", "disable": not show, "smoothing": 0.1} | pace
    with tqdm(total=summary.planned, initial=done, **options) as bar:
        yield bar


@contextmanager
def _ray_session(spec: DatasetSpec) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS, or start one on this machine; SIGTERM acts like Ctrl-C meanwhile.

    Not promised: for the second in which ray.init connects, SIGTERM belongs to Ray's own C++ handler, which aborts the
    driver with a stack trace. Its processes end with it and nothing was committed yet.
    """
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        # Ray's warnings about a head that refuses us would bury the one line that says what to do.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
        _check_reachable(address)
    options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": logging.ERROR}
    logs = None
    if not address:
        # Ray keeps the logs of every session for ever; one's own folder can go with the session.
        logs = ScratchFolder(Path("/tmp"), prefix="lrm-ray-")
        options |= {
            "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "_temp_dir": str(logs.path),
        }  # fmt: skip
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit:  # ray.init puts a SIGTERM handler of its own in place, which exits
        ray.shutdown()
        raise KeyboardInterrupt from None
    except Exception as error:  # noqa: BLE001 - Ray raises a bare Exception where a node does not come up in time
        text = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"Ray at {address or 'this machine'} cannot be reached: {text}; check RAY_ADDRESS, and that "
            "RAY_AUTH_MODE=token is set with the cluster's token where it asks for one"
        ) from None
    # Leaving ends every task of ours: shutdown stops a local cluster, and a joined one kills the workers of a driver
    # that has gone. ray.cancel(force=True) would only race with replies: Ray 2.60 aborts the driver when it loses.
    signal.signal(signal.SIGTERM, handler if callable(handler) else _interrupt)
    try:
        require_slots(_nodes(), spec.workers)
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)
        if logs is not None:
            logs.close()
            ScratchFolder(None, newborn_s=0.5).close()  # killed workers leave their Blender's folder: sweep it


def _nodes() -> list[dict[str, float]]:
    """Return the resources of each living node of the cluster."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def count_slots(nodes: Sequence[Mapping[str, float]], workers: WorkerSpec) -> int:
    """Return how many render tasks run at once on nodes of these Ray resources.

    A task's CPUs are those of one node, and its share is of one GPU: two GPUs hold four tasks of 0.4, not five.
    """
    slots = 0
    for node in nodes:
        fit = int(node.get("CPU", 0.0) / workers.num_cpus + 1e-6)
        if workers.num_gpus > 0:
            fit = min(fit, int(node.get("GPU", 0.0)) * int(1 / workers.num_gpus + 1e-6))
        slots += fit
    return slots


def require_slots(nodes: Sequence[Mapping[str, float]], workers: WorkerSpec) -> None:
    """Raise UserError unless a render task fits on some node: Ray would wait for such a node for ever."""
    if count_slots(nodes, workers):
        return
    on_cpu = "--set workers.device=cpu --set workers.num_gpus=0"
    fitted = [node for node in nodes if node.get("GPU", 0.0) >= 1] if workers.num_gpus > 0 else nodes
    if not fitted:
        raise UserError(
            f"workers.device is {workers.device!r} but Ray sees no GPU on its {len(nodes)} node(s); run where one is, "
            f"or render on the CPU: {on_cpu}"
        )
    cpus = max(node.get("CPU", 0.0) for node in fitted)
    raise UserError(
        f"no node{' with a GPU' if workers.num_gpus > 0 else ''} has more than {cpus:g} CPUs but workers.num_cpus is "
        f"{workers.num_cpus:g}; lower it, such as with --set workers.num_cpus=1"
    )


def _check_reachable(address: str) -> None:
    """Raise UserError unless somebody listens at RAY_ADDRESS: Ray itself would go on asking for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"Ray at {address} cannot be reached ({error}); give RAY_ADDRESS=host:port of a running head, "
            "or unset it to run on this machine"
        ) from None


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@ray.remote(max_retries=0, num_returns=2)  # type: ignore[untyped-decorator]
def _make(produce: Producer, spec: DatasetSpec, fingerprint: str, asset: Asset) -> tuple[dict[str, Any], Any]:
    """Return (what the driver needs to know, the result itself) of one object."""
    result = produce(spec, fingerprint, asset)
    if isinstance(result, Failure):
        return {"kind": result.kind.value, "views": 0}, result
    return {"kind": None, "views": len(result.views)}, result


@ray.remote(max_retries=0)  # type: ignore[untyped-decorator]
def _assemble(store: Store, plan: ShardPlan, uids: Sequence[str], *results: Sample | Failure) -> receipt.Tally:
    """Write, verify, store and commit one shard; its results come by reference. Returns the counts that count."""
    scratch = ScratchFolder(None, prefix="lrm-shard-")  # also removes what a killed worker left: tars are large
    try:
        return receipt.tally_of(receipt.commit_shard(store, plan, dict(zip(uids, results)), scratch.path)[0])
    finally:
        scratch.close()


class _Driver:
    """The loop: keep objects in flight, hand finished shards to assembly, count what dies."""

    def __init__(
        self, spec: DatasetSpec, store: Store, fingerprint: str, produce: Producer, summary: Summary, bar: tqdm[Any]
    ) -> None:
        self.spec, self.store, self.fingerprint, self.summary, self.bar = spec, store, fingerprint, summary, bar
        self.produce = ray.put(produce)
        self.open: dict[str, _OpenShard] = {}  # by plan id, first come first
        self.making: dict[Any, tuple[_OpenShard, Asset, Any]] = {}  # status reference -> shard, asset, result reference
        self.assembling: dict[Any, _OpenShard] = {}
        self.deaths: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter(summary.failures)
        # One running and one queued a slot: fetches overlap, little is lost.
        self.window = 2 * max(1, count_slots(_nodes(), spec.workers))

    def run(self, todo: Sequence[ShardPlan]) -> None:
        """Make every shard of `todo`, in its order."""
        upcoming = list(reversed(todo))
        while upcoming or self.open:
            while upcoming and len(self.open) < self.spec.workers.open_shards:
                plan = upcoming.pop()
                self.open[plan.plan_id] = _OpenShard(plan=plan, waiting=list(reversed(plan.assets)))
            self._submit()
            done, _ = ray.wait([*self.making, *self.assembling], num_returns=1, timeout=1.0)
            for reference in done:
                if reference in self.making:
                    self._made(reference)
                else:
                    self._assembled(reference)
            self.bar.set_postfix_str(self._postfix(), refresh=not done and sys.stderr.isatty())

    def _submit(self) -> None:
        for shard in self.open.values():
            while shard.waiting and len(self.making) < self.window:
                asset = shard.waiting.pop()
                workers = self.spec.workers
                task = _make.options(
                    num_cpus=workers.num_cpus, num_gpus=workers.num_gpus, name=f"make {asset.uid}"[:100]
                )
                status, result = task.remote(self.produce, self.spec, self.fingerprint, asset)
                self.making[status] = (shard, asset, result)
            if (
                not shard.waiting
                and len(shard.results) == len(shard.plan.assets)
                and shard not in self.assembling.values()
            ):
                self._assemble(shard)

    def _assemble(self, shard: _OpenShard) -> None:
        uids = [asset.uid for asset in shard.plan.assets]
        references = [shard.results[uid] for uid in uids]
        task = _assemble.options(num_cpus=0.5, name=f"assemble shard {shard.plan.index}")
        self.assembling[task.remote(self.store, shard.plan, uids, *references)] = shard

    def _made(self, reference: Any) -> None:
        shard, asset, result = self.making.pop(reference)
        try:
            status = ray.get(reference)
        except RayError as error:
            self._died(shard, asset, error)
            return
        shard.results[asset.uid] = result
        self._count(status["kind"], status["views"])

    def _count(self, kind: str | None, views: int) -> None:
        self.summary.views_rendered += views
        if kind is not None:
            self.kinds[kind] += 1
        self.bar.update(1)

    def _died(self, shard: _OpenShard, asset: Asset, error: RayError) -> None:
        """Try an object again whose worker died, or quarantine it; what the user must mend ends the run."""
        if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        self.deaths[asset.uid] += 1
        if self.deaths[asset.uid] < self.spec.limits.max_attempts:
            shard.waiting.append(asset)
            return
        raised = isinstance(error, RayTaskError)
        how = "raised" if raised else "died"
        kind = FailureKind.INTERNAL if raised else FailureKind.QUARANTINED
        failure = Failure(
            uid=asset.uid,
            kind=kind,
            message=f"its worker {how} {self.deaths[asset.uid]} times: {type(error).__name__}",
            log_tail=str(error),
            attempts=self.deaths[asset.uid],
        )
        shard.results[asset.uid] = ray.put(failure)
        self._count(kind.value, 0)

    def _assembled(self, reference: Any) -> None:
        shard = self.assembling.pop(reference)
        try:
            done = ray.get(reference)
        except RayError as error:
            if shard.tries >= MAX_SHARD_TRIES:
                cause = error.cause if isinstance(error, RayTaskError) else error
                raise UserError(
                    f"shard {shard.plan.index} could not be stored in {MAX_SHARD_TRIES} tries: {cause}; "
                    "nothing of it was committed; mend the cause and run the same command again"
                ) from None
            cause = error.cause if isinstance(error, RayTaskError) else error
            tqdm.write(f"shard {shard.plan.index}: not stored, trying again: {cause}", file=sys.stderr)
            time.sleep(2.0**shard.tries)
            self._restart(shard, isinstance(error, RayTaskError))
            return
        self.summary.shards_committed += 1
        self.summary.count(done)
        del self.open[shard.plan.plan_id]

    def _restart(self, shard: _OpenShard, keep_results: bool) -> None:
        """Assemble again; if a node took results with it, make the shard's objects again first."""
        shard.tries += 1
        if not keep_results:
            self.bar.update(-len(shard.results))
            shard.results.clear()
            shard.waiting = list(reversed(shard.plan.assets))

    def _postfix(self) -> str:
        failed = ", ".join(f"{kind} {count}" for kind, count in sorted(self.kinds.items()))
        return f"failed: {failed}" if failed else "failed: 0"
