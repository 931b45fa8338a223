"""The job on a Ray cluster of several hosts that vanish, are cut off, come back and join, over S3."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.spec import load_spec
from tests.cluster.hosts import require_namespaces, wait_all, wait_for
from tests.cluster.observer import undisturbed
from tests.cluster.ray_nodes import RayCluster, ray_cluster

pytestmark = pytest.mark.cluster
OBJECTS, PER_SHARD = 96, 4


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
    hosts["w2"].mend()
    wait_for(lambda: not hosts["w2"].processes("raylet/raylet"), 60, "the raylet of the node that was cut off ends")
    back = cluster.start_ray(hosts["w2"])  # what a supervisor of the node does: KubeRay, srun, systemd
    cluster.wait_for_receipts(url, third + 2, driver, "job.log")
    wait_all([back])
    (pid,) = cluster.head.processes("python -m tests.cluster.entry")[:1]
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
