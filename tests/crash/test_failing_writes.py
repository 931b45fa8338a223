"""The k-th write fails, for every k: nothing half-made under a final name, a typed error; running again mends it."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from obstore.exceptions import GenericError

from pipeline import folder, receipt, shard, store, version
from pipeline.sample import SampleError
from pipeline.store import Store, StoreError, open_store
from pipeline.types import Sample, View
from tests import corpora
from tests.crash.work import check_whole, run

NUM_WRITES = 8  # plan, 2 shards, 2 receipts, manifest, version, list of shards


def build(corpus: Store) -> None:
    plan = corpora.freeze(corpus)
    for one in plan.shards:
        try:
            receipt.load(corpus, one.plan_id)
        except FileNotFoundError:
            corpora.commit(corpus, one)
    version.publish(corpus, [plan])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CREATE_BACKOFF_S", 0.001)
    monkeypatch.setattr(version, "code_commit", lambda: "unknown")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    corpus = open_store(str(tmp_path_factory.mktemp("undisturbed") / "c"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(version, "code_commit", lambda: "unknown")
        build(corpus)
    return corpora.listing(corpus)


@contextlib.contextmanager
def failing(k: int, *, done_first: bool, lasting: bool) -> Iterator[list[str]]:
    """Make the k-th write of an object fail, before or after it is done; `lasting`: and all that follow it.

    A write is counted once however often it is tried again, unless it passes when tried again.
    """
    keys: list[str] = []
    real: dict[str, Callable[..., None]] = {"_put": Store._put, "_put_file": Store._put_file}

    def make(name: str) -> Callable[..., None]:
        def put(self: Store, key: str, *rest: Any) -> None:
            if key not in keys:
                keys.append(key)
            place = keys.index(key)
            if place == k or (lasting and place > k):
                if done_first:
                    with contextlib.suppress(*store._TAKEN):
                        real[name](self, key, *rest)
                raise OSError(errno.EIO, "made to fail") if self.local_root else GenericError("made to fail")
            real[name](self, key, *rest)

        return put

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(Store, name, make(name))
        yield keys


@pytest.mark.parametrize("k", range(NUM_WRITES))
@pytest.mark.parametrize("lasting", [False, True], ids=["one", "rest"])
def test_a_write_that_fails_leaves_nothing_half_made(
    any_store: Store, k: int, lasting: bool, undisturbed: dict[str, int]
) -> None:
    with failing(k, done_first=False, lasting=lasting) as keys, pytest.raises(StoreError) as info:
        build(any_store)
    assert keys[k] in str(info.value)
    assert "made to fail" in str(info.value)
    assert keys[k] not in corpora.listing(any_store)
    assert set(corpora.listing(any_store)) == set(keys[:k])
    check_whole(any_store)
    assert any_store.sweep_uploads(0) == []
    build(any_store)
    assert corpora.listing(any_store) == undisturbed


@pytest.mark.parametrize("k", range(NUM_WRITES))
def test_a_write_that_was_done_but_reported_as_failed_is_success(
    any_store: Store, k: int, undisturbed: dict[str, int]
) -> None:
    with failing(k, done_first=True, lasting=True):
        build(any_store)
    assert corpora.listing(any_store) == undisturbed


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
@pytest.mark.parametrize("k", range(NUM_WRITES))
def test_a_system_call_that_fails_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, k: int, undisturbed: dict[str, int]
) -> None:
    """ENOSPC and the like in the middle of an object, in a folder: the temporary file goes, the name never appears."""
    corpus = open_store(str(tmp_path / "c"))
    real, count = getattr(os, call), iter(range(1000))

    def broken(*arguments: Any) -> Any:
        if next(count) == k:
            if call == "write":
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(folder.os, call, broken)
    failed = False
    try:
        build(corpus)
    except StoreError as error:
        failed = True
        text = str(error)
    monkeypatch.setattr(folder.os, call, real)
    if failed:
        assert "No space left" in text
        assert "\n" not in text
    assert folder.leftovers(tmp_path / "c", 0) == []
    check_whole(corpus)
    build(corpus)
    assert corpora.listing(corpus) == undisturbed


def limited(path: str, max_bytes: int) -> None:
    """Build where no file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    with contextlib.suppress(StoreError, OSError):
        build(open_store(path))


@pytest.mark.parametrize("max_bytes", [0, 100, 3000, 9000])
def test_files_that_may_not_grow_are_not_published_short(
    tmp_path: Path, max_bytes: int, undisturbed: dict[str, int]
) -> None:
    path = tmp_path / "c"
    assert run(limited, str(path), max_bytes) == 0
    corpus = open_store(str(path))
    assert all(size == undisturbed[key] for key, size in corpora.listing(corpus).items())
    assert folder.leftovers(path, 0) == []
    build(corpus)
    assert corpora.listing(corpus) == undisturbed


@contextlib.contextmanager
def small_disk(folder: Path, size_kib: int) -> Iterator[Path]:
    """Mount a file system of so many KiB at a new folder; the test is skipped where that is not allowed."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if os.geteuid() != 0 or mount is None or umount is None:
        pytest.skip("a small file system needs root")
    folder.mkdir()
    command = [mount, "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this system mounts no tmpfs")
    try:
        yield folder
    finally:
        subprocess.run([umount, str(folder)], check=True)


def test_a_full_disk_publishes_nothing_short_and_a_larger_one_finishes(
    tmp_path: Path, undisturbed: dict[str, int]
) -> None:
    with small_disk(tmp_path / "disk", 40) as disk:
        for size_kib in range(40, 200, 12):
            subprocess.run(["mount", "-o", f"remount,size={size_kib}k", str(disk)], check=True)
            corpus = open_store(str(disk / "c"))
            said = "No space left"
            try:
                build(corpus)
            except StoreError as error:
                said = str(error)
            assert "No space left" in said
            check_whole(corpus)
            assert all(size == undisturbed[key] for key, size in corpora.listing(corpus).items())
            assert folder.leftovers(disk, 0) == []
            if corpora.listing(corpus) == undisturbed:
                assert size_kib > 40, "the disk was never full"
                return
        raise AssertionError("it never finished")


@pytest.mark.parametrize("damage", ["planes", "views", "twice"])
def test_results_that_cannot_be_written_publish_nothing_and_name_the_sample(any_store: Store, damage: str) -> None:
    plan = corpora.freeze(any_store)
    results = corpora.results_of(plan.shards[0])
    good = results["ball-2"]
    assert isinstance(good, Sample)
    views = list(good.views)
    if damage == "planes":
        views[1] = View(index=1, camera=views[1].camera, planes={"depth": views[1].planes["rgba"]})
    elif damage == "views":
        views.pop(0)
    else:
        results["ball-0"] = replace(good, asset=good.asset)
    results["ball-2"] = replace(good, views=tuple(views))
    named = rf"shard 0 of plan {plan.shards[0].plan_id[:16]} \('ball-0' to 'ball-2'\): .*ball-2"
    with pytest.raises(SampleError, match=named.replace("('", "(objects '")):
        corpora.commit(any_store, plan.shards[0], results)
    assert [key.split("/")[0] for key in corpora.listing(any_store)] == ["plans"]


@pytest.mark.parametrize("what", ["commit", "publish"])
def test_a_full_scratch_folder_is_named_and_nothing_is_published(tmp_path: Path, what: str) -> None:
    corpus = open_store(str(tmp_path / "c"))
    plan = corpora.freeze(corpus)
    if what == "publish":
        for one in plan.shards:
            corpora.commit(corpus, one)
    before = corpora.listing(corpus)
    with small_disk(tmp_path / "scratch", 4) as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        with pytest.raises(StoreError, match=f"{scratch}.*(No space left|[Ee]rrno 28)"):
            corpora.commit(corpus, plan.shards[0]) if what == "commit" else version.publish(corpus, [plan])
        assert list(scratch.iterdir()) == []
    assert corpora.listing(corpus) == before


def test_an_interrupt_in_the_middle_of_a_tar_removes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_store(str(tmp_path / "c"))
    plan = corpora.freeze(corpus)
    real, count = shard._pack, iter(range(100))

    def interrupted(*arguments: Any) -> Any:
        if next(count) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(shard, "_pack", interrupted)
    (tmp_path / "scratch").mkdir()
    with pytest.raises(KeyboardInterrupt):
        receipt.commit_shard(corpus, plan.shards[0], corpora.results_of(plan.shards[0]), tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
    assert [key.split("/")[0] for key in corpora.listing(corpus)] == ["plans"]
