"""A child that reads COLMAP models from its input, as pycolmap is C++ and might take its process down.

Each request is three lengths (u64) and three files: cameras.bin, images.bin, points3D.bin, or their text forms where
the first length has its highest bit set. Each reply is one line: "ok", or the kind of the AssetError. Anything else
that is raised ends the child.
"""

from __future__ import annotations

import resource
import struct
import sys

from pipeline.colmap import binary_of_text, parse_model
from pipeline.types import AssetError

MEMORY_BYTES = 3 * 2**30
TEXT = 1 << 63


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while head := sys.stdin.buffer.read(24):
        lengths = struct.unpack("<3Q", head)
        text = bool(lengths[0] & TEXT)
        content = [sys.stdin.buffer.read(length & ~TEXT) for length in lengths]
        try:
            if text:
                content = binary_of_text("f", *content)
            model = parse_model("f", *content)
            for lens in model.lenses.values():
                lens.check("f")
            reply = "ok"
        except AssetError as error:
            reply = str(error.kind)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
