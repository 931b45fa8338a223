"""Versions: what a reader opens. One JSON file a version, created once, never changed.

    versions/000007.json          names the manifest by digest, the spec, fingerprints, counts, policy
    versions/000007.shards.txt    one shard a line, relative to the corpus, for plain WebDataset readers

A plain reader of the listed shards sees all that lies in them: also samples that the manifest withdraws, as duplicates
or by rules stricter than those they were rendered under. The manifest's rows of status "sample" are the version.

A version that was withdrawn from by hand (a tombstone) hands its tombstones on: later versions leave the objects out
until the end of the corpus.

Numbers are dense, so the newest is found by probing 1, 2, 4, ... and bisecting: no reader ever lists a bucket.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import SCHEMA, manifest, parquet, plan, redistribution, verify
from pipeline.canonical import canonical_json, digest_json, parse_json
from pipeline.listing import Listing, last_of_each
from pipeline.plan import PlanSet
from pipeline.quality import Refusal
from pipeline.redistribution import redistributable, refuse_public
from pipeline.shard import shard_key
from pipeline.spec import DatasetSpec, spec_of_json
from pipeline.store import Outcome, Store
from pipeline.types import FailureKind, UserError
from pipeline.version_record import (
    NOT_IN_DIGEST,
    Version,
    latest_number,
    list_key,
    manifest_key,
    open_version,
    parse_version,
    shards_of,
    version_key,
)

__all__ = [
    "NOT_IN_DIGEST",
    "Draft",
    "Version",
    "code_commit",
    "latest_number",
    "list_key",
    "manifest_key",
    "mark_public",
    "open_rows",
    "open_version",
    "parse_version",
    "plan_sets",
    "plans_of",
    "publish",
    "repoint",
    "rules_note",
    "same_body",
    "shards_of",
    "tombstone",
    "verify_version",
    "version_key",
]  # fmt: skip

logger = logging.getLogger(__name__)


def open_rows(store: Store, version: Version, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the manifest of a version, or some columns of it, checked against its digest."""
    try:
        data = store.get(manifest_key(version.manifest_sha256))
    except FileNotFoundError:
        raise UserError(
            f"corpus {store.url}: the manifest of version {version.number} is missing; restore it"
        ) from None
    if len(data) != version.manifest_bytes or hashlib.sha256(data).hexdigest() != version.manifest_sha256:
        raise UserError(f"corpus {store.url}: the manifest of version {version.number} differs from its digest")
    return parquet.read(data, columns)


def plan_sets(store: Store) -> list[PlanSet]:
    """Read every frozen plan of a corpus, by name. For writers and tools."""
    keys = sorted(item.key for item in store.list("plans/") if item.key.endswith(".parquet"))
    return [plan.load(store, key.removeprefix("plans/").removesuffix(".parquet")) for key in keys]


def plans_of(
    plan_sets: Sequence[PlanSet], spec: DatasetSpec, fingerprint: str
) -> tuple[list[PlanSet], pa.Table | None]:
    """Return the plan sets to publish a spec from, and the objects that it planned: its base, and deltas of its name.

    Rows come from every plan of the fingerprint, as a delta refers to what others made. Both are empty if there is no
    plan of the spec.
    """
    mine = [p for p in plan_sets if p.fingerprint == fingerprint]
    base = spec.plan_set_id(fingerprint)
    deltas = [p for p in mine if p.kind == "delta" and p.name == spec.name]
    own = [p for p in mine if p.id == base] + deltas
    if not own:
        return [], None
    if not deltas:
        return [p for p in mine if p.id == base or p.kind == "compact"], own[0].table
    own.sort(key=lambda p: p.number)
    return mine, last_of_each(pa.concat_tables([p.table for p in own]))


def verify_version(store: Store, number: int | None = None, *, deep: bool = False) -> verify.Checked:
    """Check all that a version names: its manifest, its list, its shards.

    Raises:
        UserError: if the version or its manifest cannot be read.
    """
    version = open_version(store, number)
    rows = open_rows(store, version)
    found = verify.examine(store, rows, deep=deep)
    named = sorted(pc.unique(rows["shard_sha256"].drop_null()).to_pylist())
    if sorted(shards_of(store, version.number)) == named:
        return found
    problem = f"{list_key(version.number)} does not list the version's shards"
    return dataclasses.replace(found, problems=(*found.problems, problem))


def publish(
    store: Store,
    plans: list[PlanSet],
    spec: DatasetSpec | None = None,
    *,
    listing: Listing | None = None,
    deep: bool = False,
) -> tuple[Version, bool]:
    """Merge the receipts of these plans, check the shards, and create the next version.

    Args:
        spec: what the version records and obeys: its admission rules, its held-out split. Default the spec that the
            last of the plans was frozen with.
        listing: the objects that the version shall hold; default all that the receipts hold.
        deep: read and decode every sample first; by default every shard is looked for, and new ones are digested where
            that is cheap.

    Returns:
        The version, and whether it is new: publishing the same again returns the newest version unchanged.

    Raises:
        UserError: if nothing is committed, or a shard is missing or damaged.
    """
    if not plans:
        raise UserError(f"corpus {store.url}: there is no plan; run `make render SPEC= CORPUS={store.url}` first")
    made = [p for p in plans if p.kind != "compact"]
    if spec is None and (note := rules_note(made)) is not None:
        logger.warning("%s", note)
    spec = spec or spec_of_json((made or plans)[-1].spec_json, f"corpus {store.url}: plan {(made or plans)[-1].id}")
    merged = manifest.merge_plans(store, plans, spec, listing)
    if not merged.num_receipts:
        raise UserError(f"corpus {store.url}: no shard is committed yet; run `make render CORPUS={store.url}` first")
    present = manifest.receipt_sizes(store)
    planned = [plan_id for p in made for plan_id in p.plan_ids]
    body = {
        "schema": SCHEMA,
        "name": spec.name,
        "spec": spec.model_dump(mode="json"),
        "fingerprints": list(merged.fingerprints),
        "producers": sorted({p.producer for p in made if p.producer and p.fingerprint in merged.fingerprints}),
        "license_policy": spec.model_dump(mode="json")["admission"]["licenses"],
        "counts": {
            "shards_planned": len(planned),
            "shards_committed": sum(plan_id in present for plan_id in planned),
        },
    }
    return _append(store, lambda newest: (body, merged.table, newest.tombstones if newest else frozenset()), deep=deep)


def rules_note(plans: Sequence[PlanSet]) -> str | None:
    """Return what to say where objects will be judged by rules that they were not planned under, else None.

    A version has one set of rules, so that it can be told what it admits. Of a corpus that mixes datasets it is that of
    the last plan by name, unless the publisher names a spec, whose own plans are then published alone.
    """
    if not plans:
        return None
    rules, last = {p.id: _rules_of(p) for p in plans}, plans[-1]
    differ = {
        f"{part}.{key}": p.name
        for p in plans
        for part, values in rules[p.id].items()
        for key in values.keys() | rules[last.id][part].keys()
        if values.get(key) != rules[last.id][part].get(key)
    }
    if not differ:
        return None
    others = sorted(set(differ.values()))
    return (
        f"no SPEC= was named: all objects are judged by the rules of plan {last.id}, the last by name; those of "
        f"{', '.join(others)} have another {', '.join(sorted(differ))}. Give the specs equal rules, or name one"
    )


def _rules_of(plan: PlanSet) -> dict[str, dict[str, Any]]:
    """Return the rules that a plan holds as they stand there: another release's may lack what ours has."""
    try:
        spec = parse_json(plan.spec_json)
        return {part: dict(spec.get(part, {})) for part in ("admission", "split")}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"plan {plan.id}: the spec in it cannot be read: {error}; restore plans/") from None


def tombstone(store: Store, uids: Sequence[str]) -> tuple[Version, bool]:
    """Create the next version: the newest, less these objects, which no later version will hold either.

    Their bytes stay in their shards until a compaction copies the others out and a collection removes the shard.

    Raises:
        UserError: if there is no version, or a uid is in none of its rows.
    """

    def draft(newest: Version | None) -> Draft:
        assert newest is not None, "a version was opened before"
        rows = open_rows(store, newest)
        known = set(rows["uid"].filter(pc.is_in(rows["uid"], pa.array(list(uids), pa.string()))).to_pylist())
        missing = [uid for uid in uids if uid not in known | newest.tombstones]
        if missing:
            raise UserError(f"corpus {store.url}: version {newest.number} has no object {missing[0]!r}; check UID=")
        return same_body(newest), rows, newest.tombstones | set(uids)

    open_version(store)
    return _append(store, draft)


def repoint(store: Store, draft: Callable[[Version], pa.Table]) -> tuple[Version, bool]:
    """Create the next version: the newest one's objects, with rows that `draft` makes of it."""

    def whole(newest: Version | None) -> Draft:
        assert newest is not None, "a version was opened before"
        return same_body(newest), draft(newest), newest.tombstones

    open_version(store)
    return _append(store, whole)


Draft = tuple[dict[str, Any], pa.Table, frozenset[str]]
"""What a version will say (without manifest, counts and tombstones), its rows, and its tombstones."""


def same_body(version: Version) -> dict[str, Any]:
    """Return what a version says besides its number, manifest and tombstones."""
    left_out = (*NOT_IN_DIGEST, "manifest", "tombstones")
    return {name: value for name, value in version.record.items() if name not in left_out}


def _append(store: Store, draft: Callable[[Version | None], Draft], *, deep: bool = False) -> tuple[Version, bool]:
    """Create the next version of what `draft` makes of the newest; drafted anew if another publisher is faster."""
    while True:
        parent = latest_number(store)
        newest = open_version(store, parent) if parent else None
        body, table, tombstones = draft(newest)
        table = _bury(table, tombstones)
        counts = _counts(table)
        refuse_public(store, counts["licenses"], "this version")
        verify.check_shards(store, table, known=shards_of(store, parent) if parent else (), deep=deep)
        sha256, num_bytes = manifest.write_manifest(store, table)
        body = body | {
            "manifest": {"sha256": sha256, "num_bytes": num_bytes, "num_rows": table.num_rows},
            "counts": body["counts"] | counts,
            "redistributable": redistributable(counts["licenses"]),
            "tombstones": sorted(tombstones),
        }
        shards = sorted(pc.unique(table["shard_sha256"].drop_null()).to_pylist())
        text = "".join(f"{shard_key(shard)}\n" for shard in shards).encode()
        digest = digest_json(body)
        if newest is not None and newest.digest == digest:
            # A publisher that died between its two writes left the list out.
            _create_same(store, list_key(parent), text)
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
            _create_same(store, list_key(number), text)
            return open_version(store, number), True
        # another publisher took the number: look again, it may even have published the same


def _bury(table: pa.Table, tombstones: frozenset[str]) -> pa.Table:
    if not tombstones:
        return table
    dead = pc.and_(
        pc.equal(table["status"], "sample"), pc.is_in(table["uid"], pa.array(sorted(tombstones), pa.string()))
    )
    reason = Refusal(FailureKind.WITHDRAWN, "withdrawn by hand; its bytes go with the next compaction and collection")
    refused = {int(row): reason for row in pc.indices_nonzero(dead).to_pylist()}
    return manifest.withdraw(table, refused) if refused else table


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


def _counts(table: pa.Table) -> dict[str, Any]:
    samples = table.select(["source", "license", "heldout", "num_views"]).filter(pc.equal(table["status"], "sample"))

    def of(column: Any) -> dict[str, int]:
        pairs = pc.value_counts(column.combine_chunks()).to_pylist()
        return {pair["values"]: pair["counts"] for pair in sorted(pairs, key=lambda pair: str(pair["values"]))}

    return {
        "planned": table.num_rows,
        "samples": samples.num_rows,
        "failures": of(table["failure_kind"].drop_null()),
        "views": pc.sum(samples["num_views"]).as_py() or 0,
        "heldout": pc.sum(samples["heldout"]).as_py() or 0,
        "sources": of(samples["source"]),
        "licenses": of(samples["license"]),
    }


def code_commit() -> str:
    """Return the git commit of this code, with "+dirty" where the tree differs from it, or "unknown"."""
    root = Path(__file__).resolve().parent.parent
    environment = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}  # no credential

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
