"""What an archive of captures is worth, before a corpus is made of it: every check, a few pictures, no shard.

    outlined(frame, mask)      one frame, small, with the outline of its mask: runs in the child that opens files
    Check                      what became of one capture
    write_checks(checks, out)  checks.json, rejects.png, and checks.html with pictures of every kind of reject

`jobs.check` runs the same ingest as a corpus, at thumbnail size and few views: masks and models are judged in full
either way, and what is left out, resampling and encoding the photos, judges nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pipeline.photos import decode_mask, decode_photo, image_size
from pipeline.report.figures import write_png
from pipeline.report.page import Section, write_page
from pipeline.types import AssetError

ACCEPTED = "accepted"
OUTLINE = (255, 0, 160)
MAX_MESSAGES = 200
_SHRINKS = (8, 4, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What became of one capture: `kind` is "accepted" or a kind of failure; `figures` are numbers of its record."""

    uid: str
    kind: str
    message: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def outlined(frame: bytes, mask: bytes | None, size_px: int, threshold: int) -> NDArray[np.uint8]:
    """Return a frame with the outline of its mask, RGB [H, W, 3] with the longer side `size_px` or less.

    Raises:
        AssetError: CORRUPT_FILE or TOO_LARGE; a mask that cannot be decoded, or is of other sides, is left out.
    """
    _, width, height = image_size(frame, "frame")
    shrink = next((one for one in _SHRINKS if max(width, height) >= one * size_px), 1)
    image, width, height = decode_photo(frame, "frame", shrink)
    scale = min(1.0, size_px / max(width, height))
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    small = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    rgb: NDArray[np.uint8] = np.ascontiguousarray(small[..., ::-1])
    if mask is not None:
        try:
            shape = decode_mask(mask, "mask")
        except AssetError:
            return rgb
        binary = (cv2.resize(shape, size, interpolation=cv2.INTER_AREA) > threshold).astype(np.uint8)
        lines, _ = cv2.findContours(binary, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(rgb, lines, -1, OUTLINE, 2)
    return rgb


def write_checks(
    checks: Sequence[Check], pictures: Sequence[tuple[str, str, NDArray[np.uint8]]], out_dir: Path, what: str
) -> Path:
    """Write checks.json, rejects.png, pictures and checks.html; return the page's path.

    Args:
        checks: of every capture, in the order of the archive.
        pictures: (kind, uid, RGB [H, W, 3]) of some.
        what: the archive, for the title.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    counts = Counter(check.kind for check in checks)
    record = {
        "what": what,
        "captures": len(checks),
        "accepted": counts[ACCEPTED],
        "rejects": {kind: count for kind, count in sorted(counts.items()) if kind != ACCEPTED},
        "checks": [asdict(check) for check in checks],
    }
    (out_dir / "checks.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _write_histogram(counts, out_dir / "rejects.png")
    ordered = [ACCEPTED, *sorted(kind for kind in counts if kind != ACCEPTED)]
    table = [(kind, f"{counts[kind]} of {len(checks)}") for kind in ordered]
    sections = [Section(title="Captures", images=[("rejects.png", "captures by what became of them")], table=table)]
    for kind in ordered:
        shown = [(uid, image) for one, uid, image in pictures if one == kind]
        messages = [(check.uid, check.message or _in_words(check.figures)) for check in checks if check.kind == kind]
        if messages:
            images = [(_write_sheet([image for _, image in shown], out_dir / f"{kind}.png"), _caption(shown))]
            sections.append(
                Section(
                    title=kind.replace("_", " "),
                    text="" if len(messages) <= MAX_MESSAGES else f"The first {MAX_MESSAGES} of {len(messages)}.",
                    images=images if shown else (),
                    table=messages[:MAX_MESSAGES],
                )
            )
    return write_page(f"Checks of {what}", sections, out_dir / "checks.html")


def _caption(shown: Sequence[tuple[str, Any]]) -> str:
    return "the masks' outlines in magenta: " + ", ".join(uid for uid, _ in shown)


def _in_words(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())


def _write_sheet(images: Sequence[NDArray[np.uint8]], path: Path, columns: int = 6) -> str:
    """Write pictures of any sides as one sheet on light grey; return its name."""
    if images:
        side = max(max(image.shape[:2]) for image in images)
        rows = -(-len(images) // columns)
        sheet = np.full((rows * side, min(columns, len(images)) * side, 3), 236, np.uint8)
        for i, image in enumerate(images):
            height, width = image.shape[:2]
            top, left = i // columns * side + (side - height) // 2, i % columns * side + (side - width) // 2
            sheet[top : top + height, left : left + width] = image
        write_png(path, sheet)
    return path.name


def _write_histogram(counts: Counter[str], path: Path) -> None:
    kinds = sorted(counts, key=lambda kind: (kind != ACCEPTED, -counts[kind], kind))
    figure = Figure(figsize=(6.4, 0.6 + 0.32 * max(1, len(kinds))))
    axes = figure.add_subplot()
    bars = axes.barh(kinds, [counts[kind] for kind in kinds], color=["C2" if k == ACCEPTED else "C3" for k in kinds])
    axes.bar_label(bars)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("captures")
    figure.savefig(path, dpi=100, bbox_inches="tight")
