"""The binary side of glTF: buffers, views, accessors and images, checked against what is really there.

Index values and positions are read with numpy. A file can name the same bytes in any number of accessors, so the bytes
that are scanned are counted against a budget of a few times the size of its buffers.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import ktx2, sniff
from pipeline.gltf import (
    DRACO,
    Document,
    Json,
    attributes_of,
    corrupt,
    image_of,
    index_of,
    mode_of,
    number_of,
    object_of,
    primitives,
    used_textures,
)
from pipeline.gltf_meshopt import meshopt_views
from pipeline.side_files import find, show, uri_path
from pipeline.types import AssetError, FailureKind

_COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_SHAPES = {
    "SCALAR": (1, 1),
    "VEC2": (1, 2),
    "VEC3": (1, 3),
    "VEC4": (1, 4),
    "MAT2": (2, 2),
    "MAT3": (3, 3),
    "MAT4": (4, 4),
}
_INDEX_TYPES = (5121, 5123, 5125)
_SCAN_FACTOR = 8
_SCAN_FREE_BYTES = 64 << 20
# Elements of an accessor that has no bytes and so stands for zeros: Blender allocates them.
_MAX_ZEROS = 50_000_000
_DATA_URI = "data:"
_BASE64 = ";base64,"


class Buffers:
    """The buffers of a file, read when first asked for.

    Args:
        document: the file.
        max_bytes: largest size of all side files together.
    """

    def __init__(self, document: Document, *, max_bytes: int) -> None:
        self._document = document
        self._left_bytes = max_bytes
        self._max_bytes = max_bytes
        self._buffers: dict[int, bytes] = {}
        self._files: dict[Path, bytes] = {}

    def get(self, index: int) -> bytes:
        """Return the bytes of a buffer, at least as many as its byteLength.

        Raises:
            AssetError: MISSING_RESOURCE, TRUNCATED, TOO_LARGE, CORRUPT_FILE.
        """
        if index not in self._buffers:
            self._buffers[index] = self._read(index)
        return self._buffers[index]

    @property
    def num_bytes(self) -> int:
        """Size of the buffers that were asked for so far."""
        return sum(len(data) for data in self._buffers.values())

    def _read(self, index: int) -> bytes:
        where = f"buffers[{index}]"
        entry = self._document.table("buffers")[index]
        length = number_of(entry, "byteLength", where)
        uri = _uri_of(entry, where)
        if uri is None:
            data = self._document.binary if index == 0 else None
            if data is None:
                corrupt(f"{where} has no uri, and the file has no BIN chunk for it")
            if len(data) < length:
                corrupt(f"{where} has {length} bytes, the BIN chunk {len(data)}")
            return data
        if uri.startswith(_DATA_URI):
            data = _decode_data_uri(uri, where)
            if len(data) < length:
                corrupt(f"{where} has {length} bytes, its data URI {len(data)}")
            return data
        path = find(self._document.folder, uri_path(uri))
        if path is None:
            raise AssetError(FailureKind.MISSING_RESOURCE, f"{where}: file {show(uri)} is not beside the asset")
        return self._read_file(path, length, f"{where}: file {show(uri)}")

    def _read_file(self, path: Path, length: int, where: str) -> bytes:
        if path not in self._files:
            self._left_bytes -= path.stat().st_size
            if self._left_bytes < 0:
                message = f"{where}: side files have more than the {self._max_bytes} bytes allowed"
                raise AssetError(FailureKind.TOO_LARGE, message)
            self._files[path] = path.read_bytes()
        data = self._files[path]
        if len(data) < length:
            raise AssetError(FailureKind.TRUNCATED, f"{where} has {len(data)} of {length} bytes")
        return data


def check_data(document: Document, *, max_side_bytes: int) -> None:
    """Check buffers, views, accessors, the values of indices and positions, and the images that materials use.

    References must have been checked before.

    Raises:
        AssetError: CORRUPT_FILE, MISSING_RESOURCE, MISSING_TEXTURE, TRUNCATED, DEGENERATE_GEOMETRY, UNSUPPORTED_FORMAT,
            TOO_LARGE.
    """
    buffers = Buffers(document, max_bytes=max_side_bytes)
    views = _check_views(document, buffers)
    for i, accessor in enumerate(document.table("accessors")):
        _check_accessor(document, accessor, f"accessors[{i}]")
    reader = _Reader(document, views, budget=_SCAN_FACTOR * buffers.num_bytes + _SCAN_FREE_BYTES)
    for mesh in range(len(document.table("meshes"))):
        for primitive, where in primitives(document, mesh):
            _check_primitive(document, reader, primitive, where)
    _check_images(document, views)


def _check_views(document: Document, buffers: Buffers) -> list[memoryview | None]:
    """Return the bytes of each buffer view; None for a compressed one, whose bytes are known once it is decoded."""
    views: list[memoryview | None] = []
    count = len(document.table("buffers"))
    compressed = meshopt_views(document)
    for i, view in enumerate(document.table("bufferViews")):
        where = f"bufferViews[{i}]"
        index = index_of(view, "buffer", count, where)
        if index is None:
            corrupt(f"{where} names no buffer")
        offset, length = number_of(view, "byteOffset", where, 0), number_of(view, "byteLength", where)
        number_of(view, "byteStride", where, 0)
        size = number_of(document.table("buffers")[index], "byteLength", f"buffers[{index}]")
        if offset + length > size:
            corrupt(f"{where} ends at byte {offset + length} of buffers[{index}], which has {size}")
        if i in compressed:
            buffers.get(compressed[i].buffer)  # the buffer of the view itself may be without bytes
            views.append(None)
            continue
        views.append(memoryview(buffers.get(index))[offset : offset + length])
    return views


def _check_accessor(document: Document, accessor: Json, where: str) -> None:
    """Refuse an accessor whose elements do not lie within its view."""
    component, shape, count = _layout(accessor, where)
    view = index_of(accessor, "bufferView", len(document.table("bufferViews")), where)
    offset = number_of(accessor, "byteOffset", where, 0)
    if view is not None:
        _check_range(document, view, offset, count, _element_bytes(component, shape), where)
    elif count > _MAX_ZEROS and "sparse" in accessor:
        raise AssetError(FailureKind.TOO_LARGE, f"{where}: {count} elements of zeros; at most {_MAX_ZEROS} are allowed")
    sparse = object_of(accessor, "sparse", where)
    if not sparse:
        return
    number = number_of(sparse, "count", f"{where}.sparse")
    if number > count:
        corrupt(f"{where}.sparse has {number} elements, the accessor {count}")
    for name in ("indices", "values"):
        part, place = object_of(sparse, name, f"{where}.sparse"), f"{where}.sparse.{name}"
        view = index_of(part, "bufferView", len(document.table("bufferViews")), place)
        if view is None:
            corrupt(f"{place} names no bufferView")
        size = _element_bytes(component, shape)
        if name == "indices":
            if part.get("componentType") not in _INDEX_TYPES:
                corrupt(f"{place}.componentType is {show(part.get('componentType'))}; {_INDEX_TYPES} are allowed")
            size = np.dtype(_COMPONENTS[part["componentType"]]).itemsize
        _check_range(document, view, number_of(part, "byteOffset", place, 0), number, size, place)


def _check_range(document: Document, view: int, offset: int, count: int, size: int, where: str) -> None:
    entry = document.table("bufferViews")[view]
    stride = entry.get("byteStride") or size
    end = offset + (count - 1) * stride + size if count else offset
    if end > entry["byteLength"]:
        corrupt(f"{where} ends at byte {end} of bufferViews[{view}], which has {entry['byteLength']}")


def _layout(accessor: Json, where: str) -> tuple[int, tuple[int, int], int]:
    """Return component type, (columns, rows) and number of elements of an accessor."""
    component, kind = accessor.get("componentType"), accessor.get("type")
    if type(component) is not int or component not in _COMPONENTS:
        corrupt(f"{where}.componentType is {show(component)}; {sorted(_COMPONENTS)} are allowed")
    if not isinstance(kind, str) or kind not in _SHAPES:
        corrupt(f"{where}.type is {show(kind)}; {sorted(_SHAPES)} are allowed")
    return component, _SHAPES[kind], number_of(accessor, "count", where)


def _element_bytes(component: int, shape: tuple[int, int]) -> int:
    """Return the size of an element; columns of matrices start at multiples of 4 bytes."""
    columns, rows = shape
    column = rows * np.dtype(_COMPONENTS[component]).itemsize
    return column if columns == 1 else (columns - 1) * -(-column // 4) * 4 + column


class _Reader:
    """Reads accessors as arrays, within a budget of bytes."""

    def __init__(self, document: Document, views: list[memoryview | None], *, budget: int) -> None:
        self._document = document
        self._views = views
        self._budget = budget
        self._largest: dict[int, int] = {}
        self._finite: dict[int, bool] = {}

    def is_compressed(self, index: int) -> bool:
        """Whether an accessor's values are known only once its buffer views are decoded."""
        accessor = self._document.table("accessors")[index]
        sparse = accessor.get("sparse") or {}
        parts = (accessor, sparse.get("indices") or {}, sparse.get("values") or {})
        return any(part.get("bufferView") is not None and self._views[part["bufferView"]] is None for part in parts)

    def values(self, index: int) -> NDArray[Any]:
        """Return [count, components] of an accessor, its sparse part applied."""
        accessor, where = self._document.table("accessors")[index], f"accessors[{index}]"
        component, (columns, rows), count = _layout(accessor, where)
        dtype, width = np.dtype(_COMPONENTS[component]), columns * rows
        array: NDArray[Any] = np.zeros((0, width), dtype)
        if accessor.get("bufferView") is not None:
            array = self._read(accessor, dtype, width, count, where)
        elif "sparse" in accessor:
            array = np.zeros((count, width), dtype)
        sparse = accessor.get("sparse") or {}
        if sparse and sparse["count"]:
            number = sparse["count"]
            index_type = np.dtype(_COMPONENTS[sparse["indices"]["componentType"]])
            places = self._read(sparse["indices"], index_type, 1, number, f"{where}.sparse.indices")[:, 0]
            if int(places.max()) >= count:
                corrupt(f"{where}.sparse.indices holds {int(places.max())}; the accessor has {count} elements")
            array = array.copy()
            array[places] = self._read(sparse["values"], dtype, width, number, f"{where}.sparse.values")
        return array

    def _read(self, part: Json, dtype: np.dtype[Any], width: int, count: int, where: str) -> NDArray[Any]:
        view = part["bufferView"]
        content = self._views[view]
        assert content is not None, "is_compressed was not asked"
        stride = self._document.table("bufferViews")[view].get("byteStride") or dtype.itemsize * width
        self._budget -= count * dtype.itemsize * width
        if self._budget < 0:
            raise AssetError(FailureKind.TOO_LARGE, f"{where}: accessors name the same bytes too many times over")
        if count == 0:
            return np.zeros((0, width), dtype)
        # The range was checked, also for a stride smaller than an element.
        return np.ndarray((count, width), dtype, content, part.get("byteOffset") or 0, strides=(stride, dtype.itemsize))

    def largest(self, index: int) -> int:
        """Return the largest value of a scalar accessor, -1 where it is empty."""
        if index not in self._largest:
            values = self.values(index)
            self._largest[index] = int(values.max()) if values.size else -1
        return self._largest[index]

    def finite(self, index: int) -> bool:
        """Whether all values of an accessor are finite."""
        if index not in self._finite:
            self._finite[index] = bool(np.isfinite(self.values(index)).all())
        return self._finite[index]


def _check_primitive(document: Document, reader: _Reader, primitive: Json, where: str) -> None:
    """Check that indices name vertices that exist, and that the vertices they name are finite."""
    accessors = document.table("accessors")
    attributes = attributes_of(document, primitive, where)
    indices = index_of(primitive, "indices", len(accessors), where)
    targets = primitive.get("targets") or []
    if not isinstance(targets, list) or not all(isinstance(target, dict) for target in targets):
        corrupt(f"{where}.targets is not a list of objects")
    for target in targets:
        attributes_of(document, {"attributes": target}, f"{where}.targets")
    draco = object_of(object_of(primitive, "extensions", where), DRACO, where)
    if draco:
        # The decoder fills the accessors: their counts are checked after the import, as a share of triangles.
        if index_of(draco, "bufferView", len(document.table("bufferViews")), f"{where}.{DRACO}") is None:
            corrupt(f"{where}.{DRACO} names no bufferView")
        return
    position = attributes.get("POSITION")
    if position is None:
        return
    count = number_of(accessors[position], "count", f"accessors[{position}]")
    for index in attributes.values():
        number = accessors[index]["count"]
        if number < count and accessors[index].get("bufferView") is not None:
            corrupt(f"{where}: accessors[{index}] has {number} elements for {count} vertices")
        if count > _MAX_ZEROS and accessors[index].get("bufferView") is None:
            raise AssetError(
                FailureKind.TOO_LARGE, f"{where}: {count} vertices without bytes; {_MAX_ZEROS} are allowed"
            )
    if indices is not None:
        _check_indices(accessors[indices], reader, indices, count, where)
    if accessors[position]["type"] != "VEC3":
        corrupt(f"{where}: POSITION is {accessors[position]['type']}; VEC3 is required")
    # What is compressed is looked at once it is decoded, as this file's plain copy.
    if any(reader.is_compressed(index) for index in (position, indices) if index is not None):
        return
    if mode_of(primitive) >= 4 and not reader.finite(position):
        values = reader.values(position)
        used = values if indices is None else values[reader.values(indices)[:, 0]]
        if not np.isfinite(used).all():
            message = f"{where}: {int((~np.isfinite(used).all(axis=1)).sum())} of its vertices have no finite position"
            raise AssetError(FailureKind.DEGENERATE_GEOMETRY, message)


def _check_indices(accessor: Json, reader: _Reader, index: int, count: int, where: str) -> None:
    if accessor["type"] != "SCALAR" or accessor["componentType"] not in _INDEX_TYPES:
        corrupt(
            f"{where}: indices are {accessor['type']} of {accessor['componentType']}; unsigned integers are required"
        )
    if accessor.get("bufferView") is None and "sparse" not in accessor:
        return  # all zero
    if reader.is_compressed(index):
        return
    if (largest := reader.largest(index)) >= count:
        corrupt(f"{where}: index {largest} in accessors[{index}]; there are {count} vertices")


def _check_images(document: Document, views: list[memoryview | None]) -> None:
    """Refuse a file whose materials use images that are missing, or that nothing here decodes."""
    # A texture without an image is allowed: the extension that would give one is unknown.
    used = {image_of(document, texture) for texture in used_textures(document)} - {None}
    for index in sorted(index for index in used if index is not None):
        _check_image(document, views, document.table("images")[index], f"images[{index}]")


def _check_image(document: Document, views: list[memoryview | None], image: Json, where: str) -> None:
    uri = _uri_of(image, where)
    view = index_of(image, "bufferView", len(views), where)
    name = f"{where} {show(image['name'])}" if isinstance(image.get("name"), str) else where
    if view is not None:
        content = views[view]
        if content is None:
            corrupt(f"{name} lies in bufferViews[{view}], which meshopt compresses; images are never so compressed")
        head = bytes(content[: sniff.IMAGE_HEAD_BYTES])
    elif uri is None:
        raise AssetError(FailureKind.MISSING_TEXTURE, f"{name} has neither uri nor bufferView")
    elif uri.startswith(_DATA_URI):
        # A whole number of base64 quanta, so that the start decodes alone.
        head = _decode_data_uri(uri[: uri.find(_BASE64) + len(_BASE64) + sniff.IMAGE_HEAD_BYTES], where)
    else:
        name = f"{where} {show(uri)}"
        path = find(document.folder, uri_path(uri))
        if path is None:
            raise AssetError(FailureKind.MISSING_TEXTURE, f"{name} is not beside the asset")
        with path.open("rb") as file:
            head = file.read(sniff.IMAGE_HEAD_BYTES)
    found = sniff.image_format(head)
    sniff.check_image_size(head, name)
    if found == "ktx2":
        ktx2.read_header(head, name)
    if found is None:
        what = sniff.describe(head) if head else "empty"
        raise AssetError(FailureKind.MISSING_TEXTURE, f"{name} is no image that Blender reads: {what}")


def image_bytes(document: Document, index: int, buffers: Buffers, num_bytes: int | None = None) -> bytes | None:
    """Return an image's content, or its first bytes; None where it has none. The document must have been checked.

    Args:
        document: the file.
        index: of the image.
        buffers: of the same file.
        num_bytes: how many bytes to read, a multiple of 4; None for all.
    """
    image, where = document.table("images")[index], f"images[{index}]"
    uri = _uri_of(image, where)
    if image.get("bufferView") is not None:
        view = document.table("bufferViews")[image["bufferView"]]
        start = view.get("byteOffset") or 0
        return buffers.get(view["buffer"])[start : start + view["byteLength"]][:num_bytes]
    if uri is None:
        return None
    if uri.startswith(_DATA_URI):
        stop = None if num_bytes is None else uri.find(_BASE64) + len(_BASE64) + num_bytes
        return _decode_data_uri(uri[:stop], where)
    path = find(document.folder, uri_path(uri))
    if path is None:
        return None
    with path.open("rb") as file:
        return file.read(num_bytes)


def _uri_of(entry: Json, where: str) -> str | None:
    uri = entry.get("uri")
    if uri is not None and not isinstance(uri, str):
        corrupt(f"{where}.uri is no text")
    return uri or None


def _decode_data_uri(uri: str, where: str) -> bytes:
    """Return the content of a data URI; it is never longer than the JSON that holds it."""
    start = uri.find(_BASE64)
    if start < 0:
        corrupt(f"{where}: a data URI without base64 content")
    try:
        return base64.b64decode(uri[start + len(_BASE64) :])
    except (binascii.Error, ValueError) as error:
        corrupt(f"{where}: data URI: {error}")
