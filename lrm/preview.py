"""Pictures of a run: its loss curve, and predicted views beside true ones.

A preview is not an evaluation: by default it shows objects that were trained on, from one input view, seen again from
another view of the corpus. Its PSNR is stated beside that of a baseline that knows no object at all: the mean of the
true views, over other views of the same objects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lrm.checkpoint import load_model
from lrm.config import RunConfig
from lrm.data import Float32, cut_window, decode_view, input_fields, normalized_poses, resize_image
from lrm.losses import psnr_db
from lrm.metrics import read_metrics
from lrm.model import LRM
from pipeline.reader import VersionReader
from pipeline.types import UserError

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
def predict_view(
    model: LRM, config: RunConfig, reader: VersionReader, row: int, input_view: int, novel_view: int, image_px: int
) -> tuple[Float32, Float32, Float32]:
    """Return (input, true novel, predicted novel) pictures [image_px, image_px, 3] in [0, 1], over white."""
    read = reader.read_views(row, (input_view, novel_view))
    cameras = [read.header.cameras[view] for view in (input_view, novel_view)]
    images = [decode_view(planes["rgba"], camera, read.header.key) for planes, camera in zip(read.planes, cameras)]
    poses = normalized_poses(cameras, config.data)
    fields = input_fields(images[0], cameras[0], poses[0], config.model.encoder.image_px)
    truth = cut_window(images[1], cameras[1].intrinsics, image_px, 0, 0, image_px)

    def tensor(value: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(value, np.float32))[None]

    planes = model.planes(tensor(fields["input_image"]), tensor(fields["input_camera"]))
    views = (tensor(poses[1:]), tensor(truth.intrinsics[None]))
    rendered = model.render(planes, *views, image_px, image_px)
    predicted: Float32 = rendered.rgb[0, 0].clamp(0, 1).permute(1, 2, 0).numpy()
    return resize_image(images[0], image_px, image_px), truth.image, predicted


def _mean_view(reader: VersionReader, rows: list[int], image_px: int) -> Float32:
    """Return the mean of views 1, 2, ... of the rows, all objects alike, [image_px, image_px, 3]."""
    each, total, count = max(1, MAX_BASELINE_VIEWS // len(rows)), np.zeros((image_px, image_px, 3), np.float64), 0
    for row in rows:
        views = range(min(each, reader.rows["num_views"][row].as_py()))
        read = reader.read_views(row, views)
        for view, planes in zip(views, read.planes):
            image = decode_view(planes["rgba"], read.header.cameras[view], read.header.key)
            total += resize_image(image, image_px, image_px)
            count += 1
    return (total / count).astype(np.float32)


def _psnr(a: Float32, b: Float32) -> float:
    return psnr_db(float(np.mean((a.astype(np.float64) - b) ** 2)))


def _save_row(path: Path, tiles: tuple[Float32, ...]) -> Float32:
    gap = np.full((tiles[0].shape[0], GAP_PX, 3), 0.8, np.float32)
    strip = np.concatenate([part for tile in tiles for part in (tile, gap)][:-1], 1)
    _save_rgb(path, strip)
    return strip


def _save_rgb(path: Path, image: Float32) -> None:
    pixels = cv2.cvtColor(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(str(path), pixels):
        raise OSError(f"{path}: OpenCV could not write the picture")


def write_predictions(
    checkpoint_dir: str | Path,
    corpus: str,
    version: int | None,
    out_dir: str | Path,
    num_objects: int = 4,
    image_px: int = 96,
    split: Literal["train", "heldout"] = "train",
) -> dict[str, Any]:
    """Write rows of (input | true novel view | predicted novel view), and return what they are worth.

    Writes `prediction-00.png`, one an object, and `predictions.png`, all of them, into out_dir. The input is view 0 of
    each object, the novel view the middle one.

    Returns:
        step, version, split; psnr_db and baseline_psnr_db: means over the objects; file: the name of the whole sheet;
        objects: uid, file, input_view, novel_view, psnr_db and baseline_psnr_db of each.

    Raises:
        UserError: if there is no checkpoint, or the corpus or the split is not there.
    """
    model, config, state = load_model(Path(checkpoint_dir))
    reader, out = VersionReader.open(corpus, version), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    rows = _pick_rows(reader, num_objects, split)
    baseline = _mean_view(reader, rows, image_px)
    objects, strips = [], []
    for i, row in enumerate(rows):
        novel = reader.rows["num_views"][row].as_py() // 2
        tiles = predict_view(model, config, reader, row, 0, novel, image_px)
        name = f"prediction-{i:02d}.png"
        strips += [_save_row(out / name, tiles), np.full((GAP_PX, 3 * image_px + 2 * GAP_PX, 3), 0.8, np.float32)]
        entry = {"uid": reader.rows["uid"][row].as_py(), "file": name, "input_view": 0, "novel_view": novel}
        scores = {"psnr_db": _psnr(tiles[2], tiles[1]), "baseline_psnr_db": _psnr(baseline, tiles[1])}
        objects.append(entry | scores)
    _save_rgb(out / "predictions.png", np.concatenate(strips[:-1], 0))
    means = {name: float(np.mean([entry[name] for entry in objects])) for name in ("psnr_db", "baseline_psnr_db")}
    about = {"step": state["step"], "version": reader.number, "split": split}
    return about | means | {"file": "predictions.png", "objects": objects}
