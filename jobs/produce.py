"""Asset to Sample or Failure, inside a Ray worker process: admit, fetch, check, render.

A worker process keeps one RenderWorker, and so one Blender child, alive across tasks. Every cause of failure that we
can name comes back as a Failure; only the death of the process itself is left to the driver to count.
"""

from __future__ import annotations

import atexit
import datetime
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

from pipeline.admission import check_file, licence_admits
from pipeline.sources import AssetSource, open_source
from pipeline.sources.directory import digest_file
from pipeline.spec import DatasetSpec, digest_json
from pipeline.types import Asset, AssetError, Failure, FailureKind, Sample, UserError
from render.worker import RenderWorker

Producer = Callable[[DatasetSpec, str, Asset], Sample | Failure]
"""(spec, fingerprint, asset) -> Sample or Failure. Raises nothing but UserError, which ends the run, and what ends the
process."""

# Ray assigns GPUs task by task. A child that was started for another GPU must not go on on it.
_ASSIGNED = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")

_workers: dict[str, RenderWorker] = {}
_sources: dict[str, AssetSource] = {}


def render_asset(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make one sample by rendering; retryable failures are tried again, up to `limits.max_attempts` in all.

    Raises:
        UserError: what the user must mend before any object can be made, such as a GPU that is not there.
    """
    begun = time.monotonic()
    for attempt in range(1, spec.limits.max_attempts + 1):
        try:
            sample = _attempt(spec, fingerprint, asset)
        except UserError as error:
            raise UserError(f"{error} (on {socket.gethostname()})") from None
        except AssetError as error:
            failure = Failure.from_error(asset.uid, error, attempts=attempt)
        except Exception as error:  # noqa: BLE001 - a bug of ours must cost one object, with its trace, not the shard
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
    return replace(failure, provenance=_where(begun))


def check_device(spec: DatasetSpec, fingerprint: str) -> None:
    """Start this process's Blender, so that a device that is not there is known before anything is frozen.

    Raises:
        UserError: what the user must mend, such as a GPU that is not there.
    """
    try:
        _worker(spec, fingerprint).start()
    except UserError as error:
        raise UserError(f"{error} (on {socket.gethostname()})") from None
    except AssetError:
        pass  # no word about the device: objects will fail with a kind, or not


def _attempt(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample:
    reason = licence_admits(spec.admission.licenses, asset.license)
    if reason is not None:
        raise AssetError(FailureKind.LICENCE_EXCLUDED, reason)
    path = _source(spec).fetch(asset)
    fetched_at = _now()
    expected = None
    if path is not None:
        expected = check_file(path, asset.format, spec.admission).expected_triangles
        if asset.sha256 is None:  # a catalogue that knows no digest: the row names what was rendered
            digest, num_bytes = digest_file(path)
            asset = replace(asset, sha256=digest, num_bytes=num_bytes)
    sample = _worker(spec, fingerprint).render(asset, path, expected_triangles=expected)
    return replace(sample, provenance=dict(sample.provenance) | {"fetched_at": fetched_at})


def _source(spec: DatasetSpec) -> AssetSource:
    """Return this process's source for a spec; opening one may cost an index, so it is kept."""
    name = digest_json([spec.source.model_dump(mode="json"), spec.fetch.model_dump(mode="json")])
    if name not in _sources:
        _sources[name] = open_source(spec)
    return _sources[name]


def _worker(spec: DatasetSpec, fingerprint: str) -> RenderWorker:
    """Return this process's render worker, replacing one that was made for another spec or another GPU."""
    assigned = [] if spec.workers.device == "cpu" else [os.environ.get(name) for name in _ASSIGNED]
    name = digest_json([fingerprint, spec.model_dump(mode="json"), assigned])
    if name not in _workers:
        close_worker()
        threads = max(1, round(spec.workers.num_cpus))
        _workers[name] = RenderWorker(spec, fingerprint=fingerprint, num_threads=threads)
    return _workers[name]


@atexit.register
def close_worker() -> None:
    """End this process's Blender child, if it has one."""
    while _workers:
        _workers.popitem()[1].close()


def _where(begun: float) -> dict[str, object]:
    return {"worker": socket.gethostname(), "finished_at": _now(), "elapsed_s": round(time.monotonic() - begun, 3)}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
