"""Frames, poses and lenses of a capture, joined by name; and the account of every frame that gives no view."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from pipeline.capture import CaptureFiles
from pipeline.colmap import Model, RegisteredImage, read_model
from pipeline.lens import Lens
from pipeline.spec import DatasetSpec
from pipeline.types import AssetError, FailureKind

Fault = Literal[
    "no_pose", "no_frame", "no_mask", "bad_mask", "mask_disagrees", "mask_jumps", "bad_camera", "bad_size", "damaged"
]

MAX_NAMED_DROPS = 40
MAX_MODELS = 64
"""COLMAP itself makes at most 50 of a set of photos, unless told otherwise."""

OF_ONE_FRAME = frozenset(
    {
        FailureKind.NOT_FOUND, FailureKind.EMPTY_FILE, FailureKind.TRUNCATED, FailureKind.NOT_AN_ASSET,
        FailureKind.CORRUPT_FILE, FailureKind.TOO_LARGE, FailureKind.MISSING_RESOURCE, FailureKind.UNSUPPORTED_FORMAT,
        FailureKind.CHECKSUM_MISMATCH,
    }
)  # fmt: skip
"""Kinds that drop one frame. A store that cannot be reached is no fault of a frame."""


def readable(name: str) -> str:
    """Return a name as text that every JSON reader takes: bytes that are not UTF-8 as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass(slots=True)
class Drops:
    """The frames that gave no view, each with why, and what a program said of the first that it failed on."""

    reasons: dict[str, tuple[Fault, str]] = field(default_factory=dict)
    log_tail: str = ""

    def add(self, name: str, fault: Fault, message: str = "", log_tail: str = "") -> None:
        """Note a frame; the first reason stays, and the first tail."""
        self.reasons.setdefault(name, (fault, message))
        self.log_tail = self.log_tail or log_tail

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
        named = sorted((readable(name), fault) for name, (fault, _) in self.reasons.items())[:MAX_NAMED_DROPS]
        return {"dropped": dict(sorted(counts.items())), "dropped_frames": [list(pair) for pair in named]}


def enough(num_good: int, spec: DatasetSpec, drops: Drops) -> None:
    """Require `admission.min_frames` of good frames, at least one.

    Raises:
        AssetError: of the kind without whose drops there would be enough, else TOO_FEW_FRAMES.
    """
    least = max(1, spec.admission.min_frames)
    if num_good >= least:
        return
    causes: tuple[tuple[FailureKind, tuple[Fault, ...]], ...] = (
        (FailureKind.BAD_MASK, ("bad_mask", "mask_jumps")),
        (FailureKind.MASK_DISAGREES, ("mask_disagrees",)),
        (FailureKind.NO_MASK, ("no_mask",)),
        (FailureKind.BAD_CAMERA, ("bad_camera", "bad_size")),
        (FailureKind.CORRUPT_FILE, ("damaged",)),
    )
    worst = max(causes, key=lambda cause: drops.count(*cause[1]))
    kind = worst[0] if num_good + drops.count(*worst[1]) >= least else FailureKind.TOO_FEW_FRAMES
    counts = ", ".join(f"{number} {fault}" for fault, number in drops.figures()["dropped"].items())
    message = f"{num_good} good frames; {least} are required (admission.min_frames); dropped: {counts or 'none'}"
    example = drops.example(*worst[1])
    raise AssetError(kind, f"{message}; {example}" if example else message, drops.log_tail)


def choose_model(files: CaptureFiles) -> tuple[Model, dict[str, Any]]:
    """Return the readable sub-model that poses most of the frames that are there, and what was passed over.

    COLMAP numbers its models by when it began them: 0 is often not the largest. Poses of frames that are not there are
    no use, so they count only where it is a tie; then the lower name wins. One of them is held at a time, and the best.

    Raises:
        AssetError: NO_MODEL, or that of the first sub-model where none can be read; CORRUPT_MODEL for too many.
    """
    names = sorted((name for name, parts in files.models.items() if parts), key=_natural)
    if not names:
        raise AssetError(FailureKind.NO_MODEL, f"no COLMAP model beside its {len(files.frames)} frames")
    if len(names) > MAX_MODELS:
        message = f"{len(names)} models beside its frames; at most {MAX_MODELS} are allowed"
        raise AssetError(FailureKind.CORRUPT_MODEL, message)
    best: Model | None = None
    most, sizes = (-1, -1), dict[str, int]()
    errors: list[AssetError] = []
    for name in names:
        try:
            model = read_model(name, files.models[name], files.read)
        except AssetError as error:
            if error.kind not in OF_ONE_FRAME | {FailureKind.CORRUPT_MODEL, FailureKind.BAD_CAMERA}:
                raise
            errors.append(error)
            sizes[name] = -1
            continue
        sizes[name] = len(model.images)
        found = (len(pair_names(files.frames, model)), len(model.images))
        if found > most:
            best, most = model, found
    if best is None:
        kind = errors[0].kind if errors[0].kind == FailureKind.BAD_CAMERA else FailureKind.CORRUPT_MODEL
        raise AssetError(kind, errors[0].message)
    if not best.images:
        raise AssetError(FailureKind.NO_MODEL, f"the model {best.name} has registered no frame")
    return best, {"model": best.name, "model_images": len(best.images), "models": sizes}


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
