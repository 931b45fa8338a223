"""A GPU by spec: how many tasks fit, and that one which is not there ends the run in one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import produce
from jobs.nodes import count_slots, require_slots
from pipeline.spec import DatasetSpec, ProceduralSource, WorkerSpec
from pipeline.types import Asset, Sample, UserError
from tests.conftest import make_asset, make_sample

ROOT = Path(__file__).resolve().parents[2]
SPEC = 'name = "gpu"\n[source]\nkind = "procedural"\nnum_objects = 3\n[render]\nresolution_px = 16\nnum_views = 2\n'


def gpu(share: float, cpus: float = 1.0) -> WorkerSpec:
    return WorkerSpec(device="cuda", num_gpus=share, num_cpus=cpus)


@pytest.mark.parametrize(
    ("nodes", "workers", "slots"),
    [
        ([{"CPU": 8.0}], WorkerSpec(num_cpus=2), 4),
        ([{"CPU": 3.0}, {"CPU": 3.0}], WorkerSpec(num_cpus=2), 2),  # not 3: a task is on one node
        ([{"CPU": 0.3}], WorkerSpec(num_cpus=0.1), 3),  # 0.3 / 0.1 is a little below 3 in floating point
        ([{"CPU": 8.0, "GPU": 1.0}], gpu(0.25), 4),
        ([{"CPU": 8.0, "GPU": 2.0}], gpu(0.4), 4),  # not 5: a share is of one GPU
        ([{"CPU": 3.0, "GPU": 8.0}], gpu(0.25, cpus=2), 1),
        ([{"CPU": 64.0}, {"CPU": 4.0, "GPU": 1.0}], gpu(0.1), 4),  # CPUs without a GPU do not count
    ],
)
def test_slots_are_those_of_whole_tasks_on_single_nodes(
    nodes: list[dict[str, float]], workers: WorkerSpec, slots: int
) -> None:
    assert count_slots(nodes, workers) == slots
    require_slots(nodes, workers)


@pytest.mark.parametrize(
    ("nodes", "workers", "words"),
    [
        ([{"CPU": 2.0}, {"CPU": 2.0}], WorkerSpec(num_cpus=3), ["no node has more than 2 CPUs", "num_cpus is 3"]),
        ([{"CPU": 8.0}], gpu(0.25), ["'cuda'", "no GPU", "1 node(s)", "--set workers.device=cpu"]),
        ([{"CPU": 8.0}, {"CPU": 1.0, "GPU": 4.0}], gpu(1, cpus=2), ["no node with a GPU has more than 1 CPUs"]),
    ],
)
def test_what_fits_nowhere_is_refused(nodes: list[dict[str, float]], workers: WorkerSpec, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        require_slots(nodes, workers)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("workers", [{"device": "cuda"}, {"num_gpus": 0.5}, {"device": "hip", "num_gpus": 0.001}])
def test_a_device_and_its_share_go_together(workers: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"device '(cuda|cpu|hip)' with num_gpus"):
        WorkerSpec.model_validate(workers)


def render(tmp_path: Path, *arguments: str, num_gpus: int = 0) -> subprocess.CompletedProcess[str]:
    """Render on a Ray of this machine that was told how many GPUs there are; whatever is there, tasks see none."""
    (tmp_path / "spec.toml").write_text(SPEC)
    told = {"RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": num_gpus}), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.run(
        [
            sys.executable, "-m", "jobs.cli", "render", "--spec", str(tmp_path / "spec.toml"),
            "--corpus", str(tmp_path / "corpus"), *arguments,
        ],
        cwd=ROOT, env=os.environ | told, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip


CUDA = ("--set", "workers.device=cuda", "--set", "workers.num_gpus=0.5")


def test_a_gpu_is_refused_at_start_where_ray_has_none(tmp_path: Path) -> None:
    done = render(tmp_path, *CUDA)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: workers.device is 'cuda' but Ray sees no GPU")
    assert list((tmp_path / "corpus").rglob("*.parquet")) == [], "not even a plan stays behind"


@pytest.mark.blender
def test_a_gpu_that_only_ray_believes_in_ends_the_run_in_one_line(tmp_path: Path) -> None:
    done = render(tmp_path, *CUDA, num_gpus=1)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith(("\r", "objects:")) and line]
    assert line.startswith("error: no CUDA device is here (workers.device = 'cuda')")
    assert line.endswith(f" (on {socket.gethostname()})")
    assert list((tmp_path / "corpus").rglob("*.parquet")) == [], "nothing is committed, and no plan stays behind"


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The render workers that `render_asset` makes; none starts Blender."""
    made: list[object] = []

    class Worker:
        def __init__(self, spec: DatasetSpec, **_: object) -> None:
            made.append(self)

        def render(self, asset: Asset, *_: object, **__: object) -> Sample:
            return make_sample(asset.uid, asset=asset)

        def close(self) -> None:
            pass

    monkeypatch.setattr(produce, "RenderWorker", Worker)
    monkeypatch.setattr(produce, "_workers", {})
    return made


@pytest.mark.parametrize(("device", "expected"), [("cuda", 2), ("cpu", 1)])
def test_a_task_on_another_gpu_gets_another_child(
    workers: list[object], monkeypatch: pytest.MonkeyPatch, device: str, expected: int
) -> None:
    chosen = WorkerSpec(device="cuda", num_gpus=0.5) if device == "cuda" else WorkerSpec()
    spec = DatasetSpec(name="gpu", source=ProceduralSource(), workers=chosen)
    asset = make_asset("procedural-0", uri="procedural:0")
    for number in ("0", "0", "1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", number)
        assert isinstance(produce.render_asset(spec, "f", asset), Sample)
    assert len(workers) == expected
