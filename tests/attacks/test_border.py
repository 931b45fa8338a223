"""The border from inside: what a child would try that a file has taken over, and that the kernel refuses each of it.

Every attempt is made three times: without a border, where it must succeed, so that a refusal says something; as the
user who runs the tests; and as an ordinary user, where the tests run as root.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs import produce
from pipeline.sources import list_assets
from pipeline.types import Failure, FailureKind, UserError
from render import confine, landlock
from render.process import child_command, family
from render.trial import BorderTrial
from render.worker import RenderWorker
from tests.attacks.ask import ROOT, Probe
from tests.render.conftest import make_spec

NOBODY = 65534
CANARY = "the-canary-that-nobody-may-hear"
REFUSALS = {"EACCES", "EPERM", "ENOSYS", "ESRCH", "EXDEV", "EFBIG", "ValueError"}

pytestmark = pytest.mark.skipif(landlock.version() < 1, reason="this kernel has no Landlock")


class Outside:
    """What lies outside of the border: a canary's folder, and ears on every kind of socket."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.heard = folder, []
        self.cage = folder / "cage"
        self.cage.mkdir()
        self.canary = self.cage / "canary.txt"
        self.canary.write_text(CANARY)
        self.unix, self.abstract = str(folder / "socket"), folder.name
        self._sockets = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)]
        self._sockets[1].bind(("127.0.0.1", 0))
        self.tcp, self.udp = (one.getsockname()[1] for one in self._sockets)
        for name in (self.unix, "\0" + self.abstract):
            one = socket.socket(socket.AF_UNIX)
            one.bind(name)
            one.listen()
            self._sockets.append(one)
        Path(self.unix).chmod(0o777)
        for one in self._sockets:
            threading.Thread(target=self._listen, args=(one,), daemon=True).start()

    def _listen(self, one: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                if one.type == socket.SOCK_DGRAM:
                    self.heard.append(one.recv(100))
                else:
                    with one.accept()[0] as heard:
                        self.heard.append(heard.recv(100))

    def state(self) -> list[object]:
        """Return all that an attempt could have changed."""
        found: list[object] = [self.canary.read_text()]
        for path in (self.cage, *sorted(self.cage.iterdir())):
            one = path.lstat()
            found += [path.name, one.st_mode, one.st_uid, one.st_mtime_ns, one.st_ctime_ns, one.st_size, one.st_nlink]
        return found

    def close(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes who waits on it
            one.close()


@pytest.fixture
def outside() -> Iterator[Outside]:
    # Not pytest's own folder, which an ordinary user cannot enter.
    folder = Path(tempfile.mkdtemp(prefix="lrm-attack-"))
    folder.chmod(0o755)
    made = Outside(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


def attempts(outside: Outside, folder: Path) -> list[list[Any]]:
    """Return everything that must be refused."""
    cage, canary, home = str(outside.cage), str(outside.canary), str(folder / "child" / "home")
    victim = os.getpid()
    return [
        *(["read", path] for path in (canary, "/etc/passwd", "/etc/hostname", str(ROOT / "README.md"))),
        *(["read", f"/proc/{pid}/{name}"] for pid in (1, victim) for name in ("environ", "cmdline")),
        *(["list", path] for path in ("/", "/etc", "/tmp", "/home", "/proc", cage, str(ROOT))),
        *(["write", f"{place}/cuckoo"] for place in (cage, "/tmp", "/var/tmp", "/dev/shm", folder / "staged", ROOT)),
        *([name, canary] for name in ("append", "delete", "truncate", "chmod", "chown", "touch", "attribute")),
        ["move", canary, f"{home}/canary"],
        ["move", f"{home}/egg", f"{cage}/egg"],
        ["link", canary, f"{home}/canary"],
        ["symlink", canary, f"{home}/link"],
        ["pipe", f"{home}/pipe"],
        ["make_folder", f"{cage}/nest"],
        ["open_maps", victim],
        ["tcp", "127.0.0.1", outside.tcp],
        ["udp", "127.0.0.1", outside.udp],
        ["tcp6", outside.tcp],
        ["unix", outside.unix],
        ["abstract", outside.abstract],
        *([name] for name in ("netlink", "packet", "listen")),
        *([name] for name in ("fork", "raw_fork", "vfork_exec", "exec", "spawn")),
        ["execute_written", home],
        *([name, victim] for name in ("trace_parent", "memory_of", "kill", "pidfd", "limits_of")),
        ["setns", "/proc/self/ns/net"],
        ["mount", cage],
        *([name] for name in ("trace_me", "unshare", "chroot", "keys", "bpf", "perf", "io_uring", "userfault")),
        *([name] for name in ("shared_memory", "module", "reboot", "clock", "hostname", "handle", "type_on_terminal")),
        *([name] for name in ("raise_limits", "hoard")),
    ]


ALLOWED = ["thread", "pair", "executable_memory"]


def ask_as(
    user: int | None,
    sandbox: str,
    folder: Path,
    asked: list[list[Any]],
    programs: Sequence[str] = (),
    pod: Sequence[str] = (),
) -> dict[str, Any]:
    """Put attempts to a probe that this user runs, under a pod's profile if one is given; None is ourselves."""
    python, options = sys.executable, {}
    if user is not None:
        python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or ""
        options = {"user": user, "group": user, "extra_groups": []}
        os.chown(folder, user, user)
        new_enough = "import sys; sys.exit(sys.version_info < (3, 11))"
        if not python or subprocess.run([python, "-c", new_enough], check=False).returncode:
            pytest.skip("no Python 3.11 that an ordinary user can run")
    around = (python, "-P", "-m", "tests.attacks.pod", *pod) if pod else ()
    done = subprocess.run(
        [*around, python, "-P", "-m", "tests.attacks.ask", sandbox, str(folder), *programs],
        input=json.dumps(asked), text=True,
        stdout=subprocess.PIPE, check=True, timeout=60, cwd="/", env={"PYTHONPATH": str(ROOT)}, **options,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("user", [None, NOBODY], ids=["as-we-are", "as-nobody"])
def test_nothing_that_an_intruder_tries_succeeds(outside: Outside, user: int | None) -> None:
    if user is not None and os.getuid() != 0:
        pytest.skip("only root can become somebody else; as we are is an ordinary user already")
    folder = outside.folder / "scratch"
    folder.mkdir()
    asked, before = attempts(outside, folder), outside.state()
    egg = ["write", str(folder / "child" / "home" / "egg")]
    facts = [["status", name] for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")]
    found = ask_as(user, "strict", folder, [egg, *asked, *([name] for name in ALLOWED), *facts, ["identity"]])
    assert found["first"] == {"type": "ready", "sandbox": "strict: limits,user,net,ipc,pid,caps,landlock,seccomp"}
    told, answers = [egg, *asked], found["answers"]
    assert answers[0] == "done", "the child's own folder must be writable"
    refused = dict(zip(map(json.dumps, told[1:]), answers[1:], strict=False))
    assert {attempt: answer for attempt, answer in refused.items() if answer not in REFUSALS} == {}
    assert answers[len(told) : len(told) + len(ALLOWED)] == ["done"] * len(ALLOWED)
    assert answers[len(told) + len(ALLOWED) : -1] == ["0" * 16, "0" * 16, "1", "2"]
    assert answers[-1] == [os.getuid() if user is None else user, 2, 1]
    assert outside.state() == before
    assert outside.heard == []
    assert not [path for path in ("/tmp/cuckoo", "/var/tmp/cuckoo", "/dev/shm/cuckoo") if Path(path).exists()]
    assert [path.name for path in (folder / "staged").iterdir()] == []


def test_without_a_border_the_same_attempts_succeed(outside: Outside) -> None:
    # Not those that would hurt the machine, nor what is anyhow root's, or not even that.
    folder = outside.folder / "scratch"
    folder.mkdir()
    harmless = {
        "read", "list", "append", "chmod", "chown", "touch", "symlink", "pipe", "make_folder", "link", "tcp", "udp",
        "unix", "abstract", "netlink", "listen", "fork", "vfork_exec", "spawn", "pidfd", "open_maps", "trace_me",
    }  # fmt: skip
    others = ["/etc/hostname", "/proc/1/environ"]
    asked = [one for one in attempts(outside, folder) if one[0] in harmless and not set(one[1:2]) & set(others)]
    answers = ask_as(None, "none", folder, asked)["answers"]
    assert {json.dumps(one): x for one, x in zip(asked, answers, strict=True) if x != "done"} == {}
    until = time.monotonic() + 5
    while len(outside.heard) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    assert outside.heard == [b"the canary sings"] * 4


def test_nothing_of_the_environment_is_handed_on_but_what_is_needed(tmp_path: Path) -> None:
    probe = Probe("strict", tmp_path)
    environment = probe.ask("environment")
    probe.close()
    assert set(environment) <= {"HOME", "PYTHONPATH", "PATH", "LC_CTYPE"}


@pytest.mark.parametrize(
    ("attempt", "status"),
    [
        (("die", int(signal.SIGSEGV)), -signal.SIGSEGV),
        (("die", int(signal.SIGKILL)), -signal.SIGKILL),
        (("abort",), -signal.SIGABRT),
        (("exit", 3), 3),
        (("other_door",), -signal.SIGSYS),
    ],
)
def test_the_supervisor_sees_how_the_child_ended(tmp_path: Path, attempt: tuple[Any, ...], status: int) -> None:
    assert Probe("strict", tmp_path).ask(*attempt) == f"ended {status}"


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}").exists() and pid in family(pid)}


def test_processes_that_left_the_session_and_their_parents_die_with_the_child(tmp_path: Path) -> None:
    probe = Probe("strict", tmp_path, run=(Path("/usr/bin"),))
    assert probe.ask("vfork_exec") == "done"
    assert probe.ask("daemons", 5) == "done"
    time.sleep(0.2)
    pids = family(probe.process.pid)
    assert len(pids) == 3 + 5
    probe.process.kill()  # the outermost alone
    probe.process.wait()
    until = time.monotonic() + 5
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.01)
    assert alive(pids) == set()


def test_a_fork_bomb_runs_into_its_limit(outside: Outside) -> None:
    # As an ordinary user: the kernel counts no processes of root.
    folder = outside.folder / "scratch"
    folder.mkdir()
    user = NOBODY if os.getuid() == 0 else None
    most = 2 * max(confine.MIN_PROCESSES, confine.PROCESSES_PER_CPU * (os.cpu_count() or 1))
    assert ask_as(user, "strict", folder, [["bomb", most]], ["/usr/bin"])["answers"] == ["EAGAIN"]


# A system that refuses new namespaces, as containers do: our own filter of system calls, around the border.
WITHOUT_NAMESPACES = """
import ctypes, os, sys
from render import seccomp
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
seccomp.install(may_start=True)
os.execv(sys.argv[1], sys.argv[1:])
"""
WRAPPER = (sys.executable, "-c", WITHOUT_NAMESPACES)


def test_a_system_that_lacks_a_layer_gives_one_line_and_basic_goes_without(tmp_path: Path) -> None:
    strict = Probe("strict", tmp_path, wrapper=WRAPPER)
    assert strict.first["type"] == "no_border"
    line = strict.first["message"]
    assert "user namespaces" in line
    assert "workers.sandbox = 'basic'" in line
    assert "Landlock" not in line
    assert "\n" not in line
    basic = Probe("basic", tmp_path, wrapper=WRAPPER)
    assert basic.first == {"type": "ready", "sandbox": "basic: limits,caps,landlock,seccomp"}
    assert basic.ask("read", "/etc/passwd") == "EACCES"
    basic.close()


def test_the_worker_says_so_before_anything_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [*WRAPPER, *child_command("render.child")]
    line = r"user namespaces .* set workers\.sandbox = 'basic'"
    with (
        RenderWorker(make_spec(), fingerprint="f", scratch_dir=tmp_path, child_command=command) as worker,
        pytest.raises(UserError, match=line),
    ):
        worker.start()
    assert list(tmp_path.iterdir()) == []


def test_the_border_is_tried_before_a_plan_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    with BorderTrial(make_spec()) as trial:
        assert trial.check() == "strict: limits,user,net,ipc,pid,caps,landlock,seccomp"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("render.trial.child_command", lambda module: [*WRAPPER, *child_command(module)])
    with pytest.raises(UserError, match="network namespaces"):
        produce.check_device(make_spec(), "f")
    produce.check_device(make_spec(workers={"sandbox": "basic"}), "f")


@pytest.mark.blender
def test_a_row_names_the_border_only_if_a_child_was_asked(tmp_path: Path) -> None:
    (tmp_path / "empty.obj").write_text("o nothing\nv 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n")
    (tmp_path / "page.glb").write_text("<html>not found</html>")
    spec = make_spec(source={"kind": "directory", "path": str(tmp_path)}, workers={"num_cpus": 1})
    rows = {}
    try:
        for asset in list_assets(spec):
            failure = produce.render_asset(spec, "f", asset)
            assert isinstance(failure, Failure)
            rows[failure.kind] = failure.provenance.get("sandbox")
    finally:
        produce.close_worker()
    assert rows == {
        FailureKind.DEGENERATE_GEOMETRY: "strict: limits,user,net,ipc,pid,caps,landlock,seccomp",
        FailureKind.NOT_AN_ASSET: None,
    }


def test_each_layer_that_lacks_is_named() -> None:
    layers = dict.fromkeys(("limits", "user", "net", "ipc", "pid", "caps", "landlock", "seccomp"), True)
    assert confine.lacking(layers) is None
    for name, words in (("landlock", "Landlock"), ("seccomp", "seccomp filter"), ("user", "user namespaces")):
        assert words in (confine.lacking(layers | {name: False}) or "")
