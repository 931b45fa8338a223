"""glTF 2.0 files judged by their headers and tables, before anything opens them in earnest.

    GLB     "glTF" | version u32 | total length u32 | chunk, chunk ...
    chunk   length u32 | type, 4 bytes ("JSON" first, then optionally "BIN\\0") | payload

The container and the node graph are judged here, the binary data in `pipeline.gltf_data`. Only what contradicts itself
is refused: published files are full of harmless oddities, such as accessors without elements, bounds of null, unused
textures, or data chunks longer than their buffer.

Every count and offset in the file is foreign. Nothing is allocated by what the file says: reads are bounded by the
file's own size, the JSON by its number of values (a Python value takes up to 100 bytes), graph walks by visits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipeline import sniff
from pipeline.side_files import show
from pipeline.types import AssetError, FailureKind

Json = dict[str, Any]

MAX_JSON_VALUES = 8_000_000
MAX_NODES = 1_000_000  # the importer makes an object of each; scenes of buildings have some ten thousand
_MAX_INTEGER = 2**53  # the largest that JSON carries everywhere
# What the importer of Blender 4.5 manages when a file requires it.
BLENDER_EXTENSIONS = frozenset(
    {
        "EXT_mesh_gpu_instancing",
        "EXT_texture_webp",
        "KHR_animation_pointer",
        "KHR_draco_mesh_compression",
        "KHR_lights_punctual",
        "KHR_materials_anisotropy",
        "KHR_materials_clearcoat",
        "KHR_materials_emissive_strength",
        "KHR_materials_ior",
        "KHR_materials_pbrSpecularGlossiness",
        "KHR_materials_sheen",
        "KHR_materials_specular",
        "KHR_materials_transmission",
        "KHR_materials_unlit",
        "KHR_materials_variants",
        "KHR_materials_volume",
        "KHR_mesh_quantization",
        "KHR_texture_transform",
    }
)
# What `render.gltf_decode` turns into plain buffers and PNG images before the importer sees the file.
MESHOPT_EXTENSIONS = ("KHR_meshopt_compression", "EXT_meshopt_compression")
BASISU_EXTENSION = "KHR_texture_basisu"
DECODED_EXTENSIONS = frozenset({*MESHOPT_EXTENSIONS, BASISU_EXTENSION})
_TABLES = (
    "accessors", "animations", "bufferViews", "buffers", "cameras", "images", "materials", "meshes", "nodes",
    "samplers", "scenes", "skins", "textures",
)  # fmt: skip
_TRIANGLES, _STRIP, _FAN = 4, 5, 6
DRACO = "KHR_draco_mesh_compression"


def corrupt(message: str) -> NoReturn:
    """Raise the AssetError of a file that contradicts itself."""
    raise AssetError(FailureKind.CORRUPT_FILE, message)


def check_glb_length(path: Path) -> None:
    """Refuse a file that is no GLB, or shorter than its header says: what tells a cut download.

    Raises:
        AssetError: NOT_AN_ASSET or TRUNCATED.
    """
    with path.open("rb") as file:
        head = file.read(sniff.HEAD_BYTES)
    if not b"glTF".startswith(head[:4]):
        raise AssetError(FailureKind.NOT_AN_ASSET, f"not a GLB: {sniff.describe(head)}")
    num_bytes = path.stat().st_size
    declared = int.from_bytes(head[8:12], "little") if len(head) >= 12 else 12
    if num_bytes < declared:
        raise AssetError(
            FailureKind.TRUNCATED, f"{num_bytes} bytes of the {declared} that a GLB header needs or declares"
        )


@dataclass(slots=True, kw_only=True)
class Document:
    """A parsed glTF file whose tables are lists of objects.

    Attributes:
        data: the JSON.
        binary: payload of the BIN chunk, or None.
        folder: where side files are looked for.
    """

    data: Json
    binary: bytes | None
    folder: Path

    def table(self, name: str) -> list[Json]:
        """Return a top-level list; empty where the file has none."""
        return self.data.get(name) or []


def read_document(path: Path) -> Document:
    """Read a .glb or .gltf file, told apart by its first bytes.

    Raises:
        AssetError: TRUNCATED, CORRUPT_FILE, UNSUPPORTED_FORMAT, NOT_AN_ASSET, TOO_LARGE.
    """
    content = path.read_bytes()
    if content[:4] == b"glTF"[: len(content)]:
        text, binary = _split_glb(content)
    else:
        text, binary = content, None
        if not text.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            raise AssetError(FailureKind.NOT_AN_ASSET, f"not a glTF file: {sniff.describe(content[:64])}")
    data = _parse_json(text)
    _check_version(data)
    for name in _TABLES:
        table = data.get(name)
        if table is not None and not (isinstance(table, list) and all(isinstance(entry, dict) for entry in table)):
            corrupt(f"{name} is not a list of objects")
    _check_extensions(data)
    return Document(data=data, binary=binary, folder=path.parent)


def _split_glb(content: bytes) -> tuple[bytes, bytes | None]:
    """Return the JSON and BIN payloads of a GLB."""
    size = len(content)
    if size < 12:
        raise AssetError(FailureKind.TRUNCATED, f"{size} bytes; the header of a GLB alone has 12")
    version, declared = int.from_bytes(content[4:8], "little"), int.from_bytes(content[8:12], "little")
    if version != 2:
        raise AssetError(FailureKind.UNSUPPORTED_FORMAT, f"binary glTF version {version}; only version 2 can be read")
    if size < declared:
        raise AssetError(FailureKind.TRUNCATED, f"{size} bytes of the {declared} that the GLB header declares")
    if size > declared:
        corrupt(f"{size} bytes, {size - declared} more than the GLB header declares")
    chunks: list[tuple[bytes, bytes]] = []
    offset = 12
    while offset < size and len(chunks) < 2:  # what follows the second chunk belongs to extensions
        if offset + 8 > size:
            corrupt(f"{size - offset} stray bytes where a GLB chunk should start, at {offset}")
        length, kind = int.from_bytes(content[offset : offset + 4], "little"), content[offset + 4 : offset + 8]
        if offset + 8 + length > size:
            corrupt(f"GLB chunk {show(kind)} of {length} bytes at {offset} passes the end of the file, {size}")
        chunks.append((kind, content[offset + 8 : offset + 8 + length]))
        offset += 8 + length
    if not chunks or chunks[0][0] != b"JSON":
        corrupt("the first GLB chunk is not JSON")
    binary = chunks[1][1] if len(chunks) > 1 and chunks[1][0] == b"BIN\0" else None
    return chunks[0][1], binary


def _parse_json(text: bytes) -> Json:
    values = text.count(b",") + text.count(b"[") + text.count(b"{")
    if values > MAX_JSON_VALUES:
        raise AssetError(FailureKind.TOO_LARGE, f"JSON of about {values} values; at most {MAX_JSON_VALUES} are allowed")
    try:
        data = json.loads(text.decode("utf-8-sig"), parse_constant=_no_constant)
    except RecursionError:
        corrupt("JSON nested too deeply")
    except ValueError as error:
        corrupt(f"JSON: {error}"[:200].encode("ascii", "backslashreplace").decode())
    if not isinstance(data, dict):
        corrupt(f"JSON holds a {type(data).__name__}; an object is required")
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_version(data: Json) -> None:
    asset = data.get("asset")
    if asset is None and not any(name in data for name in _TABLES):
        raise AssetError(FailureKind.NOT_AN_ASSET, f"JSON that is no glTF; its keys: {show(list(data)[:8])}")
    if not isinstance(asset, dict) or not isinstance(asset.get("version"), str):
        corrupt("asset.version is missing or no text")
    version = asset["version"]
    if version != "2.0":
        raise AssetError(FailureKind.UNSUPPORTED_FORMAT, f"glTF version {show(version)}; only 2.0 can be read")


def _check_extensions(data: Json) -> None:
    """Refuse a file that requires what neither Blender's importer nor a decoder of ours manages."""
    lists = [data.get("extensionsRequired") or [], data.get("extensionsUsed") or []]
    for names in lists:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            corrupt("extensionsRequired or extensionsUsed is not a list of names")
    required, used = lists
    if unmanaged := sorted(set(required) - BLENDER_EXTENSIONS - DECODED_EXTENSIONS):
        text = show(", ".join(unmanaged))
        raise AssetError(FailureKind.UNSUPPORTED_FORMAT, f"requires {text}, which Blender's importer does not read")
    if missing := sorted(set(required) - set(used)):
        corrupt(f"extensionsRequired names {show(missing[0])}, extensionsUsed does not")


def index_of(entry: Json, key: str, count: int, where: str) -> int | None:
    """Return an index into a table of `count` entries, None where the key is absent or null.

    Raises:
        AssetError: CORRUPT_FILE if it is no integer or out of range.
    """
    value = entry.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < count:
        corrupt(f"{where}.{key} is {show(value)}; the table has {count} entries")
    return value


def number_of(entry: Json, key: str, where: str, default: int | None = None) -> int:
    """Return an integer >= 0, `default` where the key is absent or null.

    Raises:
        AssetError: CORRUPT_FILE if it is required and absent, negative or no integer.
    """
    value = entry.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 <= value <= _MAX_INTEGER:
        corrupt(f"{where}.{key} is {show(value)}; an integer from 0 to {_MAX_INTEGER} is required")
    return value


def object_of(entry: Json, key: str, where: str) -> Json:
    """Return an object, empty where the key is absent or null."""
    value = entry.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        corrupt(f"{where}.{key} is not an object")
    return value


def indexes_of(entry: Json, key: str, count: int, where: str) -> list[int]:
    """Return a list of indexes into a table of `count` entries, empty where the key is absent or null."""
    values = entry.get(key)
    if values is None:
        return []
    if not isinstance(values, list):
        corrupt(f"{where}.{key} is not a list")
    for value in values:
        if type(value) is not int or not 0 <= value < count:
            corrupt(f"{where}.{key} holds {show(value)}; the table has {count} entries")
    return values


def check_references(document: Document) -> None:
    """Refuse indexes out of range, too many nodes, and a node graph that is not a set of trees.

    Raises:
        AssetError: CORRUPT_FILE, TOO_LARGE.
    """
    count = {name: len(document.table(name)) for name in _TABLES}
    if count["nodes"] > MAX_NODES:
        raise AssetError(FailureKind.TOO_LARGE, f"{count['nodes']} nodes; at most {MAX_NODES} are allowed")
    # An index without scenes is harmless: importers then take all nodes.
    if count["scenes"] or type(document.data.get("scene") or 0) is not int:
        index_of(document.data, "scene", count["scenes"], "file")
    for i, scene in enumerate(document.table("scenes")):
        indexes_of(scene, "nodes", count["nodes"], f"scenes[{i}]")
    for i, node in enumerate(document.table("nodes")):
        for key, table in (("mesh", "meshes"), ("skin", "skins"), ("camera", "cameras")):
            index_of(node, key, count[table], f"nodes[{i}]")
    for i, skin in enumerate(document.table("skins")):
        indexes_of(skin, "joints", count["nodes"], f"skins[{i}]")
        index_of(skin, "skeleton", count["nodes"], f"skins[{i}]")
        index_of(skin, "inverseBindMatrices", count["accessors"], f"skins[{i}]")
    for i, texture in enumerate(document.table("textures")):
        index_of(texture, "source", count["images"], f"textures[{i}]")
        index_of(texture, "sampler", count["samplers"], f"textures[{i}]")
    for i in range(count["meshes"]):
        for primitive, where in primitives(document, i):
            index_of(primitive, "material", count["materials"], where)
    used_textures(document)
    _check_animations(document, count)
    _check_trees(document)


def primitives(document: Document, mesh: int) -> list[tuple[Json, str]]:
    """Return the primitives of a mesh, each with its name for messages."""
    entries = document.table("meshes")[mesh].get("primitives") or []
    where = f"meshes[{mesh}].primitives"
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        corrupt(f"{where} is not a list of objects")
    for entry in entries:
        mode = entry.get("mode")
        if mode is not None and (type(mode) is not int or not 0 <= mode <= _FAN):
            corrupt(f"{where}: mode {show(mode)}; 0 to 6 are allowed")
    return [(entry, f"{where}[{i}]") for i, entry in enumerate(entries)]


def mode_of(primitive: Json) -> int:
    """Return the topology: 4 triangles, 5 strip, 6 fan, below that points and lines."""
    mode = primitive.get("mode")
    return _TRIANGLES if mode is None else int(mode)


def attributes_of(document: Document, primitive: Json, where: str) -> dict[str, int]:
    """Return the accessor index of each vertex attribute."""
    attributes = object_of(primitive, "attributes", where)
    count = len(document.table("accessors"))
    return {
        name: index
        for name in attributes
        if (index := index_of(attributes, name, count, f"{where}.attributes")) is not None
    }


def used_textures(document: Document) -> set[int]:
    """Return the textures that materials refer to, through any member whose name ends in "Texture".

    Raises:
        AssetError: CORRUPT_FILE for an index out of range.
    """
    count = len(document.table("textures"))
    used: set[int] = set()
    for i, material in enumerate(document.table("materials")):
        waiting: list[Any] = [material]
        while waiting:
            entry = waiting.pop()
            for key, value in entry.items():
                if not isinstance(value, dict) or key == "extras":
                    continue
                waiting.append(value)
                if (
                    key.lower().endswith("texture")
                    and (index := index_of(value, "index", count, f"materials[{i}].{show(key)}")) is not None
                ):
                    used.add(index)
    return used


def image_of(document: Document, texture: int) -> int | None:
    """Return the image that a texture shows: its own, else the WebP's or the KTX2's of an extension, else None."""
    entry, where = document.table("textures")[texture], f"textures[{texture}]"
    count = len(document.table("images"))
    source = index_of(entry, "source", count, where)
    extensions = object_of(entry, "extensions", where)
    for name in ("EXT_texture_webp", BASISU_EXTENSION):
        if source is None:
            source = index_of(object_of(extensions, name, where), "source", count, f"{where}.{name}")
    return source


def _check_animations(document: Document, count: dict[str, int]) -> None:
    for i, animation in enumerate(document.table("animations")):
        where = f"animations[{i}]"
        lists = {key: animation.get(key) or [] for key in ("samplers", "channels")}
        for key, entries in lists.items():
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                corrupt(f"{where}.{key} is not a list of objects")
        for sampler in lists["samplers"]:
            index_of(sampler, "input", count["accessors"], where)
            index_of(sampler, "output", count["accessors"], where)
        for channel in lists["channels"]:
            index_of(channel, "sampler", len(lists["samplers"]), where)
            index_of(object_of(channel, "target", where), "node", count["nodes"], where)


def _check_trees(document: Document) -> None:
    """Refuse a node with two parents, or one below itself."""
    nodes = document.table("nodes")
    parents: list[int | None] = [None] * len(nodes)
    for i, node in enumerate(nodes):
        for child in indexes_of(node, "children", len(nodes), f"nodes[{i}]"):
            if parents[child] is not None:
                corrupt(f"nodes[{child}] is a child twice, of {parents[child]} and of {i}; nodes must form trees")
            parents[child] = i
    # With one parent each, nodes that no root reaches are in a cycle or below one.
    reached = 0
    waiting = [i for i, parent in enumerate(parents) if parent is None]
    while waiting:
        reached += 1
        waiting.extend(nodes[waiting.pop()].get("children") or [])
    if reached < len(nodes):
        corrupt(f"{len(nodes) - reached} nodes are their own ancestors or below such; nodes must form trees")


def scene_nodes(document: Document) -> list[int]:
    """Return the nodes of the default scene: `scene`, else the first; all nodes of a file without scenes."""
    nodes, scenes = document.table("nodes"), document.table("scenes")
    if not scenes:
        return list(range(len(nodes)))
    waiting = list(scenes[document.data.get("scene") or 0].get("nodes") or [])
    found: dict[int, None] = {}
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting.extend(nodes[node].get("children") or [])
    return list(found)


def count_triangles(document: Document, *, max_triangles: int) -> int:
    """Return the triangles of the default scene by the counts of its accessors; needs checked references.

    Raises:
        AssetError: EMPTY_SCENE where there is none, TOO_LARGE where there are too many.
    """
    nodes = document.table("nodes")
    per_mesh: dict[int, int] = {}
    total = num_meshes = 0
    for i in scene_nodes(document):
        mesh = nodes[i].get("mesh")
        if mesh is None:
            continue
        if mesh not in per_mesh:
            per_mesh[mesh] = sum(_primitive_triangles(document, *entry) for entry in primitives(document, mesh))
        num_meshes += 1
        total += per_mesh[mesh] * _num_instances(document, nodes[i], f"nodes[{i}]")
    if total > max_triangles:
        raise AssetError(FailureKind.TOO_LARGE, f"{total} triangles; at most {max_triangles} are allowed")
    if total == 0:
        found = f"{num_meshes} meshes without a triangle" if num_meshes else "no mesh"
        where = "the default scene" if document.table("scenes") else "the file"
        raise AssetError(FailureKind.EMPTY_SCENE, f"{where} holds {found}")
    return total


def _primitive_triangles(document: Document, primitive: Json, where: str) -> int:
    accessors = document.table("accessors")
    position = attributes_of(document, primitive, where).get("POSITION")
    indices = index_of(primitive, "indices", len(accessors), where)
    if position is None:
        return 0  # nothing can be drawn, and Blender skips it too
    source = position if indices is None else indices
    count = number_of(accessors[source], "count", f"accessors[{source}]")
    mode = mode_of(primitive)
    if mode == _TRIANGLES:
        return count // 3
    return max(0, count - 2) if mode in (_STRIP, _FAN) else 0


def _num_instances(document: Document, node: Json, where: str) -> int:
    """Return how often a node shows its mesh, more than once by EXT_mesh_gpu_instancing only."""
    instancing = object_of(object_of(node, "extensions", where), "EXT_mesh_gpu_instancing", where)
    attributes = object_of(instancing, "attributes", where)
    accessors = document.table("accessors")
    for name in attributes:
        if (index := index_of(attributes, name, len(accessors), where)) is not None:
            return number_of(accessors[index], "count", f"accessors[{index}]")
    return 1


def stated_licence(document: Document) -> str | None:
    """Return what the file says of its own licence (asset.extras.license, else asset.copyright), bounded."""
    asset = document.data["asset"]
    extras = asset.get("extras")
    text = (extras.get("license") if isinstance(extras, dict) else None) or asset.get("copyright")
    return " ".join(text[:1000].split())[:200].encode("utf-8", "replace").decode() if isinstance(text, str) else None
