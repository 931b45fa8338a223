"""Objects that crash, hang, eat memory, fork, flood stderr or take their worker along: each costs itself alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from jobs.build import build
from pipeline import version
from pipeline.receipt import load
from pipeline.spec import DatasetSpec
from pipeline.store import open_store
from pipeline.types import MAX_LOG_TAIL_CHARS
from tests.jobs import fakes

SECRET = "a-secret-that-nobody-may-see"


def stray() -> list[str]:
    """Return the commands of children, and of what they started, that are still there."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        if ("fake_child.py" in command or "time.sleep(600)" in command) and process.info["status"] != "zombie":
            found.append(command)
    return found


def test_poison_costs_itself_alone_and_no_secret_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    spec = DatasetSpec.model_validate(
        {
            "name": "poison",
            "source": {"kind": "procedural", "num_objects": len(fakes.POISON)},
            "shards": {"objects_per_shard": len(fakes.POISON)},
            "render": {"num_views": 2, "resolution_px": 32, "samples": 4},
            "limits": {"max_attempts": 2, "memory_bytes": 2**28},
            "admission": {"min_alpha_coverage": 1e-5},
        }
    )
    before = stray()
    summary = build(spec, str(tmp_path / "c"), produce=fakes.produce_poison, show_progress=False)
    assert summary.accounted
    store = open_store(str(tmp_path / "c"))
    plan = version.plan_sets(store)[0]
    assert len(plan.shards) == 1
    rows = load(store, plan.shards[0].plan_id).rows.to_pylist()
    found = {fakes.POISON[int(row["uid"].rpartition("-")[2])]: row for row in rows}
    kinds = {mode: (row["failure_kind"], row["attempts"]) for mode, row in found.items()}
    assert kinds == {
        "good": (None, 1),
        "crash": ("render_crash", 2),
        "hang": ("render_timeout", 2),
        "bomb": ("out_of_memory", 2),
        "spam": ("import_error", 1),
        "kill": ("quarantined", 2),
        "alloc": ("out_of_memory", 2),
    }
    assert sum(row["status"] == "sample" for row in rows) == 2, "the shard commits with the others"
    assert "about to crash" in found["crash"]["log_tail"]
    assert found["spam"]["log_tail"].endswith("last words")
    assert all(len(row["log_tail"] or "") <= MAX_LOG_TAIL_CHARS for row in rows)
    until = time.monotonic() + 10
    while stray() != before and time.monotonic() < until:
        time.sleep(0.1)
    assert stray() == before, "a process was left behind"
    environment = json.loads(found["good"]["quality"])["environment"]
    assert "PATH" in environment, "the child did tell what it was given"
    assert SECRET not in environment.values()
    for path in (tmp_path / "c").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
