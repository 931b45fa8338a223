"""What noise costs: a table of samples against quality, on a dataset's own objects.

Each object is rendered with fixed numbers of samples, with and without the denoiser, and by the noise target; each
view is compared with a converged render of the same scene and camera, on white, as training sees it. The table shows
what the next dB costs, and that no fixed number serves all objects.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from pipeline.admission import check_file
from pipeline.quality import on_white_psnr
from pipeline.sample import decode_rgba
from pipeline.sources import open_source
from pipeline.spec import DatasetSpec
from pipeline.types import Asset, AssetError, Sample, UserError
from render.worker import RenderWorker

COUNTS = (4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to render: a fixed number of samples, or the noise target (None); with or without the denoiser."""

    samples: int | None
    denoise: bool

    @property
    def name(self) -> str:
        """How the table calls it."""
        return "target" if self.samples is None else f"{self.samples} spp" + (", denoised" if self.denoise else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a setting gave of one object: PSNR in dB over its views, samples taken, seconds a view."""

    uid: str
    setting: str
    half_db: list[float]
    full_db: list[float]
    samples: float
    seconds_per_view: float


def calibrate(
    spec: DatasetSpec, *, num_assets: int, num_views: int, resolution_px: int, reference_samples: int
) -> list[Row]:
    """Measure every setting on the first objects of a source.

    Raises:
        UserError: if none of them can be rendered.
    """
    chosen = list(_usable(spec, num_assets))
    if not chosen:
        raise UserError(f"spec {spec.name}: none of the source's objects can be read; see `render` for the reasons")
    settings = [Setting(count, denoise) for count in COUNTS for denoise in (False, True)] + [Setting(None, True)]
    references = _render_all(spec, Setting(reference_samples, False), chosen, num_views, resolution_px)
    rows = []
    for setting in settings:
        for uid, (sample, seconds) in _render_all(spec, setting, chosen, num_views, resolution_px).items():
            if uid not in references:
                continue
            pairs = [_compare(*views) for views in zip(sample.views, references[uid][0].views, strict=True)]
            rows.append(
                Row(
                    uid=uid,
                    setting=setting.name,
                    half_db=[half for half, _ in pairs],
                    full_db=[full for _, full in pairs],
                    samples=statistics.mean(sample.quality["views"]["samples"]),
                    seconds_per_view=seconds / num_views,
                )
            )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text: a line a setting over all objects, then the noise target's line of each object."""
    head = f"{'setting':18} {'samples':>8} {'s/view':>8} {'half min':>9} {'median':>7} {'full min':>9} {'median':>7}"
    lines = [head]
    for setting in dict.fromkeys(row.setting for row in rows):
        lines.append(_line(setting, [row for row in rows if row.setting == setting]))
    lines += ["", "the noise target, by object:"]
    lines += [_line(row.uid[-40:], [row]) for row in rows if row.setting == "target"]
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON values."""
    return [{name: getattr(row, name) for name in Row.__dataclass_fields__} for row in rows]


def _line(name: str, rows: Sequence[Row]) -> str:
    half = [value for row in rows for value in row.half_db]
    full = [value for row in rows for value in row.full_db]
    return (
        f"{name:18} {statistics.mean(row.samples for row in rows):8.1f} "
        f"{statistics.mean(row.seconds_per_view for row in rows):8.3f} {min(half):9.1f} {statistics.median(half):7.1f} "
        f"{min(full):9.1f} {statistics.median(full):7.1f}"
    )


def _usable(spec: DatasetSpec, num_assets: int) -> Iterator[tuple[Asset, Any]]:
    """Yield the first objects that can be had and pass admission, with their files."""
    source, found = open_source(spec), 0
    for asset in source.list_assets():
        if found == num_assets:
            return
        try:
            path = source.fetch(asset)
            if path is not None:
                check_file(path, asset.format, spec.admission)
        except AssetError as error:
            tqdm.write(f"{asset.uid}: left out, {error.kind}: {error.message}")
            continue
        found += 1
        yield asset, path


def _render_all(
    spec: DatasetSpec, setting: Setting, chosen: Sequence[tuple[Asset, Any]], num_views: int, resolution_px: int
) -> dict[str, tuple[Sample, float]]:
    """Return (sample, seconds) by uid of what renders under a setting."""
    render = spec.render.model_copy(
        update={
            "samples": setting.samples, "denoise": setting.denoise, "num_views": num_views,
            "resolution_px": resolution_px, "planes": ("rgba",), "codec": "png",
        }
    )  # fmt: skip
    patient = spec.limits.model_copy(update={"deadline_s": 86_400.0})
    out = {}
    changed = spec.model_copy(update={"render": render, "limits": patient})
    with RenderWorker(changed, fingerprint="calibrate", num_threads=os.cpu_count() or 1) as worker:
        for asset, path in tqdm(chosen, desc=setting.name, unit="obj"):
            try:
                begun = time.perf_counter()
                sample = worker.render(asset, path)
                out[asset.uid] = sample, time.perf_counter() - begun
            except AssetError as error:
                tqdm.write(f"{asset.uid}: left out, {error.kind}: {error.message}")
    return out


def _compare(view: Any, reference: Any) -> tuple[float, float]:
    image, truth = (decode_rgba(one.planes["rgba"].data) for one in (view, reference))
    return on_white_psnr(image, truth)
