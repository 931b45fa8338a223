"""Photographs to shards: the supervised child, the job with its receipts, what may not be handed on, the checks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.build import build, freeze_plan
from jobs.check import check_captures
from jobs.ingest_worker import IngestWorker
from jobs.produce import Producer, close_worker, ingest_capture, producer_of
from lrm.train import train
from pipeline import redistribution, version
from pipeline.members import FileMember, OpenCapture
from pipeline.reader import VersionReader
from pipeline.receipt import commit_shard, load
from pipeline.report import write_report
from pipeline.sample import sample_metadata
from pipeline.sources import list_assets, open_captures
from pipeline.sources.mvimgnet import open_members
from pipeline.spec import (
    AdmissionSpec,
    CaptureSpec,
    ColmapSource,
    DatasetSpec,
    LimitSpec,
    MvimgnetSource,
    ProceduralSource,
    ShardSpec,
    SplitSpec,
    WorkerSpec,
)
from pipeline.store import open_store
from pipeline.types import Asset, AssetError, Failure, FailureKind, Sample, UserError
from render.process import scrubbed_environment
from tests.captures import Capture, make_capture, write_mvimgnet
from tests.conftest import SHARED
from tests.jobs import fakes
from tests.lrm.conftest import nano_config

ROOT = Path(__file__).resolve().parents[2]
FAKE = [sys.executable, "-P", "-s", str(Path(__file__).with_name("fake_ingest_child.py"))]


@pytest.fixture(scope="module")
def made() -> Capture:
    """A small capture, two seconds in the making."""
    return make_capture(num_frames=10, width=180, height=320, samples=1)


@pytest.fixture(scope="module")
def zips(made: Capture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five captures in a zip, their masks in another: two good, one without model, one without masks, one excluded."""
    root = tmp_path_factory.mktemp("zips")
    captures = {
        "0/0000000a": made,
        "0/0000000b": replace(made, models={}),
        "3/0000000c": replace(made, masks={}),
        "3/0000000d": made,
        "12/0000000e": replace(made, frames=dict(list(made.frames.items())[:9])),
    }
    write_mvimgnet(captures, root, layout="1.0", zipped=True)
    (root / "bad.txt").write_text("3/0000000d\n")
    return root


def spec_of(zips: Path, **changes: Any) -> DatasetSpec:
    values: dict[str, Any] = {
        "name": "photos",
        "source": MvimgnetSource(path=str(zips), masks=str(zips / "mask"), exclude_file=str(zips / "bad.txt")),
        "capture": CaptureSpec(resolution_px=64),
        "shards": ShardSpec(objects_per_shard=3),
        "split": SplitSpec(heldout_per_mille=0),
    }
    return DatasetSpec(**(values | changes))


def build_here(spec: DatasetSpec, corpus: Path, scratch: Path, produce: Producer | None = None) -> None:
    """What the job does, in this process: Ray takes seconds to start."""
    store, make = open_store(str(corpus)), produce or producer_of(spec)[0]
    plan = freeze_plan(spec, store)
    for shard in plan.shards:
        results = {asset.uid: make(spec, plan.fingerprint, asset) for asset in shard.assets}
        commit_shard(store, shard, results, scratch)
    close_worker()


# The child and its supervisor


class OneFile:
    """A folder with one file, in memory."""

    url, is_remote = "memory", False

    def read(self, name: str, max_bytes: int) -> bytes:
        return b"x" * 3_000_000


def capture_of(uid: str) -> OpenCapture:
    member = FileMember(folder=OneFile(), name="a.jpg", num_bytes=3_000_000)  # type: ignore[arg-type]
    return open_members(uid, {"images/a.jpg": member}, 2**30)


def asset_of(uid: str) -> Asset:
    return Asset(uid=uid, source="colmap", uri="colmap:", format="capture")


MakeWorker = Callable[..., IngestWorker]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[MakeWorker]:
    made: list[IngestWorker] = []

    def make(**limits: Any) -> IngestWorker:
        spec = DatasetSpec(
            name="fake",
            source=ColmapSource(path="x"),
            capture=CaptureSpec(resolution_px=64),
            limits=LimitSpec(**limits),
        )
        made.append(IngestWorker(spec, fingerprint="f", scratch_dir=tmp_path / "scratch", child_command=FAKE))
        return made[-1]

    yield make
    for worker in made:
        worker.close()
    assert not list((tmp_path / "scratch").iterdir()), "a folder stayed behind"


def ingest(worker: IngestWorker, uid: str) -> Sample:
    return worker.ingest(asset_of(uid), capture_of(uid))


@pytest.mark.parametrize(
    ("uid", "kind", "words"),
    [
        ("crash", FailureKind.INGEST_CRASH, "signal SIGSEGV"),
        ("leave", FailureKind.INGEST_CRASH, "exit status 0"),
        ("garbage", FailureKind.INGEST_CRASH, "malformed reply"),
        ("huge", FailureKind.INGEST_CRASH, "payload of 2147483648"),
        ("stranger", FailureKind.INGEST_CRASH, "asked for member 1000000"),
        ("words", FailureKind.INGEST_CRASH, "asked for member '../../etc/passwd'"),
        ("viewless", FailureKind.BAD_VIEW_COUNT, "no view"),
        ("wrong_view", FailureKind.BAD_VIEW_COUNT, "view 3"),
        ("skewed", FailureKind.INGEST_CRASH, "not a rigid motion"),
        ("no_webp", FailureKind.INGEST_CRASH, "no webp file"),
        ("bad_kind", FailureKind.INGEST_CRASH, "unknown kind 'made_up'"),
        # What ends the run is believed only of a child with a hook, which may not be there.
        ("user", FailureKind.INGEST_CRASH, "unknown kind 'user'"),
        ("bad_scale", FailureKind.INGEST_CRASH, "scale -1"),
        ("missing", FailureKind.TOO_LARGE, "at most 1 are allowed"),
    ],
)
def test_a_misbehaving_child_gives_a_typed_failure_and_the_next_capture_is_read(
    fake: MakeWorker, uid: str, kind: FailureKind, words: str
) -> None:
    worker = fake()
    with pytest.raises(AssetError) as caught:
        ingest(worker, uid)
    assert caught.value.kind is kind
    assert words in caught.value.message
    if uid == "crash":
        assert "about to crash" in caught.value.log_tail
    assert len(ingest(worker, "good").views) == 1


@pytest.mark.parametrize(
    ("uid", "limits", "kind", "words"),
    [
        ("hang", {"silence_s": 0.6}, FailureKind.INGEST_TIMEOUT, "limits.silence_s"),
        ("deaf", {"silence_s": 0.6}, FailureKind.INGEST_TIMEOUT, "limits.silence_s"),
        ("chatter", {"deadline_s": 1.0}, FailureKind.INGEST_TIMEOUT, "limits.deadline_s"),
        ("bloat", {"memory_bytes": 2**28}, FailureKind.OUT_OF_MEMORY, "limits.memory_bytes"),
    ],
)
def test_a_child_beyond_its_limits_is_ended_in_time(
    fake: MakeWorker, uid: str, limits: dict[str, Any], kind: FailureKind, words: str
) -> None:
    worker, begun = fake(**limits), time.monotonic()
    with pytest.raises(AssetError) as caught:
        ingest(worker, uid)
    assert time.monotonic() - begun < 20
    assert caught.value.kind is kind
    assert words in caught.value.message


def test_the_child_has_no_secrets_and_ends_with_its_worker(fake: MakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    worker = fake()
    sample = ingest(worker, "good")
    assert "hunter2" not in json.dumps(sample.quality["environment"])
    assert "lrm-render" in sample.quality["cwd"]
    child = psutil.Process(sample.quality["pid"])
    worker.close()
    assert not child.is_running()


def test_the_driver_stays_free_of_pycolmap_which_takes_its_signals() -> None:
    code = "import sys, jobs.build, jobs.check; sys.exit('pycolmap' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_children_are_recycled(fake: MakeWorker) -> None:
    worker = fake(objects_per_child=2)
    pids = [ingest(worker, "good").quality["pid"] for _ in range(4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_the_real_child_leaves_the_network_and_gives_what_no_child_gives(zips: Path, tmp_path: Path) -> None:
    spec = spec_of(zips)
    source, asset = open_captures(spec), list_assets(spec)[0]
    with IngestWorker(spec, fingerprint="f", num_threads=1) as worker:
        sample = worker.ingest(asset, source.open_capture(asset))
    assert sample.provenance["sandbox"] == "strict: limits,user,net,ipc,pid,caps,landlock,seccomp"
    code = (
        "import sys, json\nfrom pipeline import mvimgnet, sample, sources, spec\n"
        "one = spec.DatasetSpec.model_validate_json(sys.stdin.read())\n"
        "source = sources.open_captures(one)\nasset = source.list_assets()[0]\nopened = source.open_capture(asset)\n"
        "made = mvimgnet.ingest(opened.files, asset, one, 'f')\n"
        "print(json.dumps([sample.sample_metadata(made), opened.reader.digest()]))\n"
    )
    # The same environment: kernels of BLAS that a variable chooses round otherwise.
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=spec.model_dump_json(),
        env=scrubbed_environment(tmp_path, 1),
        capture_output=True,
        text=True,
        check=True,
    )
    expected, digest = json.loads(done.stdout)
    assert sample.asset.sha256 == digest
    assert json.loads(json.dumps(sample_metadata(sample))) == expected | {"asset_sha256": digest}


SPY = """
import socket, sys
from pathlib import Path
where, port, image, mask = sys.argv[1:]
canary = where.removeprefix("at=")
def refused(act):
    try:
        act()
    except PermissionError:
        return True
    return False
sound = Path(image).stat().st_size > 1000
sound &= refused(lambda: Path(canary).read_text())
sound &= refused(lambda: Path(canary + ".cuckoo").write_text("x"))
sound &= refused(lambda: socket.create_connection(("127.0.0.1", int(port))))
sys.exit(3 if sound else 4)
"""


def test_a_command_for_masks_runs_behind_the_border_too(zips: Path, tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    script, canary = tmp_path / "hook" / "spy.py", tmp_path / "canary.txt"
    script.write_text(SPY)
    canary.write_text("a canary")
    with socket.create_server(("127.0.0.1", 0)) as ear:
        # A path by itself would be let in, as one that the command needs.
        command = f"{sys.executable} {script} at={canary} {ear.getsockname()[1]} {{image}} {{mask}}"
        spec = spec_of(zips, capture=CaptureSpec(resolution_px=64, mask_command=command))
        source = open_captures(spec)
        asset = next(one for one in list_assets(spec) if one.uid.endswith("0000000c"))
        with IngestWorker(spec, fingerprint="f", num_threads=1) as worker, pytest.raises(AssetError) as caught:
            worker.ingest(asset, source.open_capture(asset))
        ear.setblocking(False)
        with pytest.raises(BlockingIOError):
            ear.accept()
    assert caught.value.kind is FailureKind.NO_MASK
    assert "status 3" in caught.value.message, "the command saw, wrote or reached what it must not"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canary.txt", "hook"]


def test_more_cpus_a_task_give_the_same_bytes(zips: Path) -> None:
    made = []
    for num_cpus in (1, 2):
        spec = spec_of(zips, workers=WorkerSpec(num_cpus=num_cpus))
        source, asset = open_captures(spec), list_assets(spec)[0]
        with IngestWorker(spec, fingerprint="f") as worker:
            made.append(sample_metadata(worker.ingest(asset, source.open_capture(asset))))
    assert made[0] == made[1]


# The job


@pytest.fixture(scope="module")
def corpus(zips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zips, ingested on Ray."""
    folder = tmp_path_factory.mktemp("photos") / "corpus"
    summary = build(spec_of(zips), str(folder), show_progress=False)
    assert summary.accounted
    assert (summary.planned, summary.samples) == (5, 2)
    assert summary.failures == {"excluded": 1, "no_mask": 1, "no_model": 1}
    assert summary.shards_committed == 2
    return folder


def rows_of(corpus: Path) -> dict[str, dict[str, Any]]:
    store = open_store(str(corpus))
    plans = version.plan_sets(store)
    return {
        row["uid"]: row for plan in plans for one in plan.shards for row in load(store, one.plan_id).rows.to_pylist()
    }


def test_every_capture_has_a_row_that_tells_what_became_of_it(corpus: Path) -> None:
    rows = rows_of(corpus)
    kinds = {uid: row["failure_kind"] for uid, row in rows.items()}
    assert kinds == {
        "mvimgnet-0-0000000a": None,
        "mvimgnet-0-0000000b": "no_model",
        "mvimgnet-3-0000000c": "no_mask",
        "mvimgnet-3-0000000d": "excluded",
        "mvimgnet-12-0000000e": None,
    }
    assert {row["license"] for row in rows.values()} == {"MVImgNet-ToU"}
    good = rows["mvimgnet-0-0000000a"]
    assert good["num_views"] == 10
    assert len(good["asset_sha256"]) == 64
    assert good["asset_bytes"] > 10_000
    assert json.loads(good["quality"])["registered_share"] == 1.0
    assert json.loads(rows["mvimgnet-12-0000000e"]["quality"])["dropped"] == {"no_frame": 1}


def test_the_same_zips_give_the_same_shards(corpus: Path, zips: Path, tmp_path: Path) -> None:
    build_here(spec_of(zips), tmp_path / "again", tmp_path)
    first, again = ({path.name for path in (root / "shards").iterdir()} for root in (corpus, tmp_path / "again"))
    assert first == again


def test_the_shards_pass_the_independent_checker(corpus: Path) -> None:
    checker = SHARED / "tools" / "check_corpus.py"
    if not checker.is_file():
        pytest.skip("shared/tools is not present")
    shards = sorted(str(path) for path in (corpus / "shards").iterdir())
    done = subprocess.run([sys.executable, str(checker), *shards], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_worker_keeps_its_child_and_its_source(zips: Path) -> None:
    spec = spec_of(zips)
    fingerprint = spec.fingerprint(producer_of(spec)[1])
    results = [ingest_capture(spec, fingerprint, asset) for asset in list_assets(spec)]
    assert [type(one) for one in results] == [Sample, Failure, Failure, Failure, Sample]
    assert results[4].provenance["seconds"]["start"] < 0.05, "the child of the first was kept"
    close_worker()


# What may not be handed on


def test_a_version_with_mvimgnet_says_so_and_stays_out_of_public_stores(
    corpus: Path, zips: Path, tmp_path: Path
) -> None:
    store = open_store(str(corpus))
    published, _ = version.publish(store, version.plan_sets(store))
    assert published.record["redistributable"] is False
    with pytest.raises(UserError, match=f"version {published.number} may not be redistributed"):
        version.mark_public(store)
    assert not redistribution.is_public(store)
    (corpus / "public").write_text("")
    try:
        with pytest.raises(UserError, match=r"marked public.*MVImgNet-ToU") as caught:
            version.publish(store, version.plan_sets(store))
        assert "\n" not in str(caught.value)
    finally:
        (corpus / "public").unlink()
    (tmp_path / "public").write_text("")
    with pytest.raises(UserError, match="marked public"):
        build(spec_of(zips), str(tmp_path), show_progress=False)
    assert not any((tmp_path / name).exists() for name in ("plans", "shards", "receipts")), "not even a plan"


def test_other_corpora_may_be_public(tmp_path: Path) -> None:
    spec = DatasetSpec(name="balls", source=ProceduralSource(num_objects=2))
    build_here(spec, tmp_path / "c", tmp_path, fakes.produce)
    store = open_store(str(tmp_path / "c"))
    version.mark_public(store)
    published, _ = version.publish(store, version.plan_sets(store))
    assert published.record["redistributable"] is True


# Both kinds in one version


def test_one_version_mixes_renders_and_photos_and_trains(zips: Path, tmp_path: Path) -> None:
    mixed = str(tmp_path / "mixed")
    balls = DatasetSpec(name="balls", source=ProceduralSource(num_objects=3), split=SplitSpec(heldout_per_mille=0))
    build_here(balls, tmp_path / "mixed", tmp_path, fakes.produce)
    build_here(spec_of(zips), tmp_path / "mixed", tmp_path)
    store = open_store(mixed)
    published, _ = version.publish(store, version.plan_sets(store))
    assert published.counts["sources"] == {"mvimgnet": 2, "procedural": 3}
    assert published.record["redistributable"] is False
    result = train(nano_config("train.steps=6"), mixed, None, tmp_path / "run")
    assert result.step == 6
    page = write_report(VersionReader.open(mixed), tmp_path / "report").read_text()
    assert "MVImgNet-ToU" in page
    assert "photographs" in page


# The checks alone


def test_checks_tell_and_show_what_is_rejected_and_write_no_shard(zips: Path, made: Capture, tmp_path: Path) -> None:
    spec = spec_of(zips, admission=AdmissionSpec(min_frames=10))
    checks, page = check_captures(spec, tmp_path / "out", num_workers=1, show_progress=False)
    assert {check.uid: check.kind for check in checks} == {
        "mvimgnet-0-0000000a": "accepted",
        "mvimgnet-0-0000000b": "no_model",
        "mvimgnet-3-0000000c": "no_mask",
        "mvimgnet-3-0000000d": "excluded",
        "mvimgnet-12-0000000e": "too_few_frames",
    }
    record = json.loads((tmp_path / "out" / "checks.json").read_text())
    assert record["accepted"] == 1
    assert record["rejects"] == {"excluded": 1, "no_mask": 1, "no_model": 1, "too_few_frames": 1}
    assert record["checks"][0]["figures"]["num_good_frames"] == 10
    shown = {path.name for path in (tmp_path / "out").iterdir()}
    sheets = {f"{kind}.png" for kind in ("accepted", "no_model", "no_mask", "too_few_frames")}
    assert shown == {"checks.html", "checks.json", "rejects.png"} | sheets
    text = page.read_text()
    assert text.count("<img") == 5
    assert "mvimgnet-3-0000000d" in text


# The command line


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_verbs_are_told_apart_in_one_line(tmp_path: Path) -> None:
    cases = (("render", "mvimgnet", "ingest"), ("ingest", "demo", "render"), ("check-captures", "demo", "render"))
    for verb, file, other in cases:
        where = ["--out", str(tmp_path)] if verb == "check-captures" else ["--corpus", str(tmp_path / "c")]
        done = cli(verb, "--spec", f"jobs/specs/{file}.toml", *where)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"`make {other}" in done.stderr
        assert not (tmp_path / "c").exists()
    done = cli("ingest", "--spec", "jobs/specs/mvimgnet.toml", "--corpus", str(tmp_path / "c"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "source.path 'mvimgnet' does not exist" in done.stderr


def test_shared_captures_end_as_they_should_from_the_command_line(tmp_path: Path) -> None:
    captures = SHARED / "captures"
    if not captures.is_dir():
        pytest.skip("shared/captures is not present")
    settings = [f"source.path={captures}", "capture.resolution_px=128"]
    command = ["ingest", "--spec", "jobs/specs/colmap.toml", "--corpus", str(tmp_path / "c"), "--json"]
    done = cli(*command, *(part for one in settings for part in ("--set", one)))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert (summary["planned"], summary["samples"]) == (3, 1)
    assert summary["failures"] == {"no_mask": 1, "no_model": 1}
