"""Import an asset and turn it into a still scene in [-1, 1]^3.

    import -> make what evaluates equal what renders -> freeze (evaluated meshes, one pose) -> bounds in float64
    -> drop strays -> place copies in a scene of our own -> drop everything that was imported -> check

Published scripts scale the imported objects in place, and each fails on at least one of: several roots, loose bounding
boxes, instances, hidden objects, imported cameras and lights, an animation that goes on between the views. Here the
depsgraph's instances are copied as static meshes into a fresh scene, so nothing of the file but surfaces and materials
can reach the picture. Vertices are not baked: each copy is placed by one matrix composed in float64, with shear and
mirroring, and so custom normals and generated coordinates survive. Freezing costs 5 to 50 ms for 100k triangles.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bpy
import numpy as np
from mathutils import Matrix
from numpy.typing import NDArray

from pipeline.spec import RenderSpec
from pipeline.types import AssetError, FailureKind, Float64, Normalization
from render.geometry import BoolArray, Triangles, bounds, find_strays, surface_points, thin
from render.importers import import_asset
from render.materials import check_images, complete_materials, is_transparent, is_untextured, used_images
from render.normals import mend_normals
from render.pose import Pose, choose_pose
from render.textures import limit_textures

FAR_RATIO = 16.0
"""Beyond this many extents from the origin an object is moved near it before its matrices, float32, are read."""

_BOUNDS_TOLERANCE = 1e-3
_EXTENTS = (1e-18, 1e18)  # beyond, products of Blender's float32 overflow or vanish


@dataclass(slots=True, eq=False)
class Part:
    """One instance of one frozen mesh: `matrix` [4, 4] is world_from_local in source units, float64."""

    mesh: Any
    matrix: Float64
    triangles: Triangles
    polygons: NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedScene:
    """What stands in Blender's current scene.

    Attributes:
        normalization: the similarity that took the source to the world.
        quality: facts for the sample's quality.
        points: [N, 3] in world units; the surface lies in their convex hull, which is at most 1/256 wider than it. They
            are the corners of all faces, or, where those are too many, what `render.geometry.thin` makes of them.
        weights: [N] the area of the surface that each point stands for, in square world units; they add up to its area.
        textures_s: seconds of decoding the file's images, which importers leave to first use, and of scaling them.
    """

    normalization: Normalization
    quality: dict[str, Any]
    points: Float64
    weights: Float64
    textures_s: float


@dataclass(slots=True)
class _Limits:
    max_triangles: int
    expected_triangles: int | None
    min_triangle_share: float
    num_triangles: int = field(default=0)

    def add(self, num_triangles: int) -> None:
        self.num_triangles += num_triangles
        if self.num_triangles > self.max_triangles:
            raise AssetError(
                FailureKind.TOO_LARGE,
                f"the scene has more than {self.max_triangles} triangles (admission.max_triangles)",
            )


def reset() -> None:
    """Empty Blender: no object, image or orphan of the last asset is left; preferences are kept."""
    # read_homefile keeps the chosen render devices, which read_factory_settings would forget.
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    bpy.context.preferences.filepaths.use_scripts_auto_execute = False


def load(
    path: Path | None,
    format_name: str,
    procedural_seed: int | None,
    scratch_dir: Path,
    *,
    animated: bool = True,
) -> None:
    """Fill the empty scene: from a file, or from a seed for procedural assets.

    Args:
        path: the asset's file; None for a procedural asset.
        format_name: the file's format, as `import_asset` knows it.
        procedural_seed: the seed of a procedural asset; None for a file.
        scratch_dir: where a rewritten copy of the file may be put.
        animated: whether the file's animations are wanted; not for the rest pose.
    """
    if procedural_seed is not None:
        from render.procedural import build

        build(procedural_seed)
    elif path is not None:
        import_asset(path, format_name, scratch_dir, animated=animated)
    else:
        raise AssetError(FailureKind.INTERNAL, f"a {format_name} asset came without a file")


def prepare(
    spec: RenderSpec,
    seed: int,
    *,
    max_triangles: int,
    expected_triangles: int | None,
    min_triangle_share: float,
) -> PreparedScene:
    """Freeze, normalise and place what was imported; afterwards the current scene holds nothing else.

    Args:
        spec: its `pose`, `frames` and `max_texture_px` are used.
        seed: the sample's seed.
        max_triangles: the most that the scene may hold, instances counted each.
        expected_triangles: what the file's header promises, where that is known.
        min_triangle_share: the least share of it that must have come in.

    Raises:
        AssetError: EMPTY_SCENE, DEGENERATE_GEOMETRY, TOO_LARGE, PARTIAL_IMPORT or MISSING_TEXTURE.
    """
    limits = _Limits(max_triangles, expected_triangles, min_triangle_share)
    pose = choose_pose(spec, seed)
    _show_what_renders()
    pose.show()
    parts = _collect(limits)
    triangles, stray, low, high = _measure(parts, limits)
    shift = np.zeros(3)
    if _is_far(low, high):
        shift, parts = _bring_near((low + high) / 2, parts, limits, pose)
        triangles, stray, low, high = _measure(parts, limits)
    scale = 2.0 / float((high - low).max())
    centre = (low + high) / 2
    parts = _drop_strays(parts, stray)
    meshes = _unique_meshes(parts)
    opposed, faces = np.sum([mend_normals(mesh) for mesh in meshes], axis=0)
    for mesh in meshes:
        complete_materials(mesh)
    materials = {m.name: m for mesh in meshes for m in mesh.materials}
    images = used_images(materials.values())
    before = time.perf_counter()
    textures = limit_textures(images, spec.max_texture_px)
    textures_s = time.perf_counter() - before
    check_images(images)
    _place(parts, scale, centre)
    points, weights = _placed_surface()
    _check_placed(points)
    quality = {
        "num_triangles": int((~stray).sum()),
        "num_triangles_file": expected_triangles,
        "num_meshes": len(parts),
        "num_materials": len(materials),
        "num_images": len(images),
        **textures,
        "untextured": is_untextured(meshes),
        "transparent": is_transparent(materials.values()),
        **pose.record(),
        "reversed_normals_share": float(opposed / faces),
        "stray": {
            "num_triangles": int(stray.sum()),
            "area_share": float(triangles.area[stray].sum() / triangles.area.sum()),
        },
        "bounds_min": (low - shift).tolist(),
        "bounds_max": (high - shift).tolist(),
    }
    # A point p of the source was seen at p + shift, and stands at scale * (p + shift - centre).
    normalization = Normalization(scale=scale, rotation=np.eye(3), translation=scale * (shift - centre))
    points, weights = thin(points, weights)
    return PreparedScene(
        normalization=normalization, quality=quality, points=points, weights=weights, textures_s=textures_s
    )


def _show_what_renders() -> None:
    """Make the evaluated scene the rendered one: the depsgraph that scripts see is the viewport's."""
    scene, layer = bpy.context.scene, bpy.context.view_layer
    scene.render.use_simplify = False
    waiting = [layer.layer_collection]
    while waiting:
        item = waiting.pop()
        item.hide_viewport = False
        item.collection.hide_viewport = item.collection.hide_render
        waiting.extend(item.children)
    for collection in bpy.data.collections:
        collection.hide_viewport = collection.hide_render
    for obj in scene.objects:
        obj.hide_viewport = obj.hide_render
        if obj.name in layer.objects:
            obj.hide_set(False)
        obj.show_instancer_for_viewport = obj.show_instancer_for_render
        for modifier in obj.modifiers:
            modifier.show_viewport = modifier.show_render
            if modifier.type in ("SUBSURF", "MULTIRES"):
                modifier.levels = modifier.render_levels
        if obj.type == "META":
            obj.data.resolution = obj.data.render_resolution


def _collect(limits: _Limits) -> list[Part]:
    """Copy every visible surface of the evaluated scene, instances included; meshes that instances share once."""
    limits.num_triangles = 0
    bpy.context.view_layer.update()
    depsgraph = bpy.context.evaluated_depsgraph_get()
    frozen: dict[Any, tuple[Any, Float64, NDArray[np.int32], NDArray[np.int32]] | None] = {}
    parts = []
    for instance in depsgraph.object_instances:
        obj = instance.object
        # A curve, text or metaball comes twice: as itself, and as an instance of the mesh that it evaluates to.
        if obj.type != "MESH" or not instance.show_self or not obj.visible_camera:
            continue
        # The data's address tells evaluated meshes apart; materials may also hang on the object's slots.
        names = tuple(slot.material and slot.material.name for slot in obj.material_slots)
        key = (obj.data.as_pointer(), names)
        if key not in frozen:
            frozen[key] = _freeze(instance, depsgraph)
        still = frozen[key]
        if still is None:
            continue
        mesh, vertices, triangles, polygons = still
        limits.add(len(triangles))
        matrix = np.array(instance.matrix_world, np.float64)
        parts.append(Part(mesh, matrix, Triangles.from_mesh(vertices, triangles, matrix), polygons))
    return parts


def _freeze(instance: Any, depsgraph: Any) -> tuple[Any, Float64, NDArray[np.int32], NDArray[np.int32]] | None:
    """Return a static copy of an evaluated instance: (mesh, vertices [V, 3], triangles [T, 3], polygon of each [T]).

    None for an object without faces: points and lines have no surface to render.
    """
    obj = instance.object
    if instance.is_instance and instance.parent == instance.instance_object:
        # A part of the object's own geometry, as geometry nodes make: new_from_object would copy the object's main mesh
        # instead, which may be empty.
        mesh = obj.data.copy()
    else:
        mesh = bpy.data.meshes.new_from_object(obj, preserve_all_data_layers=True, depsgraph=depsgraph)
    if len(mesh.polygons) == 0:
        bpy.data.meshes.remove(mesh)
        return None
    return mesh, _vertices(mesh), *_triangles(mesh)


def _triangles(mesh: Any) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the vertex indexes [T, 3] of a mesh's triangles, and the polygon [T] that each is of."""
    if len(mesh.loops) == 3 * len(mesh.polygons):
        # All are triangles, as in most files: their corners are one copy, where Blender is asked one by one (12 ms for
        # 100k).
        corners = np.empty(len(mesh.loops), np.int32)
        mesh.attributes[".corner_vert"].data.foreach_get("value", corners)
        return corners.reshape(-1, 3), np.arange(len(mesh.polygons), dtype=np.int32)
    mesh.calc_loop_triangles()
    triangles = np.empty((len(mesh.loop_triangles), 3), np.int32)
    mesh.loop_triangles.foreach_get("vertices", triangles.reshape(-1))
    polygons = np.empty(len(mesh.loop_triangles), np.int32)
    mesh.loop_triangles.foreach_get("polygon_index", polygons)
    return triangles, polygons


def _vertices(mesh: Any) -> Float64:
    """Return the vertices [V, 3] of a mesh in its own units."""
    flat = np.empty(len(mesh.vertices) * 3, np.float32)
    mesh.vertices.foreach_get("co", flat)
    return flat.reshape(-1, 3).astype(np.float64)


def _measure(parts: list[Part], limits: _Limits) -> tuple[Triangles, BoolArray, Float64, Float64]:
    """Return all triangles, the mask of strays, and the corners of the box around the rest, in source units."""
    if not parts:
        raise AssetError(FailureKind.EMPTY_SCENE, "nothing with a surface is visible to the render")
    triangles = Triangles.concatenate([part.triangles for part in parts])
    expected = limits.expected_triangles
    if expected is not None and len(triangles) < limits.min_triangle_share * expected:
        raise AssetError(
            FailureKind.PARTIAL_IMPORT,
            f"{len(triangles)} of the file's {expected} triangles came in; "
            f"at least {limits.min_triangle_share:.0%} must (admission.min_triangle_share)",
        )
    if not (np.isfinite(triangles.lo).all() and np.isfinite(triangles.hi).all()):
        count = int((~np.isfinite(triangles.lo) | ~np.isfinite(triangles.hi)).any(axis=1).sum())
        raise AssetError(FailureKind.DEGENERATE_GEOMETRY, f"{count} triangles have corners that are not finite")
    stray = find_strays(triangles)
    low, high = bounds(triangles, ~stray)
    extent = float((high - low).max())
    if not (_EXTENTS[0] < extent < _EXTENTS[1] and triangles.area.sum() > 0):
        raise AssetError(
            FailureKind.DEGENERATE_GEOMETRY,
            f"{len(triangles)} triangles span {extent:g} units with an area of {triangles.area.sum():g}",
        )
    return triangles, stray, low, high


def _is_far(low: Float64, high: Float64) -> bool:
    return float(np.abs(low + high).max() / 2) > FAR_RATIO * float((high - low).max())


def _bring_near(centre: Float64, parts: list[Part], limits: _Limits, pose: Pose) -> tuple[Float64, list[Part]]:
    """Move the roots by -centre and evaluate again: at 1e6 units float32 resolves 0.06.

    Returns the shift [3] as Blender stored it, and the parts read anew. delta_location adds to an animated location,
    where a new location would be overwritten. If a constraint holds the object in place, nothing is shifted.
    """
    roots = [obj for obj in bpy.context.scene.objects if obj.parent is None]
    before = [tuple(obj.delta_location) for obj in roots]
    shift = (-centre).astype(np.float32)
    for obj, delta in zip(roots, before, strict=True):
        obj.delta_location = [float(a + b) for a, b in zip(delta, shift, strict=True)]
    _discard(parts)
    pose.show()
    near = _collect(limits)
    everything = Triangles.concatenate([part.triangles for part in near])
    low, high = bounds(everything, ~find_strays(everything))
    if np.abs((low + high) / 2).max() < np.abs(centre).max() / 2 and not any(any(delta) for delta in before):
        return shift.astype(np.float64), near
    for obj, delta in zip(roots, before, strict=True):
        obj.delta_location = delta
    _discard(near)
    pose.show()
    return np.zeros(3), _collect(limits)


def _discard(parts: list[Part]) -> None:
    bpy.data.batch_remove(_unique_meshes(parts))


def _unique_meshes(parts: list[Part]) -> list[Any]:
    return list({part.mesh.name: part.mesh for part in parts}.values())


def _drop_strays(parts: list[Part], stray: BoolArray) -> list[Part]:
    """Return the parts without their stray triangles; a mesh that loses some of them is copied first."""
    kept, start = [], 0
    for part in parts:
        mask = stray[start : start + len(part.triangles)]
        start += len(part.triangles)
        if mask.all():
            continue
        if mask.any():
            part.mesh = _without_polygons(part.mesh, np.unique(part.polygons[mask]))
        kept.append(part)
    return kept


def _without_polygons(mesh: Any, polygons: NDArray[np.int32]) -> Any:
    import bmesh  # type: ignore[import-not-found]  # exists after bpy only

    copy = mesh.copy()
    edit = bmesh.new()
    try:
        edit.from_mesh(copy)
        edit.faces.ensure_lookup_table()
        bmesh.ops.delete(edit, geom=[edit.faces[i] for i in polygons], context="FACES")
        edit.to_mesh(copy)
    finally:
        edit.free()
    return copy


def _place(parts: list[Part], scale: float, centre: Float64) -> None:
    """Put the parts into a new scene, normalised, and remove all else from the file."""
    imported = [*bpy.data.objects]
    stage = bpy.data.scenes.new("lrm")
    # A matrix as parent inverse is used as it is, shear and mirroring included; an object's own location, rotation and
    # scale could not hold it.
    origin = bpy.data.objects.new("lrm origin", None)
    stage.collection.objects.link(origin)
    local = {mesh.name: _localise(mesh) for mesh in _unique_meshes(parts)}
    normalise = np.diag([scale, scale, scale, 1.0])
    normalise[:3, 3] = -scale * centre
    for i, part in enumerate(parts):
        obj = bpy.data.objects.new(f"lrm part {i}", part.mesh)
        obj.parent = origin
        obj.matrix_parent_inverse = Matrix(normalise @ part.matrix @ local[part.mesh.name])
        stage.collection.objects.link(obj)
    bpy.context.window.scene = stage
    for scene in [scene for scene in bpy.data.scenes if scene != stage]:
        bpy.data.scenes.remove(scene)
    bpy.data.batch_remove(imported)
    _still_materials()
    for blocks in (bpy.data.actions, bpy.data.worlds, bpy.data.collections, bpy.data.texts, bpy.data.libraries):
        bpy.data.batch_remove([*blocks])
    bpy.data.orphans_purge(do_recursive=True)


def _localise(mesh: Any) -> Float64:
    """Bring far-off, tiny or huge local vertices near unit size; return local_from_new [4, 4].

    A mesh at 1e6 with its vertices written out, or one of 1e-9 units whose face normals underflow, is repaired as far
    as its float32 vertices allow. The factor is a power of two, and so exact.
    """
    vertices = _vertices(mesh)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    extent, centre = float((high - low).max()), (low + high) / 2
    far = float(np.abs(centre).max()) > FAR_RATIO * extent
    odd = not 1e-3 <= extent <= 1e3
    if extent == 0 or not (far or odd):
        return np.eye(4)
    factor = 2.0 ** -round(np.log2(extent))
    offset = centre if far else np.zeros(3)
    mesh.vertices.foreach_set("co", ((vertices - offset) * factor).astype(np.float32).reshape(-1))
    mesh.update()
    out = np.diag([1 / factor, 1 / factor, 1 / factor, 1.0])
    out[:3, 3] = offset
    return out


def _still_materials() -> None:
    """Drop what animates materials, textures and shape keys, so that nothing changes between views."""
    for group in (bpy.data.materials, bpy.data.node_groups, bpy.data.meshes, bpy.data.images):
        for block in group:
            if hasattr(block, "animation_data_clear"):
                block.animation_data_clear()
            tree = getattr(block, "node_tree", None)
            if tree is not None:
                tree.animation_data_clear()


def _placed_surface() -> tuple[Float64, Float64]:
    """Return the corners [N, 3] of all faces of the placed scene, as it evaluates, and the area [N] that each bears."""
    bpy.context.view_layer.update()
    depsgraph = bpy.context.evaluated_depsgraph_get()
    meshes: dict[int, tuple[Float64, NDArray[np.int32]]] = {}
    parts = []
    for instance in depsgraph.object_instances:
        if instance.object.type == "MESH":
            mesh = instance.object.data
            key = mesh.as_pointer()
            if key not in meshes:
                meshes[key] = _vertices(mesh), _triangles(mesh)[0]
            parts.append(surface_points(*meshes[key], np.array(instance.matrix_world, np.float64)))
    points, weights = zip(*parts, strict=True)
    return np.concatenate(points), np.concatenate(weights)


def _check_placed(points: Float64) -> None:
    """Assert that the evaluated scene fills [-1, 1]^3 and does not leave it: guards every step before."""
    largest = float(np.abs(points).max())
    if abs(largest - 1) > _BOUNDS_TOLERANCE:
        raise AssetError(
            FailureKind.INTERNAL, f"the placed scene reaches {largest:.6f} from the origin along an axis; 1 is required"
        )
