"""Pictures of a version: contact sheets, and the cameras drawn around an object. Matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.reader import VersionReader
from pipeline.sample import contact_sheet, decode_rgba
from pipeline.types import Camera

CELL_PX = 128


def write_png(path: Path, rgb: NDArray[np.uint8]) -> None:
    """Write an RGB image [H, W, 3] as PNG."""
    ok, data = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    if not ok:
        raise ValueError(f"{path}: OpenCV could not encode an image of shape {rgb.shape}")
    path.write_bytes(data.tobytes())


def thumbnails(
    reader: VersionReader, row: int, views: Sequence[int], cell_px: int = CELL_PX
) -> list[NDArray[np.uint8]]:
    """Return views of a sample as RGBA thumbnails [cell_px, cell_px, 4], scaled with premultiplied alpha."""
    out = []
    for planes in reader.read_views(row, views).planes:
        image = decode_rgba(planes["rgba"])
        alpha = image[..., 3:].astype(np.float32)
        premultiplied = np.concatenate([image[..., :3] * (alpha / 255), alpha], axis=2)
        shrink = cv2.INTER_AREA if image.shape[0] >= cell_px else cv2.INTER_LINEAR
        small = np.asarray(cv2.resize(premultiplied, (cell_px, cell_px), interpolation=shrink), np.float32)
        small[..., :3] *= 255 / np.maximum(small[..., 3:], 1)
        out.append(np.rint(np.clip(small, 0, 255)).astype(np.uint8))
    return out


def write_contact_sheet(
    reader: VersionReader, rows: Sequence[int], path: Path, num_views: int = 8, cell_px: int = CELL_PX
) -> None:
    """Write a sheet with one object a line and up to `num_views` evenly chosen views of it, over light grey."""
    cells: list[NDArray[np.uint8]] = []
    totals = [int(reader.rows["num_views"][row].as_py()) for row in rows]
    columns = min(num_views, *totals)
    for row, total in zip(rows, totals, strict=True):
        cells += thumbnails(reader, row, [i * total // columns for i in range(columns)], cell_px)
    write_png(path, contact_sheet(cells, columns, background=236))


def write_cameras(cameras: Sequence[Camera], path: Path, title: str) -> None:
    """Draw cameras as frusta around the box [-1, 1]^3 in world axes, z up."""
    figure = Figure(figsize=(6.4, 6.0))
    axes: Any = figure.add_subplot(projection="3d")
    for start, end in _box_edges():
        axes.plot(*zip(start, end), color="0.6", linewidth=0.8)
    for i, camera in enumerate(cameras):
        colour = f"C{i % 10}"
        centre, corners = _frustum(camera, 0.35)
        for j, corner in enumerate(corners):
            axes.plot(*zip(centre, corner), color=colour, linewidth=0.7)
            axes.plot(*zip(corner, corners[(j + 1) % 4]), color=colour, linewidth=0.7)
        axes.text(*(centre * 1.05), str(i), fontsize=6, color=colour)
    limit = max(float(np.abs([c.world_from_camera[:3, 3] for c in cameras]).max()), 1.2)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), zlim=(-limit, limit), xlabel="x", ylabel="y", zlabel="z")
    axes.set_title(title, fontsize=9)
    axes.set_box_aspect((1, 1, 1))
    axes.view_init(elev=22, azim=-60)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def write_histogram(values: Sequence[float], path: Path, label: str, bins: int = 30) -> None:
    """Write a histogram of one quantity over samples or views."""
    figure = Figure(figsize=(4.2, 2.6))
    axes = figure.add_subplot()
    axes.hist(values, bins=bins, color="C0")
    axes.set_xlabel(label)
    axes.set_ylabel("count")
    figure.savefig(path, dpi=100, bbox_inches="tight")


def _frustum(camera: Camera, depth: float) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Return the centre [3] and the four image corners [3] of a camera at this depth, in world coordinates."""
    inverse = np.linalg.inv(camera.intrinsics)
    pose = camera.world_from_camera
    pixels = [(0, 0), (camera.width, 0), (camera.width, camera.height), (0, camera.height)]
    corners = [pose[:3, :3] @ (inverse @ np.array([u, v, 1.0]) * depth) + pose[:3, 3] for u, v in pixels]
    return pose[:3, 3], corners


def _box_edges() -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    corners = [(x, y, z) for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]
    return [(a, b) for i, a in enumerate(corners) for b in corners[i + 1 :] if sum(p != q for p, q in zip(a, b)) == 1]
