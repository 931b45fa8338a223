"""Fixtures of the rendering tests: small specs, workers, and the shared assets where they exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from pipeline.spec import DatasetSpec
from pipeline.types import Asset, Sample
from render.worker import RenderWorker
from tests.render.blends import write_blend
from tests.render.inspector import Inspector

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "assets"

BLENDER_5 = int(version("bpy").partition(".")[0]) >= 5

Render = Callable[..., Sample]


def make_spec(**sections: dict[str, Any]) -> DatasetSpec:
    """Return a small spec; each keyword is a section whose keys override the defaults of these tests."""
    render = {"num_views": 2, "resolution_px": 32, "samples": 1, "denoise": False} | sections.pop("render", {})
    # Two cubes far apart cover half a pixel of so small a view, and that is what some tests are about.
    admission = {"min_alpha_coverage": 1e-5} | sections.pop("admission", {})
    base = {"name": "test", "source": {"kind": "procedural"}, "render": render, "admission": admission}
    return DatasetSpec.model_validate(base | sections)


def asset_of(path: Path, uid: str | None = None) -> Asset:
    return Asset(uid=uid or path.name, source="test", uri=str(path), format=path.suffix[1:].lower())


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"shared assets are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RenderWorker]:
    """One Blender for a module: tests of what is imported need no fresh one."""
    with RenderWorker(
        make_spec(), fingerprint="f" * 64, num_threads=2, scratch_dir=tmp_path_factory.mktemp("scratch")
    ) as one:
        yield one


@pytest.fixture
def render(worker: RenderWorker) -> Render:
    def run(path: Path, **options: Any) -> Sample:
        return worker.render(asset_of(path), path, **options)

    return run


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inspector]:
    """One Blender that prepares scenes and tells what stands in them."""
    with Inspector(tmp_path_factory.mktemp("inspector")) as one:
        yield one


@pytest.fixture
def blend(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the .blend file of a kind of `tests.render.blends`."""
    return lambda kind, *extra: write_blend(kind, tmp_path / f"{kind}.blend", *extra)
