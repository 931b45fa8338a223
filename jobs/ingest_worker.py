"""The supervisor of one ingest child: from an Asset and the files of its capture to a Sample, or to a typed AssetError.

Photos and models come from strangers, so they are opened in a supervised child (deadline, memory cap, log tail, no
network, no credentials), as 3D files are. The bytes come from where only this process may read, zips on object storage
among them; so it reads, and the child decodes. A capture is a dozen MB through a pipe, little beside the second or more
that decoding, resampling and encoding it takes (`make bench-ingest` measures all of it), and a child that a file takes
over has nothing to steal and nowhere to send it. The digest of a sample is computed here too, from what was handed
over, not from what the child says.

What the child sends back is checked in shape: cameras are rigid, planes are files of their codec and bounded, numbers
are finite.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.capture import CaptureFiles
from pipeline.members import MemberReader, OpenCapture
from pipeline.sample import MAX_VIEWS, asset_row
from pipeline.spec import DatasetSpec
from pipeline.types import (
    Asset,
    AssetError,
    Camera,
    FailureKind,
    Normalization,
    Plane,
    PlaneName,
    Sample,
    UserError,
    View,
)
from render import wire
from render.process import ChildProcess, child_command
from render.supervisor import Supervisor

START_DEADLINE_S = 120.0
MAX_FRAME_BYTES = 64 * 2**20
MAX_PICTURE_PX = 512
_PLANE_SLACK_BYTES = 2**16
# Every frame takes the same buffers again. By default glibc gives them back to the system in between, and the next one
# pays 3000 page faults for them, a tenth of its time. 32 MiB is the most that glibc takes as a threshold.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(512 * 2**20)}
_MAGIC = {"webp": b"RIFF", "png": b"\x89PNG", "jpg": b"\xff\xd8"}
_PLANES = ("rgba",)


@dataclass(slots=True)
class _Job:
    """What is known of one capture while its child works."""

    asset: Asset
    members: Sequence[str]
    capture: OpenCapture
    deadline: float
    views: list[View] = field(default_factory=list)
    read_s: float = 0.0


class IngestWorker(Supervisor):
    """Makes samples of captures one after the other in a supervised child.

    Args:
        spec: the dataset's spec.
        fingerprint: the spec's fingerprint, as samples carry it.
        num_threads: threads over frames, for the record: what is used is `spec.workers.num_cpus`.
        scratch_dir: where the child's temporary folder is made; default the system's.
        child_command: the command of the child; for tests.
    """

    who = "the reader of captures"
    timeout_kind = FailureKind.INGEST_TIMEOUT
    crash_kind = FailureKind.INGEST_CRASH

    def __init__(
        self,
        spec: DatasetSpec,
        *,
        fingerprint: str,
        num_threads: int | None = None,
        scratch_dir: Path | None = None,
        child_command: Sequence[str] | None = None,
    ) -> None:
        # No encoder makes a picture larger than its pixels by more than a header.
        most = max(spec.capture.resolution_px**2 * 4 + _PLANE_SLACK_BYTES, MAX_PICTURE_PX**2 * 3)
        super().__init__(
            spec, default_command() if child_command is None else child_command, fingerprint=fingerprint,
            num_threads=num_threads, max_payload_bytes=most, scratch_dir=scratch_dir,
        )  # fmt: skip

    def ingest(self, asset: Asset, capture: OpenCapture) -> Sample:
        """Make the sample of one capture; `capture` is closed when this returns or raises.

        Raises:
            AssetError: typed, with the tail of what the child printed.
            UserError: what the user must mend, such as a command for masks that is not there.
        """
        started = time.monotonic()
        child = self._ensure_child()
        ready_s = time.monotonic() - started
        names, members = _numbered(capture.files)
        request = {
            "type": "ingest",
            "asset": asset_row(asset),
            "spec": self._spec.model_dump(mode="json"),
            "fingerprint": self._fingerprint,
        }
        job = _Job(asset, members, capture, time.monotonic() + self._spec.limits.deadline_s)
        header, _ = self._ask(child, job, request, "sample", json.dumps(names).encode())
        sample = self._sample(job, header)
        seconds = {"start": ready_s, "read": job.read_s, "total": time.monotonic() - started}
        told = header.get("provenance")
        return replace(
            sample,
            provenance={
                **(told if isinstance(told, dict) else {}),
                "sandbox": self.sandbox,
                "num_threads": self._num_threads,
                "seconds": {name: round(value, 4) for name, value in seconds.items()},
            },
        )

    def picture(self, asset: Asset, capture: OpenCapture, frame: str, size_px: int) -> NDArray[np.uint8]:
        """Return a frame with the outline of its mask, the hook's where it has none, straight RGB uint8 [H, W, 3].

        Args:
            size_px: its longer side, MAX_PICTURE_PX at most.

        Raises:
            AssetError: it cannot be read or decoded.
        """
        child = self._ensure_child()
        _, members = _numbered(capture.files)
        places = {name: i for i, name in enumerate(members)}
        mask = capture.files.masks.get(frame)
        request = {
            "type": "picture",
            "frame": places[capture.files.frames[frame]],
            "mask": None if mask is None else places[mask],
            "command": self._spec.capture.mask_command,
            "name": frame,
            "max_bytes": MAX_FRAME_BYTES,
            "size_px": size_px,
            "threshold": self._spec.capture.mask_threshold,
        }
        job = _Job(asset, members, capture, time.monotonic() + self._spec.limits.deadline_s)
        header, payload = self._ask(child, job, request, "picture")
        told: Any = header.get("shape")
        shape = [x for x in told if isinstance(x, int) and 0 < x <= size_px] if isinstance(told, list) else []
        if len(shape) != 3 or shape[2] != 3 or math.prod(shape) != len(payload):
            self._fail(self.crash_kind, f"a picture of shape {str(told)[:60]} came with {len(payload)} bytes")
        return np.frombuffer(payload, np.uint8).reshape(shape)

    def check_hook(self) -> str:
        """Run the spec's hook for masks once, where it will run; return what is wrong if it failed on a test picture.

        Raises:
            UserError: it cannot be run.
        """
        try:
            return self._try_hook(self._ensure_child())
        except AssetError as error:  # a hook that takes the child down says nothing certain about photos either
            return error.message

    def _try_hook(self, child: ChildProcess) -> str:
        asset = Asset(uid="the hook", source="colmap", uri="", format="capture")
        reader = MemberReader(asset.uid, {}, 0)
        files = CaptureFiles(uid=asset.uid, frames={}, masks={}, models={}, read=reader.read)
        job = _Job(asset, [], OpenCapture(files, reader), time.monotonic() + self._spec.limits.deadline_s)
        request = {"type": "hook", "command": self._spec.capture.mask_command}
        return str(self._ask(child, job, request, "hook")[0].get("said", ""))[:500]

    def _ensure_child(self) -> ChildProcess:
        if self._child is None:
            weights = os.environ.get("U2NET_HOME") or str(Path("~/.u2net").expanduser())
            command = self._spec.capture.mask_command
            child, header = self._launch(
                START_DEADLINE_S,
                num_threads=1,  # of BLAS, whose sums depend on their number; frames have threads of their own
                read=[] if command is None else [Path(weights)],
                run=[] if command is None else program_folders(command),
                variables=_KEEP_MEMORY | {"U2NET_HOME": weights},
            )
            if header["type"] != "ready":
                self._fail(self.crash_kind, f"the child said {header['type']!r} before it was ready")
            return child
        return self._child

    def _ask(
        self, child: ChildProcess, job: _Job, request: dict[str, Any], last: str, names: bytes = b""
    ) -> tuple[dict[str, Any], bytearray]:
        """Send a request, hand over what the child reads, take its views, and return its reply of type `last`."""
        try:
            with self._one_asset(child):
                self._say(child, job, request, names)
                return self._converse(child, job, last)
        finally:
            job.capture.reader.close()

    def _converse(self, child: ChildProcess, job: _Job, last: str) -> tuple[dict[str, Any], bytearray]:
        while True:
            header, payload = self._receive(child, *self._next_word(job.deadline, "ingest", job.asset.uid))
            kind = header["type"]
            if kind == last:
                return header, payload
            if kind == "read":
                self._hand_over(child, job, header)
            elif kind == "view":
                self._take_view(job, header, payload)
            elif kind == "error" and header.get("kind") == "user" and self._spec.capture.mask_command is not None:
                raise UserError(str(header.get("message", ""))[:500])
            elif kind == "error":
                raise self._reported(child, header)
            else:
                self._fail(self.crash_kind, f"the child said {kind!r} after {len(job.views)} views")

    def _hand_over(self, child: ChildProcess, job: _Job, header: dict[str, Any]) -> None:
        number, most = header.get("member"), header.get("max_bytes")
        if not (isinstance(number, int) and 0 <= number < len(job.members) and isinstance(most, int) and most >= 0):
            self._fail(self.crash_kind, f"the child asked for member {number!r}, {most!r} bytes")
        begun = time.monotonic()
        try:
            data = job.capture.files.read(job.members[number], most)
        except AssetError as error:
            self._say(child, job, {"type": "refused", "kind": error.kind.value, "message": error.message[:500]})
        else:
            self._say(child, job, {"type": "bytes"}, data)
        job.read_s += time.monotonic() - begun

    def _say(self, child: ChildProcess, job: _Job, header: dict[str, Any], payload: bytes = b"") -> None:
        text = json.dumps(header).encode()
        until, what = self._next_word(job.deadline, "ingest", job.asset.uid)
        self._send(child, wire.PREFIX.pack(wire.MAGIC, len(text), len(payload)) + text, until, what)
        self._send(child, payload, until, what)

    def _take_view(self, job: _Job, header: dict[str, Any], payload: bytearray) -> None:
        if header.get("index") != len(job.views) or len(job.views) >= MAX_VIEWS:
            self._fail(FailureKind.BAD_VIEW_COUNT, f"view {header.get('index')!r} came after {len(job.views)} views")
        try:
            job.views.append(_view(header, bytes(payload)))
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            self._fail(self.crash_kind, f"view {len(job.views)} is malformed: {error}")

    def _sample(self, job: _Job, header: dict[str, Any]) -> Sample:
        if not job.views:
            self._fail(FailureKind.BAD_VIEW_COUNT, "the child made no view")
        try:
            norm = header["normalization"]
            quality, lights, seed = header["quality"], header["lights"], header["seed"]
            if not (isinstance(quality, dict) and isinstance(lights, dict) and 0 <= int(seed) < 2**63):
                raise ValueError(f"quality, lights or seed {str(seed)[:40]} are not what they should be")
            return Sample(
                asset=replace(job.asset, sha256=job.capture.reader.digest()),
                spec_fingerprint=self._fingerprint,
                seed=int(seed),
                normalization=Normalization(
                    scale=float(norm["scale"]),
                    rotation=np.array(norm["rotation"], np.float64).reshape(3, 3),
                    translation=np.array(norm["translation"], np.float64).reshape(3),
                ),
                views=tuple(job.views),
                quality=quality,
                lights=lights,
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self._fail(self.crash_kind, f"the child's sample is malformed: {error}")


def default_command() -> list[str]:
    """Return the command of the real child: the module behind the border."""
    return child_command("jobs.ingest_child")


def program_folders(command: str) -> list[Path]:
    """Return what a command for masks needs to be let at: its program's folder and the files among its arguments."""
    try:
        words = [Path(word) for word in shlex.split(command)]
    except ValueError:
        return []  # `pipeline.masks` says what is wrong with it
    there = [word for word in words if word.is_absolute() and word.exists()]
    programs = [folder for word in there[:1] for folder in (word.parent, word.resolve().parent)]
    return [*programs, *there[1:]]


def _numbered(files: CaptureFiles) -> tuple[dict[str, Any], list[str]]:
    """Return the names of a capture with numbers for members, and the members by number.

    As JSON, lone surrogates of names that are not UTF-8 survive as escapes.
    """
    members: dict[str, int] = {}

    def numbered(names: Mapping[str, str]) -> dict[str, int]:
        return {name: members.setdefault(member, len(members)) for name, member in names.items()}

    kinds: dict[str, Any] = {
        "frames": numbered(files.frames),
        "masks": numbered(files.masks),
        "models": {name: numbered(one) for name, one in files.models.items()},
    }
    return kinds, list(members)


def _view(header: dict[str, Any], payload: bytes) -> View:
    width, height = header["size"]
    camera = Camera(
        world_from_camera=np.array(header["world_from_camera"], np.float64),
        intrinsics=np.array(header["intrinsics"], np.float64),
        width=int(width),
        height=int(height),
    )
    planes: dict[PlaneName, Plane] = {}
    start = 0
    for name, codec, num_bytes, scale in header["planes"]:
        if name not in _PLANES or name in planes or codec not in _MAGIC or num_bytes <= 0:
            raise ValueError(f"plane {name!r} with codec {codec!r} and {num_bytes!r} bytes")
        data = payload[start : start + num_bytes]
        if len(data) != num_bytes or not data.startswith(_MAGIC[codec]):
            raise ValueError(f"plane {name!r} is no {codec} file of {num_bytes} bytes")
        planes[name] = Plane(codec=codec, data=data, scale=None if scale is None else float(scale))
        start += num_bytes
    if start != len(payload) or not planes:
        raise ValueError(f"{len(planes)} planes of {start} bytes came in {len(payload)}")
    return View(index=int(header["index"]), camera=camera, planes=planes)
