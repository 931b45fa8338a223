"""COLMAP models: read as pycolmap reads them, and refused where bytes contradict themselves."""

from __future__ import annotations

import select
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import colmap
from pipeline.colmap import Model, parse_model, read_model
from pipeline.types import AssetError, FailureKind
from tests.captures import colmap_files
from tests.conftest import SHARED
from tests.pipeline.fuzz_colmap import TEXT
from tests.pipeline.test_lens import PARAMS

PARTS = ("cameras", "images", "points3D")


def model_files(
    model: str = "SIMPLE_RADIAL", *, text: bool = False, cameras_per_frame: bool = False, num_images: int = 5
) -> dict[str, bytes]:
    """Files of a model of random points in front of random cameras, written by pycolmap."""
    rng = np.random.default_rng(1)
    points = rng.uniform(-1, 1, (40, 3)) + np.array([0, 0, 5])
    poses, seen = {}, {}
    camera = pycolmap.Camera(camera_id=1, model=model, width=640, height=480, params=PARAMS[model])
    for i in range(num_images):
        turn = cv2.Rodrigues(0.1 * rng.standard_normal(3))[0]
        pose = np.concatenate([turn, rng.uniform(-0.2, 0.2, (3, 1))], 1)
        poses[f"{i:03d}.jpg"] = pose
        seen[f"{i:03d}.jpg"] = (camera.img_from_cam(points @ pose[:, :3].T + pose[:, 3]), rng.random(40) < 0.7)
    return colmap_files(camera, poses, points, seen, text=text, cameras_per_frame=cameras_per_frame)


def read(files: dict[str, bytes]) -> Model:
    return read_model("0", {name: name for name in files}, lambda member, most: files[member][:most])


def refused(files: dict[str, bytes]) -> AssetError:
    with pytest.raises(AssetError) as error:
        read(files)
    assert error.value.kind == FailureKind.CORRUPT_MODEL
    return error.value


def same_as_pycolmap(model: Model, folder: Path, tolerance: float = 0) -> None:
    """Compare names, poses, points and observations with what pycolmap itself finds in a folder."""
    rec = pycolmap.Reconstruction(str(folder))
    images = {image.name: image for image in rec.images.values()}
    assert [image.name for image in model.images] == sorted(images)
    assert len(model.points) == rec.num_points3D()
    assert len(model.seen_px) == rec.compute_num_observations()
    for i, image in enumerate(model.images):
        theirs = images[image.name]
        pose = theirs.cam_from_world().matrix()
        np.testing.assert_allclose(np.c_[image.rotation, image.translation], pose, atol=1e-12)
        assert list(model.lenses[image.camera_id].camera.params) == list(rec.cameras[theirs.camera_id].params)
        mine = model.seen_image == i
        seen = [point for point in theirs.points2D if point.has_point3D()]
        np.testing.assert_allclose(model.seen_px[mine], [point.xy for point in seen], atol=tolerance)
        places = [rec.points3D[point.point3D_id].xyz for point in seen]
        np.testing.assert_allclose(model.points[model.seen_point[mine]], places, atol=tolerance)


@pytest.mark.parametrize("capture", ["tankard", "plush_mit"])
def test_real_models_are_read_as_pycolmap_reads_them(capture: str) -> None:
    folder = SHARED / "captures" / capture / "sparse" / "0"
    if not folder.is_dir():
        pytest.skip("shared/captures is not present")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"rigs.bin", "frames.bin"} < set(files)  # of new COLMAP: not looked at
    same_as_pycolmap(read(files | {"junk.txt": b"?", "cameras.txt": b"nonsense"}), folder)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("model", list(PARAMS))
def test_every_camera_model_binary_and_text_one_camera_or_many(
    model: str, per_frame: bool, text: bool, tmp_path: Path
) -> None:
    files = model_files(model, text=text, cameras_per_frame=per_frame)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = read(files)
    assert len(found.lenses) == (5 if per_frame else 1)
    same_as_pycolmap(found, tmp_path, 1e-6 if text else 0)


def test_a_camera_file_of_one_simple_radial_has_64_bytes() -> None:
    assert len(model_files()["cameras.bin"]) == 64


def test_names_with_spaces_and_with_bytes_that_are_not_utf8_survive() -> None:
    for text in (False, True):
        files = model_files(text=text)
        part = "images.txt" if text else "images.bin"
        files[part] = files[part].replace(b"001.jpg", b"a b  c.jpg").replace(b"002.jpg", "图".encode("gbk") + b".jpg")
        names = {image.name for image in read(files).images}
        assert "a b  c.jpg" in names
        assert "图".encode("gbk").decode("utf-8", "surrogateescape") + ".jpg" in names


@pytest.mark.parametrize("part", PARTS)
def test_a_file_that_is_cut_anywhere_is_a_corrupt_model(part: str) -> None:
    files = model_files()
    data = files[f"{part}.bin"]
    for length in sorted({0, 1, 7, 8, 9, 20, 63, len(data) // 2, len(data) - 8, len(data) - 1}):
        if length < len(data):
            assert part in refused(files | {f"{part}.bin": data[:length]}).message
    refused(files | {f"{part}.bin": data + b"\0"})


def test_a_real_model_cut_as_a_stopped_download_cuts_it() -> None:
    folder = SHARED / "captures" / "tankard" / "sparse" / "0"
    if not folder.is_dir():
        pytest.skip("shared/captures is not present")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(files | {"images.bin": files["images.bin"][:2_359_296]})


def test_a_model_without_one_of_its_files_is_corrupt_and_says_which() -> None:
    folder = SHARED / "captures" / "plush_mit" / "author_sparse_partial"
    files = model_files()
    del files["images.bin"]
    if folder.is_dir():
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "images.bin missing" in refused(files).message
    refused({"project.ini": b"x"})


@pytest.mark.parametrize("part", PARTS)
def test_counts_that_the_bytes_cannot_hold_are_refused_before_anything_is_allocated(part: str) -> None:
    files = model_files()
    for count in (2**32, 2**60, 2**64 - 1):
        found = refused(files | {f"{part}.bin": struct.pack("<Q", count) + files[f"{part}.bin"][8:]})
        assert "announces" in found.message


def test_models_of_too_many_points_are_refused_before_they_are_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colmap, "MAX_POINTS", 20)
    assert "at most 20 are allowed" in refused(model_files()).message


def patched(data: bytes, offset: int, kind: str, value: float) -> bytes:
    size = struct.calcsize(kind)
    return data[:offset] + struct.pack(kind, value) + data[offset + size :]


@pytest.mark.parametrize(
    ("part", "offset", "kind", "value", "said"),
    [
        ("cameras", 12, "<i", 99, "model 99"),
        ("cameras", 16, "<Q", 2**40, "px"),
        ("cameras", 32, "<d", float("nan"), "parameters"),
        ("images", 12, "<d", 1e9, "pose"),
        ("images", 44, "<d", float("inf"), "pose"),
        ("images", 8, "<i", 2, "twice"),
        ("images", 68, "<i", 9, "camera 9"),
        ("images", 80, "<Q", 2**50, "announces"),
        ("images", 104, "<q", 777, "points that points3D.bin does not hold"),
        ("images", 88, "<d", float("nan"), "observation"),
        ("points3D", 16, "<d", float("nan"), "finite"),
        ("points3D", 51, "<Q", 2**61, "track"),
        ("points3D", 59, "<i", 4000, "image that images.bin lacks"),
        ("points3D", 63, "<i", 4000, "observation that its image lacks"),
        ("points3D", 8, "<Q", 2**63, "point id"),
    ],
)
def test_contradictions_are_named(part: str, offset: int, kind: str, value: float, said: str) -> None:
    files = model_files()
    name = f"{part}.bin"
    assert said in refused(files | {name: patched(files[name], offset, kind, value)}).message


def test_text_lines_that_cannot_be_read_are_named() -> None:
    files = model_files(text=True)
    for part, old, new in (
        ("cameras.txt", b"SIMPLE_RADIAL", b"WONDERFUL"),
        ("cameras.txt", b" 640 ", b" x "),
        ("images.txt", b"\n1 ", b"\none "),
        ("points3D.txt", b"\n1 ", b"\n1 \xff "),
    ):
        assert part in refused(files | {part: files[part].replace(old, new, 1)}).message


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    read(model_files())
    files = model_files()
    assert not list(tmp_path.glob("colmap-*"))
    refused(files | {"images.bin": files["images.bin"][:-9]})
    assert not list(tmp_path.glob("colmap-*"))


class Child:
    """The reading process under fuzz: alive, quick and small, whatever it is fed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipeline.fuzz_colmap"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def ask(self, content: list[bytes], text: bool) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        lengths = [len(data) for data in content]
        lengths[0] |= TEXT if text else 0
        self.process.stdin.write(struct.pack("<3Q", *lengths) + b"".join(content))
        self.process.stdin.flush()
        assert select.select([self.process.stdout], [], [], 20)[0], "the child is stuck"
        return self.process.stdout.readline().decode().strip()


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    one = Child()
    yield one
    one.process.kill()
    one.process.wait()


def seeds(text: bool) -> list[list[bytes]]:
    ending = "txt" if text else "bin"
    made = (model_files(text=text), model_files("OPENCV", text=text, cameras_per_frame=True, num_images=3))
    return [[files[f"{part}.{ending}"] for part in PARTS] for files in made]


SEEDS = {text: seeds(text) for text in (False, True)}

EDITS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(("flip", "cut", "byte", "number", "repeat", "drop")),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 2**64 - 1),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, how: str, where: float, value: int) -> bytes:
    at = int(where * max(1, len(data)))
    if how == "cut":
        return data[:at]
    if how == "drop":
        return data[:at] + data[at + value % 40 + 1 :]
    if how == "repeat":
        return data[: at + value % 60] + data[at:]
    if how == "number":
        return data[:at] + struct.pack("<Q", value) + data[at + 8 :]
    if how == "byte":
        return data[:at] + bytes([value % 256]) + data[at + 1 :]
    return data[:at] + bytes([(data[at] if at < len(data) else 0) ^ (1 << value % 8)]) + data[at + 1 :]


@given(st.booleans(), st.integers(0, 1), EDITS)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_models_give_typed_errors_and_take_nothing_down(
    child: Child, text: bool, seed: int, edits: list[tuple[int, str, float, int]]
) -> None:
    content = list(SEEDS[text][seed])
    for part, how, where, value in edits:
        content[part] = edited(content[part], how, where, value)
    assert child.ask(content, text) in ("ok", "corrupt_model", "bad_camera")


def test_an_empty_model_has_no_image() -> None:
    empty = struct.pack("<Q", 0)
    assert parse_model("0", empty, empty, empty).images == ()
