"""The Blender child: one process that renders many assets, told by lines of JSON, answering through a pipe of its own.

    python -P -s -m render.border render.child --result-fd N --parent-pid N --memory-bytes N --threads N ...

It is started by `render.process` and trusts its orders, but not the files that it opens; the supervisor trusts nothing
that comes back. Before this module is imported `render.border` has confined the process.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.spec import RenderSpec
from pipeline.types import AssetError, Camera, FailureKind, PlaneName
from render import wire
from render.cameras import cameras_for, cropped_share
from render.views import pack_view

if TYPE_CHECKING:
    from render.denoise import Denoiser
    from render.engine import RenderedView
    from render.scene import PreparedScene


def main(args: argparse.Namespace, sandbox: str) -> int:
    """Answer requests from stdin until it ends; `sandbox` says what confines us."""
    import bpy

    from render.devices import DeviceError, use_device, warm_up

    try:
        device = use_device(args.device)
        if device.cycles == "GPU":
            warm_up(device)
    except DeviceError as error:
        wire.send(args.result_fd, {"type": "no_device", "message": str(error)})
        return 3
    ready = {"type": "ready", "blender": bpy.app.version_string, "sandbox": sandbox, "device": device.name}
    wire.send(args.result_fd, ready)
    for line in sys.stdin.buffer:
        _answer(json.loads(line), args.result_fd, args.threads, device.cycles)
    return 0


def _answer(request: dict[str, Any], fd: int, num_threads: int, device: str) -> None:
    """Render one asset, or say why not. What is not an AssetError is a fault of ours or of Blender's Python."""
    try:
        _render(request, fd, num_threads, device)
    except AssetError as error:
        kind, message = error.kind, error.message
    except MemoryError:
        kind, message = FailureKind.OUT_OF_MEMORY, "Python could not get memory"
    except Exception as error:  # noqa: BLE001 - any fault must become a reply, or the supervisor would wait in vain
        traceback.print_exc()
        kind, message = FailureKind.INTERNAL, f"{type(error).__name__}: {error}"
    else:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    wire.send(fd, {"type": "error", "kind": kind.value, "message": message[:500]})


def _render(request: dict[str, Any], fd: int, num_threads: int, device: str) -> None:
    from render import engine, lighting, scene

    spec = RenderSpec.model_validate(request["render"])
    started = time.perf_counter()
    scene.reset()
    path = None if request["path"] is None else Path(request["path"])
    scratch_dir, animated = Path(request["scratch_dir"]), spec.pose != "rest"
    scene.load(path, request["format"], request["procedural_seed"], scratch_dir, animated=animated)
    imported = time.perf_counter()
    prepared = scene.prepare(
        spec,
        request["seed"],
        max_triangles=request["max_triangles"],
        expected_triangles=request["expected_triangles"],
        min_triangle_share=request["min_triangle_share"],
    )
    lights = lighting.set_lights(spec.lighting, request["seed"])
    frozen = time.perf_counter()
    _send_scene(fd, prepared, lights)
    renderer = engine.Engine(
        spec, request["seed"], num_threads, points=prepared.points, transparent=prepared.quality["transparent"],
        denoiser=_denoiser(num_threads), device=device,
    )  # fmt: skip
    cameras = cameras_for(spec, request["seed"])
    try:
        sides = renderer.render_bare(cameras)
        wire.send(fd, {"type": "sides"}, sides.data.cast("B"))
        # While a view is written, 4 MB through a pipe, the next one renders.
        with ThreadPoolExecutor(1, "send") as pool:
            sent: Future[None] | None = None
            for index, (camera, view) in enumerate(zip(cameras, renderer.render_views(), strict=True)):
                if sent is not None:
                    sent.result()
                sent = pool.submit(_send_view, fd, index, view, spec.planes, camera, prepared)
            if sent is not None:
                sent.result()
    finally:
        renderer.close()
    done = time.perf_counter()
    stages = {
        "import": imported - started, "textures": prepared.textures_s,
        "freeze": frozen - imported - prepared.textures_s, "views": done - frozen, **renderer.seconds,
    }  # fmt: skip
    wire.send(fd, {"type": "done", "seconds": stages})


def _send_scene(fd: int, prepared: PreparedScene, lights: dict[str, Any]) -> None:
    norm = prepared.normalization
    similarity = {
        "scale": norm.scale,
        "rotation": norm.rotation.tolist(),
        "translation": norm.translation.tolist(),
    }
    wire.send(fd, {"type": "scene", "normalization": similarity, "quality": prepared.quality, "lights": lights})


def _send_view(
    fd: int, index: int, view: RenderedView, names: Sequence[PlaneName], camera: Camera, prepared: PreparedScene
) -> None:
    cropped = round(cropped_share(camera, prepared.points, prepared.weights), 6)
    facts: dict[str, float | int] = {"cropped": cropped, "samples": view.samples}
    if view.quality is not None:
        # What was accepted, one standard error against us.
        facts["half_psnr_db"], facts["full_psnr_db"] = (
            round(error.pessimistic.psnr_db, 2) for error in (view.quality.half, view.quality.full)
        )
    made = {"rgba": view.rgba, **view.data}
    header = {"type": "view", "index": index, "box": list(view.box), "planes": list(names), "facts": facts}
    wire.send(fd, header, pack_view({name: made[name] for name in names}))


@functools.cache
def _denoiser(num_threads: int) -> Denoiser:
    """Return the process's denoiser, made on first use: Blender loads its library."""
    from render.denoise import Denoiser

    return Denoiser(num_threads)
