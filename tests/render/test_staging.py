"""What comes with an asset to its child: the files that it names below its own folder, and nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.types import AssetError, FailureKind
from render.staging import stage
from tests.render.blends import write_blend

MOST = 10**6


def staged(path: Path, folder: Path, most: int = MOST) -> set[str]:
    """Stage an asset and return the files that came, relative to its folder."""
    folder.mkdir(exist_ok=True)
    main = stage(path, path.suffix[1:].lower(), folder, most)
    assert main == folder / path.name
    found = {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()}
    for name in found:
        assert (folder / name).read_bytes() == (path.parent / name).read_bytes()
    return found


def lay(home: Path, *names: str) -> None:
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(f"content of {name}")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with many files, in a folder with one more."""
    folder = tmp_path / "home"
    lay(tmp_path, "outside.png", "outside.usda")
    lay(folder, "a.png", "b.PNG", "tex/c d.jpg", "tex/é.png", "x.bin", "other.glb", "tile.1001.exr", "tile.1002.exr",
        "tile.x.exr", "sub/layer.usda", "sub/near.png", "cache.abc", "notes.txt")  # fmt: skip
    return folder


@pytest.mark.parametrize("ending", ["stl", "ply", "usdz"])
def test_what_names_nothing_comes_alone(home: Path, tmp_path: Path, ending: str) -> None:
    (home / f"m.{ending}").write_bytes(b"a.png tex/c d.jpg")
    assert staged(home / f"m.{ending}", tmp_path / "out") == {f"m.{ending}"}


def test_a_gltf_brings_the_uris_that_stay_inside(home: Path, tmp_path: Path) -> None:
    uris = ["tex/c%20d.jpg", "tex/%C3%A9.png", "../outside.png", "/etc/passwd", "file:///etc/passwd", "data:,a.png"]
    document = {"images": [{"uri": uri} for uri in uris] + [{}, {"uri": 3}], "buffers": [{"uri": "x.bin"}]}
    (home / "m.gltf").write_text(json.dumps(document))
    assert staged(home / "m.gltf", tmp_path / "out") == {"m.gltf", "x.bin", "tex/c d.jpg", "tex/é.png"}
    for i, text in enumerate(('{"images": 3}', '{"images": [3]}', "[]", "{", "")):
        (home / "odd.gltf").write_text(text)
        assert staged(home / "odd.gltf", tmp_path / f"odd{i}") == {"odd.gltf"}


def test_an_obj_brings_its_libraries_and_their_maps(home: Path, tmp_path: Path) -> None:
    (home / "my lib.mtl").write_text(
        "newmtl m\nmap_Kd -s 1 1 1 tex\\c d.jpg\nmap_Bump C:\\art\\b.png\nmap_Kd ../outside.png"
    )
    (home / "m.mtl").write_text("map_Kd a.png\n")
    (home / "m.obj").write_text("mtllib my lib.mtl\nmtllib /etc/passwd\nmtllib ../outside.mtl\nv 0 0 0\n# notes.txt\n")
    expected = {"m.obj", "m.mtl", "my lib.mtl", "tex/c d.jpg", "b.PNG", "a.png"}
    assert staged(home / "m.obj", tmp_path / "out") == expected


def test_paths_of_the_authors_disk_bring_what_lies_beside_the_file(home: Path, tmp_path: Path) -> None:
    body = b"Kaydara\x00S\x20\x00\x00\x00C:\\Users\\me\\tex\\c d.jpg\x00S..\\art\\a.png\x00/abs/b.png\x00notes.txt\x00"
    (home / "m.fbx").write_bytes(body)
    assert staged(home / "m.fbx", tmp_path / "out") == {"m.fbx", "tex/c d.jpg", "a.png", "b.PNG"}
    (home / "m.dae").write_text("<init_from>file:///D:/x/tex/c%20d.jpg</init_from><init_from>tex/é.png</init_from>")
    assert staged(home / "m.dae", tmp_path / "dae") == {"m.dae", "tex/c d.jpg", "tex/é.png"}


def test_layers_bring_what_they_name_in_turn_and_tiles_come_all(home: Path, tmp_path: Path) -> None:
    (home / "m.usda").write_text("@./sub/layer.usda@ @tile.<UDIM>.exr@ @../outside.usda@ @cache.abc@")
    (home / "sub" / "layer.usda").write_text("@near.png@ @../a.png@ @../../outside.png@ @layer.usda@")
    expected = {"m.usda", "sub/layer.usda", "sub/near.png", "a.png", "tile.1001.exr", "tile.1002.exr", "cache.abc"}
    assert staged(home / "m.usda", tmp_path / "out") == expected


def test_compressed_blender_files_are_read_for_names(home: Path, tmp_path: Path) -> None:
    plain = b"BLENDER-v405" + bytes(100) + b"//tex\\c d.jpg\x00" + bytes(1000) + b"//a.png\x00"
    packed = {"plain": plain, "gzip": gzip.compress(plain), "zstd": pa.compress(plain, codec="zstd", asbytes=True)}
    for name, data in packed.items():
        (home / f"{name}.blend").write_bytes(data)
        assert staged(home / f"{name}.blend", tmp_path / name) == {f"{name}.blend", "tex/c d.jpg", "a.png"}
    (home / "cut.blend").write_bytes(packed["zstd"][:40])
    assert staged(home / "cut.blend", tmp_path / "cut") == {"cut.blend"}


@pytest.mark.blender
def test_binary_usd_is_read_for_names(home: Path, tmp_path: Path) -> None:
    path = write_blend("named_usd", home / "m.usdc", "a.png")
    assert path.read_bytes().startswith(b"PXR-USDC")
    assert staged(path, tmp_path / "out") == {"m.usdc", "a.png"}
    (home / "cut.usdc").write_bytes(path.read_bytes()[:200])
    assert staged(home / "cut.usdc", tmp_path / "cut") == {"cut.usdc"}


def test_too_many_and_too_large_are_typed_and_a_lost_file_too(home: Path, tmp_path: Path) -> None:
    (home / "m.fbx").write_bytes(b"\x00a.png\x00b.PNG\x00")
    with pytest.raises(AssetError, match=r"admission\.max_asset_bytes") as caught:
        staged(home / "m.fbx", tmp_path / "large", most=20)
    assert caught.value.kind is FailureKind.TOO_LARGE
    lay(home, *(f"many/{i}.png" for i in range(1200)))
    (home / "many.fbx").write_text("\0".join(f"many/{i}.png" for i in range(1200)))
    with pytest.raises(AssetError, match="at most 1000"):
        staged(home / "many.fbx", tmp_path / "many")
    with pytest.raises(AssetError) as caught:
        stage(home / "gone.glb", "glb", tmp_path, MOST)
    assert caught.value.kind is FailureKind.NOT_FOUND
