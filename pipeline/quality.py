"""What pictures and samples measure, and the admission rules on it: pure functions, numpy and OpenCV only.

    view_facts(picture)                      one row of numbers a view
    measure_sample(rows, facts of the scene) the sample's quality record: what its row and its JSON hold
    judge(record, rules)                     None, or why the sample is not let in

A record is measured once, when the pictures are made, and judged as often as wanted: by the renderer, so that a refused
sample never reaches a shard, and again where receipts are merged, so that a version obeys the rules of its own spec
although its shards were rendered under laxer ones. What was refused by the renderer has no pictures; laxer rules bring
it back by rendering it again only.

Flags are figures compared with fixed marks, for people who count and filter. Rules compare the same figures with the
spec's limits; all rules but the ones on empty pictures are off by default. A rule whose figure a record lacks (nobody
told of the materials of a capture) does not apply.

A record goes into the sample's JSON in its shard, so other figures for the same pictures are another render revision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.phash import perceptual_hash
from pipeline.sample import alpha_coverage
from pipeline.spec import AdmissionSpec
from pipeline.types import Camera, FailureKind

# Bounds of pixels in R, G, B, A for cv2.inRange: an opaque pixel's alpha is over one half.
_OPAQUE, _ANY, _CLIPPED, _BLACK = (
    np.array(bound, np.float64) for bound in ((0, 0, 0, 128), (255,) * 4, (255, 255, 255, 128), (2, 2, 2, 255))
)

ViewFacts = Mapping[str, float | bool]

Flag = Literal[
    "blank", "single_colour", "touches_border", "thin", "over_exposed", "untextured", "transparent", "partial_import"
]
FLAGS: tuple[Flag, ...] = get_args(Flag)

OBJECT_SIDE = 2.0
"""Longest side of a normalised object in world units."""

MAX_SINGLE_COLOUR_SPREAD = 0.02
"""Below this an object has one colour: 5 of 255 levels, what the blocks of a JPEG texture spread at most."""

MIN_BORDER_SHARE = 0.95
"""The recipe `lrm` comes so near that 30 to 80 % of the views of sound objects are cut; but hardly all of them."""

MAX_THIN = 0.03
"""Below this share of its size an object is a card, a pole or a wire in its thinnest view."""

MIN_OVER_EXPOSED = 0.1
"""From this mean share of burnt-out pixels on, shape is lost."""

MAX_BLACK = 0.995
"""Under the recipes' lights even soot is lighter than black; only broken normals and colours are not."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a sample is not let in: a kind, and one line with what was found, what is allowed, and which key decides."""

    kind: FailureKind
    message: str


def view_facts(rgba: NDArray[np.uint8], camera: Camera) -> dict[str, float | bool]:
    """Measure a straight RGBA picture [H, W, 4].

    Returns:
        alpha_coverage: share of the picture that is object (alpha over one half), in [0, 1].
        border_touch: whether the object reaches the picture's edge, and so is probably cut.
        clipped, black: shares of the object's pixels whose channels are all 255, or all below 3.
        colour_spread: standard deviation of the object's pixels, root mean square over the channels, in [0, 0.5].
        thickness: width of the silhouette at its thickest, as a share of the object's longest side; see `thickness`.
    """
    opaque = rgba[..., 3] > 127
    border = np.concatenate([opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1]])
    count = max(1, int(np.count_nonzero(opaque)))
    clipped, black = cv2.inRange(rgba, _CLIPPED, _ANY), cv2.inRange(rgba, _OPAQUE, _BLACK)
    return {
        "alpha_coverage": alpha_coverage([rgba]),
        "border_touch": bool(border.any()),
        "clipped": cv2.countNonZero(clipped) / count,
        "black": cv2.countNonZero(black) / count,
        "colour_spread": _spread(rgba, opaque),
        "thickness": thickness(opaque, camera),
    }


def _spread(rgba: NDArray[np.uint8], opaque: NDArray[np.bool_]) -> float:
    """Return the standard deviation of a picture's opaque pixels, root mean square over R, G, B; 1 is full scale."""
    _, deviation = cv2.meanStdDev(rgba, mask=opaque.view(np.uint8))
    return round(float(np.sqrt((deviation[:3] ** 2).mean())) / 255, 6)


def thickness(opaque: NDArray[np.bool_], camera: Camera) -> float:
    """Return the width of a silhouette [H, W] at its thickest, as a share of the object's longest side.

    That is the diameter of the largest disc inside it, at the distance of the world's origin: near 1 for a ball; the
    pole's width for a pole, seen from its end too; for a flat card 1 face on and almost 0 edge on. Never more than the
    silhouette is wide, up to 2.5 pixels less where it is round, exact for one pixel. What lies outside the picture
    counts as background, so a cut object gets a lower bound.
    """
    if not opaque.any():
        return 0.0
    # Inside a strip w pixels wide the next background pixel is (w + 1) / 2 away at most.
    left, top, width, height = cv2.boundingRect(opaque.view(np.uint8))
    padded = np.pad(opaque[top : top + height, left : left + width], 1).astype(np.uint8)
    radius = float(cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE).max())
    distance = float(np.linalg.norm(camera.world_from_camera[:3, 3]))
    pixels_per_unit = float(camera.intrinsics[0, 0]) / max(distance, 1e-9)
    return round((2 * radius - 1) / pixels_per_unit / OBJECT_SIDE, 6)


def on_white_psnr(image: NDArray[np.uint8], truth: NDArray[np.uint8]) -> tuple[float, float]:
    """Return the PSNR in dB of a straight RGBA picture [H, W, 4] against another, composited on white as in training.

    Returns:
        After averaging 2 x 2 pixels (training targets are smaller than renders), and at full resolution; at most 99.
    """
    first, second = (_on_white(one) for one in (image, truth))
    height, width = first.shape[0] // 2 * 2, first.shape[1] // 2 * 2
    difference = first - second
    blocks = difference[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    half, full = (-10 * math.log10(max(float((one**2).mean()), 10**-9.9)) for one in (blocks, difference))
    return half, full


def _on_white(rgba: NDArray[np.uint8]) -> NDArray[np.float64]:
    alpha = rgba[..., 3:] / 255
    return np.asarray(rgba[..., :3] / 255 * alpha + 1 - alpha, np.float64)


def measure_sample(
    views: Sequence[ViewFacts], scene: Mapping[str, Any], sides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the quality record of a sample: a JSON value, and a pure function of its arguments.

    Args:
        views: the facts of each view, `view_facts` and whatever else was measured; all with the same names.
        scene: what the maker of the scene tells: `untextured`, `transparent`, triangle counts, and more that is kept.
        sides: what `side_facts` measured of the object; None where there is nothing to measure.

    Returns:
        `scene`, and over the views: mean_alpha_coverage, border_touch_share, mean_clipped, mean_cropped (where views
        have `cropped`), thickness_min, thickness_median, colour_spread (the largest); of the sides: albedo_spread
        and phash; flags, a sorted list of `Flag`; views, a list of numbers for each name.
    """
    columns = {name: [view[name] for view in views] for name in views[0]}
    widths = sorted(float(x) for x in columns["thickness"])
    record: dict[str, Any] = {
        **scene,
        "mean_alpha_coverage": _mean(columns["alpha_coverage"]),
        "border_touch_share": _mean(columns["border_touch"]),
        "mean_clipped": _mean(columns["clipped"]),
        "thickness_min": widths[0],
        "thickness_median": float(np.median(widths)),
        "colour_spread": max(columns["colour_spread"]),
        "views": columns,
    }
    if "cropped" in columns:
        record["mean_cropped"] = _mean(columns["cropped"])
    record |= sides or {}
    record["flags"] = flags_of(record)
    return record


def side_facts(sides: NDArray[np.uint8]) -> dict[str, Any]:
    """Return albedo_spread and phash of an object, which take 45 ms and need none of its views.

    Args:
        sides: [4, S, S, 4] straight RGBA of the albedo from the front, right, back and top, the same cameras for every
            object and no light in it.
    """
    one_picture = sides.reshape(-1, *sides.shape[2:])
    return {"albedo_spread": _spread(one_picture, one_picture[..., 3] > 127), "phash": perceptual_hash(sides)}


def _mean(values: Sequence[float | bool]) -> float:
    return math.fsum(values) / len(values)


def flags_of(record: Mapping[str, Any]) -> list[Flag]:
    """Return the flags of a quality record, sorted.

    blank: a view shows nothing. single_colour: by the albedo where there is one, since shading spreads any colour; else
    by every picture. partial_import: fewer triangles than the file has, strays counted in. The others as named.
    """
    stray = record.get("stray")
    strays = _number(stray, "num_triangles") if isinstance(stray, Mapping) else None
    triangles, in_file = _number(record, "num_triangles"), _number(record, "num_triangles_file")
    spread = record["albedo_spread"] if "albedo_spread" in record else record["colour_spread"]
    found: dict[Flag, bool] = {
        "blank": min(record["views"]["alpha_coverage"]) == 0,
        "single_colour": spread < MAX_SINGLE_COLOUR_SPREAD,
        "touches_border": record["border_touch_share"] >= MIN_BORDER_SHARE,
        "thin": record["thickness_min"] < MAX_THIN,
        "over_exposed": record["mean_clipped"] >= MIN_OVER_EXPOSED,
        "untextured": record.get("untextured") is True,
        "transparent": record.get("transparent") is True,
        "partial_import": triangles is not None and in_file is not None and triangles + (strays or 0) < in_file,
    }
    return sorted(flag for flag, holds in found.items() if holds)


def judge(record: Mapping[str, Any], rules: AdmissionSpec) -> Refusal | None:
    """Return why a sample with this quality record is not let in, or None; the first rule that it breaks decides."""
    return _judge_blank(record, rules) or _judge_figures(record, rules) or _judge_flags(record, rules)


def _judge_blank(record: Mapping[str, Any], rules: AdmissionSpec) -> Refusal | None:
    coverage = _number(record, "mean_alpha_coverage")
    if coverage is not None and coverage < rules.min_alpha_coverage:
        return Refusal(
            FailureKind.BLANK_IMAGE,
            f"the object covers {coverage:.2e} of its pictures; {rules.min_alpha_coverage:g} is required "
            "(admission.min_alpha_coverage)",
        )
    views = record.get("views")
    if not (isinstance(views, Mapping) and "black" in views and "alpha_coverage" in views):
        return None
    black = [share for share, covered in zip(views["black"], views["alpha_coverage"], strict=True) if covered > 0]
    if black and min(black) > MAX_BLACK:
        return Refusal(
            FailureKind.BLANK_IMAGE,
            f"more than {MAX_BLACK:.1%} of the object is black in every picture; its normals may be broken",
        )
    return None


@dataclass(frozen=True, slots=True)
class _Limit:
    """A rule on one figure of a record: `key` is its limit in the spec, a maximum if `sign` is 1, a minimum if -1."""

    figure: str
    key: str
    sign: Literal[1, -1]
    kind: FailureKind
    what: str


_LIMITS = (
    _Limit("mean_cropped", "max_cropped", 1, FailureKind.CROPPED, "the mean share of the object outside its pictures"),
    _Limit("border_touch_share", "max_border_touch", 1, FailureKind.CROPPED, "the share of views that cut the object"),
    _Limit("mean_clipped", "max_clipped", 1, FailureKind.OVER_EXPOSED, "the mean burnt-out share of the object"),
    _Limit("thickness_min", "min_thickness", -1, FailureKind.THIN, "its thickness over its size in the thinnest view"),
    _Limit(
        "thickness_median", "min_median_thickness", -1, FailureKind.THIN, "its median thickness over its size, by view"
    ),
    # These six are of captures only; a rendered sample's record lacks their figures.
    _Limit("num_good_frames", "min_frames", -1, FailureKind.TOO_FEW_FRAMES, "the number of good frames"),
    _Limit("registered_share", "min_registered_share", -1, FailureKind.POOR_MODEL, "the share of frames with a pose"),
    _Limit("reprojection_px", "max_reprojection_px", 1, FailureKind.POOR_MODEL, "the mean reprojection error (px)"),
    _Limit("sweep_deg", "min_sweep_deg", -1, FailureKind.NARROW_SWEEP, "the widest angle between views in degrees"),
    _Limit(
        "mask_agreement", "min_mask_agreement", -1, FailureKind.MASK_DISAGREES, "the masks' overlap with the points"
    ),
    _Limit("cut_off_share", "max_cut_off", 1, FailureKind.CUT_OFF, "the share of views that their frame cuts"),
)

_FLAG_RULES: tuple[tuple[Flag, str, FailureKind, str], ...] = (
    ("single_colour", "admit_single_colour", FailureKind.SINGLE_COLOUR, "the object has one colour only"),
    ("untextured", "admit_untextured", FailureKind.UNTEXTURED, "no image and no vertex colour is on the object"),
    ("transparent", "admit_transparent", FailureKind.TRANSPARENT, "light passes a surface of the object"),
)


def _judge_figures(record: Mapping[str, Any], rules: AdmissionSpec) -> Refusal | None:
    for limit in _LIMITS:
        found, allowed = _number(record, limit.figure), float(getattr(rules, limit.key))
        if found is not None and limit.sign * (found - allowed) > 0:
            demand = f"at most {allowed:g} is allowed" if limit.sign == 1 else f"at least {allowed:g} is required"
            return Refusal(limit.kind, f"{limit.what} is {found:.4g}; {demand} (admission.{limit.key})")
    return None


def _judge_flags(record: Mapping[str, Any], rules: AdmissionSpec) -> Refusal | None:
    flags = record.get("flags")
    for flag, key, kind, what in _FLAG_RULES:
        if isinstance(flags, list) and flag in flags and not getattr(rules, key):
            name = "albedo_spread" if "albedo_spread" in record else "colour_spread"
            figure = f" ({name} {record[name]:.4f} of {MAX_SINGLE_COLOUR_SPREAD:g})" if flag == "single_colour" else ""
            return Refusal(kind, f"{what}{figure}; such objects are not admitted (admission.{key})")
    return None


def _number(record: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a record, None where it is absent or no number: parts of it come from the child."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
