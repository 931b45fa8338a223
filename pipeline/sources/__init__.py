"""Where assets come from: one file a source; each lists Assets and says how to get the bytes of one.

A source is built from the spec alone, so that a worker on another machine builds the same one and needs no more than
the Asset to fetch it. Listing is deterministic: the same spec over the same files gives the same Assets in the same
order. Whether a licence is admitted is not decided here: the caller asks `pipeline.admission.licence_admits` with
`Asset.license` before it fetches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pipeline.sources.directory import DirectoryAssets
from pipeline.sources.procedural import ProceduralAssets
from pipeline.spec import DatasetSpec, DirectorySource, ProceduralSource
from pipeline.types import Asset

__all__ = ["AssetSource", "open_source"]


class AssetSource(Protocol):
    """A listing of assets, and a way to their bytes."""

    def list_assets(self) -> list[Asset]:
        """Return every asset that the source names, in a fixed order, uids unique.

        An asset that is named but cannot be had is listed too; its fetch fails with a kind.

        Raises:
            UserError: what the spec asks for does not exist or contradicts itself.
        """
        ...

    def fetch(self, asset: Asset) -> Path | None:
        """Return the path of the asset's verified main file, or None where the source needs no file.

        Raises:
            AssetError: the bytes cannot be had, or are not those that were planned.
        """
        ...


def open_source(spec: DatasetSpec) -> AssetSource:
    """Return the source that the spec names; touches neither disk nor network."""
    source = spec.source
    if isinstance(source, ProceduralSource):
        return ProceduralAssets(source)
    if isinstance(source, DirectorySource):
        return DirectoryAssets(source)
    # Only this source needs the fetcher, and with it an HTTP client.
    from pipeline.sources.objaverse import ObjaverseAssets

    return ObjaverseAssets(source, fetch=spec.fetch, max_asset_bytes=spec.admission.max_asset_bytes)
