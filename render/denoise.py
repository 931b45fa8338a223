"""OpenImageDenoise through its C API, from the library that Blender's wheel brings along.

Blender's own denoising belongs to one render call. Here a picture is the sum of several calls (see `render.noise`), so
the sum must be denoised, in the middle of deciding whether to go on. A second copy of the library from PyPI would cost
180 MB and a second TBB in the process. Fast mode, guided by albedo and normal without prefilter, takes 0.19 s of one
core at 512^2, high mode 0.37 s for 0.3 dB more on average, as much as the samples that time would buy; the accurate
prefilter of Blender's default costs three passes more.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_int, c_size_t, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_LIBRARY = "libOpenImageDenoise.so.2"  # by its name alone: Blender has it loaded already
_DEVICE_CPU, _FORMAT_FLOAT3, _QUALITY_FAST = 1, 3, 4
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "oidnNewDevice": (c_void_p, [c_int]),
    "oidnSetDeviceInt": (None, [c_void_p, c_char_p, c_int]),
    "oidnSetDeviceBool": (None, [c_void_p, c_char_p, c_bool]),
    "oidnCommitDevice": (None, [c_void_p]),
    "oidnReleaseDevice": (None, [c_void_p]),
    "oidnGetDeviceError": (c_int, [c_void_p, POINTER(c_char_p)]),
    "oidnNewFilter": (c_void_p, [c_void_p, c_char_p]),
    "oidnSetSharedFilterImage": (None, [c_void_p, c_char_p, c_void_p, c_int] + [c_size_t] * 5),
    "oidnSetFilterBool": (None, [c_void_p, c_char_p, c_bool]),
    "oidnSetFilterInt": (None, [c_void_p, c_char_p, c_int]),
    "oidnCommitFilter": (None, [c_void_p]),
    "oidnExecuteFilter": (None, [c_void_p]),
    "oidnReleaseFilter": (None, [c_void_p]),
}


class DenoiseError(RuntimeError):
    """The library is absent, or reports an error."""


class Denoiser:
    """One device for the life of the process; import bpy first."""

    def __init__(self, num_threads: int) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise DenoiseError(f"{_LIBRARY} is not loaded with this Blender: {error}") from None
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self._device = self._library.oidnNewDevice(_DEVICE_CPU)
        self._library.oidnSetDeviceInt(self._device, b"numThreads", num_threads)
        self._library.oidnSetDeviceBool(self._device, b"setAffinity", False)
        self._library.oidnCommitDevice(self._device)
        self._check()

    def run(self, colour: Float32, albedo: Float32, normal: Float32) -> Float32:
        """Denoise a scene-linear picture [H, W, 3] by its guides [H, W, 3], all as noisy as one another.

        Raises:
            DenoiseError: with what the library says.
        """
        images = {b"color": colour, b"albedo": albedo, b"normal": normal}
        inputs = {name: np.ascontiguousarray(image, np.float32) for name, image in images.items()}
        height, width = colour.shape[:2]
        if any(image.shape != (height, width, 3) for image in inputs.values()):
            raise ValueError(f"pictures {[image.shape for image in inputs.values()]} are not all [H, W, 3] of one size")
        output = np.empty((height, width, 3), np.float32)
        library = self._library
        handle = library.oidnNewFilter(self._device, b"RT")
        try:
            for name, image in (inputs | {b"output": output}).items():
                library.oidnSetSharedFilterImage(
                    handle, name, image.ctypes.data, _FORMAT_FLOAT3, width, height, 0, 0, 0
                )
            library.oidnSetFilterBool(handle, b"hdr", True)
            library.oidnSetFilterInt(handle, b"quality", _QUALITY_FAST)
            library.oidnCommitFilter(handle)
            library.oidnExecuteFilter(handle)
        finally:
            library.oidnReleaseFilter(handle)
        self._check()
        return output

    def close(self) -> None:
        """Free the device."""
        self._library.oidnReleaseDevice(self._device)

    def _check(self) -> None:
        message = c_char_p()
        code = self._library.oidnGetDeviceError(self._device, ctypes.byref(message))
        if code:
            raise DenoiseError(f"OpenImageDenoise error {code}: {(message.value or b'').decode(errors='replace')}")
