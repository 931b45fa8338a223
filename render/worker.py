"""The supervisor of one Blender child: from an Asset and its verified file to a Sample, or to a typed AssetError.

The child renders view after view and sends float pixels; a small pool of threads here turns them into encoded planes
meanwhile (50 ms of lossless WebP at 512^2), with a bounded number in flight. The child's replies are read as
hostile, its time and memory are bounded, and it is replaced after so many objects, or once memory has grown. This
module never imports bpy; a crash of Blender costs one asset, not its worker.

Not promised: that two *machines* give the same bytes. One machine does, with any number of threads and for a new child
as for a used one; other processors may take other code paths in Cycles and in the denoiser.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.quality import judge, measure_sample, side_facts
from pipeline.spec import DatasetSpec
from pipeline.types import (
    MAX_MESSAGE_CHARS,
    Asset,
    AssetError,
    Camera,
    FailureKind,
    Normalization,
    Sample,
    UserError,
    View,
    derive_seed,
)
from render.cameras import CANONICAL_PX, NUM_SIDES, cameras_for
from render.process import ChildProcess, default_command
from render.staging import stage
from render.supervisor import STAGED_ASSET, WORK, Supervisor
from render.views import EncodedView, bytes_per_pixel, encode_view, unpack_view

START_DEADLINE_S = 120.0
GPU_START_DEADLINE_S = 1800.0  # a driver may compile Cycles' kernels first: 5 to 10 minutes, once a machine
_ENCODERS = 2
_MAX_IN_FLIGHT = 4
_MAX_NUMBER = 2**53  # beyond it integers are not exact in JSON, and may not fit a float at all

_OPAQUE_IMPORT = re.compile(r"couldn't parse gltf", re.IGNORECASE)
_EXCEPTION_LINE = re.compile(r"^[\w.]+(?:Error|Exception)\b.*$", re.MULTILINE)
_PROCEDURAL = re.compile(r"^procedural:(\d+)$")


@dataclass(slots=True)
class _Job:
    """What the child has answered so far about one asset."""

    asset: Asset
    cameras: Sequence[Camera]
    deadline: float
    scene: dict[str, Any] | None = None
    sides: Future[dict[str, Any]] | None = None
    pending: deque[Future[EncodedView]] = field(default_factory=deque)
    encoded: list[EncodedView] = field(default_factory=list)
    num_views: int = 0
    fact_names: list[str] | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class RenderWorker(Supervisor):
    """Renders assets one after the other in a supervised child; a context manager, for one thread at a time.

    Args:
        spec: the dataset's spec; `render`, `admission` and `limits` are used.
        fingerprint: the spec's fingerprint, as samples carry it.
        num_threads: threads that Blender may use; default `spec.workers.num_cpus`, rounded up.
        scratch_dir: where the child's temporary folder is made; default the system's.
        child_command: the command of the child; for tests.
    """

    who = "Blender"
    timeout_kind = FailureKind.RENDER_TIMEOUT
    crash_kind = FailureKind.RENDER_CRASH

    def __init__(
        self,
        spec: DatasetSpec,
        *,
        fingerprint: str,
        num_threads: int | None = None,
        scratch_dir: Path | None = None,
        child_command: Sequence[str] | None = None,
    ) -> None:
        view_bytes = spec.render.resolution_px**2 * sum(bytes_per_pixel(name) for name in spec.render.planes)
        most = max(view_bytes, NUM_SIDES * CANONICAL_PX**2 * 4)
        super().__init__(
            spec, default_command() if child_command is None else child_command, fingerprint=fingerprint,
            num_threads=num_threads, max_payload_bytes=most, scratch_dir=scratch_dir,
        )  # fmt: skip
        self._ready: dict[str, Any] = {}
        self._encoders = ThreadPoolExecutor(_ENCODERS, "render-encode")

    def close(self) -> None:
        """Kill the child and all that it started, and remove its temporary folder. Safe to call twice."""
        super().close()
        self._encoders.shutdown()

    def start(self) -> None:
        """Start the child, if there is none, and so learn whether its device is there.

        Raises:
            UserError: as `render`.
            AssetError: if it does not start.
        """
        self._ensure_child()

    def render(self, asset: Asset, path: Path | None, *, expected_triangles: int | None = None) -> Sample:
        """Render one asset.

        Args:
            asset: what to render.
            path: its verified local file; None for a procedural asset.
            expected_triangles: what the file's header promises, where that is known.

        Raises:
            AssetError: typed, with the tail of what Blender printed.
            UserError: the device of `workers.device` is not here, or cannot render.
        """
        started = time.monotonic()
        seed = derive_seed("camera", self._spec.render.seed, asset.uid)
        request = self._request(asset, path, seed, expected_triangles)
        child = self._ensure_child()
        ready_s = time.monotonic() - started
        if request["path"] is not None:
            request["path"] = str(self._stage(asset, Path(request["path"])))
        deadline = time.monotonic() + self._spec.limits.deadline_s
        job = _Job(asset, cameras_for(self._spec.render, seed), deadline)
        try:
            with self._one_asset(child):
                request["scratch_dir"] = str(self._scratch.fresh(WORK))
                child.tell(json.dumps(request).encode())
                self._converse(child, job)
                return self._finish(job, seed, ready_s, time.monotonic() - started)
        finally:
            _abandon(job)

    def _request(self, asset: Asset, path: Path | None, seed: int, expected_triangles: int | None) -> dict[str, Any]:
        procedural = _PROCEDURAL.match(asset.uri) if asset.format == "procedural" else None
        if procedural is None and path is None:
            raise AssetError(FailureKind.INTERNAL, f"asset {asset.uid} of format {asset.format!r} came without a file")
        admission = self._spec.admission
        return {
            "path": None if procedural is not None or path is None else str(Path(path).resolve()),
            "format": asset.format,
            "procedural_seed": None if procedural is None else int(procedural[1]),
            "seed": seed,
            "render": self._spec.render.model_dump(mode="json"),
            "max_triangles": admission.max_triangles,
            "min_triangle_share": admission.min_triangle_share,
            "expected_triangles": expected_triangles,
        }

    def _stage(self, asset: Asset, path: Path) -> Path:
        return stage(path, asset.format, self._scratch.fresh(STAGED_ASSET), self._spec.admission.max_asset_bytes)

    def _ensure_child(self) -> ChildProcess:
        if self._child is None:
            device = self._spec.workers.device
            allowed_s = START_DEADLINE_S if device == "cpu" else GPU_START_DEADLINE_S
            child, header = self._launch(allowed_s, num_threads=self._num_threads, device=device)
            if header["type"] == "no_device":
                self._stop_child()
                raise UserError(str(header.get("message", ""))[:MAX_MESSAGE_CHARS])
            if header["type"] != "ready":
                self._fail(FailureKind.RENDER_CRASH, f"the child said {header['type']!r} before it was ready")
            self._ready = header
            return child
        return self._child

    def _converse(self, child: ChildProcess, job: _Job) -> None:
        """Take replies until the child is done with the asset: one scene, then each view in order, then done."""
        while True:
            header, payload = self._receive(child, *self._next_word(job.deadline, "render", job.asset.uid))
            kind = header["type"]
            if kind == "error":
                raise self._reported(child, header)
            if kind == "scene" and job.scene is None and job.num_views == 0:
                job.scene = header
            elif kind == "sides" and job.scene is not None and job.sides is None and job.num_views == 0:
                job.sides = self._encoders.submit(side_facts, self._sides(payload))
            elif kind == "view" and job.sides is not None:
                self._take_view(job, header, payload)
            elif kind == "done" and job.num_views == len(job.cameras):
                job.seconds = _numbers(header.get("seconds"))
                return
            elif kind == "done":
                found = f"{job.num_views} views were rendered, {len(job.cameras)} were asked for"
                self._fail(FailureKind.BAD_VIEW_COUNT, found)
            else:
                self._fail(FailureKind.RENDER_CRASH, f"the child said {kind!r} after {job.num_views} views")

    def _sides(self, payload: bytearray) -> NDArray[np.uint8]:
        shape = (NUM_SIDES, CANONICAL_PX, CANONICAL_PX, 4)
        if len(payload) != math.prod(shape):
            self._fail(FailureKind.RENDER_CRASH, f"the four sides came with {len(payload)} bytes of pixels")
        return np.frombuffer(payload, np.uint8).reshape(shape)

    def _take_view(self, job: _Job, header: dict[str, Any], payload: bytearray) -> None:
        if header.get("index") != job.num_views or job.num_views >= len(job.cameras):
            found = f"view {header.get('index')!r} came after {job.num_views} of {len(job.cameras)} views"
            self._fail(FailureKind.BAD_VIEW_COUNT, found)
        try:
            planes = unpack_view(header, payload, self._spec.render)
        except ValueError as error:
            self._fail(FailureKind.RENDER_CRASH, f"view {job.num_views}: {error}")
        camera, facts = job.cameras[job.num_views], _numbers(header.get("facts"))
        if job.fact_names is not None and list(facts) != job.fact_names:
            found = f"view {job.num_views} came with the facts {list(facts)}, view 0 with {job.fact_names}"
            self._fail(FailureKind.RENDER_CRASH, found)
        job.fact_names = list(facts)
        job.pending.append(self._encoders.submit(encode_view, planes, facts, self._spec.render, camera))
        job.num_views += 1
        while len(job.pending) > _MAX_IN_FLIGHT:
            job.encoded.append(job.pending.popleft().result())

    def _reported(self, child: ChildProcess, header: dict[str, Any]) -> AssetError:
        error = super()._reported(child, header)
        if error.kind is FailureKind.IMPORT_ERROR and _OPAQUE_IMPORT.search(error.message):
            # This importer says no more than "couldn't parse"; the exception stands in what it printed.
            causes = _EXCEPTION_LINE.findall(child.log.text())
            message = f"{error.message} {causes[-1][:200]}" if causes else error.message
            return AssetError(error.kind, message, error.log_tail)
        return error

    def _finish(self, job: _Job, seed: int, ready_s: float, total_s: float) -> Sample:
        job.encoded.extend(future.result() for future in job.pending)
        job.pending.clear()
        assert job.scene is not None
        facts = [view.facts for view in job.encoded]
        assert job.sides is not None
        quality = measure_sample(facts, _mapping(job.scene.get("quality")), job.sides.result())
        refusal = judge(quality, self._spec.admission)
        if refusal is not None:
            raise AssetError(refusal.kind, refusal.message)
        return Sample(
            asset=job.asset,
            spec_fingerprint=self._fingerprint,
            seed=seed,
            normalization=self._normalization(job.scene),
            views=tuple(
                View(index=i, camera=camera, planes=view.planes)
                for i, (camera, view) in enumerate(zip(job.cameras, job.encoded, strict=True))
            ),
            quality=quality,
            lights=_mapping(job.scene.get("lights")),
            provenance={
                "device": str(self._ready.get("device", ""))[:100],
                "blender": str(self._ready.get("blender", ""))[:40],
                "sandbox": self.sandbox,
                "num_threads": self._num_threads,
                "seconds": {
                    **job.seconds,
                    "start": ready_s,
                    "encode": math.fsum(view.seconds for view in job.encoded),
                    "total": total_s,
                },
            },
        )

    def _normalization(self, scene: dict[str, Any]) -> Normalization:
        try:
            value = scene["normalization"]
            return Normalization(
                scale=float(value["scale"]),
                rotation=np.array(value["rotation"], np.float64).reshape(3, 3),
                translation=np.array(value["translation"], np.float64).reshape(3),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self._fail(FailureKind.RENDER_CRASH, f"the child's normalization is malformed: {error}")


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    """Keep the numbers of an object that the child sent: seconds of its stages, facts of a view."""
    number: Callable[[Any], bool] = lambda x: (  # noqa: E731
        isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < _MAX_NUMBER
    )
    return {str(name)[:20]: x for name, x in list(_mapping(value).items())[:20] if number(x)}


def _abandon(job: _Job) -> None:
    for future in job.pending:
        future.cancel()
