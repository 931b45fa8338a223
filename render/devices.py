"""Choose what Cycles renders on, and refuse what is not there: a fallback to the CPU would be a slow run and a secret.

The choice lives in Blender's preferences, which `render.scene.reset` keeps. One device a process: Cycles over several
GPUs in one process has hung and crashed for others, and several processes share one GPU well.
"""

from __future__ import annotations

from dataclasses import dataclass

import bpy

BACKENDS = {"optix": "OPTIX", "cuda": "CUDA", "hip": "HIP"}


class DeviceError(RuntimeError):
    """The device that was asked for is not there: says what is."""


@dataclass(frozen=True, slots=True)
class Device:
    """What Cycles will use: its `cycles.device`, and the name that rows record."""

    cycles: str
    name: str


def use_device(kind: str) -> Device:
    """Make Cycles use the CPU ("cpu") or the first GPU of a backend ("optix", "cuda", "hip").

    Raises:
        DeviceError: if this Blender or this machine has no such device.
    """
    if kind == "cpu":
        return Device("CPU", "CPU")
    preferences = bpy.context.preferences.addons["cycles"].preferences
    backend = BACKENDS[kind]
    try:
        preferences.compute_device_type = backend
    except TypeError:
        raise DeviceError(f"this Blender was built without {backend} (workers.device = {kind!r})") from None
    preferences.refresh_devices()
    found = [device for device in preferences.devices if device.type == backend]
    if not found:
        others = sorted({f"{device.name} ({device.type})" for device in preferences.devices}) or ["none"]
        raise DeviceError(
            f"no {backend} device is here (workers.device = {kind!r}); Cycles sees: {', '.join(others)}; check the "
            "driver and what CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES lets through, or set workers.device=cpu"
        )
    for device in preferences.devices:
        device.use = device == found[0]
    return Device("GPU", f"{found[0].name} ({backend})")
