"""Messages between the supervisor and its Blender child: small, length-prefixed, and read as hostile.

    request (stdin of the child)    one line of JSON
    reply (a pipe of its own)       | "LRM1" | header bytes u32 | payload bytes u32 | header: JSON | payload |

Replies have a pipe of their own because Blender and its add-ons print to stdout. They are never pickles: the child has
opened a file from a stranger. A view's header names the part of the picture that came, and its planes in the order of
the payload: `{"box":[0,0,2,2],"index":0,"planes":["rgba"],"type":"view"}` goes with 64 bytes of premultiplied
scene-linear RGBA, float32, top row first.
"""

from __future__ import annotations

import json
import math
import os
import struct
from typing import Any

PREFIX = struct.Struct("<4sII")
MAGIC = b"LRM1"
MAX_HEADER_BYTES = 2**20
MAX_DEPTH = 12
MAX_INTEGER_DIGITS = 20


class WireError(ValueError):
    """A reply that is not what the protocol allows."""


def send(fd: int, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one reply, whole, to a blocking file descriptor."""
    text = json.dumps(header, sort_keys=True, allow_nan=False).encode()
    for piece in (PREFIX.pack(MAGIC, len(text), len(payload)) + text, payload):
        view = memoryview(piece)
        while view:
            view = view[os.write(fd, view) :]


def parse_prefix(data: bytes, max_payload_bytes: int) -> tuple[int, int]:
    """Return (header bytes, payload bytes) of a prefix.

    Raises:
        WireError: if the prefix is not ours or a size is over its limit.
    """
    magic, num_header, num_payload = PREFIX.unpack(data)
    if magic != MAGIC:
        raise WireError(f"a reply starts with {magic!r}; {MAGIC!r} is required")
    if num_header > MAX_HEADER_BYTES:
        raise WireError(f"a reply has a header of {num_header} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if num_payload > max_payload_bytes:
        raise WireError(f"a reply has a payload of {num_payload} bytes; at most {max_payload_bytes} are allowed")
    return num_header, num_payload


def parse_header(data: bytes) -> dict[str, Any]:
    """Parse the JSON header of a reply: an object of finite numbers, nested no deeper than MAX_DEPTH.

    Raises:
        WireError: saying what was found.
    """
    try:
        value = json.loads(data, parse_constant=_refuse_constant, parse_float=_finite_float, parse_int=_bounded_int)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a reply's header is not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise WireError("a reply's header is not an object with a type")
    if _depth(value) > MAX_DEPTH:
        raise WireError(f"a reply's header is nested deeper than {MAX_DEPTH}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth
