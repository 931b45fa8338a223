"""Pictures of a run: its loss curve, and predicted views beside true ones, while it trains and afterwards.

A preview is not an evaluation: by default it shows objects that were trained on, from one input view, seen again from
another view of the corpus. Its PSNR is stated beside that of a baseline that knows no object at all: the mean of the
true views, over other views of the same objects.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lrm.checkpoint import load_model
from lrm.config import RunConfig
from lrm.data import input_fields, normalized_poses
from lrm.losses import psnr_db
from lrm.metrics import read_metrics
from lrm.model import LRM
from lrm.pixels import Float32, Uint8, cut_window, decode_view, resize_image
from lrm.ranks import Ranks
from pipeline.reader import VersionReader
from pipeline.types import Float64, UserError

log = logging.getLogger(__name__)

MAX_BASELINE_VIEWS = 64
GAP_PX = 2


def write_loss_curve(metrics_path: str | Path, png_path: str | Path) -> None:
    """Plot loss (log scale) over steps from a metrics.jsonl.

    Raises:
        UserError: if there is no finite loss in the file.
    """
    lines = [line for line in read_metrics(Path(metrics_path)) if line.get("loss") is not None]
    if not lines:
        raise UserError(f"{metrics_path}: no logged loss to plot; train at least train.log_every_steps steps")
    figure = Figure(figsize=(6.4, 3.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.semilogy([line["step"] for line in lines], [line["loss"] for line in lines], color="#1f5fa8")
    axes.set_xlabel("step")
    axes.set_ylabel("mean squared error")
    axes.grid(alpha=0.3, which="both")
    Path(png_path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, metadata={"Software": None})


def _pick_rows(reader: VersionReader, num_objects: int, split: Literal["train", "heldout"]) -> list[int]:
    """Return rows of the split, evenly spaced."""
    wanted = split == "heldout"
    rows = [row for row, heldout in enumerate(reader.rows["heldout"].to_pylist()) if heldout == wanted]
    if not rows:
        raise UserError(f"version {reader.number} has no sample in its {split} split; there is nothing to preview")
    count = min(num_objects, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


@torch.no_grad()
def predict_views(
    model: LRM, config: RunConfig, reader: VersionReader, row: int, views: Sequence[int], image_px: int
) -> tuple[Float32, list[Float32], list[Float32]]:
    """Predict the novel views views[1:] of a sample from its view views[0], over white, in [0, 1].

    Returns:
        the input [image_px, image_px, 3], the true novel views, and the predicted ones.
    """
    read = reader.read_views(row, views)
    cameras = read.cameras
    images = [decode_view(planes["rgba"], camera, read.key) for planes, camera in zip(read.planes, cameras)]
    poses = normalized_poses(cameras, config.data, read.source)
    fields = input_fields(images[0], cameras[0], poses[0], config.model.encoder.image_px)
    novel = zip(images[1:], cameras[1:])
    truths = [cut_window(image, camera.intrinsics, image_px, 0, 0, image_px) for image, camera in novel]

    device = next(model.parameters()).device

    def tensor(value: Float32 | Float64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(value, np.float32))[None].to(device)

    intrinsics = np.stack([truth.intrinsics for truth in truths])
    # As a whole: a model whose parameters are spread over ranks is gathered by its call alone.
    rendered = model(
        tensor(fields["input_image"]), tensor(fields["input_camera"]), tensor(poses[1:]), tensor(intrinsics), image_px
    )
    predicted = rendered.rgb[0].float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return resize_image(images[0], image_px, image_px), [truth.image for truth in truths], list(predicted)


def _mean_view(reader: VersionReader, rows: list[int], image_px: int) -> Float32:
    """Return the mean of the first views of the rows, all objects alike, [image_px, image_px, 3]."""
    each, total, count = max(1, MAX_BASELINE_VIEWS // len(rows)), np.zeros((image_px, image_px, 3), np.float64), 0
    for row in rows:
        views = range(min(each, reader.rows["num_views"][row].as_py()))
        read = reader.read_views(row, views)
        for camera, planes in zip(read.cameras, read.planes):
            image = decode_view(planes["rgba"], camera, read.key)
            total += resize_image(image, image_px, image_px)
            count += 1
    return (total / count).astype(np.float32)


def psnr(a: Float32, b: Float32) -> float:
    """Return the PSNR in dB of two pictures in [0, 1]."""
    return psnr_db(float(np.mean((a.astype(np.float64) - b) ** 2)))


def _sheet(lines: list[list[Float32]]) -> Float32:
    """Tile pictures [P, P, 3], a list a line, with grey gaps."""
    size = lines[0][0].shape[0]
    sheet = np.full(
        (len(lines) * (size + GAP_PX) - GAP_PX, len(lines[0]) * (size + GAP_PX) - GAP_PX, 3), 0.8, np.float32
    )
    for i, line in enumerate(lines):
        for j, tile in enumerate(line):
            top, left = i * (size + GAP_PX), j * (size + GAP_PX)
            sheet[top : top + size, left : left + size] = tile
    return sheet


def to_pixels(image: Float32) -> Uint8:
    """Return a picture in [0, 1] as bytes."""
    out: Uint8 = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return out


def write_png(path: Path, pixels: Uint8) -> None:
    """Write an RGB picture [H, W, 3], its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path}: OpenCV could not write the picture")


def _novel_views(reader: VersionReader, row: int, count: int) -> list[int]:
    """Return view 0, which is given, and `count` others that stand evenly among the rest; fewer where it has fewer."""
    num_views = reader.rows["num_views"][row].as_py()
    count = min(count, num_views - 1)
    return [0, *(1 + (i + 1) * (num_views - 1) // (count + 1) for i in range(count))]


class HeldOut:
    """Objects that a run looks at now and then: PSNR on views it is not given, and a sheet of pictures.

    They are of the held-out split where the version has one, else of the training split, and `split` says which. The
    weights are those in training, not the averaged ones. No random number is drawn, and no state of the run changes.
    """

    NOVEL_VIEWS = 3
    MAX_IMAGE_PX = 128

    def __init__(self, reader: VersionReader, config: RunConfig, ranks: Ranks, rows: list[int], split: str) -> None:
        self._reader, self._config, self._ranks, self._rows, self.split = reader, config, ranks, rows, split
        self._image_px = min(self.MAX_IMAGE_PX, config.data.max_render_px)

    @classmethod
    def of(cls, reader: VersionReader, config: RunConfig, ranks: Ranks) -> HeldOut | None:
        """Return what the config asks for, or None if that is nothing."""
        if not (config.train.heldout_every_steps or config.train.pictures_every_steps):
            return None
        split: Literal["train", "heldout"] = "heldout" if any(reader.rows["heldout"].to_pylist()) else "train"
        if split == "train":
            log.warning(
                "version %d holds no object out: PSNR and pictures are of training objects (psnr_train); "
                "publish one with split.heldout_per_mille above 0 for unseen ones", reader.number,
            )  # fmt: skip
        return cls(reader, config, ranks, _pick_rows(reader, config.train.heldout_objects, split), split)

    def look(self, model: LRM) -> tuple[float, Uint8]:
        """Return the mean PSNR in dB over objects and novel views, and a sheet [H, W, 3] of this rank's objects.

        Every rank calls this; each predicts its share of the objects.
        """
        ranks, scores, lines = self._ranks, [], []
        own = self._rows[ranks.rank :: ranks.size]
        rounds = -(-len(self._rows) // ranks.size)  # alike on all ranks, as a sharded model needs
        precise = self._config.train.precision == "fp32"
        for turn in range(rounds):
            row = own[turn] if turn < len(own) else self._rows[0]
            views = _novel_views(self._reader, row, self.NOVEL_VIEWS)
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=not precise):
                given, truths, predicted = predict_views(model, self._config, self._reader, row, views, self._image_px)
            if turn < len(own):
                scores += [psnr(a, b) for a, b in zip(truths, predicted)]
            lines.append([given, *(tile for pair in zip(truths, predicted) for tile in pair)])
        total = ranks.mean(torch.tensor([sum(scores), len(scores)], dtype=torch.float64, device=ranks.device))
        return float(total[0] / total[1]), to_pixels(_sheet(lines))

    def write(self, path: Path, sheet: Uint8) -> Path:
        """Write a sheet as PNG: a line an object, the input view, then pairs of (true, predicted)."""
        write_png(path, sheet)
        return path


def write_predictions(
    checkpoint_dir: str | Path,
    reader: VersionReader,
    png_path: str | Path,
    num_objects: int = 4,
    num_novel_views: int = 2,
    image_px: int = 96,
    split: Literal["train", "heldout"] = "train",
) -> dict[str, float | int | str]:
    """Write a sheet, a line an object: the input view, then pairs of (true, predicted) views it was not given.

    The input is view 0 of each object, the novel views stand evenly among the others.

    Returns:
        step, split, objects; psnr_db and baseline_psnr_db: means over all novel views of the sheet.

    Raises:
        UserError: if there is no checkpoint, or no sample in the split.
    """
    model, config, state = load_model(Path(checkpoint_dir))
    rows = _pick_rows(reader, num_objects, split)
    baseline = _mean_view(reader, rows, image_px)
    lines, scores, baseline_scores = [], [], []
    for row in rows:
        views = _novel_views(reader, row, num_novel_views)
        given, truths, predicted = predict_views(model, config, reader, row, views, image_px)
        lines.append([given, *(tile for pair in zip(truths, predicted) for tile in pair)])
        scores += [psnr(a, b) for a, b in zip(truths, predicted)]
        baseline_scores += [psnr(truth, baseline) for truth in truths]
    write_png(Path(png_path), to_pixels(_sheet(lines)))
    means = {"psnr_db": float(np.mean(scores)), "baseline_psnr_db": float(np.mean(baseline_scores))}
    return {"step": int(state["step"]), "split": split, "objects": len(rows), **means}
