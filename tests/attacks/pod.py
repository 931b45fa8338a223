"""Run a command under a seccomp profile in the form of OCI's runtime-spec, as a container's runtime does it.

    python -m tests.attacks.pod [--without NAME] PROFILE COMMAND...

By libseccomp, which runc and crun use too: rules of several conditions, names that this libseccomp does not know are
passed over, and no_new_privs as `allowPrivilegeEscalation: false` sets it. The standard library alone is used, so that
any user's interpreter can run it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from pathlib import Path
from typing import Any

LIBRARY = "libseccomp.so.2"
_ACTIONS = {"SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x00050000}
_COMPARISONS = {"SCMP_CMP_NE": 1, "SCMP_CMP_EQ": 4, "SCMP_CMP_MASKED_EQ": 7}
_UNKNOWN = -1


class Condition(ctypes.Structure):
    """`struct scmp_arg_cmp`."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def confine(profile: dict[str, Any]) -> None:
    """Put a profile on this process and all that it starts.

    Raises:
        OSError: libseccomp is not there, or refuses the profile.
    """
    library = ctypes.CDLL(LIBRARY)
    library.seccomp_init.restype = ctypes.c_void_p
    made = ctypes.c_void_p(library.seccomp_init(_action(profile["defaultAction"], profile.get("defaultErrnoRet"))))
    assert profile["architectures"] == ["SCMP_ARCH_X86_64"], "the native one is what seccomp_init takes"
    for rule in profile["syscalls"]:
        conditions = [
            Condition(one["index"], _COMPARISONS[one["op"]], one["value"], one.get("valueTwo", 0))
            for one in rule.get("args", [])
        ]
        array = (Condition * max(1, len(conditions)))(*conditions)
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number == _UNKNOWN:
                continue
            action = _action(rule["action"], rule.get("errnoRet"))
            _check(library.seccomp_rule_add_array(made, action, number, len(conditions), array), name)
    _check(library.seccomp_load(made), "load")


def _action(name: str, number: int | None) -> ctypes.c_uint32:
    return ctypes.c_uint32(_ACTIONS[name] | (number or 0))


def _check(status: int, what: str) -> None:
    if status != 0:
        raise OSError(-status, f"{what}: {os.strerror(-status)}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("profile", type=Path)
    parser.add_argument("--without", default="", help="leave out the rules of this call")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    profile = json.loads(given.profile.read_text())
    profile["syscalls"] = [rule for rule in profile["syscalls"] if rule["names"] != [given.without]]
    confine(profile)
    os.execvp(given.command[0], given.command)


if __name__ == "__main__":
    main()
