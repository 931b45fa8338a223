"""The embedded default source: seeded compositions of textured primitives, as in LRM-Zero (arXiv 2406.09371).

A model trained on such objects learns to reconstruct real ones, so a pipeline with no network, no account and no assets
still makes data worth training on. An object is a recipe's parts (`procedural_recipes`), made of numpy meshes
(`procedural_shapes`), with up to four materials whose images are numpy too (`procedural_textures`). Blender only cuts
the booleans, thickens the wireframes and stores the result, so the object is a pure function of its seed: the same
vertices and pixels in any process, whatever was built before.

Cost on one core: about 0.15 s an object (0.5 s at most in 200), most of it textures; 500 to 50,000 triangles, half of
the objects under 12,000. The road not taken is shader nodes for the textures: they render at any resolution, but do not
survive an export to GLB and cannot be digested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bpy
import numpy as np
from numpy.typing import NDArray

from pipeline.types import derive_seed
from render.procedural_recipes import MAIN, RECIPES, TRIM, Part
from render.procedural_shapes import TAU, Mesh, rotation
from render.procedural_textures import TEXTURES, palette, texture
from render.versions import node_tree

SHARP_ANGLE_RAD = np.deg2rad(35)
_MAIN_PX, _OTHER_PX = 512, 256


def build(seed: int) -> None:
    """Fill the current scene, which must be empty, with the object of `seed`: z up, about two units large."""
    shapes, looks = np.random.default_rng(derive_seed("procedural", seed)).spawn(2)
    parts = RECIPES[int(shapes.integers(len(RECIPES)))](shapes)
    meshes = [_finished(part) for part in parts]
    yaw = shapes.uniform(0, TAU)
    tilt = shapes.uniform(0, TAU) if shapes.random() < 0.08 else 0.0  # a few lie on their side, as found assets do
    materials = _materials(looks)
    for i, (part, mesh) in enumerate(zip(parts, meshes, strict=True)):
        roles = [part.material, part.cut_material] if part.cutters else [part.material]
        data = _to_blender(f"part_{i}", mesh.transformed(rotation("z", yaw) @ rotation("x", tilt)))
        for role in roles:
            data.materials.append(materials[role])
        data.polygons.foreach_set("material_index", mesh.slots.clip(0, len(roles) - 1).astype(np.int32))
        _linked(f"part_{i}", data)
    bpy.context.view_layer.update()


def export_glb(seed: int, path: Path) -> None:
    """Write the object of `seed` as a GLB with its textures inside; the current scene is lost."""
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    build(seed)
    bpy.ops.export_scene.gltf(filepath=str(path), export_format="GLB", export_yup=True, export_apply=False)


def _finished(part: Part) -> Mesh:
    """Return a part's mesh after its wireframe or its cuts; a cut that leaves nothing sound is not made."""
    if part.wire > 0:
        wire = _evaluated(part.mesh, lambda obj: _add_wireframe(obj, part.wire))
        return _box_mapped(wire) if _is_sound(wire, 0.0) else part.mesh
    mesh = part.mesh
    for cutter in part.cutters:
        for solver in ("MANIFOLD", "EXACT"):  # the first is 7 times faster, and was right in 225 of 225 cuts
            cut = _boolean(mesh, cutter.with_slot(1), solver)
            if _is_sound(cut, 0.12 * _volume(part.mesh)):
                mesh = cut
                break
    return mesh


def _is_sound(mesh: Mesh, least_volume: float) -> bool:
    """Return whether a mesh has faces, only finite coordinates and at least this signed volume."""
    finite = np.isfinite(mesh.vertices).all() and np.isfinite(mesh.uv).all()
    return bool(len(mesh.sizes) >= 4 and finite and _volume(mesh) > least_volume)


def _volume(mesh: Mesh) -> float:
    """Return the signed volume of a closed mesh, by fans of tetrahedra about the origin."""
    starts = np.cumsum(mesh.sizes) - mesh.sizes
    following = np.arange(1, len(mesh.corners) + 1)
    following[starts + mesh.sizes - 1] = starts
    point = mesh.vertices[mesh.corners]
    first = np.repeat(mesh.vertices[mesh.corners[starts]], mesh.sizes, axis=0)
    return float(np.einsum("ij,ij->i", first, np.cross(point, point[following])).sum() / 6)


def _boolean(body: Mesh, cutter: Mesh, solver: str) -> Mesh:
    """Return body minus cutter; the cut faces keep the cutter's slot and texture coordinates."""
    tool_data = _to_blender("cutter", cutter)
    tool = _linked("cutter", tool_data)

    def add(obj: Any) -> None:
        modifier = obj.modifiers.new("cut", "BOOLEAN")
        modifier.operation, modifier.solver, modifier.object = "DIFFERENCE", solver, tool

    try:
        return _evaluated(body, add)
    finally:
        bpy.data.objects.remove(tool)
        bpy.data.meshes.remove(tool_data)


def _evaluated(mesh: Mesh, add_modifier: Callable[[Any], None]) -> Mesh:
    """Return a mesh after a modifier that `add_modifier` puts on its temporary object."""
    data = _to_blender("work", mesh)
    obj = _linked("work", data)
    try:
        add_modifier(obj)
        return _from_blender(obj.evaluated_get(bpy.context.evaluated_depsgraph_get()).data)
    finally:
        bpy.data.objects.remove(obj)
        bpy.data.meshes.remove(data)


def _linked(name: str, data: Any) -> Any:
    """Return a new object in the scene that shows a mesh."""
    obj = bpy.data.objects.new(name, data)
    bpy.context.scene.collection.objects.link(obj)
    return obj


def _add_wireframe(obj: Any, thickness: float) -> None:
    """Give an object bars of this thickness along its edges instead of faces."""
    modifier = obj.modifiers.new("wire", "WIREFRAME")
    modifier.thickness, modifier.use_even_offset, modifier.offset = thickness, False, 0.0


def _to_blender(name: str, mesh: Mesh) -> Any:
    """Return a Blender mesh with texture coordinates, shaded smooth but for edges sharper than SHARP_ANGLE_RAD."""
    data = bpy.data.meshes.new(name)
    data.vertices.add(len(mesh.vertices))
    data.vertices.foreach_set("co", mesh.vertices.astype(np.float32).reshape(-1))
    data.loops.add(len(mesh.corners))
    data.loops.foreach_set("vertex_index", mesh.corners.astype(np.int32))
    data.polygons.add(len(mesh.sizes))
    data.polygons.foreach_set("loop_start", (np.cumsum(mesh.sizes) - mesh.sizes).astype(np.int32))
    data.polygons.foreach_set("material_index", mesh.slots.astype(np.int32))
    data.polygons.foreach_set("use_smooth", np.ones(len(mesh.sizes), bool))
    data.uv_layers.new(name="UVMap").uv.foreach_set("vector", mesh.uv.astype(np.float32).reshape(-1))
    data.update(calc_edges=True)
    data.set_sharp_from_angle(angle=SHARP_ANGLE_RAD)
    return data


def _from_blender(data: Any) -> Mesh:
    """Return the numpy mesh of a Blender mesh."""
    num_loops, num_faces = len(data.loops), len(data.polygons)
    vertices = np.empty(3 * len(data.vertices), np.float32)
    data.vertices.foreach_get("co", vertices)
    corners, sizes, slots = np.empty(num_loops, np.int32), np.empty(num_faces, np.int32), np.empty(num_faces, np.int32)
    data.loops.foreach_get("vertex_index", corners)
    data.polygons.foreach_get("loop_total", sizes)
    data.polygons.foreach_get("material_index", slots)
    uv = np.zeros(2 * num_loops, np.float32)
    if data.uv_layers:
        data.uv_layers[0].uv.foreach_get("vector", uv)
    return Mesh(
        vertices=vertices.reshape(-1, 3).astype(np.float64),
        corners=corners.astype(np.int64),
        sizes=sizes.astype(np.int64),
        uv=uv.reshape(-1, 2).astype(np.float64),
        slots=slots.astype(np.int64),
    )


def _box_mapped(mesh: Mesh) -> Mesh:
    """Return the mesh with texture coordinates projected along each face's main axis, one repeat a unit."""
    starts = np.cumsum(mesh.sizes) - mesh.sizes
    point = mesh.vertices[mesh.corners]
    across = np.cross(point[starts + 1] - point[starts], point[starts + 2] - point[starts])
    axis = np.repeat(np.abs(across).argmax(1), mesh.sizes)
    keep = np.array([[1, 2], [0, 2], [0, 1]])[axis]
    return replace(mesh, uv=np.take_along_axis(point, keep, 1))


def _materials(rng: np.random.Generator) -> list[Any]:
    """Return the four materials of an object by role: three textured, one plain."""
    colors = palette(rng)
    kinds = rng.permutation(list(TEXTURES))
    materials = []
    for role in range(TRIM):
        size_px = _MAIN_PX if role == MAIN else _OTHER_PX
        # Roles see the palette in another order, so that their parts tell apart even where the pattern is alike.
        order = np.concatenate([np.roll(np.arange(3), role), [3, 4]])
        pixels = texture(rng, str(kinds[role]), size_px, colors[order])
        metallic = rng.uniform(0.6, 1.0) if rng.random() < 0.08 else 0.0
        material = _material(f"material_{role}", rng.uniform(0.35, 0.95), metallic)
        _add_texture(material, f"texture_{role}", pixels)
        materials.append(material)
    plain = _material("material_plain", rng.uniform(0.3, 0.8), 0.9 if rng.random() < 0.15 else 0.0)
    color = colors[int(rng.integers(5))].astype(np.float64)
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    plain.node_tree.nodes["Principled BSDF"].inputs["Base Color"].default_value = (*linear, 1.0)
    return [*materials, plain]


def _material(name: str, roughness: float, metallic: float) -> Any:
    """Return an opaque Principled material."""
    material = bpy.data.materials.new(name)
    shader = node_tree(material).nodes["Principled BSDF"]
    shader.inputs["Roughness"].default_value = roughness
    shader.inputs["Metallic"].default_value = metallic
    return material


def _add_texture(material: Any, name: str, pixels: NDArray[np.uint8]) -> None:
    """Show an sRGB image [n, n, 3], 8-bit, first row at v = 0, as the base colour; the image is packed as PNG."""
    n = len(pixels)
    image = bpy.data.images.new(name, n, n)
    rgba = np.ones((n, n, 4), np.float32)
    rgba[..., :3] = pixels / np.float32(255)
    image.pixels.foreach_set(rgba.reshape(-1))
    image.pack()
    nodes, links = material.node_tree.nodes, material.node_tree.links
    node = nodes.new("ShaderNodeTexImage")
    node.image = image
    links.new(node.outputs["Color"], nodes["Principled BSDF"].inputs["Base Color"])
