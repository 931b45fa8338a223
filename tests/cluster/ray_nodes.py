"""A Ray cluster on hosts of our own, with token authentication, and an S3 server on one of them."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.hosts import Host, Network, network, wait_for
from tests.s3 import BUCKET, s3_server

RAY = (sys.executable, "-m", "ray.scripts.scripts")
HEALTH = {
    # A node that is silent for some 5 s is dead; by default Ray takes about a minute to say so.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}


class RayCluster:
    """A head without CPUs of its own, where drivers run, and workers."""

    def __init__(self, net: Network) -> None:
        self.network = net
        self.head = net.host("head")
        self.address = f"{self.head.address}:6379"
        self._observer: subprocess.Popen[str] | None = None

    def url(self, name: str) -> str:
        """Return the URL of a corpus on the S3 server."""
        return f"s3://{BUCKET}/{name}"

    def start_head(self) -> subprocess.Popen[bytes]:
        """Start Ray's head; returns the command, which ends when it is up."""
        return self.head.popen(
            *RAY, "start", "--head", "--port=6379", f"--node-ip-address={self.head.address}", "--num-cpus=0",
            "--include-dashboard=true", f"--dashboard-host={self.head.address}", "--disable-usage-stats",
            "--object-store-memory=150000000", "--memory=1000000000", log="head.log",
        )  # fmt: skip

    def start_ray(self, host: Host, *more: str, cpus: int = 1) -> subprocess.Popen[bytes]:
        """Let a host join; returns the command, which ends when it has."""
        return host.popen(
            *RAY, "start", f"--address={self.address}", f"--node-ip-address={host.address}", f"--num-cpus={cpus}",
            "--object-store-memory=150000000", "--memory=1000000000", "--disable-usage-stats", *more,
            log=f"{host.name}.log",
        )  # fmt: skip

    def start_driver(
        self, *words: str, log: str, job: bool = False, module: str = "tests.cluster.entry"
    ) -> subprocess.Popen[bytes]:
        """Start a driver on the head: by itself, or submitted as a job with the project as its working directory."""
        command = [sys.executable, "-m", module, *words]
        if job:
            submit = [*RAY, "job", "submit", f"--address=http://{self.head.address}:8265", "--working-dir=."]
            command = [*submit, "--", *command]
        return self.head.popen(*command, log=log, RAY_ADDRESS=self.address)

    def log(self, name: str) -> str:
        """Return what a command wrote so far."""
        path = self.network.folder / name
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def head_log(self, name: str, words: str) -> str:
        """Return the lines of a log of Ray's head that hold these words."""
        (path,) = self.network.folder.glob(f"head/ray/session_2*/logs/{name}")
        return "\n".join(line for line in path.read_text("utf-8", "replace").splitlines() if words in line)

    def ask(self, verb: str, url: str) -> Any:
        """Ask the observer on the head; see tests/cluster/observer.py."""
        if self._observer is None:
            self._observer = subprocess.Popen(
                [*self.head.prefix, sys.executable, "-m", "tests.cluster.observer"], text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env=self.head.environment(),
            )  # fmt: skip
        assert self._observer.stdin is not None
        assert self._observer.stdout is not None
        self._observer.stdin.write(f"{verb} {url}\n")
        self._observer.stdin.flush()
        answer = json.loads(self._observer.stdout.readline())
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError(answer["error"])
        return answer

    def wait_for_receipts(self, url: str, number: int, driver: subprocess.Popen[bytes], log: str) -> int:
        """Wait until so many shards are committed while a driver runs; returns how many are."""

        def there() -> bool:
            assert driver.poll() is None, f"the driver ended early: {self.log(log)[-3000:]}"
            return bool(self.ask("count", url) >= number)

        wait_for(there, 240, f"{number} receipts")
        return int(self.ask("count", url))


@contextmanager
def ray_cluster(folder: Path, num_workers: int) -> Iterator[RayCluster]:
    """Make a cluster with an S3 server on a host of its own."""
    with network(folder) as net, contextlib.ExitStack() as stack:
        net.variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), **HEALTH}
        cluster = RayCluster(net)
        store = net.host("s3")
        server = s3_server(folder / "s3-data", address=store.address, prefix=store.prefix)
        # Workers and jobs take the store's variables from the `ray start` of their node.
        net.variables |= stack.enter_context(server)
        assert cluster.start_head().wait(120) == 0, cluster.log("head.log")
        workers = [net.host(f"w{i + 1}") for i in range(num_workers)]
        started = [cluster.start_ray(host) for host in workers]
        for host, process in zip(workers, started):
            assert process.wait(180) == 0, cluster.log(f"{host.name}.log")
        yield cluster
