"""What every supervisor of a child does: hear it out within its limits, and end it when it breaks them.

Replies are read as hostile (`render.wire`), the clock and the child's memory are watched while waiting, and a child
that can no longer be trusted to be between two assets is killed. What is asked and answered is the subclass's.
"""

from __future__ import annotations

import math
import os
import re
import select
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self

from pipeline.spec import DatasetSpec
from pipeline.types import MAX_LOG_TAIL_CHARS, AssetError, FailureKind, UserError, printable
from render import wire
from render.confine import full_disk
from render.process import ChildProcess, ScratchFolder

POLL_S = 0.2
_DISK_POLL_S = 1.0
MAX_BORDER_CHARS = 1000
# The child writes below `child`, and reads what is staged for it: Landlock's rules hang on these folders, which stay.
HOME, WORK, STAGED, STAGED_ASSET = "child/home", "child/asset", "staged", "staged/asset"
_RECYCLE_MEMORY_SHARE = 0.5
# What a program makes of a write that fails, when it makes anything of it.
_OF_A_FULL_DISK = (
    FailureKind.INTERNAL, FailureKind.IMPORT_ERROR, FailureKind.MISSING_TEXTURE, FailureKind.RENDER_CRASH,
    FailureKind.INGEST_CRASH,
)  # fmt: skip
_ROOM_BYTES = 2**16
_OWN_FAULT_SHARE = 0.5
_OUT_OF_MEMORY = re.compile(r"std::bad_alloc|MemoryError|[MC]alloc (array )?returns null|Cannot allocate memory")


class FullDiskError(UserError):
    """A disk of this machine had no room left for an object in the making."""


class Supervisor:
    """The life of one child at a time; a context manager, for one thread at a time.

    Attributes:
        who: how messages call the child.
        timeout_kind, crash_kind: what its silence and its death are.
        num_started: children that this process has started, of any kind.
    """

    num_started: ClassVar[int] = 0
    who: ClassVar[str]
    timeout_kind: ClassVar[FailureKind]
    crash_kind: ClassVar[FailureKind]

    def __init__(
        self,
        spec: DatasetSpec,
        command: Sequence[str],
        *,
        fingerprint: str,
        num_threads: int | None,
        max_payload_bytes: int,
        scratch_dir: Path | None,
    ) -> None:
        """Prepare; no child is started yet.

        Args:
            spec: the dataset's spec; `limits` are those of the child.
            command: the child's.
            fingerprint: the spec's fingerprint, as samples carry it.
            num_threads: what the child may use; default `spec.workers.num_cpus`, rounded up.
            max_payload_bytes: of one reply.
            scratch_dir: where the child's temporary folder is made; default the system's.
        """
        self._spec = spec
        self._command = list(command)
        self._fingerprint = fingerprint
        self._num_threads = max(1, math.ceil(spec.workers.num_cpus) if num_threads is None else num_threads)
        self._limits = spec.limits
        self._max_payload_bytes = max_payload_bytes
        self._scratch = ScratchFolder(scratch_dir)
        self._child: ChildProcess | None = None
        self._next_disk_poll = 0.0
        self.sandbox = ""
        self._starter = ThreadPoolExecutor(1, "child-start")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the child and all that it started, and remove its temporary folder. Safe to call twice."""
        self._stop_child()
        self._starter.shutdown()
        self._scratch.close()

    def _launch(
        self, allowed_s: float, *, read: Sequence[Path] = (), **options: Any
    ) -> tuple[ChildProcess, dict[str, Any]]:
        """Start a child and return it with its first word; `options` are those of `ChildProcess`."""
        Supervisor.num_started += 1
        limits, workers = self._limits, self._spec.workers
        home, staged = self._scratch.fresh(HOME), self._scratch.fresh(STAGED)
        self._child = child = ChildProcess(
            self._command,
            home=home,
            memory_bytes=limits.memory_bytes,
            # The deadline ends an asset; this ends a child whose supervisor does not.
            cpu_s=math.ceil(limits.deadline_s * limits.objects_per_child * (self._num_threads + 1)),
            starter=self._starter,
            sandbox=workers.sandbox,
            write=[home.parent],
            read=[staged, *map(Path, workers.readable), *read],
            **options,
        )
        header = self._receive(child, time.monotonic() + allowed_s, f"{allowed_s:g} s to start")[0]
        if header["type"] == "no_border":
            self._stop_child()
            raise UserError(str(header.get("message", ""))[:MAX_BORDER_CHARS])
        self.sandbox = str(header.get("sandbox", ""))[:100]
        return child, header

    @contextmanager
    def _one_asset(self, child: ChildProcess) -> Iterator[None]:
        """Talk with a child about one asset; afterwards it is kept, recycled, or killed if it cannot be trusted."""
        child.log.clear()
        child.num_objects += 1
        try:
            yield
        except AssetError as error:
            full = self._full_disk(child, error)
            if full is not None or error.kind in (FailureKind.INTERNAL, FailureKind.OUT_OF_MEMORY):
                self._stop_child()
            self._recycle(child)
            if full is not None:
                raise full from None
            raise
        except BaseException:
            # Ctrl-C, or a fault of ours in mid-conversation: what the child says next would be about this asset.
            self._stop_child()
            raise
        self._recycle(child)

    def _full_disk(self, child: ChildProcess, error: AssetError) -> UserError | AssetError | None:
        """Return what a failure really was where no room is left for the scratch folder; None where there is some.

        The child's word is not taken for it: who says so could end any run. What fills half of what it may, and the
        disk with it, has itself to thank.
        """
        if error.kind not in _OF_A_FULL_DISK or (full := _no_room(self._scratch.path)) is None:
            return None
        filled = child.disk_bytes(self._scratch.path)
        if filled < _OWN_FAULT_SHARE * self._limits.scratch_bytes:
            return FullDiskError(full)
        found = f"{self.who} filled {filled / 2**20:.0f} MiB of disk, and none was left"
        return AssetError(FailureKind.TOO_LARGE, found, error.log_tail)

    def _next_word(self, deadline: float, verb: str, uid: str) -> tuple[float, str]:
        """Return until when the next reply may take, and what took longer if it does, for `_receive`."""
        limits, until = self._limits, time.monotonic() + self._limits.silence_s
        if deadline <= until:
            return deadline, f"{limits.deadline_s:g} s (limits.deadline_s) to {verb} {uid}"
        return until, f"{limits.silence_s:g} s (limits.silence_s) without a word of {uid}"

    def _receive(self, child: ChildProcess, deadline: float, what: str) -> tuple[dict[str, Any], bytearray]:
        """Read one reply whole, watching the clock and the child's memory."""
        try:
            prefix = self._read_exactly(child, wire.PREFIX.size, deadline, what)
            num_header, num_payload = wire.parse_prefix(bytes(prefix), self._max_payload_bytes)
            header = clean(wire.parse_header(bytes(self._read_exactly(child, num_header, deadline, what))))
            return header, self._read_exactly(child, num_payload, deadline, what)
        except wire.WireError as error:
            self._fail(self.crash_kind, f"malformed reply: {error}")

    def _read_exactly(self, child: ChildProcess, num_bytes: int, deadline: float, what: str) -> bytearray:
        data, view, start = bytearray(num_bytes), None, 0
        view = memoryview(data)
        next_poll = 0.0
        while start < num_bytes:
            now = time.monotonic()
            if now >= next_poll:
                self._check_limits(child, now, deadline, what)
                next_poll = now + POLL_S
            if not select.select([child.result_fd], [], [], min(POLL_S, max(0.0, deadline - now)))[0]:
                continue
            num_read = os.readv(child.result_fd, [view[start:]])
            if num_read == 0:
                self._died(child)
            start += num_read
        return data

    def _send(self, child: ChildProcess, data: bytes | memoryview, deadline: float, what: str) -> None:
        """Write to the child's stdin, watching the same limits: a child that does not read would block us for ever."""
        left, next_poll = memoryview(data), 0.0
        os.set_blocking(child.stdin_fd, False)
        while left:
            now = time.monotonic()
            if now >= next_poll:
                self._check_limits(child, now, deadline, what)
                next_poll = now + POLL_S
            if not select.select([], [child.stdin_fd], [], min(POLL_S, max(0.0, deadline - now)))[1]:
                continue
            try:
                left = left[os.write(child.stdin_fd, left) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                self._died(child)

    def _check_limits(self, child: ChildProcess, now: float, deadline: float, what: str) -> None:
        if now >= deadline:
            self._fail(self.timeout_kind, f"{self.who} took longer than {what}")
        resident, allowed = child.memory_bytes(), self._limits.memory_bytes
        if resident > allowed:
            found = f"{self.who} held {resident / 2**20:.0f} MiB"
            self._fail(
                FailureKind.OUT_OF_MEMORY, f"{found}; {allowed / 2**20:.0f} MiB are allowed (limits.memory_bytes)"
            )
        if now >= self._next_disk_poll:
            self._next_disk_poll = now + _DISK_POLL_S
            filled, most = child.disk_bytes(self._scratch.path), self._limits.scratch_bytes
            if filled > most:
                found = f"{self.who} filled {filled / 2**20:.0f} MiB of disk"
                self._fail(FailureKind.TOO_LARGE, f"{found}; {most / 2**20:.0f} MiB are allowed (limits.scratch_bytes)")

    def _died(self, child: ChildProcess) -> NoReturn:
        reason = child.exit_reason()
        if _OUT_OF_MEMORY.search(child.log.text()):
            self._fail(FailureKind.OUT_OF_MEMORY, f"{self.who} could not get memory and ended with {reason}")
        self._fail(self.crash_kind, f"{self.who} ended with {reason}")

    def _reported(self, child: ChildProcess, header: dict[str, Any]) -> AssetError:
        """Return what the child reported as an error of ours; the kind must be one of ours."""
        try:
            kind = FailureKind(str(header.get("kind")))
        except ValueError:
            self._fail(self.crash_kind, f"the child reported an unknown kind {str(header.get('kind'))[:40]!r}")
        return AssetError(kind, str(header.get("message", ""))[:500], child.log.text()[-MAX_LOG_TAIL_CHARS:])

    def _fail(self, kind: FailureKind, message: str) -> NoReturn:
        """Kill the child, which can no longer be trusted to be between two assets, and raise."""
        text = self._child.log.text() if self._child is not None else ""
        self._stop_child()
        raise AssetError(kind, message, text[-MAX_LOG_TAIL_CHARS:])

    def _recycle(self, child: ChildProcess) -> None:
        """Stop a child that has done its share of assets, failed ones included, or holds much memory between two."""
        grown = child.memory_bytes() > _RECYCLE_MEMORY_SHARE * self._limits.memory_bytes
        if child.num_objects >= self._limits.objects_per_child or grown:
            self._stop_child()

    def _stop_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()


def _no_room(folder: Path) -> str | None:
    """Return what to say where not even a small file can be written to a folder for want of room, else None."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM_BYTES))
            file.flush()
    except OSError as error:
        error.filename = error.filename or str(folder)
        return full_disk(error)
    return None


def clean(value: Any) -> Any:
    """Return what a child said with its texts made printable: they end in rows, logs and terminals."""
    if isinstance(value, str):
        return printable(value, keep="\n\t")
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {printable(name): clean(item) for name, item in value.items()}
    return value
