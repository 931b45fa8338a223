"""Files of formats other than glTF, judged by magic, sizes and the side files that they name.

Bounds: a text file is read once in blocks of 4 MiB, and so is a container's directory, which may be no longer. Nothing
is unpacked, no XML is parsed (so no entity can expand), no number from the file is trusted for an allocation.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from pipeline import sniff
from pipeline.side_files import find, relative_path, show
from pipeline.types import AssetError, FailureKind

_BLOCK_BYTES = 4 << 20
_MAX_MTL_BYTES = 16 << 20
_MAX_PLY_HEADER_BYTES = 1 << 20
_MAX_ZIP_ENTRIES = 10_000
_MAX_ZIP_DIRECTORY_BYTES = 4 << 20  # 10 thousand entries with names of 300 characters
_USD_FORMATS = ("usd", "usda", "usdc")
# Paths stand between at-signs. Only those with a known ending count, since comments may hold mail addresses, and none
# with <UDIM>, which stands for a number.
_USDA_ASSETS = re.compile(rb"@([^@\s<>]{1,1000}\.(usd[acz]?|png|jpe?g|exr|hdr|tiff?|webp))@", re.IGNORECASE)
_OBJ_TOKENS = re.compile(rb"^[ \t]*(?:(v|f|mtllib|usemtl)[ \t]+([^\r\n]*))", re.MULTILINE)
_OBJ_LIBRARY = re.compile(rb"^[ \t]*mtllib[ \t]+([^\r\n]*)", re.MULTILINE)
# What Blender's importer reads from an MTL file; map_Ka, for one, it passes over.
_MAP_NAMES = frozenset(
    {b"map_kd", b"map_ks", b"map_ns", b"map_d", b"map_ke", b"map_bump", b"bump", b"refl", b"map_refl"}
    | {b"map_pr", b"map_pm", b"map_ps", b"norm", b"disp", b"map_disp"}
)
_MAP_OPTIONS = {b"-bm": 1, b"-boost": 1, b"-texres": 1, b"-imfchan": 1, b"-type": 1, b"-clamp": 1}
_MAP_OPTIONS |= {b"-blendu": 1, b"-blendv": 1, b"-cc": 1, b"-mm": 2, b"-s": 3, b"-o": 3, b"-t": 3}
_UNSNIFFED_IMAGES = (".tga", ".hdr", ".exr", ".psd", ".jp2", ".j2k", ".sgi", ".rgb", ".cin", ".dpx", ".avif", ".pcx")
_PLY_SCALARS = {b"char": 1, b"int8": 1, b"uchar": 1, b"uint8": 1, b"short": 2, b"int16": 2, b"ushort": 2, b"uint16": 2}
_PLY_SCALARS |= {
    b"int": 4,
    b"int32": 4,
    b"uint": 4,
    b"uint32": 4,
    b"float": 4,
    b"float32": 4,
    b"double": 8,
    b"float64": 8,
}
_MAX_FBX_RECORDS = 10_000  # exporters write about ten
_FBX_MAGIC = b"Kaydara FBX Binary  \x00"


def _not_an_asset(what: str, head: bytes) -> NoReturn:
    raise AssetError(FailureKind.NOT_AN_ASSET, f"not {what}: {sniff.describe(head)}")


def _corrupt(message: str) -> NoReturn:
    raise AssetError(FailureKind.CORRUPT_FILE, message)


def _truncated(message: str) -> NoReturn:
    raise AssetError(FailureKind.TRUNCATED, message)


def _too_many(num_triangles: int, max_triangles: int) -> NoReturn:
    message = f"{num_triangles} triangles; at most {max_triangles} are allowed"
    raise AssetError(FailureKind.TOO_LARGE, message)


def _head(path: Path, num_bytes: int = sniff.HEAD_BYTES) -> bytes:
    with path.open("rb") as file:
        return file.read(num_bytes)


def _tail(path: Path, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - num_bytes))
        return file.read()


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield a text file in blocks that end at a line's end; a longer line is cut."""
    with path.open("rb") as file:
        rest = b""
        while block := file.read(_BLOCK_BYTES):
            block = rest + block
            end = block.rfind(b"\n") + 1 or len(block)
            rest = block[end:]
            yield block[:end]
        yield rest


def check_obj(path: Path, max_triangles: int) -> None:
    """Check a Wavefront OBJ: vertices, faces, and the textures of the materials that it uses.

    A missing material library is allowed, since Blender then gives plain grey.

    Raises:
        AssetError: NOT_AN_ASSET, EMPTY_SCENE, DEGENERATE_GEOMETRY, TOO_LARGE, CORRUPT_FILE, MISSING_TEXTURE.
    """
    head = _head(path)
    if b"\x00" in head:
        _not_an_asset("a text OBJ file", head)
    num_vertices = num_faces = 0
    libraries: dict[bytes, None] = {}
    used: set[bytes] = set()
    for block in _blocks(path):
        for token, rest in _OBJ_TOKENS.findall(block):
            if token == b"v":
                num_vertices += 1
                if b"n" in rest.lower():  # only nan and inf have one
                    kind = FailureKind.DEGENERATE_GEOMETRY
                    raise AssetError(kind, f"vertex {num_vertices} is not finite: {show(rest[:60])}")
            elif token == b"f":
                num_faces += 1
            elif token == b"mtllib":
                libraries[rest.strip()] = None
            else:
                used.add(rest.strip())
    if num_vertices == 0:
        _not_an_asset("an OBJ file, as it has no vertex line", head)
    if num_faces == 0:
        raise AssetError(FailureKind.EMPTY_SCENE, f"{num_vertices} vertices and no face")
    if num_faces > max_triangles:
        _too_many(num_faces, max_triangles)
    for library in _material_libraries(path, list(libraries)):
        _check_mtl(library, used)


def obj_side_files(path: Path) -> Iterator[Path]:
    """Yield the files that an OBJ and its material libraries name and that are there, however its materials are used.

    Names that lead outside the folder are left out: `check_obj` refuses them.
    """
    libraries = dict.fromkeys(_material_libraries(path, []))
    for name in {match[1].strip() for block in _blocks(path) for match in _OBJ_LIBRARY.finditer(block)}:
        with contextlib.suppress(AssetError):
            libraries |= dict.fromkeys(_material_libraries(path, [name]))
    for library in sorted(libraries):
        yield library
        if library.stat().st_size > _MAX_MTL_BYTES:
            continue
        for line in library.read_bytes().splitlines():
            words = line.split(None, 1)
            if len(words) == 2 and words[0].lower() in _MAP_NAMES:
                name = _map_file(words[1]).decode("utf-8", "surrogateescape")
                try:
                    found = name and _find_texture(library.parent, name)
                except AssetError:
                    continue
                if found:
                    yield found


def _material_libraries(path: Path, names: list[bytes]) -> list[Path]:
    """Return the MTL files of an OBJ that exist; Blender also takes one of the OBJ's own name."""
    folder, found = path.parent, [path.with_suffix(".mtl")]
    for raw in names:
        name = raw.decode("utf-8", "surrogateescape").strip('"')
        if not name:
            continue
        library = find(folder, relative_path(_without_drive(name)))
        if library is None:  # several names on one line
            parts = [find(folder, relative_path(_without_drive(part))) for part in name.split()]
            found += [part for part in parts if part is not None]
        else:
            found.append(library)
    return [library for library in dict.fromkeys(found) if library.is_file()]


def _check_mtl(path: Path, used: set[bytes]) -> None:
    """Check the texture references of an MTL file; only those of used materials must exist."""
    if path.stat().st_size > _MAX_MTL_BYTES:
        raise AssetError(FailureKind.TOO_LARGE, f"{show(path.name)} has more than {_MAX_MTL_BYTES} bytes")
    material = b""
    for line in path.read_bytes().splitlines():
        words = line.split(None, 1)
        if len(words) < 2:
            continue
        keyword = words[0].lower()
        if keyword == b"newmtl":
            material = words[1].strip()
        elif keyword in _MAP_NAMES:
            name = _map_file(words[1]).decode("utf-8", "surrogateescape")
            if name:
                _check_texture(path.parent, name, needed=material in used)


def _map_file(text: bytes) -> bytes:
    """Return the file name of a map statement: what follows its options, spaces included."""
    words = text.split()
    while words and words[0] in _MAP_OPTIONS:
        option = words.pop(0)
        limit = _MAP_OPTIONS[option]
        taken = 0
        # -o, -s and -t take one to three numbers; the others take exactly what the table says.
        while words and taken < limit and (limit < 3 or re.fullmatch(rb"[-+0-9.eE]+", words[0])):
            words.pop(0)
            taken += 1
    return b" ".join(words).strip(b'"')


def _without_drive(name: str) -> str:
    """Return a Windows path with a drive by its last part: no such path exists here, so Blender tries that."""
    return re.split(r"[\\/]", name)[-1] if re.match(r"[A-Za-z]:[\\/]", name) else name


def _find_texture(folder: Path, name: str) -> Path | None:
    relative = relative_path(_without_drive(name))
    return find(folder, relative) or find(folder, PurePosixPath(relative.name))


def _check_texture(folder: Path, name: str, *, needed: bool) -> None:
    path = _find_texture(folder, name)
    if not needed:
        return
    if path is None:
        raise AssetError(FailureKind.MISSING_TEXTURE, f"texture {show(name)} is not beside the asset")
    head = _head(path, sniff.IMAGE_HEAD_BYTES)
    found = sniff.image_format(head)
    sniff.check_image_size(head, f"texture {show(name)}")
    if found is None and path.suffix.lower() not in _UNSNIFFED_IMAGES:
        what = sniff.describe(head) if head else "empty"
        raise AssetError(FailureKind.MISSING_TEXTURE, f"texture {show(name)} is no image that Blender reads: {what}")


def check_stl(path: Path, max_triangles: int) -> None:
    """Check an STL, binary (84 + 50 n bytes) or text.

    Raises:
        AssetError: TRUNCATED, CORRUPT_FILE, EMPTY_SCENE, TOO_LARGE, DEGENERATE_GEOMETRY, NOT_AN_ASSET.
    """
    size, head = path.stat().st_size, _head(path)
    number = int.from_bytes(head[80:84], "little") if size >= 84 else 0
    # The size decides: binary files may start with "solid" too.
    if size >= 84 and size == 84 + 50 * number:
        if number > max_triangles:
            _too_many(number, max_triangles)
        if number == 0:
            raise AssetError(FailureKind.EMPTY_SCENE, "a binary STL of no triangles")
        corners: NDArray[np.float32] = np.ndarray(
            (number, 9), "<f4", path.read_bytes(), offset=84 + 12, strides=(50, 4)
        )
        if not np.isfinite(corners).all():
            bad = int((~np.isfinite(corners).all(axis=1)).sum())
            raise AssetError(FailureKind.DEGENERATE_GEOMETRY, f"{bad} of {number} triangles have no finite corners")
    elif head.lstrip()[:5].lower() == b"solid" and b"\x00" not in head:
        number = sum(
            len(re.findall(rb"^[ \t]*endfacet", block, re.MULTILINE | re.IGNORECASE)) for block in _blocks(path)
        )
        if b"endsolid" not in _tail(path, 4096).lower():
            _truncated(f"a text STL of {size} bytes without its last line, endsolid")
        if number == 0:
            raise AssetError(FailureKind.EMPTY_SCENE, "a text STL of no facets")
        if number > max_triangles:
            _too_many(number, max_triangles)
    elif size < 84:
        _truncated(f"{size} bytes; the header of a binary STL alone has 84")
    elif size < 84 + 50 * number:
        _truncated(f"{size} bytes; a binary STL of {number} triangles has {84 + 50 * number}")
    else:
        _corrupt(f"{size} bytes; a binary STL of {number} triangles has {84 + 50 * number}")


def check_ply(path: Path, max_triangles: int) -> None:
    """Check the header of a PLY, and that the body can hold what it announces.

    Raises:
        AssetError: NOT_AN_ASSET, CORRUPT_FILE, TRUNCATED, EMPTY_SCENE, TOO_LARGE.
    """
    size, head = path.stat().st_size, _head(path, _MAX_PLY_HEADER_BYTES)
    if not re.match(rb"ply[ \t]*\r?[\n\r]", head):
        _not_an_asset("a PLY file", head)
    end = re.search(rb"^[ \t]*end_header[ \t]*(\r\n|\n|\r)", head, re.MULTILINE)
    if end is None:
        _truncated(f"no end_header in the first {len(head)} bytes of a PLY file")
    encoding = b""
    elements: list[tuple[bytes, int, int]] = []  # name, number, least bytes of one
    for line in head[: end.start()].splitlines():
        words = line.split()
        if words[:1] == [b"format"] and len(words) > 1:
            encoding = words[1]
        elif words[:1] == [b"element"]:
            if len(words) != 3 or not re.fullmatch(rb"[0-9]{1,15}", words[2]):
                _corrupt(f"PLY header line {show(line)}")
            elements.append((words[1], int(words[2]), 0))
        elif words[:1] == [b"property"] and len(words) >= 3 and elements:
            name, number, least = elements[-1]
            width = _PLY_SCALARS.get(words[2 if words[1] == b"list" else 1])
            if width is None:
                _corrupt(f"PLY header line {show(line)}")
            elements[-1] = (name, number, least + width)
    if encoding not in (b"ascii", b"binary_little_endian", b"binary_big_endian"):
        _corrupt(f"PLY format {show(encoding)}; ascii or binary_little_endian or binary_big_endian is required")
    numbers = {name: number for name, number, _ in elements}
    # In text an element takes at least a digit and a line's end.
    needed = sum(number * (2 if encoding == b"ascii" else least) for _, number, least in elements)
    if size - end.end() + 1 < needed:
        _truncated(f"a PLY body of {size - end.end()} bytes; its header announces at least {needed}")
    if not numbers.get(b"face") and not numbers.get(b"tristrips"):
        raise AssetError(FailureKind.EMPTY_SCENE, f"a PLY of {numbers.get(b'vertex', 0)} points and no face")
    if numbers.get(b"face", 0) > max_triangles:
        _too_many(numbers[b"face"], max_triangles)


def check_fbx(path: Path, max_triangles: int) -> None:  # noqa: ARG001 - one signature for all formats
    """Check an FBX, binary or text; a binary one by its chain of top-level records.

    Raises:
        AssetError: NOT_AN_ASSET, TRUNCATED, CORRUPT_FILE.
    """
    size, head = path.stat().st_size, _head(path)
    if not head.startswith(_FBX_MAGIC):
        if b"FBXHeaderExtension" in head and b"\x00" not in head:
            return
        if head.startswith(_FBX_MAGIC[:4]) or _FBX_MAGIC.startswith(head):
            _truncated(f"{size} bytes; the header of an FBX alone has 27")
        _not_an_asset("an FBX file", head)
    if size < 27:
        _truncated(f"{size} bytes; the header of an FBX alone has 27")
    # A record starts with the offset of its end, 8 bytes wide from version 7500 on; zero ends the chain.
    width = 8 if int.from_bytes(head[23:27], "little") >= 7500 else 4
    offset = 27
    with path.open("rb") as file:
        for _ in range(_MAX_FBX_RECORDS):
            file.seek(offset)
            raw = file.read(width)
            if len(raw) < width:
                _truncated(f"the records of an FBX of {size} bytes do not end within it")
            end = int.from_bytes(raw, "little")
            if end == 0:
                return
            if end > size:
                _truncated(f"an FBX record ends at byte {end} of {size}")
            if end <= offset + 3 * width:
                _corrupt(f"an FBX record at {offset} ends at {end}, before its own start")
            offset = end
    _corrupt(f"an FBX of more than {_MAX_FBX_RECORDS} top-level records")


def check_dae(path: Path, max_triangles: int) -> None:  # noqa: ARG001
    """Check that the root of an XML file is COLLADA, without parsing it.

    Raises:
        AssetError: NOT_AN_ASSET, CORRUPT_FILE (a document type, whose entities may expand without end), TRUNCATED.
    """
    raw = _head(path, 1 << 16)
    codec = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    text = raw.decode(codec, "replace").lstrip("\ufeff \t\r\n")
    start = text.find("<COLLADA")
    prolog = text if start < 0 else text[:start]
    if re.search(r"<!(DOCTYPE|ENTITY)", prolog, re.IGNORECASE):
        _corrupt("XML with a document type declaration; refused")
    rest = re.sub(r"<\?.*?\?>|<!--.*?-->", "", prolog, flags=re.DOTALL).strip()
    if start < 0 or rest:
        _not_an_asset("a COLLADA file", raw)
    if "</COLLADA" not in _tail(path, 4096).decode(codec, "replace").replace("\x00", ""):
        _truncated(f"XML of {path.stat().st_size} bytes without its last element, </COLLADA>")


def check_usd(path: Path, max_triangles: int) -> None:
    """Check a USD file of any kind by its magic: the ending .usd allows text and binary, and exporters mix them up.

    Raises:
        AssetError: NOT_AN_ASSET, TRUNCATED, CORRUPT_FILE, TOO_LARGE, MISSING_RESOURCE, MISSING_TEXTURE.
    """
    size, head = path.stat().st_size, _head(path)
    if head.startswith(b"#usda"):
        _check_usda_references(path)
        return
    if head.startswith(b"PK\x03\x04"):
        check_usdz(path, max_triangles)
    elif not head.startswith(b"PXR-USDC"):
        _not_an_asset("a USD file", head)
    elif size < 24:
        _truncated(f"{size} bytes; the header of a binary USD file alone has 88")
    else:
        toc = struct.unpack_from("<q", head, 16)[0]
        if toc < 24 or toc > size - 8:
            kind = FailureKind.TRUNCATED if toc > size - 8 else FailureKind.CORRUPT_FILE
            raise AssetError(kind, f"a binary USD file of {size} bytes with its table of contents at {toc}")


def _check_usda_references(path: Path) -> None:
    """Check that the layers and pictures that a text USD names lie in its folder: Blender leaves out what it lacks."""
    for block in _blocks(path):
        for raw, ending in _USDA_ASSETS.findall(block):
            name = raw.decode("utf-8", "surrogateescape")
            if find(path.parent, relative_path(name)) is None:
                layer = ending.lower().startswith(b"usd")
                kind = FailureKind.MISSING_RESOURCE if layer else FailureKind.MISSING_TEXTURE
                raise AssetError(kind, f"{show(name)}, which the file refers to, is not beside it")


class _DirectoryFile(io.FileIO):
    """A file of which nobody reads more than a directory of a ZIP may take at once.

    `zipfile` reads the directory in one piece and holds 400 bytes for each of its entries before it gives the first: of
    a file of 512 MB that nothing else is in, more than 4 GB.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = os.fstat(self.fileno()).st_size - self.tell() if size is None or size < 0 else size
        if wanted > _MAX_ZIP_DIRECTORY_BYTES:
            raise AssetError(
                FailureKind.TOO_LARGE,
                f"a ZIP archive with a directory of {wanted} bytes; at most {_MAX_ZIP_DIRECTORY_BYTES} are allowed",
            )
        return super().read(wanted)


def check_usdz(path: Path, max_triangles: int) -> None:  # noqa: ARG001
    """Check a USDZ: a ZIP of stored, unencrypted entries whose names stay inside, the first a USD file.

    Raises:
        AssetError: NOT_AN_ASSET, TRUNCATED, CORRUPT_FILE, TOO_LARGE.
    """
    size, head = path.stat().st_size, _head(path)
    if not head.startswith(b"PK\x03\x04"):
        _not_an_asset("a USDZ archive", head)
    try:
        with _DirectoryFile(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_entries(entries, size)
            if (bad := archive.testzip()) is not None:
                _corrupt(f"USDZ entry {show(bad)} does not match its CRC-32")
    except zipfile.BadZipFile as error:
        if b"PK\x05\x06" not in _tail(path, 1 << 16):
            _truncated(f"{size} bytes of a ZIP archive without its directory")
        _corrupt(f"USDZ: {ascii(str(error))[:200]}")
    except (OSError, ValueError, struct.error, NotImplementedError, RuntimeError, zlib.error, EOFError) as error:
        _corrupt(f"USDZ: {type(error).__name__}: {ascii(str(error))[:200]}")


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    if not 0 < len(entries) <= _MAX_ZIP_ENTRIES:
        _corrupt(f"USDZ of {len(entries)} entries; 1 to {_MAX_ZIP_ENTRIES} are allowed")
    total = 0
    for entry in entries:
        relative_path(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            _corrupt(
                f"USDZ entry {show(entry.filename)} is compressed or encrypted; the format allows stored ones only"
            )
        total += entry.file_size
    # Entries that share bytes would make a small archive unpack into a large one.
    if total > size:
        _corrupt(f"USDZ entries of {total} bytes in a file of {size}")
    if PurePosixPath(entries[0].filename).suffix[1:].lower() not in _USD_FORMATS:
        _corrupt(f"the first entry of a USDZ is {show(entries[0].filename)}; a USD file is required")


def check_blend(path: Path, max_triangles: int) -> None:  # noqa: ARG001
    """Check the magic of a Blender file, plain or compressed as Blender compresses.

    Raises:
        AssetError: NOT_AN_ASSET, CORRUPT_FILE.
    """
    head = _head(path)
    if head.startswith(b"\x1f\x8b"):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 16)
        except zlib.error as error:
            _corrupt(f"gzip: {error}")
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        return  # Zstandard: what is inside is for Blender to say
    if not head.startswith(b"BLENDER"):
        _not_an_asset("a Blender file", head)
