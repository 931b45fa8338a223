"""The job on a Ray cluster of several hosts that vanish, are cut off, come back and join, over S3."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.spec import load_spec
from tests.cluster.hosts import ROOT, Host, require_namespaces, wait_all, wait_for
from tests.cluster.observer import undisturbed
from tests.cluster.ray_nodes import RayCluster, ray_cluster

pytestmark = pytest.mark.cluster
OBJECTS, PER_SHARD = 144, 4
RAYLET = str(Path(ray.__file__).parent / "core/src/ray/raylet/raylet")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    require_namespaces()
    if importlib.util.find_spec("aiohttp") is None:
        pytest.skip("needs Ray's job server: pip install 'ray[default]', as make test-cluster does")
    with ray_cluster(tmp_path_factory.mktemp("hosts"), 3) as made:
        yield made


def write_spec(folder: Path, name: str = "noise", objects: int = OBJECTS, more: str = "") -> Path:
    """Write a spec where every host finds it, with workers that small hosts hold."""
    path = folder / f"{name}.toml"
    path.write_text(
        textwrap.dedent(f"""
        name = "{name}"
        [source]
        kind = "procedural"
        num_objects = {objects}
        [shards]
        objects_per_shard = {PER_SHARD}
        [workers]
        memory_bytes = 100000000
        """)
        + more
    )
    return path


def whole(found: dict[str, Any], count: int) -> None:
    """Every object is there once."""
    assert Counter(row["uid"] for row in found["rows"]).most_common(1)[0][1] == 1
    assert len(found["rows"]) == found["planned"] == count
    failed = {row["uid"]: row["failure_kind"] for row in found["rows"] if row["status"] == "failure"}
    assert set(failed.values()) == {"empty_scene"}
    assert all(uid.endswith("3") for uid in failed)


def test_nodes_die_are_cut_off_come_back_and_join_and_the_driver_is_killed(cluster: RayCluster, tmp_path: Path) -> None:
    spec, url = write_spec(cluster.network.folder), cluster.url("chaos")
    words = ("render", "--spec", str(spec), "--corpus", url)
    hosts = cluster.network.hosts
    driver = cluster.start_driver(*words, log="job.log", job=True)
    first = cluster.wait_for_receipts(url, 2, driver, "job.log")
    hosts["w1"].kill()  # a power cut
    second = cluster.wait_for_receipts(url, first + 3, driver, "job.log")
    hosts["w2"].cut()
    extra = cluster.network.host("w4")
    joined = cluster.start_ray(extra)
    third = cluster.wait_for_receipts(url, second + 3, driver, "job.log")
    wait_all([joined])
    noticed = lambda: "marked dead" in cluster.head_log("gcs_server.out", hosts["w2"].address)  # noqa: E731
    wait_for(noticed, 60, "the head to give up the node that was cut off")  # sooner back, it would simply go on
    hosts["w2"].mend()
    wait_for(lambda: not hosts["w2"].processes(RAYLET), 60, "the raylet of the node that was cut off ends")
    back = cluster.start_ray(hosts["w2"])  # what a supervisor of the node does: KubeRay, srun, systemd
    cluster.wait_for_receipts(url, third + 2, driver, "job.log")
    wait_all([back])
    (pid,) = cluster.head.processes(f"{sys.executable} -m tests.cluster.entry")
    os.kill(pid, signal.SIGKILL)
    assert driver.wait(120) != 0
    before = cluster.ask("count", url)
    assert before < OBJECTS // PER_SHARD, "killed in the middle"

    again = cluster.start_driver(*words, "--json", log="again.log")
    assert again.wait(300) == 0, cluster.log("again.log")[-3000:]
    found = cluster.ask("finish", url)
    whole(found, OBJECTS)
    assert found["digest"] == undisturbed(str(tmp_path / "undisturbed"), load_spec(spec))
    workers = {row["provenance"] and json.loads(row["provenance"]).get("worker") for row in found["rows"]}
    assert {"w2", "w3", "w4"} <= workers, "old, returned and new nodes made something"


@contextmanager
def other_node(cluster: RayCluster, name: str, module: str, package: str = "") -> Iterator[Host]:
    """A host whose Python differs: a sitecustomize of its own, and a package's version in front of the real one."""
    folder = cluster.network.folder / f"{name}-python"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(module)
    if package:
        info = folder / f"{package.replace('==', '-')}.dist-info"
        info.mkdir()
        words = dict(zip(("Name", "Version"), package.split("==")))
        (info / "METADATA").write_text("".join(f"{key}: {value}\n" for key, value in words.items()))
    host = cluster.network.host(name, PYTHONPATH=f"{folder}:{ROOT}")
    try:
        assert cluster.start_ray(host).wait(120) == 0, cluster.log(f"{name}.log")
        yield host
    finally:
        host.kill()
        wait_for(lambda: "marked dead" in cluster.head_log("gcs_server.out", host.address), 60, "the head to notice")


def refused(cluster: RayCluster, spec: Path, log: str) -> str:
    """Run a driver that must end with status 2; returns its one line."""
    driver = cluster.start_driver("render", "--spec", str(spec), "--corpus", cluster.url(log), log=log)
    assert driver.wait(180) == 2, cluster.log(log)[-3000:]
    (line,) = [line for line in cluster.log(log).splitlines() if line.startswith("error: ")]
    return line


def test_a_node_with_another_blender_or_a_clock_that_is_off_is_named_at_start(cluster: RayCluster) -> None:
    spec = write_spec(cluster.network.folder, "checked", 8)
    with other_node(cluster, "stale", "", "bpy==4.5.99") as node:
        line = refused(cluster, spec, "stale-run")
    assert line.startswith(f"error: node stale ({node.address}) does not agree with the driver: it has bpy 4.5.99 ")
    assert "constraints file" in line
    with other_node(cluster, "late", "import time\nreal = time.time\ntime.time = lambda: real() + 3600\n") as node:
        line = refused(cluster, spec, "late-run")
    assert re.match(
        rf"error: node late \({node.address}\): its clock is 3[56]\d\d s ahead of the driver's, 30 s are", line
    )
    assert cluster.ask("count", cluster.url("stale-run")) == 0, "not even a plan was frozen"


def test_a_stale_node_that_joins_later_ends_the_run_by_name(cluster: RayCluster) -> None:
    spec = write_spec(cluster.network.folder, "joined", 96)
    driver = cluster.start_driver("render", "--spec", str(spec), "--corpus", cluster.url("joined"), log="joined.log")
    cluster.wait_for_receipts(cluster.url("joined"), 1, driver, "joined.log")
    with other_node(cluster, "joiner", "", "bpy==4.5.98"):
        assert driver.wait(180) == 2, cluster.log("joined.log")[-3000:]
    (line,) = [line for line in cluster.log("joined.log").splitlines() if line.startswith("error: ")]
    assert line.startswith("error: node joiner does not agree with the driver: it has bpy 4.5.98 instead of ")


def test_gpu_tasks_share_the_gpu_of_their_node_and_cpu_tasks_run_beside_them(cluster: RayCluster) -> None:
    node = cluster.network.host("g1", MADE_S="1")
    assert cluster.start_ray(node, "--num-gpus=1", cpus=3).wait(120) == 0, cluster.log("g1.log")
    folder = cluster.network.folder
    gpu = write_spec(folder, "on-gpu", 16, 'device = "cuda"\nnum_gpus = 0.5\nnum_cpus = 1\n')
    cpu = write_spec(folder, "on-cpu", 16)
    runs = {}
    for spec in (gpu, cpu):
        words = ("render", "--spec", str(spec), "--corpus", cluster.url(spec.stem))
        runs[spec.stem] = cluster.start_driver(*words, log=f"{spec.stem}.log")
    for name, run in runs.items():
        assert run.wait(240) == 0, cluster.log(f"{name}.log")[-3000:]
    rows = [json.loads(row["provenance"]) for row in cluster.ask("finish", cluster.url("on-gpu"))["rows"]]
    made = [row for row in rows if "begun" in row]
    assert {row["worker"] for row in made} == {"g1"}
    assert {row["gpu"] for row in made} == {"0"}
    at_once = [sum(other["begun"] <= row["begun"] < other["ended"] for other in made) for row in made]
    assert max(at_once) == 2, "two halves of a GPU, though three CPUs are there"
    beside = [json.loads(row["provenance"]) for row in cluster.ask("finish", cluster.url("on-cpu"))["rows"]]
    assert {row["worker"] for row in beside if "begun" in row} - {"g1"}, "nodes without a GPU were used"


@pytest.mark.blender
def test_a_submitted_job_renders_with_blender(cluster: RayCluster) -> None:
    spec = cluster.network.folder / "blender.toml"
    spec.write_text(
        'name = "blender"\n[source]\nkind = "procedural"\nnum_objects = 2\n[render]\nnum_views = 2\n'
        "resolution_px = 16\nsamples = 1\ndenoise = false\n[workers]\nmemory_bytes = 500000000\n"
    )
    words = ("render", "--spec", str(spec), "--corpus", cluster.url("blender"))
    job = cluster.start_driver(*words, log="blender.log", job=True, module="jobs.cli")
    assert job.wait(240) == 0, cluster.log("blender.log")[-3000:]
    assert "2 planned = 2 samples + 0 failures" in cluster.log("blender.log")
