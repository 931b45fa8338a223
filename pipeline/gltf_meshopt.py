"""Buffer views compressed by meshoptimizer: what their JSON may say, before anything is decoded.

    "bufferViews": [{"buffer": 1, "byteLength": 1200, "byteStride": 12,                    what it decodes to
                     "extensions": {"EXT_meshopt_compression": {
                         "buffer": 0, "byteOffset": 64, "byteLength": 310,                 the compressed bytes
                         "byteStride": 12, "count": 100, "mode": "ATTRIBUTES", "filter": "NONE"}}}]

`buffer` of the view itself is a fallback: it holds the plain bytes for readers without the extension, or, by the rule
of the extension, nothing at all. The rules are those of EXT_meshopt_compression and of KHR_meshopt_compression, which
adds the filter COLOR. A few compressed bytes may stand for very many, so the sum of what they decode to is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.gltf import MESHOPT_EXTENSIONS, Document, Json, corrupt, index_of, number_of, object_of
from pipeline.side_files import show
from pipeline.types import AssetError, FailureKind

MAX_DECODED_BYTES = 2**30
"""Most bytes that the views of one file may decode to: a mesh of 5 million triangles with all attributes has less."""

_FILTER_STRIDES = {"OCTAHEDRAL": (4, 8), "QUATERNION": (8,), "COLOR": (4, 8)}
_FILTERS = ("NONE", "OCTAHEDRAL", "QUATERNION", "EXPONENTIAL", "COLOR")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshoptView:
    """One compressed view: `num_bytes` at `offset` of `buffer` decode to `count` elements of `stride` bytes.

    Attributes:
        extension: by which name the file compresses it.
        mode: ATTRIBUTES, TRIANGLES or INDICES: which codec.
        filter: NONE, OCTAHEDRAL, QUATERNION, EXPONENTIAL or COLOR: what is applied after the codec of attributes.
    """

    extension: str
    buffer: int
    offset: int
    num_bytes: int
    stride: int
    count: int
    mode: str
    filter: str


def meshopt_view(document: Document, index: int) -> MeshoptView | None:
    """Return how a buffer view is compressed; None for a plain one.

    Raises:
        AssetError: CORRUPT_FILE where what the extension says cannot be.
    """
    view, where = document.table("bufferViews")[index], f"bufferViews[{index}]"
    extensions = object_of(view, "extensions", where)
    name = next((name for name in MESHOPT_EXTENSIONS if name in extensions), None)
    if name is None:
        return None
    entry, where = object_of(extensions, name, where), f"{where}.{name}"
    buffer = index_of(entry, "buffer", len(document.table("buffers")), where)
    if buffer is None:
        corrupt(f"{where} names no buffer")
    found = MeshoptView(
        extension=name,
        buffer=buffer,
        offset=number_of(entry, "byteOffset", where, 0),
        num_bytes=number_of(entry, "byteLength", where),
        stride=number_of(entry, "byteStride", where),
        count=number_of(entry, "count", where),
        mode=str(entry.get("mode")),
        filter=str(entry.get("filter") or "NONE"),
    )
    _check_layout(found, where)
    _check_sizes(document, found, view, where)
    return found


def _check_layout(view: MeshoptView, where: str) -> None:
    """Refuse a mode, filter and stride that do not go together: the codecs are only defined for these."""
    if view.mode not in ("ATTRIBUTES", "TRIANGLES", "INDICES"):
        corrupt(f"{where}.mode is {show(view.mode)}; ATTRIBUTES, TRIANGLES and INDICES are allowed")
    if view.filter not in _FILTERS:
        corrupt(f"{where}.filter is {show(view.filter)}; {', '.join(_FILTERS)} are allowed")
    if view.mode != "ATTRIBUTES":
        if view.stride not in (2, 4):
            corrupt(f"{where}.byteStride is {view.stride}; indices have 2 or 4 bytes")
        if view.filter != "NONE":
            corrupt(f"{where}.filter is {view.filter}; indices have none")
        if view.mode == "TRIANGLES" and view.count % 3:
            corrupt(f"{where}.count is {view.count}; triangles have a multiple of 3 indices")
    elif view.stride % 4 or not 4 <= view.stride <= 256:
        corrupt(f"{where}.byteStride is {view.stride}; multiples of 4 from 4 to 256 are allowed")
    elif view.stride not in _FILTER_STRIDES.get(view.filter, (view.stride,)):
        corrupt(f"{where}.byteStride is {view.stride}; {view.filter} allows {_FILTER_STRIDES[view.filter]}")


def _check_sizes(document: Document, found: MeshoptView, view: Json, where: str) -> None:
    size = number_of(document.table("buffers")[found.buffer], "byteLength", f"buffers[{found.buffer}]")
    if found.offset + found.num_bytes > size:
        end = found.offset + found.num_bytes
        corrupt(f"{where} ends at byte {end} of buffers[{found.buffer}], which has {size}")
    promised = number_of(view, "byteLength", where)
    if promised > found.count * found.stride:
        corrupt(f"{where} decodes to {found.count} x {found.stride} bytes; its view has {promised}")
    stride = number_of(view, "byteStride", where, 0)
    if stride not in (0, found.stride):
        corrupt(f"{where}.byteStride is {found.stride}, that of its view {stride}")


def meshopt_views(document: Document) -> dict[int, MeshoptView]:
    """Return the buffer views that must be decoded, by index; none where the file carries the plain bytes too.

    Raises:
        AssetError: CORRUPT_FILE, or TOO_LARGE where they decode to more than MAX_DECODED_BYTES.
    """
    indexes = range(len(document.table("bufferViews")))
    found = {index: view for index in indexes if (view := meshopt_view(document, index)) is not None}
    if _has_plain_bytes(document, found):
        return {}
    total = sum(view.count * view.stride for view in found.values())
    if total > MAX_DECODED_BYTES:
        raise AssetError(
            FailureKind.TOO_LARGE,
            f"compressed buffer views decode to {total} bytes; at most {MAX_DECODED_BYTES} are allowed",
        )
    return found


def _has_plain_bytes(document: Document, views: dict[int, MeshoptView]) -> bool:
    """Whether the extension is optional, and the fallback buffer of every compressed view holds its plain bytes."""
    if set(document.data.get("extensionsRequired") or []) & set(MESHOPT_EXTENSIONS):
        return False
    buffers, count = document.table("buffers"), len(document.table("buffers"))
    for index, view in views.items():
        where = f"bufferViews[{index}]"
        buffer = index_of(document.table("bufferViews")[index], "buffer", count, where)
        if buffer is None:
            corrupt(f"{where} names no buffer")
        entry = buffers[buffer]
        mark = object_of(object_of(entry, "extensions", f"buffers[{buffer}]"), view.extension, f"buffers[{buffer}]")
        has_bytes = bool(entry.get("uri")) or (buffer == 0 and document.binary is not None)
        if mark.get("fallback") or not has_bytes:
            return False
    return True
