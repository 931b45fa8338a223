"""Training processes by the dozen: a process that has imported the trainer forks one for each that a test asks for.

A child is a real process that runs the real command line and can be killed; forking it saves the seconds that imports
take. The zygote itself computes nothing and starts no thread, so that a fork of it is whole.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Zygote:
    """The other end of it, as a context manager."""

    def __init__(self) -> None:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lrm.zygote"], env=env, cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, **what: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, argv: Sequence[str], log: Path, ranks: int = 1) -> list[int]:
        """Start `lrm.train` on so many ranks; returns their process ids."""
        if ranks == 1:
            return [self.ask(argv=list(argv), log=str(log), env={})]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.ask(argv=list(argv), log=f"{log}.{r}", env=place | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(ranks)
        ]

    def exit_status(self, pid: int) -> int | None:
        """Return how a process ended, negative for a signal, or None while it runs."""
        status = self.ask(poll=pid)
        assert status is None or isinstance(status, int)
        return status

    def wait(self, pids: Sequence[int], timeout_s: float = 120) -> list[int]:
        """Return the exit statuses of all."""
        deadline_s, ended = time.monotonic() + timeout_s, dict.fromkeys(pids)
        while any(status is None for status in ended.values()):
            assert time.monotonic() < deadline_s, f"{ended}: still running after {timeout_s} s"
            time.sleep(0.02)
            ended |= {pid: self.exit_status(pid) for pid, status in ended.items() if status is None}
        return [status for status in ended.values() if status is not None]

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # ends it, and it its children
        self._process.wait(30)


def _child(ask: dict[str, Any]) -> None:
    os.environ.update(ask["env"])
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    status = 70
    try:
        from lrm.train import main

        status = main(ask["argv"])
    except BaseException:  # noqa: BLE001  # whatever it is belongs in the log, and the child ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Fork and tell until the input ends, then kill what is left."""
    import lrm.train  # noqa: F401  # what takes seconds

    running: set[int] = set()
    for line in sys.stdin:
        ask = json.loads(line)
        answer: int | None = None
        if "poll" in ask:
            pid, status = os.waitpid(ask["poll"], os.WNOHANG)
            if pid:
                running.discard(pid)
                answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                _child(ask)
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    serve()
