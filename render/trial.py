"""Try the border without anything behind it: whether this system gives a child every layer that the spec requires."""

from __future__ import annotations

import argparse

from pipeline.spec import DatasetSpec
from pipeline.types import FailureKind
from render import wire
from render.process import child_command
from render.supervisor import Supervisor

_START_DEADLINE_S = 60.0


class BorderTrial(Supervisor):
    """Starts one child that does nothing; a context manager."""

    who = "the trial of the border"
    timeout_kind = FailureKind.RENDER_TIMEOUT
    crash_kind = FailureKind.RENDER_CRASH

    def __init__(self, spec: DatasetSpec) -> None:
        command = child_command("render.trial")
        super().__init__(spec, command, fingerprint="", num_threads=1, max_payload_bytes=0, scratch_dir=None)

    def check(self) -> str:
        """Return which layers this system gives.

        Raises:
            UserError: one that `workers.sandbox` requires is not there.
            AssetError: the child did not start.
        """
        self._launch(_START_DEADLINE_S, num_threads=1)
        return self.sandbox


def main(args: argparse.Namespace, sandbox: str) -> int:
    """Say what confines us."""
    wire.send(args.result_fd, {"type": "ready", "sandbox": sandbox})
    return 0
