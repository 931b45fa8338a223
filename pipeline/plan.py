"""Which asset stands in which shard: decided once, frozen, and the same for a laptop, a Slurm array and a Ray cluster.

A plan set is one Parquet file, `plans/<plan-set>.parquet`, one row an asset in order. There are three kinds:

    base      named by a digest of all that decides the dealing, so the same spec finds the same plan; the listing of
              assets happens only when there is none yet. A folder that has changed since does not move a single asset:
              a plan is a promise about numbers.
    delta     `delta-<fingerprint>-<n>`: what a rebuild found lacking under a fingerprint. n is the next free number and
              is taken by create-if-absent, so deltas are a log: of two launchers that look at the same corpus one
              freezes n, and the other reads it and finds its work planned.
    compact   `compact-<fingerprint>-<version>-<digest>`: samples of a version that are copied out of shards full of
              dead ones.

A set is kept as the columns it is stored in; an `Asset` is built for a shard that is asked for, and a shard's digest is
checked then (pages have checksums besides). Tools that only count never build a million objects that way.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import SCHEMA, parquet
from pipeline.canonical import check_schema, digest_json
from pipeline.sample import asset_row
from pipeline.spec import DatasetSpec
from pipeline.store import Outcome, Store
from pipeline.types import Asset, UserError

_COLUMNS = pa.schema(
    [
        ("shard", pa.int32()),
        ("plan_id", pa.string()),
        ("uid", pa.string()),
        ("source", pa.string()),
        ("uri", pa.string()),
        ("format", pa.string()),
        ("license", pa.string()),
        ("attribution", pa.string()),
        ("sha256", pa.string()),
        ("num_bytes", pa.int64()),
    ]
)
_METADATA = ("schema", "name", "fingerprint", "spec", "kind", "number", "producer")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """The frozen work of one shard. `plan_id` is the digest of the rest."""

    plan_id: str
    index: int
    fingerprint: str
    assets: tuple[Asset, ...]


Kind = Literal["base", "delta", "compact"]
ASSET_COLUMNS = tuple(name for name in _COLUMNS.names if name not in ("shard", "plan_id"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanSet:
    """All shards of one frozen plan.

    Attributes:
        table: one row an asset in order, with the columns of the file; `shard` counts up from 0.
        kind: see the module.
        number: place of a delta in its log; the version that a compaction started from; 0 for a base.
        producer: name of what makes the pixels, "" where the plan does not tell.
    """

    id: str
    name: str
    fingerprint: str
    spec_json: str
    table: pa.Table
    kind: Kind = "base"
    number: int = 0
    producer: str = ""
    starts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        shards = self.table["shard"].to_numpy()
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        if not len(shards) or not (shards[starts] == np.arange(len(starts))).all():
            raise ValueError("its shards do not count up from 0")
        object.__setattr__(self, "starts", starts)

    @property
    def num_assets(self) -> int:
        """Number of planned objects."""
        return int(self.table.num_rows)

    @property
    def shards(self) -> ShardPlans:
        """The shards, each built when it is asked for."""
        return ShardPlans(self)

    @property
    def plan_ids(self) -> list[str]:
        """The id of each shard, in order."""
        return list(self.table["plan_id"].take(pa.array(self.starts)).to_pylist())

    def shard_table(self, index: int) -> pa.Table:
        """Return the rows of one shard."""
        start = int(self.starts[index])
        end = int(self.starts[index + 1]) if index + 1 < len(self.starts) else self.num_assets
        return self.table.slice(start, end - start)

    @property
    def salt(self) -> str | None:
        """What enters the ids of its shards besides their work: a delta that tries the same again is other work."""
        return None if self.kind == "base" else self.id


class ShardPlans(Sequence[ShardPlan]):
    """The shards of a plan set as a sequence."""

    def __init__(self, plan: PlanSet) -> None:
        self._plan = plan

    def __len__(self) -> int:
        return len(self._plan.starts)

    @overload
    def __getitem__(self, index: int) -> ShardPlan: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardPlan]: ...
    def __getitem__(self, index: int | slice) -> ShardPlan | list[ShardPlan]:
        if isinstance(index, slice):
            return [self._one(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"shard {index} is not one of the {len(self)} of plan {self._plan.id}")
        return self._one(index % len(self))

    def __iter__(self) -> Iterator[ShardPlan]:
        return (self._one(i) for i in range(len(self)))

    def _one(self, index: int) -> ShardPlan:
        plan = self._plan
        rows = plan.shard_table(index)
        try:
            assets = tuple(assets_of(rows))
            plan_id = plan_id_of(index, plan.fingerprint, assets, plan.salt)
        except (ValueError, TypeError) as error:
            raise UserError(f"plan {plan.id}: shard {index} is damaged ({error}); restore the plan") from None
        if plan_id != rows["plan_id"][0].as_py():
            raise UserError(f"plan {plan.id}: shard {index} does not match its digest; restore the plan")
        return ShardPlan(plan_id=plan_id, index=index, fingerprint=plan.fingerprint, assets=assets)


def plan_id_of(index: int, fingerprint: str, assets: Sequence[Asset], salt: str | None = None) -> str:
    """Return the digest that names a shard's work."""
    rows = [asset_row(asset) for asset in assets]
    body = {"schema": SCHEMA, "index": index, "fingerprint": fingerprint, "assets": rows}
    return digest_json(body if salt is None else body | {"plan_set": salt})


def assets_table(assets: Sequence[Asset]) -> pa.Table:
    """Return assets as columns named like their fields."""
    types = {name: _COLUMNS.field(name).type for name in ASSET_COLUMNS}
    return pa.table(
        {name: pa.array([getattr(asset, name) for asset in assets], type_) for name, type_ in types.items()}
    )


def assets_of(table: pa.Table) -> list[Asset]:
    """Return the assets of a table of `assets_table`'s columns."""
    return [Asset(**row) for row in table.select(ASSET_COLUMNS).to_pylist()]


def deal(
    assets: Sequence[Asset], objects_per_shard: int, fingerprint: str, salt: str | None = None
) -> tuple[ShardPlan, ...]:
    """Deal assets into shards in their order: a pure function of its arguments.

    Raises:
        UserError: if there is no asset, or two share a uid or a key.
    """
    if not assets:
        raise UserError("the source lists no assets; check its path, uids or categories")
    check_keys(assets)
    shards = []
    for index, start in enumerate(range(0, len(assets), objects_per_shard)):
        part = tuple(assets[start : start + objects_per_shard])
        plan_id = plan_id_of(index, fingerprint, part, salt)
        shards.append(ShardPlan(plan_id=plan_id, index=index, fingerprint=fingerprint, assets=part))
    return tuple(shards)


def check_keys(assets: Sequence[Asset]) -> None:
    """Raise UserError if two assets share a uid or a key."""
    seen: dict[str, str] = {}
    for asset in assets:
        key = asset.key
        if key in seen:
            raise UserError(f"asset {asset.uid!r}: its key {key!r} is also that of {seen[key]!r}; uids must differ")
        seen[key] = asset.uid


def plan_key(plan_set_id: str) -> str:
    """Return the key of a plan set in a corpus."""
    return f"plans/{plan_set_id}.parquet"


def freeze(
    store: Store, spec: DatasetSpec, fingerprint: str, list_assets: Callable[[], list[Asset]], producer: str = ""
) -> PlanSet:
    """Return the frozen plan of a spec, listing the source and writing the plan if there is none yet."""
    plan = find(store, spec, fingerprint)
    return plan if plan is not None else put(store, draft(spec, fingerprint, list_assets(), producer=producer))[0]


def find(store: Store, spec: DatasetSpec, fingerprint: str) -> PlanSet | None:
    """Return the frozen base plan of a spec, or None if there is none yet."""
    try:
        return load(store, spec.plan_set_id(fingerprint))
    except FileNotFoundError:
        return None


def draft(
    spec: DatasetSpec,
    fingerprint: str,
    assets: Sequence[Asset],
    *,
    plan_set_id: str | None = None,
    kind: Kind = "base",
    number: int = 0,
    producer: str = "",
) -> PlanSet:
    """Deal assets into a plan set that is not frozen yet; by default the base plan of the spec."""
    name = plan_set_id or spec.plan_set_id(fingerprint)
    shards = deal(assets, spec.shards.objects_per_shard, fingerprint, None if kind == "base" else name)
    sizes = [len(shard.assets) for shard in shards]
    table = assets_table(assets)
    table = table.add_column(0, "shard", pa.array(np.repeat(np.arange(len(shards), dtype=np.int32), sizes)))
    table = table.add_column(1, "plan_id", pa.array(np.repeat(np.array([s.plan_id for s in shards], object), sizes)))
    return PlanSet(
        id=name,
        name=spec.name,
        fingerprint=fingerprint,
        spec_json=spec.model_dump_json(),
        table=table.cast(_COLUMNS),
        kind=kind,
        number=number,
        producer=producer,
    )


def put(store: Store, plan: PlanSet) -> tuple[PlanSet, bool]:
    """Freeze a drafted plan; return the one that counts, and whether it is this one: another writer may be first."""
    outcome = store.create(plan_key(plan.id), to_parquet(plan))
    return load(store, plan.id), outcome is not Outcome.CONFLICT


def delta_id(fingerprint: str, number: int) -> str:
    """Return the name of a delta; see the module."""
    return f"delta-{fingerprint[:16]}-{number:06d}"


def load(store: Store, plan_set_id: str) -> PlanSet:
    """Read a frozen plan.

    Raises:
        FileNotFoundError: if there is none.
        UserError: if the corpus was written under another schema.
    """
    return from_parquet(store.get(plan_key(plan_set_id)), plan_set_id, store.url)


def to_parquet(plan: PlanSet) -> bytes:
    """Return the file of a plan set."""
    metadata = {
        "schema": str(SCHEMA),
        "plan_set": plan.id,
        "name": plan.name,
        "fingerprint": plan.fingerprint,
        "spec": plan.spec_json,
    }
    if plan.kind != "base":
        metadata |= {"kind": plan.kind, "number": str(plan.number)}
    if plan.producer:
        metadata["producer"] = plan.producer
    sink = io.BytesIO()
    table = plan.table.replace_schema_metadata(metadata)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def from_parquet(data: bytes, plan_set_id: str, where: str) -> PlanSet:
    """Read the file of a plan set.

    Raises:
        UserError: if it is damaged, or was written under another schema.
    """
    what = f"corpus {where}: plan {plan_set_id}"
    try:
        table = parquet.read(data, checksums=True)
        stored = table.schema.metadata or {}
        metadata = {name: stored.get(name.encode(), b"").decode() for name in _METADATA}
        check_schema(metadata["schema"], where, f"plan {plan_set_id}")
        kind: Any = metadata["kind"] or "base"
        if kind not in ("base", "delta", "compact"):
            raise ValueError(f"it is of an unknown kind {kind!r}")
        return PlanSet(
            id=plan_set_id,
            name=metadata["name"],
            fingerprint=metadata["fingerprint"],
            spec_json=metadata["spec"],
            table=table.select(_COLUMNS.names).replace_schema_metadata(None).cast(_COLUMNS),
            kind=kind,
            number=int(metadata["number"] or 0),
            producer=metadata["producer"],
        )
    except UserError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        text = str(error).split("\n", 1)[0]
        raise UserError(f"{what} is damaged ({text}); restore it, or render into another CORPUS") from None


def parse_shards(text: str, num_shards: int) -> list[int]:
    """Parse `SHARDS=`: "all", "7", "0-63", "3,9" or a mix such as "0-3,9"; sorted, each once.

    A part of any of these is named by its index: "all:2/8" is the third of eight, every eighth from the third on. The
    parts of an array of jobs so share out the shards by their index alone; a part may be empty.

    Raises:
        UserError: naming the part that is wrong.
    """
    whole, colon, share = text.partition(":")
    if colon:
        match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", share)
        if match is None or int(match[1]) >= int(match[2]):
            raise UserError(f"SHARDS={text}: {share!r} is not a part; use all:0/8 to all:7/8 for the parts of eight")
        return parse_shards(whole, num_shards)[int(match[1]) :: int(match[2])]
    last = num_shards - 1
    if text.strip() == "all":
        return list(range(num_shards))
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if match is None:
            raise UserError(f"SHARDS={text}: {part!r} is not a number or a range; use 0-{last}, 7, 3,9 or all")
        low = int(match[1])
        high = low if match[2] is None else int(match[2])
        if high < low:
            raise UserError(f"SHARDS={text}: range {part.strip()} runs backwards; write {high}-{low}")
        if high > last:
            raise UserError(f"SHARDS={text}: shard {high} is out of range; the plan has shards 0-{last}")
        chosen.update(range(low, high + 1))
    return sorted(chosen)
