"""What the driver makes of its nodes: whether they agree, what fits on them, what is late, what must wait."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import OutOfMemoryError, RayError, WorkerCrashedError

from jobs import driver as driving
from jobs import nodes
from jobs.driver import LATE_AFTER_LOSS_S, LATE_S, Driver, _OpenShard, _Result, _Task
from jobs.nodes import MAX_CLOCK_SKEW_S, NodeFacts, agree, count_slots, difference, own_share, require_slots, skew
from pipeline import plan as plans
from pipeline.plan import parse_shards
from pipeline.spec import DatasetSpec, LimitSpec, ProceduralSource, WorkerSpec
from pipeline.types import UserError
from tests.conftest import make_asset

GB = 2**30


def facts(clock_s: float = 0.0, **versions: str) -> NodeFacts:
    return NodeFacts(host="w1", versions=versions, clock_s=clock_s)


def test_a_node_that_agrees_says_nothing_and_one_that_differs_is_named_with_what_differs() -> None:
    assert difference({"bpy": "4.5.15"}, facts(bpy="4.5.15", extra="1"), "w1 (10.0.0.1)") is None
    line = difference({"Python": "3.11.7", "bpy": "4.5.15"}, facts(Python="3.11.7"), "w1 (10.0.0.1)")
    assert line is not None
    assert line.startswith("node w1 (10.0.0.1) does not agree with the driver: it has bpy none instead of 4.5.15;")
    assert "Python" not in line


def test_this_process_agrees_with_itself_and_not_with_another_blender() -> None:
    here = nodes.versions()
    assert set(here) >= {"Python", "bpy", "WebP encoder", "project code"}
    agree(here)
    agree({})
    with pytest.raises(UserError, match=f"node {socket.gethostname()} does not agree .* bpy .* instead of 0.0"):
        agree(here | {"bpy": "0.0"})


def test_the_code_digest_sees_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("jobs", "pipeline", "render"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(nodes, "_ROOT", tmp_path)
    before = nodes._code_digest()
    (tmp_path / "render/a.py").write_text("x = 2\n")
    changed = nodes._code_digest()
    (tmp_path / "render/a.py").rename(tmp_path / "render/b.py")
    assert len({before, changed, nodes._code_digest()}) == 3


@given(off=st.floats(-1e6, 1e6), took=st.floats(0, 100), at=st.floats(0, 1))
def test_a_clock_is_judged_by_what_the_answer_took_at_most(off: float, took: float, at: float) -> None:
    asked = 1_700_000_000.0
    line = skew(facts(asked + at * took + off), asked, asked + took, "w1")
    if abs(off) <= MAX_CLOCK_SKEW_S:
        assert line is None, "however long the answer took, a good clock is not blamed"
    if abs(off) > MAX_CLOCK_SKEW_S + took + 1:
        assert line is not None
        assert ("behind" if off < 0 else "ahead") in line


def test_memory_counts_among_what_fits() -> None:
    cluster = [{"CPU": 16.0, "memory": 10.0 * GB}, {"CPU": 4.0, "memory": 100.0 * GB}]
    assert count_slots(cluster, WorkerSpec(), 2 * GB) == 5 + 4
    with pytest.raises(UserError, match=r"no node has 204800 MB .* node is 102400 MB: lower workers.memory_bytes"):
        require_slots(cluster, WorkerSpec(), 200 * GB)


def test_a_task_reserves_what_the_spec_says_or_what_its_child_may_hold_at_most() -> None:
    def reserved(**given: Any) -> int:
        return DatasetSpec(name="m", source=ProceduralSource(), **given).task_memory_bytes

    assert reserved() == 2 * GB
    assert reserved(limits=LimitSpec(memory_bytes=GB)) == GB
    assert reserved(workers=WorkerSpec(memory_bytes=8 * GB)) == 8 * GB


def test_ray_of_our_own_takes_what_slurm_allotted() -> None:
    here = len(os.sched_getaffinity(0))
    assert own_share({}) == ({} if here == os.cpu_count() else {"num_cpus": here})
    share = own_share({"SLURM_CPUS_ON_NODE": "1", "SLURM_MEM_PER_NODE": "4096"})
    assert share["num_cpus"] == 1 or os.cpu_count() == 1
    assert share["_memory"] + share["object_store_memory"] == 4 * GB
    assert own_share({"SLURM_CPUS_ON_NODE": "1000"}) == own_share({})


@given(count=st.integers(1, 200), parts=st.integers(1, 50), data=st.data())
def test_parts_of_an_array_share_out_every_shard_once(count: int, parts: int, data: st.DataObject) -> None:
    chosen = data.draw(st.sampled_from(["all", "0", f"0-{count - 1}", f"0-{count // 2}"]))
    dealt = [parse_shards(f"{chosen}:{i}/{parts}", count) for i in range(parts)]
    assert sorted(index for part in dealt for index in part) == parse_shards(chosen, count)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.mark.parametrize("text", ["all:4/4", "all:", "all:1", "all:-1/4", "0-9:0/0", ":0/1", "all:0/2:0/2"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="SHARDS="):
        parse_shards(text, 4)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver with two open shards of four objects, without Ray: what it would send is kept in `sent`."""
    made: Any = object.__new__(Driver)
    spec = DatasetSpec(name="d", source=ProceduralSource(num_objects=8))
    frozen = plans.draft(
        spec.model_copy(update={"shards": spec.shards.model_copy(update={"objects_per_shard": 4})}), "f",
        [make_asset(f"ball-{i}") for i in range(8)], producer="p",
    )  # fmt: skip
    shards = [_OpenShard(plan=shard, waiting=list(reversed(shard.assets))) for shard in frozen.shards]
    made.spec, made.open = spec, {shard.plan.plan_id: shard for shard in shards}
    made.making, made.assembling, made.late = {}, {}, set()
    made.window, made.held_bytes, made.store_bytes, made.lost_s = 100, 0, 1000.0, -1e9
    made.lasted, made.stored, made.nodes = deque([1.0] * 10), deque([1.0] * 3), {"n"}
    made.losses, made.deaths, made.kinds = Counter(), Counter(), Counter()
    made.sent, made.is_joined, made.clocks, made.said_out_of_memory = [], True, set(), False
    made.watch = type("Watch", (), {"died": lambda *_: None, "retried": lambda *_: None})()
    made.recent_deaths = []

    def send(shard: _OpenShard, asset: Any, **more: Any) -> None:
        made.sent.append(asset.uid)
        made.making[object()] = _Task(shard, asset, object(), time.monotonic())

    monkeypatch.setattr(made, "_send", send)
    monkeypatch.setattr(made, "_assemble", lambda shard: made.sent.append(f"shard {shard.plan.index}"))
    monkeypatch.setattr(made, "bar", type("Bar", (), {"update": lambda *_: None})(), raising=False)
    return made  # type: ignore[no-any-return]


def test_a_full_store_lets_only_the_first_shard_go_on(driver: Any) -> None:
    driver.held_bytes = 1001
    driver._submit()
    assert driver.sent == ["ball-0", "ball-1", "ball-2", "ball-3"]
    driver.held_bytes = 999
    driver._submit()
    assert driver.sent[4:] == ["ball-4", "ball-5", "ball-6", "ball-7"]


def age(driver: Any, uid: str, seconds: float) -> None:
    for reference, task in list(driver.making.items()):
        if task.asset.uid == uid:
            driver.making[reference] = _Task(task.shard, task.asset, task.reference, time.monotonic() - seconds)


def test_what_is_late_is_sent_once_more_and_gives_up_its_place(driver: Any) -> None:
    driver.window = 2
    driver._submit()
    assert driver.sent == ["ball-0", "ball-1"]
    age(driver, "ball-0", LATE_S - 1)
    driver._find_late()
    assert driver.sent == ["ball-0", "ball-1"], "four times the usual, but not a minute yet"
    age(driver, "ball-0", LATE_S + 1)
    driver._find_late()
    driver._find_late()
    assert driver.sent == ["ball-0", "ball-1", "ball-0"], "once, as long as the second is on time"
    age(driver, "ball-1", LATE_S + 1)
    driver._find_late()
    driver._submit()
    assert driver.sent[3:] == ["ball-1"], "the copies fill the window"
    for _ in range(5):
        age(driver, "ball-0", LATE_S + 1)
        driver._find_late()
    assert driver.sent.count("ball-0") == driving.MAX_COPIES


def test_after_the_loss_of_a_node_patience_is_short(driver: Any) -> None:
    driver._submit()
    age(driver, "ball-2", LATE_AFTER_LOSS_S + 1)
    driver._find_late()
    assert driver.sent.count("ball-2") == 1
    driver.lost_s = time.monotonic()
    driver._find_late()
    assert driver.sent.count("ball-2") == 2


def die(driver: Any, error: RayError) -> None:
    reference, task = next((ref, one) for ref, one in driver.making.items() if one.asset.uid == "ball-0")
    del driver.making[reference]
    driver._died(task, error)
    driver._submit()


def test_what_ray_ends_on_a_full_node_is_not_held_against_the_object(
    driver: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quarantined = []
    monkeypatch.setattr(driver, "_quarantine", lambda *told: quarantined.append((told[1].uid, told[3])))
    driver._submit()
    for _ in range(driving.MAX_NODE_LOSSES - 1):
        die(driver, OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node"))
    assert quarantined == [], "its newest task is ended, whoever filled the node"
    assert driver.sent.count("ball-0") == driving.MAX_NODE_LOSSES
    said = capsys.readouterr().err
    assert said.count("workers.memory_bytes") == 1, "said once"
    assert "2048 MiB" in said
    assert "8192 MiB (limits.memory_bytes)" in said
    die(driver, OutOfMemoryError("again"))
    assert quarantined == [("ball-0", driving.MAX_NODE_LOSSES)]


def test_a_worker_that_dies_of_itself_is_held_against_the_object(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantined = []
    monkeypatch.setattr(driver, "_quarantine", lambda *told: quarantined.append((told[1].uid, told[3])))
    driver._submit()
    for _ in range(driver.spec.limits.max_attempts):
        die(driver, WorkerCrashedError())
    assert quarantined == [("ball-0", driver.spec.limits.max_attempts)]


@pytest.mark.parametrize(("off_s", "word"), [(-60.0, "behind"), (60.0, "ahead of"), (0.0, None)])
def test_the_clock_of_a_node_that_came_later_is_looked_at(driver: Any, off_s: float, word: str | None) -> None:
    driver._submit()
    age(driver, "ball-0", 50.0)  # it lay in a queue: its clock may be any of these 50 s
    task = next(one for one in driver.making.values() if one.asset.uid == "ball-0")
    status = {"node_id": "late", "node": "w9", "clock_s": time.time() - (50.0 if off_s < 0 else 0.0) + off_s}
    if word is None:
        driver._check_clock(task, status)
        assert driver.clocks == {"late"}
        return
    with pytest.raises(UserError, match=rf"node w9: its clock is 60 s {word} the driver's"):
        driver._check_clock(task, status)
    driver.is_joined = False
    driver._check_clock(task, status)


def test_with_a_node_go_its_results_alone_and_small_ones_stay(driver: Any) -> None:
    driver._submit()
    shard = next(iter(driver.open.values()))
    big = driving.INLINE_BYTES
    for uid, node, size in (("ball-0", "n", big), ("ball-1", "gone", big), ("ball-2", "gone", 10)):
        shard.results[uid] = _Result(object(), node, size)
        driver.held_bytes += size
    driver._drop_lost(shard, {"n"})
    assert set(shard.results) == {"ball-0", "ball-2"}
    assert [asset.uid for asset in shard.waiting] == ["ball-1"]
    assert driver.held_bytes == big + 10


def test_where_ray_does_not_start_its_folder_goes_and_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        made.append(Path(options["_temp_dir"]))
        assert made[0].is_dir()
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/home/somebody/.ray")

    made = list[Path]()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(nodes.ray, "init", fail)
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(UserError, match=r"^Ray cannot start on this machine: .*Read-only .*/home/somebody/.ray'$"),
        nodes.ray_session(DatasetSpec(name="d", source=ProceduralSource())),
    ):
        raise AssertionError
    assert not made[0].exists()
    assert signal.getsignal(signal.SIGTERM) is before
