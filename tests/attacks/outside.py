"""What lies outside of the border in these tests: a cage of canaries, and an ear that must hear nothing."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import zlib
from pathlib import Path

import numpy as np

from tests.render.files import OCTAHEDRON_TRIANGLES, OCTAHEDRON_VERTICES

CANARY = "the-canary-that-nobody-may-hear"
GREEN = (0, 255, 0)
"""Of the canary's picture: no material of these tests is green, and a missing image is magenta."""


def png(width: int, height: int, colour: tuple[int, int, int] = GREEN, *, rows: int | None = None) -> bytes:
    """Return a PNG of one colour; with `rows`, only so many rows of it are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + bytes(colour) * width
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(row * (height if rows is None else rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


class Cage:
    """A folder of canaries beside the assets: a text, a green picture, materials, layers, bytes of a mesh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "secret.txt").write_text(CANARY)
        (folder / "secret.png").write_bytes(png(8, 8))
        (folder / "secret.mtl").write_text("newmtl m\nKd 0 1 0\nKe 0 1 0\n")
        (folder / "secret.usda").write_text(usd_mesh(OCTAHEDRON_VERTICES, OCTAHEDRON_TRIANGLES, "Secret"))
        (folder / "secret.bin").write_bytes(OCTAHEDRON_VERTICES.tobytes())

    def state(self) -> list[object]:
        """Return all that could have changed."""
        found: list[object] = []
        for path in (self.folder, *sorted(self.folder.iterdir())):
            one = path.lstat()
            found += [path.name, one.st_mode, one.st_mtime_ns, one.st_ctime_ns, one.st_size, one.st_nlink]
        return found


class Ear:
    """A server on loopback that notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self._socket.accept()[0] as one:
                    self.heard.append(one.recv(1000))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def usd_mesh(vertices: np.ndarray, triangles: np.ndarray, name: str, head: str = "", inside: str = "") -> str:
    """Return a text USD of one mesh; `head` goes to the layer, `inside` into a second prim."""
    points = ", ".join(f"({x:g}, {y:g}, {z:g})" for x, y, z in vertices)
    return f"""#usda 1.0
(
    defaultPrim = "{name}"
    upAxis = "Z"
    {head}
)
def Xform "{name}"
{{
    def Mesh "mesh"
    {{
        int[] faceVertexCounts = [{", ".join("3" for _ in triangles)}]
        int[] faceVertexIndices = [{", ".join(str(i) for i in triangles.reshape(-1))}]
        point3f[] points = [{points}]
        {inside}
    }}
}}
"""
