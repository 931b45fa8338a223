"""Joining a Ray cluster that was started by hand, with token authentication on.

The cluster lives in network and process namespaces of its own, where there is nothing but loopback, so that nothing of
it can be reached from outside and nothing of it survives the test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SCRIPT = """
set -eu
ip link set lo up
ray get-auth-token --generate > /dev/null
ray start --head --port=6379 --num-cpus=2 --include-dashboard=false \\
    --object-store-memory=200000000 > "$HOME/ray.log" 2>&1
export RAY_ADDRESS=127.0.0.1:6379
python -c "
from tests.jobs import fakes
from tests.jobs.test_build import make_spec
from jobs.build import build
summary = build(make_spec(), '$CORPUS', produce=fakes.produce, show_progress=False)
print('accounted', summary.accounted, summary.samples)
"
echo 0123456789abcdef0123456789abcdef > "$HOME/.ray/auth_token"
python -m jobs.cli render --spec jobs/specs/demo.toml --corpus "$CORPUS-wrong-token" || echo "status $?"
export RAY_ADDRESS=127.0.0.1:6380
python -m jobs.cli render --spec jobs/specs/demo.toml --corpus "$CORPUS-no-head" || echo "status $?"
"""


@pytest.mark.cluster
def test_a_driver_joins_a_cluster_with_a_token_and_is_refused_without(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("needs root, unshare and ip")
    probe = subprocess.run(["unshare", "-n", "-p", "-f", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this system gives no network namespaces")
    environment = os.environ | {
        "HOME": str(tmp_path),
        "CORPUS": str(tmp_path / "corpus"),
        "RAY_AUTH_MODE": "token",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["unshare", "-n", "-p", "-f", "--kill-child", "--mount-proc", "bash", "-c", SCRIPT],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "accounted True 6" in done.stdout
    assert done.stdout.count("status 2") == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, done.stderr
    assert "RAY_AUTH_MODE=token" in errors[0]
    assert "127.0.0.1:6380" in errors[1]
    assert "unset it to run on this machine" in errors[1]
