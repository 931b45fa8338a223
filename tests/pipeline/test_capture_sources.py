"""Where captures come from: layouts on disk, in zips and on S3; what is joined, planned, left out and refused."""

from __future__ import annotations

import random
import shutil
import struct
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.layout import arrange
from pipeline.members import FileMember, MemberReader, OpenCapture
from pipeline.sources.colmap import ColmapAssets
from pipeline.sources.mvimgnet import MvimgnetAssets
from pipeline.spec import ColmapSource, MvimgnetSource
from pipeline.store import open_store
from pipeline.types import Asset, AssetError, FailureKind, UserError

MODEL = {f"sparse/0/{name}.bin": name.encode() for name in ("cameras", "images", "points3D")}
FRAMES = {f"images/{i:03d}.jpg": b"frame %d" % i for i in range(3)}


def mvimgnet(path: object, **values: object) -> MvimgnetAssets:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return MvimgnetAssets(MvimgnetSource(path=str(path), **values), max_capture_bytes=2**20)  # type: ignore[arg-type]


def colmap(path: object, **values: object) -> ColmapAssets:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return ColmapAssets(ColmapSource(path=str(path), **values), max_capture_bytes=2**20)  # type: ignore[arg-type]


def write_zip(path: Path, files: dict[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, data)
    return path


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def under(prefix: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{prefix}/{name}": data for name, data in files.items()}


def contents(capture: OpenCapture) -> dict[str, dict[str, bytes]]:
    """What a capture's files hold, by kind."""
    files = capture.files
    return {
        "frames": {name: files.read(member, 2**20) for name, member in files.frames.items()},
        "masks": {name: files.read(member, 2**20) for name, member in files.masks.items()},
        "models": {
            f"{model}/{name}": files.read(member, 2**20)
            for model, one in files.models.items()
            for name, member in one.items()
        },
    }


# Names alone


@pytest.mark.parametrize(
    "mask",
    [
        "masks/000.jpg.png",
        "masks/000.png",
        "masks/000_mask.JPG",
        "masks/000.jpg",
        "mask/000.png",
        "images/000_bg_removed.png",
    ],
)
def test_a_mask_is_joined_by_name_whatever_its_naming(mask: str) -> None:
    layout = arrange(["images/000.jpg", "images/001.jpg", mask])
    assert layout.frames == {"000.jpg": "images/000.jpg", "001.jpg": "images/001.jpg"}
    assert layout.masks == {"000.jpg": mask}


def test_masks_beside_the_frames_yield_to_those_of_a_folder_and_those_to_a_tree_of_their_own() -> None:
    names = ["images/000.jpg", "masks/000.png", "images/000_bg_removed.png"]
    assert arrange(names).masks == {"000.jpg": "masks/000.png"}
    assert arrange(names, [("000.jpg.png", "mask:000.jpg.png")]).masks == {"000.jpg": "mask:000.jpg.png"}


def test_masks_of_frames_that_are_not_there_are_kept_under_their_own_names() -> None:
    layout = arrange(["images/010.jpg", "masks/001.jpg.png", "masks/010.jpg.png", "masks/002.png"])
    assert layout.frames == {"010.jpg": "images/010.jpg"}
    assert layout.masks == {"010.jpg": "masks/010.jpg.png", "001.jpg": "masks/001.jpg.png", "002.jpg": "masks/002.png"}


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("sparse/0/images.bin", "0"),
        ("sparse/images.bin", "sparse"),
        ("colmap/sparse/1/images.txt", "1"),
        ("distorted/sparse/0/images.bin", "0"),
        ("images.bin", "."),
        ("model/images.bin", "model"),
    ],
)
def test_models_are_found_where_people_put_them(file: str, model: str) -> None:
    layout = arrange(["images/a.jpg", file])
    assert layout.models == {model: {file.rpartition("/")[2]: file}}


def test_frames_without_a_folder_of_images_lie_beside_the_model() -> None:
    layout = arrange(["a.jpg", "b.JPG", "notes.txt", "images.bin", "masks/a.png", ".c.jpg", "sub/d.png"])
    assert sorted(layout.frames) == ["a.jpg", "b.JPG", "sub/d.png"]
    assert layout.masks == {"a.jpg": "masks/a.png"}


@given(st.permutations(["images/0.jpg", "images/1.jpg", "masks/0.png", "sparse/0/a.bin", "sparse/1/a.bin", "x.md"]))
def test_the_order_of_names_does_not_matter(names: list[str]) -> None:
    layout = arrange(names)
    assert list(layout.frames) == ["0.jpg", "1.jpg"]
    assert layout.masks == {"0.jpg": "masks/0.png"}
    assert list(layout.models) == ["0", "1"]


@given(st.sets(st.text("ab0./_", min_size=1, max_size=12)))
def test_any_names_are_sorted_without_an_error_and_no_file_twice(names: set[str]) -> None:
    layout = arrange(names)
    members = [
        *layout.frames.values(),
        *layout.masks.values(),
        *(m for one in layout.models.values() for m in one.values()),
    ]
    assert set(members) <= names
    assert len(set(members)) == len(members)


# MVImgNet


def test_every_layout_gives_the_same_capture(tmp_path: Path) -> None:
    masks = {f"{i:03d}.jpg.png": b"mask %d" % i for i in range(3)}
    capture = under("7/0123abcd", FRAMES | MODEL)
    own = under("7/0123abcd", masks)
    beside = under("7/0123abcd/masks", masks)
    roots = {
        "tree, masks apart": mvimgnet(write_tree(tmp_path / "a", capture), masks=write_tree(tmp_path / "am", own)),
        "tree, masks inside": mvimgnet(write_tree(tmp_path / "b", capture | under("MVImgNet_mask", own))),
        "tree of 2.0": mvimgnet(write_tree(tmp_path / "c", capture | beside)),
        "wrapped tree": mvimgnet(write_tree(tmp_path / "d", under("MVImgNet", capture | beside))),
        "zip, mask zip": mvimgnet(
            write_zip(tmp_path / "e" / "mvi_00.zip", capture).parent,
            masks=write_zip(tmp_path / "em" / "m.zip", own).parent,
        ),
        "zip, mask tree": mvimgnet(write_zip(tmp_path / "f" / "mvi_00.zip", capture).parent, masks=tmp_path / "am"),
        "zip of 2.0, wrapped": mvimgnet(
            write_zip(tmp_path / "g" / "x.ZIP", under("data/MVImgNet", capture | beside)).parent
        ),
    }
    found = {}
    for name, source in roots.items():
        (asset,) = source.list_assets()
        assert (asset.uid, asset.key, asset.license) == ("mvimgnet-7-0123abcd",) * 2 + ("MVImgNet-ToU",), name
        found[name] = contents(source.open_capture(asset))
    first = found["tree, masks apart"]
    assert first["masks"] == {f"{i:03d}.jpg": b"mask %d" % i for i in range(3)}
    assert sorted(first["models"]) == ["0/cameras.bin", "0/images.bin", "0/points3D.bin"]
    assert all(one == first for one in found.values())


def test_an_instance_split_over_zips_and_a_tree_is_one_capture(tmp_path: Path) -> None:
    names = list(FRAMES)
    write_zip(tmp_path / "mvi_00.zip", under("7/0123abcd", {names[0]: FRAMES[names[0]]} | MODEL))
    write_zip(tmp_path / "mvi_01.zip", under("7/0123abcd", {names[1]: FRAMES[names[1]], names[0]: FRAMES[names[0]]}))
    write_tree(tmp_path, under("7/0123abcd", {names[2]: FRAMES[names[2]]}))
    (asset,) = mvimgnet(tmp_path).list_assets()
    assert len(contents(mvimgnet(tmp_path).open_capture(asset))["frames"]) == 3, "equal copies are one"


def test_a_name_that_is_there_twice_with_other_content_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "mvi_00.zip", under("7/0123abcd", FRAMES | MODEL))
    write_zip(tmp_path / "mvi_01.zip", under("7/0123abcd", {"images/000.jpg": b"another"}))
    source = mvimgnet(tmp_path)
    with pytest.raises(AssetError, match="twice") as caught:
        source.open_capture(source.list_assets()[0])
    assert caught.value.kind is FailureKind.CORRUPT_FILE
    twice = tmp_path / "twice"
    with pytest.warns(UserWarning, match="Duplicate"):
        write_zip(
            twice / "mvi_00.zip", [*under("7/0123abcd", FRAMES).items(), ("7/0123abcd/images/000.jpg", b"frame 0")]
        )
    with pytest.raises(AssetError, match="twice"):
        mvimgnet(twice).open_capture(mvimgnet(twice).list_assets()[0])


def scattered(tmp_path: Path) -> dict[str, dict[str, bytes]]:
    """Three captures whose entries stand in one zip at random, among others' and strangers'."""
    captures = {
        f"{c}/{i:08x}": {f"images/{k:03d}.jpg": b"%d %d %d" % (c, i, k) for k in range(20)} | MODEL
        for c, i in ((10, 5), (9, 0xFF), (9, 1))
    }
    files = [item for name, files in captures.items() for item in under(name, files).items()]
    files += [
        ("README.md", b"x"),
        ("9/zz/images/000.jpg", b"no instance"),
        ("__MACOSX/9/00000001/images/._000.jpg", b""),
    ]
    random.Random(0).shuffle(files)
    write_zip(tmp_path / "mvi_00.zip", files)
    return captures


def test_listing_is_sorted_by_number_and_the_same_again_and_scattered_entries_are_found(tmp_path: Path) -> None:
    captures = scattered(tmp_path)
    assets = mvimgnet(tmp_path).list_assets()
    assert [a.uid for a in assets] == ["mvimgnet-9-00000001", "mvimgnet-9-000000ff", "mvimgnet-10-00000005"]
    assert assets == mvimgnet(tmp_path).list_assets()
    assert all(len(asset.uri) < 400 for asset in assets), "a plan of 200 thousand must stay small"
    for asset in assets:
        name = asset.uid.removeprefix("mvimgnet-").replace("-", "/")
        found = contents(mvimgnet(tmp_path).open_capture(asset))
        assert found["frames"] == {f"{k:03d}.jpg": captures[name][f"images/{k:03d}.jpg"] for k in range(20)}
    chosen = mvimgnet(tmp_path, classes=(9,), max_captures=1).list_assets()
    assert [a.uid for a in chosen] == ["mvimgnet-9-00000001"]


def test_a_zip_that_changed_since_the_plan_is_found_out(tmp_path: Path) -> None:
    write_zip(tmp_path / "mvi_00.zip", under("7/0123abcd", FRAMES | MODEL))
    (asset,) = mvimgnet(tmp_path).list_assets()
    changed = FRAMES | {"images/001.jpg": b"frame X"}
    write_zip(tmp_path / "mvi_00.zip", under("7/0123abcd", changed | MODEL))
    with pytest.raises(AssetError, match="changed since the plan") as caught:
        mvimgnet(tmp_path).open_capture(asset)
    assert caught.value.kind is FailureKind.CHECKSUM_MISMATCH
    (tmp_path / "mvi_00.zip").unlink()
    with pytest.raises(AssetError) as caught:
        mvimgnet(tmp_path).open_capture(asset)
    assert caught.value.kind is FailureKind.NOT_FOUND


def test_a_capture_with_a_hostile_entry_fails_alone(tmp_path: Path) -> None:
    write_zip(
        tmp_path / "mvi_00.zip",
        under("7/0123abcd", FRAMES | MODEL) | under("x/../7/0000000a", FRAMES) | under("8/0000000b", FRAMES),
    )
    data = bytearray((tmp_path / "mvi_00.zip").read_bytes())
    last = data.rindex(b"PK\1\2")
    struct.pack_into("<L", data, last + 38, 0o120777 << 16)
    (tmp_path / "mvi_00.zip").write_bytes(data)
    source = mvimgnet(tmp_path)
    good, path, link = source.list_assets()
    kinds = {}
    for asset in (good, path, link):
        try:
            source.open_capture(asset)
        except AssetError as error:
            kinds[asset.uid] = error.message
    assert list(kinds) == [good.uid, link.uid] or list(kinds) == [path.uid, link.uid]
    assert any("plain relative path" in text for text in kinds.values())
    assert any("symbolic link" in text for text in kinds.values())


def test_excluded_captures_are_planned_and_fail_with_a_kind(tmp_path: Path) -> None:
    second = {name.replace("sparse/0", "sparse/1"): data + b" of 1" for name, data in MODEL.items()}
    for name, files in {"7/0000000a": MODEL, "7/0000000b": MODEL, "7/0000000c": MODEL | second}.items():
        write_tree(tmp_path / "data", under(name, FRAMES | files))
    listed = tmp_path / "bad.txt"
    listed.write_text("# seen by eye\n7/0000000a\n\n7/0000000b-0\n7/0000000c-0\n")
    source = mvimgnet(tmp_path / "data", exclude_file=str(listed))
    first, second_asset, third = source.list_assets()
    listed.unlink()  # workers need the plan alone
    for asset, words in ((first, "on the list"), (second_asset, "models 0")):
        with pytest.raises(AssetError, match=words) as caught:
            source.open_capture(asset)
        assert caught.value.kind is FailureKind.EXCLUDED
    assert sorted(source.open_capture(third).files.models) == ["1"]
    listed.write_text("7-0000000a\n")
    with pytest.raises(UserError, match="line 1: '7-0000000a'"):
        mvimgnet(tmp_path / "data", exclude_file=str(listed)).list_assets()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (b"# a comment\n\n7-0000000a\n", 3),
        (b"\xef\xbb\xbf7/0000000a\r\n\r\n7/0000000A\r\n", 3),
        (b"7/0000000a\n  # indented\n7/0000000a-0 # why\n", 3),
        (b"07/0000000a\n", 1),
        (b"7/0000000a\n\xff\xfe\n", 2),
        (b"7/0000000a-\n", 1),
        (b"7/0000000a,7/0000000b\n", 1),
    ],
)
def test_an_odd_line_of_a_list_is_named_by_file_and_number(tmp_path: Path, text: bytes, number: int) -> None:
    write_tree(tmp_path / "data", under("7/0000000a", FRAMES | MODEL))
    (tmp_path / "bad.txt").write_bytes(text)
    with pytest.raises(UserError, match=rf"source\.exclude_file .*bad\.txt, line {number}: ") as caught:
        mvimgnet(tmp_path / "data", exclude_file=tmp_path / "bad.txt").list_assets()
    assert "\n" not in str(caught.value)


def test_lists_as_editors_write_them_and_lists_of_more_than_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tree(tmp_path / "data", under("7/0000000a", FRAMES | MODEL) | under("7/0000000b", FRAMES))
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbf7/0000000a-00\r\n\t 7/0000000b-0 \r\n9/0000000c\r\n")
    source = mvimgnet(tmp_path / "data", exclude_file=tmp_path / "bad.txt")
    with caplog.at_level("INFO"):
        first, second = source.list_assets()
    assert "1 of its 3 captures are not in the source, such as 9/0000000c" in caplog.text
    with pytest.raises(AssetError) as caught:
        source.open_capture(first)
    assert caught.value.kind is FailureKind.EXCLUDED
    assert source.open_capture(second).files.models == {}, "it has no model to leave out: that is its own defect"
    (tmp_path / "names.txt").write_text("\n7/\nnobody\n")
    with caplog.at_level("WARNING"):
        (one,) = colmap(
            write_tree(tmp_path / "all", under("7", FRAMES)), exclude_file=tmp_path / "names.txt"
        ).list_assets()
    assert one.uri.startswith("colmap:excluded:")
    assert "names.txt, line 3: 'nobody' is no capture" in caplog.text


def test_what_the_user_can_mend_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source\.path .* does not exist"):
        mvimgnet(tmp_path / "nowhere").list_assets()
    with pytest.raises(UserError, match="holds no capture"):
        mvimgnet(tmp_path).list_assets()
    write_zip(tmp_path / "mvi_00.zip", under("7/0123abcd", FRAMES))
    with pytest.raises(UserError, match=r"no capture of the classes \[8\]"):
        mvimgnet(tmp_path, classes=(8,)).list_assets()
    whole = (tmp_path / "mvi_00.zip").read_bytes()
    (tmp_path / "mvi_00.zip").write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"mvi_00\.zip .* cut short") as caught:
        mvimgnet(tmp_path).list_assets()
    assert "\n" not in str(caught.value)


def test_the_digest_is_of_what_was_read_whatever_the_order_and_the_layout(tmp_path: Path) -> None:
    tree = mvimgnet(write_tree(tmp_path / "tree", under("7/0123abcd", FRAMES | MODEL)))
    zipped = mvimgnet(write_zip(tmp_path / "zips" / "mvi_00.zip", under("7/0123abcd", FRAMES | MODEL)).parent)
    digests = set()
    for source, order in ((tree, 1), (zipped, 1), (zipped, -1)):
        capture = source.open_capture(source.list_assets()[0])
        for member in list(capture.files.frames.values())[::order]:
            capture.files.read(member, 100)
        digests.add(capture.reader.digest())
    assert len(digests) == 1
    partly = tree.open_capture(tree.list_assets()[0])
    partly.files.read("images/000.jpg", 100)
    assert partly.reader.digest() not in digests


def test_names_that_are_not_utf8_are_joined(tmp_path: Path) -> None:
    name = b"7/0123abcd/images/\xb0\xa1.jpg"
    path = write_zip(tmp_path / "mvi_00.zip", {"7/0123abcd/images/QQ.jpg": b"odd"} | under("7/0123abcd", MODEL))
    path.write_bytes(path.read_bytes().replace(b"7/0123abcd/images/QQ.jpg", name))
    (asset,) = mvimgnet(tmp_path).list_assets()
    found = contents(mvimgnet(tmp_path).open_capture(asset))["frames"]
    assert found == {b"\xb0\xa1.jpg".decode("utf-8", "surrogateescape"): b"odd"}


def test_zips_and_trees_are_read_from_s3_by_ranges(s3_url: str, tmp_path: Path) -> None:
    masks = {f"{i:03d}.jpg.png": b"mask %d" % i for i in range(3)}
    capture = under("7/0123abcd", FRAMES | MODEL)
    filler = {"8/00000001/images/000.jpg": random.Random(1).randbytes(2**20)}
    local = write_zip(tmp_path / "mvi_00.zip", capture | filler | under("9/0000000c", FRAMES))
    url = f"{s3_url}/photos"
    backend = open_store(url).backend
    obstore.put(backend, "zips/mvi_00.zip", local)
    for name, data in under("masks/7/0123abcd", masks).items():
        obstore.put(backend, name, data)
    source = mvimgnet(f"{url}/zips", masks=f"{url}/masks")
    assets = source.list_assets()
    assert [a.uid for a in assets] == ["mvimgnet-7-0123abcd", "mvimgnet-8-00000001", "mvimgnet-9-0000000c"]
    here = mvimgnet(tmp_path, masks=write_tree(tmp_path / "m", under("7/0123abcd", masks)))
    found = contents(source.open_capture(assets[0]))
    assert found == contents(here.open_capture(here.list_assets()[0]))
    assert len(found["masks"]) == 3
    read = 0

    class Metered:
        is_remote, url = True, ""

        def __init__(self) -> None:
            self.inner = source._folder("path")

        def read_ranges(self, name: str, starts: list[int], lengths: list[int]) -> list[bytes]:
            nonlocal read
            read += sum(lengths)
            return self.inner.read_ranges(name, starts, lengths)

    source._folders["path"] = Metered()  # type: ignore[assignment]
    contents(source.open_capture(assets[0]))
    assert read < 20_000, "the other capture's megabyte is not fetched"
    with pytest.raises(UserError, match="holds no capture"):
        mvimgnet(f"{url}/nothing").list_assets()


# COLMAP folders


def test_a_folder_of_captures_and_one_capture(tmp_path: Path) -> None:
    write_tree(tmp_path / "all" / "cup", FRAMES | MODEL | {"masks/000.png": b"m", "SOURCE.md": b"x"})
    write_tree(tmp_path / "all" / "Bowl 2", {"a.jpg": b"a"} | {"images.txt": b"t", "cameras.txt": b"c"})
    write_tree(tmp_path / "all" / "notes", {"readme.md": b"no capture"})
    source = colmap(tmp_path / "all", license="CC-BY-4.0", attribution="somebody")
    assets = source.list_assets()
    assert [(a.uid, a.key) for a in assets] == [("Bowl 2", assets[0].key), ("cup", "cup")]
    assert {(a.license, a.attribution, a.format, a.sha256) for a in assets} == {
        ("CC-BY-4.0", "somebody", "capture", None)
    }
    bowl, cup = (contents(source.open_capture(asset)) for asset in assets)
    assert bowl == {"frames": {"a.jpg": b"a"}, "masks": {}, "models": {"./images.txt": b"t", "./cameras.txt": b"c"}}
    assert cup["masks"] == {"000.jpg": b"m"}
    (alone,) = colmap(tmp_path / "all" / "cup").list_assets()
    assert alone.uid == "cup"
    assert contents(colmap(tmp_path / "all" / "cup").open_capture(alone)) == cup


def test_folders_of_captures_are_excluded_go_missing_and_are_not_there(tmp_path: Path) -> None:
    write_tree(tmp_path / "all" / "cup", FRAMES | MODEL)
    write_tree(tmp_path / "all" / "jug", FRAMES | MODEL)
    (tmp_path / "bad.txt").write_text("cup\n")
    source = colmap(tmp_path / "all", exclude_file=str(tmp_path / "bad.txt"))
    cup, jug = source.list_assets()
    shutil.rmtree(tmp_path / "all" / "jug")
    kinds = []
    for asset in (cup, jug):
        with pytest.raises(AssetError) as caught:
            source.open_capture(asset)
        kinds.append(caught.value.kind)
    assert kinds == [FailureKind.EXCLUDED, FailureKind.NOT_FOUND]
    with pytest.raises(UserError, match="does not exist"):
        colmap(tmp_path / "none").list_assets()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no capture"):
        colmap(tmp_path / "empty").list_assets()


def test_colmap_folders_are_read_from_s3(s3_url: str, tmp_path: Path) -> None:
    url = f"{s3_url}/colmap"
    backend = open_store(url).backend
    files = FRAMES | MODEL | {"masks/a b.png": b"m", "images/a b.jpg": b"with a space"}
    for name, data in under("cup", files).items():
        obstore.put(backend, name, data)
    (asset,) = colmap(url).list_assets()
    assert asset.uid == "cup"
    local = colmap(write_tree(tmp_path / "cup", files))
    assert contents(colmap(url).open_capture(asset)) == contents(local.open_capture(local.list_assets()[0]))


def test_the_whole_of_a_capture_is_bounded(tmp_path: Path) -> None:
    write_tree(tmp_path / "cup", FRAMES | MODEL | {"images/big.jpg": b"x" * 2**20})
    source = colmap(tmp_path / "cup")
    with pytest.raises(AssetError, match=r"at most 1048576 are allowed \(admission.max_asset_bytes\)") as caught:
        source.open_capture(source.list_assets()[0])
    assert caught.value.kind is FailureKind.TOO_LARGE


def test_a_uri_of_another_source_is_refused(tmp_path: Path) -> None:
    asset = Asset(uid="x", source="mvimgnet", uri="file:///etc/passwd", format="capture")
    with pytest.raises(AssetError, match="none of the source"):
        mvimgnet(tmp_path).open_capture(asset)


class SlowFolder:
    """A remote folder that tells which file was asked for when."""

    is_remote = True

    def __init__(self) -> None:
        self.asked: list[str] = []

    def read(self, name: str, max_bytes: int) -> bytes:
        self.asked.append(name)
        return name.encode().ljust(max_bytes, b".")


def test_files_are_read_ahead_also_after_the_models_which_stand_last_and_are_read_first() -> None:
    folder = SlowFolder()
    names = [*(f"images/{i:03d}.jpg" for i in range(12)), "sparse/0/cameras.bin", "sparse/0/images.bin"]
    members = {name: FileMember(folder=folder, name=name, num_bytes=32) for name in names}  # type: ignore[arg-type]
    reader = MemberReader("c", members, 2**20)
    for name in names[12:]:
        reader.read(name, 32)
    reader.read(names[0], 32)
    until = time.monotonic() + 5
    while not set(names[1:4]) <= set(folder.asked) and time.monotonic() < until:
        time.sleep(0.01)
    assert set(names[1:4]) <= set(folder.asked), "frames come while the first is decoded"
    assert [reader.read(name, 32)[: len(name)] for name in names[1:4]] == [name.encode() for name in names[1:4]]
    assert all(folder.asked.count(name) == 1 for name in names[:4]), "and each once"
    reader.close()
