"""What training batches hold, and the loader that makes them (`lrm.loader` does the work).

A batch of `Loader` is a plain dict of tensors, float32 unless said otherwise; B objects of this rank, V = 1 + side
views, the input view being target 0, S the encoder's image size, P the patch size:

    input_image               [B, 3, S, S]     sRGB in [0, 1] over white
    input_camera              [B, 20]          normalised pose and intrinsics, see lrm.cameras
    target_rgb                [B, V, 3, P, P]  patches of resized views, over the background
    target_world_from_camera  [B, V, 4, 4]     in the world of the input camera
    target_intrinsics         [B, V, 3, 3]     in pixels of the patch
    background                [B, 3]           colour behind the targets: white, or drawn by sample
    row                       [B]              int64, row of the version
    valid                     [B]              bool, False where the end of an epoch is filled up

and one of `view_loader`, for other models:

    image                     [B, V, 3, S, S]  sRGB in [0, 1] over the background, or without one
    rgba                      [B, V, S, S, 4]  uint8, straight alpha, as stored
    world_from_camera         [B, V, 4, 4]     as stored: OpenCV axes, z up
    intrinsics                [B, V, 3, 3]     in pixels of S x S
    background, row, valid    as above
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lrm.cameras import camera_numbers, input_distance, normalize_cameras, resize_intrinsics
from lrm.loader import Batch, BatchLoader, Fields, LoaderOptions, LoaderStats
from lrm.order import Draw, KeyedDraws
from lrm.pixels import (
    WHITE,
    Float32,
    Window,
    cut_window,
    decode_view,
    decode_view_into,
    over_background,
    over_white,
    resize_image,
)
from pipeline.reader import CacheSettings, DamagedDataError, VersionReader, ViewsRead
from pipeline.types import Camera, Float64

if TYPE_CHECKING:  # who reads without a trainer needs no models of configs
    from lrm.config import DataConfig

__all__ = [
    "Batch", "Loader", "LoaderOptions", "LoaderStats", "PlainViews", "TrainingViews", "Window", "cut_window",
    "decode_view", "input_fields", "normalized_poses", "over_background", "over_white", "resize_image", "view_loader",
]  # fmt: skip

Background = Literal["white", "random"]
Shapes = dict[str, tuple[tuple[int, ...], type[np.generic]]]


def normalized_poses(cameras: Sequence[Camera], config: DataConfig, source: str) -> Float64:
    """Return the poses [V, 4, 4] of a sample's cameras, the first being the input, in the input camera's world."""
    distance = input_distance(source, None if config.input_distance == "keep" else config.input_distance)
    return normalize_cameras(np.stack([camera.world_from_camera for camera in cameras]), 0, distance)


def input_fields(image: Float32, camera: Camera, pose: Float64, image_px: int) -> dict[str, NDArray[Any]]:
    """Return input_image [3, S, S] and input_camera [20] of a view over white [H, W, 3] and its pose [4, 4]."""
    return {
        "input_image": resize_image(image, image_px, image_px).transpose(2, 0, 1),
        "input_camera": camera_numbers(pose, camera.intrinsics, camera.width, camera.height),
    }


def _background(kind: Background | None, draws: KeyedDraws) -> tuple[float, float, float]:
    """Return white, or a grey of 0 to 1."""
    if kind != "random":
        return WHITE
    grey = draws.below(256) / 255
    return grey, grey, grey


class TrainingViews:
    """One sample for the trainer: an input view, and a patch of each view at a random size."""

    def __init__(self, config: DataConfig, image_px: int) -> None:
        self._config, self._image_px = config, image_px
        self.num_views = 1 + config.side_views

    def shapes(self) -> Shapes:
        """Return shape and dtype of each field of one sample."""
        v, p, s, f32 = self.num_views, self._config.patch_px, self._image_px, np.float32
        return {
            "input_image": ((3, s, s), f32),
            "input_camera": ((20,), f32),
            "target_rgb": ((v, 3, p, p), f32),
            "target_world_from_camera": ((v, 4, 4), f32),
            "target_intrinsics": ((v, 3, 3), f32),
            "background": ((3,), f32),
        }

    def fill(self, read: ViewsRead, draw: Draw, out: Fields) -> None:
        """Write one sample into its place of a batch.

        Raises:
            DamagedDataError: if the sample is not what was written.
        """
        config, cameras, draws = self._config, read.cameras, KeyedDraws(draw.crop_key)
        try:
            poses = normalized_poses(cameras, config, read.source)
        except ValueError as error:
            raise DamagedDataError(f"sample {read.key}: view {draw.input_view}: {error}") from None
        sizes = []
        for _ in cameras:
            size = config.min_render_px + draws.below(config.max_render_px - config.min_render_px + 1)
            sizes.append((size, *(draws.below(size - config.patch_px + 1) for _ in range(2))))
        background = _background(config.background, draws)
        for i, (planes, camera, (size, left, top)) in enumerate(zip(read.planes, cameras, sizes)):
            image = decode_view(planes["rgba"], camera, read.key, background)
            window = cut_window(image, camera.intrinsics, size, left, top, config.patch_px)
            out["target_rgb"][i] = window.image.transpose(2, 0, 1)
            out["target_intrinsics"][i] = window.intrinsics
            if i == 0:
                over = image if background == WHITE else decode_view(planes["rgba"], camera, read.key)
                for name, value in input_fields(over, camera, poses[0], self._image_px).items():
                    out[name][...] = value
        out["target_world_from_camera"][...] = poses
        out["background"][...] = background


class PlainViews:
    """Some views of an object as pictures, with their cameras as stored.

    Args:
        num_views: views drawn of each object.
        image_px: width and height of the pictures; views of another size are resized, their intrinsics with them.
        background: colour to composite on; None gives RGBA as stored, decoded straight into the batch.
    """

    def __init__(self, num_views: int, image_px: int, background: Background | None = "white") -> None:
        self.num_views, self._image_px, self._kind = num_views, image_px, background

    def shapes(self) -> Shapes:
        """Return shape and dtype of each field of one sample."""
        v, s, f32 = self.num_views, self._image_px, np.float32
        cameras: Shapes = {"world_from_camera": ((v, 4, 4), f32), "intrinsics": ((v, 3, 3), f32)}
        if self._kind is None:
            return cameras | {"rgba": ((v, s, s, 4), np.uint8)}
        return cameras | {"image": ((v, 3, s, s), f32), "background": ((3,), f32)}

    def fill(self, read: ViewsRead, draw: Draw, out: Fields) -> None:
        """Write one sample into its place of a batch.

        Raises:
            DamagedDataError: if the sample is not what was written.
        """
        background, size = _background(self._kind, KeyedDraws(draw.crop_key)), self._image_px
        for i, (planes, camera) in enumerate(zip(read.planes, read.cameras)):
            if self._kind is None:
                decode_view_into(planes["rgba"], camera, read.key, out["rgba"][i])
            else:
                image = decode_view(planes["rgba"], camera, read.key, background)
                out["image"][i] = resize_image(image, size, size).transpose(2, 0, 1)
            out["world_from_camera"][i] = camera.world_from_camera
            k = camera.intrinsics
            if (camera.width, camera.height) != (size, size):
                k = resize_intrinsics(k, size / camera.width, size / camera.height)
            out["intrinsics"][i] = k
        if self._kind is not None:
            out["background"][...] = background


def loader_options(config: DataConfig) -> LoaderOptions:
    """Return the loader's part of a config. Memory is pinned where there is a GPU to copy to."""
    return LoaderOptions(
        seed=config.seed,
        mix=config.source_copies,
        max_views=config.max_views,
        input_views=config.input_views,
        block_shards=config.block_shards if config.cache_dir else 0,
        num_threads=config.num_threads,
        prefetch_batches=config.prefetch_batches,
        prefetch_bytes=config.prefetch_bytes,
        max_damaged_samples=config.max_damaged_samples,
        pin_memory=torch.cuda.is_available(),
    )


def cache_settings(cache_dir: str, cache_bytes: int, block_shards: int) -> CacheSettings | None:
    """Return the reader's cache, or None where no folder is named. Two blocks of shards are held: this and the next."""
    if not cache_dir:
        return None
    return CacheSettings(folder=Path(cache_dir).expanduser(), max_bytes=cache_bytes, open_shards=2 * block_shards)


def open_reader(corpus: str, version: int | None, config: DataConfig) -> VersionReader:
    """Open a version with the cache that the config names."""
    cache = cache_settings(config.cache_dir, config.cache_bytes, config.block_shards)
    return VersionReader.open(corpus, version, cache)


class Loader(BatchLoader):
    """The trainer's loader: an endless iterator of batches with a resumable position."""

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
        super().__init__(
            reader, TrainingViews(config, image_px), loader_options(config),
            batch_size=batch_size, rank=rank, ranks=ranks,
        )  # fmt: skip


def view_loader(
    corpus: str,
    version: int | None = None,
    *,
    num_views: int = 4,
    image_px: int = 512,
    background: Background | None = "white",
    batch_size: int = 8,
    rank: int = 0,
    ranks: int = 1,
    options: LoaderOptions | None = None,
    cache: CacheSettings | None = None,
) -> BatchLoader:
    """Return a loader of plain views, for any model. Close it, or use it as a context manager."""
    return BatchLoader(
        VersionReader.open(corpus, version, cache), PlainViews(num_views, image_px, background),
        options or LoaderOptions(), batch_size=batch_size, rank=rank, ranks=ranks,
    )  # fmt: skip
