"""A seccomp filter: system calls that no reader of 3D files needs, refused by the kernel.

A list of what is denied and not of what is allowed: Blender, its libraries and GPU drivers call some 150 others, which
change from release to release. What is on it either reaches beyond the process (other processes, sockets, keys), asks
the kernel for its less tried parts (bpf, io_uring, user faults, perf, namespaces), or changes what Landlock does not
govern (modes, owners, times and attributes of files). A denied call returns EPERM, so that an importer that tries one
goes on without it. Calls through another architecture's door (32 bit, x32) kill the process.

The program is classic BPF, 2 instructions a call, 90 calls; the kernel remembers which calls always pass, and those
cost nothing. Road not taken: libseccomp, which is no package of the index and would be a system library for two
hundred lines of numbers; the numbers of one architecture are below, and on another there is no filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator

_DENIED = {
    # other processes
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "process_madvise": 440,
    "pidfd_send_signal": 424, "pidfd_open": 434, "pidfd_getfd": 438,
    # namespaces and mounts
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    "statmount": 457, "listmount": 458, "open_tree_attr": 467,
    # keys, and parts of the kernel with a past
    "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "modify_ldt": 154, "uselib": 134,
    "lookup_dcookie": 212, "nfsservctl": 180, "name_to_handle_at": 303, "open_by_handle_at": 304,
    "fanotify_init": 300, "inotify_init": 253, "inotify_init1": 294, "inotify_add_watch": 254,
    # the machine
    "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320,
    "reboot": 169, "swapon": 167, "swapoff": 168, "acct": 163, "quotactl": 179, "quotactl_fd": 443, "syslog": 103,
    "settimeofday": 164, "clock_settime": 227, "clock_adjtime": 305, "adjtimex": 159, "iopl": 172, "ioperm": 173,
    "sethostname": 170, "setdomainname": 171, "vhangup": 153,
    # sockets, those that are files among them; a pair of connected ones is harmless, and Python makes such pairs
    "socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50, "accept4": 288,
    # memory that outlives a process
    "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
    # metadata
    "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93, "lchown": 94,
    "fchownat": 260, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198,
    "fremovexattr": 199, "setxattrat": 463, "removexattrat": 466, "utime": 132, "utimes": 235, "futimesat": 261,
    "utimensat": 280, "file_setattr": 469, "truncate": 76, "mknod": 133, "mknodat": 259,
}  # fmt: skip
_DENIED_STARTS = {"fork": 57, "vfork": 58, "execve": 59, "execveat": 322}
_CLONE, _CLONE3, _IOCTL = 56, 435, 16

_CLONE_THREAD = 0x00010000
_NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # typing into, or pasting on, a terminal

_MACHINE, _ARCHITECTURE, _X32 = "x86_64", 0xC000003E, 0x40000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENT0_AT, _ARGUMENT1_AT = 0, 4, 16, 24  # low halves
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_SECCOMP, _SET_FILTER = 317, 1
# Kernels before 5.16 otherwise slow a filtered process down, against a leak between parts of one process.
_KEEP_SPECULATION = 1 << 2
_INSTRUCTION = struct.Struct("=HBBI")


def install(*, may_start: bool) -> None:
    """Put the filter on this thread and all that it starts; it cannot be taken off.

    Args:
        may_start: whether processes and programs may be started; threads always may.

    Raises:
        OSError: another architecture, or a kernel without seccomp filters.
    """
    if os.uname().machine != _MACHINE:
        raise OSError(f"the filter is written for {_MACHINE}, this is {os.uname().machine}")
    code = b"".join(_program(may_start))
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, padding, and where they are
    header = struct.pack("@HP", len(code) // _INSTRUCTION.size, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SECCOMP, _SET_FILTER, _KEEP_SPECULATION, ctypes.c_char_p(header)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _program(may_start: bool) -> Iterator[bytes]:
    """Yield the instructions: the architecture's door, then the plain denials, then calls judged by an argument."""
    yield _op(_LOAD, _ARCHITECTURE_AT)
    yield _op(_EQUAL, _ARCHITECTURE, skip_if_true=1)
    yield _op(_RETURN, _KILL)
    yield _op(_LOAD, _NUMBER_AT)
    yield _op(_AT_LEAST, _X32, skip_if_false=1)
    yield _op(_RETURN, _KILL)
    refuse = _op(_RETURN, _REFUSE | errno.EPERM)
    for number in [*_DENIED.values(), *(() if may_start else _DENIED_STARTS.values())]:
        yield _op(_EQUAL, number, skip_if_false=1)
        yield refuse
    # The flags of clone3 lie in memory, where no filter sees them; told that there is none, the C library takes clone.
    yield _op(_EQUAL, _CLONE3, skip_if_false=1)
    yield _op(_RETURN, _REFUSE | errno.ENOSYS)
    yield _op(_EQUAL, _IOCTL, skip_if_false=4)
    yield _op(_LOAD, _ARGUMENT1_AT)
    yield _op(_EQUAL, _TIOCSTI, skip_if_true=1)
    yield _op(_EQUAL, _TIOCLINUX, skip_if_false=1)
    yield refuse
    # After an ioctl the argument is loaded, and may look like any number: ask anew.
    yield _op(_LOAD, _NUMBER_AT)
    yield _op(_EQUAL, _CLONE, skip_if_false=5 if not may_start else 3)
    yield _op(_LOAD, _ARGUMENT0_AT)
    yield _op(_ANY_BIT, _NEW_NAMESPACES, skip_if_false=1)
    yield refuse
    if not may_start:
        yield _op(_ANY_BIT, _CLONE_THREAD, skip_if_true=1)
        yield refuse
    yield _op(_RETURN, _ALLOW)


def _op(code: int, value: int, *, skip_if_true: int = 0, skip_if_false: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, skip_if_true, skip_if_false, value)
