"""One process on a host that looks at corpora for the test, which is on no host: a line asks, a line answers.

count URL              how many shards are committed
finish URL             publish; tell the digest, the rows, and what is wrong with the corpus
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline import plan as plans
from pipeline import receipt, version
from pipeline.sources import list_assets
from pipeline.spec import DatasetSpec
from pipeline.store import open_store
from tests.cluster import entry
from tests.crash.work import check_whole


def count(url: str) -> int:
    """Return the number of receipts."""
    return sum(1 for _ in open_store(url).list("receipts/"))


def finish(url: str) -> dict[str, Any]:
    """Publish what is committed, and hold the corpus to what it must be."""
    store = open_store(url)
    check_whole(store)
    chosen = version.plan_sets(store)
    rows = [
        row for plan in chosen for shard in plan.shards for row in receipt.load(store, shard.plan_id).rows.to_pylist()
    ]
    published, _ = version.publish(store, chosen)
    names = ("uid", "status", "failure_kind", "attempts", "provenance")
    return {
        "digest": published.digest,
        "manifest": published.manifest_sha256,
        "planned": sum(plan.num_assets for plan in chosen),
        "rows": [{name: row[name] for name in names} for row in rows],
    }


def undisturbed(folder: str, spec: DatasetSpec) -> str:
    """Return the digest of the version that nobody disturbed: made in this process, one object after another."""
    os.environ["MADE_S"] = "0"
    store = open_store(folder)
    name = spec.fingerprint(entry.PRODUCER)
    plan = plans.freeze(store, spec, name, lambda: list_assets(spec), entry.PRODUCER)
    for shard in plan.shards:
        results = {asset.uid: entry.produce(spec, name, asset) for asset in shard.assets}
        with tempfile.TemporaryDirectory() as scratch:
            receipt.commit_shard(store, shard, results, Path(scratch))
    return version.publish(store, [plan])[0].digest


def main() -> None:
    """Answer until the input ends."""
    for line in sys.stdin:
        verb, url = line.split()
        try:
            answer: Any = {"count": count, "finish": finish}[verb](url)
        except Exception as error:  # noqa: BLE001 - the test is told
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
