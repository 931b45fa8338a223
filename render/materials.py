"""What the frozen meshes are shaded with: missing textures, vertex colours, and meshes without a material."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import bpy

from pipeline.types import AssetError, FailureKind
from render.versions import node_tree

NEUTRAL_GREY = (0.5, 0.5, 0.5, 1.0)
_MAX_NAMED = 5

# The base colours that importers leave when a file says nothing: Blender's default grey, and white.
_DEFAULT_BASE = (0.8, 1.0)


def reachable_nodes(material: Any) -> Iterator[Any]:
    """Yield the nodes that feed the material's output, groups opened; a node without a link to it shows nothing."""
    if material.node_tree is None:
        return
    outputs = [node for node in material.node_tree.nodes if node.type == "OUTPUT_MATERIAL"]
    waiting = [node for node in outputs if node.is_active_output] or outputs
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if node.as_pointer() in seen:
            continue
        seen.add(node.as_pointer())
        yield node
        waiting.extend(link.from_node for socket in node.inputs for link in socket.links)
        if node.type == "GROUP" and node.node_tree is not None:
            waiting.extend(node.node_tree.nodes)


def used_images(materials: Iterable[Any]) -> list[Any]:
    """Return the images that the materials show, each once, sorted by name."""
    images = {}
    for material in materials:
        for node in reachable_nodes(material):
            image = getattr(node, "image", None)
            if image is not None:
                images[image.name] = image
    return [images[name] for name in sorted(images)]


def check_images(images: Iterable[Any]) -> None:
    """Raise MISSING_TEXTURE if an image has no pixels: Blender would draw it magenta without a word.

    A file that is absent, and one that is there but cannot be read, both leave an image of size 0 x 0.
    """
    missing = sorted(image.name for image in images if 0 in tuple(image.size))
    if missing:
        named = ", ".join(missing[:_MAX_NAMED]) + (" ..." if len(missing) > _MAX_NAMED else "")
        raise AssetError(FailureKind.MISSING_TEXTURE, f"{len(missing)} textures are missing or unreadable: {named}")


def complete_materials(mesh: Any) -> None:
    """Give every slot of a mesh a material, and show vertex colours where nothing else gives colour."""
    has_colours = len(mesh.color_attributes) > 0
    if has_colours and mesh.color_attributes.render_color_index < 0:
        mesh.color_attributes.render_color_index = 0
    if len(mesh.materials) == 0:
        mesh.materials.append(None)
    for slot, material in enumerate(mesh.materials):
        if has_colours and (material is None or _says_nothing(material)):
            mesh.materials[slot] = _plain("vertex colours", vertex_colours=True)
        elif material is None:
            mesh.materials[slot] = _plain("neutral grey", vertex_colours=False)
    _clamp_slots(mesh)


def is_untextured(meshes: Iterable[Any]) -> bool:
    """Whether no image and no vertex colour reaches the surface of any of the meshes."""
    for mesh in meshes:
        for material in mesh.materials:
            for node in reachable_nodes(material):
                shows_colours = node.type == "VERTEX_COLOR" and len(mesh.color_attributes) > 0
                if getattr(node, "image", None) is not None or shows_colours:
                    return False
    return True


def is_transparent(materials: Iterable[Any]) -> bool:
    """Whether light may pass a surface, by transmission or by an alpha below 1."""
    return any(_passes_light(node) for material in materials for node in reachable_nodes(material))


def _passes_light(node: Any) -> bool:
    if node.type in ("BSDF_TRANSPARENT", "BSDF_GLASS", "BSDF_REFRACTION", "HOLDOUT"):
        return True
    if node.type != "BSDF_PRINCIPLED":
        return False
    alpha, transmission = node.inputs["Alpha"], node.inputs["Transmission Weight"]
    return bool(alpha.is_linked or alpha.default_value < 1 or transmission.is_linked or transmission.default_value > 0)


def _says_nothing(material: Any) -> bool:
    nodes = list(reachable_nodes(material))
    if any(node.type in ("TEX_IMAGE", "VERTEX_COLOR", "ATTRIBUTE", "GROUP", "EMISSION") for node in nodes):
        return False
    surfaces = [node for node in nodes if node.type == "BSDF_PRINCIPLED"]
    if len(surfaces) != 1 or surfaces[0].inputs["Base Color"].is_linked:
        return False
    red, green, blue, _ = surfaces[0].inputs["Base Color"].default_value
    return any(max(abs(c - grey) for c in (red, green, blue)) < 1e-4 for grey in _DEFAULT_BASE)


def _plain(name: str, *, vertex_colours: bool) -> Any:
    """Return the one rough, diffuse material of this name in the file, made on first use."""
    found = bpy.data.materials.get(f"lrm {name}")
    if found is not None:
        return found
    material = bpy.data.materials.new(f"lrm {name}")
    surface = next(node for node in node_tree(material).nodes if node.type == "BSDF_PRINCIPLED")
    surface.inputs["Base Color"].default_value = NEUTRAL_GREY
    surface.inputs["Roughness"].default_value = 0.8
    if vertex_colours:
        colours = material.node_tree.nodes.new("ShaderNodeVertexColor")
        material.node_tree.links.new(colours.outputs["Color"], surface.inputs["Base Color"])
    return material


def _clamp_slots(mesh: Any) -> None:
    """Point polygons whose material index has no slot at the last slot, as Blender's viewport does."""
    import numpy as np

    stored = mesh.attributes.get("material_index")
    if stored is None:  # all are of the first slot
        return
    index = np.empty(len(mesh.polygons), np.int32)
    stored.data.foreach_get("value", index)
    if index.size and (index.max() >= len(mesh.materials) or index.min() < 0):
        mesh.polygons.foreach_set("material_index", np.clip(index, 0, len(mesh.materials) - 1))
