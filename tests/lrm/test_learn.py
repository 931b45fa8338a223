"""Does it learn: the views that training draws from, and the scores beside the guesses, held to plain loops."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm.data import Loader
from lrm.learn import Line, Protocol, mean_view, measure, rows_of, seen_and_unseen, spread, write_lines
from lrm.order import KeyedDraws
from lrm.pixels import decode_view, resize_image
from lrm.preview import predict_views, psnr
from lrm.train import build_model
from pipeline.reader import VersionReader
from pipeline.types import UserError
from tests.lrm.conftest import build_corpus, nano_config

PROTOCOL = Protocol(image_px=16, num_inputs=2, num_targets=2)


@pytest.fixture(scope="module")
def split_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve balls, eight views of 32 px each, some held out."""
    folder = tmp_path_factory.mktemp("split")
    return build_corpus(folder, num_objects=12, num_views=8, size_px=32, heldout_per_mille=300)


def test_training_draws_from_the_first_views_alone(split_corpus: str) -> None:
    reader, config = VersionReader.open(split_corpus), nano_config("data.max_views=5")
    with Loader(reader, config.data, image_px=32, batch_size=2) as loader:
        drawn = {view for place in range(400) for view in loader.order.draw(place).views}
        place = loader.state_dict()
    assert drawn == set(range(5))
    one = nano_config("data.max_views=5", "data.input_views=1")
    with Loader(reader, one.data, image_px=32, batch_size=2) as loader:
        draws = [loader.order.draw(number) for number in range(400)]
    assert {draw.input_view for draw in draws} == {0}
    assert {view for draw in draws for view in draw.views} == set(range(5))
    with Loader(reader, nano_config().data, image_px=32, batch_size=2) as loader:
        assert {view for number in range(400) for view in loader.order.draw(number).views} == set(range(8))
        with pytest.raises(UserError, match="loader state is of max_views 5, this run has 0"):
            loader.load_state_dict(place)
    with pytest.raises(UserError, match="fewer than 3 views"):
        Loader(reader, nano_config("data.max_views=2").data, image_px=32, batch_size=2)


@settings(deadline=None)  # 200 choices an example
@given(st.integers(1, 30), st.integers(0, 35), st.data())
def test_the_first_of_a_choice_lies_where_it_is_asked_to(bound: int, first_below: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, bound))
    chosen = [KeyedDraws(key).choose(num, bound, first_below) for key in range(200)]
    assert all(len(set(one)) == num and set(one) <= set(range(bound)) for one in chosen)
    assert all(one[0] < (first_below or bound) for one in chosen)
    if 0 < first_below < bound and num > 1 and bound <= 8:
        assert {one[0] for one in chosen} == set(range(first_below))
        assert {view for one in chosen for view in one} == set(range(bound)), "the others are any"


@given(st.integers(1, 50), st.integers(1, 60))
def test_spread_takes_the_first_and_others_in_order(length: int, count: int) -> None:
    taken = spread(range(length), count)
    assert len(taken) == min(length, count)
    assert taken[0] == 0
    assert taken == sorted(set(taken))
    gaps = np.diff([*taken, length])
    assert gaps.max() - gaps.min() <= 1


@given(st.integers(2, 40), st.data())
def test_no_view_that_was_drawn_is_predicted(num_views: int, data: st.DataObject) -> None:
    seen = data.draw(st.integers(1, num_views - 1))
    given_views, predicted = seen_and_unseen(num_views, seen, Protocol(num_inputs=3, num_targets=5))
    assert set(given_views) <= set(range(seen))
    assert predicted
    assert set(predicted) <= set(range(seen, num_views))


@pytest.mark.parametrize("max_views", [0, 8, 9])
def test_a_run_that_drew_from_every_view_is_not_judged(max_views: int) -> None:
    with pytest.raises(UserError, match=r"none is left unseen; set data.max_views to 1 to 7"):
        seen_and_unseen(8, max_views, PROTOCOL)


def test_the_mean_view_is_of_what_training_drew_from(split_corpus: str) -> None:
    reader = VersionReader.open(split_corpus)
    tiles = []
    for row, held in enumerate(reader.rows["heldout"].to_pylist()):
        read = reader.read_views(row, range(5))
        if not held:
            pictures = (decode_view(p["rgba"], c, "a ball") for p, c in zip(read.planes, read.cameras))
            tiles += [resize_image(picture, 16, 16) for picture in pictures]
    assert len(tiles) < 12 * 5, "some are held out"
    np.testing.assert_allclose(mean_view(reader, 5, PROTOCOL), np.mean(tiles, axis=0), atol=1e-6)


@pytest.mark.parametrize("heldout", [False, True])
def test_scores_are_means_over_pairs_of_given_and_unseen_views(split_corpus: str, heldout: bool) -> None:
    reader, config = VersionReader.open(split_corpus), nano_config("data.max_views=5")
    model, mean = build_model(config, load_weights=False).eval(), np.full((16, 16, 3), 0.5, np.float32)
    scores, lines = measure(model, config, reader, mean, PROTOCOL, heldout=heldout)
    rows = [row for row, held in enumerate(reader.rows["heldout"].to_pylist()) if held is heldout]
    model_db, mean_db, copy_db = [], [], []
    for row in rows:
        for view in (0, 2):
            given_view, truths, predicted = predict_views(model, config, reader, row, [view, 5, 6], 16)
            for true, guess in zip(truths, predicted):
                model_db.append(-10 * np.log10(np.mean((true.astype(float) - guess) ** 2)))
                mean_db.append(-10 * np.log10(np.mean((true.astype(float) - 0.5) ** 2)))
                copy_db.append(-10 * np.log10(np.mean((true.astype(float) - given_view) ** 2)))
    assert (scores.objects, scores.pairs, len(lines)) == (len(rows), 4 * len(rows), len(rows))
    found = (scores.psnr_db, scores.baseline_mean_db, scores.baseline_copy_db)
    assert found == pytest.approx([np.mean(model_db), np.mean(mean_db), np.mean(copy_db)], abs=1e-4)
    shown = psnr(lines[0].true, lines[0].predicted)
    assert shown == pytest.approx(model_db[0], abs=1e-4), "the first object by its first input and target"


def test_a_version_without_held_out_objects_is_refused(ball_corpus: str) -> None:
    with pytest.raises(UserError, match=r"has no held-out object; set split.heldout_per_mille"):
        rows_of(VersionReader.open(ball_corpus), heldout=True, at_most=4)


def test_the_picture_shows_each_line_in_its_place(tmp_path: Path) -> None:
    def tile(level: float) -> np.ndarray:
        return np.full((8, 8, 3), level, np.float32)

    lines = [Line(given=tile(n / 10), true=tile(0.5), predicted=tile(1 - n / 10), mean=tile(0.0)) for n in range(4)]
    write_lines(lines, tmp_path / "deep" / "lines.png", across=2, scale=2)
    picture = cv2.imread(str(tmp_path / "deep" / "lines.png"))
    assert picture is not None
    assert (picture[:16].reshape(16, 2, -1).min(axis=(0, 2)) < 80).all(), "each block has a dark heading on its grey"
    row = picture[16 + 16 + 3 + 8, :, 0]  # through the middle of the second row of lines: numbers 2 and 3
    assert [int(row[column * 19 + 8]) for column in range(4)] == [51, 128, 204, 0]
    assert [int(row[4 * 19 + 12 + column * 19 + 8]) for column in range(4)] == [76, 128, 178, 0]
