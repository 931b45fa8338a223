"""Compressed glTF: what is decoded looks as its plain twin does, and what cannot be decoded ends in one true line.

The KTX2 images of Basis Universal below were made with its own encoder (2.50, ETC1S at quality 100, UASTC at its
default) from the 8 x 8 pixels of `quarters`; meshopt streams are made by meshoptimizer's encoder at run time.
"""

from __future__ import annotations

import base64
import ctypes
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from pipeline.admission import check_file
from pipeline.gltf_meshopt import MeshoptView
from pipeline.sample import decode_rgba
from pipeline.spec import AdmissionSpec
from pipeline.types import AssetError, FailureKind, Sample
from render import meshopt
from render.gltf_decode import decoded_copy
from render.ktx2 import decode_ktx2
from tests.render.conftest import Render
from tests.render.files import CUBE_TRIANGLES, CUBE_VERTICES, Glb

ETC1S_RGBA = (
    "c-mX-9TK5nWU!l;ONxsD2pEBw1BzjQ5ea7iu?-L}0b&&(J^@uT6G|sCLTF|NRA2+8nHVe>7Bez2Fas5Ez%8+dtNRZG4h;7E$b5Mq4RmICQD#YM"
    "5rb1=ab~eXXkKPnYEf}wj)IY%p#cK}8_-5GpgLY4)<d(K35r2ZQ#f!3L_0{d>9c%~V+dvftMDje;1Ey+u>?dkAF=W^Xo58;ct|A%|5j%Z4G9em"
    "Wd#bXShZ>u6T?9lh`FEct9vjSFgk$k*eSp$$ixEDlqkiRzyua#5aeKR7Lfx0oAfVf"
)
UASTC_RGBA = (
    "c-mX-9TK5nWU!l;ONxsD2pEBw1BzjQ5sE<|1Bi8icnXw82M3_E0~!re%fz6;u#Az3fti_sK>)6+o*Bma4+Qc+8tAO@qRf)iA_k|#;>==&(7epD"
    ")S}|V90emiLjwi|7Lcxb1_p6S)~EI-j=@b5XO(<vZ*UWd&-&BeKn-rbxTNIFGcnmP?=S!W=O7>_"
)
UASTC_ZSTD_RGB = (
    "c-mX-9TK5nWU!l;ONxsD2pEBw1BzjQ5sI0BI0J}vfOrZJt1w`K9Z=d3N;^Pl9VpGjpuw<=k%@tsnSnt7uB#r-`VR#1KpN<*@}kU=)FK9_#Ny0i"
    "h0wgrvecsD#2f`9JwpQq292%ye-#{D85tgkOR_$-KXHsfoK^Cvy}?b^pY{f7%#xBn@5f{_vM@AA1f23o<~YC#0Ng1i1^"
)

needs_meshoptimizer = pytest.mark.skipif(meshopt.library() is None, reason="no meshoptimizer is installed")


def unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


def quarters(alpha: bool) -> NDArray[np.uint8]:
    """Red, green, blue and light grey quarters [8, 8, 3 or 4], the last one translucent."""
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:4, :4, :3], pixels[:4, 4:, :3], pixels[4:, :4, :3] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
    pixels[4:, 4:] = (200, 200, 200, 100)
    return pixels if alpha else pixels[..., :3]


def plain_ktx2(
    pixels: NDArray[np.uint8], vk_format: int, scheme: int = 0, level: bytes | None = None, declared: int | None = None
) -> bytes:
    """Return a KTX2 file of one level; the pixels' channels are stored as they are."""
    raw = pixels.tobytes()
    if level is None:
        packed = {
            0: lambda: raw,
            2: lambda: pa.Codec("zstd").compress(raw, asbytes=True),
            3: lambda: zlib.compress(raw),
        }
        level = packed[scheme]()
    height, width = pixels.shape[:2]
    head = struct.pack("<12s9I", b"\xabKTX 20\xbb\r\n\x1a\n", vk_format, 1, width, height, 0, 0, 1, 1, scheme)
    return head + bytes(32) + struct.pack("<3Q", 104, len(level), len(raw) if declared is None else declared) + level


def outcome(run: Callable[[], object]) -> FailureKind | None:
    try:
        run()
    except AssetError as error:
        return error.kind
    return None


def kind_of(run: Callable[[], object]) -> tuple[FailureKind, str]:
    with pytest.raises(AssetError) as caught:
        run()
    assert "\n" not in caught.value.message
    return caught.value.kind, caught.value.message


# ---- KTX2


@pytest.mark.parametrize(
    ("text", "alpha", "tolerance"), [(ETC1S_RGBA, True, 3), (UASTC_RGBA, True, 0), (UASTC_ZSTD_RGB, False, 0)]
)
def test_basis_universal(text: str, alpha: bool, tolerance: int) -> None:
    found = decode_ktx2(unpacked(text), "x")
    assert found.shape == (8, 8, 4 if alpha else 3)
    assert np.abs(found.astype(int) - quarters(alpha)).max() <= tolerance


@pytest.mark.parametrize("scheme", [0, 2, 3])
@pytest.mark.parametrize(("vk_format", "order"), [(37, "rgba"), (43, "rgba"), (44, "bgra"), (23, "rgb"), (36, "bgr")])
def test_plain_pixels(vk_format: int, order: str, scheme: int) -> None:
    pixels = quarters(alpha=True)
    stored = pixels[..., ["rgba".index(channel) for channel in order]]
    found = decode_ktx2(plain_ktx2(np.ascontiguousarray(stored), vk_format, scheme), "x")
    np.testing.assert_array_equal(found, pixels[..., : len(order)])


def test_a_channel_that_a_format_lacks_is_black() -> None:
    found = decode_ktx2(plain_ktx2(np.full((2, 2, 2), 9, np.uint8), 16), "x")
    np.testing.assert_array_equal(found, np.broadcast_to(np.uint8([9, 9, 0]), (2, 2, 3)))


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", FailureKind.CORRUPT_FILE, "header"),
        (plain_ktx2(quarters(True), 37)[:-1], FailureKind.CORRUPT_FILE, "end at byte 360 of 359"),
        (plain_ktx2(quarters(True), 37, 2, b"\x28\xb5\x2f\xfdrubbish"), FailureKind.CORRUPT_FILE, "inflate"),
        (plain_ktx2(quarters(True), 37, 3, b"rubbish"), FailureKind.CORRUPT_FILE, "inflate"),
        (plain_ktx2(quarters(True), 37, 3, zlib.compress(bytes(10))), FailureKind.CORRUPT_FILE, "10 bytes of pixels"),
        (plain_ktx2(quarters(True), 37, 2, declared=2**40), FailureKind.CORRUPT_FILE, "its pixels take 256"),
        (plain_ktx2(quarters(True), 145), FailureKind.UNSUPPORTED_FORMAT, "vkFormat 145"),
        (unpacked(UASTC_RGBA)[:200], FailureKind.CORRUPT_FILE, "end at byte"),
        (unpacked(UASTC_RGBA)[:104].ljust(400, b"\xff"), FailureKind.CORRUPT_FILE, "Basis Universal"),
    ],
)
def test_broken_ktx2(data: bytes, kind: FailureKind, message: str) -> None:
    found = kind_of(lambda: decode_ktx2(data, "images[0]"))
    assert found[0] is kind
    assert message in found[1]


def test_a_flipped_bit_ends_typed_or_in_pixels() -> None:
    rng = np.random.default_rng(0)
    kinds = set()
    for text in (ETC1S_RGBA, UASTC_RGBA, UASTC_ZSTD_RGB):
        for _ in range(300):
            data = bytearray(unpacked(text))
            data[rng.integers(12, len(data))] ^= 1 << rng.integers(8)
            kinds.add(outcome(lambda data=bytes(data): decode_ktx2(data, "x")))  # type: ignore[misc]
    assert kinds <= {None, FailureKind.CORRUPT_FILE, FailureKind.UNSUPPORTED_FORMAT, FailureKind.TOO_LARGE}


def textured(path: Path, image: bytes, mime: str, **texture: Any) -> Path:
    """Write a cube whose six faces show an image, which lies inside the file."""
    glb = Glb()
    uv = np.float32([[x + y / 2, y + z / 2] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    mesh = glb.mesh(material=0, TEXCOORD_0=glb.accessor(uv, "VEC2"))
    glb.scene(glb.node(mesh=mesh))
    views = glb.document["bufferViews"]
    views.append({"buffer": 0, "byteOffset": len(glb.binary), "byteLength": len(image)})
    glb.binary += image + bytes(-len(image) % 4)
    used = list(texture.get("extensions", {}))
    glb.document |= {
        "images": [{"bufferView": len(views) - 1, "mimeType": mime}],
        "textures": [texture or {"source": 0}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}, "metallicFactor": 0}}],
    } | ({"extensionsUsed": used, "extensionsRequired": used} if used else {})
    return glb.write(path)


def pictures(sample: Sample) -> NDArray[np.uint8]:
    return np.stack([decode_rgba(view.planes["rgba"].data) for view in sample.views])


@pytest.mark.blender
@pytest.mark.parametrize("basisu", [True, False])
def test_a_ktx2_texture_renders_as_its_png_does(render: Render, tmp_path: Path, basisu: bool) -> None:
    bgr = cv2.cvtColor(quarters(alpha=False), cv2.COLOR_RGB2BGR)
    png = textured(tmp_path / "same.glb", cv2.imencode(".png", bgr)[1].tobytes(), "image/png")
    extension = {"extensions": {"KHR_texture_basisu": {"source": 0}}} if basisu else {}
    (tmp_path / "ktx2").mkdir()
    ktx2 = textured(tmp_path / "ktx2" / "same.glb", unpacked(UASTC_ZSTD_RGB), "image/ktx2", **extension)
    assert check_file(ktx2, "glb", AdmissionSpec()).expected_triangles == 12
    seen = pictures(render(png))
    assert np.ptp(seen[..., :3].reshape(-1, 3)[seen[..., 3].reshape(-1) == 255], axis=0).min() > 60
    np.testing.assert_array_equal(pictures(render(ktx2)), seen)


@pytest.mark.blender
def test_a_real_asset_with_ktx2_textures_is_copper(render: Render, shared: Path) -> None:
    sample = render(shared / "AnisotropyBarnLamp" / "AnisotropyBarnLamp.gltf", expected_triangles=10_203)
    seen = pictures(sample)
    red, green, blue = np.median(seen[seen[..., 3] == 255][:, :3], axis=0)
    assert sample.quality["num_images"] == 4
    assert red > 1.2 * green > 1.2 * blue


def test_a_file_without_compression_is_not_copied(tmp_path: Path) -> None:
    glb = Glb()
    glb.scene(glb.node(mesh=glb.mesh()))
    path = glb.write(tmp_path / "plain.glb")
    assert decoded_copy(path, tmp_path) == path
    glb.document["asset"]["generator"] = "not ktx2 at all"
    assert decoded_copy(glb.write(path), tmp_path) == path


# ---- meshopt


def encoded(values: NDArray[Any], mode: str, version: int = 0) -> bytes:
    """Encode rows of bytes, or indices, with meshoptimizer; version 1 of the codec of attributes came with KHR's."""
    found = meshopt.library()
    assert found is not None
    count, size = len(values), values.itemsize * int(np.prod(values.shape[1:]))
    name = {"ATTRIBUTES": "VertexBuffer", "TRIANGLES": "IndexBuffer", "INDICES": "IndexSequence"}[mode]
    bound, encode = getattr(found, f"meshopt_encode{name}Bound"), getattr(found, f"meshopt_encode{name}")
    found.meshopt_encodeVertexVersion(version)
    found.meshopt_encodeIndexVersion(1)
    bound.restype = encode.restype = ctypes.c_size_t
    if mode != "ATTRIBUTES":
        values = values.astype(np.uint32)
        size = int(values.max()) + 1
    most = bound(ctypes.c_size_t(count), ctypes.c_size_t(size))
    out = ctypes.create_string_buffer(most)
    sizes = (ctypes.c_size_t(count), ctypes.c_size_t(size))
    used = encode(out, ctypes.c_size_t(most), values.tobytes(), *(sizes if mode == "ATTRIBUTES" else sizes[:1]))
    assert used > 0
    return out.raw[:used]


def filtered(values: NDArray[Any], kind: str, stride: int, bits: int) -> NDArray[np.uint8]:
    """Apply one of meshoptimizer's filters to float32 rows; return rows of `stride` bytes."""
    name = {"OCTAHEDRAL": "Oct", "QUATERNION": "Quat", "EXPONENTIAL": "Exp"}[kind]
    out = ctypes.create_string_buffer(len(values) * stride)
    function = getattr(meshopt.library(), f"meshopt_encodeFilter{name}")
    function.restype = None
    function(
        out, ctypes.c_size_t(len(values)), ctypes.c_size_t(stride), ctypes.c_int(bits),
        np.ascontiguousarray(values, np.float32).tobytes(), ctypes.c_int(1),
    )  # fmt: skip
    return np.frombuffer(out.raw, np.uint8).reshape(len(values), stride)


class MeshoptGlb(Glb):
    """A GLB whose accessors are compressed, each in a view of its own; the fallback buffer has no bytes."""

    def __init__(self, extension: str = "EXT_meshopt_compression") -> None:
        super().__init__()
        self.extension = extension
        self.document["extensionsUsed"] = self.document["extensionsRequired"] = [extension, "KHR_mesh_quantization"]
        self.fallback: dict[str, Any] = {"byteLength": 0, "extensions": {extension: {"fallback": True}}}
        self.more_buffers.append(self.fallback)

    def accessor(self, values: NDArray[Any], kind: str) -> int:
        component = {"f": 5126, "u": 5125 if values.itemsize == 4 else 5121}[values.dtype.kind]
        index = self.compress(values, "TRIANGLES" if kind == "SCALAR" else "ATTRIBUTES", component, kind)
        if kind == "VEC3":
            self.document["accessors"][index] |= {
                "min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()
            }  # fmt: skip
        return index

    def compress(
        self, values: NDArray[Any], mode: str, component: int, kind: str, filter: str = "NONE", **accessor: Any
    ) -> int:
        """Add an accessor over rows that already are as the filter stores them."""
        newer = hasattr(meshopt.library(), "meshopt_decodeVertexVersion")
        data = encoded(values, mode, int(newer and self.extension.startswith("KHR")))
        stride = values.itemsize * int(np.prod(values.shape[1:]))
        entry = {
            "buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data), "byteStride": stride,
            "count": len(values), "mode": mode, "filter": filter,
        }  # fmt: skip
        view = {
            "buffer": 1, "byteOffset": self.fallback["byteLength"], "byteLength": stride * len(values),
            "extensions": {self.extension: entry},
        }  # fmt: skip
        if mode == "ATTRIBUTES":
            view["byteStride"] = stride
        self.binary += data + bytes(-len(data) % 4)
        self.fallback["byteLength"] += view["byteLength"]
        self.document["bufferViews"].append(view)
        self.document["accessors"].append(
            {"bufferView": len(self.document["bufferViews"]) - 1, "componentType": component, "count": len(values),
             "type": kind, **accessor}
        )  # fmt: skip
        return len(self.document["accessors"]) - 1


def hills(num: int = 40) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """Return vertices [V, 3] and triangles [T, 3] of a bumpy sheet in [0, 2] x [0, 1] x [0, 0.5]: no two axes alike."""
    x, y = (grid.reshape(-1) for grid in np.meshgrid(np.linspace(0, 2, num), np.linspace(0, 1, num)))
    vertices = np.stack([x, y, 0.25 + 0.25 * np.sin(9 * x) * np.cos(7 * y)], 1).astype(np.float32)
    corner = (np.arange(num - 1)[:, None] * num + np.arange(num - 1)).reshape(-1)
    quads = [corner, corner + 1, corner + num + 1, corner, corner + num + 1, corner + num]
    return vertices, np.stack(quads, 1).reshape(-1, 3).astype(np.uint32)


def slopes(vertices: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the unit normals [V, 3] of `hills`."""
    x, y = vertices[:, 0], vertices[:, 1]
    dx, dy = 2.25 * np.cos(9 * x) * np.cos(7 * y), -1.75 * np.sin(9 * x) * np.sin(7 * y)
    normals = np.stack([-dx, -dy, np.ones_like(x)], 1)
    return (normals / np.linalg.norm(normals, axis=1, keepdims=True)).astype(np.float32)


def assert_alike(found: Sample, plain: Sample, tolerance: float) -> None:
    for name in ("bounds_min", "bounds_max"):
        np.testing.assert_allclose(found.quality[name], plain.quality[name], atol=tolerance)
    assert found.quality["num_triangles"] == plain.quality["num_triangles"]
    assert found.quality["mean_alpha_coverage"] == pytest.approx(plain.quality["mean_alpha_coverage"], rel=0.02)


@needs_meshoptimizer
@pytest.mark.blender
@pytest.mark.parametrize("extension", ["EXT_meshopt_compression", "KHR_meshopt_compression"])
def test_a_compressed_mesh_renders_as_its_plain_twin_does(render: Render, tmp_path: Path, extension: str) -> None:
    samples = []
    for glb in (Glb(), MeshoptGlb(extension)):
        glb.scene(glb.node(mesh=glb.mesh(*hills())))
        path = glb.write(tmp_path / "same.glb")
        facts = check_file(path, "glb", AdmissionSpec())
        assert facts.expected_triangles == 2 * 39**2
        samples.append(render(path, expected_triangles=facts.expected_triangles))
    assert_alike(samples[1], samples[0], 0)
    assert np.abs(pictures(samples[0]).astype(int) - pictures(samples[1])).mean() < 1


@needs_meshoptimizer
@pytest.mark.blender
def test_filters_and_quantised_values(render: Render, tmp_path: Path) -> None:
    """Positions by EXPONENTIAL or as int16 under a scale, normals by OCTAHEDRAL, a turned node by QUATERNION."""
    vertices, triangles = hills()
    plain = Glb()
    turn = [0, 0, np.sqrt(0.5), np.sqrt(0.5)]
    normal = plain.accessor(slopes(vertices), "VEC3")
    plain.scene(plain.node(mesh=plain.mesh(vertices, triangles, NORMAL=normal), rotation=turn))
    expected = render(plain.write(tmp_path / "same.glb"))

    glb = MeshoptGlb()
    normals = np.pad(slopes(vertices), ((0, 0), (0, 1)))
    normal = glb.compress(
        filtered(normals, "OCTAHEDRAL", 4, 8), "ATTRIBUTES", 5120, "VEC3", "OCTAHEDRAL", normalized=True
    )
    steps = np.zeros((len(vertices), 4), np.int16)
    steps[:, :3] = np.round(vertices * 10_000)
    low, high = steps[:, :3].min(axis=0).tolist(), steps[:, :3].max(axis=0).tolist()
    position = glb.compress(steps, "ATTRIBUTES", 5122, "VEC3", min=low, max=high)
    indices = glb.compress(triangles.reshape(-1), "INDICES", 5125, "SCALAR")
    primitive = {"attributes": {"POSITION": position, "NORMAL": normal}, "indices": indices}
    glb.document["meshes"].append({"primitives": [primitive]})
    child = glb.node(mesh=0, scale=[1e-4] * 3)
    glb.scene(glb.node(children=[child]))
    time = glb.compress(filtered(np.float32([[0], [1]]), "EXPONENTIAL", 4, 15), "ATTRIBUTES", 5126, "SCALAR",
                        "EXPONENTIAL", min=[0], max=[1])  # fmt: skip
    turns = filtered(np.tile(np.float32(turn), (2, 1)), "QUATERNION", 8, 16)
    rotation = glb.compress(turns, "ATTRIBUTES", 5122, "VEC4", "QUATERNION", normalized=True)
    glb.document["animations"] = [
        {"samplers": [{"input": time, "output": rotation}],
         "channels": [{"sampler": 0, "target": {"node": 1, "path": "rotation"}}]}
    ]  # fmt: skip
    path = glb.write(tmp_path / "same.glb")
    check_file(path, "glb", AdmissionSpec())
    found = render(path)
    assert_alike(found, expected, 2e-4)
    assert np.abs(pictures(found).astype(int) - pictures(expected)).mean() < 2

    glb = MeshoptGlb()
    position = glb.compress(filtered(vertices, "EXPONENTIAL", 12, 15), "ATTRIBUTES", 5126, "VEC3", "EXPONENTIAL",
                            min=vertices.min(axis=0).tolist(), max=vertices.max(axis=0).tolist())  # fmt: skip
    indices = glb.accessor(triangles.reshape(-1), "SCALAR")
    glb.document["meshes"].append({"primitives": [{"attributes": {"POSITION": position}, "indices": indices}]})
    glb.scene(glb.node(mesh=0, rotation=turn))
    assert_alike(render(glb.write(tmp_path / "same.glb")), expected, 2e-4)


def entries(glb: Glb) -> list[dict[str, Any]]:
    return [view["extensions"]["EXT_meshopt_compression"] for view in glb.document["bufferViews"]]


def cut(glb: Glb) -> None:
    entries(glb)[0]["byteLength"] -= 9


def swap(glb: Glb) -> None:
    first, second = entries(glb)
    for name in ("byteOffset", "byteLength"):
        first[name], second[name] = second[name], first[name]


def more(glb: Glb) -> None:
    entries(glb)[1]["count"] *= 2


def rubbish(glb: Glb) -> None:
    glb.binary = bytes(range(256)) * (len(glb.binary) // 256) + bytes(len(glb.binary) % 256)


@needs_meshoptimizer
@pytest.mark.blender
@pytest.mark.parametrize("harm", [cut, swap, more, rubbish])
def test_a_stream_that_does_not_decode_ends_as_a_corrupt_file(
    render: Render, tmp_path: Path, harm: Callable[[Glb], None]
) -> None:
    glb = MeshoptGlb()
    glb.scene(glb.node(mesh=glb.mesh(*hills())))
    good = glb.write(tmp_path / "good.glb")
    harm(glb)
    bad = glb.write(tmp_path / "bad.glb")
    check_file(bad, "glb", AdmissionSpec())
    kind, message = kind_of(lambda: render(bad))
    assert kind is FailureKind.CORRUPT_FILE
    assert "do not decode to" in message
    assert len(render(good).views) == 2


@needs_meshoptimizer
def test_what_comes_out_is_checked_as_a_plain_file_is(tmp_path: Path) -> None:
    vertices, triangles = hills()
    glb = MeshoptGlb()
    glb.scene(glb.node(mesh=glb.mesh(vertices, triangles + 5)))
    path = glb.write(tmp_path / "a.glb")
    check_file(path, "glb", AdmissionSpec())
    kind, message = kind_of(lambda: decoded_copy(path, tmp_path))
    assert (kind, "there are 1600 vertices" in message) == (FailureKind.CORRUPT_FILE, True)
    vertices[7] = np.nan
    glb = MeshoptGlb()
    glb.scene(glb.node(mesh=glb.mesh(vertices, triangles)))
    glb.document["accessors"][0] |= {"min": [0, 0, 0], "max": [2, 1, 1]}
    kind, _ = kind_of(lambda: decoded_copy(glb.write(path), tmp_path))
    assert kind is FailureKind.DEGENERATE_GEOMETRY


@needs_meshoptimizer
def test_no_rubbish_crashes_the_decoder() -> None:
    rng = np.random.default_rng(0)
    kinds = set()
    values = rng.integers(0, 99, (300, 3), np.int32)
    for mode, rows in (("ATTRIBUTES", values), ("TRIANGLES", values.reshape(-1)), ("INDICES", values.reshape(-1))):
        stream = encoded(rows.view(np.uint8).reshape(300, 12) if mode == "ATTRIBUTES" else rows, mode)
        view = MeshoptView(
            extension="EXT_meshopt_compression", buffer=0, offset=0, num_bytes=len(stream), mode=mode, filter="NONE",
            stride=12 if mode == "ATTRIBUTES" else 4, count=len(rows),
        )  # fmt: skip
        assert np.frombuffer(meshopt.decode(view, stream, "x"), np.int32).size == 900
        for _ in range(200):
            data = bytearray(stream[: rng.integers(1, len(stream) + 1)])
            for _ in range(3):
                data[rng.integers(len(data))] = rng.integers(256)
            kinds.add(outcome(lambda view=view, data=bytes(data): meshopt.decode(view, data, "x")))  # type: ignore[misc]
    assert kinds <= {None, FailureKind.CORRUPT_FILE, FailureKind.UNSUPPORTED_FORMAT}


def test_a_decoder_that_is_too_old_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian 12's meshoptimizer, 0.18, knows neither streams of version 1 nor the filter COLOR."""
    fields: dict[str, Any] = {"extension": "KHR_meshopt_compression", "buffer": 0, "offset": 0, "num_bytes": 9}
    view = MeshoptView(**fields, stride=4, count=3, mode="ATTRIBUTES", filter="NONE")
    monkeypatch.setattr(meshopt, "library", lambda: SimpleNamespace(meshopt_decodeVertexBuffer=lambda *_: -1))
    assert kind_of(lambda: meshopt.decode(view, b"\xa1", "x"))[0] is FailureKind.UNSUPPORTED_FORMAT
    assert kind_of(lambda: meshopt.decode(view, b"\xa0", "x"))[0] is FailureKind.CORRUPT_FILE
    monkeypatch.setattr(meshopt, "library", lambda: SimpleNamespace(meshopt_decodeVertexBuffer=lambda *_: 0))
    kind, message = kind_of(lambda: meshopt.decode(replace(view, filter="COLOR"), b"\xa0", "x"))
    assert kind is FailureKind.UNSUPPORTED_FORMAT
    assert "COLOR" in message


def test_without_a_decoder_the_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    glb = Glb()
    mesh = glb.mesh(CUBE_VERTICES, CUBE_TRIANGLES)
    glb.scene(glb.node(mesh=mesh))
    view = glb.document["bufferViews"][0]
    entry = {"buffer": 0, "byteLength": 40, "byteStride": 12, "count": 8, "mode": "ATTRIBUTES"}
    view["extensions"] = {"EXT_meshopt_compression": entry}
    glb.document["extensionsUsed"] = glb.document["extensionsRequired"] = ["EXT_meshopt_compression"]
    path = glb.write(tmp_path / "a.glb")
    check_file(path, "glb", AdmissionSpec())
    monkeypatch.setattr(meshopt, "library", lambda: None)
    kind, message = kind_of(lambda: decoded_copy(path, tmp_path))
    assert kind is FailureKind.UNSUPPORTED_FORMAT
    assert "EXT_meshopt_compression" in message
    assert "libmeshoptimizer2d" in message
    # Plain bytes beside compressed ones need no decoder.
    del glb.document["extensionsRequired"]
    assert decoded_copy(glb.write(path), tmp_path) != path
