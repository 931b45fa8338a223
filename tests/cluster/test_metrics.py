"""Metrics of a running job as Prometheus sees them: Ray's own exporter, every query of the dashboard and the alerts.

Needs `ray[default]`, which `make test-cluster` installs, and for the second test Debian's package prometheus.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs.test_watch import GRAFANA, ROOT, alerts, queries, series_of

pytestmark = pytest.mark.cluster
Exporting = tuple[int, subprocess.Popen[bytes]]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def fetch(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return str(reply.read().decode())
    except OSError:
        return ""


NEVER = {"ray_lrm_worker_deaths_total", "ray_lrm_shard_retries_total"}
"""Counters that have no series until something goes wrong; the panels draw 0 then."""


@pytest.fixture
def exporting(tmp_path: Path) -> Iterator[Exporting]:
    """A run in a process of its own whose metrics are scraped; yields (port, process)."""
    if importlib.util.find_spec("prometheus_client") is None or importlib.util.find_spec("opencensus") is None:
        pytest.skip("needs Ray's exporter: pip install 'ray[default]', as make test-cluster does")
    port = free_port()
    code = (
        "from jobs.build import build\nfrom tests.jobs import fakes\nfrom tests.jobs.test_build import make_spec\n"
        f"build(make_spec(20000, 5), {str(tmp_path / 'c')!r}, produce=fakes.produce_watched, show_progress=False)\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LRM_METRICS_PORT": str(port)},
    )  # fmt: skip
    yield port, job
    job.terminate()
    job.wait(timeout=30)


def test_rays_exporter_shows_every_series_that_the_dashboard_asks_for(
    exporting: Exporting,
) -> None:
    port, job = exporting
    wanted = series_of(queries() + alerts()) - NEVER
    text = ""
    deadline = time.monotonic() + 300
    while not all(re.search(rf"^{name}{{", text, re.MULTILINE) for name in wanted):
        assert job.poll() is None, "the run ended before its metrics were seen"
        assert time.monotonic() < deadline, sorted(n for n in wanted if f"\n{n}{{" not in text)
        time.sleep(1)
        text = fetch(f"http://127.0.0.1:{port}/metrics")
    assert re.search(r'ray_lrm_objects_total{[^}]*kind="empty_scene"[^}]*outcome="failure"', text)
    assert re.search(r'ray_lrm_stage_seconds_total{[^}]*stage="render"', text)


def test_prometheus_finds_data_for_every_query(exporting: Exporting, tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus on the PATH: apt-get install prometheus")
    port, job = exporting
    web = free_port()
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: ['{GRAFANA / 'alerts.yml'}']\n"
        f"scrape_configs: [{{job_name: ray, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}]\n"
    )
    server = subprocess.Popen(
        ["prometheus", f"--config.file={config}", f"--web.listen-address=127.0.0.1:{web}",
         f"--storage.tsdb.path={tmp_path / 'tsdb'}", "--log.level=error"],
    )  # fmt: skip
    try:
        left = queries()
        deadline = time.monotonic() + 300
        while left:
            assert job.poll() is None, "the run ended before its metrics were seen"
            assert time.monotonic() < deadline, left
            time.sleep(2)
            left = [text for text in left if not answered(web, text)]
        loaded = json.loads(fetch(f"http://127.0.0.1:{web}/api/v1/rules") or "{}")
        rules = [rule for group in loaded["data"]["groups"] for rule in group["rules"]]
        assert len(rules) == len(alerts())
        assert {rule["health"] for rule in rules} == {"ok"}
    finally:
        server.terminate()
        server.wait(timeout=30)


def answered(web: int, query: str) -> bool:
    """Whether Prometheus has a value for a query."""
    url = f"http://127.0.0.1:{web}/api/v1/query?query={urllib.parse.quote(query)}"
    reply = json.loads(fetch(url) or "{}")
    return bool(reply.get("data", {}).get("result"))
