"""What differs between Blender 4.5 and 5.2, held against the Blender that runs these tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.sample import decode_rgba
from pipeline.types import AssetError, FailureKind
from render.worker import RenderWorker
from tests.render.conftest import BLENDER_5, Render, asset_of, make_spec
from tests.render.files import CUBE_TRIANGLES, CUBE_VERTICES, Glb, one_mesh_glb, write_obj

pytestmark = [pytest.mark.blender, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]
EMPTY = "import bpy, sys; bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)\n"


def run_blender(tmp_path: Path, script: str, *args: str) -> Any:
    """Run a script in an empty Blender of its own; return what it left in `out`, as JSON."""
    result = tmp_path / "out.json"
    tail = "\nimport json, os; open(sys.argv[1], 'w').write(json.dumps(globals().get('out'))); os._exit(0)"
    done = subprocess.run(
        [sys.executable, "-c", EMPTY + script + tail, str(result), *args],
        check=False,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # bpy leaves a temporary folder behind
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(result.read_text())


def test_every_row_of_the_table_is_true_of_this_blender(tmp_path: Path) -> None:
    script = """
from render import versions
bpy.context.scene.render.engine = "CYCLES"
out = {
    "rows": {name: [row.old, row.new, row.is_new()] for name, row in versions.DIFFERENCES.items()},
    "functions": [name for name in vars(versions) if not name.startswith("_")],
    "settings": {path: versions._has(path) for path, _, _ in versions.LATER_SETTINGS},
}
"""
    found = run_blender(tmp_path, script)
    assert {name: row[2] for name, row in found["rows"].items()} == dict.fromkeys(found["rows"], BLENDER_5)
    assert all(old and new and old != new for old, new, _ in found["rows"].values())
    assert set(found["rows"]) <= set(found["functions"])
    assert set(found["settings"].values()) == {BLENDER_5}


def test_settings_that_came_later_are_set(tmp_path: Path) -> None:
    script = """
from render import versions
scene, layer = bpy.context.scene, bpy.context.view_layer
scene.render.engine = "CYCLES"
there = [(*versions._owner(path), value) for path, value, _ in versions.LATER_SETTINGS if versions._has(path)]
for owner, name, value in there:
    setattr(owner, name, not value)
versions.set_later_settings()
out = [getattr(owner, name) == value for owner, name, value in there]
"""
    assert run_blender(tmp_path, script) == [True] * (7 if BLENDER_5 else 0)


def test_nothing_deprecated_is_touched(tmp_path: Path) -> None:
    # Recorded and not raised: Blender's setters swallow an exception in the middle of a warning.
    script = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from render import lighting, materials, procedural
    procedural.build(3)
    lighting.set_lights("studio", 1)
    lighting.show_white_behind()
    mesh = bpy.data.meshes.new("bare")
    materials.complete_materials(mesh)
out = [str(one.message) for one in caught if "Blender" in str(one.message)]
"""
    assert run_blender(tmp_path, script) == []


DAE = """<?xml version="1.0"?><COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1"><asset>
<unit name="meter" meter="1"/><up_axis>Z_UP</up_axis></asset><library_geometries><geometry id="g"><mesh>
<source id="p"><float_array id="a" count="24">{points}</float_array><technique_common>
<accessor source="#a" count="8" stride="3"><param name="X" type="float"/><param name="Y" type="float"/>
<param name="Z" type="float"/></accessor></technique_common></source>
<vertices id="v"><input semantic="POSITION" source="#p"/></vertices>
<triangles count="12"><input semantic="VERTEX" source="#v" offset="0"/><p>{corners}</p></triangles></mesh></geometry>
</library_geometries><library_visual_scenes><visual_scene id="s"><node id="n"><instance_geometry url="#g"/></node>
</visual_scene></library_visual_scenes><scene><instance_visual_scene url="#s"/></scene></COLLADA>"""

EXPORT = {
    "gltf": "bpy.ops.export_scene.gltf(filepath=path, export_format='GLTF_SEPARATE')",
    "fbx": "bpy.ops.export_scene.fbx(filepath=path)",
    "stl": "bpy.ops.wm.stl_export(filepath=path)",
    "ply": "bpy.ops.wm.ply_export(filepath=path)",
    "usda": "bpy.ops.wm.usd_export(filepath=path)",
    "usdc": "bpy.ops.wm.usd_export(filepath=path)",
    "usdz": "bpy.ops.wm.usd_export(filepath=path)",
    "blend": "bpy.ops.wm.save_as_mainfile(filepath=path)",
}


def write_cube(tmp_path: Path, suffix: str) -> Path:
    path = tmp_path / f"cube.{suffix}"
    if suffix == "dae":
        numbers = (CUBE_VERTICES, CUBE_TRIANGLES)
        points, corners = (" ".join(map(str, array.reshape(-1).tolist())) for array in numbers)
        path.write_text(DAE.format(points=points, corners=corners))
    elif suffix == "obj":
        write_obj(path, [(CUBE_VERTICES, CUBE_TRIANGLES, (1, 0, 0))])
    elif suffix == "glb":
        one_mesh_glb(path)
    else:
        script = f"path = sys.argv[2]\nbpy.ops.mesh.primitive_cube_add(size=1)\n{EXPORT[suffix]}"
        run_blender(tmp_path, script, str(path))
    return path


@pytest.mark.parametrize("suffix", ["glb", "obj", *EXPORT])
def test_a_cube_of_every_format_comes_in(render: Render, tmp_path: Path, suffix: str) -> None:
    sample = render(write_cube(tmp_path, suffix))
    assert sample.quality["num_triangles"] == 12
    size = np.subtract(sample.quality["bounds_max"], sample.quality["bounds_min"])
    assert size / size[0] == pytest.approx([1, 1, 1], abs=1e-6)


def refused(render: Render, path: Path, message: str) -> None:
    with pytest.raises(AssetError, match=message) as caught:
        render(path)
    assert caught.value.kind is FailureKind.UNSUPPORTED_FORMAT


def test_collada_is_read_or_a_true_failure(render: Render, tmp_path: Path) -> None:
    path = write_cube(tmp_path, "dae")
    if BLENDER_5:
        refused(
            render, path, r"dae: Blender 5\..* has no importer for it \(wm.collada_import\); convert the file to glb"
        )
    else:
        assert render(path).quality["num_triangles"] == 12


@pytest.mark.skipif(not BLENDER_5, reason="bpy 4.5 brings its Draco decoder")
def test_draco_without_its_decoder_is_a_true_failure(render: Render, tmp_path: Path) -> None:
    glb = Glb()
    glb.scene(glb.node(mesh=glb.mesh()))
    glb.document["extensionsUsed"] = ["KHR_draco_mesh_compression"]
    refused(render, glb.write(tmp_path / "draco.glb"), r"glb: it is compressed with Draco, and bpy 5\.")


def test_a_blend_file_of_a_later_blender_is_refused(render: Render, tmp_path: Path) -> None:
    path = write_cube(tmp_path, "blend")
    data = path.read_bytes()
    old, new = (b"v0502", b"v0599") if BLENDER_5 else (b"v405", b"v499")
    assert old in data[:32]
    path.write_bytes(data.replace(old, new, 1))
    refused(render, path, r"blend: written by Blender \d\.99, and \d\..* drops what it does not know")


COLOURED = """
bpy.ops.mesh.primitive_cube_add(size=1)
material = bpy.data.materials.new("red")
bpy.context.object.data.materials.append(material)
material.node_tree.nodes["Principled BSDF"].inputs["Base Color"].default_value = (0.8, 0.1, 0.05, 1)
if sys.argv[3]:
    bpy.ops.wm.set_working_color_space(working_space=sys.argv[3], convert_colors=True)
bpy.ops.wm.save_as_mainfile(filepath=sys.argv[2])
"""


@pytest.mark.skipif(not BLENDER_5, reason="bpy 4.5 knows one working space")
@pytest.mark.parametrize("space", ["ACEScg", "Linear Rec.2020"])
def test_colours_of_another_working_space_are_the_same(render: Render, tmp_path: Path, space: str) -> None:
    images = []
    for chosen in ("", space):
        folder = tmp_path / f"space{chosen}"
        folder.mkdir()
        path = folder / "red.blend"  # one name, and so one uid: the same cameras, lights and samples
        run_blender(folder, COLOURED, str(path), chosen)
        images.append(decode_rgba(render(path).views[0].planes["rgba"].data).astype(int))
    assert (images[0][..., 3] == 255).any()
    assert np.abs(images[0] - images[1]).max() <= 1


MIXED = """
bpy.ops.mesh.primitive_cube_add(size=1)
material = bpy.data.materials.new("mixed")
bpy.context.object.data.materials.append(material)
if material.node_tree is None:
    material.use_nodes = True
tree = material.node_tree
clear, mix = tree.nodes.new("ShaderNodeBsdfTransparent"), tree.nodes.new("ShaderNodeMixShader")
surface = tree.nodes["Principled BSDF"]
out_node = next(node for node in tree.nodes if node.type == "OUTPUT_MATERIAL")
mix.inputs[0].default_value = 0.3
tree.links.new(clear.outputs[0], mix.inputs[1])
tree.links.new(surface.outputs[0], mix.inputs[2])
tree.links.new(mix.outputs[0], out_node.inputs["Surface"])
bpy.ops.wm.save_as_mainfile(filepath=sys.argv[2])
"""


def test_a_mix_with_a_transparent_shader_is_covered(tmp_path: Path) -> None:
    path = tmp_path / "mixed.blend"
    run_blender(tmp_path, MIXED, str(path))
    spec = make_spec(render={"see_through": "white"})
    with RenderWorker(spec, fingerprint="f", num_threads=2, scratch_dir=tmp_path) as worker:
        sample = worker.render(asset_of(path), path)
    assert sample.quality["transparent"]
    alpha = decode_rgba(sample.views[0].planes["rgba"].data)[..., 3]
    assert (alpha == 255).any()


def test_no_other_module_asks_which_blender_runs() -> None:
    for path in sorted((ROOT / "render").glob("*.py")):
        if path.name != "versions.py":
            used = [
                word for word in ("bpy.app.version_file", "bpy.app.version[", "use_nodes") if word in path.read_text()
            ]
            assert not used, f"{path.name} uses {used}, which belongs into versions.py"
