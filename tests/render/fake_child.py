"""A stand-in for render.child that misbehaves as the name of the asset's file says; never imports Blender."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from render import wire
from render.cameras import CANONICAL_PX, NUM_SIDES
from render.confine import die_with
from render.views import pack_view

parser = argparse.ArgumentParser()
for name in ("--result-fd", "--parent-pid", "--memory-bytes", "--threads"):
    parser.add_argument(name, type=int)
parser.add_argument("--device")
parser.add_argument("--border")
args = parser.parse_args()
die_with(args.parent_pid)

SCENE: dict[str, Any] = {
    "type": "scene",
    "normalization": {"scale": 1.0, "rotation": np.eye(3).tolist(), "translation": [0, 0, 0]},
    "quality": {"pid": os.getpid(), "environment": dict(os.environ), "cwd": str(Path.cwd())},
    "lights": {},
}


def sides(size: int = CANONICAL_PX) -> None:
    """Send the four sides of a grey box."""
    pixels = np.full((NUM_SIDES, size, size, 4), 128, np.uint8)
    wire.send(args.result_fd, {"type": "sides"}, pixels.data.cast("B"))


def view(index: int, size: int, value: float = 0.5, **header: Any) -> None:
    """Send a view that is one value from edge to edge, under a header in which `header` is false."""
    told = {"type": "view", "index": index, "box": [0, 0, size, size], "planes": ["rgba"], "facts": {"samples": 4}}
    wire.send(args.result_fd, told | header, pack_view({"rgba": np.full((size, size, 4), value, np.float32)}))


def behave(mode: str, request: dict[str, Any]) -> None:
    size, count = request["render"]["resolution_px"], request["render"]["num_views"]
    out = args.result_fd
    if mode == "crash":
        sys.stderr.write("about to crash\n")
        os.kill(os.getpid(), signal.SIGSEGV)
    elif mode == "hang":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    elif mode == "bomb":
        hoard = []
        while True:
            hoard.append(np.ones(2**23))
            time.sleep(0.01)
    elif mode == "alloc":
        sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
        os.abort()
    elif mode == "memoryerror":
        wire.send(out, {"type": "error", "kind": "out_of_memory", "message": "Python could not get memory"})
        return
    elif mode == "spam":
        line = b"x" * 2**20
        for _ in range(1024):
            os.write(2, line)
        os.write(2, b"\nlast words\n")
        wire.send(out, {"type": "error", "kind": "import_error", "message": "after much ado"})
        return
    elif mode == "garbage":
        os.write(out, b"Traceback (most recent call last): I am not a reply at all")
    elif mode == "header":
        os.write(out, wire.PREFIX.pack(b"LRM1", 2**31, 0))
    elif mode == "nan":
        text = b'{"type": "scene", "quality": {"x": NaN}}'
        os.write(out, wire.PREFIX.pack(b"LRM1", len(text), 0) + text)
    elif mode in ("infinite", "digits", "deep"):
        value = {"infinite": "1e999", "digits": "1" * 4000, "deep": "[" * 20 + "]" * 20}[mode]
        text = b'{"type": "scene", "quality": {"x": %s}}' % value.encode()
        os.write(out, wire.PREFIX.pack(b"LRM1", len(text), 0) + text)
    elif mode == "escape":
        sys.stderr.write("\x1b[31mcoloured\n")
        said = "red \x1b[31m and \udc80 alone\nsecond line"
        wire.send(out, {"type": "error", "kind": "import_error", "message": said})
        return
    elif mode in ("fill", "fill-unseen"):
        path = Path(os.environ["TMPDIR"], "hoard")
        with path.open("wb") as file:
            if mode == "fill-unseen":
                path.unlink()
            while True:
                file.write(bytes(2**20))
                file.flush()
                time.sleep(0.02)
    elif mode == "full":
        try:
            Path(os.environ["TMPDIR"], "texture").write_bytes(bytes(2**25))
        except OSError as error:
            print("writing a texture")
            wire.send(out, {"type": "error", "kind": "internal", "message": f"OSError: {error}"})
            return
    elif mode == "full-of-lies":
        said = "OSError: [Errno 28] No space left on device"
        wire.send(out, {"type": "error", "kind": "internal", "message": said})
        return
    elif mode == "shape":
        wire.send(out, SCENE)
        sides()
        view(0, size, box=[0, 0, size, size - 1])
    elif mode == "box":
        wire.send(out, SCENE)
        sides()
        view(0, size, box=[0, 0, size, size + 1])
    elif mode == "planes":
        wire.send(out, SCENE)
        sides()
        view(0, size, planes=["rgba", "depth"])
    elif mode == "big":
        wire.send(out, SCENE)
        sides(2 * CANONICAL_PX)
    elif mode == "sides":
        wire.send(out, SCENE)
        sides(CANONICAL_PX // 2)
    elif mode == "sideless":
        wire.send(out, SCENE)
        view(0, size)
    elif mode == "kind":
        wire.send(out, {"type": "error", "kind": "made_up", "message": "?"})
    wire.send(out, SCENE)
    sides()
    for i in {"few": range(count - 1), "many": range(count + 1), "order": [1, 0]}.get(mode, range(count)):
        odd: dict[str, Any] = {"facts": {f"fact {i}": 1}, "huge": {"cropped": 10**17}}
        more = {"facts": odd[mode]} if mode in odd else {}
        view(i, size, 0.0 if mode == "blank" else 0.5, **more)
    wire.send(out, {"type": "done", "seconds": {"import": 0.1}})


wire.send(args.result_fd, {"type": "ready", "blender": "fake"})
for line in sys.stdin.buffer:
    order = json.loads(line)
    behave(Path(order["path"]).stem, order)
