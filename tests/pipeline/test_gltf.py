"""glTF: harmless oddities pass, contradictions are named, hostile files stay bounded in time and memory."""

from __future__ import annotations

import base64
import copy
import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.admission import check_file
from pipeline.spec import AdmissionSpec
from pipeline.types import FailureKind
from tests.pipeline.test_admission import PNG, SPEC, K, kind_of


def ktx2(
    vk_format: int = 37, size: tuple[int, int, int] = (2, 3, 0), layers: int = 0, faces: int = 1, scheme: int = 0,
    num_bytes: int = 24, inflated: int = 24,
) -> bytes:  # fmt: skip
    """Return the header of a KTX2 image of one level, without its pixels."""
    head = struct.pack("<12s9I", b"\xabKTX 20\xbb\r\n\x1a\n", vk_format, 1, *size, layers, faces, 1, scheme)
    return head + bytes(32) + struct.pack("<3Q", 104, num_bytes, inflated)


def embedded(content: bytes) -> dict[str, str]:
    return {"uri": f"data:;base64,{base64.b64encode(content).decode()}"}


# ---- made glTF


def box() -> tuple[dict[str, Any], bytes]:
    """Return a small glTF document and its BIN chunk: one textured quad, indexed."""
    positions = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], "<f4").tobytes()
    indices = np.array([0, 1, 2, 0, 2, 3], "<u2").tobytes()
    binary = positions + indices + PNG
    views = [(0, len(positions)), (len(positions), len(indices)), (len(positions) + len(indices), len(PNG))]
    return {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1, "material": 0}]}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3", "min": [0, 0, 0], "max": [1, 1, 0]},
            {"bufferView": 1, "componentType": 5123, "count": 6, "type": "SCALAR"},
        ],
        "bufferViews": [{"buffer": 0, "byteOffset": offset, "byteLength": length} for offset, length in views],
        "buffers": [{"byteLength": len(binary)}],
        "images": [{"bufferView": 2, "mimeType": "image/png", "name": "paint"}],
        "textures": [{"source": 0}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}],
    }, binary


def glb(document: Any, binary: bytes | None, *, text: bytes | None = None) -> bytes:
    text = json.dumps(document).encode() if text is None else text
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    if binary is not None:
        binary += b"\0" * (-len(binary) % 4)
        chunks += struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def judge(tmp_path: Path, document: Any, binary: bytes | None, **kwargs: Any) -> tuple[FailureKind | None, str]:
    path = tmp_path / "file"
    path.write_bytes(glb(document, binary, **kwargs))
    return kind_of(path, "glb")


def set_at(document: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """Return a copy with the value at a place such as "nodes.0.children"; `...` removes it."""
    document = copy.deepcopy(document)
    *parts, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    target: Any = document
    for part in parts:
        target = target[part]
    if value is ...:
        del target[last]
    elif isinstance(target, list) and last == len(target):
        target.append(value)
    else:
        target[last] = value
    return document


ODD_BUT_HARMLESS = [
    ("scene", ...),
    ("scenes", ...),
    ("scene", None),
    ("accessors.0.min", [None, None, None]),
    ("accessors.2", {"bufferView": 0, "componentType": 5126, "count": 0, "type": "VEC3", "min": [None] * 3}),
    ("accessors.2", {"componentType": 5126, "count": 4, "type": "VEC3"}),
    ("images.1", {"uri": "unused.png"}),
    ("images.1", {"uri": "unused.ktx2"}),
    ("textures.0.extensions", {"KHR_texture_basisu": {"source": 0}}),
    ("textures.0", {"extensions": {"KHR_texture_basisu": {"source": 0}}}),
    ("images.0", embedded(ktx2())),
    ("images.0", embedded(ktx2(vk_format=29, num_bytes=9, inflated=18, scheme=2))),
    ("images.0", embedded(ktx2(vk_format=0, num_bytes=99, inflated=0, scheme=1))),
    ("textures.1", {}),
    ("buffers.0.byteLength", 100),
    ("buffers.1", {"uri": "unused.bin", "byteLength": 4}),
    ("nodes.1", {"children": [], "mesh": None}),
    ("meshes.1", {"primitives": []}),
    ("meshes.0.primitives.1", {"attributes": {}, "mode": 0}),
    ("meshes.0.primitives.1", {"attributes": {"POSITION": 0}, "mode": 0}),
    ("extensionsUsed", ["EXT_texture_basis_of_tomorrow"]),
    ("extras", {"anything": [1, {"x": None}]}),
    ("materials.0.extras", {"fooTexture": {"index": 99}}),
    ("bufferViews.0.byteStride", 12),
    ("asset.generator", "\ud83d\ude00"),
]


@pytest.mark.parametrize(("place", "value"), ODD_BUT_HARMLESS)
def test_harmless_oddities_pass(tmp_path: Path, place: str, value: Any) -> None:
    document, binary = box()
    if place == "buffers.0.byteLength":
        value = len(binary) - 1 if value > len(binary) else value
        document["bufferViews"][2]["byteLength"] = value - document["bufferViews"][2]["byteOffset"]
    assert judge(tmp_path, set_at(document, place, value), binary) == (None, "")


CONTRADICTIONS = [
    ("asset", ..., K.CORRUPT_FILE),
    ("asset.version", 2, K.CORRUPT_FILE),
    ("asset.version", "1.0", K.UNSUPPORTED_FORMAT),
    ("scene", 1, K.CORRUPT_FILE),
    ("scene", -1, K.CORRUPT_FILE),
    ("scene", 0.0, K.CORRUPT_FILE),
    ("scene", True, K.CORRUPT_FILE),
    ("scenes", {}, K.CORRUPT_FILE),
    ("scenes", {"a": 1}, K.CORRUPT_FILE),
    ("scenes.0", 3, K.CORRUPT_FILE),
    ("scenes.0.nodes", 0, K.CORRUPT_FILE),
    ("scenes.0.nodes", [7], K.CORRUPT_FILE),
    ("nodes", "x", K.CORRUPT_FILE),
    ("nodes.0.mesh", 1, K.CORRUPT_FILE),
    ("nodes.0.mesh", ..., K.EMPTY_SCENE),
    ("nodes.0.skin", 0, K.CORRUPT_FILE),
    ("nodes.0.camera", 0, K.CORRUPT_FILE),
    ("nodes.0.children", [0], K.CORRUPT_FILE),
    ("nodes.0.children", [1], K.CORRUPT_FILE),
    ("meshes.0.primitives", {}, K.EMPTY_SCENE),
    ("meshes.0.primitives", 5, K.CORRUPT_FILE),
    ("meshes.0.primitives.0.mode", 7, K.CORRUPT_FILE),
    ("meshes.0.primitives.0.mode", [], K.CORRUPT_FILE),
    ("meshes.0.primitives.0.mode", 0, K.EMPTY_SCENE),
    ("meshes.0.primitives.0.mode", 1, K.EMPTY_SCENE),
    ("meshes.0.primitives.0.material", 1, K.CORRUPT_FILE),
    ("meshes.0.primitives.0.indices", 2, K.CORRUPT_FILE),
    ("meshes.0.primitives.0.indices", 0, K.CORRUPT_FILE),
    ("meshes.0.primitives.0.attributes", [], K.CORRUPT_FILE),
    ("meshes.0.primitives.0.attributes", {}, K.EMPTY_SCENE),
    ("meshes.0.primitives.0.attributes.POSITION", 9, K.CORRUPT_FILE),
    ("meshes.0.primitives.0.attributes.POSITION", 1, K.CORRUPT_FILE),
    ("meshes.0.primitives.0.targets", 3, K.CORRUPT_FILE),
    ("meshes.0.primitives.0.targets", [{"POSITION": 9}], K.CORRUPT_FILE),
    ("meshes.0.primitives.0.extensions", {"KHR_draco_mesh_compression": {"bufferView": 9}}, K.CORRUPT_FILE),
    ("accessors.0.count", 5, K.CORRUPT_FILE),
    ("accessors.0.count", 3, K.CORRUPT_FILE),
    ("accessors.0.count", 10**300, K.CORRUPT_FILE),
    ("accessors.0.count", 2**53, K.CORRUPT_FILE),
    ("accessors.0.count", -4, K.CORRUPT_FILE),
    ("accessors.0.count", "4", K.CORRUPT_FILE),
    ("accessors.0.count", ..., K.CORRUPT_FILE),
    ("accessors.0.byteOffset", 4, K.CORRUPT_FILE),
    ("accessors.0.componentType", 1, K.CORRUPT_FILE),
    ("accessors.0.componentType", [], K.CORRUPT_FILE),
    ("accessors.0.type", "VEC9", K.CORRUPT_FILE),
    ("accessors.0.type", {}, K.CORRUPT_FILE),
    ("accessors.0.bufferView", 8, K.CORRUPT_FILE),
    ("accessors.1.componentType", 5126, K.CORRUPT_FILE),
    ("accessors.0.sparse", {"count": 9}, K.CORRUPT_FILE),
    ("accessors.0.sparse", {"count": 1}, K.CORRUPT_FILE),
    ("bufferViews.0.byteStride", 16, K.CORRUPT_FILE),
    ("bufferViews.0.byteLength", 10**9, K.CORRUPT_FILE),
    ("bufferViews.0.byteOffset", 10**9, K.CORRUPT_FILE),
    ("bufferViews.0.buffer", ..., K.CORRUPT_FILE),
    ("buffers.0.byteLength", 10**9, K.CORRUPT_FILE),
    ("buffers.0.byteLength", ..., K.CORRUPT_FILE),
    ("buffers.0.uri", 5, K.CORRUPT_FILE),
    ("buffers.0.uri", "gone.bin", K.MISSING_RESOURCE),
    ("buffers.0.uri", "data:application/octet-stream;base64,AAAA", K.CORRUPT_FILE),
    ("buffers.0.uri", "data:application/octet-stream;base64,A", K.CORRUPT_FILE),
    ("buffers.0.uri", "data:,AAAA", K.CORRUPT_FILE),
    ("images.0", {}, K.MISSING_TEXTURE),
    ("images.0", {"uri": "gone.png"}, K.MISSING_TEXTURE),
    ("images.0", {"uri": "gone.ktx2"}, K.MISSING_TEXTURE),
    ("images.0", {"uri": "data:image/png;base64,AAAA"}, K.MISSING_TEXTURE),
    ("images.0", embedded(ktx2()[:40]), K.CORRUPT_FILE),
    ("images.0", embedded(ktx2(vk_format=145)), K.UNSUPPORTED_FORMAT),
    ("images.0", embedded(ktx2(scheme=4)), K.UNSUPPORTED_FORMAT),
    ("images.0", embedded(ktx2(size=(2, 3, 1))), K.UNSUPPORTED_FORMAT),
    ("images.0", embedded(ktx2(layers=2)), K.UNSUPPORTED_FORMAT),
    ("images.0", embedded(ktx2(faces=6)), K.UNSUPPORTED_FORMAT),
    ("images.0", embedded(ktx2(size=(2**16, 2**16, 0))), K.TOO_LARGE),
    ("images.0", embedded(ktx2(scheme=2, inflated=2**40)), K.CORRUPT_FILE),
    ("images.0", embedded(ktx2(vk_format=0, scheme=2, inflated=17)), K.CORRUPT_FILE),
    ("images.0.bufferView", 0, K.MISSING_TEXTURE),
    ("textures.0.source", 1, K.CORRUPT_FILE),
    ("textures.0.sampler", 0, K.CORRUPT_FILE),
    ("textures.0", {"extensions": {"KHR_texture_basisu": {"source": 1}}}, K.CORRUPT_FILE),
    ("materials.0.pbrMetallicRoughness.baseColorTexture.index", 4, K.CORRUPT_FILE),
    ("materials.0.extensions", {"KHR_x": {"sheenColorTexture": {"index": 4}}}, K.CORRUPT_FILE),
    ("skins", [{"joints": [4]}], K.CORRUPT_FILE),
    ("skins", [{"joints": [0], "inverseBindMatrices": 8}], K.CORRUPT_FILE),
    ("animations", [{"channels": [{"sampler": 0, "target": {"node": 0}}], "samplers": []}], K.CORRUPT_FILE),
    ("animations", [{"channels": 4}], K.CORRUPT_FILE),
    ("animations", [{"samplers": [{"input": 9, "output": 0}]}], K.CORRUPT_FILE),
    ("extensionsRequired", ["EXT_texture_of_tomorrow"], K.UNSUPPORTED_FORMAT),
    ("extensionsRequired", ["EXT_meshopt_compression"], K.CORRUPT_FILE),  # extensionsUsed does not name it
    ("extensionsRequired", ["KHR_materials_unlit"], K.CORRUPT_FILE),
    ("extensionsRequired", "KHR_materials_unlit", K.CORRUPT_FILE),
    ("extensionsRequired", [4], K.CORRUPT_FILE),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "kind"), CONTRADICTIONS)
def test_contradictions_are_named(tmp_path: Path, place: str, value: Any, kind: FailureKind | None) -> None:
    document, binary = box()
    got, message = judge(tmp_path, set_at(document, place, value), binary)
    assert got == kind, message


def meshopt_box() -> tuple[dict[str, Any], bytes]:
    """Return the box with its positions compressed: by what its JSON says, the stream itself is not looked at here."""
    document, binary = box()
    entry = {"buffer": 0, "byteOffset": 4, "byteLength": 40, "byteStride": 12, "count": 4, "mode": "ATTRIBUTES"}
    document["bufferViews"][0] = {"buffer": 1, "byteLength": 48, "extensions": {"EXT_meshopt_compression": entry}}
    document["buffers"].append({"byteLength": 48, "extensions": {"EXT_meshopt_compression": {"fallback": True}}})
    document["extensionsUsed"] = document["extensionsRequired"] = ["EXT_meshopt_compression"]
    return document, binary


ENTRY = "bufferViews.0.extensions.EXT_meshopt_compression"


@pytest.mark.parametrize(
    ("place", "value", "kind"),
    [
        ("extras", {}, None),
        (f"{ENTRY}.filter", "NONE", None),
        (f"{ENTRY}.filter", "EXPONENTIAL", None),
        ("bufferViews.0.byteStride", 12, None),
        ("bufferViews.0.byteLength", 47, K.CORRUPT_FILE),  # shorter than its accessor
        ("bufferViews.0.byteLength", 49, K.CORRUPT_FILE),
        ("bufferViews.0.byteOffset", 1, K.CORRUPT_FILE),
        ("bufferViews.0.byteStride", 16, K.CORRUPT_FILE),
        (ENTRY, {}, K.CORRUPT_FILE),
        (ENTRY, 3, K.CORRUPT_FILE),
        (f"{ENTRY}.buffer", 2, K.CORRUPT_FILE),
        (f"{ENTRY}.buffer", 1, K.CORRUPT_FILE),  # the fallback, which has no bytes
        (f"{ENTRY}.byteOffset", 10**9, K.CORRUPT_FILE),
        (f"{ENTRY}.byteOffset", -1, K.CORRUPT_FILE),
        (f"{ENTRY}.byteLength", 10**9, K.CORRUPT_FILE),
        (f"{ENTRY}.byteStride", 0, K.CORRUPT_FILE),
        (f"{ENTRY}.byteStride", 13, K.CORRUPT_FILE),
        (f"{ENTRY}.byteStride", 260, K.CORRUPT_FILE),
        (f"{ENTRY}.count", 3, K.CORRUPT_FILE),
        (f"{ENTRY}.count", 2**31, K.TOO_LARGE),
        (f"{ENTRY}.count", 2**60, K.CORRUPT_FILE),
        (f"{ENTRY}.count", 4.5, K.CORRUPT_FILE),
        (f"{ENTRY}.mode", "INDICES", K.CORRUPT_FILE),
        (f"{ENTRY}.mode", "SPELLS", K.CORRUPT_FILE),
        (f"{ENTRY}.mode", ..., K.CORRUPT_FILE),
        (f"{ENTRY}.filter", "OCTAHEDRAL", K.CORRUPT_FILE),
        (f"{ENTRY}.filter", "QUATERNION", K.CORRUPT_FILE),
        (f"{ENTRY}.filter", "SEPIA", K.CORRUPT_FILE),
        ("images.0.bufferView", 0, K.CORRUPT_FILE),
    ],
)
def test_what_meshopt_views_say_of_themselves(tmp_path: Path, place: str, value: Any, kind: FailureKind | None) -> None:
    document, binary = meshopt_box()
    got, message = judge(tmp_path, set_at(document, place, value), binary)
    assert got == kind, message


def test_plain_bytes_beside_compressed_ones_are_what_is_checked(tmp_path: Path) -> None:
    document, binary = meshopt_box()
    del document["extensionsRequired"]
    document["buffers"][1] = {"byteLength": 48, **embedded(np.full(12, np.inf, "<f4").tobytes())}
    assert judge(tmp_path, document, binary)[0] == K.DEGENERATE_GEOMETRY
    document["extensionsRequired"] = ["EXT_meshopt_compression"]
    assert judge(tmp_path, document, binary)[0] is None


@pytest.mark.parametrize(
    "uri",
    [
        *("/etc/passwd", "../secret.bin", "a/../../b.bin", "file:///etc/passwd", "http://h/x.bin", "https://h/x.bin"),
        *("C:\\x.bin", "\\\\host\\x", "..\\x.bin", "%2e%2e/x.bin", "a\x00b", "%2Fetc/passwd", "//host/x.bin"),
    ],
)
def test_references_never_leave_the_folder(tmp_path: Path, uri: str) -> None:
    document, binary = box()
    (tmp_path.parent / "secret.bin").write_bytes(binary)
    for place in ("buffers.0.uri", "images.0"):
        kind, message = judge(tmp_path, set_at(document, place, uri if place != "images.0" else {"uri": uri}), binary)
        assert kind == K.CORRUPT_FILE, message
        assert "outside" in message or "not a file name" in message


def test_side_files_are_found_read_and_measured(tmp_path: Path) -> None:
    document, binary = box()
    (tmp_path / "my data").mkdir()
    document = set_at(document, "buffers.0.uri", "my%20data/Scene.bin")
    document = set_at(document, "images.0", {"uri": "my data\\paint.PNG"})
    path = tmp_path / "scene.gltf"
    path.write_text(json.dumps(document))
    assert kind_of(path, "gltf")[0] == K.MISSING_RESOURCE
    (tmp_path / "my data" / "Scene.bin").write_bytes(binary)
    assert kind_of(path, "gltf")[0] == K.MISSING_TEXTURE
    (tmp_path / "my data" / "paint.PNG").write_bytes(PNG)
    assert check_file(path, "gltf", SPEC).expected_triangles == 2
    assert kind_of(path, "gltf", AdmissionSpec(max_asset_bytes=len(path.read_bytes())))[0] is None
    (tmp_path / "my data" / "Scene.bin").write_bytes(binary + bytes(10_000))
    assert kind_of(path, "gltf", AdmissionSpec(max_asset_bytes=5_000))[0] == K.TOO_LARGE
    (tmp_path / "my data" / "Scene.bin").write_bytes(binary[:50])
    assert kind_of(path, "gltf")[0] == K.TRUNCATED


def test_data_uris_and_mixed_up_endings(tmp_path: Path) -> None:
    document, binary = box()
    inside = set_at(document, "buffers.0.uri", "data:;base64," + base64.b64encode(binary).decode())
    path = tmp_path / "file"
    path.write_text(json.dumps(inside))
    assert check_file(path, "gltf", SPEC).expected_triangles == 2
    assert check_file(path, "glb", SPEC).expected_triangles == 2
    path.write_bytes(glb(document, binary))
    assert check_file(path, "gltf", SPEC).expected_triangles == 2


def test_triangles_by_topology_instances_and_scenes(tmp_path: Path) -> None:
    document, binary = box()

    def count(changed: dict[str, Any]) -> int | None:
        path = tmp_path / "file"
        path.write_bytes(glb(changed, binary))
        return check_file(path, "glb", SPEC).expected_triangles

    assert count(set_at(document, "meshes.0.primitives.0.mode", 5)) == 4
    assert count(set_at(document, "meshes.0.primitives.0.indices", ...)) == 1
    assert count(set_at(set_at(document, "nodes.1", {"mesh": 0}), "scenes.0.nodes", [0, 1])) == 4
    assert count(set_at(document, "nodes.1", {"mesh": 0})) == 2
    assert count(set_at(set_at(document, "nodes.1", {"mesh": 0}), "scenes", [])) == 4  # then every node counts
    instanced = set_at(document, "nodes.0.extensions", {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": 0}}})
    assert count(instanced) == 8
    path = tmp_path / "file"
    assert kind_of(path, "glb", AdmissionSpec(max_triangles=7))[0] == K.TOO_LARGE


def test_positions_that_no_triangle_uses_may_be_anything(tmp_path: Path) -> None:
    document, _ = box()
    for corner, kind in ((3, None), (1, K.DEGENERATE_GEOMETRY)):
        positions = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], "<f4")
        positions[corner] = np.nan
        binary = positions.tobytes() + np.array([0, 1, 2, 0, 2, 1], "<u2").tobytes() + PNG
        assert judge(tmp_path, document, binary)[0] == kind


def test_sparse_accessors(tmp_path: Path) -> None:
    document, binary = box()
    base = len(binary)
    binary += np.array([1], "<u2").tobytes() + b"\0\0" + np.array([5, 5, 5], "<f4").tobytes()
    document["buffers"][0]["byteLength"] = len(binary)
    document["bufferViews"] += [
        {"buffer": 0, "byteOffset": base, "byteLength": 2},
        {"buffer": 0, "byteOffset": base + 4, "byteLength": 12},
    ]
    sparse = {"count": 1, "indices": {"bufferView": 3, "componentType": 5123}, "values": {"bufferView": 4}}
    document = set_at(document, "accessors.0.sparse", sparse)
    assert judge(tmp_path, document, binary)[0] is None
    beyond = binary[:base] + np.array([4], "<u2").tobytes() + binary[base + 2 :]
    assert judge(tmp_path, document, beyond) == (
        K.CORRUPT_FILE,
        "accessors[0].sparse.indices holds 4; the accessor has 4 elements",
    )
    infinite = binary[: base + 4] + np.array([np.inf, 0, 0], "<f4").tobytes()
    assert judge(tmp_path, document, infinite)[0] == K.DEGENERATE_GEOMETRY
    assert judge(tmp_path, set_at(document, "accessors.0.sparse.values.bufferView", 3), binary)[0] == K.CORRUPT_FILE


# ---- hostile input


def quickly(tmp_path: Path, data: bytes, format: str = "glb", limit_s: float = 8.0) -> FailureKind | None:
    path = tmp_path / "hostile"
    path.write_bytes(data)
    begun = time.monotonic()
    kind = kind_of(path, format)[0]
    assert time.monotonic() - begun < limit_s
    return kind


def test_json_bombs(tmp_path: Path) -> None:
    deep = b'{"asset":{"version":"2.0"},"extras":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    assert quickly(tmp_path, glb(None, None, text=deep)) == K.CORRUPT_FILE
    wide = b'{"asset":{"version":"2.0"},"extras":[' + b"0," * 9_000_000 + b"0]}"
    assert quickly(tmp_path, glb(None, None, text=wide)) == K.TOO_LARGE
    for text in (b"[]", b"{", b"{}", b"\xff\xfe", b'{"asset":NaN}', b'{"a":' + b"9" * 5000 + b"}", b"null", b""):
        assert quickly(tmp_path, glb(None, None, text=text)) in (K.CORRUPT_FILE, K.NOT_AN_ASSET)


def test_deep_node_chains_are_walked_without_recursion(tmp_path: Path) -> None:
    document, binary = box()
    count = 50_000
    document["nodes"] = [{"children": [i + 1]} for i in range(count)] + [{"mesh": 0}]
    assert quickly(tmp_path, glb(document, binary)) is None


def test_counts_that_would_allocate_are_refused(tmp_path: Path) -> None:
    document, binary = box()
    zeros = {"componentType": 5126, "count": 2**50, "type": "VEC3"}
    without_bytes = set_at(document, "accessors.0", zeros)
    assert quickly(tmp_path, glb(set_at(without_bytes, "meshes.0.primitives.0.indices", ...), binary)) == K.TOO_LARGE
    assert quickly(tmp_path, glb(without_bytes, binary)) == K.TOO_LARGE
    sparse = zeros | {
        "sparse": {"count": 0, "indices": {"bufferView": 1, "componentType": 5123}, "values": {"bufferView": 0}}
    }
    assert quickly(tmp_path, glb(set_at(document, "accessors.0", sparse), binary)) == K.TOO_LARGE
    instanced = set_at(document, "nodes.0.extensions", {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": 2}}})
    assert quickly(tmp_path, glb(set_at(instanced, "accessors.2", zeros), binary)) == K.TOO_LARGE


def test_bytes_named_over_and_over_are_not_read_over_and_over(tmp_path: Path) -> None:
    size = 4_000_000
    count = size // 12
    document, _ = box()
    document = {key: document[key] for key in ("asset", "scene", "scenes", "nodes")}
    document |= {"buffers": [{"byteLength": size}], "bufferViews": [{"buffer": 0, "byteLength": size}]}
    view = {"bufferView": 0, "componentType": 5126, "count": count, "type": "VEC3"}
    document["accessors"] = [view] * 2000
    document["meshes"] = [{"primitives": [{"attributes": {"POSITION": i}} for i in range(2000)]}]
    assert quickly(tmp_path, glb(document, bytes(size)), limit_s=5) == K.TOO_LARGE


@pytest.fixture(scope="module")
def seeds() -> list[bytes]:
    document, binary = box()
    return [glb(document, binary), glb(set_at(document, "images", []), binary), json.dumps(document).encode()]


@settings(max_examples=300, deadline=2000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz_bytes(tmp_path: Path, seeds: list[bytes], data: st.DataObject) -> None:
    """Only an AssetError leaves, whatever bytes are changed, cut, doubled or moved."""
    content = bytearray(data.draw(st.sampled_from(seeds)))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(content)))
        piece = data.draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b'"', b"[", b"{", b"-1", b"1e999", b"null"]))
        )
        content[at : at + data.draw(st.integers(0, 6))] = piece
    if data.draw(st.booleans()) and len(content) >= 12:
        content[8:12] = len(content).to_bytes(4, "little")
    path = tmp_path / "fuzz"
    path.write_bytes(bytes(content))
    for format in ("glb", "gltf"):
        kind_of(path, format)


JUNK_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
JUNK = st.recursive(
    JUNK_LEAVES | st.sampled_from([0, 1, 2**31, 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["uri", "count", "mesh", "index", "source"]), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(value: Any, prefix: str = "") -> list[str]:
    """Return every place in a document, as set_at takes it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    found: list[str] = []
    for key, inner in items:
        found += [f"{prefix}{key}", *places(inner, f"{prefix}{key}.")]
    return found


@settings(max_examples=500, deadline=2000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz_documents(tmp_path: Path, data: st.DataObject) -> None:
    """Only an AssetError leaves, whatever values stand in the document."""
    document, binary = box()
    for _ in range(data.draw(st.integers(1, 3))):
        document = set_at(document, data.draw(st.sampled_from(places(document))), data.draw(JUNK))
    text = json.dumps(document).encode()
    path = tmp_path / "fuzz"
    path.write_bytes(glb(None, binary, text=text))
    kind_of(path, "glb")
