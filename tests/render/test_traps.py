"""Traps of import that need a look into Blender after it; `TRAPS.md` lists the tests of every trap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.sample import decode_rgba
from tests.render.blends import write_blend
from tests.render.conftest import BLENDER_5, Render
from tests.render.files import CUBE_VERTICES, Glb, ball, one_mesh_glb
from tests.render.inspector import Inspector

pytestmark = [pytest.mark.blender, pytest.mark.timeout(120)]

Blend = Callable[..., Path]
FORMATS = ["obj", "stl", "ply", "fbx", "usd", "usda", "usdc", "usdz", "glb", "gltf", "blend"]
if not BLENDER_5:  # which neither writes nor reads COLLADA, and says so: tests/render/test_versions.py
    FORMATS.append("dae")


def assert_box(found: dict[str, Any], low: list[float], high: list[float], tolerance: float = 1e-4) -> None:
    quality = found["quality"]
    np.testing.assert_allclose((quality["bounds_min"], quality["bounds_max"]), (low, high), atol=tolerance)


def test_4_instances_of_geometry_nodes_count(inspector: Inspector, blend: Blend) -> None:
    found = inspector.prepare(blend("geometry_nodes"))
    assert_box(found, [-3.5, -0.5, -0.5], [3.5, 0.5, 0.5])
    assert found["quality"]["num_triangles"] == 24
    assert found["materials"] == ["of the source"]


def test_4_particles_count_and_a_hidden_emitter_does_not(inspector: Inspector, blend: Blend) -> None:
    found = inspector.prepare(blend("particles"))
    assert found["quality"]["num_triangles"] == 8 * 12
    # Each grain stands near a corner of the emitter, which reaches to 2.
    size = np.subtract(found["quality"]["bounds_max"], found["quality"]["bounds_min"])
    assert (size > 3.5).all()
    assert (size < 7).all()


def test_7_cameras_and_lights_of_a_gltf_are_gone_and_their_children_stay(inspector: Inspector, tmp_path: Path) -> None:
    glb = Glb()
    mesh = glb.mesh()
    glb.document["cameras"] = [{"type": "perspective", "perspective": {"yfov": 1, "znear": 0.1}}]
    glb.document["extensionsUsed"] = ["KHR_lights_punctual"]
    glb.document["extensions"] = {"KHR_lights_punctual": {"lights": [{"type": "point", "intensity": 1e6}]}}
    held = glb.node(mesh=mesh, translation=[0, 0, 1])
    camera = glb.node(name="Camera", camera=0, translation=[0, 0, 40], children=[held])
    light = glb.node(
        name="Light", translation=[90, 0, 0], extensions={"KHR_lights_punctual": {"light": 0}},
        children=[glb.node(mesh=mesh, translation=[-90, 0, 0])],
    )  # fmt: skip
    glb.scene(camera, light)
    found = inspector.prepare(glb.write(tmp_path / "company.glb"))
    assert_box(found, [-0.5, -41.5, -0.5], [0.5, 0.5, 0.5])  # the file's z is Blender's -y
    assert found["num"] | {"objects": 0} == {
        "objects": 0, "scenes": 1, "cameras": 0, "lights": 0, "worlds": 0, "actions": 0, "armatures": 0,
        "collections": 0, "texts": 0,
    }  # fmt: skip


def test_8_the_active_scene_of_a_blend_file_counts(inspector: Inspector, blend: Blend) -> None:
    found = inspector.prepare(blend("scenes"))
    assert_box(found, [-0.5] * 3, [0.5] * 3)
    assert found["num"]["scenes"] == 1


def test_16_places_that_constraints_give_are_evaluated(inspector: Inspector, blend: Blend) -> None:
    assert_box(inspector.prepare(blend("constrained")), [-0.5, -0.5, -0.5], [7.5, 0.5, 3.5])


def test_20_and_22_a_reset_keeps_the_device_and_leaves_no_world(inspector: Inspector) -> None:
    found = inspector.ask(do="reset", device="CUDA")
    assert found == {"device": "CUDA", "world": False, "num_objects": 0}


def test_21_memory_does_not_grow_with_the_number_of_imports(inspector: Inspector, tmp_path: Path) -> None:
    vertices, triangles = ball(150)
    glb = Glb()
    glb.scene(glb.node(mesh=glb.mesh(vertices, triangles)))
    path = glb.write(tmp_path / "ball.glb")
    sizes = []
    for _ in range(25):
        inspector.prepare(path)
        sizes.append(inspector.ask(do="memory")["resident_bytes"])
    assert max(sizes[-5:]) < 1.1 * max(sizes[:5])


@pytest.mark.parametrize("format", FORMATS)
def test_23_26_and_29_every_format_stands_upright_in_its_size_and_says_that_it_has_no_texture(
    inspector: Inspector, tmp_path: Path, format: str
) -> None:
    found = inspector.prepare(write_blend("export", tmp_path / f"box.{format}", "bare"))
    assert_box(found, [-0.5, -1, 0], [0.5, 1, 3])
    assert found["quality"]["num_triangles"] == 12
    assert found["quality"]["untextured"]


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "stl"])  # which knows no colours
def test_26_vertex_colours_show_in_every_format(render: Render, tmp_path: Path, format: str) -> None:
    sample = render(write_blend("export", tmp_path / f"box.{format}", "coloured"))
    assert not sample.quality["untextured"]
    image = decode_rgba(sample.views[0].planes["rgba"].data)
    red, green, blue, _ = image[image[..., 3] == 255].astype(int).mean(axis=0)
    assert red > max(100, 3 * green, 3 * blue)


def test_25_an_image_that_feeds_nothing_is_no_missing_texture(inspector: Inspector, blend: Blend) -> None:
    quality = inspector.prepare(blend("unlinked_image"))["quality"]
    assert quality["num_images"] == 1
    assert not quality["untextured"]


@pytest.mark.parametrize("faces", [1, -1])
@pytest.mark.parametrize("normals", [1, -1])
def test_28_faces_and_normals_that_oppose_each_other_are_lit(
    render: Render, tmp_path: Path, faces: int, normals: int
) -> None:
    """A file may turn its faces, its normals, or both inside out: the sphere looks the same, and it is recorded."""
    vertices, triangles = ball(12)
    glb = Glb()
    accessor = glb.accessor((normals * vertices).astype(np.float32), "VEC3")
    glb.scene(glb.node(mesh=glb.mesh(vertices, triangles[:, ::faces], NORMAL=accessor)))
    sample = render(glb.write(tmp_path / "ball.glb"))
    image = decode_rgba(sample.views[0].planes["rgba"].data)
    assert image[image[..., 3] == 255][:, :3].mean() > 120
    assert max(sample.quality["views"]["black"]) < 0.05  # of one sample a pixel; 0.8 where nothing is mended
    assert sample.quality["reversed_normals_share"] == float(faces * normals < 0)


def test_28_custom_normals_that_lean_are_kept(render: Render, tmp_path: Path) -> None:
    """A cube whose normals all lean by 60 degrees towards the top is lit from there, and not by its faces."""

    def brightness(normals: Any) -> float:
        glb = Glb()
        accessor = {} if normals is None else {"NORMAL": glb.accessor(np.float32(normals), "VEC3")}
        glb.scene(glb.node(mesh=glb.mesh(**accessor)))
        sample = render(glb.write(tmp_path / "cube.glb"))
        assert sample.quality["reversed_normals_share"] == 0
        image = decode_rgba(sample.views[1].planes["rgba"].data)
        return float(image[image[..., 3] == 255][:, :3].mean())

    outwards = CUBE_VERTICES * 2 / np.sqrt(3)
    assert abs(brightness(outwards) - brightness(None)) > 2


def test_points_bound_the_object_and_weigh_its_surface(inspector: Inspector, blend: Blend, tmp_path: Path) -> None:
    for path, area in ((blend("instances"), 12.0), (one_mesh_glb(tmp_path / "cube.glb", scale=[1, 2, 3]), 22.0)):
        found = inspector.prepare(path)
        points, weights, scale = found["points"], found["weights"], found["scale"]
        np.testing.assert_allclose((points.min(axis=0), points.max(axis=0)), found["boxes"][0], atol=1e-6)
        assert weights.sum() == pytest.approx(area * scale**2, rel=1e-5)
        source = (points - found["translation"]) / scale
        quality = found["quality"]
        np.testing.assert_allclose(source.min(axis=0), quality["bounds_min"], atol=1e-5)
        np.testing.assert_allclose(source.max(axis=0), quality["bounds_max"], atol=1e-5)
