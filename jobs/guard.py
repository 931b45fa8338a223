"""Two rules that watch a run: too many failures stop it, a full disk makes it wait.

A failure share is taken over the last objects, not over all: a network that goes down after a hundred thousand good
objects must not be paid for with a hundred thousand bad ones. Fewer objects than the window never stop a run, so one
failure of two objects says nothing. What the user's own policy leaves out is not counted, on either side.

What stops a run is `RunStoppedError`: a reason in one line. Shards that are open then are not committed, so what failed
for the wrong reason is made again by the same command once the cause is mended; committed ones stay.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.spec import DatasetSpec
from pipeline.store import Store
from pipeline.types import FailureKind, UserError

POLL_S = 2.0
LOOK_S = 5.0
POLICY = frozenset(
    {
        FailureKind.LICENCE_EXCLUDED, FailureKind.EXCLUDED, FailureKind.CROPPED, FailureKind.OVER_EXPOSED,
        FailureKind.THIN, FailureKind.SINGLE_COLOUR, FailureKind.UNTEXTURED, FailureKind.TRANSPARENT,
        FailureKind.CUT_OFF, FailureKind.NARROW_SWEEP,
    }
)  # fmt: skip
"""What only the user's own policy refuses: licences, lists, and rules that let everything in by default."""


class RunStoppedError(UserError):
    """A rule stopped the run: the message is the reason, and what to do."""


class FailureGuard:
    """The share of failures among the last objects that ended."""

    def __init__(self, max_share: float, window: int) -> None:
        self._max_share, self._last = max_share, deque[str | None](maxlen=window)
        self._kinds: Counter[str] = Counter()

    @property
    def share(self) -> float:
        """Share of failures among the objects looked at, 0 before the first."""
        return sum(self._kinds.values()) / len(self._last) if self._last else 0.0

    def saw(self, kind: str | None) -> None:
        """Take note of an object that ended: None for a sample.

        Raises:
            RunStoppedError: if that makes too many.
        """
        if kind in POLICY:
            return
        window = self._last.maxlen or 0
        if len(self._last) == window and (gone := self._last[0]) is not None:
            self._kinds[gone] -= 1
        self._last.append(kind)
        if kind is not None:
            self._kinds[kind] += 1
        if len(self._last) == window and self.share > self._max_share:
            kinds = ", ".join(f"{name} {count}" for name, count in self._kinds.most_common(3) if count)
            raise RunStoppedError(
                f"stopped: {sum(self._kinds.values())} of the last {window} objects failed ({kinds}), more than "
                f"workers.max_failure_share = {self._max_share:g}; committed shards stay. `make why UID=` tells of "
                "one; mend the cause and run the same command again, or set workers.max_failure_share=1"
            )


class DiskGuard:
    """Whether there is room in some folders; asks the system every LOOK_S seconds at most."""

    def __init__(self, folders: Iterable[Path], min_free_bytes: int) -> None:
        self._folders, self._min_free_bytes = [_existing(folder) for folder in folders], min_free_bytes
        self._looked_s, self._found = -1e9, ""

    def full(self) -> str:
        """Return which folder has too little room and how much, "" if none."""
        now = time.monotonic()
        if self._min_free_bytes and now - self._looked_s >= LOOK_S:
            self._looked_s, self._found = now, self._look()
        return self._found

    def _look(self) -> str:
        for folder in self._folders:
            free = shutil.disk_usage(folder).free
            if free < self._min_free_bytes:
                return (
                    f"{folder} has {free / 2**20:.0f} MiB free, "
                    f"{self._min_free_bytes / 2**20:.0f} MiB are wanted (workers.min_free_bytes)"
                )
        return ""

    def wait(self, say: Callable[[str], None], give_up: Callable[[], bool] = lambda: False) -> None:
        """Return once there is room; `say` is told when the waiting begins, and "" when it is over."""
        found = self.full()
        if not found:
            return
        say(found)
        while self.full() and not give_up():
            time.sleep(POLL_S)
        say("")


def worker_folders(spec: DatasetSpec) -> list[Path]:
    """Return the folders that a worker writes to: the temporary one and the fetch cache."""
    cache = spec.fetch.cache_dir or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [Path(tempfile.gettempdir()), Path(cache)]


def driver_folders(store: Store) -> list[Path]:
    """Return the folders whose filling stops everybody: that of the corpus, where it is one."""
    return [] if store.local_root is None else [store.local_root]


def _existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder
