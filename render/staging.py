"""A copy of an asset for its child: its file and the files that it names, in a folder that holds nothing else.

A child lives for many assets and Landlock allows nothing later, so it cannot be let into one asset's folder after the
other. Instead each asset comes to it: the main file, and what that names below its own folder, keep their places. What
lies above the folder, or at an absolute path, does not come, whatever an importer may try. Copies and not links, since
a link would hand over the original to whoever can change modes.

Which files are named is read off precisely where the format is known (glTF's URIs, OBJ's libraries and their maps), and
by endings elsewhere: every text in the file that ends like an image, a layer or a cache is a name, and so is every tail
of its path, since exporters write paths of their authors' disks and importers then look beside the file. Layers and
linked files are read for names in turn. Compressed Blender files and binary USD's table of words are unpacked for it,
within bounds.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pyarrow as pa

from pipeline.headers import obj_side_files
from pipeline.side_files import find, show, uri_path
from pipeline.types import AssetError, FailureKind
from render.gltf import split

MAX_FILES = 1000
_SELF_CONTAINED = ("stl", "ply", "usdz")
_LAYERS = ("usd", "usda", "usdc", "blend")
_ENDINGS = (
    b"png jpg jpeg jpe tga bmp gif tif tiff exr hdr dds webp psd jp2 j2k sgi rgb cin dpx avif pcx ktx2 "
    b"usd usda usdc usdz blend mtlx mdd pc2 abc vdb ies ttf otf"
).split()
_ENDING = re.compile(rb"\.(?:" + b"|".join(_ENDINGS) + rb")(?![A-Za-z0-9])", re.IGNORECASE)
_NO_NAME = re.compile(rb"[\x00-\x1f\"<>|*?@\x7f]")
_TILES = re.compile(r"\{(?:UDIM|UVTILE)\}", re.IGNORECASE)
_MAX_NAME_BYTES = 1024
_MAX_TAILS = 8
_MAX_UNPACKED_BYTES = 2**30
_SECTION = struct.Struct("<16sqq")


def stage(path: Path, format_name: str, folder: Path, max_side_bytes: int) -> Path:
    """Copy an asset's file, and the files that it names, into an empty folder; return where its file is now.

    Args:
        path: the asset's file.
        format_name: its format.
        folder: where to; nothing else is in it.
        max_side_bytes: what the files that it names may have together.

    Raises:
        AssetError: NOT_FOUND, or TOO_LARGE where it names too many or too large files.
    """
    home, main = path.parent, PurePosixPath(path.name)
    waiting: list[tuple[PurePosixPath, str]] = [(main, format_name)]
    taken, left_bytes = {main}, max_side_bytes
    try:
        while waiting:
            relative, kind = waiting.pop()
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(home / relative, target)
            for name in _named(home, relative, kind):
                if name in taken:
                    continue
                left_bytes -= (home / name).stat().st_size
                if left_bytes < 0 or len(taken) >= MAX_FILES:
                    raise AssetError(
                        FailureKind.TOO_LARGE,
                        f"{show(path.name)} names {len(taken)} or more files; at most {MAX_FILES} of {max_side_bytes} "
                        "bytes together are allowed (admission.max_asset_bytes)",
                    )
                taken.add(name)
                waiting.append((name, name.suffix[1:].lower()))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise AssetError(FailureKind.NOT_FOUND, f"{path} is not there any more, or not a file") from None
    return folder / main


def _named(home: Path, relative: PurePosixPath, kind: str) -> Iterator[PurePosixPath]:
    """Yield the files below `home` that one of its files names: as they are called there."""
    path = home / relative
    if kind in ("glb", "gltf"):
        found = [find(path.parent, name) for name in _uris(path)]
    elif kind == "obj":
        found = [*obj_side_files(path)]
    elif kind in (*_LAYERS, "fbx", "dae"):
        found = [*_mentioned(home, relative.parent, _words(path, kind))]
    else:
        found = []
    for one in found:
        if one is not None:
            yield PurePosixPath(one.relative_to(home))


def _uris(path: Path) -> list[PurePosixPath]:
    """Return the relative URIs of a glTF file; of one that is none, nothing: its importer says what is wrong."""
    try:
        document = json.loads(split(path)[0])
        entries = [*(document.get("buffers") or []), *(document.get("images") or [])]
        uris = [entry.get("uri") for entry in entries]
    except (ValueError, TypeError, AttributeError, struct.error, RecursionError):
        return []
    found = []
    for uri in uris:
        if isinstance(uri, str) and not uri.startswith("data:"):
            try:
                found.append(uri_path(uri))
            except AssetError:
                continue  # it leads outside, where nothing is staged from
    return found


def _words(path: Path, kind: str) -> bytes:
    """Return the bytes of a file in which names stand plain."""
    data = path.read_bytes()
    if data.startswith(b"PXR-USDC"):
        return _usd_tokens(data)
    if kind == "blend" and data.startswith(b"\x1f\x8b"):
        return _bounded(path, zlib.decompressobj(wbits=31).decompress(data, _MAX_UNPACKED_BYTES + 1))
    if kind == "blend" and data.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            with pa.input_stream(pa.BufferReader(data), compression="zstd") as stream:
                return _bounded(path, stream.read(_MAX_UNPACKED_BYTES + 1))
        except (OSError, pa.ArrowException):
            return b""  # Blender will say what is wrong with it
    return data


def _bounded(path: Path, data: bytes) -> bytes:
    if len(data) > _MAX_UNPACKED_BYTES:
        raise AssetError(
            FailureKind.TOO_LARGE,
            f"{show(path.name)} unpacks to over {_MAX_UNPACKED_BYTES} bytes; at most that is allowed",
        )
    return data


def _usd_tokens(data: bytes) -> bytes:
    """Return the words of a binary USD file, paths of assets among them, one after the other.

    "PXR-USDC" | version, 8 bytes | offset of the table | ... | number of sections | name, start, size ...
    TOKENS:  number | bytes | compressed bytes | 0 | one block of LZ4        (more than 2 GB: blocks; not read)
    """
    try:
        (table,) = struct.unpack_from("<q", data, 16)
        (number,) = struct.unpack_from("<Q", data, table)
        for i in range(min(number, 64)):
            name, start, _ = _SECTION.unpack_from(data, table + 8 + i * _SECTION.size)
            if name.rstrip(b"\0") == b"TOKENS":
                _, num_bytes, num_packed = struct.unpack_from("<QQQ", data, start)
                if num_bytes > _MAX_UNPACKED_BYTES or data[start + 24] != 0:
                    return b""
                block = data[start + 25 : start + 24 + num_packed]
                return bytes(pa.Codec("lz4_raw").decompress(block, num_bytes, asbytes=True))
    except (struct.error, IndexError, OSError, ValueError, pa.ArrowException):
        pass  # Blender will say what is wrong with it
    return b""


def _mentioned(home: Path, folder: PurePosixPath, data: bytes) -> Iterator[Path]:
    """Yield the files below `home` that a file in its subfolder mentions, by a whole path or by the end of one."""
    for tile in (b"<UDIM>", b"<UVTILE>"):
        data = data.replace(tile, b"{" + tile[1:-1] + b"}")
    texts = set()
    for match in _ENDING.finditer(data):
        before = data[max(0, match.start() - _MAX_NAME_BYTES) : match.start()]
        stops = [stop.end() for stop in _NO_NAME.finditer(before)]
        texts.add(before[stops[-1] if stops else 0 :] + match.group())
    for text in sorted(texts):
        name = text.decode("utf-8", "surrogateescape")
        for variant in dict.fromkeys((name, unquote(name, errors="surrogateescape"))):
            parts = [part for part in re.split(r"[\\/]+", variant) if part not in ("", ".")][-_MAX_TAILS:]
            for i in range(len(parts)):
                place = _inside(folder, parts[i:])
                if place is not None:
                    yield from _files(home, place)


def _inside(folder: PurePosixPath, parts: Sequence[str]) -> PurePosixPath | None:
    """Return where a path from a subfolder leads, None if that is above the top."""
    stack = list(folder.parts)
    for part in parts:
        if part == ".." and not stack:
            return None
        if part == "..":
            stack.pop()
        else:
            stack.append(part)
    return PurePosixPath(*stack)


def _files(folder: Path, relative: PurePosixPath) -> Iterator[Path]:
    if not _TILES.search(relative.name):
        one = find(folder, relative)
        if one is not None:
            yield one
        return
    pattern = re.compile(r"(?:\d{4}|u\d+_v\d+)".join(map(re.escape, _TILES.split(relative.name))), re.IGNORECASE)
    if (folder / relative.parent).is_dir():
        yield from (one for one in sorted((folder / relative.parent).iterdir()) if pattern.fullmatch(one.name))
