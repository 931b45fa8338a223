"""Real captures: a tankard with masks, a plush doll without, a robot that COLMAP could not place."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.capture import CaptureFiles
from pipeline.colmap import Model, read_model
from pipeline.looks import vote
from pipeline.mvimgnet import ingest
from pipeline.quality import judge
from pipeline.sample import decode_rgba
from pipeline.spec import AdmissionSpec, CaptureSpec, DatasetSpec
from pipeline.types import Asset, AssetError, FailureKind, Sample
from tests.conftest import SHARED
from tests.pipeline.test_mvimgnet import assert_clean

CAPTURES = SHARED / "captures"
pytestmark = pytest.mark.skipif(not CAPTURES.is_dir(), reason="shared/captures is not present")

SPEC = DatasetSpec.model_validate({"name": "t", "source": {"kind": "colmap", "path": "x"}})


def files_of(name: str, mask: str = "{stem}.png", sparse: str = "sparse", every: int = 1) -> CaptureFiles:
    root = CAPTURES / name
    frames = {path.name: str(path) for path in sorted((root / "images").iterdir())[::every]}
    masks = {frame: root / "masks" / mask.format(stem=Path(frame).stem) for frame in frames}
    models = sorted((root / sparse).iterdir()) if (root / sparse).is_dir() else []
    return CaptureFiles(
        uid=name,
        frames=frames,
        masks={frame: str(path) for frame, path in masks.items() if path.exists()},
        models={path.name: {part.name: str(part) for part in path.iterdir()} for path in models if path.is_dir()},
        read=lambda member, most: Path(member).read_bytes()[: most + 1],
    )


def run(files: CaptureFiles, spec: DatasetSpec = SPEC) -> Sample:
    return ingest(files, Asset(uid=files.uid, source="colmap", uri="x", format="capture"), spec, "f" * 64)


@lru_cache(maxsize=1)
def tankard() -> tuple[CaptureFiles, Model, Sample]:
    files = files_of("tankard", "{stem}_mask.JPG")
    return files, read_model("0", files.models["0"], files.read), run(files)


def test_the_tankards_points_meet_through_the_stored_cameras_as_well_as_through_colmaps() -> None:
    """Observations inside the masks, carried into the views, triangulated by the stored cameras alone."""
    files, model, sample = tankard()
    by_name = {name: view.camera for name, view in zip(sample.quality["frame_names"], sample.views)}
    masks = {name: cv2.imread(path, cv2.IMREAD_GRAYSCALE) for name, path in files.masks.items()}
    rows: dict[int, list[tuple[str, np.ndarray, float]]] = {}
    for image, point, pixel in zip(model.seen_image, model.seen_point, model.seen_px):
        name = model.images[image].name
        if name in by_name and masks[name][int(pixel[1]), int(pixel[0])] > 127:
            lens = model.lenses[model.images[image].camera_id]
            plane = lens.plane(pixel[None])[0]
            camera = model.images[image].rotation @ model.points[point] + model.images[image].translation
            miss = np.linalg.norm(lens.pixels((camera[:2] / camera[2])[None])[0] - pixel)
            rows.setdefault(int(point), []).append((name, plane, float(miss)))
    ours, theirs = [], []
    tracks = [track for track in rows.values() if len(track) >= 3][:1500]
    assert len(tracks) == 1500
    for track in tracks:
        cameras = [by_name[name] for name, _, _ in track]
        equations = []
        for camera, (_, plane, _) in zip(cameras, track):
            pose = np.linalg.inv(camera.world_from_camera)[:3]
            equations += [plane[0] * pose[2] - pose[0], plane[1] * pose[2] - pose[1]]
        place = np.linalg.svd(np.array(equations))[2][-1]
        place = place[:3] / place[3]
        for camera, (_, plane, miss) in zip(cameras, track):
            k = camera.intrinsics
            seen = k[:2, :2] @ plane + k[:2, 2]
            focal_ratio = 10430.68 / k[0, 0]
            ours.append(np.linalg.norm(camera.project(place[None])[0] - seen) * focal_ratio)
            theirs.append(miss)
    assert np.mean(ours) < np.mean(theirs) + 0.2


def test_features_found_in_the_tankards_own_views_obey_the_stored_cameras() -> None:
    """SIFT matches between views, which know nothing of the model: their epipolar distance is under a pixel."""
    _, _, sample = tankard()
    images = [decode_rgba(view.planes["rgba"].data) for view in sample.views]
    sift = cv2.SIFT_create(1500)
    greys = [cv2.cvtColor(rgba, cv2.COLOR_RGBA2GRAY) for rgba in images]
    inner = [cv2.erode(rgba[..., 3], np.ones((9, 9))) for rgba in images]
    found = [sift.detectAndCompute(grey, mask) for grey, mask in zip(greys, inner)]
    distances, pairs = [], 0
    centres = np.stack([view.camera.world_from_camera[:3, 3] for view in sample.views])
    for i in range(len(images)):
        order = np.argsort(np.linalg.norm(centres - centres[i], axis=1))
        j = int(order[1])
        matches = cv2.BFMatcher().knnMatch(found[i][1], found[j][1], k=2)
        good = [m for m, n in matches if m.distance < 0.65 * n.distance]
        if len(good) < 20:
            continue
        pairs += 1
        first, second = sample.views[i].camera, sample.views[j].camera
        motion = np.linalg.inv(second.world_from_camera) @ first.world_from_camera
        t = motion[:3, 3]
        cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
        f = np.linalg.inv(second.intrinsics).T @ cross @ motion[:3, :3] @ np.linalg.inv(first.intrinsics)
        for match in good:  # OpenCV's keypoints count from the first pixel's centre
            ends = (found[i][0][match.queryIdx], found[j][0][match.trainIdx])
            a, b = (np.append(np.array(end.pt) + 0.5, 1) for end in ends)
            line = f @ a
            distances.append(abs(b @ line) / np.hypot(line[0], line[1]))
    assert pairs >= 10
    assert np.median(distances) < 0.5


def test_the_tankards_poses_are_its_authors_own() -> None:
    """LLFF poses of the authors' own COLMAP run: frames IMG_9669 to IMG_9737, axes down, right, back."""
    _, _, sample = tankard()
    llff = np.load(CAPTURES / "tankard" / "poses_bounds.npy")[:, :15].reshape(-1, 3, 5)
    index = [int(name[4:8]) - 9669 for name in sample.quality["frame_names"]]
    theirs = np.stack([llff[i][:, [1, 0, 2]] * [1, 1, -1] for i in index])
    their_centres = llff[index][:, :, 3]
    ours = np.stack([view.camera.world_from_camera for view in sample.views])
    a, b = ours[:, :3, 3] - ours[:, :3, 3].mean(axis=0), their_centres - their_centres.mean(axis=0)
    u, s, vt = np.linalg.svd(b.T @ a)
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ sign @ vt
    scale = (s * np.diag(sign)).sum() / (a**2).sum()
    radius = np.linalg.norm(b, axis=1).mean()
    assert np.linalg.norm(scale * a @ rotation.T - b, axis=1).mean() / radius < 0.005
    between = np.einsum("ij,njk,nlk->nil", rotation, ours[:, :3, :3], theirs)
    angle = np.degrees(np.arccos(np.clip((np.trace(between, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    assert angle.mean() < 0.3
    assert angle.max() < 0.7


def test_the_tankards_record_says_what_it_is(tmp_path: Path) -> None:
    _, _, sample = tankard()
    quality = sample.quality
    assert quality["dropped"] == {"no_frame": 13}
    assert quality["up_quality"] == "low"  # it lies on a turntable: no gravity
    assert 0.9 < quality["reprojection_px"] < 1.0
    assert quality["mask_agreement"] > 0.9
    assert quality["cut_off_share"] == pytest.approx(9 / 22, abs=1e-5)
    assert 6 < quality["distance"] < 8
    refusal = judge(quality, AdmissionSpec(max_reprojection_px=0.5))
    assert refusal is not None
    assert refusal.kind == FailureKind.POOR_MODEL
    assert_clean(sample, tmp_path)


CUT_OUT_THE_DOLL = """import sys, cv2, numpy as np
photo = cv2.imread(sys.argv[1])
small = cv2.resize(photo, (200, 150), interpolation=cv2.INTER_AREA)
tone = cv2.cvtColor(small, cv2.COLOR_BGR2HSV)
mask = np.full((150, 200), 2, np.uint8)
mask[:6], mask[-6:], mask[:, :6], mask[:, -6:] = 0, 0, 0, 0
mask[(tone[..., 0] > 95) & (tone[..., 0] < 175) & (tone[..., 1] > 70) & (tone[..., 2] > 70)] = 3
mask[55:110, 85:115] = 3
cv2.setRNGSeed(0)
cv2.grabCut(small, mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 4, cv2.GC_INIT_WITH_MASK)
out = np.where((mask & 1) > 0, 255, 0).astype(np.uint8)
out = cv2.morphologyEx(out, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
n, labels, stats, _ = cv2.connectedComponentsWithStats(out)
if n > 1: out[labels != 1 + stats[1:, 4].argmax()] = 0
cv2.imwrite(sys.argv[2], cv2.resize(out, photo.shape[1::-1]))
"""
"""Finds what is blue, violet or pink and grows it to its edges: it fails on close-ups, so those are left out below."""
WHOLE_DOLL = (0, 1, 2, 10, 24, 25, 26, 27, 31, 32)


def test_a_doll_without_masks_fails_and_a_hook_helps(tmp_path: Path) -> None:
    files = files_of("plush_mit")
    with pytest.raises(AssetError) as error:
        run(files)
    assert error.value.kind == FailureKind.NO_MASK
    frames = list(files.frames.items())
    files = replace(files, frames=dict(frames[i] for i in WHOLE_DOLL))
    (tmp_path / "cut.py").write_text(CUT_OUT_THE_DOLL)
    command = f"{sys.executable} {tmp_path / 'cut.py'} {{image}} {{mask}}"
    sample = run(files, SPEC.model_copy(update={"capture": CaptureSpec(mask_command=command)}))
    assert sample.quality["mask_source"] == f"command: {command}"
    assert sample.quality["num_hook_masks"] == len(sample.views) >= 8
    assert sample.quality["mask_agreement"] > 0.6
    assert sample.quality["centre_from"] == "points"


def test_a_robot_without_a_model_and_a_model_without_its_images_have_their_kinds() -> None:
    for files, kind in (
        (files_of("robot_no_sparse"), FailureKind.NO_MODEL),
        (
            CaptureFiles(
                uid="partial",
                frames=files_of("plush_mit").frames,
                masks={},
                models={"0": {p.name: str(p) for p in (CAPTURES / "plush_mit" / "author_sparse_partial").iterdir()}},
                read=files_of("plush_mit").read,
            ),
            FailureKind.CORRUPT_MODEL,
        ),
    ):
        with pytest.raises(AssetError) as error:
            run(files)
        assert error.value.kind == kind


def test_memory_does_not_grow_with_the_number_of_frames() -> None:
    """22 photos of 36 MB each, decoded: what is held at once must stay far under their sum, in a process of its own."""
    code = (
        "import resource, sys\n"
        "from tests.pipeline.test_real_captures import files_of, run\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run(files_of('tankard', '{stem}_mask.JPG'))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert int(done.stdout) * 1024 < 22 * 3456**2 * 3 / 3


def test_the_votes_find_the_object_among_all_points() -> None:
    """By the source's own count 97.5 % of the tankard's points have all their observations inside the masks."""
    from pipeline.frames import Drops, join
    from pipeline.looks import look_at_masks

    files, model, _ = tankard()
    drops = Drops()
    looks = look_at_masks(files, model, join(files, model, drops), SPEC, drops)
    assert 0.95 < vote(model, looks).mean() < 0.98
