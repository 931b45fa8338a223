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
            "driver and what CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES lets through, or render on the CPU: "
            "workers.device=cpu workers.num_gpus=0"
        )
    for device in preferences.devices:
        device.use = device == found[0]
    return Device("GPU", f"{found[0].name} ({backend})")


def warm_up(device: Device) -> None:
    """Render a few pixels of the startup scene, so that the device's kernels are in place before an asset's clock runs.

    A GPU that is newer than this Blender has its kernels compiled by the driver first, which takes minutes. An asset's
    deadline would end that, and again for each asset, for what is not finished is not cached.

    Raises:
        DeviceError: if the device cannot render.
    """
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.render.resolution_x = scene.render.resolution_y = 8
    scene.cycles.device = device.cycles
    scene.cycles.samples = 1
    scene.cycles.use_denoising = False
    try:
        bpy.ops.render.render(write_still=False)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise DeviceError(f"{device.name} is here but cannot render: {text}; check its driver and its memory") from None
