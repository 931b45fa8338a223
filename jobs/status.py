"""Where a corpus stands, told from its plans and receipts alone: no server, no log, no state of a running job.

One listing and the last 16 KB of every receipt are read, whose footer tells the counts.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline import manifest, receipt, version
from pipeline.spec import spec_of_json
from pipeline.store import Store

_THREADS = 16


def corpus_status(store: Store) -> dict[str, Any]:
    """Return a JSON object: for each plan set its shards, objects and failures by kind; and the versions."""
    present = manifest.receipt_sizes(store)
    plans = []
    for plan in version.plan_sets(store):
        names = plan.plan_ids
        done = [plan_id for plan_id in names if plan_id in present]
        with ThreadPoolExecutor(_THREADS) as pool:
            tallies = list(pool.map(lambda plan_id: receipt.tally(store, plan_id, present[plan_id]), done))
        kinds: Counter[str] = Counter()
        for tally in tallies:
            kinds.update(tally.failures)
        spec = spec_of_json(plan.spec_json, f"corpus {store.url}: plan {plan.id}")
        plans.append(
            {
                "plan_set": plan.id,
                "kind": plan.kind,
                "name": plan.name,
                "source": spec.source.kind,
                "resolution_px": spec.render.resolution_px,
                "num_views": spec.render.num_views,
                "planned": plan.num_assets,
                "samples": sum(tally.samples for tally in tallies),
                "failures": dict(sorted(kinds.items())),
                "retryable": sum(tally.retryable for tally in tallies),
                "shards": {"planned": len(names), "committed": len(done)},
                "missing_shards": _ranges([i for i, plan_id in enumerate(names) if plan_id not in present]),
                "bytes": sum(tally.shard_bytes for tally in tallies),
            }
        )
    return {"corpus": store.url, "plans": plans, "versions": version.latest_number(store)}


def status_text(status: dict[str, Any]) -> str:
    """Return the status as lines for people."""
    lines = [f"corpus {status['corpus']}: {status['versions']} published version(s)"]
    if not status["plans"]:
        lines.append("no plan here: run `make render SPEC=jobs/specs/demo.toml CORPUS=...` to add samples")
    for plan in status["plans"]:
        shards, failed = plan["shards"], sum(plan["failures"].values())
        open_objects = plan["planned"] - plan["samples"] - failed
        lines += [
            f"{plan['plan_set']}: {plan['source']}, {plan['num_views']} views of {plan['resolution_px']} px",
            f"  shards   {shards['committed']} of {shards['planned']} committed, {plan['bytes'] / 1e6:.1f} MB"
            + (f"; missing SHARDS={plan['missing_shards']}" if plan["missing_shards"] else ""),
            f"  objects  {plan['planned']} planned, {plan['samples']} samples, {failed} failures, {open_objects} open",
        ]
        lines += [f"    {count:6d} {kind}" for kind, count in plan["failures"].items()]
    return "\n".join(lines)


def _ranges(numbers: list[int]) -> str:
    """Write sorted numbers as SHARDS= takes them, "0-3,9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
