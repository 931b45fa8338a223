"""Choose the one pose of a rig or an animation that a sample shows, and hold the scene there.

    first_frame   where the animation that the importer left assigned begins; of a .blend file, its own first frame
    rest          nothing is animated: armatures in rest position, actions and NLA off, caches off
    frames        one frame of a list, drawn per sample

Frame 1 is no first frame: a glTF animation begins at 0 (its times count from the file's zero, at 24 frames a second),
an FBX take where its time line says, often at 101. Frames are counted from the file's time 0, and a fraction is
recorded where the first key lies between two.

The rest pose needs the importer's help, since an animated value overwrites the static one as soon as Blender evaluates
it: glTF and FBX are imported without their animations. The importers of USD and COLLADA have no such switch: a node
that is animated there rests where its animation stood at the import, and one of a .blend file as it was saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bpy

from pipeline.spec import RenderSpec
from pipeline.types import derive_seed

MAX_FRAME = 1_048_574
"""The largest frame that Blender can be set to; the least is its negative."""

_UNSEEN = ("CAMERA", "LIGHT", "LIGHT_PROBE", "SPEAKER")
_CACHE_MODIFIERS, _CACHE_CONSTRAINT = ("MESH_SEQUENCE_CACHE", "MESH_CACHE"), "TRANSFORM_CACHE"


@dataclass(frozen=True, slots=True)
class Pose:
    """What is shown of an animation: the spec's `name` of the choice, and the frame, whole or not."""

    name: str
    frame: float

    def show(self) -> None:
        """Evaluate the current scene at the frame."""
        whole = math.floor(self.frame)
        bpy.context.scene.frame_set(whole, subframe=self.frame - whole)

    def record(self) -> dict[str, Any]:
        """Return the JSON record of the pose: a whole frame is an integer."""
        return {"pose": self.name, "frame": int(self.frame) if self.frame == int(self.frame) else self.frame}


def choose_pose(spec: RenderSpec, seed: int) -> Pose:
    """Return the pose of a sample: a pure function of the spec, the sample's seed and the imported file.

    For "rest" the scene is changed: what animates it is switched off. Its frame then matters to drivers alone.
    """
    if spec.pose == "frames":
        return Pose(spec.pose, spec.frames[derive_seed("frame", seed) % len(spec.frames)])
    frame = _first_frame()
    if spec.pose == "rest":
        _rest()
    return Pose(spec.pose, frame)


def _first_frame() -> float:
    """Return the first frame of the file, or else the earliest start of what animates objects, or else the scene's."""
    scene = bpy.context.scene
    starts: list[float] = []
    if not bpy.data.filepath:  # a .blend file says itself where it begins; other importers leave Blender's default
        for owner in _moving_blocks(scene):
            if owner.animation_data is not None:
                starts += _starts(owner.animation_data)
    first = min(starts, default=float(scene.frame_start))
    return round(min(max(first, -MAX_FRAME), MAX_FRAME), 6)


def _moving_blocks(scene: Any) -> Iterator[Any]:
    """Yield the data blocks whose animation can move a surface: objects, their data, and their shape keys."""
    for obj in scene.objects:
        if obj.type in _UNSEEN:
            continue
        yield obj
        if obj.data is not None:
            yield obj.data
            keys = getattr(obj.data, "shape_keys", None)
            if keys is not None:
                yield keys


def _starts(data: Any) -> list[float]:
    """Return the first frames of the curves of an assigned action, and of the NLA strips that play."""
    starts = []
    if data.action is not None and data.action_slot is not None:
        for layer in data.action.layers:
            for strip in layer.strips:
                # An action holds the curves of several objects, each in a slot; a camera's may begin elsewhere.
                bag = strip.channelbag(data.action_slot)
                starts += [curve.range()[0] for curve in (bag.fcurves if bag is not None else ())]
    if data.use_nla:
        tracks = [track for track in data.nla_tracks if not track.mute]
        starts += [strip.frame_start for track in tracks for strip in track.strips if not strip.mute]
    return [float(start) for start in starts if math.isfinite(start)]


def _rest() -> None:
    """Switch off what animates the file, drivers apart: they belong to the rig."""
    for armature in bpy.data.armatures:
        armature.pose_position = "REST"
    for data in _animations():
        data.action = None
        for track in data.nla_tracks:
            track.mute = True
    for obj in bpy.data.objects:
        for modifier in obj.modifiers:
            if modifier.type in _CACHE_MODIFIERS:
                modifier.show_render = modifier.show_viewport = False
        for constraint in obj.constraints:
            if constraint.type == _CACHE_CONSTRAINT:
                constraint.enabled = False


def _animations() -> Iterator[Any]:
    """Yield the animation data of every data block, node trees inside of others included."""
    for prop in bpy.data.bl_rna.properties:
        if prop.type != "COLLECTION":
            continue
        for block in getattr(bpy.data, prop.identifier):
            for owner in (block, getattr(block, "node_tree", None)):
                data = getattr(owner, "animation_data", None)
                if data is not None:
                    yield data
