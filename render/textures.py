"""Cap the size of textures, before the renderer reads them.

An image whose longest side is over the cap is halved until it is not, in Blender, by a box filter. It is packed first:
Cycles reads an image that stands in a file of its own from that file, and would show it whole, whatever was done to its
pixels in memory.

The road not taken is Cycles' own texture limit (scene simplification). It costs the same (a 4096^2 px PNG brought to
1024^2 on one core: 0.28 s here, of which 0.19 s are its decoding, against 0.26 to 0.32 s; with no cap 0.18 s) and gives
the same pixels and the same peak of memory. But it is a setting of the scene that every later step must leave alone,
switches other limits on with it, knows nothing below 128 px and only powers of two, and keeps no count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

_NO_STILL = ("MOVIE", "SEQUENCE", "VIEWER")  # frames of a film are read one by one, and cannot be scaled as a whole


def limit_textures(images: Iterable[Any], max_px: int | None) -> dict[str, int]:
    """Scale images down by powers of two until no side is over max_px; None leaves all as they are.

    Returns:
        `largest_texture_px`, the longest side of any before scaling (0 without images), and `textures_scaled`, how many
        were. One that cannot be scaled is not counted there, and keeps its size.
    """
    largest = num_scaled = 0
    for image in images:
        sides = [max(width, height) for _, width, height in _tiles(image)]
        largest = max(largest, *sides)
        if max_px is not None and max(sides) > max_px and image.source not in _NO_STILL:
            num_scaled += _scale(image, max_px)
    return {"largest_texture_px": largest, "textures_scaled": num_scaled}


def _tiles(image: Any) -> Iterator[tuple[int, int, int]]:
    """Yield (index, width, height) in pixels: of each tile of a UDIM image, or of the image itself."""
    if image.source != "TILED":
        yield 0, *image.size
        return
    for index, tile in enumerate(image.tiles):
        yield index, *tile.size


def _scale(image: Any, max_px: int) -> bool:
    """Scale the tiles of an image that are too large; return whether its pixels are now within max_px."""
    if image.packed_file is None and image.source != "GENERATED":
        try:
            image.pack()
        except RuntimeError:
            return False
    for index, width, height in [*_tiles(image)]:
        factor = 1
        while max(width, height) > max_px * factor:
            factor *= 2
        if factor > 1:
            image.scale(max(1, width // factor), max(1, height // factor), tile_index=index)
    return all(max(width, height) <= max_px for _, width, height in _tiles(image))
