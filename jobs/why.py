"""`make why UID=`: all that a corpus knows of one object, what a failure means, and what to do about it.

    rows        one a plan that holds the object: its shard, and what the shard's receipt says; a shard without a
                receipt is open, and a run may be at it
    versions    what each published version says; newest first
    pictures    the contact sheet of the newest sample, read from its shard and checked

Every plan is read, one receipt a plan, and of each manifest the row groups that can hold the object.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs import runs
from jobs.kinds import MEANINGS
from jobs.logs import trace_of
from pipeline import parquet, receipt, version
from pipeline.plan import PlanSet
from pipeline.report.figures import write_png
from pipeline.sample import SampleError, contact_sheet, decode_rgba, parse_sample_json
from pipeline.shard import DamagedDataError, check_part, shard_key
from pipeline.store import Store, StoreError
from pipeline.summary import RangedFile
from pipeline.types import FailureKind, UserError, sample_key

CELL_PX = 192
SHEET_VIEWS = 32
_COLUMNS = 8
_VERSION_COLUMNS = (
    "uid",
    "source",
    "status",
    "failure_kind",
    "message",
    "license",
    "shard_sha256",
    "offset",
    "heldout",
)


def explain(store: Store, uid: str, out: Path | None = None) -> dict[str, Any]:
    """Return a JSON object of all that is known of an object.

    Args:
        out: folder for its contact sheet; None draws none.

    Raises:
        UserError: if no plan of the corpus holds it.
        DamagedDataError: if its receipt is damaged.
    """
    if not uid.strip():
        raise UserError("UID is empty; give the uid of an object, as its source, a log or `make report` names it")
    plan_sets = version.plan_sets(store)
    found = [(plan, place) for plan in plan_sets for place in _places(plan, uid)]
    if not found:
        raise UserError(f"corpus {store.url}: no plan holds {uid!r}{_near(plan_sets, uid)}")
    living = runs.look(store)
    rows = [_row(store, plan, place, living) for plan, place in found]
    name = rows[0]["uid"]
    sampled = [row for row in rows if row.get("status") == "sample"]
    return {
        "corpus": store.url,
        "uid": name,
        "key": rows[0]["key"],
        "rows": rows,
        "versions": _versions(store, name),
        "sheet": _draw(store, sampled[-1], out) if sampled and out is not None else None,
    }


def _places(plan: PlanSet, uid: str) -> list[int]:
    """Return the rows of a plan that hold an object, by its uid, else by its key."""
    found = np.flatnonzero(pc.equal(plan.table["uid"], uid).to_numpy(zero_copy_only=False))
    if not len(found) and re.fullmatch(r".*-[0-9a-f]{12}", uid):
        names = plan.table["uid"].to_pylist()
        found = np.array([i for i, name in enumerate(names) if sample_key(name) == uid], int)
    return [int(i) for i in found]


def _near(plan_sets: Sequence[PlanSet], uid: str) -> str:
    """Return a hint at uids like one that is not there."""
    names = [name for plan in plan_sets for name in plan.table["uid"].to_pylist()]
    part = [name for name in names if uid.lower() in name.lower()][:3]
    close = part or difflib.get_close_matches(uid, names[:20_000], n=3, cutoff=0.6)
    if not names:
        return "; the corpus has no plan yet"
    return f"; did you mean {', '.join(map(repr, close))}?" if close else "; uids are those of the source's listing"


def _row(store: Store, plan: PlanSet, place: int, living: Sequence[runs.Run]) -> dict[str, Any]:
    """Return what one plan and its receipt say of the object at a place of the plan."""
    planned = plan.table.slice(place, 1).to_pylist()[0]
    out: dict[str, Any] = {
        "uid": planned["uid"], "key": sample_key(planned["uid"]), "plan_set": plan.id, "plan_kind": plan.kind,
        "shard": planned["shard"], "plan_id": planned["plan_id"], "fingerprint": plan.fingerprint,
        "producer": plan.producer, "trace": trace_of(plan.fingerprint, planned["uid"]),
    }  # fmt: skip
    out |= {name: planned[name] for name in ("source", "uri", "format", "license", "attribution")}
    try:
        rows = receipt.load(store, planned["plan_id"]).rows
    except FileNotFoundError:
        return out | {"status": "open", "held_by": _holder(planned["plan_id"], living)}
    row = rows.filter(pc.equal(rows["uid"], planned["uid"])).to_pylist()[0]
    row["provenance"] = _json_of(row["provenance"])
    row["quality"] = _json_of(row["quality"])
    out |= {name: value for name, value in row.items() if value is not None}
    if row["status"] == "failure":
        out["meaning"], out["what_to_do"] = _meaning(row["failure_kind"])
    else:
        out["shard_key"] = shard_key(row["shard_sha256"])
    return out


def _holder(plan_id: str, living: Sequence[runs.Run]) -> str:
    for run in reversed(living):
        if any(shard.plan_id == plan_id for shard in run.shards):
            state = "stale, it went without a word" if run.is_stale else run.state
            return f"run {run.id} on {run.host} ({state}{': ' + run.reason if run.reason else ''})"
    return "no run"


def _meaning(kind: str) -> tuple[str, str]:
    try:
        return MEANINGS[FailureKind(kind)]
    except ValueError:
        return "a kind that this release does not know", "read it with the release that wrote it"


def _json_of(text: str | None) -> Any:
    try:
        return json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {"unreadable": str(text)[:200]}


def _versions(store: Store, uid: str) -> list[dict[str, Any]]:
    """Return what every version says of an object, newest first."""
    out = []
    for number in range(version.latest_number(store), 0, -1):
        opened = version.open_version(store, number)
        key = version.manifest_key(opened.manifest_sha256)
        entry: dict[str, Any] = {"version": number, "withdrawn_by_hand": uid in opened.tombstones}
        try:
            file = RangedFile(store, key, opened.manifest_bytes)
            rows = parquet.read_where(file, "uid", uid, _VERSION_COLUMNS).to_pylist()
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            text = str(error).split("\n", 1)[0]
            out.append(entry | {"status": f"unreadable: {text[:200]}"})
            continue
        out += [entry | {name: value for name, value in row.items() if value is not None} for row in rows]
        if not rows:
            out.append(entry | {"status": "absent"})
    return out


def _draw(store: Store, row: Mapping[str, Any], out: Path) -> str:
    """Write the contact sheet of a sample; return its path, or why there is none."""
    try:
        images = _pictures(store, row)
    except (DamagedDataError, SampleError, StoreError) as error:
        return f"could not be drawn: {error}"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"why-{row['key']}.png"
    write_png(path, contact_sheet(images, min(_COLUMNS, len(images)), background=236))
    return str(path)


def _pictures(store: Store, row: Mapping[str, Any]) -> list[NDArray[np.uint8]]:
    """Return views of a sample as RGBA thumbnails [CELL_PX, CELL_PX, 4]; every byte is checked."""
    entry = receipt.member_index(row)
    views = [i * entry.num_views // min(SHEET_VIEWS, entry.num_views) for i in range(min(SHEET_VIEWS, entry.num_views))]
    places = [0, *(entry.position(view, "rgba") for view in views)]
    key = shard_key(row["shard_sha256"])
    parts = store.get_ranges(key, [entry.offsets[i] for i in places], [entry.lengths[i] for i in places])
    for place, part in zip(places, parts):
        check_part(
            part, entry.lengths[place], entry.crc32s[place], row["shard_sha256"], f"{row['key']}, member {place}"
        )
    parse_sample_json(parts[0])
    out = []
    for part in parts[1:]:
        image = decode_rgba(part)
        shrink = cv2.INTER_AREA if image.shape[0] >= CELL_PX else cv2.INTER_LINEAR
        out.append(np.asarray(cv2.resize(image, (CELL_PX, CELL_PX), interpolation=shrink), np.uint8))
    return out


def why_text(found: Mapping[str, Any]) -> str:
    """Return it as lines for people."""
    first = found["rows"][0]
    lines = [
        f"{found['uid']}  (key {found['key']}) in corpus {found['corpus']}",
        f"  from     {first['source']}, {first['format']}: {first['uri']}",
        f"  licence  {first['license']}; credit: {first['attribution'] or 'none stated'}",
    ]
    for row in found["rows"]:
        lines += _row_lines(row)
    for entry in found["versions"]:
        what = entry["status"] + (
            f", {entry['failure_kind']}: {entry.get('message', '')}" if "failure_kind" in entry else ""
        )
        withdrawn = ", withdrawn by hand" if entry["withdrawn_by_hand"] else ""
        lines.append(f"version {entry['version']}: {what}{withdrawn}{', held out' if entry.get('heldout') else ''}")
    if not found["versions"]:
        lines.append("no version is published yet")
    if found["sheet"]:
        lines.append(f"contact sheet: {found['sheet']}")
    return "\n".join(lines)


def _row_lines(row: Mapping[str, Any]) -> list[str]:
    head = f"plan {row['plan_set']} ({row['plan_kind']}), shard {row['shard']}: {row['status']}"
    if row["status"] == "open":
        return [f"{head}; held by {row['held_by']}", f"  trace    {row['trace']}"]
    told = row["provenance"]
    lines = [head]
    if row["status"] == "failure":
        retry = "may end otherwise" if row.get("retryable") else "ends the same with the same bytes"
        lines += [
            f"  failure  {row['failure_kind']} after {row.get('attempts', 1)} attempt(s), {retry}",
            f"  said     {row.get('message', '')}",
            f"  means    {row['meaning']}",
            f"  to do    {row['what_to_do']}",
        ]
    else:
        size = sum(row["lengths"])
        lines += [
            f"  sample   {row['num_views']} views of {', '.join(row['planes'])}, {size / 1e6:.2f} MB, "
            f"attempt {row.get('attempts', 1)}, seed {row['seed']}",
            f"  lies in  {row['shard_key']} at byte {row['offset']}",
        ]
    if told:
        seconds = told.get("seconds") if isinstance(told.get("seconds"), dict) else {}
        stages = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if isinstance(value, int | float))
        took = f"{told['elapsed_s']} s" if "elapsed_s" in told else "time unknown"
        lines.append(
            f"  made     on {told.get('worker', 'an unnamed node')} until {told.get('finished_at', '?')}, {took}"
            + (f" ({stages})" if stages else "")
        )
        known = ("worker", "finished_at", "elapsed_s", "seconds", "attempts", "trace")
        rest = ", ".join(f"{name} {value}" for name, value in told.items() if name not in known)
        lines += [f"  with     {rest}"] if rest else []
    digest = row.get("asset_sha256")
    lines.append(f"  asset    {row.get('asset_bytes', '?')} bytes, sha256 {digest or 'unknown'}")
    lines.append(f"  trace    {row['trace']}; fingerprint {row['fingerprint']}")
    lines.append(f"  receipt  {receipt.receipt_key(row['plan_id'])}")
    if row.get("log_tail"):
        lines += ["  log tail", *(f"    | {line}" for line in str(row["log_tail"]).splitlines())]
    return lines
