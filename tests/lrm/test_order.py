"""The order of samples: a permutation, pure, mixed by source."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrm.order import KeyedDraws, SampleOrder, permute
from pipeline.types import UserError


def order_of(num_rows: int, seed: int = 0, **changes: Any) -> SampleOrder:
    values: dict[str, Any] = {
        "sources": ["a"], "source": [0] * num_rows, "heldout": [False] * num_rows, "num_views": [32] * num_rows,
        "shard": [i // 5 for i in range(num_rows)], "views_per_sample": 4, "seed": seed,
    } | changes  # fmt: skip
    kinds = {"source": np.int16, "shard": np.int32, "heldout": bool, "num_views": np.int16}
    return SampleOrder.build(**(values | {name: np.array(values[name], kind) for name, kind in kinds.items()}))


@given(st.integers(1, 700), st.integers(0, 2**63 - 1))
def test_the_keyed_permutation_takes_each_number_once(length: int, key: int) -> None:
    assert sorted(permute(i, length, key) for i in range(length)) == list(range(length))


def test_the_permutation_of_few_numbers_is_near_uniform() -> None:
    seen = Counter(tuple(permute(i, 3, key) for i in range(3)) for key in range(6000))
    assert len(seen) == 6
    assert all(800 < count < 1200 for count in seen.values())


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_holds_every_training_row_once(num_rows: int, seed: int, epoch: int) -> None:
    order = order_of(num_rows, seed)
    rows = [order.draw(epoch * len(order) + i).row for i in range(len(order))]
    assert sorted(rows) == list(range(num_rows))


def test_held_out_rows_never_come_and_sources_come_as_often_as_copied() -> None:
    order = order_of(
        4, sources=["a", "video"], source=[0, 1, 0, 1], heldout=[False, False, True, False], mix={"video": 3}
    )
    assert Counter(order.draw(i).row for i in range(len(order))) == {0: 1, 1: 3, 3: 3}


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    first, second = order_of(50), order_of(50)
    backwards = [second.draw(i) for i in reversed(range(120))][::-1]
    assert [first.draw(i) for i in range(120)] == backwards
    assert [order_of(50, seed=1).draw(i).row for i in range(50)] != [first.draw(i).row for i in range(50)]
    assert [first.draw(i).row for i in range(50)] != [first.draw(50 + i).row for i in range(50)]


def test_views_of_a_draw_differ_and_cover_all() -> None:
    order = order_of(5)
    draws = [order.draw(i) for i in range(500)]
    assert all(len(set(draw.views)) == 4 and draw.input_view == draw.views[0] for draw in draws)
    assert {draw.input_view for draw in draws} == set(range(32))


def test_a_known_order_does_not_change() -> None:
    """Saved runs resume by position: the order must stay the same from release to release."""
    assert [permute(i, 10, 7) for i in range(10)] == [5, 8, 3, 0, 2, 4, 7, 6, 1, 9]
    assert order_of(10, seed=3).draw(4).views == (14, 18, 27, 0)


def test_samples_with_too_few_views_are_refused() -> None:
    with pytest.raises(UserError, match=r"1 samples have fewer than 4 views \(row 1 has 3\); lower data.side_views"):
        order_of(2, num_views=[32, 3])
    with pytest.raises(UserError, match="none to train on"):
        order_of(1, heldout=[True])


def test_keyed_draws_stay_below_their_bound() -> None:
    draws = KeyedDraws(1)
    assert {draws.below(3) for _ in range(200)} == {0, 1, 2}
    assert sorted(KeyedDraws(5).choose(6, 6)) == list(range(6))
