"""The pose: first frame, rest, or a drawn frame; recorded, and the same in every view (traps 5 and 34)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.types import derive_seed
from render.gltf import without_animations
from render.worker import RenderWorker
from tests.render.blends import write_blend
from tests.render.conftest import asset_of, make_spec
from tests.render.files import CUBE_VERTICES, Glb, one_mesh_glb
from tests.render.inspector import Inspector

pytestmark = [pytest.mark.blender, pytest.mark.timeout(120)]


def check(found: dict[str, Any], pose: str, frame: float, low: list[float], high: list[float]) -> None:
    """Check what is recorded of the pose, the box in source units, and that nothing is left that could move."""
    quality = found["quality"]
    assert (quality["pose"], quality["frame"]) == (pose, frame)
    np.testing.assert_allclose((quality["bounds_min"], quality["bounds_max"]), (low, high), atol=1e-4)
    assert_still(found)


def assert_still(found: dict[str, Any]) -> None:
    assert found["boxes"][0] == found["boxes"][1], "the object moves between frames"
    assert found["animated"] == []
    assert found["num"]["actions"] == found["num"]["armatures"] == 0


def moving_node(path: Path) -> Path:
    """A cube at x = 9 that an animation moves from x = 0 to x = 24 within a second, and a fixed one 3 above."""
    glb = Glb()
    mesh = glb.mesh()
    mover = glb.node(mesh=mesh, translation=[9, 0, 0])
    glb.scene(mover, glb.node(mesh=mesh, translation=[0, 3, 0]))
    glb.animation(mover, "translation", [0, 1], [[0, 0, 0], [24, 0, 0]])
    return glb.write(path)


@pytest.mark.parametrize(
    ("render", "frame", "x"),
    [({}, 0, 0), ({"pose": "rest"}, 1, 9), ({"pose": "frames", "frames": [12]}, 12, 12)],
    ids=["first_frame", "rest", "frames"],
)
def test_5_a_node_animation(inspector: Inspector, tmp_path: Path, render: Any, frame: int, x: float) -> None:
    found = inspector.prepare(moving_node(tmp_path / "node.glb"), **render)
    pose = render.get("pose", "first_frame")
    check(found, pose, frame, [-0.5, -0.5, -0.5], [x + 0.5, 0.5, 3.5])


def test_5_a_skin(inspector: Inspector, tmp_path: Path) -> None:
    glb = Glb()
    joint = glb.node(translation=[0, 0, 0])
    joints = glb.accessor(np.zeros((8, 4), np.uint8), "VEC4")
    weights = glb.accessor(np.tile(np.float32([1, 0, 0, 0]), (8, 1)), "VEC4")
    mesh = glb.mesh(CUBE_VERTICES, JOINTS_0=joints, WEIGHTS_0=weights)
    glb.document["skins"] = [{"joints": [joint]}]
    glb.scene(glb.node(mesh=mesh, skin=0), joint)
    glb.animation(joint, "translation", [0, 1], [[0, 5, 0], [0, 29, 0]])
    path = glb.write(tmp_path / "skin.glb")
    check(inspector.prepare(path), "first_frame", 0, [-0.5, -0.5, 4.5], [0.5, 0.5, 5.5])
    check(inspector.prepare(path, pose="rest"), "rest", 1, [-0.5] * 3, [0.5] * 3)
    check(inspector.prepare(path, pose="frames", frames=[6]), "frames", 6, [-0.5, -0.5, 10.5], [0.5, 0.5, 11.5])


def test_5_morph_targets(inspector: Inspector, tmp_path: Path) -> None:
    glb = Glb()
    mesh = glb.mesh()
    target = glb.accessor(np.tile(np.float32([4, 0, 0]), (8, 1)), "VEC3")
    glb.document["meshes"][mesh]["primitives"][0]["targets"] = [{"POSITION": target}]
    glb.document["meshes"][mesh]["weights"] = [0.25]
    node = glb.node(mesh=mesh)
    glb.scene(node)
    glb.animation(node, "weights", [0.5, 1.5], [1.0, 0.0])
    path = glb.write(tmp_path / "morph.glb")
    check(inspector.prepare(path), "first_frame", 12, [3.5, -0.5, -0.5], [4.5, 0.5, 0.5])
    check(inspector.prepare(path, pose="rest"), "rest", 1, [0.5, -0.5, -0.5], [1.5, 0.5, 0.5])
    check(inspector.prepare(path, pose="frames", frames=[24]), "frames", 24, [1.5, -0.5, -0.5], [2.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("kind", "render", "frame", "low", "high"),
    [
        ("moving", {}, 1, [0.5, -0.5, -0.5], [1.5, 0.5, 3.5]),
        ("moving", {"pose": "frames", "frames": [30]}, 30, [0, -0.5, -0.5], [30.5, 0.5, 3.5]),
        ("moving", {"pose": "rest"}, 1, [0, -0.5, -0.5], [20.5, 0.5, 3.5]),  # as it was saved
        ("late", {}, 10, [0, -0.5, -0.5], [10.5, 0.5, 3.5]),
        ("strip", {}, 5, [0.5, -0.5, -0.5], [1.5, 0.5, 3.5]),
        ("strip", {"pose": "rest"}, 5, [0, -0.5, -0.5], [20.5, 0.5, 3.5]),
        ("shape_keys", {}, 1, [0, -0.5, -0.5], [4.5, 0.5, 3.5]),
        ("shape_keys", {"pose": "rest"}, 1, [0, -0.5, -0.5], [2.5, 0.5, 3.5]),
        ("bones", {}, 1, [-0.5, -0.5, -3.5], [0.5, 0.5, 5.5]),
        ("bones", {"pose": "rest"}, 1, [-0.5, -0.5, -3.5], [0.5, 0.5, 0.5]),
    ],
)
def test_5_a_blend_file(
    inspector: Inspector, blend: Callable[..., Path], kind: str, render: Any, frame: int, low: Any, high: Any
) -> None:
    # The fixed cube reaches from -0.5 to 0.5 along x and y.
    low = np.minimum(low, [-0.5, -0.5, np.inf]).tolist()
    check(inspector.prepare(blend(kind), **render), render.get("pose", "first_frame"), frame, low, high)


def test_5_an_fbx_take_that_starts_late(inspector: Inspector, tmp_path: Path) -> None:
    path = write_blend("fbx_late", tmp_path / "late.fbx")
    first = inspector.prepare(path)
    check(first, "first_frame", 30, [-0.5, -0.5, -0.5], [30.5, 0.5, 3.5])
    check(inspector.prepare(path, pose="frames", frames=[35]), "frames", 35, [-0.5] * 3, [35.5, 0.5, 3.5])


def test_34_animated_materials_are_still(inspector: Inspector, blend: Callable[..., Path]) -> None:
    assert_still(inspector.prepare(blend("colour_changes")))


def test_frames_are_drawn_by_the_samples_seed(inspector: Inspector, tmp_path: Path) -> None:
    path, frames = moving_node(tmp_path / "node.glb"), [0, 6, 12, 18]
    drawn = set()
    for seed in range(12):
        found = inspector.prepare(path, seed=seed, pose="frames", frames=frames)["quality"]["frame"]
        assert found == frames[derive_seed("frame", seed) % 4]
        drawn.add(found)
    assert len(drawn) > 2


def test_the_worker_records_the_pose(tmp_path: Path) -> None:
    spec = make_spec(render={"num_views": 1, "pose": "rest"})
    with RenderWorker(spec, fingerprint="f", num_threads=2, scratch_dir=tmp_path) as worker:
        path = moving_node(tmp_path / "node.glb")
        quality = worker.render(asset_of(path), path).quality
    assert (quality["pose"], quality["frame"]) == ("rest", 1)
    assert quality["bounds_max"][0] == pytest.approx(9.5)


def test_a_gltf_without_animations_is_the_same_file_and_one_with_them_loses_nothing_else(tmp_path: Path) -> None:
    plain = one_mesh_glb(tmp_path / "plain.glb")
    assert without_animations(plain, tmp_path) == plain
    (tmp_path / "out").mkdir()
    path = moving_node(tmp_path / "node.glb")
    still = without_animations(path, tmp_path / "out").read_bytes()
    assert b'"animations"' in path.read_bytes()
    assert b'"animations"' not in still
    assert len(still) == int.from_bytes(still[8:12], "little")
    for broken in (b"", b"[]", b"null", b"glTF"):
        path.write_bytes(broken)
        assert without_animations(path, tmp_path) == path


@pytest.mark.parametrize(
    ("name", "first_frame"),
    [
        ("Fox.glb", 0),
        ("lumberjack.glb", 0),
        ("usdz-cesium-man/CesiumMan.usdz", 1),
        ("fbx-skeleton/animation_with_skeleton.fbx", 0),
        ("morph-stress-test.glb", 0.8),
    ],
)
def test_5_and_34_published_rigs(inspector: Inspector, shared: Path, name: str, first_frame: float) -> None:
    first = inspector.prepare(shared / name)
    rest = inspector.prepare(shared / name, pose="rest")
    for found in (first, rest):
        assert_still(found)
    assert first["quality"]["frame"] == pytest.approx(first_frame)
    sizes = [np.subtract(f["quality"]["bounds_max"], f["quality"]["bounds_min"]) for f in (first, rest)]
    # The two poses are one creature: not the same, and neither torn apart nor collapsed.
    assert 0.4 < sizes[0].max() / sizes[1].max() < 2.5
    if name.startswith(("Fox", "lumberjack", "usdz")):  # the others' first key leaves them at rest
        assert np.abs(sizes[0] - sizes[1]).max() > 1e-3 * sizes[1].max()
