"""COLMAP models, binary or text, read by pycolmap after we have walked every byte of them ourselves.

    cameras.bin  : u64 n; n x { i32 id, i32 model, u64 width, u64 height, f64 params[k] }
    images.bin   : u64 n; n x { i32 id, f64 q[4] (w, x, y, z), f64 t[3], i32 camera, name\\0,
                                u64 m, m x { f64 x, f64 y, i64 point (-1 is none) } }
    points3D.bin : u64 n; n x { u64 id, f64 xyz[3], u8 rgb[3], f64 error, u64 l, l x { i32 image, i32 index in it } }

pycolmap is C++ that trusts counts and cross references: a cut or hostile file can make it allocate without bound, or
end the process. So counts are held against the bytes that are there, and ids against each other, before it sees the
files, in a private folder that is gone afterwards. The walk yields names and observations as arrays on the way, which
takes 20 ms for 10,000 points; asking pycolmap for them one by one would take ten times as long and would fail on names
that are not UTF-8. Text files become the same binary layout first: names with spaces survive, and one path is checked.
Other files of a model (rigs, frames, project.ini) are not looked at: captures of one moving camera need none of them.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pycolmap
from numpy.typing import NDArray

from pipeline.lens import Lens
from pipeline.types import AssetError, FailureKind, Float64

Int64 = NDArray[np.int64]

MAX_FILE_BYTES = 2**28
MAX_CAMERAS_BYTES = 2**24
MAX_TEXT_BYTES = 2**26
MAX_NAME_BYTES = 1024
MAX_IMAGES = 100_000
MAX_POINTS = 2_000_000
MAX_SIZE_PX = 2**16

_IMAGE = struct.Struct("<i7di")
_CAMERA = struct.Struct("<iiQQ")
_U64 = struct.Struct("<Q")
_POINT2D = np.dtype([("x", "<f8"), ("y", "<f8"), ("point", "<i8")])
_POINT3D = np.dtype([("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8")])
_TRACK = np.dtype([("image", "<i4"), ("index", "<i4")])
_NAMES = ("cameras", "images", "points3D")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RegisteredImage:
    """A frame that COLMAP found the pose of: camera point = rotation @ world point + translation, OpenCV axes.

    Attributes:
        name: as the model says it, with bytes that are not UTF-8 as surrogates.
        rotation: [3, 3].
        translation: [3].
        camera_id: which of the model's lenses took it.
    """

    name: str
    rotation: Float64
    translation: Float64
    camera_id: int

    @property
    def centre(self) -> Float64:
        """Camera centre in the model's world [3]."""
        out: Float64 = -self.rotation.T @ self.translation
        return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """One sub-model, checked.

    Attributes:
        name: of its folder.
        lenses: by camera id.
        images: sorted by name.
        points: [P, 3] in the model's world.
        seen_image: [M] index into `images` of each observation.
        seen_point: [M] index into `points`.
        seen_px: [M, 2] where, in pixels of the frame as it is stored.
    """

    name: str
    lenses: Mapping[int, Lens]
    images: tuple[RegisteredImage, ...]
    points: Float64
    seen_image: Int64
    seen_point: Int64
    seen_px: Float64


def corrupt(message: str) -> NoReturn:
    """Raise the AssetError of a model whose bytes contradict themselves."""
    raise AssetError(FailureKind.CORRUPT_MODEL, message)


def read_model(name: str, files: Mapping[str, str], read: Callable[[str, int], bytes]) -> Model:
    """Read the sub-model of one folder.

    Args:
        name: of the folder, for messages.
        files: file name -> member.
        read: (member, most bytes) -> content.

    Raises:
        AssetError: CORRUPT_MODEL for missing, cut or contradictory files, BAD_CAMERA for a camera that cannot be one.
    """
    for ending in (".bin", ".txt"):
        if any(part + ending in files for part in _NAMES):
            break
    else:
        corrupt(f"model {name}: none of cameras.bin, images.bin, points3D.bin in it")
    if missing := [part + ending for part in _NAMES if part + ending not in files]:
        corrupt(f"model {name}: {', '.join(missing)} missing beside {', '.join(sorted(files))[:200]}")
    limits = (MAX_CAMERAS_BYTES, MAX_FILE_BYTES, MAX_FILE_BYTES) if ending == ".bin" else (MAX_TEXT_BYTES,) * 3
    content = [read(files[part + ending], limit) for part, limit in zip(_NAMES, limits)]
    if ending == ".txt":
        content = binary_of_text(name, *content)
    return parse_model(name, *content)


def parse_model(name: str, cameras: bytes, images: bytes, points: bytes) -> Model:
    """Check and read the three binary files of a model.

    Raises:
        AssetError: CORRUPT_MODEL or BAD_CAMERA.
    """
    where = f"model {name}"
    camera_ids = _walk_cameras(where, cameras)
    found = _walk_images(where, images, camera_ids)
    ids, xyz = _walk_points(where, points, found)
    order = sorted(range(len(found)), key=lambda i: found[i].name)
    seen = [found[i].points[found[i].points["point"] != -1] for i in order]
    together = np.concatenate(seen) if seen else np.zeros(0, _POINT2D)
    by_id = np.argsort(ids, kind="stable")
    position = np.searchsorted(ids[by_id], together["point"])
    if len(together) and (len(ids) == 0 or (ids[by_id][np.minimum(position, len(ids) - 1)] != together["point"]).any()):
        corrupt(f"{where}: images.bin names points that points3D.bin does not hold")
    lenses, poses = _read(where, cameras, images, points)
    registered = []
    for i in order:
        matrix = poses[found[i].image_id]
        registered.append(
            RegisteredImage(
                name=found[i].name, rotation=matrix[:, :3], translation=matrix[:, 3], camera_id=found[i].camera_id
            )
        )
    return Model(
        name=name,
        lenses=lenses,
        images=tuple(registered),
        points=xyz,
        seen_image=np.repeat(np.arange(len(seen)), [len(one) for one in seen]).astype(np.int64),
        seen_point=by_id[position].astype(np.int64) if len(together) else np.zeros(0, np.int64),
        seen_px=np.stack([together["x"], together["y"]], 1),
    )


def _count(where: str, data: bytes, least: int) -> int:
    """Return the count that a file begins with; each of its records has at least `least` bytes."""
    if len(data) < 8:
        corrupt(f"{where} has {len(data)} bytes; its count alone has 8")
    count = int(_U64.unpack_from(data)[0])
    if count > (len(data) - 8) // least:
        corrupt(f"{where} announces {count} records; its {len(data)} bytes hold at most {(len(data) - 8) // least}")
    return count


@cache
def _num_params() -> Mapping[int, int]:
    """Return the number of parameters of each camera model that pycolmap knows."""
    known = [m for m in pycolmap.CameraModelId.__members__.values() if m != pycolmap.CameraModelId.INVALID]
    return {int(m): len(pycolmap.Camera.create_from_model_id(1, m, 1000.0, 1000, 1000).params) for m in known}


def _walk_cameras(where: str, data: bytes) -> set[int]:
    where = f"{where}: cameras.bin"
    count, offset, ids = _count(where, data, _CAMERA.size), 8, set()
    for _ in range(count):
        if offset + _CAMERA.size > len(data):
            corrupt(f"{where} ends at byte {len(data)}, within a camera")
        camera, model, width, height = _CAMERA.unpack_from(data, offset)
        number = _num_params().get(model)
        if number is None:
            corrupt(
                f"{where}: camera {camera} has model {model}; {min(_num_params())} to {max(_num_params())} are known"
            )
        end = offset + _CAMERA.size + 8 * number
        if end > len(data):
            corrupt(f"{where} ends at byte {len(data)}, within camera {camera}")
        params = struct.unpack_from(f"<{number}d", data, offset + _CAMERA.size)
        if not (1 <= width <= MAX_SIZE_PX and 1 <= height <= MAX_SIZE_PX):
            corrupt(f"{where}: camera {camera} has {width} x {height} px; 1 to {MAX_SIZE_PX} are allowed")
        if not all(abs(x) < 1e9 for x in params):
            corrupt(f"{where}: camera {camera} has parameters {list(params)}")
        if camera in ids or camera < 0:
            corrupt(f"{where}: camera id {camera} is there twice, or negative")
        ids.add(camera)
        offset = end
    if offset != len(data):
        corrupt(f"{where} has {len(data) - offset} bytes after its last camera")
    return ids


@dataclass(frozen=True, slots=True)
class _Found:
    """An image record: its place in the file is checked, its pose is left to pycolmap."""

    image_id: int
    camera_id: int
    name: str
    points: NDArray[Any]


def _walk_images(where: str, data: bytes, cameras: set[int]) -> list[_Found]:
    where = f"{where}: images.bin"
    count, offset = _count(where, data, _IMAGE.size + 9), 8
    if count > MAX_IMAGES:
        corrupt(f"{where} announces {count} images; at most {MAX_IMAGES} are allowed")
    found: list[_Found] = []
    for _ in range(count):
        start = offset + _IMAGE.size
        end = data.find(b"\0", start, start + MAX_NAME_BYTES + 1)
        if start > len(data) or end < 0 or end + 9 > len(data):
            corrupt(f"{where} ends at byte {len(data)}, within an image, or has a name over {MAX_NAME_BYTES} bytes")
        image_id, *pose, camera_id = _IMAGE.unpack_from(data, offset)
        number = int(_U64.unpack_from(data, end + 1)[0])
        if number > (len(data) - end - 9) // _POINT2D.itemsize:
            corrupt(f"{where}: image {image_id} announces {number} points; the file ends at byte {len(data)}")
        norm = sum(x * x for x in pose[:4])
        if not (0.98 < norm < 1.02 and all(abs(x) < 1e12 for x in pose[4:])):
            corrupt(f"{where}: image {image_id} has the pose {pose}; a unit quaternion and a finite place are required")
        if camera_id not in cameras:
            corrupt(f"{where}: image {image_id} has camera {camera_id}, which cameras.bin lacks")
        points = np.frombuffer(data, _POINT2D, number, end + 9)
        if (
            (points["point"] < -1).any()
            or not (np.abs(points["x"]) < 1e9).all()
            or not (np.abs(points["y"]) < 1e9).all()
        ):
            corrupt(f"{where}: image {image_id} has an observation out of all bounds")
        found.append(_Found(image_id, camera_id, data[start:end].decode("utf-8", "surrogateescape"), points))
        offset = end + 9 + number * _POINT2D.itemsize
    if offset != len(data):
        corrupt(f"{where} has {len(data) - offset} bytes after its last image")
    for what in ([one.image_id for one in found], [one.name for one in found]):
        if len(set(what)) != len(what):
            corrupt(f"{where}: an image id or name is there twice")
    if any(one.image_id < 0 for one in found):
        corrupt(f"{where}: an image id is negative")
    return found


def _walk_points(where: str, data: bytes, images: list[_Found]) -> tuple[Int64, Float64]:
    """Return the ids [P] and places [P, 3] of the points, their tracks checked against the images."""
    where = f"{where}: points3D.bin"
    head, item = _POINT3D.itemsize, _TRACK.itemsize
    count, offset, starts, ends = _count(where, data, head), 8, [], []
    if count > MAX_POINTS:
        corrupt(f"{where} announces {count} points; at most {MAX_POINTS} are allowed")
    for _ in range(count):
        if offset + head > len(data):
            corrupt(f"{where} ends at byte {len(data)}, within a point")
        length = int(_U64.unpack_from(data, offset + head - 8)[0])
        if length > (len(data) - offset - head) // item:
            corrupt(f"{where}: a point at byte {offset} announces a track of {length}; the file has {len(data)} bytes")
        starts.append(offset)
        offset += head + length * item
        ends.append(offset)
    if offset != len(data):
        corrupt(f"{where} has {len(data) - offset} bytes after its last point")
    heads = np.frombuffer(b"".join([data[start : start + head] for start in starts]), _POINT3D)
    tracks = np.frombuffer(b"".join([data[a + head : b] for a, b in zip(starts, ends)]), _TRACK)
    ids, xyz = heads["id"], np.ascontiguousarray(heads["xyz"], np.float64)
    if len(np.unique(ids)) != len(ids) or (ids > np.uint64(2**62)).any():
        corrupt(f"{where}: a point id is there twice, or over 2^62")
    if not (np.abs(xyz) < 1e12).all():
        corrupt(f"{where}: a point lies at no finite place")
    sizes = {one.image_id: len(one.points) for one in images}
    known = np.array(sorted(sizes), np.int64)
    place = np.minimum(np.searchsorted(known, tracks["image"]), max(0, len(known) - 1))
    if len(tracks) and (len(known) == 0 or (known[place] != tracks["image"]).any()):
        corrupt(f"{where}: a track names an image that images.bin lacks")
    lengths = np.array([sizes[i] for i in known.tolist()], np.int64)
    if len(tracks) and ((tracks["index"] < 0) | (tracks["index"] >= lengths[place])).any():
        corrupt(f"{where}: a track names an observation that its image lacks")
    return ids.astype(np.int64), xyz


def _read(where: str, *content: bytes) -> tuple[dict[int, Lens], dict[int, Float64]]:
    """Return the lenses by camera id and the poses [3, 4] by image id, as pycolmap reads the checked files."""
    with tempfile.TemporaryDirectory(prefix="colmap-") as folder:
        for name, data in zip(_NAMES, content):
            (Path(folder) / f"{name}.bin").write_bytes(data)
        try:
            model = pycolmap.Reconstruction(folder)
            lenses = {int(key): Lens.of(camera) for key, camera in model.cameras.items()}
            poses = {int(key): _rigid(image.cam_from_world()) for key, image in model.images.items()}
        except (ValueError, RuntimeError, IndexError, KeyError, OverflowError) as error:
            corrupt(f"{where}: pycolmap refuses it: {' '.join(str(error).split())[:200]}")
    return lenses, poses


def _rigid(pose: Any) -> Float64:
    """Return a pose [3, 4] whose rotation is one: files hold quaternions of 6 digits, and pycolmap takes them as is."""
    quaternion = np.array(pose.rotation.quat, np.float64)
    rotation = pycolmap.Rotation3d(quaternion / np.linalg.norm(quaternion))
    return np.column_stack([rotation.matrix(), pose.translation])


def binary_of_text(name: str, cameras: bytes, images: bytes, points: bytes) -> list[bytes]:
    """Return the binary layout of a model's three text files; a malformed line is CORRUPT_MODEL."""
    out = []
    makers = (_binary_camera, _binary_image, _binary_point)
    for part, data, make in zip(_NAMES, (cameras, images, points), makers):
        records, lines = [], iter(data.split(b"\n"))
        for line in lines:
            text = line.strip()
            if not text or text.startswith(b"#"):
                continue
            # An image has two lines, of which the second may be empty.
            second = next(lines, b"") if part == "images" else b""
            try:
                records.append(make(text, second))
            except (ValueError, struct.error, OverflowError, IndexError, KeyError):
                corrupt(f"model {name}: {part}.txt: line {text[:80]!a} cannot be read")
        out.append(_U64.pack(len(records)) + b"".join(records))
    return out


def _binary_camera(line: bytes, _: bytes) -> bytes:
    words = line.split()
    model = int(pycolmap.CameraModelId.__members__[words[1].decode("ascii")])
    params = [float(word) for word in words[4:]]
    if len(params) != _num_params()[model]:
        raise ValueError
    return _CAMERA.pack(int(words[0]), model, int(words[2]), int(words[3])) + struct.pack(f"<{len(params)}d", *params)


def _binary_image(line: bytes, second: bytes) -> bytes:
    words = line.split(None, 9)
    if len(words) != 10 or b"\0" in words[9]:
        raise ValueError
    points = np.zeros(len(second.split()) // 3, _POINT2D)
    cells = np.array(second.split(), "S").reshape(len(points), 3) if second.strip() else np.zeros((0, 3), "S1")
    points["x"], points["y"], points["point"] = cells[:, 0], cells[:, 1], cells[:, 2].astype(np.int64)
    head = _IMAGE.pack(int(words[0]), *(float(word) for word in words[1:8]), int(words[8]))
    return head + words[9] + b"\0" + _U64.pack(len(points)) + points.tobytes()


def _binary_point(line: bytes, _: bytes) -> bytes:
    words = line.split()
    point = np.zeros(1, _POINT3D)
    point["id"], point["xyz"], point["rgb"] = (
        int(words[0]),
        [float(x) for x in words[1:4]],
        [int(x) for x in words[4:7]],
    )
    point["error"], point["length"] = float(words[7]), len(words[8:]) // 2
    track = np.array([int(word) for word in words[8:]], "<i4")
    if len(track) % 2:
        raise ValueError
    return point.tobytes() + track.tobytes()
