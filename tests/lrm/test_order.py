"""The order of samples: a permutation, pure, mixed by source."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
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


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(0, 2**40))
def test_blocks_hold_every_row_and_work_on_few_shards_at_a_time(
    num_rows: int, block_shards: int, epoch: int, copies: int, seed: int
) -> None:
    """Two sources that share no shard, one of them copied: each slot once, each block within its shards."""
    source = [int(i >= num_rows // 2) for i in range(num_rows)]
    order = order_of(
        num_rows, seed, sources=["a", "b"], source=source, mix={"b": copies}, block_shards=block_shards,
        shard=[(i // 3) * 2 + source[i] for i in range(num_rows)],
    )  # fmt: skip
    places = range(epoch * len(order), (epoch + 1) * len(order))
    rows = [order.draw(place).row for place in places]
    assert Counter(rows) == {row: copies if source[row] else 1 for row in range(num_rows)}
    shard_of = {row: (row // 3) * 2 + source[row] for row in range(num_rows)}
    blocks = [order.block_of(place) for place in places]
    assert blocks == sorted(blocks)
    assert blocks[0] == epoch * order.num_blocks
    assert blocks[-1] == (epoch + 1) * order.num_blocks - 1
    for row, block in zip(rows, blocks):
        assert shard_of[row] in order.shards_of_block(block)
        assert len(order.shards_of_block(block)) <= block_shards


def test_blocks_differ_from_epoch_to_epoch_and_mix_their_shards() -> None:
    order = order_of(200, block_shards=8)
    first, second = ([order.draw(e * 200 + i).row for i in range(200)] for e in range(2))
    assert first != second
    assert order.shards_of_block(0) != order.shards_of_block(order.num_blocks)
    assert len({row // 5 for row in first[:20]}) >= 5, "twenty samples of a block come from many of its eight shards"


@settings(deadline=None)
@given(st.integers(8, 80), st.sampled_from([0.25, 0.5, 1.5]), st.integers(0, 2**40))
def test_a_fraction_takes_other_rows_each_epoch_and_all_in_turn(half: int, weight: float, seed: int) -> None:
    num = 4 * half
    order = order_of(2 * num, seed, sources=["a", "b"], source=[0] * num + [1] * num, mix={"b": weight})
    epochs = [[order.draw(e * len(order) + i).row for i in range(len(order))] for e in range(4)]
    for rows in epochs:
        assert sorted(row for row in rows if row < num) == list(range(num))
        assert sum(row >= num for row in rows) == weight * num
    total = Counter(row for rows in epochs for row in rows if row >= num)
    assert total == dict.fromkeys(range(num, 2 * num), 4 * weight)


def test_a_mix_that_cannot_be_is_refused_and_sources_that_are_not_there_are_passed_over() -> None:
    with pytest.raises(UserError, match=r"data.source_copies of a is 0.5; whole numbers are needed .*cache_dir"):
        order_of(9, mix={"a": 0.5}, block_shards=2)
    told = r"data.source_copies \(mix of a view_loader\) names 'mvimagenet'; the version holds a, .* mvimgnet, colmap"
    with pytest.raises(UserError, match=told):
        order_of(9, mix={"mvimagenet": 3})
    for copies in (math.nan, math.inf, -1.0):
        with pytest.raises(UserError, match=r"data\.source_copies of mvimgnet is .*; 0 to 1000 are allowed"):
            order_of(9, mix={"mvimgnet": copies})
    assert len(order_of(9, mix={"mvimgnet": 3})) == 9
