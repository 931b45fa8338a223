"""Does it learn? PSNR of a trained model on what it has not seen, beside two guesses that know no object.

    unseen views     objects that were trained on, seen by the views from `data.max_views` on, which training never drew
    unseen objects   the held-out split of the version, seen by views of the same numbers

The model gets one view of an object and predicts those views; its inputs are spread over the views that training draws
from. Each prediction has a PSNR against the true view, at `image_px` over white, and a score is the mean of them. The
guesses are measured against the same true views:

    mean    the mean of all views that training drew from: place and size of objects, and white
    copy    the input view itself

Cost: an input is one pass of the model and one rendering a target, 0.1 s at 64 px with `tiny` on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from lrm.config import RunConfig
from lrm.model import LRM
from lrm.pixels import Float32, decode_view, resize_image
from lrm.preview import predict_views, psnr, to_pixels, write_png
from pipeline.reader import VersionReader
from pipeline.types import UserError

COLUMNS = ("input", "true", "predicted", "mean view")
GAP_PX, HEADER_PX = 3, 16
GREY = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What is measured.

    Attributes:
        image_px: width and height of the views that are compared.
        num_inputs: views of an object that are given, one by one.
        num_targets: views that each of them has to predict.
        max_objects: objects of a group that are measured at most, evenly spaced.
        mean_views: views that the mean view is made of at most.
    """

    image_px: int = 64
    num_inputs: int = 2
    num_targets: int = 4
    max_objects: int = 32
    mean_views: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """PSNR in dB over one group of objects, of the model and of the guesses; means over `pairs` of input and target."""

    psnr_db: float
    baseline_mean_db: float
    baseline_copy_db: float
    objects: int
    pairs: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    """One line of the picture: [P, P, 3] each, in [0, 1]."""

    given: Float32
    true: Float32
    predicted: Float32
    mean: Float32


def rows_of(reader: VersionReader, *, heldout: bool, at_most: int) -> list[int]:
    """Return rows of the training or of the held-out split, evenly spaced.

    Raises:
        UserError: if it is empty.
    """
    rows = [row for row, held in enumerate(reader.rows["heldout"].to_pylist()) if held is heldout]
    if not rows:
        raise UserError(
            f"version {reader.number} has no {'held-out' if heldout else 'training'} object; "
            "set split.heldout_per_mille so that both splits have some"
        )
    return spread(rows, at_most)


def spread(items: Sequence[int], count: int) -> list[int]:
    """Return `count` of the items, or all if there are fewer, evenly spaced, the first among them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def seen_and_unseen(num_views: int, max_views: int, protocol: Protocol) -> tuple[list[int], list[int]]:
    """Return the views to give and the views to predict, of an object of `num_views`.

    Raises:
        UserError: if training drew from every view.
    """
    if not 0 < max_views < num_views:
        raise UserError(
            f"data.max_views is {max_views} and objects have {num_views} views: none is left unseen; "
            f"set data.max_views to 1 to {num_views - 1}"
        )
    given = spread(range(max_views), protocol.num_inputs)
    return given, spread(range(max_views, num_views), protocol.num_targets)


def mean_view(reader: VersionReader, max_views: int, protocol: Protocol) -> Float32:
    """Return the mean over training objects of the views that training drew from, [P, P, 3], all objects alike."""
    rows = rows_of(reader, heldout=False, at_most=protocol.mean_views)
    total, count = np.zeros((protocol.image_px, protocol.image_px, 3), np.float64), 0
    for row in tqdm(rows, desc="mean view", unit="object", mininterval=1):
        read = reader.read_views(row, spread(range(max_views), max(1, protocol.mean_views // len(rows))))
        for camera, planes in zip(read.cameras, read.planes):
            image = decode_view(planes["rgba"], camera, read.key)
            total += resize_image(image, protocol.image_px, protocol.image_px)
            count += 1
    return (total / count).astype(np.float32)


def measure(
    model: LRM, config: RunConfig, reader: VersionReader, mean: Float32, protocol: Protocol, *, heldout: bool
) -> tuple[Scores, list[Line]]:
    """Score one group of objects; the lines show one input and one target of each."""
    rows = rows_of(reader, heldout=heldout, at_most=protocol.max_objects)
    scores: list[tuple[float, float, float]] = []
    lines: list[Line] = []
    group = "unseen objects" if heldout else "unseen views"
    for number, row in enumerate(tqdm(rows, desc=group, unit="object", mininterval=1)):
        num_views = reader.rows["num_views"][row].as_py()
        inputs, targets = seen_and_unseen(num_views, config.data.max_views, protocol)
        for place, view in enumerate(inputs):
            given, truths, predicted = predict_views(model, config, reader, row, [view, *targets], protocol.image_px)
            scores += [
                (psnr(true, guess), psnr(true, mean), psnr(true, given)) for true, guess in zip(truths, predicted)
            ]
            if place == number % len(inputs):
                shown = number % len(targets)
                lines.append(Line(given=given, true=truths[shown], predicted=predicted[shown], mean=mean))
    means = np.mean(scores, axis=0)
    return Scores(
        psnr_db=float(means[0]), baseline_mean_db=float(means[1]), baseline_copy_db=float(means[2]),
        objects=len(rows), pairs=len(scores),
    ), lines  # fmt: skip


def write_lines(lines: Sequence[Line], path: Path, *, across: int = 2, scale: int = 2) -> None:
    """Write lines as a PNG, `across` of them side by side, each tile `scale` times as large, under a header."""
    lines = lines[: len(lines) // across * across] or lines
    across = min(across, len(lines))
    size = lines[0].given.shape[0] * scale
    step = size + GAP_PX
    width, height = across * len(COLUMNS) * step + (across - 1) * 4 * GAP_PX, len(lines) // across * step
    sheet = np.full((HEADER_PX + height, width, 3), round(255 * GREY), np.uint8)  # OpenCV 5 writes on bytes only
    for number, line in enumerate(lines):
        top, block = HEADER_PX + number // across * step, number % across
        for column, tile in enumerate((line.given, line.true, line.predicted, line.mean)):
            left = block * (len(COLUMNS) * step + 4 * GAP_PX) + column * step
            large = cv2.resize(to_pixels(tile), (size, size), interpolation=cv2.INTER_NEAREST)
            sheet[top : top + size, left : left + size] = large
            if number < across:
                place = (left + 2, HEADER_PX - 4)
                cv2.putText(sheet, COLUMNS[column], place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    write_png(path, sheet)
