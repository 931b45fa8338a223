"""What a child that a file has taken over would try, run inside the border: each attempt ends in a word.

It is a module for `render.border` and imports the standard library alone. Requests are lines of JSON: the name of an
attempt and its arguments. "done" means that the attempt succeeded; else the name of the error comes back.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from render import wire

LIBC = ctypes.CDLL(None, use_errno=True)
PTRACE_ATTACH, PTRACE_TRACEME = 16, 0
NEW_USER, NEW_NET = 0x10000000, 0x40000000
NAMESPACES = {"user": NEW_USER, "mount": 0x20000, "uts": 0x4000000, "cgroup": 0x2000000, "time": 0x80}


def call(number: int, *arguments: object) -> None:
    """Make a system call by number (x86_64)."""
    if LIBC.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")


def connect(family: int, address: object, kind: int = socket.SOCK_STREAM) -> None:
    with socket.socket(family, kind) as one:
        one.settimeout(2)
        one.connect(address)
        one.sendall(b"the canary sings")


def send_to(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendto(b"the canary sings", (host, port))


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def raw_fork() -> None:
    """Start a process by clone3 itself, past the C library."""
    arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, signal.SIGCHLD)
    number = LIBC.syscall(435, ctypes.byref(arguments), ctypes.sizeof(arguments))
    if number == 0:
        os._exit(0)
    if number < 0:
        raise OSError(ctypes.get_errno(), "")


def write_to(path: str) -> None:
    Path(path).write_text("cuckoo")


def execute_written(folder: str) -> None:
    """Write a program into the scratch folder and run it."""
    path = Path(folder, "program")
    path.write_bytes(b"#!/bin/sh\nexit 0\n")
    subprocess.run([str(path)], check=True)


def thread() -> None:
    done: list[bool] = []
    one = threading.Thread(target=lambda: done.append(True))
    one.start()
    one.join()
    if not done:
        raise OSError(errno.EAGAIN, "")


def raise_limits() -> None:
    for name in (resource.RLIMIT_FSIZE, resource.RLIMIT_DATA, resource.RLIMIT_NOFILE, resource.RLIMIT_CPU):
        resource.setrlimit(name, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def daemons(number: int) -> None:
    """Start processes that leave the session and are nobody's children, as a bomb does that wants to stay."""
    for _ in range(number):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
            os._exit(0)


def bomb(most: int) -> None:
    """Fork until the kernel says no; `most` succeeding is a failure of the border."""
    pids = []
    try:
        for _ in range(most):
            pids.append(os.fork())
            if pids[-1] == 0:
                time.sleep(600)
                os._exit(0)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def status(field: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


def in_memory_of(pid: int) -> None:
    class IoVec(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    buffer = ctypes.create_string_buffer(8)
    mine, theirs = IoVec(ctypes.addressof(buffer), 8), IoVec(0x400000, 8)
    call(310, pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)


def hoard() -> None:
    """Write one file of 3 GiB, holes and all."""
    with Path(os.environ["HOME"], "hoard").open("wb") as file:
        file.truncate(3 * 2**30)


ATTEMPTS: dict[str, Callable[..., object]] = {
    "read": lambda path: Path(path).read_bytes()[:0],
    "list": lambda path: os.listdir(path)[:0],  # noqa: PTH208
    "write": write_to,
    "append": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_APPEND)),
    "delete": lambda path: Path(path).unlink(),
    "truncate": lambda path: os.truncate(path, 0),
    "chmod": lambda path: Path(path).chmod(0o777),
    "chown": lambda path: os.chown(path, os.getuid(), os.getgid()),
    "touch": lambda path: os.utime(path, (0, 0)),
    "attribute": lambda path: os.setxattr(path, "user.cuckoo", b"1"),
    "move": lambda source, target: Path(source).rename(target),
    "link": os.link,
    "symlink": lambda source, target: Path(target).symlink_to(source),
    "pipe": os.mkfifo,
    "make_folder": lambda path: Path(path).mkdir(),
    "open_maps": lambda pid: Path(f"/proc/{pid}/maps").read_text()[:0],
    "tcp": lambda host, port: connect(socket.AF_INET, (host, port)),
    "udp": send_to,
    "tcp6": lambda port: connect(socket.AF_INET6, ("::1", port)),
    "unix": lambda path: connect(socket.AF_UNIX, path),
    "abstract": lambda name: connect(socket.AF_UNIX, "\0" + name),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close(),
    "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "listen": lambda: socket.create_server(("127.0.0.1", 0)).close(),
    "pair": lambda: [one.close() for one in socket.socketpair()][:0],
    "fork": fork,
    "raw_fork": raw_fork,
    "vfork_exec": lambda: subprocess.run(["/bin/true"], check=True),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "execute_written": execute_written,
    "trace_parent": lambda pid: call(101, PTRACE_ATTACH, pid, 0, 0),
    "trace_me": lambda: call(101, PTRACE_TRACEME, 0, 0, 0),
    "memory_of": in_memory_of,
    "kill": lambda pid: os.kill(pid, signal.SIGKILL),
    "pidfd": lambda pid: os.close(os.pidfd_open(pid)),
    "limits_of": lambda pid: resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0)) and None,
    "unshare": lambda: call(272, NEW_USER | NEW_NET),
    "unshare_as": lambda name: call(272, NAMESPACES[name]),
    "vsock": lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close(),
    "setns": lambda path: call(308, os.open(path, os.O_RDONLY), 0),
    "mount": lambda path: call(165, b"none", path.encode(), b"tmpfs", 0, None),
    "chroot": lambda: os.chroot("/"),
    "keys": lambda: call(250, 0, -3, 1),
    "bpf": lambda: call(321, 0, None, 0),
    "perf": lambda: call(298, None, 0, -1, -1, 0),
    "io_uring": lambda: call(425, 1, ctypes.create_string_buffer(120)),
    "userfault": lambda: call(323, 0),
    "shared_memory": lambda: call(29, 0, 4096, 0o1600),
    "module": lambda: call(175, None, 0, b""),
    "reboot": lambda: call(169, 0, 0, 0, None),
    "clock": lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()),
    "hostname": lambda: socket.sethostname("cuckoo"),
    "handle": lambda: call(304, -100, ctypes.create_string_buffer(16), 0),
    "type_on_terminal": lambda: fcntl.ioctl(0, 0x5412, b"x"),
    "raise_limits": raise_limits,
    "hoard": hoard,
    "thread": thread,
    "executable_memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close(),
    "daemons": daemons,
    "bomb": bomb,
    "die": lambda number: os.kill(os.getpid(), number),
    "abort": os.abort,
    "exit": os._exit,
    "other_door": lambda: call(0x40000000 | 39),
    "status": status,
    "environment": lambda: dict(os.environ),
    "identity": lambda: [os.getuid(), os.getpid(), os.getppid()],
    "limits": lambda: [resource.getrlimit(n)[1] for n in (resource.RLIMIT_CORE, resource.RLIMIT_CPU)],
}


def main(args: argparse.Namespace, sandbox: str) -> int:
    """Answer attempts until stdin ends."""
    wire.send(args.result_fd, {"type": "ready", "sandbox": sandbox})
    for line in sys.stdin.buffer:
        name, *arguments = json.loads(line)
        try:
            found = ATTEMPTS[name](*arguments)
        except OSError as error:
            told: object = errno.errorcode.get(error.errno or 0, type(error).__name__)
        except (subprocess.SubprocessError, ValueError) as error:
            told = type(error).__name__
        else:
            told = found if found and isinstance(found, str | list | dict) else "done"
        wire.send(args.result_fd, {"type": "answer", "found": told})
    return 0


if __name__ == "__main__":  # without a border, to see that what it refuses would work
    parser = argparse.ArgumentParser()
    parser.add_argument("--result-fd", type=int)
    main(parser.parse_args(), "none")
