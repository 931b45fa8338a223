"""Collection: what nothing names and nobody may still be writing.

Roots, and so kept, are

    versions     every one, with its list, its manifest and the shards of its live samples
    receipts     those of every plan that is there, and the shard of each, unless every sample of that shard was copied
                 by a compaction or withdrawn by hand
    the young    whatever was written within the grace period, as somebody may be about to name it

The rest, shards, manifests and receipts of plans that are gone, is listed, and deleted only when asked. Plans and
versions are never deleted, nor is a key that this code does not know. Unfinished uploads and stray temporary files are
left to the store (`Store.sweep_uploads`).

The order is what makes it safe: objects are listed first and roots are read afterwards, so that what is named meanwhile
is seen, and receipts and versions are looked at once more before the first deletion. Not promised: a job that takes up
a shard older than the grace (the same samples made again) and commits it in the second between that look and the
deletion. Its version would be refused, and the shard made again once its receipt is gone; so choose a grace that
exceeds the longest job.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import obstore
from obstore.exceptions import BaseError, NotFoundError

from pipeline import manifest, receipt, version
from pipeline.backends import short_error
from pipeline.manifest import receipt_sizes
from pipeline.plan import PlanSet
from pipeline.shard import shard_key
from pipeline.store import ObjectInfo, Store, StoreError

DEFAULT_GRACE_S = 7 * 24 * 3600.0
_KNOWN = re.compile(r"(shards/[0-9a-f]{64}\.tar|manifests/[0-9a-f]{64}\.parquet|receipts/[0-9a-f]{64}\.parquet)")
_THREADS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What a collection found.

    Attributes:
        items: objects that nothing names, older than the grace.
        young: how many nothing names, but are younger.
        kept: how many are named.
        uploads: unfinished uploads and temporary files that the store swept, or would.
        deleted: whether the items are gone.
    """

    items: tuple[ObjectInfo, ...]
    young: int
    kept: int
    uploads: tuple[str, ...]
    deleted: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the items."""
        return sum(item.num_bytes for item in self.items)

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "deleted": self.deleted, "objects": [item.key for item in self.items], "bytes": self.num_bytes,
            "young": self.young, "kept": self.kept, "uploads": list(self.uploads),
        }  # fmt: skip


def collect(
    store: Store, *, grace_s: float = DEFAULT_GRACE_S, delete: bool = False, now_s: float | None = None
) -> Garbage:
    """Find what nothing names, and delete it if asked.

    Args:
        grace_s: objects younger than this are kept, whoever names them.
        now_s: the time, for tests; default the clock's.

    Raises:
        UserError, DamagedDataError: if a root cannot be read: nothing is deleted then.
    """
    if grace_s < 0:
        raise ValueError(f"a grace of {grace_s} s")
    found = [item for prefix in ("shards/", "manifests/", "receipts/") for item in store.list(prefix)]
    found = [item for item in found if _KNOWN.fullmatch(item.key)]
    roots = _roots(store)
    loose = [item for item in found if item.key not in roots]
    oldest = (time.time() if now_s is None else now_s) - grace_s
    old = sorted((item for item in loose if item.modified_s <= oldest), key=lambda item: item.key)
    if delete and old:
        again = _roots(store)
        old = [item for item in old if item.key not in again]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda item: _delete(store, item.key), old))
    return Garbage(
        items=tuple(old),
        young=len(loose) - len(old),
        kept=len(found) - len(loose),
        uploads=_sweep(store, grace_s, delete),
        deleted=delete,
    )


def _roots(store: Store) -> set[str]:
    """Return the keys of all shards, manifests and receipts that something names."""
    roots: set[str] = set()
    plan_sets = version.plan_sets(store)
    present = receipt_sizes(store)
    newest = version.latest_number(store)
    tombstones: frozenset[str] = frozenset()
    for number in range(1, newest + 1):
        one = version.open_version(store, number)
        tombstones = one.tombstones
        roots.add(version.manifest_key(one.manifest_sha256))
        rows = version.open_rows(store, one, ["shard_sha256"])
        roots |= {shard_key(sha256) for sha256 in rows["shard_sha256"].drop_null().unique().to_pylist()}
    planned = {plan_id for plan in plan_sets for plan_id in plan.plan_ids}
    roots |= {receipt.receipt_key(plan_id) for plan_id in planned}
    return roots | _shards_of_receipts(store, plan_sets, present, tombstones, roots)


def _shards_of_receipts(
    store: Store, plan_sets: Iterable[PlanSet], present: dict[str, int], tombstones: frozenset[str], named: set[str]
) -> set[str]:
    """Return the shards that receipts of live plans name and that hold a sample which stands nowhere else."""
    kinds = {plan_id: plan.kind for plan in plan_sets for plan_id in plan.plan_ids if plan_id in present}
    with ThreadPoolExecutor(_THREADS) as pool:
        tallies = list(pool.map(lambda plan_id: receipt.tally(store, plan_id, present[plan_id]), kinds))
    copies = [t.plan_id for t in tallies if kinds[t.plan_id] == "compact"]
    copied = _contents(store, copies)
    out = set()
    for tally in tallies:
        if tally.shard_sha256 is None or (key := shard_key(tally.shard_sha256)) in named:
            continue
        if kinds[tally.plan_id] != "compact" and (copied or tombstones):
            alone = _contents(store, [tally.plan_id], tombstones) - copied
            if not alone:
                continue
        out.add(key)
    return out


def _contents(store: Store, plan_ids: Iterable[str], without: frozenset[str] = frozenset()) -> set[tuple[Any, ...]]:
    """Return what tells the samples of some receipts: object, fingerprint, and CRC-32 of every member."""
    out: set[tuple[Any, ...]] = set()
    for done in manifest.load_receipts(store, list(plan_ids)):
        for row in done.rows.select(["source", "uid", "fingerprint", "status", "crc32s"]).to_pylist():
            if row["status"] == "sample" and row["uid"] not in without:
                out.add((row["source"], row["uid"], row["fingerprint"], tuple(row["crc32s"])))
    return out


def _delete(store: Store, key: str) -> None:
    try:
        obstore.delete(store.backend, key)
    except (NotFoundError, FileNotFoundError):
        pass  # another collector was first
    except (BaseError, OSError) as error:
        raise StoreError(f"{store.url}: deleting {key} failed: {short_error(error)}") from None


def _sweep(store: Store, grace_s: float, delete: bool) -> tuple[str, ...]:
    sweep = getattr(store, "sweep_uploads", None)
    return tuple(item.key for item in sweep(grace_s, delete=delete)) if sweep else ()


def as_text(found: Garbage) -> str:
    """Return a collection as lines for people."""
    verb = "deleted" if found.deleted else "would delete"
    lines = [f"{verb} {len(found.items)} object(s), {found.num_bytes / 1e6:.1f} MB; {found.kept} are named, "
             f"{found.young} are younger than the grace"]  # fmt: skip
    lines += [f"  {item.key}" for item in found.items[:20]]
    if len(found.items) > 20:
        lines.append(f"  and {len(found.items) - 20} more (JSON=1 lists all)")
    if found.uploads:
        lines.append(f"  {len(found.uploads)} unfinished upload(s) or temporary file(s)")
    if not found.deleted and (found.items or found.uploads):
        lines.append("nothing was deleted: add DELETE=1")
    return "\n".join(lines)
