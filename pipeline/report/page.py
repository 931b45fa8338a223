"""`report.html`: pictures beside it in one folder, no script, nothing fetched from anywhere."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.compute as pc

from pipeline.quality import FLAGS
from pipeline.reader import VersionReader
from pipeline.report.figures import write_cameras, write_contact_sheet, write_histogram
from pipeline.version import open_rows

MAX_OBJECTS = 24
MAX_MEASURED = 2000
"""Objects whose single views are looked at, each by one ranged read."""
MAX_FAILURES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page that somebody else made: pictures (file names beside the page) and a table."""

    title: str
    text: str = ""
    images: Sequence[tuple[str, str]] = ()  # (file name, caption)
    table: Sequence[tuple[str, Any]] = field(default=())


def write_report(reader: VersionReader, out_dir: Path, extra: Sequence[Section] = ()) -> Path:
    """Write report.html and its PNGs for a version; return the page's path.

    Args:
        extra: sections that stand behind the dataset's own, such as a training run's.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    sections: list[Section | None] = [_summary(reader)]
    if len(reader):
        sections += [_objects(reader, out_dir), _cameras(reader, out_dir), _quality(reader, out_dir)]
    sections += [_failures(reader), *extra]
    title = f"{reader.version.record['name']}, version {reader.number}"
    return write_page(title, [s for s in sections if s is not None], out_dir / "report.html")


def write_page(title: str, sections: Sequence[Section], path: Path) -> Path:
    """Write one static page of sections; return its path. Pictures are named relative to it."""
    template = files("pipeline.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    path.write_text(environment.from_string(template).render(title=title, sections=sections), encoding="utf-8")
    return path


def _summary(reader: VersionReader) -> Section:
    counts, record = reader.version.counts, reader.version.record
    table: list[tuple[str, Any]] = [
        ("objects planned", counts["planned"]),
        ("samples", counts["samples"]),
        ("views", counts["views"]),
        ("failures", sum(counts["failures"].values())),
        ("held out", counts["heldout"]),
        ("shards", f"{counts['shards_committed']} of {counts['shards_planned']}"),
        _pictures(reader),
        ("licence policy", record["license_policy"]),
        ("made by", ", ".join(record.get("producers", ()))),
        ("may be redistributed", "no" if record.get("redistributable") is False else "as the licences allow"),
        ("fingerprints", ", ".join(text[:12] for text in record["fingerprints"])),
        ("digest", reader.digest[:12]),
        ("code", record["code_commit"]),
    ]
    table += [(f"licence {name}", count) for name, count in counts["licenses"].items()]
    table += [(f"source {name}", count) for name, count in counts["sources"].items()]
    return Section(title="Dataset", table=table)


def _pictures(reader: VersionReader) -> tuple[str, str]:
    """Tell how the spec's pictures are made: the recipe of renders, or what is kept of photographs."""
    spec = reader.version.spec
    if spec.is_captured:
        views = "every good frame" if spec.capture.num_views is None else f"up to {spec.capture.num_views} views"
        return (
            "photographs",
            f"{views} of {spec.capture.resolution_px} px, cropped to {spec.capture.padding:g} x the mask",
        )
    one = spec.render
    return "preset", f"{one.preset}: {one.num_views} views of {one.resolution_px} px, {_field_of_view(reader)}"


def _field_of_view(reader: VersionReader) -> str:
    """Return the field of view in words: the spec's, else what the first sample's cameras have."""
    given = reader.version.spec.render.fov_deg
    if given is None and not len(reader):
        return "the preset's field of view"
    if given is None:
        camera = reader.read_views(0, [0]).header.cameras[0]
        given = math.degrees(2 * math.atan(camera.width / 2 / camera.intrinsics[0, 0]))
    return f"{given:.4g} degrees"


def _objects(reader: VersionReader, out_dir: Path) -> Section:
    rows = spread(len(reader), MAX_OBJECTS) if len(reader) > MAX_OBJECTS else list(range(len(reader)))
    write_contact_sheet(reader, rows, out_dir / "contact_sheet.png")
    uids = ", ".join(reader.rows["uid"][row].as_py() for row in rows)
    return Section(title="Objects", images=[("contact_sheet.png", f"one object a line, up to 8 of its views: {uids}")])


def _cameras(reader: VersionReader, out_dir: Path) -> Section:
    """Draw the cameras of the first sample of each source: photographs stand elsewhere than a recipe's."""
    first: dict[str, int] = {}
    for row, source in enumerate(reader.rows["source"].to_pylist()):
        first.setdefault(source, row)
    images = []
    for number, (source, row) in enumerate(sorted(first.items(), key=lambda item: item[1])):
        header, name = reader.read_views(row, [0]).header, f"cameras{f'_{number}' if number else ''}.png"
        write_cameras(header.cameras, out_dir / name, f"{len(header.cameras)} cameras of {header.uid}")
        images.append((name, f"source {source}; frusta are numbered by view"))
    text = (
        "World axes are right-handed with z up; the box is [-1, 1]^3. Poses are world_from_camera with OpenCV axes: "
        "x right, y down, z forward."
    )
    return Section(title="Cameras", text=text, images=images)


def _quality(reader: VersionReader, out_dir: Path) -> Section | None:
    records, by_view = reader.quality(), _by_view(reader)
    coverage = [float(value) for views in by_view for value in views.get("alpha_coverage", ())]
    triangles = [float(np.log10(max(1, record["num_triangles"]))) for record in records if "num_triangles" in record]
    images = []
    if coverage:
        write_histogram(coverage, out_dir / "coverage.png", "alpha coverage of a view")
        images.append(("coverage.png", "share of each view that the object covers"))
    if triangles:
        write_histogram(triangles, out_dir / "triangles.png", "log10 of triangles")
        images.append(("triangles.png", "triangles an object"))
    table = [*_figures(records, by_view), *_flags(records)]
    return Section(title="Quality", images=images, table=table) if images or table else None


def _by_view(reader: VersionReader) -> list[Mapping[str, Any]]:
    """Return the figures of single views by object, which stand in the shards: of all, or of some spread evenly."""
    rows = range(len(reader)) if len(reader) <= MAX_MEASURED else spread(len(reader), MAX_MEASURED)

    def one(row: int) -> Mapping[str, Any]:
        views = reader.read_views(row, []).header.metadata["quality"].get("views", {})
        return views if isinstance(views, Mapping) else {}

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, rows))


def spread(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` numbers below `count`, spread evenly."""
    return sorted({i * count // wanted for i in range(wanted)})


def _figures(records: Sequence[Mapping[str, Any]], by_view: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Tell what rendering cost and gave, over all views that tell; where the spec fixes samples, no PSNR is known."""

    def of_views(name: str) -> list[float]:
        return [float(value) for views in by_view for value in views.get(name, ())]

    out = []
    if samples := of_views("samples"):
        out.append(("samples a pixel: median, most", f"{statistics.median(samples):g}, {max(samples):g}"))
    for name, where in (("half_psnr_db", "after 2 x 2 averaging"), ("full_psnr_db", "at full resolution")):
        if found := of_views(name):
            text = f"{min(found):.1f}, {statistics.median(found):.1f} dB"
            out.append((f"estimated PSNR on white {where}: least, median", text))
    cropped = [float(record["mean_cropped"]) for record in records if "mean_cropped" in record]
    if cropped:
        out.append(("share of an object outside its views: mean, most", f"{_mean(cropped):.1%}, {max(cropped):.1%}"))
    return out + _capture_figures(records)


_CAPTURE_FIGURES = (
    ("registered_share", "share of a capture's frames with a pose"),
    ("reprojection_px", "reprojection error of its model in pixels"),
    ("sweep_deg", "widest angle between two of its views in degrees"),
    ("mask_agreement", "overlap of its masks with the model's points"),
    ("cut_off_share", "share of its views that the photo's frame cuts"),
    ("distance", "distance of its cameras over the object's half size"),
)


def _capture_figures(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    out = []
    for name, what in _CAPTURE_FIGURES:
        found = [float(record[name]) for record in records if isinstance(record.get(name), int | float)]
        if found:
            text = f"{min(found):.3g}, {statistics.median(found):.3g}, {max(found):.3g}"
            out.append((f"{what}: least, median, most", text))
    return out


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _flags(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    found = Counter(str(flag) for record in records for flag in record.get("flags", ()))
    return [(flag.replace("_", " "), f"{found[flag]} of {len(records)} samples") for flag in FLAGS if found[flag]]


def _failures(reader: VersionReader) -> Section:
    rows = open_rows(reader.store, reader.version, ["uid", "failure_kind", "message"])
    rows = rows.filter(pc.is_valid(rows["failure_kind"]))
    first = rows.slice(0, MAX_FAILURES).to_pylist()
    failed = [(row["uid"], f"{row['failure_kind']}: {row['message']}") for row in first]
    text = "" if failed else "None: every planned object became a sample."
    if rows.num_rows > MAX_FAILURES:
        text = f"The first {MAX_FAILURES} of {rows.num_rows}."
    return Section(title="Failures", text=text, table=failed)
