"""SIGKILL at each named point: run again, and the corpus is what it would have been undisturbed."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest

from pipeline import version
from pipeline.store import Store, open_store
from tests import corpora
from tests.crash.work import POINTS, check_whole, run, work

counter = itertools.count()
MANY = ("tar:mid:1", "shard:before:1", "shard:after:1", "receipt:before:1", "receipt:after:1")


def state(store: Store) -> tuple[dict[str, int], str]:
    """What must not depend on where a run was killed."""
    return corpora.listing(store), version.open_version(store).digest


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], str]:
    path = str(tmp_path_factory.mktemp("undisturbed") / "c")
    assert run(work, path) == 0
    return state(open_store(path))


@pytest.mark.parametrize("point", [*POINTS, *MANY])
def test_a_run_that_was_killed_is_finished_by_running_again(
    point: str, tmp_path: Path, undisturbed: tuple[dict[str, int], str]
) -> None:
    path = tmp_path / "c"
    assert run(work, str(path), point=point) == -signal.SIGKILL
    store = open_store(str(path))
    check_whole(store)
    assert run(work, str(path)) == 0
    check_whole(store)
    assert state(store) == undisturbed
    store.sweep_uploads(0, delete=True)
    assert {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} == set(undisturbed[0])


@pytest.mark.parametrize("point", [point for point in POINTS if not point.endswith("mid")])
def test_a_run_on_s3_that_was_killed_is_finished_by_running_again(
    point: str, s3_url: str, undisturbed: tuple[dict[str, int], str]
) -> None:
    url = f"{s3_url}/killed-at-{next(counter)}"
    assert run(work, url, point=point) == -signal.SIGKILL
    store = open_store(url)
    check_whole(store)
    assert run(work, url) == 0
    assert state(store) == undisturbed
    assert store.sweep_uploads(0) == []


def test_every_run_may_be_killed_again(tmp_path: Path, undisturbed: tuple[dict[str, int], str]) -> None:
    """One corpus, killed at every point in turn: each run goes on from where the last one died."""
    path = str(tmp_path / "c")
    for point in POINTS:
        run(work, path, point=point)
        check_whole(open_store(path))
    assert run(work, path) == 0
    assert state(open_store(path)) == undisturbed
