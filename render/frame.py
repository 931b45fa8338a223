"""Pixels out of Blender: copied from the render result while Cycles' own callback still holds it.

Without a window `Render Result` gives its pixels to no script, and the usual way out is to save a file and to read it
again: 17 ms for the passes of a picture of 512^2 as an EXR in memory, longer than Cycles takes for a sample of a plain
object. But an engine may look at its own result before it returns, and Cycles' engine is a Python class. So its
`render` is wrapped for the time of one call, and the passes that are asked for are copied there: 1 ms for all of them,
the same values to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import bpy
import numpy as np
from numpy.typing import NDArray


class FrameError(RuntimeError):
    """Cycles gave no picture, or not the passes that were asked for."""


def render_passes(names: Sequence[str]) -> tuple[dict[str, NDArray[np.float32]], float]:
    """Render the scene as it is set.

    Returns:
        the passes of these names, such as "Combined", [H, W, C] float32 each, scene-linear, top row first; and the
        seconds that copying them took.

    Raises:
        FrameError: if there is no picture, or it lacks a pass.
        RuntimeError: what Blender says when it cannot render.
    """
    cycles: Any = bpy.types.RenderEngine.bl_rna_get_subclass_py("CYCLES")
    passes: dict[str, NDArray[np.float32]] = {}
    failed: list[Exception] = []
    seconds = 0.0
    render = cycles.render

    def render_and_copy(engine: Any, depsgraph: Any) -> None:
        nonlocal seconds
        render(engine, depsgraph)
        before = time.perf_counter()
        try:
            passes.update(_copy(engine.get_result(), names))
        except Exception as error:  # noqa: BLE001 - Blender would print what leaves a callback, and go on
            failed.append(error)
        seconds = time.perf_counter() - before

    cycles.render = render_and_copy
    try:
        bpy.ops.render.render(write_still=False)
    finally:
        cycles.render = render
    if failed:
        raise failed[0]
    if not passes:
        raise FrameError("Cycles rendered nothing")
    return passes, seconds


def _copy(result: Any, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    if len(result.layers) != 1:
        raise FrameError(f"the render has {len(result.layers)} layers instead of one")
    found = {one.name: one for one in result.layers[0].passes}
    out = {}
    for name in names:
        if name not in found:
            raise FrameError(f"the render has no pass {name}; it has {', '.join(found)}")
        values = np.empty(result.resolution_y * result.resolution_x * found[name].channels, np.float32)
        found[name].rect.foreach_get(values)
        # Blender's rows run from the bottom up.
        out[name] = np.ascontiguousarray(values.reshape(result.resolution_y, result.resolution_x, -1)[::-1])
    return out
