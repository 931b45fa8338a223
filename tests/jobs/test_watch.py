"""Rules that stop or pause a run, structured logs, and the metrics that Ray exports."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jobs import guard, logs, runs, watch
from jobs import produce as produce_module
from jobs.build import build
from jobs.guard import DiskGuard, FailureGuard, RunStoppedError
from jobs.metrics import COUNTERS, GAUGES
from jobs.status import corpus_status
from pipeline import version
from pipeline.receipt import load
from pipeline.spec import DatasetSpec
from pipeline.store import StoreError, open_store
from pipeline.types import Asset, Failure, Sample, UserError
from render import worker as render_worker
from render.supervisor import FullDiskError
from tests import corpora
from tests.conftest import make_asset
from tests.jobs import fakes
from tests.jobs.test_build import make_spec, wait_for

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "jobs" / "cluster" / "grafana"
KINDS = st.sampled_from([None, None, "network", "empty_scene", "licence_excluded"])


def with_workers(spec: DatasetSpec, **changes: object) -> DatasetSpec:
    return spec.model_copy(update={"workers": spec.workers.model_copy(update=changes)})


# Too many failures.


@given(st.lists(KINDS, max_size=60), st.integers(2, 10), st.floats(0.1, 1.0))
def test_the_share_of_the_last_objects_decides(kinds: list[str | None], window: int, limit: float) -> None:
    guard, counted = FailureGuard(limit, window), list[str | None]()
    for kind in kinds:
        if kind != "licence_excluded":
            counted.append(kind)
        last = counted[-window:]
        failed = sum(one is not None for one in last)
        if kind != "licence_excluded" and len(last) == window and failed / window > limit:
            with pytest.raises(RunStoppedError) as caught:
                guard.saw(kind)
            assert f"{failed} of the last {window}" in str(caught.value)
            return
        guard.saw(kind)
        assert guard.share == pytest.approx(failed / len(last) if last else 0.0)


def test_a_run_that_mostly_fails_stops_with_a_reason_and_goes_on_when_asked(tmp_path: Path) -> None:
    corpus = str(tmp_path / "c")
    spec = with_workers(make_spec(40, 4), failure_window=10, max_failure_share=0.6)
    with pytest.raises(
        RunStoppedError, match=r"of the last 10 objects failed \(network \d+\).*max_failure_share = 0.6"
    ):
        build(spec, corpus, produce=fakes.produce_offline_from_12, show_progress=False)
    store = open_store(corpus)
    found = corpus_status(store)
    (plan,) = found["plans"]
    assert plan["samples"] >= 4, "what was good stays; a shard that was being assembled may not"
    assert plan["open"] >= 16, "it stopped early"
    (run,) = found["runs"]
    assert run["state"] == "stopped"
    assert "network" in run["reason"]
    mended = build(spec, corpus, produce=fakes.produce, show_progress=False)
    assert mended.accounted
    assert corpus_status(store)["runs"] == []
    assert mended.failures.get("network", 0) <= 8, "open shards of failures were made again"


# Disks.


def test_a_full_disk_is_named_and_waited_for(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert DiskGuard([tmp_path], 0).full() == ""
    assert DiskGuard([tmp_path / "not" / "there" / "yet"], free // 2).full() == ""
    found = DiskGuard([tmp_path], 2 * free + 2**40).full()
    assert str(tmp_path) in found
    assert "workers.min_free_bytes" in found


def test_a_task_gives_its_object_back_where_its_node_has_no_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(watch, "ROOM_WAIT_S", 0.1)
    monkeypatch.setattr(guard, "POLL_S", 0.05)
    monkeypatch.setattr(guard, "LOOK_S", 0.05)
    asset = make_asset("procedural-1")
    none = with_workers(make_spec(), min_free_bytes=2**60)
    told, result = watch.watched(fakes.produce, none, "f", asset)
    assert result is None
    assert "workers.min_free_bytes" in told["full"]
    told, result = watch.watched(fakes.produce, with_workers(none, min_free_bytes=0), "f", asset)
    assert result is not None
    assert "full" not in told
    assert result.provenance["trace"] == logs.trace_of("f", asset.uid)
    assert told["bytes"] == sum(len(p.data) for view in result.views for p in view.planes.values())  # type: ignore[union-attr]


def test_a_node_that_waits_for_room_is_counted_for_whoever_is_on_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gauges: dict[str, float] = {}

    def noted(name: str, value: float, **labels: str) -> None:
        gauges[name] = value

    monkeypatch.setattr(watch, "RunMetrics", type("Noted", (), {"set": staticmethod(noted)}))
    monkeypatch.setattr(watch, "TICK_S", 0.0)
    store = open_store(corpora.memory_url())
    one = watch.Watch(make_spec(), store, [], planned=9, done=0, nodes=["n1", "n2"], plan_sets=[])
    for told, waiting in (({"full": "/tmp has 1 MiB free"}, 1), ({"full": "/tmp has 1 MiB free"}, 1), ({}, 0)):
        assert one.full({"node": "n1"} | told) is bool(told)
        assert one.tick([], making=1, assembling=0, to_come=0), "others go on"
        assert (gauges["lrm_nodes_waiting"], gauges["lrm_paused"]) == (waiting, 0)
    assert capsys.readouterr().err.count("n1 waits: /tmp has 1 MiB free") == 1
    one.full({"node": "n2", "full": "/tmp has 1 MiB free"})
    monkeypatch.setattr(watch, "FORGET_S", 0.0)
    one.tick([], making=1, assembling=0, to_come=0)
    assert gauges["lrm_nodes_waiting"] == 0, "a node that has gone does not wait for ever"


def test_an_object_that_met_a_full_disk_is_made_elsewhere_or_later(tmp_path: Path) -> None:
    produce = functools.partial(fakes.produce_on_a_full_disk, 2, str(tmp_path / "tries"))
    (tmp_path / "tries").mkdir()
    summary = build(make_spec(6, 3), str(tmp_path / "c"), produce=produce, show_progress=False)
    assert summary.samples == 6
    assert not summary.failures
    assert len(list((tmp_path / "tries").iterdir())) == 2


def test_an_object_that_fills_every_disk_is_a_failure_where_disks_are_watched(tmp_path: Path) -> None:
    """Others find room as soon as its files are gone, so it is the one."""
    (tmp_path / "tries").mkdir()
    produce = functools.partial(fakes.produce_on_a_full_disk, 99, str(tmp_path / "tries"))
    summary = build(make_spec(6, 3), str(tmp_path / "c"), produce=produce, show_progress=False)
    assert (summary.samples, dict(summary.failures)) == (5, {"too_large": 1})
    told = corpus_status(open_store(str(tmp_path / "c")))["plans"][0]
    assert told["failed_lately"] == {"too_large": ["procedural-1"]}


def test_where_no_disk_is_watched_an_object_that_meets_full_ones_ends_the_run(tmp_path: Path) -> None:
    produce = functools.partial(fakes.produce_on_a_full_disk, 99, str(tmp_path / "tries"))
    (tmp_path / "tries").mkdir()
    unwatched = with_workers(make_spec(6, 3), min_free_bytes=0)
    with pytest.raises(UserError, match=r"-1 met a full disk 3 times: /scratch: No space left .* free some"):
        build(unwatched, str(tmp_path / "c"), produce=produce, show_progress=False)
    produce = functools.partial(fakes.produce_on_a_full_disk, 3, str(tmp_path / "tries"))
    assert build(make_spec(6, 3), str(tmp_path / "c"), produce=produce, show_progress=False).accounted


def test_an_object_that_met_a_full_disk_lets_the_others_of_its_shard_go_first(tmp_path: Path) -> None:
    """The next try would meet the same disk: three in a row end the run within seconds."""
    for name in ("tries", "full"):
        (tmp_path / name).mkdir()
    produce = functools.partial(fakes.produce_noting_full_disks, str(tmp_path / "tries"))
    assert build(make_spec(20, 20), str(tmp_path / "c"), produce=produce, show_progress=False).samples == 20
    tries = sorted((path.stat().st_mtime_ns, path.read_text()) for path in (tmp_path / "tries").iterdir())
    assert [place for place, (_, uid) in enumerate(tries) if uid == "procedural-1"][1:] >= [17], "of 21"


def test_a_disk_that_others_have_filled_is_not_held_against_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may meet one as often as it likes: the guard makes its node wait."""
    monkeypatch.setattr(guard, "LOOK_S", 0.0)
    found = [""]
    monkeypatch.setattr(DiskGuard, "_look", lambda _: found[0])

    def produce(after: str, spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
        found[0] = after
        raise FullDiskError("no room")

    for after, suspect in (("/tmp has 1 MiB free", False), ("", True)):
        found[0] = ""
        told, result = watch.watched(functools.partial(produce, after), make_spec(), "f", make_asset("procedural-1"))
        assert result is None
        assert told["suspect"] is suspect


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 96 MiB; the test is skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "lrm-test", str(place)], capture_output=True, check=False
    ).returncode:  # fmt: skip
        pytest.skip("needs root and the right to mount a tmpfs")
    return place


def test_what_an_object_filled_a_disk_with_goes_with_it(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its node would wait for ever for room that the worker itself takes."""
    for module, name, seconds in ((watch, "ROOM_WAIT_S", 1.0), (guard, "POLL_S", 0.05), (guard, "LOOK_S", 0.05)):
        monkeypatch.setattr(module, name, seconds)
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    command = [sys.executable, "-P", "-s", str(fakes.FAKE_CHILD)]
    monkeypatch.setattr(render_worker, "default_command", lambda: command)
    spec = with_workers(make_spec(), min_free_bytes=16 * 2**20)

    def attempt(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample:
        (small_disk / f"{asset.uid}.glb").touch()
        path = small_disk / f"{asset.uid}.glb"  # its name is what the child does
        one = replace(asset, uri=str(path), format="glb")
        return produce_module._worker(render_worker.RenderWorker, spec, fingerprint).render(one, path)

    try:
        results = []
        for uid in ("good", "fill", "good"):
            told, result = watch.watched(functools.partial(produce_module._try, attempt), spec, "f", make_asset(uid))
            results.append((result is not None, told.get("suspect")))
        assert results == [(True, None), (False, True), (True, None)]
    finally:
        produce_module.close_worker()
        subprocess.run(["umount", "-l", str(small_disk)], check=True)


def test_a_shard_whose_node_has_no_room_waits_and_is_stored(small_disk: Path, tmp_path: Path) -> None:
    """A run of a thousand nodes must not end because somebody fills the disk of one for a minute."""
    ballast, corpus = small_disk / "ballast", tmp_path / "c"
    command = [
        sys.executable, "-c",
        "from jobs.build import build; from tests.jobs import fakes; from tests.jobs.test_build import make_spec\n"
        "from tests.jobs.test_watch import with_workers\n"
        f"spec = with_workers(make_spec(2, 2), min_free_bytes={24 * 2**20})\n"
        f"build(spec, {str(corpus)!r}, produce=fakes.produce_and_fill, show_progress=False)",
    ]  # fmt: skip
    environment = os.environ | {"TMPDIR": str(small_disk), "LRM_TEST_BALLAST": str(ballast)}
    try:
        run = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)
        assert run.stderr is not None
        while not (line := run.stderr.readline()).startswith("shard 0 waits: "):
            assert line, "the run ended"
        assert "MiB are wanted (workers.min_free_bytes)" in line
        assert not (corpus / "receipts").exists()
        ballast.unlink()
        said = run.communicate(timeout=120)[1]
        assert run.returncode == 0, said
        assert len(list((corpus / "receipts").iterdir())) == 1
    finally:
        run.kill()
        run.wait()
        subprocess.run(["umount", "-l", str(small_disk)], check=True)


def test_a_tar_that_finds_no_room_waits_if_others_took_it_and_is_an_error_if_not(
    monkeypatch: pytest.MonkeyPatch, small_disk: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(guard, "LOOK_S", 0.0)
    monkeypatch.setattr(watch, "ROOM_WAIT_S", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    store = open_store(str(tmp_path / "c"))
    shard = corpora.freeze(store).shards[0]
    spec = with_workers(make_spec(), min_free_bytes=2**20)
    real = watch.receipt.commit_shard

    def commit(*arguments: object) -> object:
        with contextlib.suppress(OSError):
            (small_disk / "ballast").write_bytes(bytes(2**27))
        return real(*arguments)  # type: ignore[arg-type]

    try:
        monkeypatch.setattr(watch.receipt, "commit_shard", commit)
        with pytest.raises(FullDiskError, match=r"No space left .* free some"):
            watch.assembled(spec, store, shard, corpora.results_of(shard))
        with pytest.raises(FullDiskError, match=r"workers\.min_free_bytes"):
            watch.assembled(spec, store, shard, corpora.results_of(shard))
        with pytest.raises(StoreError, match="its tar could not be written"):
            watch.assembled(with_workers(spec, min_free_bytes=0), store, shard, corpora.results_of(shard))
        (small_disk / "ballast").unlink()
        monkeypatch.setattr(watch.receipt, "commit_shard", real)
        assert watch.assembled(spec, store, shard, corpora.results_of(shard)).samples == 2
        assert list(small_disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(small_disk)], check=True)


def test_a_run_pauses_while_the_disk_of_its_corpus_is_full_and_then_goes_on(
    small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        ballast, corpus = small_disk / "ballast", small_disk / "c"
        ballast.write_bytes(bytes(64 * 2**20))
        spec = with_workers(make_spec(6, 3), min_free_bytes=48 * 2**20)
        store, seen = open_store(str(corpus)), list[runs.Run]()

        def make_room() -> None:
            wait_for(lambda: any(run.state == "paused" for run in runs.look(store)))
            seen.extend(runs.look(store))
            assert not (corpus / "receipts").exists()
            ballast.unlink()

        operator = threading.Thread(target=make_room)
        operator.start()
        assert build(spec, str(corpus), produce=fakes.produce, show_progress=False).accounted
        operator.join()
        assert "MiB free" in seen[0].reason
        said = capfd.readouterr().err
        assert said.index("paused: ") < said.index("goes on: there is room again")
    finally:
        subprocess.run(["umount", "-l", str(small_disk)], check=True)


# Structured logs.


def test_every_event_is_a_line_with_a_trace_that_leads_to_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRM_LOG", f"json:{tmp_path / 'log'}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    code = (
        "from jobs import logs\nlogs.setup()\n"
        "from jobs.build import build\nfrom tests.jobs import fakes\nfrom tests.jobs.test_build import make_spec\n"
        f"build(make_spec(7, 4), {str(tmp_path / 'c')!r}, produce=fakes.produce_talking, show_progress=False)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    text = "".join(path.read_text() for path in (tmp_path / "log").iterdir())
    assert "very-secret-value" not in text
    assert "***" in text
    lines = [json.loads(line) for line in text.splitlines()]
    counts = Counter(line["event"] for line in lines)
    assert counts == {
        "run_started": 1, "object_started": 7, "object_done": 6, "object_failed": 1, "shard_committed": 2,
        "run_ended": 1, "log": 7,
    }  # fmt: skip
    store = open_store(str(tmp_path / "c"))
    rows = [row for name in version.plan_sets(store)[0].plan_ids for row in load(store, name).rows.to_pylist()]
    traces = {row["uid"]: json.loads(row["provenance"])["trace"] for row in rows}
    assert {line["uid"]: line["trace"] for line in lines if line["event"] == "object_started"} == traces
    assert {line["trace"] for line in lines if line["event"] == "log"} == set(traces.values())


@given(st.text(max_size=50), st.text(alphabet="abcXYZ0189/+=", min_size=6, max_size=40))
def test_no_secret_is_in_a_line(before: str, secret: str) -> None:
    secret = f"s{secret}"
    os.environ["LRM_TEST_TOKEN"] = secret
    try:
        record = logging.LogRecord("jobs", logging.INFO, "", 0, "%s", (before + secret,), None)
        record.fields = {"url": f"https://user:{secret}@host/x?X-Amz-Signature={secret}", "more": [{"a": secret}]}
        line = logs.JsonFormatter().format(record)
        assert secret not in json.dumps(json.loads(line), ensure_ascii=False)
        assert "\n" not in line
    finally:
        del os.environ["LRM_TEST_TOKEN"]


def test_a_log_format_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_forms", [])
    monkeypatch.setenv("LRM_LOG", "xml")
    with pytest.raises(UserError, match="LRM_LOG=xml: use text, json"):
        logs.setup()


# Metrics.


def queries() -> list[str]:
    """Every query of the dashboard, for all sessions and any minute."""
    board = json.loads((GRAFANA / "lrm-corpus.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [text.replace("$session", ".*").replace("$__rate_interval", "2m") for text in found]


def alerts() -> list[str]:
    """Every expression of the alert rules."""
    rules = yaml.safe_load((GRAFANA / "alerts.yml").read_text())
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def series_of(texts: list[str]) -> set[str]:
    return {name for text in texts for name in re.findall(r"\bray_lrm_\w+", text)}


def test_the_dashboard_and_the_alerts_ask_for_what_is_exported() -> None:
    exported = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    assert series_of(queries() + alerts()) == exported - {"ray_lrm_shards_committed_total"}
