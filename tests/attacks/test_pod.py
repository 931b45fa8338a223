"""The pods' seccomp profile, put on for real: the strict border stands under it, and would not under the usual one.

The profile is loaded by libseccomp, as a container's runtime does; no container is made. What it refuses is asked as
root where the tests run as root, who may do all of it otherwise.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from render.process import child_command
from render.worker import RenderWorker
from tests.attacks.ask import ROOT
from tests.attacks.pod import LIBRARY
from tests.attacks.test_border import NOBODY, REFUSALS, Outside, ask_as, attempts, outside  # noqa: F401 - a fixture
from tests.render.conftest import asset_of, make_spec
from tests.render.files import ball, write_obj

PROFILE = ROOT / "jobs/cluster/kubernetes/seccomp.json"


def has_libseccomp() -> bool:
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return os.uname().machine == "x86_64"


pytestmark = pytest.mark.skipif(not has_libseccomp(), reason=f"{LIBRARY} on x86_64 is needed")


def ask_in_pod(
    folder: Path, sandbox: str, asked: list[list[Any]], *more: str, user: int | None = NOBODY
) -> dict[str, Any]:
    if user is not None and os.getuid() != 0:
        user = None
    return ask_as(user, sandbox, folder, asked, pod=(*more, str(PROFILE)))


def scratch_of(outside: Outside) -> Path:  # noqa: F811
    folder = outside.folder / "scratch"
    folder.mkdir()
    return folder


def test_a_strict_child_has_every_layer_in_a_pod(outside: Outside) -> None:  # noqa: F811
    folder, before = scratch_of(outside), outside.state()
    asked = attempts(outside, folder)
    found = ask_in_pod(folder, "strict", [["write", str(folder / "child" / "home" / "egg")], *asked, ["thread"]])
    assert found["first"] == {"type": "ready", "sandbox": "strict: limits,user,net,ipc,pid,caps,landlock,seccomp"}
    egg, *refused, thread = found["answers"]
    assert (egg, thread) == ("done", "done")
    assert {str(one): answer for one, answer in zip(asked, refused, strict=True) if answer not in REFUSALS} == {}
    assert (outside.state(), outside.heard) == (before, [])


def test_without_its_rule_for_namespaces_strict_is_refused_in_one_line(outside: Outside) -> None:  # noqa: F811
    # As under the profiles that runtimes bring, which give new namespaces to holders of CAP_SYS_ADMIN alone.
    folder = scratch_of(outside)
    first = ask_in_pod(folder, "strict", [], "--without", "unshare")["first"]
    assert first["type"] == "no_border"
    assert "a seccomp profile that allows unshare" in first["message"]
    basic = ask_in_pod(folder, "basic", [], "--without", "unshare")["first"]
    assert basic == {"type": "ready", "sandbox": "basic: limits,caps,landlock,seccomp"}


# What only attacks on a node need. Not asked: what would hurt this machine, were the profile wrong.
REFUSED = ("keys", "bpf", "perf", "io_uring", "userfault", "trace_me", "chroot", "handle")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may do these things without the profile")
def test_a_pod_is_refused_what_its_profile_leaves_out(outside: Outside) -> None:  # noqa: F811
    folder = scratch_of(outside)
    asked = [["mount", str(outside.cage)], ["setns", "/proc/self/ns/net"], *([name] for name in REFUSED)]
    asked += [["unshare_as", name] for name in ("mount", "uts", "cgroup", "time")] + [["vsock"]]
    bare = ask_as(None, "none", folder, [*asked[1:2], ["chroot"], ["unshare_as", "uts"]])["answers"]
    assert bare == ["done"] * 3, "without the profile they succeed"
    answers = ask_in_pod(folder, "none", asked, user=None)["answers"]
    assert dict(zip(map(json.dumps, asked), answers, strict=True)) == {json.dumps(one): "EPERM" for one in asked}
    allowed = [["unshare_as", "user"], ["thread"], ["vfork_exec"], ["tcp", "127.0.0.1", outside.tcp], ["netlink"]]
    assert ask_in_pod(folder, "none", allowed, user=None)["answers"] == ["done"] * len(allowed)


def test_the_child_still_may_not_mount_in_a_namespace_of_its_own(outside: Outside) -> None:  # noqa: F811
    # A namespace's root has every capability in it; the profile holds all the same.
    folder = scratch_of(outside)
    asked = [["unshare_as", "user"], ["mount", str(outside.cage)], ["unshare_as", "mount"], ["keys"]]
    assert ask_in_pod(folder, "none", asked)["answers"] == ["done", "EPERM", "EPERM", "EPERM"]


def test_blender_renders_in_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-m", "tests.attacks.pod", str(PROFILE), *child_command("render.child")]
    path = write_obj(tmp_path / "ball.obj", [(*ball(), (0.8, 0.2, 0.1))])
    scratch = tmp_path / "scratch"
    with RenderWorker(make_spec(), fingerprint="f", scratch_dir=scratch, child_command=command) as worker:
        sample = worker.render(asset_of(path), path)
        assert worker.sandbox == "strict: limits,user,net,ipc,pid,caps,landlock,seccomp"
    assert len(sample.views) == 2
    assert list(scratch.iterdir()) == []
