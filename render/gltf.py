"""Keep only the default scene of a glTF file, before Blender sees it: standard library only.

Blender's importer takes the nodes of every scene (and of none), so a file with a low and a high variant shows both, one
inside the other. Nodes outside the default scene lose what they show (mesh, skin, camera, light) but stay as nodes,
since indexes and joints refer to them. A file that needs no change is imported as it is.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

_SHOWN = ("mesh", "skin", "camera", "weights")
_CHUNK = struct.Struct("<I4s")


def default_scene_only(path: Path, scratch_dir: Path) -> Path:
    """Return a path to the file with its default scene alone: `path` itself, or a rewritten copy in scratch_dir.

    A file whose structure is not glTF is returned as it is: the importer will say what is wrong with it.
    """
    try:
        text, rest = split(path)
        document = json.loads(text)
        if not _prune(document):
            return path
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error, RecursionError):
        return path
    return _write(path, scratch_dir / f"default-scene{path.suffix.lower()}", document, rest)


def without_animations(path: Path, scratch_dir: Path) -> Path:
    """Return a path to the file without its animations, so that nodes and morph weights keep their static values.

    It is `path` itself where there is none, and where the structure is not glTF.
    """
    try:
        text, rest = split(path)
        document = json.loads(text)
        if not document.pop("animations", None):
            return path
    except (ValueError, TypeError, AttributeError, struct.error, RecursionError):
        return path
    return _write(path, scratch_dir / f"still{path.suffix.lower()}", document, rest)


def extensions_used(path: Path) -> frozenset[str]:
    """Return the extensions that a glTF file says it uses; none for a file whose structure is not glTF."""
    try:
        used = json.loads(split(path)[0]).get("extensionsUsed", [])
        return frozenset(name for name in used if isinstance(name, str))
    except (ValueError, TypeError, AttributeError, struct.error, RecursionError):
        return frozenset()


def split(path: Path) -> tuple[bytes, int | None]:
    """Return the JSON text, and for a GLB the offset of what follows the JSON chunk.

    Raises:
        ValueError: a GLB whose first chunk is not JSON, or longer than the file.
        struct.error: a GLB shorter than its header.
    """
    with path.open("rb") as file:
        head = file.read(20)
        if head[:4] != b"glTF":
            return path.read_bytes(), None
        size, kind = _CHUNK.unpack(head[12:20])
        if kind != b"JSON" or size > path.stat().st_size:
            raise ValueError("first chunk is not JSON")
        return file.read(size), 20 + size


def _prune(document: dict[str, Any]) -> bool:
    """Strip nodes outside the default scene; return whether anything changed."""
    nodes, scenes = document.get("nodes", []), document.get("scenes", [])
    if not scenes:
        return False
    index = document.get("scene", 0)
    if not isinstance(index, int) or not 0 <= index < len(scenes):
        return False
    reached: set[int] = set()
    waiting = list(scenes[index].get("nodes", []))
    while waiting:
        node = waiting.pop()
        if node not in reached and 0 <= node < len(nodes):
            reached.add(node)
            waiting.extend(nodes[node].get("children", []))
    changed = False
    for i, node in enumerate(nodes):
        if i in reached:
            continue
        for name in _SHOWN:
            changed |= node.pop(name, None) is not None
        for name in ("KHR_lights_punctual", "EXT_mesh_gpu_instancing"):
            changed |= node.get("extensions", {}).pop(name, None) is not None
    return changed


def _write(source: Path, out: Path, document: dict[str, Any], rest: int | None) -> Path:
    _absolute_uris(document, source.parent.resolve())
    if rest is None:
        out.write_text(json.dumps(document), encoding="utf-8")
    else:
        _write_glb(source, out, document, rest)
    return out


def _absolute_uris(document: dict[str, Any], folder: Path) -> None:
    for item in [*document.get("buffers", []), *document.get("images", [])]:
        uri = item.get("uri")
        if isinstance(uri, str) and not uri.startswith("data:") and "://" not in uri:
            item["uri"] = quote(str(folder / unquote(uri)))


def _write_glb(source: Path, out: Path, document: dict[str, Any], rest: int) -> None:
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    with source.open("rb") as reader, out.open("wb") as writer:
        version = reader.read(8)[4:8]
        num_rest = source.stat().st_size - rest
        writer.write(b"glTF" + version + struct.pack("<I", 20 + len(text) + num_rest))
        writer.write(_CHUNK.pack(len(text), b"JSON") + text)
        reader.seek(rest)
        shutil.copyfileobj(reader, writer)
