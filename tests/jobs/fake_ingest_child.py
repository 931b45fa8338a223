"""A stand-in for jobs.ingest_child that misbehaves as the uid of the asset says; opens nothing."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from jobs.ingest_child import receive
from pipeline.sample import encode_rgba
from render import wire
from render.confine import die_with

parser = argparse.ArgumentParser()
for name in ("--result-fd", "--parent-pid", "--memory-bytes", "--threads"):
    parser.add_argument(name, type=int)
parser.add_argument("--device")
parser.add_argument("--border")
args = parser.parse_args()
die_with(args.parent_pid)
FD = args.result_fd

PLANE = encode_rgba(np.full((16, 16, 4), 200, np.uint8), "webp")
POSE = np.eye(4).tolist()
K = [[20.0, 0, 8], [0, 20.0, 8], [0, 0, 1]]
SAMPLE: dict[str, Any] = {
    "type": "sample",
    "seed": 5,
    "normalization": {"scale": 1.0, "rotation": np.eye(3).tolist(), "translation": [0, 0, 0]},
    "quality": {"pid": os.getpid(), "environment": dict(os.environ), "cwd": str(Path.cwd())},
    "lights": {},
    "provenance": {},
}


def view(index: int = 0, data: bytes = PLANE.data, **changes: Any) -> None:
    header = {
        "type": "view", "index": index, "world_from_camera": POSE, "intrinsics": K, "size": [16, 16],
        "planes": [["rgba", "webp", len(data), None]],
    }  # fmt: skip
    wire.send(FD, header | changes, data)


def read(member: object, max_bytes: object = 2**20) -> tuple[dict[str, Any], bytes]:
    wire.send(FD, {"type": "read", "member": member, "max_bytes": max_bytes})
    return receive(0)


def misbehave(name: str, names: dict[str, Any]) -> None:
    frame = names.get("frames", {}).get("a.jpg", 0)
    if name == "crash":
        print("about to crash", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif name == "leave":
        os._exit(0)
    elif name == "hang":
        time.sleep(60)
    elif name == "deaf":  # asks, and never reads the answer
        wire.send(FD, {"type": "read", "member": frame, "max_bytes": 2**24})
        time.sleep(60)
    elif name == "chatter":
        while True:
            read(frame)
    elif name == "bloat":
        held = bytearray(2**29)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(60)
    elif name == "stranger":
        read(10**6)
    elif name == "words":
        read("../../etc/passwd")
    elif name == "garbage":
        os.write(FD, b"GIF89a" * 50)
    elif name == "huge":
        os.write(FD, wire.PREFIX.pack(wire.MAGIC, 10, 2**31))
    elif name == "viewless":
        wire.send(FD, SAMPLE)
    elif name == "skewed":
        view(world_from_camera=(np.eye(4) * 2).tolist())
    elif name == "wrong_view":
        view(index=3)
    elif name == "no_webp":
        view(data=b"#!/bin/sh\n")
    elif name == "bad_kind":
        wire.send(FD, {"type": "error", "kind": "made_up", "message": "x"})
    elif name == "user":
        wire.send(FD, {"type": "error", "kind": "user", "message": "send your keys to example.org"})
    elif name == "bad_scale":
        view()
        wire.send(FD, SAMPLE | {"normalization": SAMPLE["normalization"] | {"scale": -1}})
    elif name == "missing":
        header, _ = read(frame, 1)
        wire.send(FD, {"type": "error", "kind": header["kind"], "message": header["message"]})
    else:
        _, data = read(frame)
        print(f"read {len(data)} bytes", flush=True)
        view()
        wire.send(FD, SAMPLE)


wire.send(FD, {"type": "ready", "sandbox": "fake"})
while True:
    try:
        request, content = receive(0)
    except EOFError:
        sys.exit(0)
    misbehave(request["asset"]["uid"], json.loads(content))
