"""Which files of a capture are frames, masks and models: told by their names alone, and joined by name.

    images/NNN.jpg                       frames; NNN_bg_removed.png beside them is a mask (RGBA, alpha), never a frame
    sparse/N/*.bin, sparse/*.bin         COLMAP models; also colmap/sparse, distorted/sparse, or beside the frames
    masks/X.jpg.png, X.png, X_mask.*     masks of X.jpg, in a folder mask or masks, or in a tree of their own

Never by sorted order: folders hold 22 images and 31 masks, or start at 010 (MVImgNet 152/1b016bf0).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
REMOVED = "_bg_removed"
MODEL_FOLDERS = ("sparse", "colmap/sparse", "distorted/sparse")
MODEL_FILES = frozenset(f"{stem}.{end}" for stem in ("cameras", "images", "points3D") for end in ("bin", "txt"))
_IMAGE_FOLDERS = ("images", "colmap/images")
_MASK_FOLDERS = ("masks", "mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Names sorted into kinds, as `CaptureFiles` wants them; members are the names that were given.

    Attributes:
        mask_ranks: how good the naming of each frame's mask is; less is better, the mask of the least rank stays.
    """

    frames: dict[str, str] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    mask_ranks: dict[str, int] = field(default_factory=dict)


def arrange(names: Iterable[str], mask_names: Iterable[tuple[str, str]] = ()) -> Layout:
    """Sort a capture's files, given relative to its folder, into frames, masks and models.

    Args:
        names: of the capture's own files.
        mask_names: (name relative to the capture's folder in a tree of masks, member) of the files of that tree.

    Returns:
        What was found; a pure function of the sets given. Files of no kind are left out.
    """
    ordered = sorted(set(names))
    images = _image_folder(ordered)
    layout = Layout()
    masks: list[tuple[int, str, str]] = []
    for name in ordered:
        model = _model_of(name)
        if model is not None:
            layout.models.setdefault(model, {})[name.rpartition("/")[2]] = name
        elif (inside := _inside(name, _MASK_FOLDERS)) is not None:
            masks.append((1, inside, name))
        elif _is_image(name) and (inside := _inside(name, (images,) if images else ("",))) is not None:
            stem, _, _ = inside.rpartition(".")
            if stem.endswith(REMOVED):
                masks.append((2, inside, name))
            else:
                layout.frames[inside] = name
    for name, member in sorted(mask_names):
        inside = _inside(name, (*_MASK_FOLDERS, *_IMAGE_FOLDERS))
        masks.append((0, name if inside is None else inside, member))
    _drop_distorted(layout, images)
    _join_masks(layout, masks)
    _add_model_names(layout)
    return layout


def _drop_distorted(layout: Layout, images: str) -> None:
    """Leave out models of the photos before they were undistorted, where the frames are those after.

    Trainers of splats keep both: input/ with distorted/sparse/0, and images/ with sparse/0, under the same names.
    """
    distorted = [folder for folder in layout.models if folder.startswith("distorted/")]
    if images and len(distorted) < len(layout.models):
        for folder in distorted:
            del layout.models[folder]


def mask_targets(name: str) -> list[str]:
    """Return what frame a mask's name may speak of, best first: whole names ("000.jpg"), then stems ("000")."""
    stem, _, _ = name.rpartition(".")
    found = [name, stem]
    for ending in ("_mask", REMOVED, ".mask"):
        if stem.lower().endswith(ending):
            cut = stem[: -len(ending)]
            found += [cut]
    return found


def _join_masks(layout: Layout, masks: list[tuple[int, str, str]]) -> None:
    stems: dict[str, list[str]] = {}
    for frame in layout.frames:
        stems.setdefault(frame.rpartition(".")[0], []).append(frame)
    for place, name, member in masks:
        if not _is_image(name):
            continue
        frame = _frame_of(name, layout.frames, stems)
        if frame not in layout.masks or place < layout.mask_ranks[frame]:
            layout.masks[frame], layout.mask_ranks[frame] = member, place


def _frame_of(name: str, frames: dict[str, str], stems: dict[str, list[str]]) -> str:
    """Return the frame that a mask belongs to; one that is not there gets the name that it would have."""
    targets = mask_targets(name)
    for target in targets[1:]:  # X.jpg.png names X.jpg
        if target in frames:
            return target
    for target in targets[1:]:
        if len(stems.get(target, ())) == 1:
            return stems[target][0]
    last = targets[-1]
    return last if _is_image(last) else f"{last}.jpg"


def _image_folder(names: list[str]) -> str:
    """Return the folder of the frames: images/ where there is one, else "" for the capture's own folder."""
    for folder in _IMAGE_FOLDERS:
        if any(name.startswith(f"{folder}/") for name in names):
            return folder
    return ""


def _model_of(name: str) -> str | None:
    """Return the folder of the model that a file belongs to, or None where it belongs to none."""
    folder, _, file = name.rpartition("/")
    for root in MODEL_FOLDERS:
        if folder == root or (folder.startswith(f"{root}/") and "/" not in folder[len(root) + 1 :]):
            return folder
    return folder if file in MODEL_FILES else None


def _add_model_names(layout: Layout) -> None:
    """Name models by the last part of their folder where that tells them apart: sparse/0 becomes 0."""
    folders = sorted(layout.models)
    short = [folder.rpartition("/")[2] or "." for folder in folders]
    if len(set(short)) == len(short):
        named = {name: layout.models[folder] for name, folder in zip(short, folders, strict=True)}
        layout.models.clear()
        layout.models.update(named)


def _inside(name: str, folders: Iterable[str]) -> str | None:
    """Return a name relative to the first of these folders that holds it, or None."""
    for folder in folders:
        if not folder or name.startswith(f"{folder}/"):
            return name[len(folder) + 1 :] if folder else name
    return None


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS) and not name.rpartition("/")[2].startswith(".")
