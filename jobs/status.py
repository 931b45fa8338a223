"""Where a corpus stands, told from its plans and receipts alone: no server, no log, no state of a running job."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipeline import manifest, version
from pipeline.spec import spec_of_json
from pipeline.store import Store


def corpus_status(store: Store) -> dict[str, Any]:
    """Return a JSON object: for each plan set its shards, objects and failures by kind; and the versions.

    Reads every plan and receipt once.
    """
    plans = []
    for plan in version.plan_sets(store):
        receipts = manifest.load_receipts(store, [shard.plan_id for shard in plan.shards])
        done = {receipt.plan_id for receipt in receipts}
        kinds: Counter[str] = Counter()
        samples, retryable, num_bytes = 0, 0, 0
        for receipt in receipts:
            samples += receipt.rows["status"].to_pylist().count("sample")
            kinds.update(kind for kind in receipt.rows["failure_kind"].to_pylist() if kind)
            retryable += sum(bool(value) for value in receipt.rows["retryable"].to_pylist())
            num_bytes += receipt.shard_bytes
        spec = spec_of_json(plan.spec_json, f"corpus {store.url}: plan {plan.id}")
        pictures = spec.capture if spec.is_captured else spec.render
        plans.append(
            {
                "plan_set": plan.id,
                "source": spec.source.kind,
                "resolution_px": pictures.resolution_px,
                "num_views": pictures.num_views,
                "planned": plan.num_assets,
                "samples": samples,
                "failures": dict(sorted(kinds.items())),
                "retryable": retryable,
                "shards": {"planned": len(plan.shards), "committed": len(receipts)},
                "missing_shards": _ranges([s.index for s in plan.shards if s.plan_id not in done]),
                "bytes": num_bytes,
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
            f"{plan['plan_set']}: {plan['source']}, {plan['num_views'] or 'all'} views of {plan['resolution_px']} px",
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
