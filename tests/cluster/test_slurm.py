"""The batch scripts on a real Slurm: nothing is lost and nothing counted twice, however a task ends."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.spec import load_spec
from pipeline.store import open_store
from tests.cluster import observer
from tests.cluster.hosts import ROOT, wait_for
from tests.cluster.slurm import Slurm, require_slurm, slurm
from tests.cluster.test_ray import whole, write_spec

pytestmark = pytest.mark.cluster
SCRIPTS = ROOT / "jobs/cluster/slurm"
OBJECTS = 32


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    require_slurm()
    with slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


class Trial:
    """A corpus, and the jobs that make it."""

    def __init__(self, queue: Slurm, folder: Path, *, objects: int = OBJECTS, made_s: float = 0.3) -> None:
        self.queue, self.folder, self.objects = queue, folder, objects
        self.corpus = folder / "corpus"
        self.spec = write_spec(folder, "slurm", objects)
        python = folder / "python"
        python.write_text(
            f'#!/bin/sh\n[ "$2" = jobs.cli ] && exec {sys.executable} -m tests.cluster.entry "$@"\n'
            f'exec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        self.variables = {
            "SPEC": str(self.spec), "CORPUS": str(self.corpus), "PYTHON": str(python), "PROJECT": str(ROOT),
            "MADE_S": str(made_s), "PYTHONPATH": str(ROOT), "HOME": str(folder), "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def submit(self, *options: str, script: str = "array.sbatch", **variables: str) -> str:
        """Submit one of the scripts; returns its job."""
        out = f"--output={self.folder}/%x-%a-%j.log"
        return self.queue.submit(SCRIPTS / script, out, *options, **(self.variables | variables))

    def receipts(self) -> int:
        """Return how many shards are committed."""
        return len(list((self.corpus / "receipts").glob("*.parquet"))) if (self.corpus / "receipts").exists() else 0

    def wait_for_receipts(self, number: int) -> None:
        """Wait until so many shards are committed."""
        wait_for(lambda: self.receipts() >= number, 120, f"{number} receipts; {self.said()[-2000:]}")

    def kill(self) -> None:
        """End scripts, drivers and all that they started by SIGKILL, without any warning."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("CORPUS") == str(self.corpus)
                if ours and not process.name().startswith("slurmstepd"):
                    process.kill()

    def said(self) -> str:
        """Return what the jobs wrote."""
        return "".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))

    def check(self, *settings: str) -> dict[str, Any]:
        """Publish, and hold the version to the undisturbed one of these settings; returns what was found."""
        found = observer.finish(str(self.corpus))
        whole(found, self.objects)
        assert found["digest"] == observer.undisturbed(str(self.folder / "undisturbed"), load_spec(self.spec, settings))
        assert len(list(open_store(str(self.corpus)).list("shards/"))) == len(found["rows"]) // 4, "no shard twice"
        return found


def restarts(queue: Slurm, job: str) -> int:
    """Return how often a job was started again."""
    shown = queue.run("scontrol", "show", "job", job)
    return max(int(word.partition("=")[2]) for word in shown.split() if word.startswith("Restarts="))


def test_an_array_shares_out_the_shards_by_index_and_a_requeued_task_goes_on(queue: Slurm, tmp_path: Path) -> None:
    trial = Trial(queue, tmp_path, made_s=0.5)
    job = trial.submit("--array=0-3")
    trial.wait_for_receipts(1)
    running = [index for index, state in queue.states(job).items() if state == "RUNNING"]
    assert running, "requeued in the middle"
    queue.run("scontrol", "requeue", f"{job}_{running[0]}")
    assert set(queue.wait(job).values()) == {"COMPLETED"}, trial.said()
    found = trial.check()
    summaries = [json.loads(line) for line in trial.said().splitlines() if line.startswith('{"corpus"')]
    assert sorted(one["shards"]["asked"] for one in summaries) == [2, 2, 2, 2]
    assert sum(one["planned"] for one in summaries) == len(found["rows"]) == OBJECTS


def test_a_task_that_reaches_its_time_limit_is_queued_again_until_all_is_done(queue: Slurm, tmp_path: Path) -> None:
    trial = Trial(queue, tmp_path, objects=80, made_s=0.6)
    job = trial.submit("--array=0", "--time=1", "--signal=B:TERM@15")
    assert set(queue.wait(job, 420).values()) == {"COMPLETED"}, trial.said()
    assert restarts(queue, job) >= 1, trial.said()
    assert "it is queued again" in trial.said()
    trial.check()


def test_a_preempted_task_is_queued_again_and_one_that_was_killed_is_run_again(queue: Slurm, tmp_path: Path) -> None:
    trial = Trial(queue, tmp_path, made_s=1.0)
    job = trial.submit("--array=0-1", "--partition=low")
    trial.wait_for_receipts(1)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    high = queue.submit(urgent, "--partition=high", "--exclusive", f"--output={tmp_path}/urgent.out")
    assert set(queue.wait(high).values()) == {"COMPLETED"}
    assert "it is queued again" in trial.said()
    wait_for(lambda: "RUNNING" in queue.states(job).values(), 60, f"a new start of {queue.states(job)}")
    before = trial.receipts()
    trial.wait_for_receipts(before + 1)
    trial.kill()
    states = set(queue.wait(job).values())
    assert "FAILED" in states, states
    assert trial.receipts() < OBJECTS // 4, "killed in the middle"
    again = trial.submit("--array=0-1")
    assert set(queue.wait(again).values()) == {"COMPLETED"}, trial.said()
    trial.check()


def test_a_ray_cluster_inside_an_allocation(queue: Slurm, tmp_path: Path) -> None:
    trial = Trial(queue, tmp_path)
    port = str(20000 + os.getpid() % 5000)
    job = trial.submit(
        "--nodes=1", "--cpus-per-task=2", script="ray.sbatch", PORT=port, HEAD_ADDRESS="127.0.0.1",
        NODE_MEMORY_BYTES="1000000000", STORE_BYTES="150000000",
    )  # fmt: skip
    assert set(queue.wait(job).values()) == {"COMPLETED"}, trial.said()
    trial.check("workers.node_wait_s=300")
    time.sleep(1)
    left = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and _holds(entry, f"127.0.0.1:{port}")]
    assert not left, "nothing of the cluster outlives its job"


def _holds(entry: Path, words: str) -> bool:
    try:
        return words.encode() in (entry / "cmdline").read_bytes() and b"gcs" in (entry / "cmdline").read_bytes()
    except OSError:
        return False
