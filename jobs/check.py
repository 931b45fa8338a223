"""The checks over an archive of captures, and nothing else: what `make check-captures` runs, on this machine.

Each capture goes through the very code that ingests it, in a supervised child a core, but with a few views of few
pixels: masks and models are read and judged in full, while of the photos only those views are decoded. So photos that
are damaged, and rules on pictures (`admission.min_thickness` and the like), are judged by these few views only. Nothing
is written but the page.
"""

from __future__ import annotations

import queue
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from jobs.ingest_worker import IngestWorker
from jobs.produce import producer_of
from pipeline.capture_checks import ACCEPTED, Check, write_checks
from pipeline.sources import CaptureSource, open_captures
from pipeline.spec import DatasetSpec
from pipeline.types import Asset, AssetError, Sample, UserError

VIEWS, RESOLUTION_PX = 4, 128
PICTURE_PX = 256
MAX_PICTURES = 18
FIGURES = (
    "num_good_frames", "registered_share", "reprojection_px", "sweep_deg", "mask_agreement", "cut_off_share",
    "up_ratio", "distance", "focal_share",
)  # fmt: skip

Picture = tuple[str, str, NDArray[np.uint8]]


def check_captures(
    spec: DatasetSpec, out_dir: Path, *, num_workers: int, show_progress: bool = True
) -> tuple[list[Check], Path]:
    """Check every capture of a spec's source; write the page and return the checks and its path.

    Args:
        num_workers: children at work at once.

    Raises:
        UserError: the spec has no captures, its source is not there, or the page cannot be written.
    """
    _require_writable(out_dir)
    source = open_captures(spec)
    assets = source.list_assets()
    small = spec.capture.model_copy(update={"num_views": VIEWS, "resolution_px": RESOLUTION_PX})
    cheap = spec.model_copy(update={"capture": small})
    shown: Counter[str] = Counter()
    checks, pictures = list[Check](), list[Picture]()
    with _workers(cheap, num_workers) as idle, ThreadPoolExecutor(num_workers) as pool:

        def one(asset: Asset) -> tuple[Check, Picture | None]:
            worker = idle.get()
            try:
                return _check(worker, source, asset, shown)
            finally:
                idle.put(worker)

        bar = tqdm(pool.map(one, assets), total=len(assets), unit="capture", disable=not show_progress)
        for check, picture in bar:
            checks.append(check)
            pictures += [] if picture is None else [picture]
    return checks, write_checks(checks, pictures, out_dir, f"{spec.name}: {len(assets)} captures of {spec.source.kind}")


def _require_writable(out_dir: Path) -> None:
    """Refuse a folder that cannot be written before an archive is read for hours."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(f"OUT: {out_dir} cannot be written: {error.strerror}; give another folder") from None


def _check(
    worker: IngestWorker, source: CaptureSource, asset: Asset, shown: Counter[str]
) -> tuple[Check, Picture | None]:
    try:
        check = _accepted(worker.ingest(asset, source.open_capture(asset)))
    except AssetError as error:
        check = Check(uid=asset.uid, kind=error.kind.value, message=error.message)
    if shown[check.kind] >= MAX_PICTURES:
        return check, None
    try:
        capture = source.open_capture(asset)
        frame = _middle(sorted(capture.files.frames), sorted(capture.files.masks))
        if frame is None:
            return check, None
        image = worker.picture(asset, capture, frame, PICTURE_PX)
    except AssetError as error:
        if error.kind.value != check.kind:
            tqdm.write(f"{asset.uid}: no picture of it: {error.kind}: {error.message}", file=sys.stderr)
        return check, None
    shown[check.kind] += 1
    return check, (check.kind, asset.uid, image)


def _accepted(sample: Sample) -> Check:
    figures = {name: sample.quality[name] for name in FIGURES if isinstance(sample.quality.get(name), int | float)}
    return Check(uid=sample.asset.uid, kind=ACCEPTED, figures=figures)


def _middle(frames: Sequence[str], masks: Sequence[str]) -> str | None:
    """Return the middle one of the frames that have a mask, else of all."""
    some = sorted(set(frames) & set(masks)) or frames
    return some[len(some) // 2] if some else None


@contextmanager
def _workers(spec: DatasetSpec, count: int) -> Iterator[queue.SimpleQueue[IngestWorker]]:
    fingerprint = spec.fingerprint(producer_of(spec)[1])
    idle: queue.SimpleQueue[IngestWorker] = queue.SimpleQueue()
    made = [IngestWorker(spec, fingerprint=fingerprint, num_threads=1) for _ in range(count)]
    try:
        if spec.capture.mask_command is not None and (said := made[0].check_hook()):
            tqdm.write(f"on a test picture, {said}", file=sys.stderr)
        for worker in made:
            idle.put(worker)
        yield idle
    finally:
        for worker in made:
            worker.close()
