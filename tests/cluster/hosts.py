"""Hosts of a network of our own: namespaces joined by a bridge, each with its address, name, processes and /tmp.

    switch ---- head  10.77.0.1        one network namespace each, and one for the bridge: nothing is to be seen on the
            \\-- s3    10.77.0.2        machine's own network, and no address of it is used
             \\- w1    10.77.0.3

A host is a process namespace too: killing its first process kills all of it at once, as a power cut does. All of them
share the project, the interpreter, and one folder for logs and for what the S3 server keeps.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.s3 import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
_INIT = """
set -eu
hostname "$1"
mount --bind "$2" /mnt
mount --bind "$2/$1" /tmp
mkdir -p "$2" /tmp/home
mount --bind /mnt "$2"
umount /mnt
ip link set lo up
echo up > "$2/$1.up"
sleep infinity &
wait
"""


def require_namespaces() -> None:
    """Skip the test, by name, where hosts cannot be made."""
    if os.geteuid() != 0 or not all(shutil.which(name) for name in ("ip", "unshare", "nsenter", "mount")):
        pytest.skip("needs root, ip (iproute2), unshare and nsenter")
    if subprocess.run(["unshare", "-n", "-p", "-m", "-u", "-f", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system gives no namespaces")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """One host; `start` makes it, `kill` ends all that runs on it."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.network, self.name, self.address = network, name, f"10.77.0.{number}"
        self._namespace, self._port = f"{network.prefix}-{name}", f"p{number}"
        self._outer: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self.variables: dict[str, str] = {}

    def start(self) -> None:
        """Plug the host in and start its first process."""
        (self.network.folder / self.name).mkdir(exist_ok=True)
        up = self.network.folder / f"{self.name}.up"
        up.unlink(missing_ok=True)
        _ip("netns", "add", self._namespace)
        switch = self.network.switch
        _ip("-n", switch, "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", self._namespace)
        _ip("-n", switch, "link", "set", self._port, "master", "br0", "up")
        _ip("-n", self._namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self._namespace, "link", "set", "eth0", "up")
        self._outer = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child",
             "--mount-proc", "bash", "-c", _INIT, "init", self.name, str(self.network.folder)],
            preexec_fn=die_with_parent,  # noqa: PLW1509 - prctl alone
        )  # fmt: skip
        wait_for(up.exists, 20)
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        self.pid = int(children[0])

    @property
    def prefix(self) -> list[str]:
        """What to put before a command that is to run on this host."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--net", "--pid"]
        return [*inside, f"--wd={ROOT}", "--"]

    def environment(self) -> dict[str, str]:
        """Return the variables of a command on this host."""
        keep = ("PATH", "LANG", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
        given = {name: os.environ[name] for name in keep if name in os.environ} | self.network.variables
        here = {"HOME": "/tmp/home", "TMPDIR": "/tmp", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return given | here | self.variables

    def popen(self, *words: str, log: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command on this host; what it prints goes to a file of the network's folder."""
        with (self.network.folder / log).open("ab") as out:
            return subprocess.Popen(
                [*self.prefix, *words], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                env=self.environment() | variables,
            )  # fmt: skip

    def run(
        self, *words: str, timeout_s: float = 240, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end."""
        return subprocess.run(
            [*self.prefix, *words], capture_output=True, text=True, check=False, timeout=timeout_s,
            env=self.environment() | dict(variables or {}),
        )  # fmt: skip

    def python(self, *words: str, timeout_s: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run this interpreter on this host."""
        return self.run(sys.executable, *words, timeout_s=timeout_s, variables=variables)

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", self.network.switch, "link", "set", self._port, "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("-n", self.network.switch, "link", "set", self._port, "up")

    def processes(self, words: str) -> list[int]:
        """Return the processes of this host, by the machine's numbers, whose command begins with these words."""
        space, found = (Path(f"/proc/{self.pid}/ns/pid").readlink(), [])
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                    if command.startswith(words) and (entry / "ns/pid").readlink() == space:
                        found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """End every process of this host by SIGKILL: the kernel does it, once its first process is gone."""
        if self._outer is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._outer.wait()
            self._outer = None
            subprocess.run(["ip", "netns", "del", self._namespace], capture_output=True, check=False)
            # A namespace lives until its last socket is gone; its cable goes now.
            unplug = ["ip", "-n", self.network.switch, "link", "del", self._port]
            subprocess.run(unplug, capture_output=True, check=False)


class Network:
    """A bridge and the hosts on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.prefix = folder, f"lrm{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        self.hosts: dict[str, Host] = {}
        self.variables: dict[str, str] = {}

    def host(self, name: str, **variables: str) -> Host:
        """Return a new, running host, whose commands have these variables too."""
        made = self.hosts[name] = Host(self, name, len(self.hosts) + 1)
        made.variables.update(variables)
        made.start()
        return made


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """Make a network; leaving takes down every host of it."""
    _sweep()
    made = Network(folder)
    _ip("netns", "add", made.switch)
    try:
        _ip("-n", made.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", made.switch, "link", "set", "br0", "up")
        yield made
    finally:
        for host in made.hosts.values():
            host.kill()
        subprocess.run(["ip", "netns", "del", made.switch], capture_output=True, check=False)


def _sweep() -> None:
    """Remove the names that tests left which were killed; their hosts died with them."""
    for line in subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=False
    ).stdout.splitlines():
        match = re.match(r"lrm(\d+)-", line)
        if match and not Path(f"/proc/{match[1]}").exists():
            subprocess.run(["ip", "netns", "del", line.split()[0]], capture_output=True, check=False)


def wait_for(condition: object, timeout_s: float = 120.0, what: str = "") -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, f"{what or condition} did not come true in {timeout_s:.0f} s"
        time.sleep(0.2)


def wait_all(started: Sequence[subprocess.Popen[bytes]], timeout_s: float = 180.0) -> None:
    """Wait until each of several commands has ended well."""
    for process in started:
        assert process.wait(timeout_s) == 0, process.args
