"""Run the probe behind the border and print what became of its attempts; standard library alone.

    python -m tests.attacks.ask SANDBOX FOLDER [PROGRAMS]     attempts as JSON on stdin, answers as JSON on stdout

FOLDER gets the child's writable folder `child` and the readable one `staged`; with a folder of PROGRAMS the child may
start processes. An attempt that ends the child is the
last; its answer is how the child ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from render import wire
from render.reach import border_of

ROOT = Path(__file__).resolve().parents[2]


class Probe:
    """A probe behind a border that is told by hand, so that an interpreter without our dependencies can run it."""

    def __init__(
        self, sandbox: str, folder: Path, *, run: tuple[Path, ...] = (), wrapper: tuple[str, ...] = ()
    ) -> None:
        self.home = folder / "child" / "home"
        self.home.mkdir(parents=True, exist_ok=True)
        (folder / "staged").mkdir(exist_ok=True)
        environment = {"HOME": str(self.home), "PYTHONPATH": str(ROOT), "PATH": os.environ.get("PATH", "")}
        border = border_of(
            sandbox, write=[folder / "child"],
            read=[folder / "staged", ROOT / "tests" / "__init__.py", ROOT / "tests" / "attacks"], run=run,
            environment=environment, cpu_s=1000,
        )  # fmt: skip
        result_read, result_write = os.pipe()
        arguments = {
            "--result-fd": result_write, "--parent-pid": os.getpid(), "--memory-bytes": 2**30, "--threads": 1,
            "--border": border.to_json(),
        }  # fmt: skip
        python = [sys.executable, "-P", "-s", "-m"]
        command = [
            *python,
            "render.border",
            "tests.attacks.probe",
            *(str(x) for pair in arguments.items() for x in pair),
        ]
        if sandbox == "none":
            command = [*python, "tests.attacks.probe", "--result-fd", str(result_write)]
        self.process = subprocess.Popen(
            [*wrapper, *command],
            stdin=subprocess.PIPE, pass_fds=[result_write], env=environment, cwd=self.home, start_new_session=True,
        )  # fmt: skip
        os.close(result_write)
        self._replies = os.fdopen(result_read, "rb")
        self.first = self._read()

    def ask(self, *attempt: object) -> Any:
        """Make an attempt and return its answer; how the child ended, if it did."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(attempt).encode() + b"\n")
        self.process.stdin.flush()
        return self._read().get("found")

    def _read(self) -> dict[str, Any]:
        prefix = self._replies.read(wire.PREFIX.size)
        if not prefix:
            return {"type": "ended", "found": f"ended {self.process.wait()}"}
        return wire.parse_header(self._replies.read(wire.parse_prefix(prefix, 0)[0]))

    def close(self) -> None:
        """End the child by ending its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self._replies.close()


def main() -> None:
    """See the module."""
    probe = Probe(sys.argv[1], Path(sys.argv[2]), run=tuple(map(Path, sys.argv[3:])))
    attempts = json.load(sys.stdin)
    answers = [probe.ask(*attempt) for attempt in attempts] if probe.first["type"] == "ready" else []
    print(json.dumps({"first": probe.first, "answers": answers}))
    probe.close()


if __name__ == "__main__":
    main()
