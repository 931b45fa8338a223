"""Admission: licences, and the shared real files, good and broken; the formats have their own tests beside this one."""

from __future__ import annotations

import base64
import csv
from pathlib import Path

import pytest

from pipeline.admission import check_file, licence_admits, sketchfab_licence
from pipeline.spec import AdmissionSpec
from pipeline.types import AssetError, FailureKind

K = FailureKind
SPEC = AdmissionSpec()
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


# ---- licences


@pytest.mark.parametrize(
    ("license", "admitted"),
    [
        ("CC0-1.0", True),
        ("CC-BY-4.0", True),
        ("cc-by-sa-4.0", True),
        ("CC-BY-3.0-US", True),
        ("MIT", True),
        ("BSD-3-Clause", True),
        ("MIT OR Apache-2.0", True),
        ("CC-BY-NC-4.0 OR MIT", True),
        ("CC-BY-4.0 AND MIT", True),
        ("CC-BY-4.0 AND CC-BY-NC-4.0", False),
        ("CC-BY-NC-4.0", False),
        ("CC-BY-NC-SA-4.0", False),
        ("CC-BY-ND-4.0", False),
        ("CC-BY-NC-ND-4.0", False),
        ("unknown", False),
        ("", False),
        ("  ", False),
        ("Free for students", False),
        ("CC-BY-4.0 (model), ask me first", False),
    ],
)
def test_commercial_admits_what_is_known_to_allow_it(license: str, admitted: bool) -> None:
    reason = licence_admits("commercial", license)
    assert (reason is None) == admitted
    if reason is not None:
        assert repr(license)[1:-1].strip() in reason or "NC" in reason
    assert licence_admits("any", license) is None


def test_a_list_admits_what_it_names() -> None:
    policy = ("CC-BY-4.0", "mit")
    assert licence_admits(policy, "cc-by-4.0") is None
    assert licence_admits(policy, "MIT") is None
    assert licence_admits(policy, "MIT OR GPL-3.0-only") is None
    assert "not in the list" in str(licence_admits(policy, "CC0-1.0"))
    assert licence_admits(policy, "MIT AND CC0-1.0") is not None
    assert licence_admits(policy, "unknown") is not None
    assert licence_admits(("unknown",), "unknown") is not None


def test_sketchfab_slugs() -> None:
    slugs = ("by", "BY-SA", "by-nd", "by-nc", "by-nc-sa", "by-nc-nd", "cc0", "st", "ed", "", None, 3)
    assert [sketchfab_licence(slug) for slug in slugs] == [
        "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-ND-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-NC-ND-4.0", "CC0-1.0",
        "unknown", "unknown", "unknown", "unknown", "unknown",
    ]  # fmt: skip


# ---- the shared files


def manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "MANIFEST.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def kind_of(path: Path, format: str, spec: AdmissionSpec = SPEC) -> tuple[FailureKind | None, str]:
    try:
        check_file(path, format, spec)
    except AssetError as error:
        found = error.kind, error.message
    else:
        return None, ""
    assert "\n" not in found[1]
    found[1].encode()
    return found


def test_real_files_pass_with_the_triangles_they_hold(shared_assets: Path) -> None:
    for row in manifest(shared_assets):
        if row["kind"] not in ("asset", "derived"):
            continue
        facts = check_file(shared_assets / row["file"], row["format"].lower(), SPEC)
        # The manifest counts the triangles of all scenes; this file's default scene holds these.
        expected = "2984" if "multi-scene-default-1" in row["file"] else row["triangles_file"]
        assert str(facts.expected_triangles or "") == expected, row["file"]
        assert facts.num_bytes == int(row["bytes"])


def test_the_licence_that_a_file_states(shared_assets: Path) -> None:
    facts = check_file(shared_assets / "objaverse" / "2968ed36911043359cc110067ab8b725.glb", "glb", SPEC)
    assert facts.stated_licence is not None
    assert facts.stated_licence.startswith("CC-BY-4.0")


BROKEN = {
    "IndexOutOfRange.gltf": (K.CORRUPT_FILE, "index 255"),
    "RecursiveNodes.gltf": (K.CORRUPT_FILE, "ancestors"),
    "bufferview-out-of-range.glb": (K.CORRUPT_FILE, "bufferViews[0] ends at byte 100000000"),
    # The stream's damage shows only when it is decoded: the share of triangles after the import tells.
    "corrupt-draco-stream.glb": (None, ""),
    "corrupt-texture-bytes.glb": (K.MISSING_TEXTURE, "images[0]"),
    # Well-formed COLLADA; that its numbers have decimal commas shows in what the import leaves out.
    "decimal-comma-teapots.DAE": (None, ""),
    "empty-default-scene.glb": (K.EMPTY_SCENE, "default scene"),
    "git-lfs-pointer.glb": (K.NOT_AN_ASSET, "git-LFS pointer"),
    "gltf1-version-BoxTextured.glb": (K.UNSUPPORTED_FORMAT, "version 1"),
    "gzip-encoded.glb": (K.NOT_AN_ASSET, "gzip"),
    "html-error-page.glb": (K.NOT_AN_ASSET, "HTML"),
    "infinite-positions-BoxWithInfinites.glb": (K.DEGENERATE_GEOMETRY, "no finite position"),
    "json-error-body.glb": (K.NOT_AN_ASSET, "JSON error"),
    "missing-bin-chunk.glb": (K.CORRUPT_FILE, "no BIN chunk"),
    "missing-external-buffer.gltf": (K.MISSING_RESOURCE, "scene.bin"),
    "no-mesh.glb": (K.EMPTY_SCENE, "no mesh"),
    "sceneWrongType.gltf": (K.CORRUPT_FILE, "scene is 'hello'"),
    "trailing-garbage.glb": (K.CORRUPT_FILE, "8192 more"),
    "truncated-half.glb": (K.TRUNCATED, "60074 bytes of the 120148"),
    "truncated-header.glb": (K.TRUNCATED, "10 bytes"),
    "truncated-in-json.glb": (K.TRUNCATED, "600 bytes"),
    "zero-byte.glb": (K.EMPTY_FILE, "0 bytes"),
    # A scale of 0 on one node is legal and often animated; the extent is judged in the imported scene.
    "zero-extent.glb": (None, ""),
}


def test_broken_files_get_a_true_kind(shared_assets: Path) -> None:
    found = {path.name for path in (shared_assets / "broken").iterdir()} - {"IndexOutOfRange.bin"}
    assert found == set(BROKEN)
    for name, (kind, words) in BROKEN.items():
        path = shared_assets / "broken" / name
        got, message = kind_of(path, path.suffix[1:].lower())
        assert (got, words in message) == (kind, True), f"{name}: {got} {message}"
