"""Formats other than glTF: magic, sizes, side files; only an AssetError leaves."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.admission import check_file
from pipeline.spec import AdmissionSpec
from pipeline.types import AssetError, FailureKind
from tests.pipeline.test_admission import PNG, K, kind_of


def write(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "format", ["glb", "gltf", "obj", "stl", "ply", "fbx", "dae", "usd", "usda", "usdc", "usdz", "blend"]
)
def test_what_is_no_asset_in_any_format(tmp_path: Path, format: str) -> None:
    cases = {
        b"": K.EMPTY_FILE,
        b"<!DOCTYPE html><html><body>no</body></html>": K.NOT_AN_ASSET,
        b"  <html>x</html>": K.NOT_AN_ASSET,
        b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>': K.NOT_AN_ASSET,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": K.NOT_AN_ASSET,
        b'{"error": "Repository not found"}': K.NOT_AN_ASSET,
        PNG + bytes(200): K.NOT_AN_ASSET,
    }
    for data, kind in cases.items():
        got, message = kind_of(write(tmp_path, f"x.{format}", data), format)
        if data.startswith(b"\x89PNG") and format == "stl":
            assert got in (K.TRUNCATED, K.CORRUPT_FILE)  # a binary STL has no magic
        else:
            assert got == kind, message
    assert kind_of(write(tmp_path, "big", bytes(100)), format, AdmissionSpec(max_asset_bytes=99))[0] == K.TOO_LARGE


def test_unknown_formats_and_lost_files(tmp_path: Path) -> None:
    path = write(tmp_path, "x.txt", b"text")
    assert kind_of(path, "txt")[0] == K.UNSUPPORTED_FORMAT
    assert kind_of(tmp_path / "gone.glb", "glb")[0] == K.NOT_FOUND
    assert kind_of(tmp_path, "glb")[0] == K.NOT_FOUND


OBJ = b"mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl paint\nf 1 2 3\n"


@pytest.mark.parametrize(
    ("mtl", "kind"),
    [
        (None, None),
        (b"newmtl paint\nKd 1 1 1\n", None),
        (b"newmtl paint\nmap_Kd t.png\n", None),
        (b"newmtl paint\nmap_Kd .\\T.PNG\n", None),
        (b"newmtl paint\nmap_Kd C:\\Users\\me\\t.png\n", None),
        (b"newmtl paint\nmap_Kd textures/t.png\n", None),
        (b'newmtl paint\nmap_Kd "t.png"\n', None),
        (b"newmtl paint\nmap_Kd -s 1 1 1 -o 0.5 -clamp on t.png\n", None),
        (b"newmtl paint\nbump -bm 0.5 my t.png\n", None),
        (b"newmtl paint\nmap_Ka gone.png\n", None),
        (b"newmtl other\nmap_Kd gone.png\n", None),
        (b"newmtl paint\nmap_Kd gone.png\n", K.MISSING_TEXTURE),
        (b"newmtl paint\nmap_Kd C:\\gone.png\n", K.MISSING_TEXTURE),
        (b"newmtl paint\nmap_Kd m.mtl\n", K.MISSING_TEXTURE),
        (b"newmtl paint\nmap_Kd ../t.png\n", K.CORRUPT_FILE),
        (b"newmtl paint\nmap_Kd ..\\..\\t.png\n", K.CORRUPT_FILE),
        (b"newmtl other\nmap_Kd /etc/passwd\n", K.CORRUPT_FILE),
        (b"newmtl paint\nmap_Kd -s 1\nmap_Kd\n\xff\xfe", None),
    ],
)
def test_obj_materials(tmp_path: Path, mtl: bytes | None, kind: FailureKind | None) -> None:
    path = write(tmp_path, "m/x.obj", OBJ)
    for name in ("t.png", "my t.png"):
        write(tmp_path, f"m/{name}", PNG)
    if mtl is not None:
        write(tmp_path, "m/m.mtl", mtl)
    got, message = kind_of(path, "obj")
    assert got == kind, message


def test_obj_itself(tmp_path: Path) -> None:
    for data, kind in (
        (b"hello", K.NOT_AN_ASSET),
        (b"v 0 0 0\nl 1 1\n", K.EMPTY_SCENE),
        (OBJ.replace(b"m.mtl", b"../../m.mtl"), K.CORRUPT_FILE),
        (OBJ.replace(b"m.mtl", b"/etc/passwd"), K.CORRUPT_FILE),
        (b"v 1 2 3" * 10, K.EMPTY_SCENE),
    ):
        assert kind_of(write(tmp_path, "x.obj", data), "obj")[0] == kind
    assert (
        kind_of(write(tmp_path, "x.obj", OBJ + b"f 1 2 3\n"), "obj", AdmissionSpec(max_triangles=1))[0] == K.TOO_LARGE
    )


def stl(corners: Any, *, announced: int | None = None) -> bytes:
    corners = np.asarray(corners, "<f4").reshape(-1, 9)
    number = len(corners) if announced is None else announced
    rows = b"".join(bytes(12) + row.tobytes() + b"\0\0" for row in corners)
    return b"solid of course".ljust(80, b"\0") + struct.pack("<I", number) + rows


def test_stl(tmp_path: Path) -> None:
    one = np.arange(9)
    text = b"solid a\nfacet normal 0 0 1\nouter loop\nendloop\nendfacet\nendsolid a\n"
    for data, kind in (
        (stl(one), None),
        (stl(one)[:-1], K.TRUNCATED),
        (stl(one, announced=2**32 - 1), K.TRUNCATED),
        (stl(one) + b"xx", K.CORRUPT_FILE),
        (stl([]), K.EMPTY_SCENE),
        (stl([np.inf] * 9), K.DEGENERATE_GEOMETRY),
        (b"\0" * 20, K.TRUNCATED),
        (text, None),
        (text.replace(b"endsolid", b"end"), K.TRUNCATED),
        (b"solid a\nendsolid a\n", K.EMPTY_SCENE),
    ):
        got, message = kind_of(write(tmp_path, "x.stl", data), "stl")
        assert got == kind, message
    assert kind_of(write(tmp_path, "x.stl", text * 3), "stl", AdmissionSpec(max_triangles=2))[0] == K.TOO_LARGE


def ply(body: bytes, *, vertices: int = 3, faces: int = 1, format: str = "ascii") -> bytes:
    return (
        f"ply\nformat {format} 1.0\nelement vertex {vertices}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {faces}\nproperty list uchar int vertex_indices\nend_header\n"
    ).encode() + body


def test_ply(tmp_path: Path) -> None:
    text = b"0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
    for data, kind in (
        (ply(text), None),
        (ply(text).replace(b"\n", b"\r\n"), None),
        (ply(bytes(36 + 13), format="binary_little_endian"), None),
        (ply(bytes(30), format="binary_big_endian"), K.TRUNCATED),
        (ply(text, vertices=10**14), K.TRUNCATED),
        (ply(text, faces=0), K.EMPTY_SCENE),
        (ply(text)[:60], K.TRUNCATED),
        (ply(text, format="base64"), K.CORRUPT_FILE),
        (ply(text).replace(b"float y", b"thing y"), K.CORRUPT_FILE),
        (ply(text).replace(b"vertex 3", b"vertex -3"), K.CORRUPT_FILE),
        (b"plywood", K.NOT_AN_ASSET),
    ):
        got, message = kind_of(write(tmp_path, "x.ply", data), "ply")
        assert got == kind, message


def test_fbx(tmp_path: Path, shared_assets: Path) -> None:
    real = (shared_assets / "fbx-huesitos" / "huesitos.fbx").read_bytes()
    loop = real[:27] + (27).to_bytes(4, "little") + real[31:]
    for data, kind in (
        (real, None),
        (real[: len(real) // 2], K.TRUNCATED),
        (real[:25], K.TRUNCATED),
        (real[:40], K.TRUNCATED),
        (loop, K.CORRUPT_FILE),
        (b"; FBX 7.3.0 project file\nFBXHeaderExtension:  {\n}\n", None),
        (b"; nothing", K.NOT_AN_ASSET),
    ):
        got, message = kind_of(write(tmp_path, "x.fbx", data), "fbx")
        assert got == kind, message


def test_dae(tmp_path: Path) -> None:
    root = b'<COLLADA version="1.4.1"></COLLADA>\n'
    bomb = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>' + root
    for data, kind in (
        (b'<?xml version="1.0"?>\n<!-- a comment -->\n' + root, None),
        (b"\xef\xbb\xbf" + root, None),
        (('<?xml version="1.0" encoding="UTF-16"?>' + root.decode()).encode("utf-16"), None),
        (bomb, K.CORRUPT_FILE),
        (b'<?xml version="1.0"?><svg></svg>', K.NOT_AN_ASSET),
        (b"<x><COLLADA></COLLADA></x>", K.NOT_AN_ASSET),
        (root[:-12], K.TRUNCATED),
    ):
        got, message = kind_of(write(tmp_path, "x.dae", data), "dae")
        assert got == kind, message


def usdz(entries: list[tuple[str, bytes]], **settings: Any) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", **settings) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return sink.getvalue()


def test_usd(tmp_path: Path) -> None:
    good = usdz([("a.usda", b"#usda 1.0\n" * 9), ("t.png", PNG)])
    damaged = good.replace(b"#usda 1.0", b"#usda 1.1", 1)
    toc = b"PXR-USDC" + bytes(8)
    for format, data, kind in (
        ("usdz", good, None),
        ("usd", good, None),
        ("usd", b"#usda 1.0\n", None),
        ("usda", toc + (24).to_bytes(8, "little") + bytes(64), None),
        ("usdc", toc + (10**9).to_bytes(8, "little") + bytes(64), K.TRUNCATED),
        ("usdc", toc + (2**64 - 1).to_bytes(8, "little") + bytes(64), K.CORRUPT_FILE),
        ("usdc", toc, K.TRUNCATED),
        ("usdc", b"PK nothing", K.NOT_AN_ASSET),
        ("usdz", good[: len(good) // 2], K.TRUNCATED),
        ("usdz", damaged, K.CORRUPT_FILE),
        ("usdz", usdz([("../a.usda", b"#usda 1.0")]), K.CORRUPT_FILE),
        ("usdz", usdz([("/a.usda", b"#usda 1.0")]), K.CORRUPT_FILE),
        ("usdz", usdz([("a.usda", bytes(10**6))], compression=zipfile.ZIP_DEFLATED), K.CORRUPT_FILE),
        ("usdz", usdz([("t.png", PNG)]), K.CORRUPT_FILE),
        ("usdz", b"PK\x05\x06" + bytes(18), K.NOT_AN_ASSET),
    ):
        got, message = kind_of(write(tmp_path, f"x.{format}", data), format)
        assert got == kind, f"{format} {data[:30]!r} {message}"


def crowded_zip(num_entries: int, *, zip64: bool) -> bytes:
    """A ZIP whose directory names one stored byte so many times, and whose plain end record says that it is one."""
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    size, end = num_entries * len(entry), b""
    if zip64:
        end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, len(local))
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, len(local) + size, 1)
    told = len(entry) if zip64 else size
    end += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, told, len(local), 0)
    return local + entry * num_entries + end


@pytest.mark.parametrize("zip64", [False, True])
def test_a_zip_of_a_hundred_thousand_names_is_refused_before_they_are_held(tmp_path: Path, zip64: bool) -> None:
    path = write(tmp_path, "a.usdz", crowded_zip(200_000, zip64=zip64))
    tracemalloc.start()
    got, message = kind_of(path, "usdz")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got == K.TOO_LARGE, message
    assert most < 8 * 2**20, f"{most} bytes were held for a file of {path.stat().st_size}"


def test_blend(tmp_path: Path) -> None:
    for data, kind in (
        (b"BLENDER-v405" + bytes(99), None),
        (gzip.compress(b"BLENDER-v279" + bytes(99)), None),
        (b"\x28\xb5\x2f\xfd" + bytes(99), None),
        (gzip.compress(b"something else, of some length"), K.NOT_AN_ASSET),
        (b"\x1f\x8b" + b"\xff" * 50, K.CORRUPT_FILE),
        (b"blender", K.NOT_AN_ASSET),
    ):
        got, message = kind_of(write(tmp_path, "x.blend", data), "blend")
        assert got == kind, message


@settings(max_examples=200, deadline=2000, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz_other_formats(tmp_path: Path, data: st.DataObject) -> None:
    """Only an AssetError leaves, for any format."""
    starts = {
        "obj": OBJ,
        "stl": stl(np.arange(18)),
        "ply": ply(b"0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"),
        "fbx": b"Kaydara FBX Binary  \x00\x1a\x00" + (7400).to_bytes(4, "little") + bytes(60),
        "dae": b'<?xml version="1.0"?><COLLADA></COLLADA>',
        "usdz": usdz([("a.usda", b"#usda 1.0\n")]),
        "usdc": b"PXR-USDC" + bytes(80),
        "blend": gzip.compress(b"BLENDER-v279"),
    }
    format = data.draw(st.sampled_from(sorted(starts)))
    content = bytearray(starts[format])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=8))
    kind_of(write(tmp_path, "fuzz", bytes(content)), format)


@pytest.mark.parametrize("vertex", ["nan nan nan", "1 INF 0", "0 0 -inf"])
def test_an_obj_with_a_vertex_that_is_not_finite_is_degenerate(tmp_path: Path, vertex: str) -> None:
    path = tmp_path / "bad.obj"
    path.write_text(f"v 0 0 0\nv 1 0 0\nv {vertex}\nf 1 2 3\n")
    with pytest.raises(AssetError, match="not finite") as caught:
        check_file(path, "obj", AdmissionSpec())
    assert caught.value.kind is FailureKind.DEGENERATE_GEOMETRY


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("@./gone.usda@", "missing_resource"),
        ("@textures/gone.png@", "missing_texture"),
        ("@/etc/gone.usd@", "corrupt_file"),
        ("@../gone.usdc@", "corrupt_file"),
    ],
)
def test_a_text_usd_names_what_it_lacks(tmp_path: Path, reference: str, kind: str) -> None:
    path = tmp_path / "scene.usda"
    path.write_text(f'#usda 1.0\n# by me@home.org and you@home.org\ndef "a" (references = {reference}) {{}}\n')
    with pytest.raises(AssetError) as caught:
        check_file(path, "usda", AdmissionSpec())
    assert caught.value.kind.value == kind


def test_a_text_usd_with_its_files_beside_it_passes(tmp_path: Path) -> None:
    (tmp_path / "there.usda").write_text("#usda 1.0\n")
    path = tmp_path / "scene.usda"
    path.write_text('#usda 1.0\n# by me@home.org and you@home.org\ndef "a" (references = @./there.usda@</a>) {}\n')
    check_file(path, "usda", AdmissionSpec())


def test_a_texture_of_absurd_size_is_too_large(tmp_path: Path) -> None:
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60000, 60000, 8, 6, 0, 0, 0)
    (tmp_path / "big.png").write_bytes(header)
    (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd big.png\n")
    path = tmp_path / "a.obj"
    path.write_text("mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl m\nf 1 2 3\n")
    with pytest.raises(AssetError, match="60000 x 60000") as caught:
        check_file(path, "obj", AdmissionSpec())
    assert caught.value.kind is FailureKind.TOO_LARGE
