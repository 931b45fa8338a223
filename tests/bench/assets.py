"""What the benchmarks render: a fixed list of real files, or procedural objects where those are missing."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.types import Asset

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "assets"

FILES = (
    "low-poly-tree.glb",
    "FlightHelmet/FlightHelmet.gltf",
    "egyptian-cat-webp.glb",
    "carbon-sphere-draco.glb",
    "glass-table.glb",
    "sunglasses-transmission.glb",
    "love-neon-sign.glb",
    "lumberjack.glb",
    "chess-board-draco.glb",
    "valve-index-left.glb",
    "terrain-vertex-colour.glb",
    "objaverse/b416732d162e4e4d92ee9a37c65fedbc.glb",
    "obj-spider/spider.obj",
)
PROCEDURAL_SEEDS = tuple(range(12))


@dataclass(frozen=True, slots=True)
class BenchAsset:
    """An asset, its file if it has one, and a digest of what it is."""

    asset: Asset
    path: Path | None
    digest: str


def bench_assets(only: str = "") -> list[BenchAsset]:
    """Return the list; `only` keeps those whose name holds one of its comma-separated parts."""
    found = [_file(name) for name in FILES] if SHARED.is_dir() else [_procedural(seed) for seed in PROCEDURAL_SEEDS]
    return [one for one in found if not only or any(part in one.asset.uid for part in only.split(","))]


def cache_dir() -> Path:
    """Return the folder of what benchmarks keep between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "lrm-corpus" / "bench"


def _file(name: str) -> BenchAsset:
    path = SHARED / name
    asset = Asset(uid=name, source="bench", uri=str(path), format=path.suffix[1:].lower())
    return BenchAsset(asset, path, hashlib.sha256(path.read_bytes()).hexdigest())


def _procedural(seed: int) -> BenchAsset:
    asset = Asset(uid=f"procedural-{seed}", source="bench", uri=f"procedural:{seed}", format="procedural")
    return BenchAsset(asset, None, f"procedural-{seed}")
