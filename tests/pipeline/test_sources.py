"""Sources: what they list, in which order, and how each thing that can be wrong is said."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.admission import FORMATS, licence_admits
from pipeline.sources import open_source
from pipeline.sources.directory import ASSET_FORMATS
from pipeline.spec import DatasetSpec, Source, validate_config
from pipeline.types import SOURCES, Asset, AssetError, FailureKind, UserError
from tests.mirror import ROOT, XL_TABLE, Mirror
from tests.pipeline.test_fetch import make_glb, no_proxy  # noqa: F401


def open_dict(source: dict[str, object], **sections: object) -> Any:
    return open_source(validate_config(DatasetSpec, {"name": "test", "source": source, **sections}, "test"))


def directory(path: object, **settings: object) -> Any:
    return open_dict({"kind": "directory", "path": str(path), **settings})


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- procedural


def test_procedural_assets_are_named_by_seed() -> None:
    source = open_dict({"kind": "procedural", "num_objects": 2, "first_seed": 0})
    assets = source.list_assets()
    assert [(asset.uid, asset.uri, asset.format) for asset in assets] == [
        ("procedural-0", "procedural:0", "procedural"),
        ("procedural-1", "procedural:1", "procedural"),
    ]
    assert {asset.license for asset in assets} == {"CC0-1.0"}
    assert assets[1].sha256 == sha(b"procedural:1")
    assert source.fetch(assets[0]) is None
    assert assets == open_dict({"kind": "procedural", "num_objects": 2}).list_assets()


# ---- directory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "assets"
    for name in (
        "b.glb",
        "a/x.GLTF",
        "a/x.bin",
        "a/tex.png",
        "c/m.obj",
        "c/m.mtl",
        "notes.txt",
        ".git/z.glb",
        "._b.glb",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def test_a_folder_lists_its_main_files_in_order(folder: Path) -> None:
    source = directory(folder, license="MIT")
    assets = source.list_assets()
    assert [asset.uid for asset in assets] == ["a/x.GLTF", "b.glb", "c/m.obj"]
    assert [asset.format for asset in assets] == ["gltf", "glb", "obj"]
    assert {asset.license for asset in assets} == {"MIT"}
    assert assets[1].sha256 == sha(b"b.glb")
    assert assets[1].num_bytes == 5
    assert source.fetch(assets[1]) == folder / "b.glb"
    assert source.list_assets() == assets
    assert len({asset.key for asset in assets}) == 3


def test_every_listed_format_can_be_judged() -> None:
    assert set(ASSET_FORMATS) == FORMATS


def test_exclude_glob_and_single_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def uids(path: object, **settings: object) -> list[str]:
        return [asset.uid for asset in directory(path, **settings).list_assets()]

    assert uids(folder, exclude=["a/*"]) == ["b.glb", "c/m.obj"]
    assert uids(folder, exclude=["**/*.obj", "**/b.glb"]) == ["a/x.GLTF"]
    assert uids(folder / "*" / "*") == ["a/x.GLTF", "c/m.obj"]
    assert uids(folder / "**" / "*.glb") == ["b.glb"]
    assert uids(folder / "b.glb") == ["b.glb"]
    assert uids(folder, exclude=["nothing/*"]) == ["a/x.GLTF", "b.glb", "c/m.obj"]
    assert "matches no asset" in caplog.text


def test_what_is_not_there_is_one_clear_line(folder: Path) -> None:
    (folder / "empty").mkdir()
    cases = {
        folder / "nowhere": "no such folder",
        folder / "empty": "holds no asset",
        folder / "a" / "*.glb": "holds no asset",
        folder / "nowhere.csv": "does not exist",
        folder / "notes.txt": "holds no asset",
    }
    for path, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            directory(path).list_assets()
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
    with pytest.raises(UserError, match="leaves out all 3"):
        directory(folder, exclude=["*"]).list_assets()


def test_a_file_that_changed_or_went_since_listing(folder: Path) -> None:
    source = directory(folder)
    assets = {asset.uid: asset for asset in source.list_assets()}
    (folder / "b.glb").write_bytes(b"other")
    (folder / "c" / "m.obj").unlink()
    kinds = {}
    for uid in ("b.glb", "c/m.obj"):
        with pytest.raises(AssetError) as caught:
            source.fetch(assets[uid])
        kinds[uid] = caught.value.kind
    assert kinds == {"b.glb": FailureKind.CHECKSUM_MISMATCH, "c/m.obj": FailureKind.NOT_FOUND}
    assert source.fetch(assets["a/x.GLTF"]) is not None


def write_csv(folder: Path, text: str) -> Path:
    path = folder / "list.csv"
    path.write_text(text)
    return path


def test_a_csv_list(folder: Path) -> None:
    digest = sha(b"b.glb")
    path = write_csv(
        folder,
        "file,uid,licence,attribution,sha256,extra\n"
        f"b.glb,second,CC-BY-4.0,\"B, by Me\",{digest.upper()},1\n"
        "a/x.GLTF,,,,,\n"
        "\n"
        "gone.glb,third,,,,\n",
    )  # fmt: skip
    source = directory(path, license="MIT")
    second, first, gone = source.list_assets()
    assert (second.uid, second.license, second.attribution) == ("second", "CC-BY-4.0", "B, by Me")
    assert second.sha256 == digest
    assert (first.uid, first.license, first.sha256) == ("a/x.GLTF", "MIT", sha(b"a/x.GLTF"))
    assert (gone.uid, gone.sha256, gone.format) == ("third", None, "glb")
    with pytest.raises(AssetError) as caught:
        source.fetch(gone)
    assert caught.value.kind == FailureKind.NOT_FOUND


def test_a_parquet_list(folder: Path) -> None:
    path = folder / "list.parquet"
    pq.write_table(pa.table({"file": ["b.glb", "c/m.obj"], "uid": ["q", None], "license": [None, "MIT"]}), path)
    assets = directory(path).list_assets()
    assert [(asset.uid, asset.license) for asset in assets] == [("q", "unknown"), ("c/m.obj", "MIT")]
    pq.write_table(pa.table({"file": [1]}), path)
    with pytest.raises(UserError, match=r"row 1: column 'file' holds int"):
        directory(path).list_assets()
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        directory(path).list_assets()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column 'file'"),
        ("name,uid\nx,y\n", r"no column 'file'; found \['name', 'uid'\]"),
        ("file\n", "holds no rows"),
        ("file,uid\nb.glb,x\na/x.GLTF,x\n", r"line 3: uid 'x' stands on line 2 too"),
        ("file\nb.glb\nb.glb\n", "line 3: uid 'b.glb' stands on line 2 too"),
        ("file,uid\nb.glb\n", "line 2: 1 cells; the header has 2"),
        ("file,uid\n,x\n", "line 2: column 'file' is ''"),
        ("file,sha256\nb.glb,zz\n", "line 2: .*64 lower-case hex"),
        (f"file,uid\nb.glb,{'u' * 501}\n", "line 2: .*501 characters"),
        ("file,license,licence\nb.glb,a,b\n", "mean the same thing"),
        ('file\n"b.glb\n', "not valid CSV"),
    ],
)
def test_bad_lists_name_their_line(folder: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        directory(write_csv(folder, text)).list_assets()
    assert "list.csv" in str(caught.value)


def test_a_listed_file_must_still_have_the_listed_digest(folder: Path) -> None:
    source = directory(write_csv(folder, f"file,sha256\nb.glb,{'0' * 64}\n"))
    with pytest.raises(AssetError) as caught:
        source.fetch(source.list_assets()[0])
    assert caught.value.kind == FailureKind.CHECKSUM_MISMATCH


def test_the_shared_manifest_is_a_list(shared_assets: Path) -> None:
    source = directory(shared_assets / "MANIFEST.csv")
    assets = source.list_assets()
    assert len(assets) == 61
    assert all(source.fetch(asset) == Path(asset.uri) for asset in assets)


# ---- objaverse

UIDS = [f"{i:032x}" for i in range(1, 8)]
OBJECTS = {uid: make_glb(i, 5000 + i) for i, uid in enumerate(UIDS)}
LICENSES = dict(zip(UIDS, ["by", "by-sa", "cc0", "by-nc", "by-nc-sa", None, "standard"], strict=True))


def objaverse(mirror: Mirror, cache: Path, *, deadline_s: float = 10.0, **settings: object) -> Any:
    fetch = {
        "cache_dir": str(cache),
        "read_timeout_s": 0.3,
        "max_tries": 2,
        "backoff_s": 0.01,
        "deadline_s": deadline_s,
    }
    source = {"kind": "objaverse", "base_url": mirror.url, **settings}
    return open_dict(source, fetch=fetch, admission={"max_asset_bytes": 100_000})


def by_uid(assets: list[Asset]) -> dict[str, Asset]:
    return {asset.uid: asset for asset in assets}


def test_objaverse_lists_and_fetches_everything(tmp_path: Path) -> None:
    with Mirror(OBJECTS, licenses=LICENSES) as mirror:
        source = objaverse(mirror, tmp_path)
        assets = source.list_assets()
        assert [asset.uid for asset in assets] == sorted(UIDS)
        assert [asset.sha256 for asset in assets] == [sha(OBJECTS[uid]) for uid in UIDS]
        assert [asset.license for asset in assets] == [
            "CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "unknown", "unknown",
        ]  # fmt: skip
        uid = UIDS[0]
        assert assets[0].attribution == f"Model {uid[:4]} by Some One (https://sketchfab.com/3d-models/{uid})"
        for asset in assets:
            path = source.fetch(asset)
            assert path is not None
            assert path.read_bytes() == OBJECTS[asset.uid]
        # Only the metadata files that hold wanted uids were asked for, and each file once.
        paths = [path for path in mirror.paths() if not path.startswith("/cdn/")]
        assert len(paths) == len(set(paths)) == 2 + 2 * len(UIDS)
        assert objaverse(mirror, tmp_path).list_assets() == assets
        assert len(mirror.requests) == len(paths) + len(UIDS)


def test_the_package_is_left_as_it_was_and_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import objaverse as package

    def refuse(*_: object) -> None:
        raise AssertionError("the package downloads")

    monkeypatch.setattr("urllib.request.urlretrieve", refuse)
    before = package._VERSIONED_PATH, package.BASE_PATH
    with Mirror(OBJECTS, lvis={"chair": UIDS[:2], "table": UIDS[1:3]}) as mirror:
        objaverse(mirror, tmp_path, lvis_categories=["chair"]).list_assets()
    assert before == (package._VERSIONED_PATH, package.BASE_PATH)


def test_an_excluded_licence_is_never_requested(tmp_path: Path) -> None:
    with Mirror(OBJECTS, licenses=LICENSES) as mirror:
        source = objaverse(mirror, tmp_path)
        for asset in source.list_assets():
            if licence_admits("commercial", asset.license) is None:
                source.fetch(asset)
        fetched = {uid for uid in UIDS if mirror.requests_for(uid)}
    assert fetched == set(UIDS[:3])


def test_selection(tmp_path: Path) -> None:
    lvis = {"chair": [UIDS[4], UIDS[1]], "table": [UIDS[1], UIDS[2]]}
    uids_file = tmp_path / "uids.txt"
    uids_file.write_text(f"# mine\n{UIDS[6]}\n\n{UIDS[5]}.glb\n")
    with Mirror(OBJECTS, lvis=lvis) as mirror:

        def uids(**settings: object) -> list[int]:
            listed = objaverse(mirror, tmp_path / "cache", **settings).list_assets()
            return [UIDS.index(asset.uid) for asset in listed]

        assert uids(uids=[UIDS[3], UIDS[0]]) == [0, 3]
        assert uids(uids_file=str(uids_file)) == [5, 6]
        assert uids(lvis_categories=["table", "chair"]) == [1, 2, 4]
        assert uids(lvis_categories=["table"], uids=[UIDS[1], UIDS[6]]) == [1, 2, 6]
        assert uids(max_objects=2) == [0, 1]
        for settings, words in (
            ({"lvis_categories": ["chai"]}, "no category 'chai' among 2; near it: chair"),
            ({"uids": [UIDS[0], f"{UIDS[0]}.glb"]}, "entry 2: .*duplicate"),
            ({"uids": [" "]}, "entry 1: .*empty"),
            ({"uids_file": str(tmp_path / "none")}, "cannot be read"),
            ({"uids": ["u" * 501]}, "501 characters"),
        ):
            with pytest.raises(UserError, match=words):
                uids(**settings)
        uids_file.write_text("# nothing\n")
        with pytest.raises(UserError, match="holds no uid"):
            uids(uids_file=str(uids_file))


def test_unknown_and_hostile_entries_are_planned_and_fail(tmp_path: Path) -> None:
    unknown, hostile = "e" * 32, "d" * 32
    extra = {
        hostile: "glbs/../../../../etc/passwd",
        "c" * 32: f"glbs/000-001/{UIDS[0]}.glb",
        "9" * 32: 7,
        "8" * 32: f"glbs/000-001/{'8' * 32}.glb/../../x",
    }
    wanted = [unknown, "Not-A-Uid", UIDS[0], *extra]
    with Mirror(OBJECTS, extra_paths=extra) as mirror:
        source = objaverse(mirror, tmp_path, uids=wanted)
        assets = by_uid(source.list_assets())
        assert set(assets) == set(wanted)
        assert any("6 of 7 uids" in warning for warning in source.warnings)
        for uid in set(wanted) - {UIDS[0]}:
            with pytest.raises(AssetError) as caught:
                source.fetch(assets[uid])
            assert caught.value.kind == FailureKind.NOT_FOUND
        assert source.fetch(assets[UIDS[0]]) is not None
        assert not any("passwd" in path for path in mirror.paths())


def test_an_object_in_the_catalogue_without_annotation_has_an_unknown_licence(tmp_path: Path) -> None:
    bare = "7" * 32
    with Mirror(OBJECTS, extra_paths={bare: f"glbs/000-023/{bare}.glb"}) as mirror:
        source = objaverse(mirror, tmp_path)
        asset = by_uid(source.list_assets())[bare]
        assert asset.license == "unknown"
        assert any("have no annotation" in warning for warning in source.warnings)
        with pytest.raises(AssetError) as caught:
            source.fetch(asset)
    assert caught.value.kind == FailureKind.NOT_FOUND


def test_one_bad_object_does_not_touch_the_others(tmp_path: Path) -> None:
    """What ends a whole run of the package's own downloader is one failure here."""
    faults = {UIDS[0]: "404", UIDS[2]: "cut", UIDS[4]: "html", UIDS[5]: "cut-once"}
    with Mirror(OBJECTS, faults=faults) as mirror:
        source = objaverse(mirror, tmp_path)
        outcome = {}
        for asset in source.list_assets():
            try:
                source.fetch(asset)
                outcome[asset.uid] = "ok"
            except AssetError as error:
                outcome[asset.uid] = error.kind
    bad = {UIDS[0]: FailureKind.NOT_FOUND, UIDS[2]: FailureKind.TRUNCATED, UIDS[4]: FailureKind.NOT_AN_ASSET}
    assert outcome == dict.fromkeys(UIDS, "ok") | bad


def test_the_table_of_digests(tmp_path: Path) -> None:
    with Mirror(OBJECTS, digests={UIDS[0]: "0" * 64, UIDS[1]: "not a digest"}, linked=False) as mirror:
        source = objaverse(mirror, tmp_path)
        assets = by_uid(source.list_assets())
        assert assets[UIDS[0]].sha256 == "0" * 64
        assert assets[UIDS[1]].sha256 is None
        assert any("no digest of 1 of 7" in warning for warning in source.warnings)
        with pytest.raises(AssetError) as caught:
            source.fetch(assets[UIDS[0]])
        assert caught.value.kind == FailureKind.CHECKSUM_MISMATCH
        assert source.fetch(assets[UIDS[1]]) is not None


def test_without_the_table_of_digests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Mirror(OBJECTS, digests=False) as mirror:
        source = objaverse(mirror, tmp_path / "a")
        assets = source.list_assets()
        assert {asset.sha256 for asset in assets} == {None}
        assert len(source.warnings) == 1
        assert "without known digests" in caplog.text
        assert source.fetch(assets[0]) is not None
    with Mirror(OBJECTS) as mirror:
        assert objaverse(mirror, tmp_path / "b", use_xl_digests=False).list_assets()[0].sha256 is None
        assert XL_TABLE not in mirror.paths()


@pytest.mark.parametrize("fault", ["404", "500", "html", "cut", "cut-no-length", "empty", "stall", "json"])
@pytest.mark.parametrize("name", ["object-paths.json.gz", "metadata/000-023.json.gz", "lvis-annotations.json.gz"])
def test_a_bad_index_file_is_one_clear_line_and_poisons_nothing(tmp_path: Path, fault: str, name: str) -> None:
    lvis = {"chair": UIDS}
    with Mirror(OBJECTS, faults={name: fault}, lvis=lvis) as mirror:
        source = objaverse(mirror, tmp_path, lvis_categories=["chair"])
        with pytest.raises(UserError, match=name) as caught:
            source.list_assets()
        assert "\n" not in str(caught.value)
        mirror.faults.clear()
        assert len(source.list_assets()) == len(UIDS)


@pytest.mark.parametrize("fault", ["500-once", "cut-once", "cut-no-length-once", "stall-once"])
def test_a_passing_fault_of_an_index_file_is_mended(tmp_path: Path, fault: str) -> None:
    with Mirror(OBJECTS, faults={"object-paths.json.gz": fault}) as mirror:
        assert len(objaverse(mirror, tmp_path).list_assets()) == len(UIDS)


def test_a_damaged_index_in_the_cache_heals(tmp_path: Path) -> None:
    with Mirror(OBJECTS) as mirror:
        assets = objaverse(mirror, tmp_path).list_assets()
        placed = next((tmp_path / "objaverse").rglob("object-paths.json.gz"))
        placed.chmod(0o644)
        placed.write_bytes(placed.read_bytes()[:50])  # the cached file too: they are one
        assert objaverse(mirror, tmp_path).list_assets() == assets
        shutil.rmtree(tmp_path / "objaverse")
        assert objaverse(mirror, tmp_path).list_assets() == assets


def test_hf_endpoint_names_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Mirror(OBJECTS) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", f"{mirror.url}/")
        assets = open_dict({"kind": "objaverse", "max_objects": 1}, fetch={"cache_dir": str(tmp_path)}).list_assets()
        assert assets[0].uri.startswith(f"{mirror.url}{ROOT}glbs/")


def test_the_mirror_serves_what_the_package_expects(tmp_path: Path) -> None:
    """The stand-in is only as good as this: the unmodified reader takes its files as they come."""
    import gzip

    with Mirror(OBJECTS) as mirror:
        paths = json.loads(gzip.decompress(mirror.files[f"{ROOT}object-paths.json.gz"]))
    assert len({path.split("/")[1] for path in paths.values()}) >= 3
    assert set(paths) == set(UIDS)


def test_the_names_of_sources_are_those_that_a_spec_may_have() -> None:
    assert {one.model_fields["kind"].default for one in get_args(get_args(Source)[0])} == set(SOURCES)
