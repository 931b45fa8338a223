"""Pixels change only together with RENDER_REVISION.

The golden sheet of each revision is a small PNG made by this file, `python -m tests.render.test_golden`, and looked at
by a person before it is committed. Other processors may round otherwise, so pictures agree to 40 dB, not to the bit.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.sample import contact_sheet, decode_rgba
from pipeline.spec import DatasetSpec, ProceduralSource, RenderSpec
from pipeline.types import Asset
from render import RENDER_REVISION
from render.worker import RenderWorker

FOLDER = Path(__file__).parent / "golden"
SEEDS = (0, 4, 20)
MIN_PSNR_DB = 40.0


def golden_path() -> Path:
    return FOLDER / f"revision-{RENDER_REVISION}.png"


def render_sheet() -> np.ndarray:
    """Three procedural objects, four views each, studio light; RGB [H, W, 3]."""
    render = RenderSpec(resolution_px=96, num_views=4, samples=16)
    spec = DatasetSpec(name="golden", source=ProceduralSource(), render=render)
    cells = []
    with RenderWorker(spec, fingerprint="golden", num_threads=2) as worker:
        for seed in SEEDS:
            uid = f"procedural-{seed}"
            asset = Asset(uid=uid, source="procedural", uri=f"procedural:{seed}", format="procedural")
            cells += [decode_rgba(view.planes["rgba"].data) for view in worker.render(asset, None).views]
    return contact_sheet(cells, 4, background=128)


@pytest.mark.blender
def test_pixels_are_those_of_this_revision() -> None:
    assert golden_path().is_file(), (
        f"{golden_path().name} is missing: RENDER_REVISION was raised; run `python -m tests.render.test_golden`, look "
        "at the sheet, and commit it"
    )
    golden = cv2.cvtColor(cv2.imread(str(golden_path())), cv2.COLOR_BGR2RGB).astype(np.float64)
    error = ((render_sheet() - golden) ** 2).mean()
    psnr = 10 * np.log10(255**2 / max(error, 1e-12))
    assert psnr >= MIN_PSNR_DB, f"pixels changed ({psnr:.1f} dB against the golden sheet): raise RENDER_REVISION"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    cv2.imwrite(str(golden_path()), cv2.cvtColor(render_sheet(), cv2.COLOR_RGB2BGR))
    print(f"wrote {golden_path()}: look at it before you commit it")
