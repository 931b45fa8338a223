"""Random histories of a corpus agree with a model; `make test-crash` runs more of them.

A model that cannot disagree proves nothing, so each of its promises is broken once on purpose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import compact, garbage, manifest, rebuild, version
from pipeline.store import Outcome, Store
from tests import corpora
from tests.crash.history import History, run_history

_names = itertools.count()


def one_of_each(new_url: Callable[[], str]) -> None:
    """Go through a history by hand in which each operation matters, held to the model after every step."""
    kind = type("History", (History,), {"new_url": staticmethod(new_url)})
    at, calm = kind(), {"variant": 2, "crash": None}

    def step(do: Callable[..., None], **arguments: Any) -> None:
        do(**arguments)
        at.nothing_changes_or_goes()

    step(at.routine, days=1)
    step(at.weekly, withdrawn=None)
    first = next(iter(at.model.shards("base").values()))[1]
    at._commit(first, 1)  # made once more with other pixels: what is there is adopted
    step(at.world_changes, files={"ball-0": 1, "ball-4": 0}, fails=None, hours=1)
    step(at.routine, days=4)
    assert at.model.versions[-1]["ball-1"] == ("failure", "network"), "three tries, and no more"
    step(at.world_changes, files={}, fails={}, hours=1)
    step(at.retry, name="a", fingerprint="f", kinds=("network", "empty_scene"), crash=None)
    step(at.dataset, name="b", fingerprint="g", variant=2, crash=("receipt:after", 0))
    step(at.weekly, withdrawn="ball-4")
    step(at.compact, dead_share=0.0, crash=("version:before", 0))
    step(at.world_changes, files={"ball-3": 1, "ball-5": 0, "ball-2": None}, fails=None, hours=30)
    step(at.dataset, name="a", fingerprint="f", variant=2, crash=("shard:after", 0))
    step(at.dataset, name="a", fingerprint="f", **calm)
    assert {uid for uid, result in at.model.versions[-1].items() if result[0] == "sample"} == {
        "ball-0", "ball-1", "ball-3", "ball-5",
    }  # fmt: skip
    step(at.collect, grace_h=0, delete=True, crash=("delete:before", 0), strays={2: 3, 3: 0})
    step(at.weekly, withdrawn=None)
    step(at.dataset, name="b", fingerprint="g", **calm)
    at.teardown()


def quiet(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(version, "code_commit", lambda: "unknown")  # asks git twice


def test_a_history_of_everything_agrees_with_the_model(any_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)
    one_of_each(lambda: any_store.url)


def test_histories_agree_with_the_model() -> None:
    run_history(examples=40, steps=25, seed=1, shrink=False)


def test_histories_on_a_folder_agree_with_the_model(tmp_path: Path) -> None:
    run_history(examples=5, steps=25, seed=2, shrink=False, new_url=lambda: str(tmp_path / f"c{next(_names)}"))


def test_histories_on_s3_agree_with_the_model(s3_url: str) -> None:
    run_history(examples=4, steps=25, seed=3, shrink=False, new_url=lambda: f"{s3_url}/history-{next(_names)}")


def overwrite(patch: pytest.MonkeyPatch) -> None:
    """Create-if-absent creates whatever is there."""

    def careless(self: Store, key: str, data: bytes) -> Outcome:
        import obstore

        obstore.put(self.backend, key, data)
        return Outcome.CREATED

    patch.setattr(Store, "create", careless)


def take_the_young(patch: pytest.MonkeyPatch) -> None:
    """A collection forgets its grace."""
    real = garbage.collect
    patch.setattr(garbage, "collect", lambda store, grace_s, **rest: real(store, grace_s=0.0, **rest))


def take_in_a_dry_run(patch: pytest.MonkeyPatch) -> None:
    real = garbage.collect
    patch.setattr(garbage, "collect", lambda store, delete, **rest: real(store, delete=True, **rest))


def take_what_no_version_names(patch: pytest.MonkeyPatch) -> None:
    """A collection keeps shards of versions alone, and takes those that are committed and not yet published."""
    patch.setattr(garbage, "_shards_of_receipts", lambda *_: set())


def lose_a_row(patch: pytest.MonkeyPatch) -> None:
    """A compaction drops the last object."""
    real = compact._repoint
    patch.setattr(compact, "_repoint", lambda rows, moved: real(rows, moved).slice(0, rows.num_rows - bool(moved)))


def copy_the_dead(patch: pytest.MonkeyPatch) -> None:
    """A compaction copies every sample of a receipt, withdrawn or not: bytes that were to go stay."""
    real = version.open_rows

    def undead(store: Store, one: version.Version, columns: Any = None) -> pa.Table:
        return real(store, version.open_version(store, 1), columns)

    patch.setattr(compact.version, "open_rows", undead)


def bring_back_the_dead(patch: pytest.MonkeyPatch) -> None:
    """A rebuild's version forgets the tombstones of the one before."""
    real: Callable[..., Any] = version.publish

    def publish(store: Store, plans: Any, spec: Any = None, *, listing: Any = None, deep: bool = False) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            if listing is not None:
                inner.setattr(version, "_bury", lambda table, _: table)
            return real(store, plans, spec, listing=listing, deep=deep)

    patch.setattr(version, "publish", publish)


def make_again_what_is_held(patch: pytest.MonkeyPatch) -> None:
    """A rebuild does not see the samples that are there."""
    real = rebuild._State.add

    def add(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        self.held[:] = False

    patch.setattr(rebuild._State, "add", add)


def retry_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rebuild, "RETRY_ROUNDS", 10**6)


def prefer_failures(patch: pytest.MonkeyPatch) -> None:
    """Of several rows of an object the last counts, so a failure may beat a sample."""
    patch.setattr(manifest, "_first_of", lambda rows: len(rows) - 1)


def forget_the_old_file(patch: pytest.MonkeyPatch) -> None:
    """An object whose file changed is taken for held: digests are not looked at."""
    import numpy as np

    patch.setattr("pipeline.listing.same_bytes", lambda theirs, *_: np.ones(len(theirs), bool))


BUGS = [overwrite, take_the_young, take_in_a_dry_run, take_what_no_version_names, lose_a_row, copy_the_dead,
        bring_back_the_dead, make_again_what_is_held, retry_for_ever, prefer_failures, forget_the_old_file]  # fmt: skip


@pytest.mark.parametrize("break_it", BUGS, ids=lambda bug: bug.__name__)
def test_a_broken_promise_is_found_out(break_it: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        break_it(patch)
        quiet(patch)
        with pytest.raises((AssertionError, KeyError)):
            one_of_each(corpora.memory_url)
