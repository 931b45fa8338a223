"""The parts of normalisation that need no Blender: default scenes of glTF files, strays, messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render import wire
from render.geometry import HULL_CELL, Triangles, bounds, find_strays, outer_points, surface_points, thin
from render.gltf import default_scene_only
from tests.render.files import CUBE_TRIANGLES, CUBE_VERTICES, Glb, one_mesh_glb


def cubes(*parts: tuple[float, float]) -> Triangles:
    """Return the triangles of cubes given as (size, x of the centre)."""
    out = []
    for size, x in parts:
        matrix = np.diag([size, size, size, 1.0])
        matrix[0, 3] = x
        out.append(Triangles.from_mesh(CUBE_VERTICES.astype(float), CUBE_TRIANGLES.astype(np.int32), matrix))
    return Triangles.concatenate(out)


def test_area_and_boxes_of_triangles() -> None:
    triangles = cubes((2, 1))
    assert triangles.area.sum() == pytest.approx(24)
    low, high = bounds(triangles, np.ones(12, bool))
    np.testing.assert_array_equal((low, high), ([0, -1, -1], [2, 1, 1]))


@pytest.mark.parametrize(
    ("parts", "num_stray"),
    [
        (((1, 0), (0.01, 100)), 12),
        (((1, 0), (0.01, 2.4)), 0),  # near: a part of the object
        (((1, 0), (0.5, 100)), 0),  # large: a second object
        (((1, 0), (0.01, 100), (0.01, -50)), 24),
        (((1, 0), (0.04, 100), (0.04, 110), (0.04, 120), (0.04, 130), (0.04, 140), (0.04, 150), (0.04, 160)), 0),
        (((1, 0),), 0),
    ],
)
def test_strays_are_far_and_next_to_nothing(parts: tuple[tuple[float, float], ...], num_stray: int) -> None:
    stray = find_strays(cubes(*parts))
    assert stray.sum() == num_stray
    assert not stray[:12].any()


@given(st.lists(st.tuples(st.floats(0.001, 10), st.floats(-1e6, 1e6)), min_size=1, max_size=6), st.floats(1e-6, 1e6))
def test_strays_do_not_depend_on_scale_and_never_hold_much(parts: list[tuple[float, float]], scale: float) -> None:
    triangles = cubes(*parts)
    stray = find_strays(triangles)
    assert not stray.all()
    assert triangles.area[stray].sum() < 0.04 * triangles.area.sum()
    assert len(stray) == 12 * len(parts)


def test_the_points_of_a_surface_bear_its_area_and_loose_vertices_are_none() -> None:
    vertices = np.concatenate([CUBE_VERTICES, [[100, 0, 0]]]).astype(float)
    matrix = np.diag([2.0, 2.0, 2.0, 1.0])
    matrix[:3, 3] = 1, 0, 0
    points, weights = surface_points(vertices, CUBE_TRIANGLES.astype(np.int32), matrix)
    np.testing.assert_allclose(points, CUBE_VERTICES * 2 + [1, 0, 0])
    assert weights.sum() == pytest.approx(24)
    # A corner where two triangles of a side meet bears twice what one with a single triangle does.
    assert set(np.round(weights * 3).astype(int)) <= {6, 8, 10, 12}


def test_few_points_are_left_as_they_are() -> None:
    points, weights = np.random.default_rng(0).uniform(-1, 1, (100, 3)), np.ones(100)
    thinned = thin(points, weights, 100)
    assert thinned[0] is points
    assert thinned[1] is weights


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3000), st.sampled_from(["ball", "sphere", "line", "plane", "one", "tiny"])
)
@settings(deadline=None, max_examples=60)
def test_outer_points_reach_as_far_as_all_in_every_direction(seed: int, count: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, 3))
    if kind == "sphere":
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    points *= {"line": [1, 0, 0], "plane": [1, 1, 0], "one": [0, 0, 0], "tiny": [1e-300] * 3}.get(kind, [1, 1, 1])
    points += rng.normal(size=3) if kind != "tiny" else 0
    kept = outer_points(points)
    directions = rng.normal(size=(3, 64))
    assert ((kept @ directions).max(axis=0) == (points @ directions).max(axis=0)).all()


def test_outer_points_leave_most_of_a_surface_out() -> None:
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(50_000, 3))
    bumpy = directions / np.linalg.norm(directions, axis=1, keepdims=True) * rng.uniform(0.4, 1, (50_000, 1))
    assert len(outer_points(bumpy)) < 25_000


@pytest.mark.parametrize("kind", ["sphere", "cube", "cloud", "line", "point"])
@pytest.mark.parametrize("seed", [0, 1])
def test_thinned_points_hold_the_hull_and_the_weight(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(60_000, 3))
    if kind == "sphere":
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    elif kind == "cube":
        points /= np.abs(points).max(axis=1, keepdims=True)
    else:
        points = rng.uniform(-1, 1, points.shape) * {"cloud": 1, "line": [1, 0, 0], "point": 0}[kind]
    weights = rng.uniform(0, 1, len(points))
    out, bears = thin(points, weights, 50_000)
    assert len(out) <= 50_000
    assert bears.sum() == pytest.approx(weights.sum())
    np.testing.assert_allclose(bears @ out / bears.sum(), weights @ points / weights.sum(), atol=1e-9)
    directions = rng.normal(size=(500, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    over = (out @ directions.T).max(axis=0) - (points @ directions.T).max(axis=0)
    assert over.min() >= -1e-12, "a point stands outside of the hull"
    # A cell's diagonal; with so few corners allowed, the sphere's and the cloud's cells had to be doubled.
    assert over.max() <= HULL_CELL * np.sqrt(3) * (1 if kind in ("cube", "line", "point") else 8)


def test_a_file_without_spare_nodes_is_taken_as_it_is(tmp_path: Path) -> None:
    path = one_mesh_glb(tmp_path / "a.glb")
    assert default_scene_only(path, tmp_path) == path


def test_nodes_outside_the_default_scene_lose_what_they_show(tmp_path: Path) -> None:
    glb = Glb()
    mesh = glb.mesh()
    shown, spare = glb.node(mesh=mesh), glb.node(mesh=mesh, camera=0)
    glb.scene(spare)
    glb.scene(shown)
    glb.document["scene"] = 1
    path = glb.write(tmp_path / "a.glb")
    (tmp_path / "out").mkdir()
    data = default_scene_only(path, tmp_path / "out").read_bytes()
    size = int.from_bytes(data[12:16], "little")
    assert len(data) == int.from_bytes(data[8:12], "little")
    assert size % 4 == 0
    assert json.loads(data[20 : 20 + size])["nodes"] == [{"mesh": 0}, {}]
    assert data.endswith(glb.binary)


def test_side_files_of_a_rewritten_gltf_are_found(tmp_path: Path) -> None:
    document = {
        "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}, {"mesh": 0}],
        "buffers": [{"uri": "a%20b.bin"}, {"uri": "data:,x"}],
    }  # fmt: skip
    path = tmp_path / "a.gltf"
    path.write_text(json.dumps(document))
    (tmp_path / "out").mkdir()
    found = json.loads(default_scene_only(path, tmp_path / "out").read_text())
    assert found["buffers"][0]["uri"].endswith("/a%20b.bin")
    assert found["buffers"][0]["uri"].startswith("/")
    assert found["buffers"][1]["uri"] == "data:,x"


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", '{"nodes": 3, "scenes": [1]}', '{"scenes": [{"nodes": [7]}], "nodes": [{}]}',
        '{"scenes": [{"nodes": ["x"]}], "nodes": [{"mesh": 0}]}',
        '{"scene": "a", "scenes": [{}], "nodes": [{"mesh": 0}]}',
        '{"scenes": [{"nodes": [0]}], "nodes": [{"children": [0]}]}',
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_left_to_the_importer(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.gltf"
    path.write_text(text)
    assert default_scene_only(path, tmp_path) == path


@given(st.binary(max_size=64))
def test_no_bytes_make_the_reply_parser_fail_untyped(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.parse_header(b"\xff" + data)
    if len(data) >= wire.PREFIX.size:
        prefix = data[: wire.PREFIX.size]
        if not prefix.startswith(wire.MAGIC):
            with pytest.raises(wire.WireError):
                wire.parse_prefix(prefix, 16)


@pytest.mark.parametrize(
    "text", [b"[1]", b'{"x": 1}', b'{"type": 3}', b'{"type": "a", "x": Infinity}', b'{"type":"a","x":' + b"[" * 9999]
)
def test_headers_that_are_refused(text: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.parse_header(text)


def test_a_deep_header_is_refused() -> None:
    with pytest.raises(wire.WireError, match="nested"):
        wire.parse_header(b'{"type":"a","x":' + b"[" * 20 + b"]" * 20 + b"}")
