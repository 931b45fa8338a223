"""The ingest child: one process that makes samples of captures, one after the other, from bytes that it is handed.

    python -P -s -m render.border jobs.ingest_child --result-fd N --parent-pid N --memory-bytes N --threads N ...

It opens strangers' photos and models, so it is confined like the Blender child and has neither network nor
credentials; it therefore cannot read object storage itself, and asks its supervisor for each member by number:

    supervisor -> child (stdin)      {"type": "ingest", asset, spec} + JSON of frames, masks, models: names -> numbers
    child -> supervisor              {"type": "read", "member": 3, "max_bytes": 2097152}
    supervisor -> child              {"type": "bytes"} + the content, or {"type": "refused", kind, message}
    child -> supervisor              {"type": "view", index, camera, planes} + the encoded planes, view by view
    child -> supervisor              {"type": "sample", normalization, quality, ...}, or {"type": "error", kind, ...}

Both directions are framed by `render.wire`. Neither bpy nor Ray is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.capture import CaptureFiles
from pipeline.spec import DatasetSpec
from pipeline.types import Asset, AssetError, FailureKind, Sample, UserError
from render import wire

MAX_REQUEST_BYTES = 2**31 - 1
Ingest = Callable[[CaptureFiles, Asset, DatasetSpec, str], Sample]


@dataclass(slots=True)
class _Line:
    """The two pipes to the supervisor."""

    result_fd: int
    lock: threading.Lock

    def read(self, number: int, max_bytes: int) -> bytes:
        """Ask for a member's content; whoever asks from several threads is answered in turn."""
        with self.lock:
            wire.send(self.result_fd, {"type": "read", "member": number, "max_bytes": int(max_bytes)})
            header, payload = receive(0)
        if header["type"] == "refused":
            raise AssetError(FailureKind(header["kind"]), header["message"])
        return payload

    def tell(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """Send one reply."""
        with self.lock:
            wire.send(self.result_fd, header, payload)


def main(args: argparse.Namespace, sandbox: str) -> int:
    """Answer requests from stdin until it ends; `sandbox` says what confines us."""
    import cv2

    from pipeline.mvimgnet import ingest

    cv2.setNumThreads(args.threads)
    line = _Line(args.result_fd, threading.Lock())
    line.tell({"type": "ready", "sandbox": sandbox})
    while True:
        try:
            request, names = receive(0)
        except EOFError:
            return 0
        answer(line, request, names, ingest)


def answer(line: _Line, request: dict[str, Any], names: bytes, ingest: Ingest) -> None:
    """Make one sample or picture, or say why not. What is not an AssetError is a fault of ours."""
    try:
        if request["type"] == "picture":
            _picture(line, request)
        elif request["type"] == "hook":
            from pipeline.masks import try_hook

            line.tell({"type": "hook", "said": try_hook(request["command"])})
        else:
            _ingest(line, request, json.loads(names), ingest)
    except AssetError as error:
        kind, message = error.kind.value, error.message
        print(error.log_tail, file=sys.stderr)  # of what we print the tail is the row's
    except UserError as error:
        kind, message = "user", str(error)
    except MemoryError:
        kind, message = FailureKind.OUT_OF_MEMORY.value, "Python could not get memory"
    except Exception as error:  # noqa: BLE001 - any fault must become a reply, or the supervisor would wait in vain
        traceback.print_exc()
        kind, message = FailureKind.INTERNAL.value, f"{type(error).__name__}: {error}"
    else:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    line.tell({"type": "error", "kind": kind, "message": message[:500]})


def _ingest(line: _Line, request: dict[str, Any], names: dict[str, Any], ingest: Ingest) -> None:
    asset, spec = Asset(**request["asset"]), DatasetSpec.model_validate(request["spec"])

    def as_names(numbers: dict[str, int]) -> dict[str, str]:
        return {name: str(number) for name, number in numbers.items()}

    files = CaptureFiles(
        uid=asset.uid,
        frames=as_names(names["frames"]),
        masks=as_names(names["masks"]),
        models={name: as_names(one) for name, one in names["models"].items()},
        read=lambda member, max_bytes: line.read(int(member), max_bytes),
    )
    sample = ingest(files, asset, spec, request["fingerprint"])
    for view in sample.views:
        camera = view.camera
        header = {
            "type": "view",
            "index": view.index,
            "world_from_camera": camera.world_from_camera.tolist(),
            "intrinsics": camera.intrinsics.tolist(),
            "size": [camera.width, camera.height],
            "planes": [[name, one.codec, len(one.data), one.scale] for name, one in view.planes.items()],
        }
        line.tell(header, b"".join(one.data for one in view.planes.values()))
    norm = sample.normalization
    similarity = {
        "scale": float(norm.scale),
        "rotation": norm.rotation.tolist(),
        "translation": norm.translation.tolist(),
    }
    line.tell(
        {
            "type": "sample",
            "seed": sample.seed,
            "normalization": similarity,
            "quality": dict(sample.quality),
            "lights": dict(sample.lights),
            "provenance": dict(sample.provenance),
        }
    )


def _picture(line: _Line, request: dict[str, Any]) -> None:
    """Send one frame, small, with the outline of its mask: straight RGB, so that nobody else need decode it."""
    from pipeline.capture_checks import outlined

    frame = line.read(request["frame"], request["max_bytes"])
    if request["mask"] is not None:
        mask: bytes | None = line.read(request["mask"], request["max_bytes"])
    else:
        mask = None if request["command"] is None else _made_mask(request["command"], frame, request["name"])
    image = outlined(frame, mask, request["size_px"], request["threshold"])
    line.tell({"type": "picture", "shape": list(image.shape)}, image.tobytes())


def _made_mask(command: str, frame: bytes, name: str) -> bytes | None:
    """Return the mask that the spec's hook makes of a frame, as PNG; None where it fails."""
    import cv2

    from pipeline.masks import hook_mask

    try:
        return cv2.imencode(".png", hook_mask(command, frame, name))[1].tobytes()
    except AssetError:
        return None


def receive(fd: int) -> tuple[dict[str, Any], bytes]:
    """Read one message of the supervisor, who is trusted.

    Raises:
        EOFError: the supervisor closed the pipe.
    """
    num_header, num_payload = wire.parse_prefix(_exactly(fd, wire.PREFIX.size), MAX_REQUEST_BYTES)
    return wire.parse_header(_exactly(fd, num_header)), _exactly(fd, num_payload)


def _exactly(fd: int, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    view, start = memoryview(data), 0
    while start < num_bytes:
        num_read = os.readv(fd, [view[start:]])
        if num_read == 0:
            raise EOFError
        start += num_read
    return bytes(data)
