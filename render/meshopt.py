"""Decode what meshoptimizer compressed, with meshoptimizer itself: https://github.com/zeux/meshoptimizer, MIT licence.

Blender 5 ships the library as a file of its own, Debian as the package libmeshoptimizer2d (0.18 in Debian 12: streams
of version 1 and the filter COLOR need a newer one). Bindings on PyPI need Python 3.12 and NumPy 2, which Blender 4.5
does not bear, or a compiler. The decoder is written for untrusted data: it reads and writes within the sizes that it is
given, and says so where a stream does not fit.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import importlib.util
from pathlib import Path
from typing import NoReturn

from pipeline.gltf import corrupt
from pipeline.gltf_meshopt import MeshoptView
from pipeline.types import AssetError, FailureKind

_DECODERS = {
    "ATTRIBUTES": "meshopt_decodeVertexBuffer",
    "TRIANGLES": "meshopt_decodeIndexBuffer",
    "INDICES": "meshopt_decodeIndexSequence",
}
_FILTERS = {
    "OCTAHEDRAL": "meshopt_decodeFilterOct",
    "QUATERNION": "meshopt_decodeFilterQuat",
    "EXPONENTIAL": "meshopt_decodeFilterExp",
    "COLOR": "meshopt_decodeFilterColor",
}
_NAMES = ("libmeshoptimizer.so.2d", "libmeshoptimizer.so")
_NEWER = "install a newer meshoptimizer, use Blender 5, or store the file without the extension"
_WAY_OUT = "install meshoptimizer (Debian: libmeshoptimizer2d), use Blender 5, or store the file without the extension"


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return meshoptimizer: Blender's own, else the system's; None where there is neither."""
    found = importlib.util.find_spec("bpy")
    own = [] if found is None or found.origin is None else [Path(found.origin).parent / "lib" / "libmeshoptimizer.so"]
    for name in [*(str(path) for path in own if path.exists()), *_NAMES, ctypes.util.find_library("meshoptimizer")]:
        with contextlib.suppress(OSError):
            if name is not None:
                return ctypes.CDLL(name)
    return None


def decode(view: MeshoptView, data: bytes, where: str) -> bytes:
    """Return the plain bytes of a compressed buffer view, `count` x `stride` of them.

    Args:
        view: how it is compressed; checked by `pipeline.gltf_meshopt`.
        data: its compressed bytes.
        where: what messages call it.

    Raises:
        AssetError: CORRUPT_FILE where the stream does not decode to that many elements; UNSUPPORTED_FORMAT where there
            is no meshoptimizer, or one that is too old for the stream.
    """
    found = library()
    if found is None:
        _refuse(f"{where} is compressed by {view.extension}, and nothing here decodes it: {_WAY_OUT}")
    function = _function(found, _DECODERS[view.mode], view, where)
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    num_bytes = view.count * view.stride
    if num_bytes == 0:
        return b""
    out = ctypes.create_string_buffer(num_bytes)
    if function(out, view.count, view.stride, data, len(data)) != 0:
        if view.mode == "ATTRIBUTES" and data[:1] == b"\xa1" and not hasattr(found, "meshopt_decodeVertexVersion"):
            _refuse(f"{where} is a stream of version 1, for which this meshoptimizer is too old: {_NEWER}")
        corrupt(
            f"{where}: {len(data)} compressed bytes do not decode to {view.count} x {view.stride} bytes of {view.mode}"
        )
    if view.filter != "NONE":
        undo = _function(found, _FILTERS[view.filter], view, where)
        undo.restype = None
        undo.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        undo(out, view.count, view.stride)
    return out.raw


def _function(found: ctypes.CDLL, name: str, view: MeshoptView, where: str) -> ctypes._NamedFuncPointer:
    if not hasattr(found, name):
        _refuse(f"{where} ({view.mode}, filter {view.filter}) needs a newer meshoptimizer than this one: {_NEWER}")
    function: ctypes._NamedFuncPointer = getattr(found, name)
    return function


def _refuse(message: str) -> NoReturn:
    raise AssetError(FailureKind.UNSUPPORTED_FORMAT, message)
