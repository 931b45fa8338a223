"""Landlock: the kernel's own list of what a process may still open, by its three system calls.

    create_ruleset(what is governed) -> fd;  add_rule(fd, a folder and what is allowed below it);  restrict_self(fd)

Whatever is governed and not allowed is refused from then on, to the thread that asked and to all that it starts: so it
is done before a second thread exists. Rules hang on folders, not on names; nothing can be allowed later. Governed is
all that this kernel can: files and folders, TCP, and from version 6 on signals and abstract sockets to the outside.
Not governed by any version are metadata (stat, chmod, times) and sockets that are files; `render.seccomp` refuses what
of that changes anything. The cost is 20 us a rule once, and a walk up the folders at each open.

Road not taken: packages on the index that bind Landlock are each one person's and young; it is three system calls.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION_FLAG, _PATH_BENEATH = 1, 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_DIR, MAKE_REG, REFER, TRUNCATE, IOCTL_DEV = 1 << 7, 1 << 8, 1 << 13, 1 << 14, 1 << 15
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

READ = READ_FILE | READ_DIR
RUN = READ | EXECUTE
# Neither links, nor sockets, pipes and devices: whoever cleans up finds files and folders only.
WRITE = READ | WRITE_FILE | TRUNCATE | MAKE_DIR | MAKE_REG | REMOVE_DIR | REMOVE_FILE | REFER
DEVICE = READ | WRITE_FILE | IOCTL_DEV

# version -> how many rights on files, then on TCP, then scopes, it knows
_KNOWN = ((7, 16, 2, 2), (6, 16, 2, 2), (5, 16, 2, 0), (4, 15, 2, 0), (3, 15, 0, 0), (2, 14, 0, 0), (1, 13, 0, 0))


def version() -> int:
    """Return the kernel's version of Landlock, 0 where it has none or has it off."""
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)))


def restrict(rules: Iterable[tuple[Path, int]]) -> int:
    """Allow this thread, and what it starts, no more than these; return the version of Landlock that did it.

    Args:
        rules: (path, rights); for a folder they hold for all below it. A path that is not there is passed over.

    Raises:
        OSError: the kernel cannot, or no_new_privs is not set.
    """
    found = version()
    if found < 1:
        raise OSError("Landlock is not there")
    num_fs, num_net, num_scopes = next(row[1:] for row in _KNOWN if found >= row[0])
    attributes = struct.pack("=QQQ", (1 << num_fs) - 1, (1 << num_net) - 1, (1 << num_scopes) - 1)
    size = 24 if num_scopes else 16 if num_net else 8
    fd = _call(_CREATE_RULESET, ctypes.c_char_p(attributes), ctypes.c_size_t(size), 0)
    try:
        for path, rights in rules:
            _allow(fd, path, rights & ((1 << num_fs) - 1))
        _call(_RESTRICT_SELF, fd, 0)
    finally:
        os.close(fd)
    return found


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # not there, or not to be reached anyhow
    try:
        if not os.path.isdir(f"/proc/self/fd/{fd}"):  # noqa: PTH112 - of the open file itself
            rights &= _FILE_RIGHTS
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.c_char_p(struct.pack("=Qi", rights, fd)), 0)
    finally:
        os.close(fd)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc().syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
