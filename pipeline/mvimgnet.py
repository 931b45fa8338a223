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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np

from pipeline.capture import CaptureFiles, producer  # noqa: F401 - what this module makes is called by it
from pipeline.colmap import Model
from pipeline.frames import OF_ONE_FRAME, Drops, Fault, choose_model, enough, join, pair_names, readable
from pipeline.lens import sample_view
from pipeline.looks import Bool, Look, agreement_of, check_size, each, inside_of, look_at_masks, stride_of, vote
from pipeline.masks import hook_name
from pipeline.photos import MAX_FRAME_BYTES, decode_photo, image_size
from pipeline.placing import (
    LEAST_POINTS,
    MIN_RAY_SPREAD_RAD,
    Up,
    find_up,
    growth,
    meeting_point,
    settle_sideways,
    spread,
    spread_of,
    widest_angle_deg,
    without_strays,
    world_rotation,
)
from pipeline.quality import judge, measure_sample, view_facts
from pipeline.sample import MAX_VIEWS, encode_rgba
from pipeline.spec import CaptureSpec, DatasetSpec
from pipeline.types import Asset, AssetError, Camera, FailureKind, Float64, Normalization, Sample, View, derive_seed

MIN_VIEW_AGREEMENT = 0.5
MIN_VIEW_INSIDE = 0.75
"""Least share of the object's points in a frame that its mask holds: 0.92 to 1.00 with the good masks of real captures,
0.01 to 0.75 where a segmenter lost a part of the object."""
MAX_JUMP = 3.0
"""A view whose mask is so many times larger, or smaller, than those of both its neighbours, at one distance."""
JUMP_AGREEMENT = 0.7
"""A jump is forgiven where the mask agrees with the points so well: a book seen edge on is thin indeed."""
MAX_MISS = 0.5
"""Rays through the masks' centroids must meet within this share of the object's half size."""


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
    record["frame_names"] = [readable(name) for name in names]
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

    def centres(self, looks: Sequence[Look]) -> Float64:
        """Return the camera centres of views in our world [N, 3]."""
        norm = self.normalization
        centres = np.stack([look.frame.image.centre for look in looks])
        out: Float64 = norm.scale * centres @ norm.rotation.T + norm.translation
        return out

    def camera(self, look: Look, size_px: int) -> Camera:
        """Return the camera of a view in our world."""
        pose = np.eye(4)
        pose[:3, :3] = (self.turn @ look.frame.image.rotation @ self.normalization.rotation.T).T
        pose[:3, 3] = self.centres([look])[0]
        intrinsics = look.window.turned(self.turn).intrinsics(size_px)
        return Camera(world_from_camera=pose, intrinsics=intrinsics, width=size_px, height=size_px)


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
        good = []
        for look in looks:
            overlap, inside = agreement[look.frame.name], inside_of(look, chosen, stride_of(model))
            if overlap < MIN_VIEW_AGREEMENT:
                found = f"overlap of the mask with the model's points is {overlap:.2f}"
                drops.add(look.frame.name, "mask_disagrees", found)
            elif inside < MIN_VIEW_INSIDE:
                drops.add(look.frame.name, "mask_disagrees", f"{inside:.0%} of the object's points are in the mask")
            else:
                good.append(look)
        if len(good) < len(looks):
            looks = good
            enough(len(looks), spec, drops)
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
    rays = np.stack([look.ray for look in used])
    if spread_of(rays) < MIN_RAY_SPREAD_RAD:
        message = (
            f"none of the model's {num_points} points is in the masks, and the views look the same way, so that their "
            "rays meet nowhere in particular"
        )
        raise AssetError(FailureKind.MASK_DISAGREES, message)
    centre, miss = meeting_point(centres, rays)
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
    enough(len(kept), spec, drops)
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
    order = np.argsort(model.seen_image, kind="stable")
    bounds = np.searchsorted(model.seen_image[order], np.arange(len(model.images) + 1))
    for i, image in enumerate(model.images):
        mine = order[bounds[i] : bounds[i + 1]]
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
    centres = place.centres(looks)
    distances = np.linalg.norm(centres, axis=1)
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
        "focal_share": round(float(np.mean([1 / look.window.side for look in looks])), 6),
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
            if error.kind not in OF_ONE_FRAME | {FailureKind.BAD_CAMERA}:
                raise
            return "bad_size" if error.kind == FailureKind.BAD_CAMERA else "damaged", error.message

    while True:
        centres = place.centres(looks)
        directions = centres / np.linalg.norm(centres, axis=1, keepdims=True)
        number = MAX_VIEWS if spec.capture.num_views is None else spec.capture.num_views
        chosen = [looks[i] for i in spread(directions, number)]
        todo = [look for look in chosen if look.frame.name not in done]
        if not todo:
            break
        failed = set()
        for look, result in zip(todo, each(spec, work, todo)):
            if isinstance(result[0], View):
                done[look.frame.name] = result  # type: ignore[assignment]
            else:
                drops.add(look.frame.name, *result)  # type: ignore[arg-type]
                failed.add(look.frame.name)
        looks = [look for look in looks if look.frame.name not in failed]
        enough(len(looks), spec, drops)
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
    _, width, height = image_size(data, name)
    if (width, height) == (lens.width, lens.height):
        photo = decode_photo(data, name, cutout.shrink)[0]
    else:
        check_size("frame", width, height, lens)
        shrink = 1  # of the photo's own pixels, which may be fewer than the camera's
        while 2 * shrink <= cutout.shrink * width / lens.width:
            shrink *= 2
        photo = decode_photo(data, name, shrink)[0]
        size = (-(-lens.width // cutout.shrink), -(-lens.height // cutout.shrink))
        how = cv2.INTER_AREA if size[0] < photo.shape[1] else cv2.INTER_LINEAR
        photo = np.asarray(cv2.resize(photo, size, interpolation=how), np.uint8)
    camera = place.camera(look, spec.resolution_px)
    rgba = sample_view(photo, cutout, lens, look.window.turned(place.turn), place.turn, spec.resolution_px)
    facts = view_facts(rgba, camera) | {
        "cut_off": any(look.facts.cut),
        "mask_agreement": round(place.agreement.get(name, -1.0), 6),
        "distance": round(float(np.linalg.norm(camera.world_from_camera[:3, 3])), 6),
        "focal_share": round(float(camera.intrinsics[0, 0]) / camera.width, 6),
    }
    return View(index=0, camera=camera, planes={"rgba": encode_rgba(rgba, spec.codec)}), facts
