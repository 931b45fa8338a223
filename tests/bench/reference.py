"""Converged renders to judge others by: 2048 samples a pixel, no denoiser, the same scene, lights and cameras.

    python -m tests.bench.reference [--only NAME,...] [--views 0,9] [--resolution 256]

Made by the scene, lighting and engine code of the project, so that only noise can differ, with seeds of their own, so
that no error is shared. Kept in the cache folder, one file a view, under a digest of all that decides the picture.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.canonical import digest_json
from pipeline.sample import premultiplied_linear_to_rgba8
from pipeline.spec import RenderSpec
from pipeline.types import derive_seed
from render import producer
from tests.bench.assets import BenchAsset, bench_assets, cache_dir

SAMPLES, COVERAGE_SAMPLES = 2048, 512
VIEWS = (0, 9)
RESOLUTION_PX = 256


def reference_path(one: BenchAsset, spec: RenderSpec, view: int) -> Path:
    """Return where the reference of a view is kept: [H, W, 4] straight sRGB uint8 as .npy."""
    pixels = spec.model_dump(mode="json", exclude={"samples", "max_samples", "half_psnr_db", "full_psnr_db", "denoise"})
    key = [one.asset.uid, one.digest, pixels, producer(), view, SAMPLES]
    return cache_dir() / f"reference-{digest_json(key)}.npy"


def load_reference(one: BenchAsset, spec: RenderSpec, view: int) -> NDArray[np.uint8] | None:
    """Return the reference of a view, or None if it has not been made."""
    path = reference_path(one, spec, view)
    return np.load(path, allow_pickle=False) if path.exists() else None


def make_references(one: BenchAsset, spec: RenderSpec, views: list[int]) -> None:
    """Render the missing references of an asset, in this process; imports bpy."""
    missing = [view for view in views if not reference_path(one, spec, view).exists()]
    if not missing:
        return
    from render import engine, lighting, scene
    from render.cameras import cameras_for
    from render.denoise import Denoiser

    engine.BARE_SAMPLES = COVERAGE_SAMPLES
    seed = derive_seed("camera", spec.seed, one.asset.uid)
    scene.reset()
    with tempfile.TemporaryDirectory() as folder:
        procedural = int(one.asset.uri.split(":")[1]) if one.path is None else None
        scene.load(one.path, one.asset.format, procedural, Path(folder), animated=spec.pose != "rest")
        prepared = scene.prepare(spec, seed, max_triangles=10_000_000, expected_triangles=None, min_triangle_share=0.0)
        lighting.set_lights(spec.lighting, seed)
        slow = spec.model_copy(update={"samples": SAMPLES, "denoise": False})
        renderer = engine.Engine(
            slow, derive_seed("reference", seed), 2, points=prepared.points,
            transparent=prepared.quality["transparent"], denoiser=Denoiser(2),
        )  # fmt: skip
        cameras = cameras_for(spec, seed)
        try:
            renderer.render_bare([cameras[view] for view in missing])
            for view, rendered in zip(missing, renderer.render_views(), strict=True):
                whole = np.zeros((spec.resolution_px, spec.resolution_px, 4), np.float32)
                left, top, right, bottom = rendered.box
                whole[top:bottom, left:right] = rendered.rgba
                path = reference_path(one, spec, view)
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path.with_suffix(".part.npy"), premultiplied_linear_to_rgba8(whole))
                path.with_suffix(".part.npy").rename(path)
        finally:
            renderer.close()


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--views", default=",".join(map(str, VIEWS)))
    parser.add_argument("--resolution", type=int, default=RESOLUTION_PX)
    args = parser.parse_args()
    spec = RenderSpec(resolution_px=args.resolution)
    views = [int(part) for part in args.views.split(",")]
    for one in bench_assets(args.only):
        begun = time.monotonic()
        make_references(one, spec, views)
        print(json.dumps({"asset": one.asset.uid, "views": views, "seconds": round(time.monotonic() - begun, 1)}))


if __name__ == "__main__":
    main()
