"""Versions: what a reader opens. One JSON file a version, created once, never changed.

    versions/000007.json          names the manifest by digest, the spec, fingerprints, counts, policy
    versions/000007.shards.txt    one shard a line, relative to the corpus, for plain WebDataset readers

A plain reader of the listed shards sees all that lies in them: also samples that the manifest withdraws, as duplicates
or by rules stricter than those they were rendered under. The manifest's rows of status "sample" are the version.

Numbers are dense, so the newest is found by probing 1, 2, 4, ... and bisecting: no reader ever lists a bucket.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import SCHEMA, manifest, plan, redistribution
from pipeline.plan import PlanSet, check_schema
from pipeline.redistribution import redistributable, refuse_public
from pipeline.shard import shard_key
from pipeline.spec import DatasetSpec, canonical_json, digest_json, spec_of_json
from pipeline.store import Outcome, Store
from pipeline.types import UserError

MAX_VERSION_BYTES = 64 * 2**20
_NOT_IN_DIGEST = ("number", "digest", "parent", "code_commit", "created_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A published version. `digest` covers what a reader sees: equal digests mean equal data."""

    number: int
    digest: str
    manifest_sha256: str
    manifest_bytes: int
    parent: int | None
    tombstones: frozenset[str]
    counts: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def spec(self) -> DatasetSpec:
        """The spec that the version was published under."""
        return DatasetSpec.model_validate(self.record["spec"])


def version_key(number: int) -> str:
    """Return the key of a version in a corpus."""
    return f"versions/{number:06d}.json"


def parse_version(text: str) -> int | None:
    """Return a version number as the command lines take it, or None for "latest"."""
    if text == "latest":
        return None
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) < 10**6:
        raise UserError(f"VERSION={text}: expected a number from 1, or latest")
    return int(text)


def latest_number(store: Store) -> int:
    """Return the number of the newest version, 0 if there is none, with O(log n) requests and no listing."""
    if store.size(version_key(1)) is None:
        return 0
    low, high = 1, 2
    while store.size(version_key(high)) is not None:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if store.size(version_key(middle)) is not None:
            low = middle
        else:
            high = middle
    return low


def open_version(store: Store, number: int | None = None) -> Version:
    """Read a version; None takes the newest.

    Raises:
        UserError: if there is none, or it was written under another schema.
    """
    if number is None:
        number = latest_number(store)
        if number == 0:
            raise UserError(f"corpus {store.url}: no version is published yet; run `make publish CORPUS={store.url}`")
    try:
        record = json.loads(store.get(version_key(number), MAX_VERSION_BYTES))
    except FileNotFoundError:
        newest = latest_number(store)
        raise UserError(f"corpus {store.url}: there is no version {number}; versions 1 to {newest} exist") from None
    except ValueError as error:
        raise UserError(f"corpus {store.url}: version {number} is not readable: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"corpus {store.url}: version {number} is not a JSON object")
    check_schema(record.get("schema"), store.url, f"version {number}")
    body = {name: value for name, value in record.items() if name not in _NOT_IN_DIGEST}
    if record.get("digest") != digest_json(body):
        raise UserError(f"corpus {store.url}: version {number} does not match its digest; restore its file")
    try:
        return Version(
            number=number,
            digest=str(record["digest"]),
            manifest_sha256=str(record["manifest"]["sha256"]),
            manifest_bytes=int(record["manifest"]["num_bytes"]),
            parent=record["parent"],
            tombstones=frozenset(record["tombstones"]),
            counts=dict(record["counts"]),
            record=record,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"corpus {store.url}: version {number} is malformed: {error!r}") from None


def open_rows(store: Store, version: Version) -> pa.Table:
    """Read the manifest of a version, checked against its digest."""
    try:
        data = store.get(manifest.manifest_key(version.manifest_sha256))
    except FileNotFoundError:
        raise UserError(
            f"corpus {store.url}: the manifest of version {version.number} is missing; restore it"
        ) from None
    if len(data) != version.manifest_bytes or hashlib.sha256(data).hexdigest() != version.manifest_sha256:
        raise UserError(f"corpus {store.url}: the manifest of version {version.number} differs from its digest")
    return pa.parquet.read_table(pa.BufferReader(data))


def plan_sets(store: Store) -> list[PlanSet]:
    """Read every frozen plan of a corpus, by name. For writers and tools."""
    keys = sorted(item.key for item in store.list("plans/") if item.key.endswith(".parquet"))
    return [plan.load(store, key.removeprefix("plans/").removesuffix(".parquet")) for key in keys]


def publish(store: Store, plans: list[PlanSet], spec: DatasetSpec | None = None) -> tuple[Version, bool]:
    """Merge the receipts of these plans, check that every shard is there, and create the next version.

    Args:
        spec: what the version records and obeys: its admission rules on pictures, its held-out split. Default the spec
            that the last of the plans was frozen with.

    Returns:
        The version, and whether it is new: publishing the same again returns the newest version unchanged.

    Raises:
        UserError: if nothing is committed, or a shard is missing or has another length.
    """
    if not plans:
        raise UserError(f"corpus {store.url}: there is no plan; run `make render SPEC= CORPUS={store.url}` first")
    receipts = [r for p in plans for r in manifest.load_receipts(store, [shard.plan_id for shard in p.shards])]
    if not receipts:
        raise UserError(f"corpus {store.url}: no shard is committed yet; run `make render CORPUS={store.url}` first")
    spec = spec or spec_of_json(plans[-1].spec_json, f"corpus {store.url}: plan {plans[-1].id}")
    table = manifest.merge(receipts, spec)
    _check_shards(store, table)
    counts = _counts(table)
    refuse_public(store, counts["licenses"], "this version")
    data, sha256 = manifest.to_parquet(table)
    _create_same(store, manifest.manifest_key(sha256), data)
    body = {
        "schema": SCHEMA,
        "name": spec.name,
        "manifest": {"sha256": sha256, "num_bytes": len(data), "num_rows": table.num_rows},
        "spec": spec.model_dump(mode="json"),
        "fingerprints": sorted({receipt.fingerprint for receipt in receipts}),
        "license_policy": spec.model_dump(mode="json")["admission"]["licenses"],
        "redistributable": redistributable(counts["licenses"]),
        "counts": counts | {"shards_planned": sum(len(p.shards) for p in plans), "shards_committed": len(receipts)},
        "tombstones": [],
    }
    return _create_next(store, body, table)


def _create_next(store: Store, body: dict[str, Any], table: pa.Table) -> tuple[Version, bool]:
    digest = digest_json(body)
    shards = sorted(set(table["shard_sha256"].drop_null().to_pylist()))
    text = "".join(f"{shard_key(sha256)}\n" for sha256 in shards).encode()
    while True:
        parent = latest_number(store)
        newest = open_version(store, parent) if parent else None
        if newest is not None and newest.digest == digest:
            # A publisher that died between its two writes left the list out.
            _create_same(store, f"versions/{parent:06d}.shards.txt", text)
            return newest, False
        number = parent + 1
        record = body | {
            "number": number,
            "digest": digest,
            "parent": parent or None,
            "code_commit": code_commit(),
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if store.create(version_key(number), canonical_json(record)) is not Outcome.CONFLICT:
            _create_same(store, f"versions/{number:06d}.shards.txt", text)
            return open_version(store, number), True
        # another publisher took the number: look again, it may even have published the same


def _create_same(store: Store, key: str, data: bytes) -> None:
    """Create an object whose bytes are a function of its name; refuse one that stands there with others."""
    if store.create(key, data) is Outcome.CONFLICT:
        raise UserError(
            f"corpus {store.url}: {key} is damaged: it holds other bytes than this version's; "
            "move it away and publish again"
        )


def mark_public(store: Store) -> None:
    """Mark a store as one that anybody can read, unless a version in it holds what may not be handed on.

    Raises:
        UserError: naming the version.
    """
    for number in range(1, latest_number(store) + 1):
        version = open_version(store, number)
        if not redistributable(version.counts["licenses"]):
            raise UserError(
                f"corpus {store.url}: version {number} may not be redistributed, so this store cannot be public; "
                "publish what may from another CORPUS"
            )
    redistribution.mark_public(store)


def _check_shards(store: Store, table: pa.Table) -> None:
    sizes = dict(zip(table["shard_sha256"].to_pylist(), table["shard_bytes"].to_pylist()))
    for sha256, num_bytes in sizes.items():
        if sha256 is None:
            continue
        found = store.size(shard_key(sha256))
        if found != num_bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(
                f"corpus {store.url}: {shard_key(sha256)} {state}, its receipt says {num_bytes} bytes; "
                "nothing was published"
            )


def _counts(table: pa.Table) -> dict[str, Any]:
    status = table["status"].to_pylist()
    samples = [i for i, s in enumerate(status) if s == "sample"]
    sources, licenses = table["source"].to_pylist(), table["license"].to_pylist()
    return {
        "planned": table.num_rows,
        "samples": len(samples),
        "failures": dict(sorted(Counter(k for k in table["failure_kind"].to_pylist() if k).items())),
        "views": sum(table["num_views"].drop_null().to_pylist()),
        "heldout": sum(bool(table["heldout"][i].as_py()) for i in samples),
        "sources": dict(sorted(Counter(sources[i] for i in samples).items())),
        "licenses": dict(sorted(Counter(licenses[i] for i in samples).items())),
    }


def code_commit() -> str:
    """Return the git commit of this code, with "+dirty" where the tree differs from it, or "unknown"."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+dirty" if status else "")
