"""Mistakes of the user's end in one clear line, exit status 2, no traceback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.reader import VersionReader
from pipeline.spec import load_spec
from pipeline.store import open_store
from pipeline.types import UserError
from tests import corpora

ROOT = Path(__file__).resolve().parents[2]
GOOD = 'name = "x"\n[source]\nkind = "procedural"\nnum_objects = 4\n[shards]\nobjects_per_shard = 2\n'


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(GOOD)
    return path


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_package_that_is_not_installed_is_named_with_what_brings_it(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['torch'] = None; from jobs.cli import main; main()"
    command = [sys.executable, "-c", hide, "train", "--corpus", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    refused(done, "needs the package torch", "lrm-corpus[train]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "colour = 1\n", ["shards.colour", "unknown key"]),
        (GOOD + "[render]\nsamples = 0\n", ["render.samples", "0"]),
        ('name = "x"\n[source]\nkind = "directory"\npath = "/nowhere/models"\n', ["/nowhere/models"]),
        ('name = "x"\n[source]\nkind = "web"\n', ["web", "procedural"]),
        ("name = \n", ["not valid TOML"]),
    ],
)
def test_a_bad_spec_is_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    refused(run("render", "--spec", str(path), "--corpus", str(tmp_path / "c")), *words)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "specs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_spec_of_the_folder_is_one_with_its_commented_keys_too(tmp_path: Path, path: Path) -> None:
    assert load_spec(path).name == path.stem
    keys = re.sub(r"^# (?=\[|\w+ = )", "", path.read_text(), flags=re.MULTILINE)
    (tmp_path / "all.toml").write_text(keys)
    assert load_spec(tmp_path / "all.toml").name == path.stem


def test_a_missing_spec_is_one_line(tmp_path: Path) -> None:
    refused(run("render", "--spec", "nowhere.toml", "--corpus", str(tmp_path / "c")), "nowhere.toml", "no such file")


@pytest.mark.parametrize(("shards", "word"), [("9-2", "backwards"), ("7", "out of range"), ("one", "'one'")])
def test_a_bad_shard_list_is_one_line(tmp_path: Path, spec: Path, shards: str, word: str) -> None:
    refused(run("render", "--spec", str(spec), "--corpus", str(tmp_path / "c"), "--shards", shards), word, "SHARDS=")


def test_an_unreachable_store_is_one_line(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    done = run("render", "--spec", str(spec), "--corpus", "s3://bucket/corpus")
    refused(done, "s3://bucket/corpus", "check the URL")
    assert "very-secret" not in done.stderr


def test_a_read_only_folder_is_one_line(tmp_path: Path, spec: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run("render", "--spec", str(spec), "--corpus", str(tmp_path / "file")), "is not a folder")


def test_reading_verbs_name_a_missing_corpus(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    for verb in ("status", "publish"):
        refused(run(verb, "--corpus", missing), missing, "does not exist")
    assert not (tmp_path / "missing").exists()


def test_publishing_nothing_is_one_line(tmp_path: Path) -> None:
    refused(run("publish", "--corpus", str(tmp_path)), "no plan")


def test_a_corpus_of_another_schema_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "000001.json").write_text('{"schema": 7}')
    refused(run("report", "--corpus", str(tmp_path), "--out", str(tmp_path / "out")), "schema 7", "reads schema 1")


def test_help_lists_the_verbs() -> None:
    text = run("--help").stdout
    assert all(verb in text for verb in ("render", "publish", "status", "report", "train", "demo"))
    made = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {verb}" in made for verb in ("demo", "render", "publish", "status", "train", "test"))


@pytest.mark.parametrize(
    ("verb", "example"),
    [
        ("render", "render.samples"), ("train", "train.steps"), ("learn", "train.steps"), ("evaluate", "max_objects"),
        ("infer", "resolution"), ("status", "workers.price_per_cpu_hour"),
    ],
)  # fmt: skip
def test_help_names_a_setting_that_the_verb_takes(verb: str, example: str) -> None:
    assert example in run(verb, "--help").stdout


@pytest.mark.parametrize("verb", ["render", "ingest"])
def test_a_plan_is_handed_on_by_make(verb: str) -> None:
    command = ["make", "-n", "-o", ".venv/.ready", verb, "PLAN=delta-f-000001"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--plan 'delta-f-000001'" in told


def test_an_array_of_jobs_hands_on_plan_part_and_settings(tmp_path: Path) -> None:
    said = tmp_path / "python"
    said.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    said.chmod(0o755)
    asked = {
        "SPEC": "a spec.toml", "CORPUS": "s3://bucket/a", "PLAN": "delta-f-000001", "SET": "render.samples=8 a.b=1",
        "PYTHON": str(said), "PROJECT": str(tmp_path), "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "64",
    }  # fmt: skip
    script = ["bash", str(ROOT / "jobs" / "cluster" / "slurm" / "array.sbatch")]
    words = subprocess.run(script, env=os.environ | asked, capture_output=True, text=True, check=True).stdout
    assert words.splitlines() == [
        "-m", "jobs.cli", "render", "--spec", "a spec.toml", "--corpus", "s3://bucket/a", "--shards", "all:2/64",
        "--plan", "delta-f-000001", "--set", "render.samples=8", "--set", "a.b=1", "--json",
    ]  # fmt: skip
    without = asked | {"PLAN": "", "SET": ""}
    words = subprocess.run(script, env=os.environ | without, capture_output=True, text=True, check=True).stdout
    assert words.splitlines()[-3:] == ["--shards", "all:2/64", "--json"]


def test_workers_without_a_cluster_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    corpora.freeze(open_store(str(tmp_path / "corpus")))
    places = ["--corpus", str(tmp_path / "corpus"), "--out", str(tmp_path / "out")]
    refused(run("train", *places, "--workers", "2"), "WORKERS=2", "RAY_ADDRESS", "torchrun --nproc-per-node 2")


def test_a_retry_under_other_settings_is_one_line(tmp_path: Path, spec: Path) -> None:
    corpora.freeze(open_store(str(tmp_path / "corpus")))
    refused(
        run("retry", "--spec", str(spec), "--corpus", str(tmp_path / "corpus"), "--kind", "network"), "no plan here"
    )


def test_a_version_by_another_name_than_a_number_is_one_line(tmp_path: Path) -> None:
    latest: Any = "latest"
    with pytest.raises(UserError, match="version 'latest' is a text; give a number, or None"):
        VersionReader.open(str(tmp_path), latest)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_said_and_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(GOOD.replace("num_objects = 4", "num_objects = 40"))
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "render", "--spec", str(spec), "--corpus", str(tmp_path / "c")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert driver.stderr is not None
    said = b""
    try:
        while b"objects:" not in said:  # the bar stands once Ray does
            said += (piece := driver.stderr.read1(1000))  # type: ignore[attr-defined]
            assert piece, said
        time.sleep(3)
        tree = psutil.Process(driver.pid).children(recursive=True)
        begun = time.monotonic()
        driver.send_signal(number)
        said = driver.communicate(timeout=30)[1]
        assert time.monotonic() - begun < 10
    finally:
        driver.terminate()  # a run that goes on would take the cores from all that follows
    assert driver.returncode == 130, said
    assert b"interrupted: committed shards" in said
    assert b"Traceback" not in said
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not alive, [process.name() for process in alive]


def test_damage_and_bad_folders_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "x.parquet").write_bytes(b"PAR1 nothing PAR1")
    for verb in ("status", "publish"):
        refused(run(verb, "--corpus", str(tmp_path)), "plan x is damaged")
    refused(run("plan", "--spec", "jobs/specs/demo.toml", "--corpus", ""), "CORPUS is empty")
    refused(run("train", "--corpus", str(tmp_path), "--version", "²", "--out", str(tmp_path / "o")), "VERSION=²")
    limits = ("--set", "limits.deadline_s=inf")
    refused(run("plan", "--spec", "jobs/specs/demo.toml", "--corpus", str(tmp_path / "c"), *limits), "deadline_s")
