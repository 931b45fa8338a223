"""The border: what a child does to itself before it opens a stranger's file, layer by layer.

    limits     data, CPU time, size of a file, processes, open files, no core dumps
    user       a user namespace of its own, in which it is nobody's root
    net        an empty network namespace: not even a loopback
    ipc        no System V objects of others
    pid        a process namespace: when its first process dies, the kernel kills all others, wherever they hid
    caps       no capability, and none to be had again (no_new_privs)
    landlock   files: reads Blender, the system's libraries and the asset's staged copy; writes its scratch folder
    seccomp    no sockets, no other processes' memory, no new programs, no calls that only attacks need

`workers.sandbox = "strict"` requires all of them; "basic" takes those that the system gives. Which were on stands in
every row. All of it is done by one thread, before anything but the standard library is imported: a user namespace is
refused to a process with threads, and Landlock holds for the thread that asks, so a pool that numpy has started would
stay outside. It takes 5 ms of a start of a second. Which files may be read is said by the supervisor (`Border`).

Road not taken: bubblewrap or nsjail, which do the same from outside, as programs that a cluster's nodes do not have.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from render import landlock, seccomp

_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_CAPSET, _CAPABILITY_VERSION_3, _MAX_CAPABILITY = 126, 0x20080522, 63
_NAMESPACES = {"user": 0x10000000, "net": 0x40000000, "ipc": 0x08000000, "pid": 0x20000000}
_MAX_FILE_BYTES = 2 * 2**30
_MAX_OPEN_FILES = 4096
MIN_PROCESSES, PROCESSES_PER_CPU = 1024, 32  # threads count; Blender makes a few pools of one a processor

# Above the supervisor's cap on resident memory, so that the cap, which is typed, acts first; of data and not of address
# space, since Blender reserves far more addresses than it touches.
_DATA_FACTOR, _DATA_SLACK_BYTES = 1.5, 2**30

_LACKS = {
    "user": "user namespaces (user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns 0; in a "
    "container, a seccomp profile that allows unshare)",
    "net": "network namespaces",
    "ipc": "IPC namespaces",
    "pid": "process namespaces",
    "caps": "dropping of capabilities",
    "landlock": "Landlock (Linux 5.13 or newer, with landlock in lsm= at boot)",
    "seccomp": "the seccomp filter (Linux on x86_64)",
    "limits": "resource limits",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Border:
    """What a child may, as its supervisor tells it.

    Attributes:
        sandbox: "strict" or "basic", as in `WorkerSpec`.
        read: files and folders that it reads.
        run: folders of programs that it starts; with none it starts no process at all.
        write: folders that it writes to.
        devices: device files, such as a GPU's.
        cpu_s: CPU time that the process may use in its life.
    """

    sandbox: str
    read: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    cpu_s: int = 0

    def to_json(self) -> str:
        """Return it as an argument of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Border:
        """Return what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        lists: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**(values | lists))


def die_with(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the supervisor's thread that started us ends; leave if it is gone already."""
    _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Had it died before prctl, nobody would send the signal.
    if os.getppid() != parent_pid:
        os._exit(1)


def limit(memory_bytes: int, cpu_s: int) -> None:
    """Bound this process's data, CPU time, files, open files and core dumps."""
    for name, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, _MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
        (resource.RLIMIT_DATA, int(memory_bytes * _DATA_FACTOR) + _DATA_SLACK_BYTES),
        (resource.RLIMIT_CPU, cpu_s or resource.RLIM_INFINITY),
    ):
        _set_limit(name, value)


def full_disk(error: BaseException | None) -> str | None:
    """Return what to say where an error means that the scratch folder's disk is full, else None.

    Nothing is wrong with the object then, so it must not become its failure.
    """
    if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return None
    place = error.filename or tempfile.gettempdir()
    return f"{place}: {os.strerror(error.errno)}; free some, or set TMPDIR to a folder on another disk"


def _set_limit(name: int, value: int) -> None:
    _, hard = resource.getrlimit(name)
    allowed = value if hard == resource.RLIM_INFINITY else hard if value == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(name, (allowed, allowed))


def enter_namespaces() -> list[str]:
    """Enter namespaces of our own, all at once where the system lets; return the names of those entered.

    The process namespace is entered by what is forked next.
    """
    user, group = os.getuid(), os.getgid()
    sets = (("user", "net", "ipc", "pid"), ("user", "net"), ("net", "ipc", "pid"), ("net",))  # the last two as root
    entered = next((names for names in sets if _libc().unshare(sum(_NAMESPACES[name] for name in names)) == 0), ())
    if "user" in entered:
        _keep_identity(user, group)
        # Counted within the namespace, so that it does not add up with the user's other work.
        _set_limit(resource.RLIMIT_NPROC, max(MIN_PROCESSES, PROCESSES_PER_CPU * (os.cpu_count() or 1)))
    return list(entered)


def _keep_identity(user: int, group: int) -> None:
    """Map the user to himself: files keep their owner, and no other user exists in here."""
    with contextlib.suppress(OSError):  # where it is refused we are nobody, which is as good
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")


def drop_capabilities() -> bool:
    """Give up every capability, also those that a new namespace came with; return whether none is left."""
    libc = _libc()
    for number in range(_MAX_CAPABILITY + 1):
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    return int(libc.syscall(_CAPSET, header, nothing)) == 0


def restrict_files(border: Border) -> bool:
    """Allow the border's files alone, by Landlock; return whether the kernel does it."""
    rules = [
        *((Path(path), landlock.READ) for path in border.read),
        *((Path(path), landlock.RUN) for path in border.run),
        *((Path(path), landlock.WRITE) for path in border.write),
        *((Path(path), landlock.DEVICE) for path in border.devices),
    ]
    try:
        landlock.restrict(rules)
    except OSError:
        return False
    return True


def restrict_calls(border: Border) -> bool:
    """Put the filter of system calls on; return whether the kernel does it."""
    try:
        seccomp.install(may_start=bool(border.run))
    except OSError:
        return False
    return True


def describe(border: Border, layers: Mapping[str, bool]) -> str:
    """Return what stands in the row, such as "strict: limits,user,net,ipc,pid,caps,landlock,seccomp"."""
    return f"{border.sandbox}: {','.join(name for name, is_on in layers.items() if is_on)}"


def lacking(layers: Mapping[str, bool]) -> str | None:
    """Return the line that says which layers this system lacks, None where it has all."""
    missing = [_LACKS[name] for name in _LACKS if not layers.get(name)]
    if not missing:
        return None
    return (
        f"workers.sandbox = 'strict': this system does not give a child {', nor '.join(missing)}; allow that, or set "
        "workers.sandbox = 'basic', which goes without what is missing and says so in every row"
    )


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
