"""The nodes that a job runs on: joining them, what fits on them, and whether they agree with the driver.

A run starts Ray on this machine, or joins the cluster of RAY_ADDRESS. A joined cluster may hold nodes that were set up
at another time: another Blender gives other pixels under the same fingerprint, another encoder other bytes, another
commit of this project anything. So each node is asked what it has, by a task that takes no CPU, before anything is
frozen; a node that joins later is asked by each of its workers before the first object. What differs ends the run in a
line that names the node. Asking costs the start of a worker a node, all at once, and 20 ms in each worker.

The road not taken: comparing what `ray start` was given. It says nothing of what a worker imports.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.spec import DatasetSpec, WorkerSpec
from pipeline.types import UserError
from render.process import ScratchFolder

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 2 * 2**30
MAX_CLOCK_SKEW_S = 30.0
"""A node's clock may be off by so much: S3 refuses signatures that are 15 minutes old, dates of rows are for people."""
ANSWER_TIMEOUT_S = 120.0
"""Longest time that a node may take to start its first worker and answer."""
_PACKAGES = ("bpy", "numpy", "opencv-python-headless", "pillow", "pyarrow", "pycolmap", "obstore", "pydantic")
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node says of itself.

    Attributes:
        versions: what must be equal everywhere, in the order in which differences are told.
        clock_s: its wall clock, seconds since 1970, when it was asked.
    """

    host: str
    versions: Mapping[str, str]
    clock_s: float


@functools.cache
def versions() -> dict[str, str]:
    """Return what decides bytes here: Python, packages, the WebP encoder, and the project's own code."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found | {"WebP encoder": _webp_encoder(), "project code": _code_digest()}


def _webp_encoder() -> str:
    import cv2

    match = re.search(r"WEBP:\s*(.+)", cv2.getBuildInformation())
    return " ".join(match[1].split()) if match else "none"


def _code_digest() -> str:
    """Return a digest of the code that a node would run, wherever it was installed."""
    digest = hashlib.sha256()
    for package in ("jobs", "pipeline", "render"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def facts() -> NodeFacts:
    """Return what this process has."""
    return NodeFacts(host=socket.gethostname(), versions=versions(), clock_s=time.time())


def difference(ours: Mapping[str, str], theirs: NodeFacts, where: str) -> str | None:
    """Return the one line about a node that has other versions than the driver; None where they agree."""
    other = [
        f"{name} {theirs.versions.get(name, 'none')} instead of {wanted}"
        for name, wanted in ours.items()
        if theirs.versions.get(name, "none") != wanted
    ]
    if not other:
        return None
    return (
        f"node {where} does not agree with the driver: it has {', '.join(other)}; install this project at the same "
        "commit, with the same constraints file, on every node"
    )


def skew(theirs: NodeFacts, asked_s: float, answered_s: float, where: str) -> str | None:
    """Return the one line about a node whose clock is off.

    Args:
        asked_s: the driver's clock before the node was asked, and `answered_s` when its answer had come: the node's
            clock should lie between; how long the answer took is not held against it.
    """
    off = min(theirs.clock_s - asked_s, 0.0) + max(theirs.clock_s - answered_s, 0.0)
    if abs(off) <= MAX_CLOCK_SKEW_S:
        return None
    way = "behind" if off < 0 else "ahead of"
    return (
        f"node {where}: its clock is {abs(off):.0f} s {way} the driver's, {MAX_CLOCK_SKEW_S:.0f} s are allowed; "
        "set it, such as with chrony or systemd-timesyncd"
    )


@functools.cache
def _agree(wanted: tuple[tuple[str, str], ...]) -> None:
    line = difference(dict(wanted), facts(), socket.gethostname())
    if line is not None:
        raise UserError(line)


def agree(wanted: Mapping[str, str]) -> None:
    """Raise UserError unless this process has the driver's versions; asked once a process."""
    _agree(tuple(wanted.items()))


@ray.remote(max_retries=0, num_cpus=0)  # type: ignore[untyped-decorator]
def _facts() -> NodeFacts:
    return facts()


def check_nodes() -> None:
    """Ask every living node what it has.

    A node that dies or stays silent meanwhile is warned of, no more: its objects will be made elsewhere.

    Raises:
        UserError: naming the first node, by address, that differs from this process or whose clock is off.
    """
    ours, asked_s = versions(), time.time()
    asked = {}
    for node in sorted(living(), key=lambda node: str(node["NodeManagerAddress"])):
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        where = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        asked[where] = _facts.options(scheduling_strategy=place, name="compare versions").remote()
    until = time.monotonic() + ANSWER_TIMEOUT_S
    for where, reference in asked.items():
        try:
            theirs = ray.get(reference, timeout=max(0.1, until - time.monotonic()))
        except (RayError, GetTimeoutError) as error:
            logger.warning("node %s did not say what it has: %s", where, str(error).strip().split("\n", 1)[0])
            continue
        line = difference(ours, theirs, where) or skew(theirs, asked_s, time.time(), where)
        if line is not None:
            raise UserError(line)


def living() -> list[dict[str, Any]]:
    """Return what Ray tells of each living node."""
    return [node for node in ray.nodes() if node["Alive"]]


def resources() -> list[dict[str, float]]:
    """Return the resources of each living node of the cluster."""
    return [dict(node["Resources"]) for node in living()]


def count_slots(nodes: Sequence[Mapping[str, float]], workers: WorkerSpec, memory_bytes: int = 0) -> int:
    """Return how many render tasks run at once on nodes of these Ray resources.

    A task's CPUs and memory are those of one node, and its share is of one GPU: two GPUs hold four tasks of 0.4, not
    five.

    Args:
        memory_bytes: what a task reserves; 0 where memory does not count.
    """
    slots = 0
    for node in nodes:
        fit = int(node.get("CPU", 0.0) / workers.num_cpus + 1e-6)
        if workers.num_gpus > 0:
            fit = min(fit, int(node.get("GPU", 0.0)) * int(1 / workers.num_gpus + 1e-6))
        if memory_bytes:
            fit = min(fit, int(node.get("memory", 0.0) / memory_bytes))
        slots += fit
    return slots


def require_slots(nodes: Sequence[Mapping[str, float]], workers: WorkerSpec, memory_bytes: int = 0) -> None:
    """Raise UserError unless a render task fits on some node: Ray would wait for such a node for ever."""
    if count_slots(nodes, workers, memory_bytes):
        return
    on_cpu = "--set workers.device=cpu --set workers.num_gpus=0"
    fitted = [node for node in nodes if node.get("GPU", 0.0) >= 1] if workers.num_gpus > 0 else list(nodes)
    if not fitted:
        raise UserError(
            f"workers.device is {workers.device!r} but Ray sees no GPU on its {len(nodes)} node(s); run where one is, "
            f"or render on the CPU: {on_cpu}"
        )
    kind = " with a GPU" if workers.num_gpus > 0 else ""
    if memory_bytes and count_slots(fitted, workers):
        most = max(node.get("memory", 0.0) for node in fitted)
        raise UserError(
            f"no node{kind} has {memory_bytes / 2**20:.0f} MB for a task and the CPUs for it; the most that Ray gives "
            f"out on a node is {most / 2**20:.0f} MB: lower workers.memory_bytes (and limits.memory_bytes with it)"
        )
    cpus = max(node.get("CPU", 0.0) for node in fitted)
    raise UserError(
        f"no node{kind} has more than {cpus:g} CPUs but workers.num_cpus is {workers.num_cpus:g}; lower it, such as "
        "with --set workers.num_cpus=1; where nodes come by demand, set workers.node_wait_s"
    )


def _wait_for_slots(spec: DatasetSpec) -> None:
    """Wait for a node that holds a task, `workers.node_wait_s` long; ask the cluster's autoscaler, if any, for one."""
    workers, memory_bytes = spec.workers, spec.task_memory_bytes
    until = time.monotonic() + workers.node_wait_s
    asked = False
    while time.monotonic() < until and not count_slots(resources(), workers, memory_bytes):
        if not asked:
            from ray.autoscaler.sdk import request_resources

            bundle = {"CPU": workers.num_cpus, "memory": memory_bytes}
            request_resources(bundles=[bundle | ({"GPU": workers.num_gpus} if workers.num_gpus else {})])
            logger.info("no node holds a task yet: waiting up to %.0f s for one", workers.node_wait_s)
            asked = True
        time.sleep(min(1.0, workers.node_wait_s))
    if asked:
        request_resources(bundles=[])  # from here on waiting tasks are the demand
    require_slots(resources(), workers, memory_bytes)


def check_reachable(address: str) -> None:
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


def own_share(given: Mapping[str, str]) -> dict[str, int]:
    """Return what of this machine a Ray of our own may give out: Ray itself would take all of it.

    Args:
        given: the environment. Slurm says what it allotted to a job on a node; several jobs may share one.
    """
    cpus = len(os.sched_getaffinity(0))
    share = {}
    allotted = given.get("SLURM_CPUS_ON_NODE", "")
    if allotted.isdigit() and int(allotted) > 0:
        cpus = min(cpus, int(allotted))
    if cpus < (os.cpu_count() or cpus):
        share["num_cpus"] = cpus
    memory_mb = given.get("SLURM_MEM_PER_NODE", "")
    if memory_mb.isdigit() and int(memory_mb) > 0:
        store = min(OBJECT_STORE_BYTES, int(memory_mb) * 2**20 // 4)
        share |= {"object_store_memory": store, "_memory": int(memory_mb) * 2**20 - store}
    return share


@contextmanager
def ray_session(spec: DatasetSpec) -> Iterator[bool]:
    """Join the cluster of RAY_ADDRESS, or start one on this machine; SIGTERM acts like Ctrl-C meanwhile.

    Yields whether a cluster was joined. Not promised: for the second in which ray.init connects, SIGTERM belongs to
    Ray's own C++ handler, which aborts the driver with a stack trace. Its processes end with it and nothing was
    committed yet.
    """
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        # Ray's warnings about a head that refuses us would bury the one line that says what to do.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
        check_reachable(address)
    options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": logging.ERROR}
    logs = None
    if not address:
        # Ray keeps the logs of every session for ever; one's own folder can go with the session.
        logs = ScratchFolder(Path("/tmp"), prefix="lrm-ray-")
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "_temp_dir": str(logs.path)}
        options |= own_share(os.environ)
        if port := os.environ.get("LRM_METRICS_PORT"):
            options["_metrics_export_port"] = int(port)
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")  # told to a dashboard, and here is none
    handler = signal.getsignal(signal.SIGTERM)
    # Leaving ends every task of ours: shutdown stops a local cluster, and a joined one kills the workers of a driver
    # that has gone. ray.cancel(force=True) would only race with replies: Ray 2.60 aborts the driver when it loses.
    try:
        _connect(options, address)
        signal.signal(signal.SIGTERM, handler if callable(handler) else _interrupt)
        _wait_for_slots(spec)
        if address:
            check_nodes()
        yield bool(address)
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)
        if logs is not None:
            logs.close()
            ScratchFolder(None, newborn_s=0.5).close()  # killed workers leave their Blender's folder: sweep it


def _connect(options: Mapping[str, Any], address: str | None) -> None:
    try:
        ray.init(**options)
    except SystemExit:  # ray.init puts a SIGTERM handler of its own in place, which exits
        raise KeyboardInterrupt from None
    except Exception as error:  # noqa: BLE001 - Ray raises a bare Exception where a node does not come up in time
        text = str(error).strip().split("\n", 1)[0]
        if not address:
            raise UserError(f"Ray cannot start on this machine: {text}") from None
        raise UserError(
            f"Ray at {address} cannot be reached: {text}; check RAY_ADDRESS, and that RAY_AUTH_MODE=token is set with "
            "the cluster's token where it asks for one"
        ) from None


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
