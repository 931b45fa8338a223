"""Everything that touches Blender. bpy is imported in the child process only.

`bpy` is GPL-3; importing it only in the child keeps the border visible (see README).
"""

from importlib.metadata import PackageNotFoundError, version

RENDER_REVISION = 3
"""Raise by hand when code here changes pixels; a golden-image test fails when pixels change and this does not."""


def producer() -> str:
    """Return the name of what makes our pixels, as it enters the fingerprint. Does not import bpy."""
    try:
        blender = version("bpy")
    except PackageNotFoundError:
        blender = "none"
    return f"bpy {blender}, render revision {RENDER_REVISION}"
