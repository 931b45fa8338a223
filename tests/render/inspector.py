"""Look into a prepared scene: a process that prepares what it is told to, and answers with what then stands in Blender.

`python -m tests.render.inspector FD` reads lines of JSON and answers each with a line on the file descriptor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pipeline.spec import RenderSpec
from pipeline.types import AssetError


class Inspector:
    """One Blender process; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        reader, writer = os.pipe()
        self._answers = os.fdopen(reader)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.render.inspector", str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[writer],
            text=True,
            env=os.environ | {"TMPDIR": str(folder)},
        )
        os.close(writer)

    def __enter__(self) -> Inspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request; return the answer, which must come."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answers.readline()
        assert answer, "the inspector died"
        found: dict[str, Any] = json.loads(answer)
        return found

    def prepare(self, path: Path, seed: int = 0, **render: Any) -> dict[str, Any]:
        """Prepare a file under a RenderSpec of these fields; see `_prepare` for the answer."""
        arrays = self._folder / "arrays.npz"
        found = self.ask(do="prepare", path=str(path), seed=seed, render=render, arrays=str(arrays))
        assert "error" not in found, found
        with np.load(arrays) as data:
            return found | {"points": data["points"], "weights": data["weights"]}


def _prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Return facts of the prepared scene: boxes at two frames, in world units, and what data blocks there are."""
    import bpy

    from render import scene

    path, spec = Path(request["path"]), RenderSpec.model_validate(request["render"])
    scene.reset()
    scene.load(path, path.suffix[1:].lower(), None, Path(request["arrays"]).parent, animated=spec.pose != "rest")
    prepared = scene.prepare(
        spec, request["seed"], max_triangles=10**8, expected_triangles=None, min_triangle_share=0.0
    )
    np.savez(request["arrays"], points=prepared.points, weights=prepared.weights)
    boxes = []
    for frame in (1, 250):
        bpy.context.scene.frame_set(frame)
        boxes.append(_box())
    kinds = ("objects", "scenes", "cameras", "lights", "worlds", "actions", "armatures", "collections", "texts")
    return {
        "quality": prepared.quality,
        "scale": prepared.normalization.scale,
        "translation": prepared.normalization.translation.tolist(),
        "boxes": boxes,
        "num": {kind: len(getattr(bpy.data, kind)) for kind in kinds},
        "animated": _animated(),
        "materials": sorted({m.name for o in bpy.data.objects if o.type == "MESH" for m in o.data.materials}),
        "images": {image.name: list(image.size) for image in bpy.data.images},
    }


def _animated() -> list[str]:
    import bpy

    found = []
    for prop in bpy.data.bl_rna.properties:
        if prop.type == "COLLECTION":
            for block in getattr(bpy.data, prop.identifier):
                for owner in (block, getattr(block, "node_tree", None)):
                    data = getattr(owner, "animation_data", None)
                    if data is not None and (data.action or data.nla_tracks or data.drivers):
                        found.append(f"{prop.identifier} {block.name}")
    return found


def _box() -> list[list[float]]:
    """Return the corners of the box around all vertices of the evaluated scene."""
    import bpy

    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for instance in bpy.context.evaluated_depsgraph_get().object_instances:
        if instance.object.type == "MESH":
            flat = np.empty(3 * len(instance.object.data.vertices), np.float32)
            instance.object.data.vertices.foreach_get("co", flat)
            matrix = np.array(instance.matrix_world)
            world = flat.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]
            low, high = np.minimum(low, world.min(axis=0)), np.maximum(high, world.max(axis=0))
    return [low.tolist(), high.tolist()]


def _reset(request: dict[str, Any]) -> dict[str, Any]:
    """Choose a compute device, reset, and return what is chosen then, and what is left."""
    import bpy

    from render import scene

    def device() -> Any:
        return bpy.context.preferences.addons["cycles"].preferences

    device().compute_device_type = request["device"]
    scene.reset()
    kept, world = device().compute_device_type, bpy.context.scene.world is not None
    device().compute_device_type = "NONE"
    return {"device": kept, "world": world, "num_objects": len(bpy.data.objects)}


def _memory(_request: dict[str, Any]) -> dict[str, Any]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"resident_bytes": pages * os.sysconf("SC_PAGE_SIZE")}


def main() -> None:
    """Answer requests until stdin ends."""
    import bpy  # noqa: F401 - before bpy, none of Blender's other modules can be imported

    fd = int(sys.argv[1])
    verbs = {"prepare": _prepare, "reset": _reset, "memory": _memory}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = verbs[request["do"]](request)
        except AssetError as error:
            answer = {"error": error.kind.value, "message": error.message}
        os.write(fd, json.dumps(answer).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
