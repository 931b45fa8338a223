"""Seeded compositions of textured primitives: the source that needs no files and no network."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.spec import ProceduralSource
from pipeline.types import Asset


class ProceduralAssets:
    """Assets `procedural-<seed>`; what a seed looks like is decided where it is rendered."""

    def __init__(self, source: ProceduralSource) -> None:
        self._source = source

    def list_assets(self) -> list[Asset]:
        """Return `num_objects` assets with consecutive seeds."""
        first = self._source.first_seed
        return [_asset(seed) for seed in range(first, first + self._source.num_objects)]

    def fetch(self, asset: Asset) -> Path | None:  # noqa: ARG002
        """Return None: the object is made from its seed."""
        return None


def _asset(seed: int) -> Asset:
    uri = f"procedural:{seed}"
    # The uri is the whole content, so its digest stands where that of a file would.
    digest = hashlib.sha256(uri.encode()).hexdigest()
    return Asset(
        uid=f"procedural-{seed}",
        source="procedural",
        uri=uri,
        format="procedural",
        license="CC0-1.0",
        sha256=digest,
        num_bytes=0,
    )
