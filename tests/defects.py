"""Made captures, each with one defect that real archives have, and what must become of it; `tests/CAPTURES.md`.

    python -m tests.defects FOLDER       writes them all as MVImgNet lies on disk, to run `make check-captures` over

Class labels count the defects; what is said of each is checked by `tests/pipeline/test_defects.py`.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pycolmap
from PIL import Image

from tests.captures import Capture, bomb, jpeg, make_capture, mvimgnet_members, picture, png

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH, HEIGHT, NUM_FRAMES = 180, 320, 12
Layout = Literal["1.0", "2.0", "bg_removed"]


@dataclass(frozen=True, kw_only=True)
class Defect:
    """One capture.

    Attributes:
        kind: of the failure, "accepted" if it must give a sample.
        dropped: frames by reason, of an accepted one.
        says: figures of the record, or what they must meet, of an accepted one; of a failure, part of its message
            under "message".
        zip_name: which archive it lies in.
        listed: its lines in the list of what to leave out.
    """

    capture: Capture
    kind: str = "accepted"
    dropped: Mapping[str, int] = field(default_factory=dict)
    says: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = "1.0"
    zip_name: str = "mvi_00.zip"
    listed: str | None = None


def small(**options: Any) -> Capture:
    """A capture of a second in the making."""
    return make_capture(**({"num_frames": NUM_FRAMES, "width": WIDTH, "height": HEIGHT, "samples": 1} | options))


def grey(data: bytes) -> Array:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE))


def with_masks(base: Capture, change: Callable[[int, Array], Array | None]) -> Capture:
    """Masks as `change` makes them of (place, mask); None leaves one as it is."""
    masks = dict(base.masks)
    for i, (name, data) in enumerate(base.masks.items()):
        changed = change(i, grey(data))
        if changed is not None:
            masks[name] = png(changed)
    return replace(base, masks=masks)


def with_frames(base: Capture, change: Callable[[Array], Array]) -> Capture:
    return replace(base, frames={name: jpeg(change(picture(data)), 97) for name, data in base.frames.items()})


def with_model(base: Capture, **parts: bytes) -> Capture:
    return replace(base, models={"0": base.models["0"] | {f"{name}.bin": data for name, data in parts.items()}})


def _opened(base: Capture) -> pycolmap.Reconstruction:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in base.models["0"].items():
            (Path(folder) / name).write_bytes(data)
        return pycolmap.Reconstruction(folder)


def _written(rec: pycolmap.Reconstruction) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        rec.write_binary(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def fewer(base: Capture, count: int) -> dict[str, bytes]:
    """Files of the model with the first `count` frames alone, as pycolmap writes them."""
    rec = _opened(base)
    for image in list(rec.images.values()):
        if image.name not in list(base.poses)[:count]:
            rec.deregister_frame(image.frame_id)
    return _written(rec)


def with_lens(base: Capture, model: str, params: list[float], width: int = WIDTH, height: int = HEIGHT) -> Capture:
    """The model with other intrinsics, written by pycolmap."""
    rec = pycolmap.Reconstruction()
    rec.add_camera_with_trivial_rig(
        pycolmap.Camera(camera_id=1, model=model, width=width, height=height, params=params)
    )
    return with_model(base, cameras=_written(rec)["cameras.bin"])


def holed(mask: Array) -> Array:
    """A mask whose inner part is missing: its box still looks right."""
    x, y, w, h = cv2.boundingRect(mask)
    out = mask.copy()
    out[y + h // 5 : y + h - h // 5, x + w // 5 : x + w - w // 5] = 0
    return out


def elsewhere(place: int, mask: Array) -> Array:
    """A mask of something else, now above, now below."""
    return np.roll(mask, (-1) ** place * HEIGHT // 3, axis=0)


def thin(mask: Array) -> Array:
    """An edge of the object alone, as tall as it is."""
    x, y, w, h = cv2.boundingRect(mask)
    out = np.zeros_like(mask)
    out[y : y + h, x : x + w // 8] = 255
    return out


def striped(mask: Array) -> Array:
    """A mask in shreds."""
    out = mask.copy()
    for row in range(0, HEIGHT, 24):
        out[row : row + 9] = 0
    return out


def zeroed(data: bytes) -> bytes:
    """A file whose middle never came: 400 zeros."""
    at = len(data) // 2
    return data[:at] + bytes(400) + data[at + 400 :]


def with_exif_turn(data: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    return data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]


def defects() -> Iterator[tuple[str, Defect]]:
    """(name, capture) of every defect; the first has none."""
    base = small()
    names = list(base.frames)
    yield "none", Defect(capture=base, says={"num_good_frames": 12, "registered_share": 1.0, "up_quality": "good"})
    yield from _of_models(base, names)
    yield from _of_names(base, names)
    yield from _of_masks(base)
    yield from _of_pictures(base, names)
    yield "a sequence that somebody listed as bad", Defect(capture=base, kind="excluded", listed="{uid}")
    yield "a sub-model that somebody listed as bad", Defect(capture=base, kind="excluded", listed="{uid}-0")
    narrow = small(sweep_deg=55.0)
    yield "a narrow sweep", Defect(capture=narrow, says={"sweep_deg": lambda angle: 40 < angle < 84})
    yield "a copy in the archives by category", Defect(capture=base, says={"num_good_frames": 12}, zip_name="both")


def _of_models(base: Capture, names: list[str]) -> Iterator[tuple[str, Defect]]:
    model = base.models["0"]
    yield "no sparse", Defect(capture=replace(base, models={}), kind="no_model")
    partial = {name: data for name, data in model.items() if name != "images.bin"}
    yield (
        "a model without images.bin",
        Defect(
            capture=replace(base, models={"0": partial}), kind="corrupt_model", says={"message": "images.bin missing"}
        ),
    )
    yield (
        "a model cut by a stopped download",
        Defect(
            capture=with_model(base, images=model["images.bin"][: len(model["images.bin"]) * 2 // 3]),
            kind="corrupt_model",
        ),
    )
    yield (
        "several models, 0 not the largest",
        Defect(
            capture=replace(base, models={"0": fewer(base, 3), "1": model}),
            says={"model": "1", "models": {"0": 3, "1": 12}},
        ),
    )
    yield "a hundred models", Defect(
        capture=replace(base, models={str(i): model for i in range(100)}), kind="corrupt_model",
        says={"message": "100 models"},
    )  # fmt: skip
    yield (
        "frames without a pose",
        Defect(
            capture=replace(base, models={"0": fewer(base, 9)}), dropped={"no_pose": 3}, says={"registered_share": 0.75}
        ),
    )
    yield "an absurd focal length", Defect(
        capture=with_lens(base, "SIMPLE_RADIAL", [38530 / 1920 * HEIGHT, WIDTH / 2, HEIGHT / 2, 0.0]),
        kind="bad_camera", says={"message": "focal length"},
    )  # fmt: skip
    yield "an absurd distortion", Defect(
        capture=with_lens(base, "RADIAL", [1.1 * HEIGHT, WIDTH / 2, HEIGHT / 2, 1.25, -5.9]),
        kind="bad_camera", says={"message": "distortion"},
    )  # fmt: skip
    rec = _opened(base)
    for point in rec.points3D.values():
        point.error = -1.0
    yield (
        "points without an error",
        Defect(capture=replace(base, models={"0": _written(rec)}), says={"reprojection_px": lambda px: 0 <= px < 0.5}),
    )
    yield "a camera of 4 gigapixels", Defect(
        capture=with_lens(base, "PINHOLE", [7e4, 7e4, 18432, 32768], 36864, 65536),
        kind="bad_camera", says={"message": "pixels are allowed"},
    )  # fmt: skip


def _of_names(base: Capture, names: list[str]) -> Iterator[tuple[str, Defect]]:
    kept = {name: data for i, (name, data) in enumerate(base.frames.items()) if i % 3}
    yield "a third of the frames missing", Defect(capture=replace(base, frames=kept), dropped={"no_frame": 4})
    few = {name: base.frames[name] for name in names[:5]}
    yield "most frames missing", Defect(capture=replace(base, frames=few), kind="too_few_frames")
    # 152/1b016bf0: 22 images that start at 010, 31 masks that start elsewhere.
    others = {f"{i:03d}.jpg": png(np.full((HEIGHT, WIDTH), 255, np.uint8)) for i in range(40, 49)}
    late = {name: base.frames[name] for name in names[2:]}
    yield (
        "more masks than frames, of other indices",
        Defect(capture=replace(base, frames=late, masks=base.masks | others), dropped={"no_frame": 2}),
    )
    yield "cut-outs beside the frames", Defect(capture=base, layout="bg_removed", says={"num_frames": 12})
    yield "masks of 2.0", Defect(capture=base, layout="2.0", says={"num_frames": 12})


def _of_masks(base: Capture) -> Iterator[tuple[str, Defect]]:
    yield "no masks", Defect(capture=replace(base, masks={}), kind="no_mask")
    some = {name: data for i, (name, data) in enumerate(base.masks.items()) if i < 9}
    yield "masks of some frames", Defect(capture=replace(base, masks=some), dropped={"no_mask": 3})
    yield (
        "masks with holes",
        Defect(
            capture=with_masks(base, lambda i, mask: holed(mask) if i in (3, 8) else None),
            dropped={"mask_disagrees": 2},
        ),
    )
    yield "fuzzy masks", Defect(capture=with_masks(base, lambda _, mask: cv2.GaussianBlur(mask, (0, 0), 4)))
    yield (
        "empty and full masks",
        Defect(
            capture=with_masks(base, lambda i, mask: {2: 0 * mask, 5: 0 * mask + 255}.get(i)), dropped={"bad_mask": 2}
        ),
    )
    yield "masks in shreds", Defect(capture=with_masks(base, lambda _, mask: striped(mask)), kind="bad_mask")
    yield "masks of the wrong object", Defect(capture=with_masks(base, elsewhere), kind="mask_disagrees")
    yield (
        "one mask of the wrong object",
        Defect(
            capture=with_masks(base, lambda i, mask: elsewhere(0, mask) if i == 6 else None),
            dropped={"mask_disagrees": 1},
        ),
    )
    yield (
        "a mask that jumps",
        Defect(capture=with_masks(base, lambda i, mask: thin(mask) if i == 6 else None), dropped={"mask_disagrees": 1}),
    )
    yield (
        "an object cut by its frames",
        Defect(capture=small(distance=3.2), says={"cut_off_share": lambda share: share > 0.5}),
    )
    yield (
        "masks of half the size",
        Defect(capture=with_masks(base, lambda _, mask: cv2.resize(mask, (WIDTH // 2, HEIGHT // 2)))),
    )
    yield (
        "a bomb among the masks",
        Defect(capture=replace(base, masks=base.masks | {list(base.masks)[4]: bomb()}), dropped={"bad_mask": 1}),
    )


def _of_pictures(base: Capture, names: list[str]) -> Iterator[tuple[str, Defect]]:
    yield (
        "stored sideways",
        Defect(capture=small(sideways=1, width=HEIGHT, height=WIDTH), says={"sideways": True, "up_quality": "good"}),
    )
    turned = {name: with_exif_turn(data) for name, data in base.frames.items()}
    yield "an EXIF orientation", Defect(capture=replace(base, frames=turned))
    yield (
        "frames turned after COLMAP saw them",
        Defect(capture=with_frames(base, np.rot90), kind="bad_camera", says={"message": "turned"}),
    )
    yield (
        "frames of half the camera's size",
        Defect(capture=with_frames(base, lambda x: cv2.resize(x, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))),
    )
    yield (
        "frames of another shape than the camera's",
        Defect(capture=with_frames(base, lambda x: x[: HEIGHT - 40]), kind="bad_camera", says={"message": "320"}),
    )
    broken = {names[1]: base.frames[names[1]][:3000], names[4]: zeroed(base.frames[names[4]]), names[8]: b"<html>no"}
    yield (
        "frames cut, zeroed within, and no pictures",
        Defect(capture=replace(base, frames=base.frames | broken), dropped={"damaged": 3}),
    )


def write_all(root: Path) -> dict[str, tuple[str, Defect]]:
    """Write every defect into zips below root, masks of 1.0 into root / "mask"; returns (name, defect) by uid."""
    out: dict[str, tuple[str, Defect]] = {}
    root.mkdir(parents=True, exist_ok=True)
    (root / "mask").mkdir(exist_ok=True)
    opened: dict[Path, zipfile.ZipFile] = {}
    lines = []
    for label, (name, defect) in enumerate(defects()):
        uid = f"{label}/{label:08x}"
        out[f"mvimgnet-{uid.replace('/', '-')}"] = (name, defect)
        if defect.listed is not None:
            lines.append(defect.listed.format(uid=uid))
        for zip_name in ("mvi_00.zip", f"by_category_{label}.zip") if defect.zip_name == "both" else (defect.zip_name,):
            for path, data in mvimgnet_members(defect.capture, defect.layout, *uid.split("/")):
                inner = path.removeprefix("mask/")
                archive = (root if inner == path else root / "mask") / zip_name
                if archive not in opened:
                    opened[archive] = zipfile.ZipFile(archive, "w")
                opened[archive].writestr(inner, data)
    for archive in opened.values():
        archive.close()
    (root / "bad.txt").write_text("\n".join(lines) + "\n")
    return out


if __name__ == "__main__":
    for written, (what, one) in write_all(Path(sys.argv[1])).items():
        print(f"{written}: {what}: {one.kind}")
