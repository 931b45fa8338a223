"""Begin a child: confine the process, then run the module that opens strangers' files in it.

    python -P -s -m render.border MODULE --result-fd N --parent-pid N --memory-bytes N --threads N --device NAME
                                         --border JSON

MODULE has `main(args, sandbox)`. Only the standard library is imported before the border stands (`render.confine` says
why). A process namespace makes three processes of the one that the supervisor starts:

    this one, waiting      outside; dies by the signal that ended the child, so that the supervisor sees the cause
      first of the namespace, waiting        adopts and buries what the child leaves; its death kills all in there
        the child          SIGABRT and the like reach it, which they would not as first process

Each is tied to the life of the one above, and the waiting two hold no pipe and open nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from render import confine, wire

NO_BORDER_STATUS = 3
_SIGNALLED = 128  # as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Confine this process as `--border` says and run the module; a strict border that has a gap ends it instead."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    for name in ("--result-fd", "--parent-pid", "--memory-bytes", "--threads"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--border", required=True)
    args = parser.parse_args(argv)
    confine.die_with(args.parent_pid)
    border = confine.Border.from_json(args.border)
    confine.limit(args.memory_bytes, border.cpu_s)
    # Afterwards the folder that holds these packages cannot be listed any more, which finding them takes.
    for package in ("pipeline", args.module.rpartition(".")[0]):
        importlib.import_module(package)
    entered = confine.enter_namespaces()
    if "pid" in entered:
        _fork_and_wait()
    layers = {"limits": True} | {name: name in entered for name in ("user", "net", "ipc", "pid")}
    layers["caps"] = confine.drop_capabilities()
    layers["landlock"] = confine.restrict_files(border)
    layers["seccomp"] = confine.restrict_calls(border)
    gap = confine.lacking(layers)
    if border.sandbox == "strict" and gap is not None:
        wire.send(args.result_fd, {"type": "no_border", "message": gap})
        return NO_BORDER_STATUS
    run = importlib.import_module(args.module).main
    return int(run(args, confine.describe(border, layers)))


def _fork_and_wait() -> None:
    """Return in the child, which is the second process of the namespace; the other two wait for it and never return."""
    first = os.fork()
    if first:
        _become(_wait_for(first))
    confine.die_with(0)  # a parent outside of the namespace has number 0
    child = os.fork()
    if child:
        os._exit(_wait_for(child))
    confine.die_with(1)


def _wait_for(pid: int) -> int:
    """Wait for `pid`, burying others; return its status as a shell does. All files are closed: pipes end with it."""
    os.closerange(0, 4096)
    while True:
        with contextlib.suppress(InterruptedError):
            found, status = os.wait()
            if found == pid:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else _SIGNALLED - code


def _become(status: int) -> NoReturn:
    """End as the child ended, by the same signal or with the same status."""
    if status > _SIGNALLED:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(status - _SIGNALLED, signal.SIG_DFL)
        os.kill(os.getpid(), status - _SIGNALLED)
    os._exit(status)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # Blender's own exit handlers may crash or hang, and there is nothing left to save
