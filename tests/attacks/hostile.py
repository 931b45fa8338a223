"""Files that a stranger could upload, each with what it is after; `ATTACKS` names them all.

A builder gets an empty folder of its own, the cage beside it and the port of the ear, and returns the main file.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.attacks.outside import png, usd_mesh
from tests.render.blends import write_blend
from tests.render.files import CUBE_TRIANGLES, CUBE_VERTICES, Glb, one_mesh_glb, write_obj

Build = Callable[[Path, Path, int], Path]


@dataclass(frozen=True, slots=True)
class Attack:
    """A hostile file.

    Attributes:
        build: writes it.
        checked: the kinds that `check_file` refuses it with; None where it has nothing to object.
        child: the kinds that the child ends with if it gets the file all the same; None for a clean sample. Empty
            where the child is not tried, because the file does not differ for it from another, or is too large.
    """

    build: Build
    checked: frozenset[str | None]
    child: frozenset[str | None]


def _attack(build: Build, checked: str | None, *child: str | None) -> Attack:
    return Attack(build, frozenset({checked}), frozenset(child))


def textured_glb(path: Path, image: dict[str, Any], data: bytes = b"") -> Path:
    """Write a GLB of a cube whose base colour is this image, `data` its bytes if it is embedded."""
    glb = Glb()
    uv = glb.accessor(np.ascontiguousarray(CUBE_VERTICES[:, :2] + 0.5), "VEC2")
    glb.scene(glb.node(mesh=glb.mesh(material=0, TEXCOORD_0=uv)))
    if data:
        glb.document["bufferViews"].append({"buffer": 0, "byteOffset": len(glb.binary), "byteLength": len(data)})
        glb.binary += data + b"\0" * (-len(data) % 4)
        image = image | {"bufferView": len(glb.document["bufferViews"]) - 1}
    glb.document |= {
        "images": [image],
        "textures": [{"source": 0}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "metallicFactor": 0}}],
    }
    return glb.write(path)


def image_uri(uri: Callable[[Path, int], str]) -> Build:
    return lambda home, cage, port: textured_glb(home / "a.glb", {"uri": uri(cage, port)})


def _buffer_uri(uri: Callable[[Path], str]) -> Build:
    """A mesh whose vertices would be the bytes of another file."""

    def build(home: Path, cage: Path, port: int) -> Path:
        glb = Glb()
        glb.scene(glb.node(mesh=glb.mesh()))
        glb.more_buffers = [{"byteLength": 72, "uri": uri(cage)}]
        glb.document["bufferViews"].append({"buffer": 1, "byteLength": 72})
        glb.document["accessors"].append(
            {"bufferView": 2, "componentType": 5126, "count": 6, "type": "VEC3", "min": [-1] * 3, "max": [1] * 3}
        )
        mesh = {"primitives": [{"attributes": {"POSITION": 2}, "mode": 4}]}
        glb.document["meshes"].append(mesh)
        glb.document["nodes"].append({"mesh": 1})
        glb.document["scenes"][0]["nodes"].append(1)
        return glb.write(home / "a.glb")

    return build


def _obj(library: Callable[[Path], str], text: Callable[[Path], str] | None = None) -> Build:
    def build(home: Path, cage: Path, port: int) -> Path:
        path = write_obj(home / "a.obj", [(CUBE_VERTICES, CUBE_TRIANGLES + 0, (0.5, 0.5, 0.5))])
        path.with_suffix(".mtl").unlink()
        lines = path.read_text().replace("mtllib a.mtl", f"mtllib {library(cage)}").replace("usemtl m0", "usemtl m")
        path.write_text(lines)
        if text is not None:
            (home / "b.mtl").write_text(f"newmtl m\nKd 0.5 0.5 0.5\n{text(cage)}\n")
        return path

    return build


def usd(head: Callable[[Path, int], str], material: bool = False) -> Build:
    """A cube with a layer, a reference or a payload from elsewhere."""

    def build(home: Path, cage: Path, port: int) -> Path:
        path, told = home / "a.usda", head(cage, port)
        text = usd_mesh(CUBE_VERTICES, CUBE_TRIANGLES, "Cube", head=told if told.startswith("subLayers") else "")
        if not told.startswith("subLayers"):
            text += f'def Xform "Other" ( {told} )\n{{\n}}\n'
        path.write_text(text)
        return path

    return build


def _by_blender(kind: str, ending: str) -> Build:
    def build(home: Path, cage: Path, port: int) -> Path:
        return write_blend(kind, home / f"a.{ending}", str(cage), str(port))

    return build


def _huge_png(home: Path, cage: Path, port: int) -> Path:
    return textured_glb(home / "a.glb", {"mimeType": "image/png"}, png(60_000, 60_000, rows=1))


def _huge_jpeg(home: Path, cage: Path, port: int) -> Path:
    # A preview first, as cameras write it, so that the size does not stand at the start.
    head = b"\xff\xd8\xff\xe1" + struct.pack(">H", 60_002) + bytes(60_000)
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, 60_000, 60_000, 1) + b"\x01\x11\x00"
    return textured_glb(home / "a.glb", {"mimeType": "image/jpeg"}, head + frame + b"\xff\xd9")


def _zip_bomb(home: Path, cage: Path, port: int) -> Path:
    path = home / "a.usdz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.usda", "#usda 1.0\n" + " " * 2**26)
    return path


def _usdz_outside(home: Path, cage: Path, port: int) -> Path:
    """An archive whose layer refers to a file beside the archive's cage, and whose second entry climbs out."""
    path = home / "a.usdz"
    text = usd_mesh(CUBE_VERTICES, CUBE_TRIANGLES, "Cube") + (
        f'def Xform "Other" ( references = @{cage}/secret.usda@</Secret> )\n{{\n}}\n'
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.usda", text)
        archive.writestr("../../cuckoo.usda", "#usda 1.0\n")
    return path


def _raw_glb(document: str) -> Build:
    def build(home: Path, cage: Path, port: int) -> Path:
        text = document.encode() + b" " * (-len(document) % 4)
        body = struct.pack("<I4s", len(text), b"JSON") + text
        path = home / "a.glb"
        path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body)
        return path

    return build


def _nodes(number: int) -> str:
    return '{"asset":{"version":"2.0"},"nodes":[' + ",".join(["{}"] * number) + "]}"


def _cycle(home: Path, cage: Path, port: int) -> Path:
    glb = Glb()
    mesh = glb.mesh()
    glb.scene(glb.node(mesh=mesh, children=[1]))
    glb.node(children=[2])
    glb.node(children=[1])
    return glb.write(home / "a.glb")


def _count(home: Path, cage: Path, port: int) -> Path:
    glb = Glb()
    glb.scene(glb.node(mesh=glb.mesh()))
    for accessor in glb.document["accessors"]:
        accessor["count"] = 2**31
    return glb.write(home / "a.glb")


def _ply_count(home: Path, cage: Path, port: int) -> Path:
    path = home / "a.ply"
    rows = ["ply", "format binary_little_endian 1.0", f"element vertex {2**31}"]
    rows += [f"property float {axis}" for axis in "xyz"]
    rows += [f"element face {2**31}", "property list uchar int vertex_indices", "end_header", ""]
    path.write_bytes("\n".join(rows).encode() + bytes(48))
    return path


def _stl_count(home: Path, cage: Path, port: int) -> Path:
    path = home / "a.stl"
    path.write_bytes(bytes(80) + struct.pack("<I", 2**32 - 1) + bytes(50))
    return path


def _surrogate_name(home: Path, cage: Path, port: int) -> Path:
    return _names(home, cage, port, node="\ud800 is half a character")


def _names(home: Path, cage: Path, port: int, node: str = "") -> Path:
    """A cube of honest shape whose every name is made to break a line, a terminal, JSON or UTF-8."""
    name = 'line\nbreak \x1b[31m\u202e"}{\\ud800' + "\N{PILE OF POO}" * 50
    path = one_mesh_glb(home / "a.glb", name=name)
    content = path.read_bytes()
    text = content[20 : 20 + int.from_bytes(content[12:16], "little")]
    document = json.loads(text)
    document["nodes"][0]["name"] = node + name
    document["meshes"][0]["name"] = name * 100
    document["asset"]["copyright"] = name
    document["materials"] = [{"name": name}]
    document["meshes"][0]["primitives"][0]["material"] = 0
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    rest = content[20 + int.from_bytes(content[12:16], "little") :]
    body = struct.pack("<I4s", len(text), b"JSON") + text + rest
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body)
    return path


_URIS: dict[str, Callable[[Path, int], str]] = {
    "absolute": lambda cage, port: "/etc/passwd",
    "absolute picture": lambda cage, port: f"{cage}/secret.png",
    "climbing": lambda cage, port: "../cage/secret.png",
    "percent-encoded": lambda cage, port: "%2e%2e/cage/secret.png",
    "backslashes": lambda cage, port: "..\\cage\\secret.png",
    "file": lambda cage, port: f"file://{cage}/secret.png",
    "http": lambda cage, port: f"http://127.0.0.1:{port}/x.png",
    "host": lambda cage, port: f"//127.0.0.1:{port}/x.png",
    "device": lambda cage, port: "/dev/zero",
    "ten thousand characters": lambda cage, port: "x/" * 5000 + "x.png",
}

ATTACKS: dict[str, Attack] = {
    **{
        f"glTF image, {name}": _attack(image_uri(uri), "corrupt_file", "missing_texture", "import_error")
        for name, uri in _URIS.items()
    },
    "glTF buffer, absolute": _attack(_buffer_uri(lambda cage: f"{cage}/secret.bin"), "corrupt_file", "import_error"),
    "glTF buffer, climbing": _attack(_buffer_uri(lambda cage: "../cage/secret.bin"), "corrupt_file", "import_error"),
    "glTF buffer, /etc/passwd": _attack(_buffer_uri(lambda cage: "/etc/passwd"), "corrupt_file", "import_error"),
    "OBJ library, climbing": _attack(_obj(lambda cage: "../cage/secret.mtl"), "corrupt_file", None),
    "OBJ library, absolute": _attack(_obj(lambda cage: f"{cage}/secret.mtl"), "corrupt_file", None),
    "OBJ library, ten thousand characters": _attack(_obj(lambda cage: "x" * 10_000), "corrupt_file", None),
    "OBJ texture, absolute": _attack(
        _obj(lambda cage: "b.mtl", lambda cage: f"map_Kd {cage}/secret.png"), "corrupt_file", "missing_texture"
    ),
    "OBJ texture, climbing": _attack(
        _obj(lambda cage: "b.mtl", lambda cage: "map_Kd -s 1 1 1 ../cage/secret.png"), "corrupt_file", "missing_texture"
    ),
    "OBJ texture, device": _attack(
        _obj(lambda cage: "b.mtl", lambda cage: "map_Kd /dev/zero"), "corrupt_file", "missing_texture"
    ),
    "USD reference, climbing": _attack(
        usd(lambda cage, port: "references = @../cage/secret.usda@</Secret>"), "corrupt_file", None
    ),
    "USD payload, absolute": _attack(
        usd(lambda cage, port: f"payload = @{cage}/secret.usda@</Secret>"), "corrupt_file", None
    ),
    "USD layer, absolute": _attack(
        usd(lambda cage, port: f"subLayers = [ @{cage}/secret.usda@ ]"), "corrupt_file", None
    ),
    "USD reference, http": _attack(
        usd(lambda cage, port: f"references = @http://127.0.0.1:{port}/x.usda@</Secret>"), "missing_resource", None
    ),
    "USDZ that climbs": _attack(_usdz_outside, "corrupt_file", None),
    "USDZ bomb": _attack(_zip_bomb, "corrupt_file", "empty_scene", "import_error"),
    "Blender script, driver and handler": _attack(_by_blender("intruder", "blend"), None, "missing_texture", None),
    "FBX texture, absolute": _attack(_by_blender("intruder_fbx", "fbx"), None, "missing_texture"),
    "PNG of 60000 x 60000": _attack(_huge_png, "too_large", "missing_texture", "out_of_memory", "import_error"),
    "JPEG of 60000 x 60000": _attack(_huge_jpeg, "too_large", "missing_texture", "out_of_memory", "import_error"),
    "ten million nodes": _attack(_raw_glb(_nodes(10_000_000)), "too_large"),
    "two million nodes": _attack(_raw_glb(_nodes(2_000_000)), "too_large"),
    "a cycle of nodes": _attack(_cycle, "corrupt_file", "import_error", None),
    "glTF of 2^31 vertices": _attack(_count, "corrupt_file", "import_error", "empty_scene", "out_of_memory"),
    # Blender 4.5 ends by SIGABRT on it.
    "PLY of 2^31 vertices": _attack(_ply_count, "truncated", "render_crash", "import_error", "empty_scene"),
    "STL of 2^32 triangles": _attack(_stl_count, "truncated", "import_error", "empty_scene", "out_of_memory"),
    "names that break lines": _attack(_names, None, None),
    "a name that is no text": _attack(_surrogate_name, None, "import_error", None),
}
