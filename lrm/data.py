"""The streaming loader: draws, ranged reads, decoding and batches.

A loader walks the global order (`lrm.order`) in steps of the global batch and keeps its rank's slice of each. Threads
read and decode ahead, a bounded number of batches: reads wait on the network and OpenCV decodes without the GIL, so
threads are enough, and nothing is pickled between processes. Only the input view and its side views are fetched, 4 of
32 for LRM: 80 KB each instead of 2.5 MB an object.

Saved state is where the next batch begins: a few integers and the digest of the version, whatever was prefetched. It
does not know ranks, threads or batch size, so a run may go on with other numbers of them: the position says what of
the epoch is left, each sample once.

A sample that is damaged (wrong length, checksum, or not an image) is replaced by a substitute that is a function of
its position, so that ranks keep equal batches and a resumed run sees the same; it is counted, named in the log, and
past `max_damaged_samples` different ones the run stops. A store that cannot be read at all stops the run at once.

A batch is a plain dict of tensors, float32 unless said otherwise; B objects of this rank, V = 1 + side views, the
input view being target 0, S the encoder's image size, P the patch size:

    input_image               [B, 3, S, S]     sRGB in [0, 1] over white
    input_camera              [B, 20]          normalised pose and intrinsics, see lrm.cameras
    target_rgb                [B, V, 3, P, P]  patches of resized views, over white
    target_world_from_camera  [B, V, 4, 4]     in the world of the input camera
    target_intrinsics         [B, V, 3, 3]     in pixels of the patch
    row                       [B]              int64, row of the version
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrm.cameras import camera_numbers, crop_intrinsics, input_distance, normalize_cameras, resize_intrinsics
from lrm.config import DataConfig
from lrm.order import Draw, KeyedDraws, SampleOrder
from pipeline.reader import DamagedDataError, VersionReader
from pipeline.sample import SampleError, decode_rgba
from pipeline.types import Camera, Float64, UserError

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Float32 = NDArray[np.float32]
STATE_SCHEMA = 1
MAX_ATTEMPTS = 1000


def over_white(rgba: NDArray[np.uint8]) -> Float32:
    """Composite straight sRGB RGBA uint8 [H, W, 4] over white: float32 [H, W, 3] in [0, 1].

    Blending is done on sRGB values, as the paper's targets are. It is affine in the premultiplied colour, so doing it
    before a linear resize equals resizing premultiplied colour and alpha and blending after.
    """
    alpha = rgba[..., 3:].astype(np.float32) / 255
    out: Float32 = rgba[..., :3].astype(np.float32) / 255 * alpha + (1 - alpha)
    return out


def resize_image(image: Float32, width: int, height: int) -> Float32:
    """Resize [H, W, 3] by area where it shrinks, bilinear where it grows; pixel edges map to pixel edges."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = width <= image.shape[1] and height <= image.shape[0]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """A part of a resized view: its pixels [P, P, 3] and the intrinsics [3, 3] that belong to them."""

    image: Float32
    intrinsics: Float64


def cut_window(image: Float32, intrinsics: Float64, size_px: int, left_px: int, top_px: int, window_px: int) -> Window:
    """Resize a view [H, W, 3] to a square of size_px and cut a square window, with exact intrinsics."""
    height, width = image.shape[:2]
    resized = resize_image(image, size_px, size_px)
    k = crop_intrinsics(resize_intrinsics(intrinsics, size_px / width, size_px / height), left_px, top_px)
    return Window(image=resized[top_px : top_px + window_px, left_px : left_px + window_px], intrinsics=k)


def decode_view(data: bytes, camera: Camera, name: str) -> Float32:
    """Decode an rgba plane to [H, W, 3] over white.

    Raises:
        DamagedDataError: naming the sample, if it is not an image of the camera's size.
    """
    try:
        rgba = decode_rgba(data)
    except SampleError as error:
        raise DamagedDataError(f"sample {name}: {error}") from None
    if rgba.shape[:2] != (camera.height, camera.width):
        raise DamagedDataError(
            f"sample {name}: image of {rgba.shape[1]} x {rgba.shape[0]} px, "
            f"camera of {camera.width} x {camera.height} px"
        )
    return over_white(rgba)


def normalized_poses(cameras: list[Camera], config: DataConfig, source: str) -> Float64:
    """Return the poses [V, 4, 4] of a sample's cameras, the first being the input, in the input camera's world."""
    distance = input_distance(source, None if config.input_distance == "keep" else config.input_distance)
    return normalize_cameras(np.stack([camera.world_from_camera for camera in cameras]), 0, distance)


def input_fields(image: Float32, camera: Camera, pose: Float64, image_px: int) -> dict[str, NDArray[Any]]:
    """Return input_image [3, S, S] and input_camera [20] of a view over white [H, W, 3] and its pose [4, 4]."""
    return {
        "input_image": resize_image(image, image_px, image_px).transpose(2, 0, 1),
        "input_camera": camera_numbers(pose, camera.intrinsics, camera.width, camera.height),
    }


def load_sample(
    reader: VersionReader, draw: Draw, config: DataConfig, image_px: int
) -> tuple[dict[str, NDArray[Any]], int]:
    """Read and prepare one sample: the batch's fields without their first axis, and the bytes read.

    Raises:
        DamagedDataError: if the sample is not what was written.
    """
    read = reader.read_views(draw.row, draw.views)
    cameras = [read.header.cameras[view] for view in draw.views]
    images = [decode_view(planes["rgba"], camera, read.header.key) for planes, camera in zip(read.planes, cameras)]
    try:
        poses = normalized_poses(cameras, config, str(read.header.metadata["source"]))
    except ValueError as error:
        raise DamagedDataError(f"sample {read.header.key}: view {draw.input_view}: {error}") from None
    draws, windows = KeyedDraws(draw.crop_key), []
    for image, camera in zip(images, cameras):
        size = config.min_render_px + draws.below(config.max_render_px - config.min_render_px + 1)
        left, top = (draws.below(size - config.patch_px + 1) for _ in range(2))
        windows.append(cut_window(image, camera.intrinsics, size, left, top, config.patch_px))
    fields = input_fields(images[0], cameras[0], poses[0], image_px) | {
        "target_rgb": np.stack([window.image.transpose(2, 0, 1) for window in windows]),
        "target_world_from_camera": poses,
        "target_intrinsics": np.stack([window.intrinsics for window in windows]),
    }
    out: dict[str, NDArray[Any]] = {name: np.ascontiguousarray(value, np.float32) for name, value in fields.items()}
    return out | {"row": np.asarray(draw.row, np.int64)}, read.num_bytes


def order_of(reader: VersionReader, config: DataConfig) -> SampleOrder:
    """Return the training order of a version."""
    rows = reader.rows
    return SampleOrder.build(
        sources=rows["source"].to_pylist(),
        heldout=rows["heldout"].to_pylist(),
        num_views=rows["num_views"].to_pylist(),
        source_copies=config.source_copies,
        views_per_sample=1 + config.side_views,
        seed=config.seed,
    )


@dataclass(slots=True)
class LoaderStats:
    """What a loader has done since it was made: objects and bytes delivered, seconds the consumer waited for data."""

    num_objects: int = 0
    num_bytes: int = 0
    data_wait_s: float = 0.0
    damaged: dict[int, str] = field(default_factory=dict)
    """Row of each damaged sample, and what was found."""


class Loader:
    """An endless iterator of batches with a resumable position.

    `state_dict` after k batches names where batch k + 1 begins. Use as a context manager, or `close`, to end its
    threads. One consumer at a time.
    """

    def __init__(
        self,
        reader: VersionReader,
        config: DataConfig,
        *,
        image_px: int,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch_size % ranks:
            raise UserError(f"train.batch_size {batch_size} must divide by the {ranks} ranks of this run")
        self._reader, self._config, self._image_px = reader, config, image_px
        self.order = order_of(reader, config)
        self._batch_size, self._local = batch_size, slice(rank * batch_size // ranks, (rank + 1) * batch_size // ranks)
        self._consumed = 0
        self._in_flight: deque[list[Future[tuple[dict[str, NDArray[Any]], int]]]] = deque()
        self._next = 0  # where the next batch to be prefetched begins
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(config.num_threads, thread_name_prefix="lrm-loader")
        self.stats = LoaderStats()

    def state_dict(self) -> dict[str, int | str]:
        """Return where the next batch begins: JSON values only."""
        epoch, position = divmod(self._consumed, len(self.order))
        return {
            "schema": STATE_SCHEMA,
            "version_digest": self._reader.digest,
            "seed": self._config.seed,
            "num_slots": len(self.order),
            "epoch": epoch,
            "position": position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            UserError: if the state belongs to another version, seed or mix of sources.
        """
        own = self.state_dict()
        for name in ("schema", "version_digest", "seed", "num_slots"):
            if state.get(name) != own[name]:
                raise UserError(
                    f"loader state is of {name} {state.get(name)!r}, this run has {own[name]!r}; "
                    "resume on the version and data settings it was saved with, or start in a new folder"
                )
        self._drop_prefetched()
        self._consumed = self._next = int(state["epoch"]) * len(self.order) + int(state["position"])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._in_flight) <= self._config.prefetch_batches:
            positions = range(self._next, self._next + self._batch_size)[self._local]
            self._in_flight.append([self._pool.submit(self._load, position) for position in positions])
            self._next += self._batch_size
        start_s = time.perf_counter()
        samples = [future.result() for future in self._in_flight.popleft()]
        self.stats.data_wait_s += time.perf_counter() - start_s
        self.stats.num_objects += len(samples)
        self.stats.num_bytes += sum(num_bytes for _, num_bytes in samples)
        self._consumed += self._batch_size
        names = samples[0][0]
        return {name: torch.from_numpy(np.stack([fields[name] for fields, _ in samples])) for name in names}

    def _load(self, consumed: int) -> tuple[dict[str, NDArray[Any]], int]:
        for attempt in range(MAX_ATTEMPTS):
            draw = self.order.draw(consumed, attempt)
            if draw.row in self.stats.damaged:
                continue
            try:
                return load_sample(self._reader, draw, self._config, self._image_px)
            except DamagedDataError as error:
                self._note_damaged(draw.row, error)
        raise DamagedDataError(f"no undamaged substitute found for position {consumed} in {MAX_ATTEMPTS} tries")

    def _note_damaged(self, row: int, error: DamagedDataError) -> None:
        with self._lock:
            if row not in self.stats.damaged:
                log.warning("damaged sample replaced: %s", error)
            self.stats.damaged[row] = str(error)
            found, limit = len(self.stats.damaged), self._config.max_damaged_samples
        if found > limit:
            raise DamagedDataError(
                f"{found} damaged samples, data.max_damaged_samples allows {limit}; the last: {error}"
            ) from None

    def _drop_prefetched(self) -> None:
        for futures in self._in_flight:
            for future in futures:
                future.cancel()
        self._in_flight.clear()

    def close(self) -> None:
        """Cancel what is prefetched and end the threads."""
        self._drop_prefetched()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
