"""Open one asset file in Blender: one table from file ending to operator, the same for every version of Blender.

`{'FINISHED'}` proves nothing: Blender says it for a corrupt Draco stream, for random bytes as a texture and for a
COLLADA file of which nothing came in. What came in is checked by `render.scene`; here only loud failures are typed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bpy

from pipeline.types import AssetError, FailureKind
from render import versions
from render.gltf import default_scene_only, extensions_used, without_animations
from render.gltf_decode import decoded_copy

_MAX_CAUSE_CHARS = 300

# (file, folder for rewritten copies, whether animations come in) -> what the operator returns
_Importer = Callable[[Path, Path, bool], Any]


def import_asset(path: Path, format_name: str, scratch_dir: Path, *, animated: bool = True) -> None:
    """Import a file into the current, empty scene.

    Args:
        path: the file.
        format_name: its format, a key of the table below.
        scratch_dir: where a rewritten copy may be put; it must last until the scene is prepared.
        animated: whether animations come in, where the importer leaves the choice (glTF and FBX).

    Raises:
        AssetError: UNSUPPORTED_FORMAT if this Blender cannot read it, IMPORT_ERROR with the cause otherwise.
    """
    importer = _IMPORTERS.get(format_name)
    if importer is None:
        known = ", ".join(sorted(_IMPORTERS))
        raise AssetError(FailureKind.UNSUPPORTED_FORMAT, f"format {format_name!r} is not one of: {known}")
    try:
        result = importer(path, scratch_dir, animated)
    except RuntimeError as error:
        raise AssetError(FailureKind.IMPORT_ERROR, f"{format_name}: {_cause(str(error))}") from None
    if "FINISHED" not in result:
        raise AssetError(FailureKind.IMPORT_ERROR, f"{format_name}: the importer returned {sorted(result)}")


def _cause(text: str) -> str:
    """Return the last line of an operator's error that says something: of a traceback, the exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Location:")]
    last = lines[-1] if lines else "the importer gave no reason"
    return last.removeprefix("Error: ")[:_MAX_CAUSE_CHARS]


def _call(name: str, **settings: Any) -> _Importer:
    """Return an importer that calls bpy.ops.<name>; a setting that the operator does not know is an error."""

    def run(path: Path, _scratch_dir: Path, _animated: bool) -> Any:
        return versions.importer(path.suffix[1:].lower(), name)(filepath=str(path), **settings)

    return run


_gltf_operator = _call(
    "import_scene.gltf",
    # Without this every rigged file brings a bone shape, a hidden sphere two units across, as a mesh of the scene.
    disable_bone_shape=True,
    import_shading="NORMALS",
    import_pack_images=True,
    # Guessing a bind pose tears skins whose inverse bind matrices carry a scale (many of Sketchfab's conversions);
    # the posed shape needs no guess.
    guess_original_bind_pose=False,
)


def _gltf(path: Path, scratch_dir: Path, animated: bool) -> Any:
    # The add-on adds a handler at every import and never removes one: the tenth asset's lines would come ten times.
    logging.getLogger("glTFImporter").handlers.clear()
    if versions.draco_library() is None and "KHR_draco_mesh_compression" in extensions_used(path):
        raise AssetError(
            FailureKind.UNSUPPORTED_FORMAT,
            f"{path.suffix[1:].lower()}: it is compressed with Draco, and bpy {bpy.app.version_string} came without "
            "the decoder; decompress the file, or render it with bpy 4.5",
        )
    path = default_scene_only(decoded_copy(path, scratch_dir), scratch_dir)
    return _gltf_operator(path if animated else without_animations(path, scratch_dir), scratch_dir, animated)


def _fbx(path: Path, _scratch_dir: Path, animated: bool) -> Any:
    # Not import_scene.fbx, the older one of two: it reads no ASCII files. Without an offset a frame is the one that the
    # file names: Blender would put the file's time 0 at frame 1.
    read = versions.importer("fbx", "wm.fbx_import")
    return read(filepath=str(path), validate_meshes=True, anim_offset=0.0, use_anim=animated)


def _blend(path: Path, _scratch_dir: Path, _animated: bool) -> Any:
    """Open a .blend file: its own active scene is the asset; scripts that it carries never run."""
    result = bpy.ops.wm.open_mainfile(filepath=str(path), load_ui=False, use_scripts=False)
    bpy.context.preferences.filepaths.use_scripts_auto_execute = False
    versions.check_blend_version()
    versions.restore_working_space()
    return result


_usd = _call(
    "wm.usd_import",
    import_cameras=False,
    import_lights=False,
    import_proxy=False,
    import_guide=False,
    import_render=True,
    import_visible_only=True,
    import_textures_mode="IMPORT_PACK",
    set_frame_range=True,  # the only word on where cached animation begins
    create_world_material=False,
    validate_meshes=True,
)

_IMPORTERS: dict[str, _Importer] = {
    "glb": _gltf,
    "gltf": _gltf,
    "obj": _call("wm.obj_import", forward_axis="NEGATIVE_Z", up_axis="Y", validate_meshes=True),
    "fbx": _fbx,
    "stl": _call("wm.stl_import", use_mesh_validate=True),
    "ply": _call("wm.ply_import", import_colors="SRGB"),
    "dae": _call("wm.collada_import"),
    "usd": _usd,
    "usda": _usd,
    "usdc": _usd,
    "usdz": _usd,
    "blend": _blend,
}
