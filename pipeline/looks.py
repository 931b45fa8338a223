"""One pass over a capture's masks: each is decoded once, judged, and keeps only what is needed of it.

Kept are the hull, the cut-out at the resolution that its view needs, and which of the model's points lie in it: 0.4 MB
a frame instead of the 2 MB of a mask of 1080 x 1920, whatever the capture's length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.capture import CaptureFiles
from pipeline.colmap import Model
from pipeline.frames import OF_ONE_FRAME, Drops, Fault, Frame, enough
from pipeline.lens import Cutout, Lens, Window, shrink_of
from pipeline.masks import MaskFacts, clean, hook_mask
from pipeline.photos import MAX_FRAME_BYTES, decode_mask
from pipeline.placing import LEAST_POINTS, Votes
from pipeline.spec import CaptureSpec, DatasetSpec
from pipeline.types import AssetError, FailureKind, Float64

UInt8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]
T = TypeVar("T")
R = TypeVar("R")

MAX_VOTERS = 60_000
"""Points of a model that are projected into every frame; a larger model is thinned."""
MAX_FACTOR = 8
"""A picture so many times larger or smaller than its camera is none of its: 240 px of 1920 would show nothing."""


def each(spec: DatasetSpec, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return work(item) of all items, by `workers.num_cpus` threads, in order; one CPU means no thread."""
    threads = min(int(spec.workers.num_cpus), len(items))
    if threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads, thread_name_prefix="capture") as pool:
        return list(pool.map(work, items))


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
        seen: of every `stride_of`-th point [V], whether its projection falls into the frame.
        seen_in: [V] and into the mask.
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

    def look(frame: Frame) -> Look | tuple[Fault, str, str]:
        try:
            return _look(files, model, frame, observed[frame.index], spec.capture)
        except AssetError as error:
            if error.kind not in OF_ONE_FRAME | {FailureKind.NO_MASK, FailureKind.BAD_MASK, FailureKind.BAD_CAMERA}:
                raise
            named: dict[FailureKind, Fault] = {FailureKind.NO_MASK: "no_mask", FailureKind.BAD_CAMERA: "bad_size"}
            said = error.log_tail.strip().rpartition("\n")[2][-200:]
            return named.get(error.kind, "bad_mask"), error.message + (f": {said}" if said else ""), error.log_tail

    looks = []
    for frame, found in zip(masked, each(spec, look, masked)):
        if isinstance(found, Look):
            looks.append(found)
        else:
            drops.add(frame.name, *found)
    enough(len(looks), spec, drops)
    return looks


def _look(files: CaptureFiles, model: Model, frame: Frame, observed: NDArray[np.int64], spec: CaptureSpec) -> Look:
    lens, image = frame.lens, frame.image
    binary, facts = clean(_mask(files, frame, spec), spec.mask_threshold)
    if facts.fault is not None:
        raise AssetError(FailureKind.BAD_MASK, facts.fault)
    hull = lens.plane(facts.hull)
    ray = image.rotation.T @ np.append(lens.plane(facts.centroid[None])[0], 1.0)
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
        data = files.read(member, MAX_FRAME_BYTES)
        mask = decode_mask(data, frame.name, lambda width, height: check_size("mask", width, height, frame.lens))
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
    """Require a picture of the camera's shape: it may be smaller or larger, by one factor of up to MAX_FACTOR.

    A size with its sides swapped was turned after COLMAP saw it, and nothing tells which way.

    Raises:
        AssetError: BAD_CAMERA.
    """
    alike = abs(width * lens.height - height * lens.width) <= max(width, height, lens.width, lens.height)
    if alike and max(width / lens.width, lens.width / width) <= MAX_FACTOR:
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
    edge = lens.edge
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
    edge = frame.lens.edge.reshape(-1, 2)
    near = front & (plane >= edge.min(axis=0)).all(axis=1) & (plane <= edge.max(axis=0)).all(axis=1)
    out = np.full((len(points), 2), np.nan)
    if near.any():
        pixels = frame.lens.pixels(plane[near])
        inside = (pixels >= 0).all(axis=1) & (pixels < (frame.lens.width, frame.lens.height)).all(axis=1)
        out[near] = np.where(inside[:, None], pixels, np.nan)
    return out


def stride_of(model: Model) -> int:
    """Return how many points of a model stand for one that is projected: what is kept of a frame stays bounded."""
    return -(-len(model.points) // MAX_VOTERS) or 1


def _projected(model: Model, frame: Frame, binary: UInt8) -> tuple[Bool, Bool]:
    """Return which of every `stride_of`-th point fall into a frame [V], and which of them into its mask [V]."""
    pixels = project(model.points[:: stride_of(model)], frame)
    visible = np.isfinite(pixels[:, 0])
    return visible, _inside(binary, np.where(visible[:, None], pixels, -1))


def vote(model: Model, looks: Sequence[Look]) -> Bool:
    """Return which of the model's points [P] are the object's, by the masks of these views."""
    votes, stride = Votes.none(len(model.points)), stride_of(model)
    for look in looks:
        votes.observed += np.bincount(look.points, minlength=len(model.points))
        votes.observed_in += np.bincount(look.points[look.points_in], minlength=len(model.points))
        votes.seen[::stride] += look.seen
        votes.seen_in[::stride] += look.seen_in
    return votes.of_object()


def inside_of(look: Look, chosen: Bool, stride: int) -> float:
    """Return the share of the object's points [P] in a frame that lie in its mask; 1 where there are too few to tell.

    Its points lie in its outline whether they are seen or hidden: a hole, or a part that is missing, shows here and
    not in boxes.
    """
    seen = look.seen & chosen[::stride]
    number = int(seen.sum())
    return float((look.seen_in & seen).sum()) / number if number >= LEAST_POINTS else 1.0


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
