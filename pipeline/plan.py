"""Which asset stands in which shard: decided once, frozen, and the same for a laptop, a Slurm array and a Ray cluster.

A plan set is one Parquet file, `plans/<plan-set>.parquet`, one row an asset in order. Its name is a digest of all that
decides the dealing, so the same spec finds the same plan; the listing of assets happens only when there is none yet.
A folder that has changed since does not move a single asset: a plan is a promise about numbers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import SCHEMA
from pipeline.sample import asset_row
from pipeline.spec import DatasetSpec, digest_json
from pipeline.store import Store
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """The frozen work of one shard. `plan_id` is the digest of the rest."""

    plan_id: str
    index: int
    fingerprint: str
    assets: tuple[Asset, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSet:
    """All shards of one dataset spec."""

    id: str
    name: str
    fingerprint: str
    spec_json: str
    shards: tuple[ShardPlan, ...]

    @property
    def num_assets(self) -> int:
        """Number of planned objects."""
        return sum(len(shard.assets) for shard in self.shards)


def plan_id_of(index: int, fingerprint: str, assets: Sequence[Asset]) -> str:
    """Return the digest that names a shard's work."""
    rows = [asset_row(asset) for asset in assets]
    return digest_json({"schema": SCHEMA, "index": index, "fingerprint": fingerprint, "assets": rows})


def deal(assets: Sequence[Asset], objects_per_shard: int, fingerprint: str) -> tuple[ShardPlan, ...]:
    """Deal assets into shards in their order: a pure function of its arguments.

    Raises:
        UserError: if there is no asset, or two share a uid or a key.
    """
    if not assets:
        raise UserError("the source lists no assets; check its path, uids or categories")
    seen: dict[str, str] = {}
    for asset in assets:
        if asset.key in seen:
            raise UserError(
                f"asset {asset.uid!r}: its key {asset.key!r} is also that of {seen[asset.key]!r}; uids must differ"
            )
        seen[asset.key] = asset.uid
    shards = []
    for index, start in enumerate(range(0, len(assets), objects_per_shard)):
        part = tuple(assets[start : start + objects_per_shard])
        plan_id = plan_id_of(index, fingerprint, part)
        shards.append(ShardPlan(plan_id=plan_id, index=index, fingerprint=fingerprint, assets=part))
    return tuple(shards)


def plan_key(plan_set_id: str) -> str:
    """Return the key of a plan set in a corpus."""
    return f"plans/{plan_set_id}.parquet"


def freeze(store: Store, spec: DatasetSpec, fingerprint: str, list_assets: Callable[[], list[Asset]]) -> PlanSet:
    """Return the frozen plan of a spec, listing the source and writing the plan if there is none yet."""
    plan_set_id = spec.plan_set_id(fingerprint)
    try:
        return load(store, plan_set_id)
    except FileNotFoundError:
        pass
    shards = deal(list_assets(), spec.shards.objects_per_shard, fingerprint)
    plan = PlanSet(
        id=plan_set_id, name=spec.name, fingerprint=fingerprint, spec_json=spec.model_dump_json(), shards=shards
    )
    store.create(plan_key(plan_set_id), to_parquet(plan))
    return load(store, plan_set_id)  # ours or, if another writer was first, the winner's


def load(store: Store, plan_set_id: str) -> PlanSet:
    """Read a frozen plan.

    Raises:
        FileNotFoundError: if there is none.
        UserError: if the corpus was written under another schema.
    """
    return from_parquet(store.get(plan_key(plan_set_id)), plan_set_id, store.url)


def to_parquet(plan: PlanSet) -> bytes:
    """Return the file of a plan set."""
    rows = [
        {"shard": shard.index, "plan_id": shard.plan_id, **asset_row(asset)}
        for shard in plan.shards
        for asset in shard.assets
    ]
    metadata = {
        "schema": str(SCHEMA),
        "plan_set": plan.id,
        "name": plan.name,
        "fingerprint": plan.fingerprint,
        "spec": plan.spec_json,
    }
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=_COLUMNS.with_metadata(metadata))
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes, plan_set_id: str, where: str) -> PlanSet:
    """Read the file of a plan set and check its digests.

    Raises:
        UserError: if it is damaged, or was written under another schema.
    """
    what = f"corpus {where}: plan {plan_set_id}"
    shards: dict[int, list[Asset]] = {}
    ids: dict[int, str] = {}
    try:
        table = pq.read_table(io.BytesIO(data))
        stored = table.schema.metadata or {}
        metadata = {name: stored.get(name.encode(), b"").decode() for name in ("schema", "name", "fingerprint", "spec")}
        check_schema(metadata["schema"], where, f"plan {plan_set_id}")
        for row in table.select(_COLUMNS.names).cast(_COLUMNS).to_pylist():
            index = int(row.pop("shard"))
            ids[index] = row.pop("plan_id")
            shards.setdefault(index, []).append(Asset(**row))
    except UserError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        text = str(error).split("\n", 1)[0]
        raise UserError(f"{what} is damaged ({text}); restore it, or render into another CORPUS") from None
    fingerprint = metadata["fingerprint"]
    plans = tuple(
        ShardPlan(plan_id=ids[index], index=index, fingerprint=fingerprint, assets=tuple(assets))
        for index, assets in sorted(shards.items())
    )
    for shard in plans:
        if plan_id_of(shard.index, fingerprint, shard.assets) != shard.plan_id:
            raise UserError(f"{what}: shard {shard.index} does not match its digest; restore the plan")
    return PlanSet(
        id=plan_set_id, name=metadata["name"], fingerprint=fingerprint, spec_json=metadata["spec"], shards=plans
    )


def check_schema(found: object, where: str, what: str) -> None:
    """Raise UserError unless a stored thing was written under the schema that this code reads."""
    if str(found) != str(SCHEMA):
        raise UserError(
            f"corpus {where}: {what} has schema {found!r}, this code reads schema {SCHEMA}; "
            "use the release that wrote it, or another CORPUS"
        )


def parse_shards(text: str, num_shards: int) -> list[int]:
    """Parse `SHARDS=`: "all", "7", "0-63", "3,9" or a mix such as "0-3,9"; sorted, each once.

    Raises:
        UserError: naming the part that is wrong.
    """
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
