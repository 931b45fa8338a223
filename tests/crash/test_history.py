"""Random histories of a corpus agree with a model; `make test-crash` runs more of them."""

from __future__ import annotations

import pytest

from pipeline.store import Outcome, Store
from tests.crash.history import run_history


def test_histories_agree_with_the_model() -> None:
    run_history(examples=25, steps=20, seed=1, shrink=False)


def test_a_store_that_overwrites_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself: with create-if-absent broken, a history must disagree."""

    def careless(self: Store, key: str, data: bytes) -> Outcome:
        import obstore

        obstore.put(self.backend, key, data)
        return Outcome.CREATED

    monkeypatch.setattr(Store, "create", careless)
    with pytest.raises(AssertionError):
        run_history(examples=40, steps=20, seed=1, shrink=False)
