"""Whether what a version names is there and is what was written.

    cheap   every shard exists with its length (one HEAD each, in threads); shards that the parent does not name are
            digested as long as they come to no more than 1 GiB
    deep    every shard is read once: its digest, then every member of every live sample against its row (name, place,
            length, crc32), the JSON against the row, and every picture decoded

A deep check takes the time to read and decode every picture. A cheap one notices a shard that was cut or lost, not one
whose bytes were flipped long ago: the loader's own checks and a deep check from time to time are for that.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.manifest import receipt_sizes
from pipeline.receipt import member_index, receipt_key, tally
from pipeline.sample import SampleError, SampleHeader, decode_data, decode_rgba, parse_sample_json
from pipeline.shard import BLOCK, DamagedDataError, MemberIndex, check_part, member_name, shard_key
from pipeline.store import Store
from pipeline.types import Codec, Plane, PlaneName, UserError

CHEAP_BYTES = 2**30
_SHARD = re.compile(r"\bshards?[/ ]([0-9a-f]{12,64})")
THREADS = 16
_COLUMNS = (
    "uid", "key", "source", "asset_sha256", "fingerprint", "num_views", "planes", "codecs", "shard_sha256",
    "shard_bytes", "offset", "lengths", "crc32s",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a check looked at, and what was wrong: one line a problem."""

    shards: int
    digested: int
    decoded_samples: int
    problems: tuple[str, ...]


def check_shards(store: Store, table: pa.Table, *, known: Collection[str] = (), deep: bool = False) -> Checked:
    """Check the shards that rows of a version name, before it is published.

    Args:
        known: digests of shards that an earlier version names; only a deep check digests those.

    Raises:
        UserError: naming the first shard that is missing, cut or damaged.
    """
    found = examine(store, table, known=known, deep=deep)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise UserError(
            f"corpus {store.url}: {found.problems[0]}{more}; nothing was published; {_remedy(store, found.problems[0])}"
        )
    return found


def _remedy(store: Store, problem: str) -> str:
    """Say what to do about a shard that is lost, naming the receipt that keeps it from being made again."""
    match = _SHARD.search(problem)
    with ThreadPoolExecutor(THREADS) as pool:
        tallies = pool.map(lambda item: tally(store, *item), receipt_sizes(store).items())
        found = [one.plan_id for one in tallies if match and (one.shard_sha256 or "").startswith(match[1])]
    if found:
        return f"restore the shard, or remove {receipt_key(found[0])} and make its objects again"
    return "restore the shard"


def examine(store: Store, table: pa.Table, *, known: Collection[str] = (), deep: bool = False) -> Checked:
    """Check the shards that rows name; problems are listed, not raised."""
    live = table.select(["shard_sha256", "shard_bytes"]).filter(pc.is_valid(table["shard_sha256"]))
    groups = live.group_by(["shard_sha256", "shard_bytes"]).aggregate([]).to_pylist()
    sizes = sorted((str(group["shard_sha256"]), int(group["shard_bytes"])) for group in groups)
    with ThreadPoolExecutor(THREADS) as pool:
        problems = [text for text in pool.map(lambda item: _present(store, table, *item), sizes) if text]
    if problems:
        return Checked(shards=len(sizes), digested=0, decoded_samples=0, problems=tuple(problems))
    if deep:
        count, problems = _examine_deeply(store, table, [sha256 for sha256, _ in sizes])
        return Checked(shards=len(sizes), digested=len(sizes), decoded_samples=count, problems=tuple(problems))
    fresh = _within([item for item in sizes if item[0] not in set(known)], CHEAP_BYTES)
    with ThreadPoolExecutor(THREADS) as pool:
        problems = [text for text in pool.map(lambda item: _digest(store, table, *item), fresh) if text]
    return Checked(shards=len(sizes), digested=len(fresh), decoded_samples=0, problems=tuple(problems))


def _within(sizes: Sequence[tuple[str, int]], limit: int) -> list[tuple[str, int]]:
    out, total = [], 0
    for sha256, num_bytes in sizes:
        total += num_bytes
        if total > limit:
            break
        out.append((sha256, num_bytes))
    return out


def _whose(table: pa.Table, sha256: str) -> str:
    """Name a shard and whose samples it holds."""
    uids = table["uid"].filter(pc.equal(table["shard_sha256"], sha256))
    more = f" and {len(uids) - 1} more" if len(uids) > 1 else ""
    return f"{shard_key(sha256)} ({uids[0].as_py()!r}{more})"


def _present(store: Store, table: pa.Table, sha256: str, num_bytes: int) -> str | None:
    found = store.size(shard_key(sha256))
    if found == num_bytes:
        return None
    state = "is missing" if found is None else f"has {found} bytes"
    return f"{_whose(table, sha256)} {state}, its receipt says {num_bytes} bytes"


def _digest(store: Store, table: pa.Table, sha256: str, num_bytes: int) -> str | None:
    found = store.sha256(shard_key(sha256))
    return None if found == (sha256, num_bytes) else f"{_whose(table, sha256)} holds other bytes than its name says"


def _examine_deeply(store: Store, table: pa.Table, shards: Iterable[str]) -> tuple[int, list[str]]:
    rows = table.select(_COLUMNS).filter(pc.equal(table["status"], "sample"))
    order = pc.sort_indices(rows.select(["shard_sha256", "offset"]), sort_keys=[("shard_sha256", "ascending")])
    rows = rows.take(order)
    count, problems, start = 0, list[str](), 0
    names = rows["shard_sha256"]
    ends = {pair["values"]: pair["counts"] for pair in pc.value_counts(names.combine_chunks()).to_pylist()}
    for sha256 in sorted(shards):
        part = rows.slice(start, ends[sha256]).to_pylist()
        start += ends[sha256]
        data = store.get(shard_key(sha256))
        if hashlib.sha256(data).hexdigest() != sha256:
            problems.append(f"{shard_key(sha256)} holds other bytes than its name says")
        count += len(part)
        with ThreadPoolExecutor(4) as pool:  # decoders release the interpreter's lock
            problems += [text for text in pool.map(lambda row, data=data: _sample_problem(data, row), part) if text]
    return count, problems


def _sample_problem(data: bytes, row: Mapping[str, Any]) -> str | None:
    try:
        check_sample(data, row)
    except DamagedDataError as error:
        return str(error)
    return None


def check_sample(data: bytes, row: Mapping[str, Any]) -> None:
    """Check one sample inside the bytes of its shard against its row, and decode its pictures.

    Raises:
        DamagedDataError: naming shard, sample and member.
    """
    entry, shard, key = member_index(row), str(row["shard_sha256"])[:12], str(row["key"])
    parts = []
    for i, (start, length, crc32) in enumerate(zip(entry.offsets, entry.lengths, entry.crc32s)):
        name = member_name(key, i, entry)
        try:
            info = tarfile.TarInfo.frombuf(data[start - BLOCK : start], "utf-8", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise DamagedDataError(f"shard {shard}: {name}: no tar header in front of it: {error}") from None
        if info.name != name or info.size != length:
            raise DamagedDataError(f"shard {shard}: found member {info.name!r}, expected {name!r}")
        part = data[start : start + length]
        check_part(part, length, crc32, shard, name)
        parts.append(part)
    try:
        header = parse_sample_json(parts[0])
        _check_header(header, row, shard)
        for i, part in enumerate(parts[1:]):
            _decode(part, header, entry, i)
    except (SampleError, KeyError, TypeError) as error:
        raise DamagedDataError(f"shard {shard}: sample {key}: {error}") from None


def _check_header(header: SampleHeader, row: Mapping[str, Any], shard: str) -> None:
    said = {
        "uid": header.uid,
        "num_views": len(header.cameras),
        "fingerprint": header.metadata["spec"],
        "asset_sha256": header.metadata["asset_sha256"],
    }
    for name, value in said.items():
        if value != row[name]:
            raise DamagedDataError(
                f"shard {shard}: sample {row['key']}: {name} is {value!r}, its row says {row[name]!r}"
            )


def _decode(part: bytes, header: SampleHeader, entry: MemberIndex, position: int) -> None:
    view, place = divmod(position, len(entry.planes))
    name, camera = entry.planes[place], header.cameras[view]
    if name == "rgba":
        shape = decode_rgba(part).shape[:2]
    else:
        scale = header.metadata["views"][view]["planes"][name].get("scale")
        plane = Plane(codec=cast(Codec, entry.codecs[place]), data=part, scale=scale)
        shape = decode_data(cast(PlaneName, name), plane).shape[:2]
    if shape != (camera.height, camera.width):
        raise SampleError(
            f"view {view}: {name} is {shape[1]} x {shape[0]} px, its camera {camera.width} x {camera.height}"
        )


def as_json(found: Checked) -> dict[str, Any]:
    """Return what was checked as a JSON object."""
    return {
        "shards": found.shards,
        "digested": found.digested,
        "decoded_samples": found.decoded_samples,
        "problems": list(found.problems),
    }
