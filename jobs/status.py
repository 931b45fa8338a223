"""Where a corpus stands, told from the corpus alone: no server, no log, no state of a running job.

    planned                      the plans                                two columns of each
    done, failed, cost, nodes    the receipts                             `pipeline.summary`: a listing, a summary, and
                                                                          the footers of receipts younger than it
    running, stale               the signs of life of runs                `jobs.runs`, and only to tell who is at work

`running` counts the objects of shards that a living run has open (`made` of them are finished, but count only once
their shard is committed); `stale` those of shards whose run went without a word and that nobody else has open. Both
are work that the same command takes up again.

Speed is that of the last hour in which receipts came in: objects whose tasks ended in it over the time from the first
start to the last end. Cost is what tasks reserved (`workers.num_cpus`, `workers.num_gpus`) times their seconds and the
spec's prices; `--set workers.price_per_cpu_hour=0.03` asks with another price. Not counted: tasks whose process died,
idle nodes, storage.

Of each kind of failure a few objects are named, for `make why`: those of the last receipt that holds the kind, so that
no more receipts are opened than there are kinds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jobs import runs
from jobs.runs import Run
from pipeline import receipt, summary, version
from pipeline.receipt import NodeWork, Tally, Work
from pipeline.shard import DamagedDataError
from pipeline.spec import WorkerSpec, apply_overrides, spec_of_json, validate_config
from pipeline.store import Store, StoreError
from pipeline.summary import Outline
from pipeline.types import printable

RATE_WINDOW_S = 3600.0
MAX_NODES_SHOWN = 20
MAX_NAMED = 3
KINDS = {
    "base": "",
    "delta": "; a delta: older plans still count its objects as they first ended",
    "compact": "; copies of what lives in older shards",
}
"""Kinds of plan sets in the order of being told, and what their numbers are beside those of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """Shards that runs have open, by plan id: objects of a shard, and how many of them are made."""

    running: Mapping[str, tuple[int, int]]
    stale: Mapping[str, tuple[int, int]]


def corpus_status(store: Store, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return a JSON object: for each plan set its shards and objects; nodes, runs, cost, and the versions.

    Args:
        overrides: settings of the plans' specs to reckon with, such as "workers.price_per_cpu_hour=0.03".
    """
    counted = summary.count(store)
    living = runs.look(store)
    held = _held(living)
    overrides = tuple(overrides)
    plans, worked = [], set[str]()
    outlines = list(summary.outlines(store))
    for outline in outlines:
        tallies = [counted.tallies[plan_id] for plan_id in outline.plan_ids if plan_id in counted.tallies]
        plans.append(_plan(store, outline, tallies, held, overrides))
        if outline.kind != "compact":  # its rows tell of the work that was done for the shards it copied from
            worked.update(tally.plan_id for tally in tallies)
    named = _named(store, [counted.tallies[plan_id] for plan_id in sorted(worked)])
    for plan, outline in zip(plans, outlines):
        mine = set(outline.plan_ids)
        plan["failed_lately"] = {kind: uids for kind, (plan_id, uids) in named.items() if plan_id in mine}
    return {
        "corpus": store.url,
        "versions": version.latest_number(store),
        "plans": plans,
        "nodes": {node: _node(work) for node, work in counted.nodes(worked).items()},
        "runs": [_run(run) for run in living],
        "receipts": {"listed": len(counted.tallies), "read": counted.num_read},
    }


def _named(store: Store, tallies: Iterable[Tally]) -> dict[str, tuple[str, list[str]]]:
    """Return the shard, and uids of some of its objects that failed, by kind of failure."""
    last: dict[str, Tally] = {}
    for tally in tallies:
        for kind in tally.failures:
            if kind not in last or tally.work.ended_s > last[kind].work.ended_s:
                last[kind] = tally

    def read(plan_id: str) -> list[tuple[str, str]]:
        try:
            rows = receipt.load(store, plan_id).rows
        except (DamagedDataError, StoreError):  # counts are known by its footer, and names are a help alone
            return []
        return list(zip(rows["failure_kind"].to_pylist(), rows["uid"].to_pylist()))

    plan_ids = sorted({tally.plan_id for tally in last.values()})
    with ThreadPoolExecutor(8) as pool:
        rows = dict(zip(plan_ids, pool.map(read, plan_ids)))
    return {
        kind: (tally.plan_id, [uid for found, uid in rows[tally.plan_id] if found == kind][:MAX_NAMED])
        for kind, tally in last.items()
    }


def _held(living: Sequence[Run]) -> _Held:
    running = {s.plan_id: (s.objects, s.made) for run in living if run.is_alive for s in run.shards}
    stale = {s.plan_id: (s.objects, s.made) for run in living if run.is_stale for s in run.shards}
    return _Held(running=running, stale={name: n for name, n in stale.items() if name not in running})


def _plan(
    store: Store, outline: Outline, tallies: Sequence[Tally], held: _Held, overrides: tuple[str, ...]
) -> dict[str, Any]:
    spec = spec_of_json(outline.spec_json, f"corpus {store.url}: plan {outline.id}")
    if overrides:
        asked = apply_overrides(spec.model_dump(mode="json"), overrides)
        spec = validate_config(type(spec), asked, f"plan {outline.id} with your settings")
    pictures = spec.capture if spec.is_captured else spec.render
    kinds: Counter[str] = Counter()
    for tally in tallies:
        kinds.update(tally.failures)
    samples = sum(tally.samples for tally in tallies)
    done = {tally.plan_id for tally in tallies}
    missing = [i for i, plan_id in enumerate(outline.plan_ids) if plan_id not in done]
    left = outline.num_assets - samples - sum(kinds.values())
    work = [] if outline.kind == "compact" else [tally.work for tally in tallies if tally.work.objects]
    rate = _rate(work)
    return {
        "plan_set": outline.id,
        "kind": outline.kind,
        "name": outline.name,
        "source": spec.source.kind,
        "resolution_px": pictures.resolution_px,
        "num_views": pictures.num_views,
        "planned": outline.num_assets,
        "samples": samples,
        "failures": dict(sorted(kinds.items())),
        "retryable": sum(tally.retryable for tally in tallies),
        "open": left,
        "running": _objects(outline, missing, held.running),
        "stale": _objects(outline, missing, held.stale),
        "shards": {"planned": len(outline.plan_ids), "committed": len(done)},
        "missing_shards": _ranges(missing),
        "bytes": sum(tally.shard_bytes for tally in tallies),
        "objects_per_s": None if rate is None else round(rate, 4),
        "time_left_s": round(left / rate, 1) if rate and left else (0.0 if not left else None),
        "cost": _cost(work, spec.workers, left, samples + sum(kinds.values())),
    }


def _objects(outline: Outline, missing: Sequence[int], held: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Return how many objects of open shards are held, and of which shards."""
    mine = [i for i in missing if outline.plan_ids[i] in held]
    found = [held[outline.plan_ids[i]] for i in mine]
    return {
        "objects": sum(int(outline.sizes[i]) for i in mine),
        "made": sum(made for _, made in found),
        "shards": _ranges(mine),
    }


def _rate(work: Sequence[Work]) -> float | None:
    """Return objects a second in the last hour of work; None where no receipt tells times."""
    last = max((one.ended_s for one in work), default=0.0)
    recent = [one for one in work if one.ended_s > last - RATE_WINDOW_S]
    if not recent:
        return None
    span = last - max(min(one.begun_s for one in recent), last - 2 * RATE_WINDOW_S)
    return sum(one.objects for one in recent) / max(span, 1e-3)


def _cost(work: Sequence[Work], workers: WorkerSpec, left: int, done: int) -> dict[str, Any]:
    """Return hours reserved, and what they and the rest cost where the spec names prices."""
    cpu_h, gpu_h = (sum(getattr(one, name) for one in work) / 3600 for name in ("cpu_s", "gpu_s"))
    told = sum(one.objects for one in work)
    out: dict[str, Any] = {"cpu_hours": round(cpu_h, 4), "gpu_hours": round(gpu_h, 4), "objects_timed": told}
    prices = (workers.price_per_cpu_hour, workers.price_per_gpu_hour)
    if prices == (None, None):
        return out | {"so_far": None, "left": None}
    so_far = cpu_h * (prices[0] or 0.0) + gpu_h * (prices[1] or 0.0)
    if told < done:  # the others' receipts are of a release that noted no times
        so_far *= done / told if told else 0.0
    return out | {"so_far": round(so_far, 4), "left": round(so_far / done * left, 4) if done else None}


def _node(work: NodeWork) -> dict[str, Any]:
    return {
        "objects": work.objects,
        "samples": work.samples,
        "failures": work.objects - work.samples,
        "busy_s": round(work.busy_s, 1),
        "seconds_per_object": round(work.busy_s / work.objects, 3) if work.objects else None,
    }


def _run(run: Run) -> dict[str, Any]:
    state = "stale" if run.is_stale else run.state
    return {
        "run": run.id, "host": run.host, "pid": run.pid, "begun": run.begun, "state": state, "reason": run.reason,
        "silent_s": round(run.age_s, 1), "making": run.making, "samples": run.samples,
        "failures": dict(run.failures), "shards": [shard.index for shard in run.shards],
        "plan_sets": list(run.plan_sets), "nodes": list(run.nodes),
    }  # fmt: skip


def status_text(status: dict[str, Any]) -> str:
    """Return the status as lines for people."""
    lines = [f"corpus {status['corpus']}: {status['versions']} published version(s)"]
    if not status["plans"]:
        lines.append("no plan here: run `make render SPEC=jobs/specs/demo.toml CORPUS=...` to add samples")
    for plan in sorted(status["plans"], key=lambda plan: list(KINDS).index(plan["kind"])):
        lines += _plan_lines(plan)
    lines += [_run_line(run) for run in status["runs"]]
    nodes = sorted(status["nodes"].items(), key=lambda item: -item[1]["objects"])
    if nodes:
        lines.append(f"nodes     {'objects':>9s} {'failed':>8s} {'s/object':>9s}")
    for node, done in nodes[:MAX_NODES_SHOWN]:
        lines.append(f"  {done['objects']:15d} {done['failures']:8d} {done['seconds_per_object']:9.2f}  {node}")
    if len(nodes) > MAX_NODES_SHOWN:
        lines.append(f"  and {len(nodes) - MAX_NODES_SHOWN} more (JSON=1 lists all)")
    return "\n".join(lines)


def _plan_lines(plan: Mapping[str, Any]) -> list[str]:
    shards, failed = plan["shards"], sum(plan["failures"].values())
    lines = [
        f"{plan['plan_set']}: {plan['source']}, {plan['num_views'] or 'all'} views of {plan['resolution_px']} px"
        + KINDS[plan["kind"]],
        f"  shards   {shards['committed']} of {shards['planned']} committed, {plan['bytes'] / 1e6:.1f} MB"
        + (f"; missing SHARDS={_short(plan['missing_shards'])}" if plan["missing_shards"] else ""),
        f"  objects  {plan['planned']} planned, {plan['samples']} samples, {failed} failures, {plan['open']} open",
    ]
    for word in ("running", "stale"):
        if plan[word]["objects"]:
            what = plan[word]
            made = f"{what['made']} of them made" if word == "running" else "their run fell silent: run it again"
            lines.append(f"  {word:8s} {what['objects']} objects in SHARDS={_short(what['shards'])}, {made}")
    if plan["objects_per_s"] is not None:
        left = f", {_duration(plan['time_left_s'])} left at this speed" if plan["time_left_s"] else ""
        lines.append(f"  speed    {_told_rate(plan['objects_per_s'])} objects/s{left}")
    cost = plan["cost"]
    if cost["objects_timed"]:
        hours = f"{cost['cpu_hours']:.3g} CPU hours" + (
            f", {cost['gpu_hours']:.3g} GPU hours" if cost["gpu_hours"] else ""
        )
        spent, rest = cost["so_far"], cost["left"] or 0.0
        price = "" if spent is None else f", cost {_money(spent)} so far, {_money(rest)} to go"
        lines.append(f"  spent    {hours}{price}")
    for kind, count in plan["failures"].items():
        uids = ", ".join(printable(uid) for uid in plan["failed_lately"].get(kind, ()))
        lines.append(f"    {count:6d} {kind}" + (f", such as {uids}" if uids else ""))
    return lines + ["           make why UID=... tells of one"] * any(plan["failed_lately"].values())


def _run_line(run: Mapping[str, Any]) -> str:
    failed = sum(run["failures"].values())
    where = f"run of {run['begun']} on {run['host']} (pid {run['pid']}, {len(run['nodes'])} node(s))"
    heard = f"heard {_duration(run['silent_s'])} ago"
    done = f"{run['samples']} samples and {failed} failures so far, {run['making']} in the making"
    reason = f": {run['reason']}" if run["reason"] else ""
    return f"{where}: {run['state']}{reason}; {done}; {heard}"


def _told_rate(number: float) -> str:
    """Write three digits, and never an exponent of ten for a large number."""
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def _money(amount: float) -> str:
    """Write a price: cents, and three digits of what is less than one."""
    return f"{amount:.2f}" if amount >= 1 or not amount else f"{amount:.3g}"


def _duration(seconds: float) -> str:
    """Write seconds as people say them."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _short(ranges: str, most: int = 200) -> str:
    """Cut a list of ranges for a line."""
    return ranges if len(ranges) <= most else ranges[:most].rsplit(",", 1)[0] + ",... (JSON=1 lists all)"


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as SHARDS= takes them, "0-3,9"."""
    runs_: list[list[int]] = []
    for number in numbers:
        if runs_ and number == runs_[-1][1] + 1:
            runs_[-1][1] = number
        else:
            runs_.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs_)
