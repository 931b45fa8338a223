"""The cap on texture sizes: recorded, and seen in the pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.sample import decode_rgba
from render.worker import RenderWorker
from tests.render.conftest import asset_of, make_spec
from tests.render.inspector import Inspector

pytestmark = [pytest.mark.blender, pytest.mark.timeout(120)]

KINDS = ["packed", "file", "float", "generated", "tiles"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cap", "size", "num_scaled"), [(None, 256, 0), (256, 256, 0), (255, 128, 1), (30, 16, 1)])
def test_sizes_are_halved_until_they_fit(
    inspector: Inspector, blend: Callable[..., Path], kind: str, cap: int | None, size: int, num_scaled: int
) -> None:
    found = inspector.prepare(blend("checkers", kind, "256"), max_texture_px=cap)
    assert found["quality"]["largest_texture_px"] == 256
    assert found["quality"]["textures_scaled"] == num_scaled
    assert [size, size] in found["images"].values()


def test_an_asset_without_textures_says_zero(inspector: Inspector, blend: Callable[..., Path]) -> None:
    quality = inspector.prepare(blend("instances"))["quality"]
    assert (quality["largest_texture_px"], quality["textures_scaled"]) == (0, 0)


def saturation(path: Path, folder: Path, cap: int | None) -> float:
    """Return how far red and green lie apart in the pixels of a cube checkered in both, 0 to 1."""
    spec = make_spec(render={"max_texture_px": cap, "lighting": "ambient", "codec": "png"})
    with RenderWorker(spec, fingerprint="f", num_threads=2, scratch_dir=folder) as worker:
        sample = worker.render(asset_of(path), path)
    image = np.concatenate([decode_rgba(view.planes["rgba"].data).reshape(-1, 4) for view in sample.views])
    inside = image[image[:, 3] == 255].astype(float)
    return float(np.median(np.abs(inside[:, 0] - inside[:, 1]))) / 255


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "generated"])  # which a file does not keep
def test_what_is_rendered_is_the_scaled_image(blend: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    # One sample a pixel of the whole texture is red or green; of the scaled one it is the mean of both.
    path = blend("checkers", kind, "1024")
    assert saturation(path, tmp_path, None) > 0.5
    assert saturation(path, tmp_path, 512) < 0.1
