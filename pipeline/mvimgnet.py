"""A capture to a Sample: model, frames and masks joined by name, the object placed, every view resampled once.

    model    the readable sub-model with the most frames that are there; every registered pose tells what is up
    masks    one pass: each is decoded once, judged, lets the model's points vote, and keeps only its cut-out
    place    up, centre and size (`pipeline.placing`); views whose mask disagrees with the points, or jumps, are dropped
    pixels   one pass: each chosen photo is decoded once, resampled once (`pipeline.lens`) and encoded

A capture holds `workers.num_cpus` decoded photos at most, whatever its length. With one CPU a task everything runs in
the caller's thread: one process a core is the better use of a machine, as captures do not wait for each other. More
CPUs a task become threads over the frames; OpenCV and the encoder release the GIL.

What is wrong with one frame drops that frame and is counted; what is wrong with the capture is an AssetError. Rules on
what was measured are the spec's (`[admission]`), judged before the photos are touched and again where receipts merge.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import pycolmap
from numpy.typing import NDArray

from pipeline.capture import CaptureFiles
from pipeline.colmap import Model, RegisteredImage, read_model
from pipeline.lens import Cutout, Lens, Window, sample_view, shrink_of
from pipeline.masks import MaskFacts, clean, hook_mask, hook_name
from pipeline.photos import MAX_FRAME_BYTES, decode_mask, decode_photo
from pipeline.placing import (
    LEAST_POINTS,
    Up,
    Votes,
    find_up,
    growth,
    meeting_point,
    settle_sideways,
    spread,
    widest_angle_deg,
    without_strays,
    world_rotation,
)
from pipeline.quality import judge, measure_sample, view_facts
from pipeline.sample import encode_rgba
from pipeline.spec import CaptureSpec, DatasetSpec
from pipeline.types import (
    Asset,
    AssetError,
    Camera,
    FailureKind,
    Float64,
    Normalization,
    Sample,
    View,
    derive_seed,
)

UInt8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]
T = TypeVar("T")
R = TypeVar("R")

CAPTURE_REVISION = 1
"""Raise it when code changes what a capture's pixels, cameras or figures become."""

Fault = Literal[
    "no_pose", "no_frame", "no_mask", "bad_mask", "mask_disagrees", "mask_jumps", "bad_camera", "bad_size", "damaged"
]

MAX_VOTERS = 60_000
MIN_VIEW_AGREEMENT = 0.5
MAX_JUMP = 3.0
"""A view whose mask is so many times larger, or smaller, than those of both its neighbours, at one distance."""
JUMP_AGREEMENT = 0.7
"""A jump is forgiven where the mask agrees with the points so well: a book seen edge on is thin indeed."""
MAX_MISS = 0.5
"""Rays through the masks' centroids must meet within this share of the object's half size."""
MAX_NAMED_DROPS = 40


def producer() -> str:
    """Return the name and versions that decide a capture's pixels."""
    return f"captures revision {CAPTURE_REVISION}, OpenCV {cv2.__version__}, pycolmap {pycolmap.__version__}"


def ingest(files: CaptureFiles, asset: Asset, spec: DatasetSpec, fingerprint: str) -> Sample:
    """Make the Sample of one capture; its provenance is left to the caller.

    Raises:
        AssetError: saying why there is none.
        UserError: where the mask hook of the spec cannot be run.
    """
    model, notes = choose_model(files)
    drops = Drops()
    frames = join(files, model, drops)
    looks = look_at_masks(files, model, frames, spec, drops)
    place, looks = place_object(model, looks, spec, drops)
    record = notes | measure_capture(files, model, place, looks, spec, drops)
    _require(record, spec)
    views, facts, names = make_views(files, place, looks, spec, drops)
    record["frame_names"] = [_readable(name) for name in names]
    record |= drops.figures()
    quality = measure_sample(facts, record)
    _require(quality, spec)
    return Sample(
        asset=asset,
        spec_fingerprint=fingerprint,
        seed=derive_seed("capture", asset.uid),
        normalization=place.normalization,
        views=tuple(views),
        quality=quality,
    )


def _require(record: Mapping[str, Any], spec: DatasetSpec) -> None:
    refusal = judge(record, spec.admission)
    if refusal is not None:
        raise AssetError(refusal.kind, refusal.message)


def _readable(name: str) -> str:
    """Return a name as text that every JSON reader takes: bytes that are not UTF-8 as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass(slots=True)
class Drops:
    """The frames that gave no view, each with why."""

    reasons: dict[str, tuple[Fault, str]] = field(default_factory=dict)

    def add(self, name: str, fault: Fault, message: str = "") -> None:
        """Note a frame; the first reason stays."""
        self.reasons.setdefault(name, (fault, message))

    def count(self, *faults: Fault) -> int:
        """Return how many frames were dropped for these reasons."""
        return sum(fault in faults for fault, _ in self.reasons.values())

    def example(self, *faults: Fault) -> str:
        """Return the message of the first such frame."""
        found = ((name, message) for name, (fault, message) in self.reasons.items() if fault in faults)
        return next((f"{name!a}: {message}" for name, message in found if message), "")

    def figures(self) -> dict[str, Any]:
        """Return the columns of the quality record: counts by reason, and the first names."""
        counts = Counter(fault for fault, _ in self.reasons.values())
        named = sorted((_readable(name), fault) for name, (fault, _) in self.reasons.items())[:MAX_NAMED_DROPS]
        return {"dropped": dict(sorted(counts.items())), "dropped_frames": [list(pair) for pair in named]}


def _each(spec: DatasetSpec, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    threads = min(int(spec.workers.num_cpus), len(items))
    if threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads, thread_name_prefix="capture") as pool:
        return list(pool.map(work, items))


_OF_ONE_FRAME = frozenset(
    {
        FailureKind.NOT_FOUND, FailureKind.EMPTY_FILE, FailureKind.TRUNCATED, FailureKind.NOT_AN_ASSET,
        FailureKind.CORRUPT_FILE, FailureKind.TOO_LARGE, FailureKind.MISSING_RESOURCE, FailureKind.UNSUPPORTED_FORMAT,
        FailureKind.CHECKSUM_MISMATCH,
    }
)  # fmt: skip
"""Kinds that drop one frame. A store that cannot be reached is no fault of a frame."""


def choose_model(files: CaptureFiles) -> tuple[Model, dict[str, Any]]:
    """Return the readable sub-model that poses most of the frames that are there, and what was passed over.

    COLMAP numbers its models by when it began them: 0 is often not the largest. Poses of frames that are not there are
    no use, so they count only where it is a tie; then the lower name wins.

    Raises:
        AssetError: NO_MODEL, or that of the first sub-model where none can be read.
    """
    names = sorted((name for name, parts in files.models.items() if parts), key=_natural)
    if not names:
        raise AssetError(FailureKind.NO_MODEL, f"no COLMAP model beside its {len(files.frames)} frames")
    models: list[Model] = []
    errors: list[tuple[str, AssetError]] = []
    for name in names:
        try:
            models.append(read_model(name, files.models[name], files.read))
        except AssetError as error:
            if error.kind not in _OF_ONE_FRAME | {FailureKind.CORRUPT_MODEL, FailureKind.BAD_CAMERA}:
                raise
            errors.append((name, error))
    if not models:
        first = errors[0][1]
        kind = first.kind if first.kind == FailureKind.BAD_CAMERA else FailureKind.CORRUPT_MODEL
        raise AssetError(kind, first.message)
    best = max(models, key=lambda model: (len(pair_names(files.frames, model)), len(model.images)))
    if not best.images:
        raise AssetError(FailureKind.NO_MODEL, f"the model {best.name} has registered no frame")
    return best, {
        "model": best.name,
        "model_images": len(best.images),
        "models": {model.name: len(model.images) for model in models} | {name: -1 for name, _ in errors},
    }


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name))


def pair_names(frames: Iterable[str], model: Model) -> dict[str, RegisteredImage]:
    """Return the registered image of each frame that has one, by name.

    Models that were made elsewhere hold other folders before the names; where no whole name fits, last parts do, if
    they are unique on both sides.
    """
    images = {image.name: image for image in model.images}
    paired = {name: images[name] for name in frames if name in images}
    if paired:
        return paired
    sides = [Counter(PurePosixPath(name.replace("\\", "/")).name for name in side) for side in (frames, images)]
    last = {PurePosixPath(name.replace("\\", "/")).name: image for name, image in images.items()}
    parts = {name: PurePosixPath(name.replace("\\", "/")).name for name in frames}
    return {name: last[part] for name, part in parts.items() if sides[0][part] == 1 and sides[1][part] == 1}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """A photo with its pose and lens."""

    name: str
    image: RegisteredImage
    index: int
    lens: Lens


def join(files: CaptureFiles, model: Model, drops: Drops) -> list[Frame]:
    """Return the frames that have a file, a pose and a lens that can be one, by name.

    Raises:
        AssetError: BAD_CAMERA where no lens of the model can be one; TOO_FEW_FRAMES where no frame has a pose.
    """
    paired = pair_names(files.frames, model)
    taken = {image.name for image in paired.values()}
    for image in model.images:
        if image.name not in taken:
            drops.add(image.name, "no_frame")
    for name in files.frames:
        if name not in paired:
            drops.add(name, "no_pose")
    if not paired:
        message = (
            f"none of the {len(model.images)} names of model {model.name} is one of the {len(files.frames)} frames"
        )
        raise AssetError(FailureKind.TOO_FEW_FRAMES, message)
    bad: dict[int, AssetError] = {}
    for key in sorted({image.camera_id for image in paired.values()}):
        try:
            model.lenses[key].check(str(key))
        except AssetError as error:
            bad[key] = error
    index = {image.name: i for i, image in enumerate(model.images)}
    frames = []
    for name, image in sorted(paired.items()):
        if image.camera_id in bad:
            drops.add(name, "bad_camera", bad[image.camera_id].message)
        else:
            frames.append(Frame(name=name, image=image, index=index[image.name], lens=model.lenses[image.camera_id]))
    if not frames:
        raise AssetError(FailureKind.BAD_CAMERA, next(iter(bad.values())).message)
    return frames


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Look:
    """What one mask told, in the axes of the stored camera.

    Attributes:
        frame: whose mask it is.
        facts: of the mask, its hull in pixels of the camera.
        hull: the same on the tangent plane [N, 2].
        ray: direction [3] in the model's world through the mask's centroid.
        area: of the object on the tangent plane.
        window: the square crop.
        cutout: what is kept of the mask.
        points: index [K] of the points that this frame observed, and whether each lies in the mask.
        points_in: [K].
        seen: of all points [P], whether its projection falls into the frame.
        seen_in: [P] and into the mask.
    """

    frame: Frame
    facts: MaskFacts
    hull: Float64
    ray: Float64
    area: float
    window: Window
    cutout: Cutout
    points: NDArray[np.int64]
    points_in: Bool
    seen: Bool
    seen_in: Bool


def look_at_masks(
    files: CaptureFiles, model: Model, frames: list[Frame], spec: DatasetSpec, drops: Drops
) -> list[Look]:
    """Decode and judge every mask, once; return what the good ones told.

    Raises:
        AssetError: NO_MASK, BAD_MASK, BAD_CAMERA or TOO_FEW_FRAMES where too few are left.
    """
    command = spec.capture.mask_command
    masked = [frame for frame in frames if frame.name in files.masks]
    if len(masked) < spec.admission.min_frames and command is not None:
        masked = frames
    elif not masked:
        message = f"no mask for any of its {len(frames)} posed frames; capture.mask_command can make them"
        raise AssetError(FailureKind.NO_MASK, message)
    for frame in frames:
        if frame.name not in files.masks and masked is not frames:
            drops.add(frame.name, "no_mask")
    observed: dict[int, NDArray[np.int64]] = {}
    order = np.argsort(model.seen_image, kind="stable")
    bounds = np.searchsorted(model.seen_image[order], np.arange(len(model.images) + 1))
    for frame in masked:
        observed[frame.index] = order[bounds[frame.index] : bounds[frame.index + 1]]

    def look(frame: Frame) -> Look | tuple[Fault, str]:
        try:
            return _look(files, model, frame, observed[frame.index], spec.capture)
        except AssetError as error:
            if error.kind not in _OF_ONE_FRAME | {FailureKind.NO_MASK, FailureKind.BAD_MASK, FailureKind.BAD_CAMERA}:
                raise
            named: dict[FailureKind, Fault] = {FailureKind.NO_MASK: "no_mask", FailureKind.BAD_CAMERA: "bad_size"}
            return named.get(error.kind, "bad_mask"), error.message

    looks = []
    for frame, found in zip(masked, _each(spec, look, masked)):
        if isinstance(found, Look):
            looks.append(found)
        else:
            drops.add(frame.name, *found)
    enough(looks, spec, drops)
    return looks


def enough(looks: Sequence[Look], spec: DatasetSpec, drops: Drops) -> None:
    """Require `admission.min_frames` of good frames, at least one.

    Raises:
        AssetError: of the kind without whose drops there would be enough, else TOO_FEW_FRAMES.
    """
    least = max(1, spec.admission.min_frames)
    if len(looks) >= least:
        return
    causes: tuple[tuple[FailureKind, tuple[Fault, ...]], ...] = (
        (FailureKind.BAD_MASK, ("bad_mask", "mask_jumps")),
        (FailureKind.MASK_DISAGREES, ("mask_disagrees",)),
        (FailureKind.NO_MASK, ("no_mask",)),
        (FailureKind.BAD_CAMERA, ("bad_camera", "bad_size")),
        (FailureKind.CORRUPT_FILE, ("damaged",)),
    )
    worst = max(causes, key=lambda cause: drops.count(*cause[1]))
    kind = worst[0] if len(looks) + drops.count(*worst[1]) >= least else FailureKind.TOO_FEW_FRAMES
    counts = ", ".join(f"{number} {fault}" for fault, number in drops.figures()["dropped"].items())
    message = f"{len(looks)} good frames; {least} are required (admission.min_frames); dropped: {counts or 'none'}"
    example = drops.example(*worst[1])
    raise AssetError(kind, f"{message}; {example}" if example else message)


def _look(files: CaptureFiles, model: Model, frame: Frame, observed: NDArray[np.int64], spec: CaptureSpec) -> Look:
    lens, image = frame.lens, frame.image
    binary, facts = clean(_mask(files, frame, spec), spec.mask_threshold)
    if facts.fault is not None:
        raise AssetError(FailureKind.BAD_MASK, facts.fault)
    hull = lens.plane(facts.hull)
    moments = cv2.moments(binary, binaryImage=True)
    centroid = np.array([[moments["m10"] / moments["m00"] + 0.5, moments["m01"] / moments["m00"] + 0.5]])
    ray = image.rotation.T @ np.append(lens.plane(centroid)[0], 1.0)
    window = crop_window(hull, facts.cut, lens, spec.padding)
    seen, seen_in = _projected(model, frame, binary)
    return Look(
        frame=frame,
        facts=facts,
        hull=hull,
        ray=ray / np.linalg.norm(ray),
        area=facts.area * lens.width * lens.height / lens.focal_px**2,
        window=window,
        cutout=Cutout.of(binary, shrink_of(window, lens, spec.resolution_px)),
        points=model.seen_point[observed],
        points_in=_inside(binary, model.seen_px[observed]),
        seen=seen,
        seen_in=seen_in,
    )


def _mask(files: CaptureFiles, frame: Frame, spec: CaptureSpec) -> UInt8:
    """Return a frame's mask at the resolution of its camera, 0 and 255 where it was resized."""
    member = files.masks.get(frame.name)
    if member is not None:
        mask = decode_mask(files.read(member, MAX_FRAME_BYTES), frame.name)
    elif spec.mask_command is not None:
        mask = hook_mask(spec.mask_command, files.read(files.frames[frame.name], MAX_FRAME_BYTES), frame.name)
    else:
        raise AssetError(FailureKind.NO_MASK, f"no mask for {frame.name!a}")
    height, width = mask.shape
    if (width, height) == (frame.lens.width, frame.lens.height):
        return mask
    check_size("mask", width, height, frame.lens)
    hard = np.where(mask > spec.mask_threshold, 255, 0).astype(np.uint8)
    resized = cv2.resize(hard, (frame.lens.width, frame.lens.height), interpolation=cv2.INTER_LINEAR)
    return np.where(np.asarray(resized) > 127, 255, 0).astype(np.uint8)


def check_size(what: str, width: int, height: int, lens: Lens) -> None:
    """Require a picture of the camera's shape: it may be smaller or larger, by one factor.

    A size with its sides swapped was turned after COLMAP saw it, and nothing tells which way.

    Raises:
        AssetError: BAD_CAMERA.
    """
    if abs(width * lens.height - height * lens.width) <= max(width, height, lens.width, lens.height):
        return
    turned = ", sides swapped: turned after COLMAP saw it" if (height > width) != (lens.height > lens.width) else ""
    message = f"{what} of {width} x {height} px; its camera has {lens.width} x {lens.height} px{turned}"
    raise AssetError(FailureKind.BAD_CAMERA, message)


def crop_window(hull: Float64, cut: tuple[bool, bool, bool, bool], lens: Lens, padding: float) -> Window:
    """Return the square round a mask's hull [N, 2] on the tangent plane, `padding` times its longer side.

    It may reach outside the frame on sides that do not cut the object: what lies there is background, as an object in
    one piece cannot come back. On sides that do, it ends where the frame does.
    """
    low, high = hull.min(axis=0), hull.max(axis=0)
    side = float((high - low).max()) * padding
    middle = (low + high) / 2
    edge = lens.edge()
    bounds = np.array([[-np.inf, -np.inf], [np.inf, np.inf]])
    for i, is_cut in enumerate(cut):
        if is_cut:
            end, axis = i // 2, i % 2
            bounds[end, axis] = edge[i, :, axis].max() if end == 0 else edge[i, :, axis].min()
    side = min(side, float((bounds[1] - bounds[0]).min()))
    start = np.minimum(np.maximum(middle - side / 2, bounds[0]), bounds[1] - side)
    return Window(left=float(start[0]), top=float(start[1]), side=side)


def _inside(binary: UInt8, pixels: Float64) -> Bool:
    """Return whether pixels [N, 2] lie in the frame and in its mask [H, W]."""
    height, width = binary.shape
    inside = (pixels >= 0).all(axis=1) & (pixels[:, 0] < width) & (pixels[:, 1] < height)
    out = np.zeros(len(pixels), bool)
    column, row = np.floor(pixels[inside]).astype(np.int64).T
    out[inside] = binary[row, column] > 0
    return out


def project(points: Float64, frame: Frame) -> Float64:
    """Project the model's points [N, 3] into the stored frame [N, 2]; NaN where it does not see them.

    The tangent plane is bounded by the frame's own edge first: a lens model may fold back in what lies far outside.
    """
    camera = points @ frame.image.rotation.T + frame.image.translation
    front = camera[:, 2] > 1e-9
    plane = camera[:, :2] / np.where(front, camera[:, 2], 1)[:, None]
    edge = frame.lens.edge().reshape(-1, 2)
    near = front & (plane >= edge.min(axis=0)).all(axis=1) & (plane <= edge.max(axis=0)).all(axis=1)
    out = np.full((len(points), 2), np.nan)
    if near.any():
        pixels = frame.lens.pixels(plane[near])
        inside = (pixels >= 0).all(axis=1) & (pixels < (frame.lens.width, frame.lens.height)).all(axis=1)
        out[near] = np.where(inside[:, None], pixels, np.nan)
    return out


def _projected(model: Model, frame: Frame, binary: UInt8) -> tuple[Bool, Bool]:
    """Return which of all points fall into a frame [P], and which of them into its mask [P]."""
    stride = -(-len(model.points) // MAX_VOTERS) or 1
    seen, seen_in = (np.zeros(len(model.points), bool) for _ in range(2))
    pixels = project(model.points[::stride], frame)
    visible = np.isfinite(pixels[:, 0])
    seen[::stride] = visible
    seen_in[::stride] = _inside(binary, np.where(visible[:, None], pixels, -1))
    return seen, seen_in


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """Where the object is.

    Attributes:
        normalization: from the model's world to ours.
        up: the axis, its sign decided.
        turn: [3, 3] quarter turn from the stored camera's axes to an upright one's.
        source: what the centre and size came from.
        num_points: points that the masks voted for.
        agreement: of each good view's mask with those points, by frame name; empty without points.
        grown: factor by which the box of the points was enlarged so that it covers the masks.
    """

    normalization: Normalization
    up: Up
    turn: Float64
    source: Literal["points", "mask_rays"]
    num_points: int
    agreement: Mapping[str, float]
    grown: float

    def camera(self, look: Look, size_px: int) -> Camera:
        """Return the camera of a view in our world."""
        norm, image = self.normalization, look.frame.image
        rotation = self.turn @ image.rotation @ norm.rotation.T
        centre = norm.scale * norm.rotation @ image.centre + norm.translation
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation.T, centre
        intrinsics = look.window.turned(self.turn).intrinsics(size_px)
        return Camera(world_from_camera=pose, intrinsics=intrinsics, width=size_px, height=size_px)


def vote(model: Model, looks: Sequence[Look]) -> Bool:
    """Return which of the model's points [P] are the object's, by the masks of these views."""
    votes = Votes.none(len(model.points))
    for look in looks:
        votes.observed += np.bincount(look.points, minlength=len(model.points))
        votes.observed_in += np.bincount(look.points[look.points_in], minlength=len(model.points))
        votes.seen += look.seen
        votes.seen_in += look.seen_in
    return votes.of_object()


def agreement_of(look: Look, points: Float64) -> float:
    """Return the overlap (intersection over union) of a mask's box with that of the object's projected points."""
    pixels = project(points, look.frame)
    pixels = pixels[np.isfinite(pixels[:, 0])]
    if len(pixels) < LEAST_POINTS // 2:
        return 0.0
    low, high = pixels.min(axis=0), pixels.max(axis=0)
    mask_low, mask_high = look.facts.hull.min(axis=0), look.facts.hull.max(axis=0)
    both = np.prod(np.maximum(np.minimum(high, mask_high) - np.maximum(low, mask_low), 0))
    return float(both / (np.prod(high - low) + np.prod(mask_high - mask_low) - both))


def place_object(model: Model, looks: list[Look], spec: DatasetSpec, drops: Drops) -> tuple[Place, list[Look]]:
    """Find up, centre and size; return them, and the looks whose masks agree.

    Raises:
        AssetError: MASK_DISAGREES or BAD_MASK where the masks are not of one thing in one place.
    """
    chosen = vote(model, looks)
    agreement: dict[str, float] = {}
    if chosen.sum() >= LEAST_POINTS:
        object_points = without_strays(model.points[chosen])
        agreement = {look.frame.name: agreement_of(look, object_points) for look in looks}
        median, least = float(np.median(list(agreement.values()))), spec.admission.min_mask_agreement
        if median < least:
            message = f"median overlap of the masks with the model's points is {median:.2f}; {least:g} is required"
            raise AssetError(FailureKind.MASK_DISAGREES, f"{message} (admission.min_mask_agreement)")
        good = [look for look in looks if agreement[look.frame.name] >= MIN_VIEW_AGREEMENT]
        for look in looks:
            if agreement[look.frame.name] < MIN_VIEW_AGREEMENT:
                found = f"overlap of the mask with the model's points is {agreement[look.frame.name]:.2f}"
                drops.add(look.frame.name, "mask_disagrees", found)
        if len(good) < len(looks):
            looks = good
            enough(looks, spec, drops)
            chosen = vote(model, looks)
    use_points = int(chosen.sum()) >= LEAST_POINTS
    if use_points:
        centre, half = np.median(model.points[chosen], axis=0), None
    else:
        centre, half = rays_meet(looks, int((~chosen).sum()))
    looks = _without_jumps(looks, centre, agreement, spec, drops)
    place = _settle(model, looks, chosen if use_points else None, centre, half, spec)
    return replace(place, agreement={look.frame.name: agreement[look.frame.name] for look in looks if agreement}), looks


def rays_meet(looks: Sequence[Look], num_points: int) -> tuple[Float64, float]:
    """Return the centre [3] and half size of the object by the masks alone.

    Raises:
        AssetError: MASK_DISAGREES where the rays through the masks' centroids do not meet.
    """
    whole = [look for look in looks if not any(look.facts.cut)]
    used = whole if len(whole) >= 3 else looks
    centres = np.stack([look.frame.image.centre for look in used])
    centre, miss = meeting_point(centres, np.stack([look.ray for look in used]))
    sizes = []
    for look in used:
        depth = float(look.frame.image.rotation[2] @ centre + look.frame.image.translation[2])
        sizes.append(float((look.hull.max(axis=0) - look.hull.min(axis=0)).max()) / 2 * depth)
    half = float(np.quantile(sizes, 0.95))
    if not np.isfinite(miss) or min(sizes) <= 0 or miss > MAX_MISS * half:
        message = (
            f"none of the model's {num_points} points is in the masks, and the rays through the masks' centroids miss "
            f"each other by {miss / max(half, 1e-9):.2f} of the object's half size; {MAX_MISS:g} is allowed"
        )
        raise AssetError(FailureKind.MASK_DISAGREES, message)
    return centre, half


def _without_jumps(
    looks: list[Look], centre: Float64, agreement: Mapping[str, float], spec: DatasetSpec, drops: Drops
) -> list[Look]:
    """Return the looks whose mask does not jump in size against both neighbours in time."""
    depths = [float(look.frame.image.rotation[2] @ centre + look.frame.image.translation[2]) for look in looks]
    sizes = np.log([max(look.area * depth**2, 1e-12) for look, depth in zip(looks, depths)])
    kept = []
    for i, look in enumerate(looks):
        beside = [sizes[j] for j in (i - 1, i + 1) if 0 <= j < len(looks)]
        steps = [float(sizes[i] - other) for other in beside]
        jumps = bool(steps) and (min(steps) > np.log(MAX_JUMP) or max(steps) < -np.log(MAX_JUMP))
        if jumps and agreement.get(look.frame.name, 0.0) < JUMP_AGREEMENT:
            drops.add(look.frame.name, "mask_jumps", f"the mask is {np.exp(steps[0]):.2f} times its neighbour's")
        else:
            kept.append(look)
    enough(kept, spec, drops)
    return kept


def _settle(
    model: Model, looks: Sequence[Look], chosen: Bool | None, centre: Float64, half: float | None, spec: DatasetSpec
) -> Place:
    rotations = np.stack([image.rotation for image in model.images])
    centres = np.stack([image.centre for image in model.images])
    rest = model.points if chosen is None else model.points[~chosen]
    up, turn = settle_sideways(find_up(rotations), rotations, centres, centre, rest)
    axes = world_rotation(up.axis, looks[0].frame.image.centre, centre)
    if chosen is not None:
        object_points = without_strays(model.points[chosen] @ axes.T)
        low, high = object_points.min(axis=0), object_points.max(axis=0)
        centre, half = (low + high) / 2 @ axes, float((high - low).max()) / 2
    if half is None or not np.isfinite(half) or half <= 0:
        raise AssetError(FailureKind.MASK_DISAGREES, "the object's points have no extent")
    views = [
        (look.frame.image.rotation @ axes.T, (look.frame.image.rotation @ centre + look.frame.image.translation) / half)
        for look in looks
    ]
    grown = growth([look.hull for look in looks], views)
    scale = 1 / (half * grown * spec.capture.margin)
    return Place(
        normalization=Normalization(scale=scale, rotation=axes, translation=-scale * axes @ centre),
        up=up,
        turn=turn,
        source="mask_rays" if chosen is None else "points",
        num_points=0 if chosen is None else int(chosen.sum()),
        agreement={},
        grown=grown,
    )


def reprojection_px(model: Model) -> float | None:
    """Return the mean distance in pixels between the model's observations and its projected points, by the images.

    Measured, not taken from points3D, whose `error` is -1 where another program wrote the model.
    """
    total, number = 0.0, 0
    for i, image in enumerate(model.images):
        mine = model.seen_image == i
        camera = model.points[model.seen_point[mine]] @ image.rotation.T + image.translation
        front = camera[:, 2] > 1e-9
        if front.any():
            pixels = model.lenses[image.camera_id].pixels(camera[front, :2] / camera[front, 2:])
            miss = np.linalg.norm(pixels - model.seen_px[mine][front], axis=1)
            miss = miss[np.isfinite(miss)]
            total, number = total + float(miss.sum()), number + len(miss)
    return total / number if number else None


def measure_capture(
    files: CaptureFiles, model: Model, place: Place, looks: Sequence[Look], spec: DatasetSpec, drops: Drops
) -> dict[str, Any]:
    """Return the columns of the quality record that photos are not needed for."""
    cameras = [place.camera(look, spec.capture.resolution_px) for look in looks]
    centres = np.stack([camera.world_from_camera[:3, 3] for camera in cameras])
    distances = np.linalg.norm(centres, axis=1)
    focal = [float(camera.intrinsics[0, 0]) / camera.width for camera in cameras]
    from_data = sum(look.frame.name in files.masks for look in looks)
    command = spec.capture.mask_command
    reprojection = reprojection_px(model)
    record: dict[str, Any] = {
        "num_frames": len(files.frames),
        "num_good_frames": len(looks),
        "registered_share": round(len(pair_names(files.frames, model)) / max(1, len(files.frames)), 6),
        "sweep_deg": round(widest_angle_deg(centres / distances[:, None]), 3),
        "cut_off_share": round(sum(any(look.facts.cut) for look in looks) / len(looks), 6),
        "up_quality": "good" if place.up.sure else "low",
        "up_ratio": round(place.up.ratio, 6),
        "sideways": place.up.sideways,
        "distance": round(float(distances.mean()), 6),
        "focal_share": round(float(np.mean(focal)), 6),
        "centre_from": place.source,
        "num_object_points": place.num_points,
        "box_growth": round(place.grown, 6),
        "mask_source": "dataset" if from_data else hook_name(command or ""),
        "num_hook_masks": len(looks) - from_data,
    }
    if reprojection is not None:
        record["reprojection_px"] = round(reprojection, 6)
    if place.agreement:
        record["mask_agreement"] = round(float(np.median(list(place.agreement.values()))), 6)
    return record | drops.figures()


def make_views(
    files: CaptureFiles, place: Place, looks: list[Look], spec: DatasetSpec, drops: Drops
) -> tuple[list[View], list[dict[str, float | bool]], list[str]]:
    """Resample and encode the chosen views; returns them, their facts, and their frames' names.

    A photo that turns out to be damaged is dropped, and the choice is made again among the others.

    Raises:
        AssetError: where damage leaves too few frames.
    """
    done: dict[str, tuple[View, dict[str, float | bool]]] = {}

    def work(look: Look) -> tuple[View, dict[str, float | bool]] | tuple[Fault, str]:
        try:
            return make_view(files, place, look, spec.capture)
        except AssetError as error:
            if error.kind not in _OF_ONE_FRAME | {FailureKind.BAD_CAMERA}:
                raise
            return "bad_size" if error.kind == FailureKind.BAD_CAMERA else "damaged", error.message

    while True:
        centres = np.stack([place.camera(look, 1).world_from_camera[:3, 3] for look in looks])
        directions = centres / np.linalg.norm(centres, axis=1, keepdims=True)
        number = len(looks) if spec.capture.num_views is None else spec.capture.num_views
        chosen = [looks[i] for i in spread(directions, number)]
        todo = [look for look in chosen if look.frame.name not in done]
        if not todo:
            break
        failed = set()
        for look, result in zip(todo, _each(spec, work, todo)):
            if isinstance(result[0], View):
                done[look.frame.name] = result  # type: ignore[assignment]
            else:
                drops.add(look.frame.name, *result)  # type: ignore[arg-type]
                failed.add(look.frame.name)
        looks = [look for look in looks if look.frame.name not in failed]
        enough(looks, spec, drops)
    names = [look.frame.name for look in chosen]
    views = [replace(done[name][0], index=i) for i, name in enumerate(names)]
    return views, [done[name][1] for name in names], names


def make_view(files: CaptureFiles, place: Place, look: Look, spec: CaptureSpec) -> tuple[View, dict[str, float | bool]]:
    """Decode one photo, resample it with its mask, encode it and measure it.

    Raises:
        AssetError: CORRUPT_FILE, TOO_LARGE, or BAD_CAMERA where its shape is not the camera's.
    """
    name, lens, cutout = look.frame.name, look.frame.lens, look.cutout
    data = files.read(files.frames[name], MAX_FRAME_BYTES)
    photo, width, height = decode_photo(data, name, cutout.shrink)
    if (width, height) != (lens.width, lens.height):
        check_size("frame", width, height, lens)
        size = (-(-lens.width // cutout.shrink), -(-lens.height // cutout.shrink))
        photo = np.asarray(cv2.resize(photo, size, interpolation=cv2.INTER_LINEAR), np.uint8)
    camera = place.camera(look, spec.resolution_px)
    bgra = sample_view(photo, cutout, lens, look.window.turned(place.turn), place.turn, spec.resolution_px)
    rgba = np.asarray(cv2.cvtColor(bgra, cv2.COLOR_BGRA2RGBA), np.uint8)
    facts = view_facts(rgba, camera) | {
        "cut_off": any(look.facts.cut),
        "mask_agreement": round(place.agreement.get(name, -1.0), 6),
        "distance": round(float(np.linalg.norm(camera.world_from_camera[:3, 3])), 6),
        "focal_share": round(float(camera.intrinsics[0, 0]) / camera.width, 6),
    }
    return View(index=0, camera=camera, planes={"rgba": encode_rgba(rgba, spec.codec)}), facts
