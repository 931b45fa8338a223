"""What a child does to itself before it opens a stranger's file: ties its life, limits itself, leaves the network."""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import resource
import signal
import tempfile
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_MAX_FILE_BYTES = 2 * 2**30

# Above the supervisor's cap on resident memory, so that the cap, which is typed, acts first; of data and not of address
# space, since Blender reserves far more addresses than it touches.
_DATA_FACTOR, _DATA_SLACK_BYTES = 1.5, 2**30


def enter(argv: Sequence[str] | None) -> tuple[argparse.Namespace, str]:
    """Begin a child: read its arguments and confine it; return them and what `leave_network` says."""
    parser = argparse.ArgumentParser()
    for name in ("--result-fd", "--parent-pid", "--memory-bytes", "--threads"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    die_with(args.parent_pid)
    limit(args.memory_bytes)
    return args, leave_network()


def die_with(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the supervisor's thread that started us ends; leave if it is gone already."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Had it died before prctl, nobody would send the signal.
    if os.getppid() != parent_pid:
        os._exit(1)


def limit(memory_bytes: int) -> None:
    """Bound this process's data, files and core dumps."""
    for name, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, _MAX_FILE_BYTES),
        (resource.RLIMIT_DATA, int(memory_bytes * _DATA_FACTOR) + _DATA_SLACK_BYTES),
    ):
        _, hard = resource.getrlimit(name)
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (allowed, allowed))


def full_disk(error: BaseException) -> str | None:
    """Return what to say where an error means that the scratch folder's disk is full, else None.

    Nothing is wrong with the object then, so it must not become its failure.
    """
    if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return None
    place = error.filename or tempfile.gettempdir()
    return f"{place}: {os.strerror(error.errno)}; free some, or set TMPDIR to a folder on another disk"


def leave_network() -> str:
    """Enter an empty network namespace, as root or in a user namespace of our own; return "none" or "open"."""
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (_CLONE_NEWNET, _CLONE_NEWUSER | _CLONE_NEWNET):
        if libc.unshare(flags) == 0:
            return "none"
    return "open"
