"""Rebuilds: what a corpus lacks of what a spec asks for, and the plan that brings it.

Of every object that the source lists the corpus may hold, under the spec's fingerprint:

    a sample of the same bytes        held: referred to, never made again
    a shard that is planned and open  open: made where it is planned, so nothing is planned twice
    a failure that can end otherwise  planned again: a retryable kind, up to RETRY_ROUNDS times by itself; a kind that
                                      was asked for; or a refusal by a rule that the spec has relaxed since
    another failure                   stands
    nothing, or other bytes           planned

What is planned becomes a delta, or the spec's base plan where there is nothing yet. All of it is a function of the
spec, its source and what the corpus holds, and deltas are numbered by create-if-absent: of two launchers one freezes a
delta, and the other finds it on its next look. What the source lists no more, or the spec no longer admits, costs
nothing: it is left out of the next version. A knob outside `[render]` leaves the fingerprint, so nothing is planned;
one inside it changes it, and everything is.

Looking reads a few columns of every receipt (0.3 to 0.5 ms each) and joins them to the listing by hash, not by sorting.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import parquet
from pipeline import plan as plans
from pipeline.admission import licence_admits
from pipeline.listing import Listing, object_keys
from pipeline.manifest import receipt_sizes
from pipeline.plan import PlanSet, assets_of
from pipeline.receipt import receipt_key, unreadable
from pipeline.spec import AdmissionSpec, DatasetSpec, spec_of_json
from pipeline.store import Store
from pipeline.types import FailureKind, UserError

RETRY_ROUNDS = 3
"""How often a rebuild tries an object again by itself whose failures are all of retryable kinds."""

_STATE = ("uid", "source", "license", "asset_sha256", "asset_bytes", "status", "failure_kind", "retryable")
_THREADS = 8

# By which rules each kind of refusal may have been made: (key, 1 where a larger value lets more in, -1 a smaller one).
_RULES: Mapping[FailureKind, tuple[tuple[str, int], ...]] = {
    FailureKind.TOO_LARGE: (("max_asset_bytes", 1), ("max_triangles", 1)),
    FailureKind.PARTIAL_IMPORT: (("min_triangle_share", -1),),
    FailureKind.BLANK_IMAGE: (("min_alpha_coverage", -1),),
    FailureKind.CROPPED: (("max_cropped", 1), ("max_border_touch", 1)),
    FailureKind.OVER_EXPOSED: (("max_clipped", 1),),
    FailureKind.THIN: (("min_thickness", -1), ("min_median_thickness", -1)),
    FailureKind.SINGLE_COLOUR: (("admit_single_colour", 1),),
    FailureKind.UNTEXTURED: (("admit_untextured", 1),),
    FailureKind.TRANSPARENT: (("admit_transparent", 1),),
    FailureKind.TOO_FEW_FRAMES: (("min_frames", -1),),
    FailureKind.NARROW_SWEEP: (("min_sweep_deg", -1),),
    FailureKind.POOR_MODEL: (("min_registered_share", -1), ("max_reprojection_px", 1)),
    FailureKind.MASK_DISAGREES: (("min_mask_agreement", -1),),
    FailureKind.CUT_OFF: (("max_cut_off", 1),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a corpus holds of a listing, and what it lacks.

    Attributes:
        pending: assets that no shard holds or plans, in the listing's order.
        open_work: frozen plans, and those of their open shards that hold wanted objects.
        counts: `listed` = `held` + `failed` (and stand) + `withdrawn` + `open` + `new` + `changed` + `retried`
            + `relaxed`; the last four are what is pending.
        plans: the plan sets of the fingerprint.
        first: whether nothing is held, planned or failed yet.
    """

    pending: pa.Table
    open_work: list[tuple[PlanSet, list[int]]]
    counts: Mapping[str, int]
    plans: Sequence[PlanSet]
    first: bool


def survey(
    store: Store,
    spec: DatasetSpec,
    fingerprint: str,
    listing: Listing,
    plan_sets: Sequence[PlanSet],
    *,
    tombstones: Collection[str] = (),
    kinds: Collection[str] | None = None,
) -> Survey:
    """Compare a listing with what a corpus holds under a fingerprint.

    Args:
        plan_sets: those of the corpus.
        tombstones: uids that no version will hold.
        kinds: plan objects that failed with these kinds, whatever they are, and nothing else.
    """
    mine = [p for p in plan_sets if p.fingerprint == fingerprint]
    made = sorted((p for p in mine if p.kind != "compact"), key=lambda p: (p.number, p.id))
    present = receipt_sizes(store)
    state = _gather(store, made, present, listing, spec.admission)
    own = [p for p in made if p.kind == "delta" or p.name == spec.name]
    gone = pc.is_in(listing.table["uid"], pa.array(sorted(tombstones), pa.string())).to_numpy(zero_copy_only=False)
    wanted = ~state.held & ~np.asarray(gone, bool)
    open_places = [(p, *_open_places(p, present, listing)) for p in own]
    planned = np.zeros(len(wanted), bool)
    for _, places, _ in open_places:
        planned[places[places >= 0]] = True
    retried, relaxed, fresh = state.reasons(kinds)
    open_ = wanted & planned
    free = wanted & ~planned
    pending = free & (retried | relaxed | fresh)
    work = [(p, _shards_with(places, shards, open_)) for p, places, shards in open_places]
    counts = {
        "listed": len(wanted),
        "held": int(state.held.sum()),
        "withdrawn": int((~state.held & gone).sum()),
        "open": int(open_.sum()),
        "failed": int((free & ~pending).sum()),
        "new": int((pending & fresh & ~state.known).sum()),
        "changed": int((pending & fresh & state.known).sum()),
        "retried": int((pending & retried).sum()),
        "relaxed": int((pending & relaxed).sum()),
    }
    return Survey(
        pending=listing.table.take(pa.array(np.flatnonzero(pending))),
        open_work=[(p, indexes) for p, indexes in work if indexes],
        counts=counts,
        plans=mine,
        first=not any(p.kind == "delta" or p.id == spec.plan_set_id(fingerprint) for p in made)
        and not (state.held | state.failed | planned).any(),
    )


def _gather(
    store: Store, made: Sequence[PlanSet], present: Mapping[str, int], listing: Listing, rules: AdmissionSpec
) -> _State:
    """Read the receipts of these plans, oldest plan first."""
    state = _State(listing)
    read = set[str]()  # plans of two names may deal the same shard, whose tries count once
    for plan in made:
        then = spec_of_json(plan.spec_json, f"corpus {store.url}: plan {plan.id}").admission
        unread = [plan_id for plan_id in plan.plan_ids if plan_id in present and plan_id not in read]
        read.update(unread)
        for rows in _read_states(store, unread):
            state.add(rows, then, rules)
    return state


class _State:
    """What is known of each listed object [N], gathered receipt by receipt, oldest plan first."""

    def __init__(self, listing: Listing) -> None:
        count = listing.table.num_rows
        self.listing = listing
        self.held = np.zeros(count, bool)
        self.known = np.zeros(count, bool)  # by name, whatever its bytes
        self.failed = np.zeros(count, bool)
        self.retryable = np.zeros(count, bool)
        self.relaxed = np.zeros(count, bool)
        self.tries = np.zeros(count, np.int32)
        self.kind = np.full(count, "", dtype="U32")

    def add(self, rows: pa.Table, then: AdmissionSpec, now: AdmissionSpec) -> None:
        """Take in the rows of some receipts of one plan, made under the rules `then`."""
        by_name = pc.index_in(object_keys(rows), self.listing.keys)
        self.known[np.asarray(by_name.drop_null(), np.int64)] = True
        places = self.listing.places(rows)
        sample = pc.equal(rows["status"], "sample").to_numpy(zero_copy_only=False)
        self.held[places[(places >= 0) & sample]] = True
        lost = (places >= 0) & ~sample
        at = places[lost]
        rows = rows.filter(pa.array(lost))
        self.failed[at] = True
        self.retryable[at] = pc.fill_null(rows["retryable"], False).to_numpy(zero_copy_only=False)
        np.add.at(self.tries, at, self.retryable[at])
        self.kind[at] = rows["failure_kind"].to_numpy(zero_copy_only=False).astype(str)
        self.relaxed[at] = [
            relaxes(kind, then, now, license)
            for kind, license in zip(rows["failure_kind"].to_pylist(), rows["license"].to_pylist())
        ]

    def reasons(self, kinds: Collection[str] | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which objects [N] may be planned to be retried, because a rule was relaxed, and as never made."""
        if kinds is not None:
            nothing = np.zeros(len(self.held), bool)
            return self.failed & np.isin(self.kind, sorted(kinds)), nothing, nothing
        retried = self.failed & self.retryable & (self.tries < RETRY_ROUNDS)
        return retried, self.failed & ~retried & self.relaxed, ~self.failed


def relaxes(kind: str, then: AdmissionSpec, now: AdmissionSpec, license: str) -> bool:
    """Whether an object that was refused with this kind may pass now: its rule, or one of several, lets more in."""
    if kind == FailureKind.LICENCE_EXCLUDED:
        return licence_admits(now.licenses, license) is None
    rules = _RULES.get(FailureKind(kind), ())
    return any(sign * (getattr(now, key) - getattr(then, key)) > 0 for key, sign in rules)


def _read_states(store: Store, plan_ids: Sequence[str]) -> Iterable[pa.Table]:
    """Yield the columns of `_STATE` of these receipts, in pieces of many receipts."""

    def one(plan_id: str) -> pa.Table:
        try:
            file = parquet.opened(store.get(receipt_key(plan_id)), checksums=True)
            return file.read(columns=list(_STATE), use_threads=False).select(_STATE).replace_schema_metadata(None)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise unreadable(store.url, plan_id, error) from None

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(plan_ids), 4096):
            yield pa.concat_tables(pool.map(one, plan_ids[start : start + 4096])).combine_chunks()


def _open_places(
    plan: PlanSet, present: Mapping[str, int], listing: Listing
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return for each asset of a plan's open shards its place in the listing (or -1), and its shard."""
    open_ = pa.array([i for i, plan_id in enumerate(plan.plan_ids) if plan_id not in present], pa.int32())
    rows = plan.table.filter(pc.is_in(plan.table["shard"], open_))
    return listing.places(rows, "sha256", "num_bytes"), np.asarray(rows["shard"].to_numpy(), np.int64)


def _shards_with(places: NDArray[np.int64], shards: NDArray[np.int64], wanted: NDArray[np.bool_]) -> list[int]:
    inside = places >= 0
    return [int(i) for i in np.unique(shards[inside][wanted[places[inside]]])]


def freeze_pending(
    store: Store, spec: DatasetSpec, fingerprint: str, found: Survey, producer: str
) -> tuple[PlanSet, bool]:
    """Freeze what a survey found pending; return the plan set of that name, and whether it is this one.

    If it is not, another launcher was first: look again.
    """
    assets = assets_of(found.pending)
    if found.first:
        return plans.put(store, plans.draft(spec, fingerprint, assets, producer=producer))
    number = 1 + max((p.number for p in found.plans if p.kind == "delta"), default=0)
    drafted = plans.draft(
        spec,
        fingerprint,
        assets,
        plan_set_id=plans.delta_id(fingerprint, number),
        kind="delta",
        number=number,
        producer=producer,
    )
    return plans.put(store, drafted)


def parse_kinds(text: str) -> tuple[str, ...]:
    """Parse `KIND=`: failure kinds separated by commas.

    Raises:
        UserError: naming the kind that is none.
    """
    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    for kind in kinds:
        if kind not in set(FailureKind):
            raise UserError(f"KIND={text}: {kind!r} is no kind of failure; one or several of {', '.join(FailureKind)}")
    if not kinds:
        raise UserError(
            "KIND is empty; give kinds of failure such as render_timeout,network; `make status` counts them"
        )
    return kinds


def as_text(counts: Mapping[str, int], num_views: int | None) -> str:
    """Tell in one line what a rebuild will do, before it does; `num_views` of an object, where the spec says."""
    todo = {name: counts[name] for name in ("new", "changed", "retried", "relaxed", "open") if counts[name]}
    kept = ", ".join(f"{counts[name]} {name}" for name in ("held", "failed", "withdrawn") if counts[name])
    total = sum(todo.values())
    parts = ", ".join(f"{count} {name}" for name, count in todo.items())
    views = f", {total * num_views} views" if num_views else ""
    work = f"to make {total} object(s){views} ({parts})" if total else "nothing to make"
    return f"{counts['listed']} listed: {work}; {kept or 'none held'}"


def as_json(found: Survey) -> dict[str, Any]:
    """Return a survey as a JSON object."""
    work = {plan.id: len(indexes) for plan, indexes in found.open_work}
    return {"counts": dict(found.counts), "pending": found.pending.num_rows, "open_shards": work}
