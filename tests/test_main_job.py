"""The main job as a user runs it: render, render again, publish, status, report, train, train again. Real Blender."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.receipt import load
from pipeline.store import open_store
from tests.conftest import SHARED

ROOT = Path(__file__).resolve().parents[1]
SPEC = """
name = "small"
[source]
kind = "procedural"
num_objects = 3
[render]
resolution_px = 64
num_views = 8
samples = 4
[shards]
objects_per_shard = 2
[split]
heldout_per_mille = 0
"""


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    value = json.loads(done.stdout.strip().splitlines()[-1])
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main")
    (folder / "spec.toml").write_text(SPEC)
    summary = last_json(render(folder / "corpus"))
    assert (summary["planned"], summary["samples"], summary["failures"]) == (3, 3, {})
    assert summary["shards"] == {"asked": 2, "done_before": 0, "committed": 2}
    cli("publish", "--corpus", str(folder / "corpus"))
    return folder / "corpus"


def render(corpus: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return cli("render", "--spec", str(corpus.parent / "spec.toml"), "--corpus", str(corpus), "--json", *more)


@pytest.mark.blender
def test_the_shards_pass_the_independent_checker(corpus: Path) -> None:
    checker = SHARED / "tools" / "check_corpus.py"
    if not checker.is_file():
        pytest.skip("shared/tools is not present")
    shards = sorted(str(path) for path in (corpus / "shards").iterdir())
    done = subprocess.run(
        [sys.executable, str(checker), "--preset", "lrm", "--views", "8", *shards],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["views"] == 24


@pytest.mark.blender
def test_a_deleted_receipt_renders_that_shard_again_with_the_same_bytes(corpus: Path) -> None:
    shards = {path.name: path.read_bytes() for path in (corpus / "shards").iterdir()}
    receipts = sorted((corpus / "receipts").iterdir())
    receipts[0].unlink()
    assert last_json(render(corpus))["shards"] == {"asked": 2, "done_before": 1, "committed": 1}
    assert {path.name: path.read_bytes() for path in (corpus / "shards").iterdir()} == shards
    again = render(corpus)
    assert last_json(again)["shards"] == {"asked": 2, "done_before": 2, "committed": 0}
    assert "nothing to do" in again.stderr
    assert "nothing changed" in cli("publish", "--corpus", str(corpus)).stderr


@pytest.mark.blender
def test_rows_tell_what_made_them(corpus: Path) -> None:
    rows = [
        row
        for path in (corpus / "receipts").iterdir()
        for row in load(open_store(str(corpus)), path.stem).rows.to_pylist()
    ]
    assert len(rows) == 3
    for row in rows:
        provenance = json.loads(row["provenance"])
        assert provenance["device"] == "CPU"
        assert provenance["blender"].startswith(("4.5.", "5.2."))
        assert (provenance["num_threads"], provenance["attempts"]) == (1, 1)
        assert {"worker", "seconds", "elapsed_s", "fetched_at", "finished_at"} <= set(provenance)
        assert 0 <= provenance["seconds"]["fetch"] < provenance["seconds"]["total"] <= provenance["elapsed_s"]
        assert row["asset_sha256"] is not None
        views = json.loads(row["quality"])["views"]
        assert views["samples"] == [4] * 8, "as the spec fixes them"
        assert "half_psnr_db" not in views, "nothing is estimated where nothing is aimed at"


@pytest.mark.blender
def test_status_and_report_show_the_corpus(corpus: Path, tmp_path: Path) -> None:
    status = last_json(cli("status", "--corpus", str(corpus), "--json"))
    assert status["plans"][0]["samples"] == 3  # type: ignore[index]
    cli("report", "--corpus", str(corpus), "--out", str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    for name in ("contact_sheet.png", "cameras.png"):
        assert (tmp_path / name).stat().st_size > 5000
        assert name in page


@pytest.mark.blender
def test_a_training_run_streams_the_version_and_goes_on_where_it_was(corpus: Path, tmp_path: Path) -> None:
    arguments = ["train", "--corpus", str(corpus), "--out", str(tmp_path / "train")]
    for setting in ("train.steps=4", "train.checkpoint_every_steps=2", "train.log_every_steps=1"):
        arguments += ["--set", setting]
    cli(*arguments)
    metrics = tmp_path / "train" / "metrics.jsonl"
    first = metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in first] == [1, 2, 3, 4]
    again = cli(*arguments)
    assert metrics.read_text().splitlines() == first
    assert "4 steps" in again.stderr
