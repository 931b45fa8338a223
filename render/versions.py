"""What Blender 4.5 and 5.2 say differently: the only place that asks which Blender is running.

Tested are the two long-term releases: 4.5 on Python 3.11 and 5.2 on Python 3.13. The code asks for the thing itself (is
there such an operator, such a property), never for a version number, so that a release in between takes the way that it
has. `DIFFERENCES` names every such thing; a test holds each row against the running Blender, in both versions.

What needs no row, since one call means the same in both: sample subsets, sampling patterns, border and crop, passes and
how an engine reads them, ray visibility, persistent data, denoiser settings, and sockets that were renamed (a Mix
Shader's "Fac" is "Factor" in 5.2, which takes both). Pictures agree to 54 dB or better over 34 test assets (32 samples,
not denoised), so `RENDER_REVISION` is shared; the Blender version is part of the fingerprint, and a corpus never mixes
them unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import bpy

from pipeline.types import AssetError, FailureKind

WORKING_SPACE = "Linear Rec.709"
"""The scene-linear space of all our colours; the only one before Blender 5."""

LATER_SETTINGS: tuple[tuple[str, object, str], ...] = (
    (
        "scene.render.use_texture_cache",
        False,
        "blender_tx/*.tx beside a texture is shown instead of it, also when stale",
    ),
    ("scene.render.use_auto_generate_texture_cache", False, "it writes files beside the textures"),
    ("scene.cycles.texture_resolution_render", 1.0, "a share of each texture's resolution"),
    ("scene.cycles.use_pixel_jitter", False, "moves the whole picture by part of a pixel, for temporal upscalers"),
    ("scene.cycles.volume_biased", False, "ray marching of uneven volumes, all that 4.5 can; even ones are exact"),
    ("view_layer.cycles.denoising_pass_follow_reflections", True, "guides see through mirrors, as always before"),
    ("view_layer.cycles.denoising_pass_use_albedo_roughness_weighting", True, "albedo guide, as always before"),
)
"""Settings that came after 4.5 and change pixels: (path below the context, value, what it does).

Factory settings agree but for the texture cache. On the golden sheet, denoised, the two versions agree to 65 dB;
without the weighting of the albedo guide to 46, with pixel jitter to 24.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that 4.5 and 5.2 say differently.

    Attributes:
        old: how it is in 4.5.
        new: how it is in 5.2.
        is_new: asks the running Blender, by the thing itself.
    """

    old: str
    new: str
    is_new: Callable[[], bool]


def operator(name: str) -> Callable[..., Any] | None:
    """Return bpy.ops.<name> if this Blender has it; the attribute itself always exists."""
    group, _, leaf = name.partition(".")
    found = getattr(getattr(bpy.ops, group), leaf)
    try:
        found.get_rna_type()
    except KeyError:
        return None
    return cast(Callable[..., Any], found)


def importer(format_name: str, name: str) -> Callable[..., Any]:
    """Return the operator that imports a format.

    Raises:
        AssetError: UNSUPPORTED_FORMAT if this Blender has lost it.
    """
    found = operator(name)
    if found is None:
        raise AssetError(
            FailureKind.UNSUPPORTED_FORMAT,
            f"{format_name}: Blender {bpy.app.version_string} has no importer for it ({name}); convert the file to "
            "glb, or render it with bpy 4.5",
        )
    return found


def draco_library() -> Path | None:
    """Return the library by which the glTF importer reads Draco, None where the wheel came without it."""
    try:
        from io_scene_gltf2.io.com.library import dll_path  # type: ignore[import-not-found]  # Blender's add-on
    except ImportError:
        from io_scene_gltf2.io.com.draco import dll_path as old_path  # type: ignore[import-not-found]

        path = old_path()
    else:
        path = dll_path("bf_intern_draco_bridge", "Draco")
    return path if path is not None and path.is_file() else None


def check_blend_version() -> None:
    """Refuse an opened .blend file of a later Blender: what this one does not know was dropped without a word.

    Raises:
        AssetError: UNSUPPORTED_FORMAT.
    """
    written, ours = tuple(bpy.data.version)[:2], tuple(bpy.app.version_file)[:2]
    if written > ours:
        raise AssetError(
            FailureKind.UNSUPPORTED_FORMAT,
            f"blend: written by Blender {written[0]}.{written[1]}, and {bpy.app.version_string} drops what it does not "
            "know; save it in the older format, or render it with a later bpy",
        )


def restore_working_space() -> None:
    """Bring the colours of an opened .blend file into `WORKING_SPACE`, where it has chosen another linear space."""
    colours = getattr(bpy.data, "colorspace", None)
    if colours is not None and colours.working_space != WORKING_SPACE:
        bpy.ops.wm.set_working_color_space(working_space=WORKING_SPACE, convert_colors=True)


def node_tree(block: Any) -> Any:
    """Return the node tree of a material or world that was just made, with its first nodes in place."""
    if block.node_tree is None:
        block.use_nodes = True
    return block.node_tree


def set_later_settings() -> None:
    """Set what came after 4.5 (`LATER_SETTINGS`) in the current scene and view layer, where this Blender has it."""
    for path, value, _ in LATER_SETTINGS:
        owner, name = _owner(path)
        if name in owner.bl_rna.properties:
            setattr(owner, name, value)


def _owner(path: str) -> tuple[Any, str]:
    *parents, name = path.split(".")
    owner: Any = bpy.context
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def _has(path: str) -> bool:
    owner, name = _owner(path)
    return name in owner.bl_rna.properties


def _probe_material() -> bool:
    material = bpy.data.materials.new("probe")
    try:
        return material.node_tree is not None
    finally:
        bpy.data.materials.remove(material)


DIFFERENCES: dict[str, Difference] = {
    "importer": Difference(
        old="COLLADA files are read by wm.collada_import",
        new="there is no COLLADA importer: such files are an unsupported format",
        is_new=lambda: operator("wm.collada_import") is None,
    ),
    "draco_library": Difference(
        old="the wheel brings libextern_draco.so beside the glTF add-on",
        new="the Linux wheels of 5.2.2 and 5.2.3 lack libbf_intern_draco_bridge.so: Draco is an unsupported format",
        is_new=lambda: draco_library() is None,
    ),
    "check_blend_version": Difference(
        old="opens files of 5.x with a warning, and drops what it does not know",
        new="knows all that 4.5 writes",
        is_new=lambda: bpy.app.version_file >= (5, 0, 0),
    ),
    "restore_working_space": Difference(
        old="colours are Linear Rec.709",
        new="a .blend file may choose another space for its colours, such as ACEScg",
        is_new=lambda: hasattr(bpy.data, "colorspace"),
    ),
    "node_tree": Difference(
        old="a new material or world gets its nodes when use_nodes is set",
        new="it has them; use_nodes is true, warns when touched, and goes in 6.0",
        is_new=_probe_material,
    ),
    "set_later_settings": Difference(
        old="textures are read whole",
        new="textures may come from a cache of tiles, on by default",
        is_new=lambda: _has("scene.render.use_texture_cache"),
    ),
}
"""By the name of the function above that hides it."""
