"""Asset to Sample or Failure, inside a Ray worker process: admit, fetch, check, then render or ingest.

A worker process keeps one RenderWorker or IngestWorker, and so one child, alive across tasks. Every cause of failure
that we can name comes back as a Failure; only the death of the process itself is left to the driver to count.
"""

from __future__ import annotations

import atexit
import datetime
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar, cast

import render
from jobs.ingest_worker import IngestWorker
from pipeline import capture
from pipeline.admission import check_file, licence_admits
from pipeline.canonical import digest_json
from pipeline.sources import AssetSource, CaptureSource, open_captures, open_source
from pipeline.sources.directory import digest_file
from pipeline.spec import DatasetSpec
from pipeline.types import Asset, AssetError, Failure, FailureKind, Sample, UserError
from render.confine import full_disk
from render.supervisor import FullDiskError
from render.trial import BorderTrial
from render.worker import RenderWorker

Producer = Callable[[DatasetSpec, str, Asset], Sample | Failure]
"""(spec, fingerprint, asset) -> Sample or Failure. Raises nothing but FullDiskError, after which the object is made
again, any other UserError, which ends the run, and what ends the process."""

W = TypeVar("W", RenderWorker, IngestWorker)
S = TypeVar("S", AssetSource, CaptureSource)

# Ray assigns GPUs task by task. A child that was started for another GPU must not go on on it.
_ASSIGNED = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")

_workers: dict[str, RenderWorker | IngestWorker] = {}
_asked: list[RenderWorker | IngestWorker] = []  # the worker of the object in hand, once it was given to it
_sources: dict[str, AssetSource] = {}
_captures: dict[str, CaptureSource] = {}


def producer_of(spec: DatasetSpec) -> tuple[Producer, str]:
    """Return what makes a spec's samples, and its name and version as they enter the fingerprint."""
    if spec.is_captured:
        return ingest_capture, capture.producer()
    return render_asset, render.producer()


def render_asset(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make one sample by rendering; retryable failures are tried again, up to `limits.max_attempts` in all.

    Raises:
        UserError: what the user must mend before any object can be made, such as a GPU that is not there.
        FullDiskError: if a disk had no room left, which is no failure of the object.
    """
    return _try(_render, spec, fingerprint, asset)


def ingest_capture(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make one sample of photographs; tries and failures as in `render_asset`.

    Raises:
        UserError: what the user must mend before any capture can be read, such as a folder that is not there.
        FullDiskError: if a disk had no room left, which is no failure of the capture.
    """
    return _try(_ingest, spec, fingerprint, asset)


def _try(
    attempt_one: Callable[[DatasetSpec, str, Asset], Sample], spec: DatasetSpec, fingerprint: str, asset: Asset
) -> Sample | Failure:
    begun = time.monotonic()
    _asked.clear()
    for attempt in range(1, spec.limits.max_attempts + 1):
        try:
            sample = attempt_one(spec, fingerprint, asset)
        except UserError as error:
            kind = FullDiskError if isinstance(error, FullDiskError) else UserError
            raise kind(on_this_node(error)) from None
        except AssetError as error:
            if (full := full_disk(error.__cause__)) is not None:  # that of the fetch cache
                raise FullDiskError(on_this_node(full)) from None
            failure = Failure.from_error(asset.uid, error, attempts=attempt)
        except Exception as error:  # noqa: BLE001 - a bug of ours must cost one object, with its trace, not the shard
            if (full := full_disk(error)) is not None:
                raise FullDiskError(on_this_node(full)) from None
            failure = Failure(
                uid=asset.uid,
                kind=FailureKind.INTERNAL,
                message=f"{type(error).__name__}: {error}",
                log_tail=traceback.format_exc(),
                attempts=attempt,
            )
        else:
            return replace(sample, provenance=dict(sample.provenance) | _where(begun) | {"attempts": attempt})
        if not failure.retryable:
            break
    return replace(failure, provenance=_where(begun) | _behind())


def on_this_node(found: object) -> str:
    """Return what was found with the node that it was found on, for a driver elsewhere."""
    return f"{found} (on {socket.gethostname()})"


def needs_trial(produce: Producer) -> bool:
    """Whether a producer opens files of strangers: then the border, the GPU or the hook for masks may not be there."""
    return produce in (render_asset, ingest_capture)


def check_device(spec: DatasetSpec, fingerprint: str) -> str:
    """Try the border, this process's Blender for a GPU, and the hook for masks, before a plan is frozen.

    Returns:
        What the hook said, if it failed on a test picture; that need not mean that it fails on photos.

    Raises:
        UserError: what the user must mend, such as a GPU that is not there.
    """
    try:
        if spec.is_captured and spec.capture.mask_command is not None:
            return _worker(IngestWorker, spec, fingerprint).check_hook()  # behind the border, so that is tried too
        if spec.workers.device != "cpu":
            _worker(RenderWorker, spec, fingerprint).start()
        else:
            with BorderTrial(spec) as trial:
                trial.check()
    except UserError as error:
        raise UserError(on_this_node(error)) from None
    except AssetError:
        pass  # no word about the device: objects will fail with a kind, or not
    return ""


def _ingest(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample:
    _check_licence(spec, asset)
    opened = _source(spec, _captures, open_captures).open_capture(asset)
    sample = _worker(IngestWorker, spec, fingerprint).ingest(asset, opened)
    return replace(sample, provenance=dict(sample.provenance) | {"fetched_at": _now()})


def _check_licence(spec: DatasetSpec, asset: Asset) -> None:
    reason = licence_admits(spec.admission.licenses, asset.license)
    if reason is not None:
        raise AssetError(FailureKind.LICENCE_EXCLUDED, reason)


def _render(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample:
    _check_licence(spec, asset)
    begun = time.monotonic()
    path = _source(spec, _sources, open_source).fetch(asset)
    fetched_at, fetch_s = _now(), round(time.monotonic() - begun, 4)
    expected = None
    if path is not None:
        expected = check_file(path, asset.format, spec.admission).expected_triangles
        if asset.sha256 is None:  # a catalogue that knows no digest: the row names what was rendered
            digest, num_bytes = digest_file(path)
            asset = replace(asset, sha256=digest, num_bytes=num_bytes)
    sample = _worker(RenderWorker, spec, fingerprint).render(asset, path, expected_triangles=expected)
    told = dict(sample.provenance)
    stages = cast(Mapping[str, float], told["seconds"])
    return replace(sample, provenance=told | {"fetched_at": fetched_at, "seconds": {"fetch": fetch_s, **stages}})


def _source(spec: DatasetSpec, opened: dict[str, S], open_one: Callable[[DatasetSpec], S]) -> S:
    """Return this process's source for a spec; opening one may cost an index, so it is kept."""
    name = digest_json([spec.source.model_dump(mode="json"), spec.fetch.model_dump(mode="json")])
    if name not in opened:
        opened[name] = open_one(spec)
    return opened[name]


def _worker(kind: type[W], spec: DatasetSpec, fingerprint: str) -> W:
    """Return this process's worker, replacing one that was made for another spec or another GPU."""
    assigned = [] if spec.workers.device == "cpu" else [os.environ.get(name) for name in _ASSIGNED]
    name = digest_json([fingerprint, spec.model_dump(mode="json"), assigned])
    worker = _workers.get(name)
    if not isinstance(worker, kind):
        close_worker()
        threads = max(1, round(spec.workers.num_cpus))
        worker = _workers[name] = kind(spec, fingerprint=fingerprint, num_threads=threads)
    _asked[:] = [worker]
    return worker


@atexit.register
def close_worker() -> None:
    """End this process's child, if it has one."""
    while _workers:
        _workers.popitem()[1].close()


def _where(begun: float) -> dict[str, object]:
    return {"worker": socket.gethostname(), "finished_at": _now(), "elapsed_s": round(time.monotonic() - begun, 3)}


def _behind() -> dict[str, object]:
    """Return what confined the child that had this object, for rows of failures; nothing where none had it."""
    used = [worker.sandbox for worker in _asked if worker.sandbox]
    return {"sandbox": used[0]} if used else {}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
