"""Normalisation: each trap has a file of its own, and is judged by what the sample records and shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.sample import decode_rgba
from pipeline.types import AssetError, FailureKind, Sample
from tests.render.conftest import Render
from tests.render.files import (
    CUBE_TRIANGLES,
    CUBE_VERTICES,
    OCTAHEDRON_TRIANGLES,
    OCTAHEDRON_VERTICES,
    Glb,
    one_mesh_glb,
    write_obj,
)

pytestmark = [pytest.mark.blender, pytest.mark.timeout(120)]


def box(sample: Sample) -> tuple[list[float], list[float]]:
    return sample.quality["bounds_min"], sample.quality["bounds_max"]


def assert_box(sample: Sample, low: list[float], high: list[float], tolerance: float = 1e-5) -> None:
    """Check the recorded box in source units, and that the similarity takes it to the unit box."""
    size = max(np.subtract(high, low))
    np.testing.assert_allclose(box(sample), (low, high), atol=tolerance * size, rtol=1e-6)
    norm = sample.normalization
    corners = norm.scale * np.array(box(sample)) @ norm.rotation.T + norm.translation
    np.testing.assert_allclose(corners[0], -corners[1], atol=1e-6)
    assert np.abs(corners).max() == pytest.approx(1, abs=1e-6)


def kind_of(render: Render, path: Path, **options: object) -> FailureKind:
    with pytest.raises(AssetError) as caught:
        render(path, **options)
    return caught.value.kind


def test_1_a_rigs_bone_shape_does_not_enlarge_the_box(render: Render, tmp_path: Path) -> None:
    glb = Glb()
    joint = glb.node(translation=[0, 0, 0])
    joints = glb.accessor(np.zeros((8, 4), np.uint8), "VEC4")
    weights = glb.accessor(np.tile(np.float32([1, 0, 0, 0]), (8, 1)), "VEC4")
    mesh = glb.mesh(CUBE_VERTICES * 0.2, JOINTS_0=joints, WEIGHTS_0=weights)
    glb.document["skins"] = [{"joints": [joint]}]
    glb.scene(glb.node(mesh=mesh, skin=0), joint)
    sample = render(glb.write(tmp_path / "rig.glb"))
    assert_box(sample, [-0.1] * 3, [0.1] * 3)
    assert sample.quality["num_triangles"] == 12


def test_2_several_roots_are_scaled_about_one_origin(render: Render, tmp_path: Path) -> None:
    glb = Glb()
    mesh = glb.mesh()
    glb.scene(glb.node(mesh=mesh), glb.node(mesh=mesh, translation=[10, 0, 0]))
    assert_box(render(glb.write(tmp_path / "roots.glb")), [-0.5, -0.5, -0.5], [10.5, 0.5, 0.5])


def test_3_the_box_is_of_vertices_and_not_of_a_turned_box(render: Render, tmp_path: Path) -> None:
    glb = Glb()
    half = np.sqrt(0.5)
    turned = [0, np.sin(np.pi / 8), 0, np.cos(np.pi / 8)]  # 45 degrees about the file's y, Blender's z
    glb.scene(glb.node(mesh=glb.mesh(OCTAHEDRON_VERTICES, OCTAHEDRON_TRIANGLES), rotation=turned))
    assert_box(render(glb.write(tmp_path / "turned.glb")), [-half, -half, -1], [half, half, 1])


def test_shear_and_mirroring_survive(render: Render, tmp_path: Path) -> None:
    glb = Glb()
    mesh = glb.mesh(CUBE_VERTICES * [1, 2, 3])
    # Glb nodes nest: a turned cube in a stretched and mirrored parent is sheared.
    child = glb.node(mesh=mesh, rotation=[0, 0, np.sin(np.pi / 8), np.cos(np.pi / 8)])
    glb.scene(glb.node(children=[child], scale=[-4, 1, 1]))
    sample = render(glb.write(tmp_path / "sheared.glb"))
    reach = (0.5 + 1.0) * np.sqrt(0.5)
    assert_box(sample, [-4 * reach, -1.5, -reach], [4 * reach, 1.5, reach])


def test_4_collection_instances_count(render: Render, blend) -> None:
    sample = render(blend("instances"))
    assert_box(sample, [-0.5, -0.5, -0.5], [6.5, 0.5, 0.5])
    assert sample.quality["num_triangles"] == 24


def test_4_curves_and_text_count(render: Render, blend) -> None:
    sample = render(blend("curves"))
    assert_box(sample, [-2.5, -2.5, -0.5], [2.5, 2.5, 3.1], tolerance=0.02)
    assert sample.quality["num_meshes"] == 2
    assert sample.quality["num_materials"] == 2  # the ring's, and the neutral one of the text


def test_4_metaballs_count_once(render: Render, blend) -> None:
    sample = render(blend("metaballs"))
    assert sample.quality["num_meshes"] == 1
    assert sample.quality["bounds_max"][0] - sample.quality["bounds_min"][0] == pytest.approx(3.8, abs=0.2)


def test_6_hidden_objects_do_not_count_and_render_visibility_decides(render: Render, blend) -> None:
    assert_box(render(blend("hidden")), [-0.5, -0.5, -0.5], [1.5, 0.5, 0.5])


def test_7_the_files_own_cameras_lights_and_worlds_are_gone(render: Render, blend) -> None:
    sample = render(blend("company"))
    # The cube that the camera carries keeps its place in the world: parents go after their children were frozen.
    assert_box(sample, [-1, -9, -0.5], [1, 0.5, 3])
    assert sample.quality["num_triangles"] == 24
    image = decode_rgba(sample.views[0].planes["rgba"].data)
    assert image.shape == (32, 32, 4)
    assert (image[..., 3] == 0).any()
    assert max(sample.quality["views"]["clipped"]) < 0.5


def test_5_and_34_one_pose_is_taken_and_kept(render: Render, blend) -> None:
    sample = render(blend("moving"))
    assert_box(sample, [-0.5, -0.5, -0.5], [1.5, 0.5, 3.5])
    assert sample.quality["frame"] == 1


def test_scripts_in_a_blend_file_never_run(render: Render, blend, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    sample = render(blend("scripts", str(mark)))
    assert sample.quality["num_triangles"] == 12
    assert not mark.exists()


def test_modifiers_act_as_in_a_render(render: Render, blend) -> None:
    assert render(blend("subdivided")).quality["num_triangles"] == 12 * 4**2


def test_8_only_the_default_scene_of_a_gltf_counts(render: Render, tmp_path: Path) -> None:
    glb = Glb()
    mesh = glb.mesh()
    far, near = glb.node(mesh=mesh, translation=[0, 0, 50]), glb.node(mesh=mesh)
    empty = glb.node(children=[near])
    glb.scene(far)
    glb.scene(empty)
    glb.document["scene"] = 1
    assert_box(render(glb.write(tmp_path / "second.glb")), [-0.5] * 3, [0.5] * 3)
    del glb.document["scene"]
    assert_box(render(glb.write(tmp_path / "first.glb")), [-0.5, -50.5, -0.5], [0.5, -49.5, 0.5])


def test_an_empty_default_scene_is_empty(render: Render, tmp_path: Path) -> None:
    glb = Glb()
    glb.node(mesh=glb.mesh())
    glb.scene(glb.node())
    assert kind_of(render, glb.write(tmp_path / "empty.glb")) is FailureKind.EMPTY_SCENE


def test_points_and_lines_do_not_count(render: Render, tmp_path: Path) -> None:
    glb = Glb()
    cube, points = glb.mesh(), glb.mesh(CUBE_VERTICES * 100, np.arange(8), mode=0)
    glb.scene(glb.node(mesh=cube), glb.node(mesh=points))
    assert_box(render(glb.write(tmp_path / "points.glb")), [-0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("value", ["nan", "inf", "3e38"])
def test_9_positions_that_are_not_finite_give_no_sample(render: Render, blend, value: str) -> None:
    # Most importers turn them into 0 without a word; such files are refused by their bytes, before Blender.
    assert kind_of(render, blend("odd", value)) is FailureKind.DEGENERATE_GEOMETRY


def test_9_zero_extent_is_degenerate(render: Render, tmp_path: Path) -> None:
    assert kind_of(render, one_mesh_glb(tmp_path / "zero.glb", CUBE_VERTICES * 0)) is FailureKind.DEGENERATE_GEOMETRY


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_extreme_scales(render: Render, tmp_path: Path, scale: float) -> None:
    by_node = render(one_mesh_glb(tmp_path / "node.glb", scale=[scale] * 3))
    by_vertex = render(one_mesh_glb(tmp_path / "vertex.glb", CUBE_VERTICES * np.float32(scale)))
    for sample in (by_node, by_vertex):
        assert_box(sample, [-0.5 * scale] * 3, [0.5 * scale] * 3)
        assert max(sample.quality["views"]["black"]) < 0.05


def test_far_from_the_origin_the_shape_survives(render: Render, tmp_path: Path) -> None:
    glb = Glb()
    mesh = glb.mesh(OCTAHEDRON_VERTICES, OCTAHEDRON_TRIANGLES)
    children = [glb.node(mesh=mesh, translation=[0.3 * i, 0, 0]) for i in range(3)]
    glb.scene(glb.node(children=children, translation=[1e6, 2e5, -5e5]))
    sample = render(glb.write(tmp_path / "far.glb"))
    # The file's z is Blender's -y. Blender itself resolves 0.06 units there; the shape must be exact.
    assert_box(sample, [1e6 - 1, 5e5 - 1, 2e5 - 1], [1e6 + 1.6, 5e5 + 1, 2e5 + 1])


def test_vertices_written_far_from_the_origin(render: Render, tmp_path: Path) -> None:
    sample = render(one_mesh_glb(tmp_path / "baked.glb", CUBE_VERTICES * 64 + np.float32([1e5, 0, 0])))
    assert_box(sample, [1e5 - 32, -32, -32], [1e5 + 32, 32, 32])


def test_a_stray_speck_is_dropped_and_recorded(render: Render, tmp_path: Path) -> None:
    glb = Glb()
    vertices = np.concatenate([CUBE_VERTICES, CUBE_VERTICES * 0.01 + np.float32([5000, 0, 0])])
    both = glb.mesh(vertices, np.concatenate([CUBE_TRIANGLES, CUBE_TRIANGLES + 8]))
    speck = glb.mesh(CUBE_VERTICES * 0.01)
    glb.scene(glb.node(mesh=both), glb.node(mesh=speck, translation=[0, 900, 0]))
    sample = render(glb.write(tmp_path / "stray.glb"), expected_triangles=36)
    assert_box(sample, [-0.5] * 3, [0.5] * 3)
    assert sample.quality["num_triangles"] == 12
    assert sample.quality["num_triangles_file"] == 36
    assert sample.quality["stray"]["num_triangles"] == 24
    assert 0 < sample.quality["stray"]["area_share"] < 0.01


def test_too_many_triangles_and_too_few(render: Render, tmp_path: Path) -> None:
    path = one_mesh_glb(tmp_path / "cube.glb")
    assert kind_of(render, path, expected_triangles=14) is FailureKind.PARTIAL_IMPORT
    assert render(path, expected_triangles=13).quality["num_triangles_file"] == 13


def test_missing_and_unreadable_textures_are_named(render: Render, tmp_path: Path) -> None:
    path = write_obj(tmp_path / "a.obj", [(CUBE_VERTICES, np.array([[0, 1, 3]]), (1, 0, 0))])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for name in ("gone.png", "bad.png"):
        (tmp_path / "a.mtl").write_text(f"newmtl m0\nKd 1 1 1\nmap_Kd {name}\n")
        with pytest.raises(AssetError, match=name) as caught:
            render(path)
        assert caught.value.kind is FailureKind.MISSING_TEXTURE


def test_vertex_colours_show_where_nothing_else_gives_colour(render: Render, tmp_path: Path) -> None:
    rows = [f"{x} {y} {z} 255 0 0" for x, y, z in OCTAHEDRON_VERTICES]
    faces = [f"3 {a} {b} {c}" for a, b, c in OCTAHEDRON_TRIANGLES]
    header = ["ply", "format ascii 1.0", "element vertex 6", *(f"property float {axis}" for axis in "xyz")]
    header += [*(f"property uchar {name}" for name in ("red", "green", "blue"))]
    header += ["element face 8", "property list uchar int vertex_indices", "end_header"]
    path = tmp_path / "red.ply"
    path.write_text("\n".join([*header, *rows, *faces]) + "\n")
    sample = render(path)
    image = decode_rgba(sample.views[0].planes["rgba"].data)
    red, green, blue, _ = image[image[..., 3] == 255].astype(int).mean(axis=0)
    assert red > max(100, 3 * green, 3 * blue)
    assert not sample.quality["untextured"]


def test_no_material_is_neutral_grey_and_flagged(render: Render, tmp_path: Path) -> None:
    sample = render(one_mesh_glb(tmp_path / "plain.glb"))
    image = decode_rgba(sample.views[0].planes["rgba"].data)
    red, green, blue, _ = image[image[..., 3] == 255].astype(int).mean(axis=0)
    assert max(abs(red - green), abs(green - blue)) < 8
    assert 60 < red < 220
    assert sample.quality["untextured"]


def test_an_unknown_format_is_typed(render: Render, tmp_path: Path) -> None:
    path = tmp_path / "thing.step"
    path.write_text("x")
    assert kind_of(render, path) is FailureKind.UNSUPPORTED_FORMAT
