"""Rewrite a glTF file that Blender cannot read (meshopt buffers, KTX2 images) into a plain GLB: never imports bpy.

    read and check -> decode views and images -> one buffer: plain buffers, decoded views, PNG images -> check again

What the decoders give is as foreign as the file, and only now can be looked at: indices out of range or positions that
are not finite end here, typed, as they would in a plain file. A file without such parts is imported as it is, at the
cost of one look at its JSON. Decoding takes 0.1 s for a 1024^2 texture, most of it in writing the PNG, which Blender
reads back; handing it pixels directly would mean to rebuild the importer's materials.
"""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np

from pipeline import sniff
from pipeline.gltf import (
    BASISU_EXTENSION,
    DECODED_EXTENSIONS,
    MESHOPT_EXTENSIONS,
    Document,
    Json,
    check_references,
    image_of,
    read_document,
    used_textures,
)
from pipeline.gltf_data import Buffers, check_data, image_bytes
from pipeline.gltf_meshopt import MeshoptView, meshopt_views
from pipeline.side_files import find, uri_path
from pipeline.types import AssetError, FailureKind
from render.gltf import split
from render.ktx2 import decode_ktx2
from render.meshopt import decode

_MARKS = (b"meshopt_compression", b"ktx2", b"KTX2", b"texture_basisu")
_MAX_GLB_BYTES = 2**31 - 2**20  # the child may not write larger files
_PNG_FAST = [cv2.IMWRITE_PNG_COMPRESSION, 1]


def decoded_copy(path: Path, scratch_dir: Path) -> Path:
    """Return a path to the file with nothing in it that Blender cannot decode: `path` itself, or a GLB in scratch_dir.

    Raises:
        AssetError: as `pipeline.gltf_data.check_data`; UNSUPPORTED_FORMAT where a decoder is not installed.
    """
    if not _mentions_compression(path):
        return path
    document = read_document(path)
    check_references(document)
    # What may be read from beside the file was bounded when it was admitted.
    check_data(document, max_side_bytes=_MAX_GLB_BYTES)
    plain = _plain(document)
    if plain is document:
        return path
    assert plain.binary is not None
    check_data(plain, max_side_bytes=_MAX_GLB_BYTES)
    _absolute_images(plain)
    out = scratch_dir / "decoded.glb"
    _write(out, plain.data, plain.binary)
    return out


def _mentions_compression(path: Path) -> bool:
    try:
        text, _ = split(path)
    except (ValueError, struct.error):
        return False  # the importer will say what is wrong with it
    return any(mark in text for mark in _MARKS)


def _plain(document: Document) -> Document:
    """Return the document without compression: itself where it has none."""
    buffers = Buffers(document, max_bytes=_MAX_GLB_BYTES)
    views = meshopt_views(document)
    images = _ktx2_images(document, buffers)
    used = set(document.data.get("extensionsUsed") or []) | set(document.data.get("extensionsRequired") or [])
    if not (views or images or used & DECODED_EXTENSIONS):
        return document
    binary = _Binary()
    data = copy.deepcopy(document.data)
    _move_views(data, views, buffers, binary)
    for index, content in images.items():
        _set_image(data, index, content, binary)
    for i, texture in enumerate(data.get("textures") or []):
        if (image := image_of(document, i)) is not None and BASISU_EXTENSION in (texture.get("extensions") or {}):
            texture["source"] = image
            del texture["extensions"][BASISU_EXTENSION]
    for name in ("extensionsUsed", "extensionsRequired"):
        data[name] = [entry for entry in data.get(name) or [] if entry not in DECODED_EXTENSIONS]
        if not data[name]:
            del data[name]  # an empty list is not allowed
    data["buffers"] = [{"byteLength": binary.num_bytes}]
    return Document(data=data, binary=b"".join(binary.pieces), folder=document.folder)


class _Binary:
    """The one buffer of the copy, in pieces that start at multiples of 8 bytes."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.num_bytes = 0

    def add(self, content: bytes) -> int:
        """Append a piece; return its offset."""
        offset = self.num_bytes
        padding = bytes(-len(content) % 8)
        self.pieces += [content, padding]
        self.num_bytes += len(content) + len(padding)
        if self.num_bytes > _MAX_GLB_BYTES:
            message = f"more than {_MAX_GLB_BYTES} bytes once decoded"
            raise AssetError(FailureKind.TOO_LARGE, message)
        return offset


def _move_views(data: Json, views: dict[int, MeshoptView], buffers: Buffers, binary: _Binary) -> None:
    """Let every view of the copy name the one buffer: plain buffers move whole, so that views may share bytes."""
    moved: dict[int, int] = {}
    for i, view in enumerate(data.get("bufferViews") or []):
        compressed = views.get(i)
        if compressed is None:
            index = view["buffer"]
            if index not in moved:
                moved[index] = binary.add(buffers.get(index))
            view["byteOffset"] = (view.get("byteOffset") or 0) + moved[index]
        else:
            end = compressed.offset + compressed.num_bytes
            content = buffers.get(compressed.buffer)[compressed.offset : end]
            view["byteOffset"] = binary.add(decode(compressed, content, f"bufferViews[{i}]"))
        view["buffer"] = 0
        for name in MESHOPT_EXTENSIONS:
            (view.get("extensions") or {}).pop(name, None)


def _ktx2_images(document: Document, buffers: Buffers) -> dict[int, bytes]:
    """Return the KTX2 images that materials use, by index."""
    used = {image_of(document, texture) for texture in used_textures(document)}
    found: dict[int, bytes] = {}
    for index in sorted(index for index in used if index is not None):
        head = image_bytes(document, index, buffers, sniff.HEAD_BYTES)
        if head is not None and sniff.image_format(head) == "ktx2":
            found[index] = image_bytes(document, index, buffers) or b""
    return found


def _set_image(data: Json, index: int, content: bytes, binary: _Binary) -> None:
    """Put a decoded KTX2 image into the copy, as a PNG."""
    pixels = decode_ktx2(content, f"images[{index}]")
    order = cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR
    done, encoded = cv2.imencode(".png", cv2.cvtColor(np.ascontiguousarray(pixels), order), _PNG_FAST)
    assert done, "8-bit pixels of a checked size are always encoded"
    png = encoded.tobytes()
    views = data.setdefault("bufferViews", [])
    views.append({"buffer": 0, "byteOffset": binary.add(png), "byteLength": len(png)})
    image = data["images"][index]
    image.pop("uri", None)
    image |= {"bufferView": len(views) - 1, "mimeType": "image/png"}


def _absolute_images(plain: Document) -> None:
    """Name images beside the file by where they are, since the copy stands elsewhere."""
    for image in plain.table("images"):
        uri = image.get("uri")
        if isinstance(uri, str) and not uri.startswith("data:"):
            path = find(plain.folder, uri_path(uri))
            if path is not None:
                image["uri"] = quote(str(path.resolve()))


def _write(out: Path, data: Json, binary: bytes) -> None:
    text = json.dumps(data).encode()
    text += b" " * (-len(text) % 4)
    with out.open("wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, 28 + len(text) + len(binary)))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", len(binary), b"BIN\0"))
        file.write(binary)
