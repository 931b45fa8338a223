"""Made captures whose truth is known to the last digit: a ray-cast scene, seen through lenses that bend it.

A house of three boxes with bright discs on its faces stands on a chequered floor. Photos are cast ray by ray through
the inverse of a forward lens model that is written here, not taken from the code under test; the COLMAP model is
written by pycolmap, in a world that is turned, shifted and scaled at will. Discs are the known 3D points.

    capture = make_capture(model="RADIAL", sideways=1)
    ingest(capture.files(), ...)                              in memory
    write_mvimgnet(capture, root, layout="1.0", zipped=True)  as the data set lies on disk
"""

from __future__ import annotations

import io
import math
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pycolmap
from PIL import Image

from pipeline.capture import CaptureFiles
from pipeline.sample import decode_data, decode_rgba
from pipeline.types import AssetError, Camera, FailureKind, Sample

Array = np.ndarray[Any, np.dtype[Any]]

DISC = 0.055
BOXES = np.array(
    [
        [[-0.5, -0.9, 0.0], [0.5, 0.9, 0.7]],
        [[-0.35, -0.35, 0.7], [0.35, 0.35, 1.3]],
        [[0.5, -0.3, 0.0], [0.8, 0.3, 0.35]],
    ]
)
"""Low and high corners of the house's boxes, standing on z = 0."""


@dataclass(frozen=True, kw_only=True)
class Bend:
    """A lens: fx, fy, cx, cy and distortion k1, k2, p1, p2, as COLMAP's OPENCV model; the others are cases of it."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    k1: float = 0.0
    k2: float = 0.0
    p1: float = 0.0
    p2: float = 0.0

    def pixels(self, u: Array) -> Array:
        """Forward: tangent plane [..., 2] to pixels."""
        x, y = u[..., 0], u[..., 1]
        r2 = x * x + y * y
        radial = self.k1 * r2 + self.k2 * r2 * r2
        dx = x * radial + 2 * self.p1 * x * y + self.p2 * (r2 + 2 * x * x)
        dy = y * radial + 2 * self.p2 * x * y + self.p1 * (r2 + 2 * y * y)
        return np.stack([self.fx * (x + dx) + self.cx, self.fy * (y + dy) + self.cy], -1)

    def plane(self, pixels: Array) -> Array:
        """Inverse by fixed point, checked against the forward model."""
        want = (pixels - (self.cx, self.cy)) / (self.fx, self.fy)
        u = want.copy()
        for _ in range(100):
            miss = want - (self.pixels(u) - (self.cx, self.cy)) / (self.fx, self.fy)
            u = u + miss
            if np.abs(miss).max() < 1e-10:
                return u
        raise AssertionError(f"{self} cannot be undone")

    def camera(self, model: str) -> pycolmap.Camera:
        """The same lens as pycolmap's model of that name."""
        params = {
            "SIMPLE_PINHOLE": [self.fx, self.cx, self.cy],
            "PINHOLE": [self.fx, self.fy, self.cx, self.cy],
            "SIMPLE_RADIAL": [self.fx, self.cx, self.cy, self.k1],
            "RADIAL": [self.fx, self.cx, self.cy, self.k1, self.k2],
            "OPENCV": [self.fx, self.fy, self.cx, self.cy, self.k1, self.k2, self.p1, self.p2],
        }[model]
        return pycolmap.Camera(camera_id=1, model=model, width=self.width, height=self.height, params=params)


def bend_of(model: str, width: int, height: int) -> Bend:
    """A lens of the model, bent by several pixels at the corners, its principal point off the middle."""
    focal = 1.1 * max(width, height)
    values: dict[str, float] = {"fx": focal, "fy": focal, "cx": width / 2 + 6.3, "cy": height / 2 - 4.1}
    if model in ("PINHOLE", "OPENCV"):
        values["fy"] = focal * 1.04
    if model not in ("PINHOLE", "SIMPLE_PINHOLE"):
        values["k1"] = -0.16 if model != "RADIAL" else 0.12
    if model in ("RADIAL", "OPENCV"):
        values["k2"] = 0.06
    if model == "OPENCV":
        values |= {"p1": 0.004, "p2": -0.003}
    return Bend(width=width, height=height, **values)


@dataclass(kw_only=True)
class Capture:
    """A made capture, and its truth in the world of its COLMAP model.

    Attributes:
        discs, disc_normals: known points on the object's faces [M, 3].
        corners: of the object's boxes [24, 3].
        up: [3].
        poses: name -> camera_from_world [3, 4].
        visible: name -> which discs a frame sees whole and alone [M].
    """

    frames: dict[str, bytes]
    masks: dict[str, bytes]
    models: dict[str, dict[str, bytes]]
    lens: Bend
    discs: Array
    corners: Array
    up: Array
    poses: dict[str, Array]
    visible: dict[str, Array]
    uid: str = "0/00c0ffee"
    content: dict[str, bytes] = field(default_factory=dict)

    def files(self) -> CaptureFiles:
        """The capture as a source hands it over, read from memory."""
        members = {f"images/{name}": data for name, data in self.frames.items()}
        members |= {f"masks/{name}": data for name, data in self.masks.items()}
        members |= {f"sparse/{m}/{n}": data for m, parts in self.models.items() for n, data in parts.items()}

        def read(member: str, most: int) -> bytes:
            if len(members[member]) > most:
                raise AssetError(FailureKind.TOO_LARGE, f"{member} has {len(members[member])} bytes")
            return members[member]

        return CaptureFiles(
            uid=self.uid,
            frames={name: f"images/{name}" for name in self.frames},
            masks={name: f"masks/{name}" for name in self.masks},
            models={m: {n: f"sparse/{m}/{n}" for n in parts} for m, parts in self.models.items()},
            read=read,
        )


def _discs() -> tuple[Array, Array, Array]:
    """Centres, normals and owners (3 * box + axis) of the discs: four a face, but where another box or the floor is."""
    centres, normals, owners = [], [], []
    for b, (low, high) in enumerate(BOXES):
        for axis in range(3):
            for sign in (-1, 1):
                if (axis == 2 and sign == -1) or (b == 2 and axis == 0 and sign == -1):
                    continue
                others = [i for i in range(3) if i != axis]
                for s, t in ((0.22, 0.27), (0.75, 0.24), (0.26, 0.78), (0.8, 0.73)):
                    point = np.empty(3)
                    point[axis] = (low, high)[sign > 0][axis]
                    point[others[0]] = low[others[0]] + s * (high - low)[others[0]]
                    point[others[1]] = low[others[1]] + t * (high - low)[others[1]]
                    normal = np.zeros(3)
                    normal[axis] = sign
                    if not _buried(point + 0.02 * normal, 1.2 * DISC):
                        centres.append(point)
                        normals.append(normal)
                        owners.append(3 * b + axis)
    return np.array(centres), np.array(normals), np.array(owners)


def _buried(point: Array, margin: float) -> bool:
    return bool(
        ((point > BOXES[:, 0] - margin + 0.02) & (point < BOXES[:, 1] + margin - 0.02)).all(axis=1).sum() > 1
    ) or (bool(((point > BOXES[:, 0]) & (point < BOXES[:, 1])).all(axis=1).any()))


def cast(origin: Array, directions: Array) -> tuple[Array, Array, Array]:
    """Cast rays [N, 3] into the scene: (distance [N], colour [N, 3] in 0 to 255, whether the house is hit [N])."""
    best = np.full(len(directions), np.inf)
    face = np.full(len(directions), -1)
    safe = np.where(np.abs(directions) < 1e-12, 1e-12, directions)
    for box, (low, high) in enumerate(BOXES):
        a, b = (low - origin) / safe, (high - origin) / safe
        near, far = np.minimum(a, b), np.maximum(a, b)
        enter = near.max(axis=1)
        hit = np.flatnonzero((enter < far.min(axis=1)) & (enter > 0) & (enter < best))
        best[hit] = enter[hit]
        face[hit] = 3 * box + near[hit].argmax(axis=1)
    house = face >= 0
    floor = -origin[2] / safe[:, 2]
    ground = (floor > 0) & (floor < best) & (floor < 12)
    best[ground], house[ground] = floor[ground], False
    colour = np.full((len(directions), 3), 190.0)
    tiles = np.floor(2 * (origin[:2] + directions[ground, :2] * best[ground, None])).sum(axis=1) % 2
    colour[ground] = np.where(tiles[:, None] > 0, [150, 170, 160], [90, 110, 120])
    on_house = np.flatnonzero(house)
    points = origin + directions[on_house] * best[on_house, None]
    shade = 55 + 25 * np.sin(3 * points[:, 0] + 1) + 20 * np.sin(4 * points[:, 1]) + 10 * np.sin(5 * points[:, 2])
    painted = np.stack([shade, shade * 0.8 + 8, shade * 0.6 + 20], 1)
    faces = face[on_house]
    for centre, owner in zip(DISCS[0], DISCS[2]):
        here = np.flatnonzero(faces == owner)
        painted[here[((points[here] - centre) ** 2).sum(axis=1) < DISC**2]] = 250
    colour[on_house] = painted
    return best, colour, house


DISCS = _discs()


def look_at(centre: Array, target: Array, roll_rad: float) -> Array:
    """camera_from_world [3, 4] in OpenCV axes."""
    forward = (target - centre) / np.linalg.norm(target - centre)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    rows = np.stack([right, np.cross(forward, right), forward])
    c, s = math.cos(roll_rad), math.sin(roll_rad)
    rows = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1.0]]) @ rows
    return np.concatenate([rows, (-rows @ centre)[:, None]], 1)


@lru_cache(maxsize=2)
def _rays(lens: Bend, samples: int) -> Array:
    """Directions in camera axes of samples x samples rays a pixel, row by row [H * S * W * S, 3]."""
    offsets = (np.arange(samples) + 0.5) / samples
    columns = (np.arange(lens.width)[:, None] + offsets).ravel()
    rows = (np.arange(lens.height)[:, None] + offsets).ravel()
    u = lens.plane(np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2))
    return np.concatenate([u, np.ones((len(u), 1))], 1)


def photo_of(pose: Array, lens: Bend, samples: int = 2) -> tuple[Array, Array]:
    """Cast a photo [H, W, 3] uint8 RGB and its mask [H, W] 0 or 255, with samples x samples rays a pixel."""
    _, colour, house = cast(-pose[:, :3].T @ pose[:, 3], _rays(lens, samples) @ pose[:, :3])
    shape = (lens.height, samples, lens.width, samples, -1)
    photo = colour.reshape(shape).mean(axis=(1, 3))
    mask = house.reshape(shape).mean(axis=(1, 3))[..., 0] >= 0.5
    return np.rint(photo).astype(np.uint8), np.where(mask, 255, 0).astype(np.uint8)


def _surface_points(rng: np.random.Generator, count: int) -> Array:
    """Points on the house's faces, its edges and corners among them, as a feature detector likes them."""
    out = [np.stack(np.meshgrid(*zip(low, high)), -1).reshape(-1, 3) for low, high in BOXES]
    for low, high in BOXES:
        points = rng.uniform(low, high, (count // 2, 3))
        axis = rng.integers(0, 3, len(points))
        points[np.arange(len(points)), axis] = np.where(rng.random(len(points)) < 0.5, low[axis], high[axis])
        edges = rng.uniform(low, high, (count // 4, 3))
        free = rng.integers(0, 3, len(edges))
        snapped = np.where(rng.random((len(edges), 3)) < 0.5, low, high)
        snapped[np.arange(len(edges)), free] = edges[np.arange(len(edges)), free]
        out += [points, snapped]
    return np.concatenate(out)


def _sees(pose: Array, lens: Bend, points: Array, slack: float = 0.01) -> tuple[Array, Array]:
    """(pixels [N, 2], whether each point is in the frame and in front of everything else [N])."""
    origin = -pose[:, :3].T @ pose[:, 3]
    camera = points @ pose[:, :3].T + pose[:, 3]
    pixels = lens.pixels(camera[:, :2] / camera[:, 2:])
    away = np.linalg.norm(points - origin, axis=1)
    hit, _, _ = cast(origin, (points - origin) / away[:, None])
    inside = (camera[:, 2] > 0) & (pixels > 1).all(axis=1) & (pixels < (lens.width - 1, lens.height - 1)).all(axis=1)
    return pixels, inside & (hit > away - slack)


def make_capture(
    *,
    model: str = "SIMPLE_RADIAL",
    width: int = 270,
    height: int = 480,
    num_frames: int = 12,
    sideways: Literal[-1, 0, 1] = 0,
    sweep_deg: float = 300.0,
    text: bool = False,
    cameras_per_frame: bool = False,
    seed: int = 0,
    distance: float = 5.0,
    quality: int = 97,
    samples: int = 2,
    uid: str = "0/00c0ffee",
) -> Capture:
    """Make a capture; `width` and `height` are those of the stored frames, `sideways` turns the camera a quarter."""
    rng = np.random.default_rng(seed)
    lens = bend_of(model, width, height)
    turn = np.array([[0.0, -sideways, 0], [sideways, 0, 0], [0, 0, 1]]) if sideways else np.eye(3)
    names = [f"{i:03d}.jpg" for i in range(1, num_frames + 1)]
    middle = np.array([0.1, 0.0, 0.6])
    poses = {}
    for i, name in enumerate(names):
        angle = math.radians(20 + sweep_deg * i / max(1, num_frames - 1))
        lift = math.radians(28 + 12 * math.sin(2.1 * i))
        away = distance * (1 + 0.06 * math.sin(1.3 * i))
        at = [math.cos(angle) * math.cos(lift), math.sin(angle) * math.cos(lift), math.sin(lift)]
        target = middle + rng.uniform(-0.08, 0.08, 3)
        pose = look_at(middle + away * np.array(at), target, math.radians(rng.uniform(-1, 1)))
        poses[name] = turn @ pose
    # COLMAP's world is any similarity of the true one: X_model = scale * spin @ X + shift.
    spin = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    spin *= np.linalg.det(spin)
    scale, shift = 2.7, np.array([1.5, -4.0, 2.2])

    def moved(points: Array) -> Array:
        return scale * points @ spin.T + shift

    frames, masks, visible = {}, {}, {}
    for name, pose in poses.items():
        photo, mask = photo_of(pose, lens, samples)
        frames[name] = jpeg(photo, quality)
        masks[name] = png(mask)
        visible[name] = _whole_discs(pose, lens)
    floor = np.concatenate([rng.uniform(-3, 3, (300, 2)), np.zeros((300, 1))], 1)
    points = np.concatenate([_surface_points(rng, 200), floor[(np.abs(floor[:, :2]) > 1.1).any(axis=1)]])
    seen = {name: _sees(pose, lens, points) for name, pose in poses.items()}
    model_poses = {}
    for name, pose in poses.items():
        rotation = pose[:, :3] @ spin.T
        translation = scale * pose[:, 3] - rotation @ shift
        model_poses[name] = np.concatenate([rotation, translation[:, None]], 1)
    files = colmap_files(
        lens.camera(model), model_poses, moved(points), seen, text=text, cameras_per_frame=cameras_per_frame
    )
    corners = np.concatenate([np.stack(np.meshgrid(*zip(low, high)), -1).reshape(-1, 3) for low, high in BOXES])
    return Capture(
        frames=frames, masks=masks, models={"0": files}, lens=lens, discs=moved(DISCS[0]), corners=moved(corners),
        up=spin @ np.array([0.0, 0, 1]), poses=model_poses, visible=visible, uid=uid,
    )  # fmt: skip


def _whole_discs(pose: Array, lens: Bend) -> Array:
    """Which discs a view sees whole, and not too flat: their rim is visible and they face the camera."""
    centres, normals, _ = DISCS
    origin = -pose[:, :3].T @ pose[:, 3]
    facing = ((origin - centres) * normals).sum(axis=1) / np.linalg.norm(origin - centres, axis=1)
    good = facing > 0.45
    for angle in np.arange(8) * np.pi / 4:
        side = np.stack([np.roll(normals, 1, axis=1), np.roll(normals, 2, axis=1)])
        rim = centres + 1.7 * DISC * (math.cos(angle) * side[0] + math.sin(angle) * side[1]) + 1e-3 * normals
        good &= _sees(pose, lens, rim, slack=0.02)[1]
    return good


def colmap_files(
    camera: pycolmap.Camera,
    poses: Mapping[str, Array],
    points: Array,
    seen: Mapping[str, tuple[Array, Array]],
    *,
    text: bool = False,
    cameras_per_frame: bool = False,
    only: Sequence[str] | None = None,
) -> dict[str, bytes]:
    """Have pycolmap write a model of the frames `only` (all, if None); returns its files by name."""
    names = [name for name in poses if only is None or name in only]
    rec = pycolmap.Reconstruction()
    tracks: dict[int, list[tuple[int, int]]] = {}
    for i, name in enumerate(names):
        if i == 0 or cameras_per_frame:
            one = pycolmap.Camera(
                camera_id=i + 1, model=camera.model, width=camera.width, height=camera.height, params=camera.params
            )
            rec.add_camera_with_trivial_rig(one)
        pixels, visible = seen[name]
        index = np.flatnonzero(visible)
        image = pycolmap.Image(
            name=name, keypoints=pixels[index], camera_id=i + 1 if cameras_per_frame else 1, image_id=i + 1
        )
        pose = pycolmap.Rigid3d(np.asarray(poses[name]))
        rec.add_image_with_trivial_frame(image, pose)
        for j, point in enumerate(index):
            tracks.setdefault(int(point), []).append((i + 1, j))
    for point, track in tracks.items():
        if len(track) >= 2:
            elements = [pycolmap.TrackElement(image, index) for image, index in track]
            rec.add_point3D(points[point], pycolmap.Track(elements), np.array([9, 9, 9], np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        (rec.write_text if text else rec.write_binary)(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def without_background(frame: bytes, mask: bytes) -> bytes:
    """A frame as `NNN_bg_removed.png`: RGBA whose alpha is the mask."""
    photo = cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_COLOR)
    alpha = cv2.imdecode(np.frombuffer(mask, np.uint8), cv2.IMREAD_GRAYSCALE)
    return cv2.imencode(".png", np.dstack([photo, alpha]))[1].tobytes()


def mvimgnet_members(capture: Capture, layout: str, class_label: str, instance: str) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of a capture in a layout: "1.0", "2.0" or "bg_removed"; masks of 1.0 lie under `mask/`."""
    base = f"{class_label}/{instance}"
    for name, data in capture.frames.items():
        yield f"{base}/images/{name}", data
    for name, data in capture.masks.items():
        if layout == "1.0":
            yield f"mask/{base}/{name}.png", data
        elif layout == "2.0":
            yield f"{base}/masks/{name}.png", data
        elif name in capture.frames:
            yield f"{base}/images/{Path(name).stem}_bg_removed.png", without_background(capture.frames[name], data)
    for model, parts in capture.models.items():
        for name, data in parts.items():
            yield f"{base}/sparse/{model}/{name}", data


def write_mvimgnet(
    captures: Mapping[str, Capture] | Capture,
    root: Path,
    *,
    layout: Literal["1.0", "2.0", "bg_removed"] = "1.0",
    zipped: bool = False,
) -> Path:
    """Write captures as MVImgNet lies on disk.

    Args:
        captures: "<class>/<instance>" -> capture; a single one is called by its uid.
        root: folder to write; with `zipped` it gets `mvi_00.zip`, and the masks of 1.0 `mask/mvi_00.zip`.
        layout: where the masks are.
        zipped: as zips.

    Returns:
        root. The masks of layout 1.0 are under root / "mask".
    """
    named = {captures.uid: captures} if isinstance(captures, Capture) else captures
    archives: dict[Path, zipfile.ZipFile] = {}
    for uid, capture in named.items():
        label, instance = uid.split("/")
        for path, data in mvimgnet_members(capture, layout, label, instance):
            inner = path.removeprefix("mask/")
            if not zipped:
                target = root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                continue
            archive = (root / "mask" if path != inner else root) / "mvi_00.zip"
            archive.parent.mkdir(parents=True, exist_ok=True)
            if archive not in archives:
                archives[archive] = zipfile.ZipFile(archive, "w")
            archives[archive].writestr(inner, data)
    for opened in archives.values():
        opened.close()
    return root


def picture(data: bytes) -> Array:
    """Decode an image of any kind to RGB uint8."""
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def png(image: Array) -> bytes:
    """Encode as PNG with Pillow, which the maskers of the field write with."""
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()


def bomb() -> bytes:
    """A PNG of a hundred bytes whose header, checksum and all, promises 3.6 gigapixels."""
    data = bytearray(png(np.zeros((8, 8, 3), np.uint8)))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def jpeg(rgb: Array, quality: int = 95) -> bytes:
    """Encode RGB [H, W, 3] as JPEG."""
    return cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def bent_photo(view_rgba: Array, camera: Camera, lens: Bend, background: tuple[int, int, int]) -> tuple[Array, Array]:
    """A pinhole render as the lens would have photographed it: (RGB [H, W, 3], mask [H, W] 0 or 255)."""
    columns, rows = np.arange(lens.width) + 0.5, np.arange(lens.height) + 0.5
    u = lens.plane(np.stack(np.meshgrid(columns, rows), -1))
    k = camera.intrinsics
    x = (u[..., 0] * k[0, 0] + k[0, 2] - 0.5).astype(np.float32)
    y = (u[..., 1] * k[1, 1] + k[1, 2] - 0.5).astype(np.float32)
    alpha = view_rgba[..., 3:].astype(np.float32) / 255
    premultiplied = np.concatenate([view_rgba[..., :3] * alpha, alpha], -1).astype(np.float32)
    seen = cv2.remap(premultiplied, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT)
    cover = np.clip(seen[..., 3:], 0, 1)
    photo = np.clip(seen[..., :3] + (1 - cover) * background, 0, 255)
    return np.rint(photo).astype(np.uint8), np.where(cover[..., 0] >= 0.5, 255, 0).astype(np.uint8)


def capture_of_renders(sample: Sample, *, model: str = "SIMPLE_RADIAL", width: int = 400, height: int = 520) -> Capture:
    """Make a capture of a rendered sample: its views through a lens, its points from its depth planes.

    The COLMAP world is the render's, shifted by (3, -1, 2) and scaled by 1.7.
    """
    focal = 1.05 * float(sample.views[0].camera.intrinsics[0, 0]) * max(width, height) / sample.views[0].camera.width
    bend = bend_of(model, width, height)
    lens = replace(bend, fx=focal, fy=focal * bend.fy / bend.fx, k1=bend.k1 / 2)
    rng, scale, shift = np.random.default_rng(0), 1.7, np.array([3.0, -1.0, 2.0])
    frames, masks, poses, depths, places = {}, {}, {}, {}, []
    for view in sample.views:
        name = f"{view.index:03d}.jpg"
        photo, mask = bent_photo(decode_rgba(view.planes["rgba"].data), view.camera, lens, (120, 130, 125))
        frames[name], masks[name] = jpeg(photo, 97), png(mask)
        pose = np.linalg.inv(view.camera.world_from_camera)[:3]
        poses[name] = np.c_[pose[:, :3], scale * pose[:, 3] - pose[:, :3] @ shift]
        depths[name] = decode_data("depth", view.planes["depth"])
        rows, columns = np.nonzero(cv2.erode((depths[name] > 0).astype(np.uint8), np.ones((3, 3), np.uint8)))
        pick = rng.choice(len(rows), min(120, len(rows)), replace=False)
        z = depths[name][rows[pick], columns[pick]].astype(float)
        pixels = np.stack([columns[pick] + 0.5, rows[pick] + 0.5, np.ones(len(pick))], 1)
        local = pixels @ np.linalg.inv(view.camera.intrinsics).T * z[:, None]
        places.append(local @ view.camera.world_from_camera[:3, :3].T + view.camera.world_from_camera[:3, 3])
    points = np.concatenate(places)
    seen = {}
    for view in sample.views:
        name = f"{view.index:03d}.jpg"
        local = (points - view.camera.world_from_camera[:3, 3]) @ view.camera.world_from_camera[:3, :3]
        at = np.nan_to_num(view.camera.project(points), nan=-1)
        inside = ((at >= 0) & (at < view.camera.width)).all(axis=1)
        column, row = np.where(inside[:, None], at, 0).astype(int).T
        pixels = lens.pixels(local[:, :2] / local[:, 2:])
        shown = (pixels >= 0).all(axis=1) & (pixels < (width, height)).all(axis=1)
        seen[name] = (pixels, inside & shown & (np.abs(depths[name][row, column] - local[:, 2]) < 0.01))
    files = colmap_files(lens.camera(model), poses, scale * points + shift, seen)
    return Capture(
        frames=frames, masks=masks, models={"0": files}, lens=lens, discs=np.zeros((0, 3)), corners=np.zeros((0, 3)),
        up=np.array([0.0, 0, 1]), poses=poses, visible={},
    )  # fmt: skip
