"""Where assets come from: one file a source; each lists Assets and says how to get the bytes of one.

A source is built from the spec alone, so that a worker on another machine builds the same one and needs no more than
the Asset to fetch it. Listing is deterministic: the same spec over the same files gives the same Assets in the same
order. Whether a licence is admitted is not decided here: the caller asks `pipeline.admission.licence_admits` with
`Asset.license` before it fetches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from pipeline.members import OpenCapture
from pipeline.sources.colmap import ColmapAssets
from pipeline.sources.directory import DirectoryAssets
from pipeline.sources.mvimgnet import MvimgnetAssets
from pipeline.sources.procedural import ProceduralAssets
from pipeline.spec import (
    ColmapSource,
    DatasetSpec,
    DirectorySource,
    MvimgnetSource,
    ObjaverseSource,
    ProceduralSource,
)
from pipeline.types import Asset, UserError

__all__ = ["AssetSource", "CaptureSource", "list_assets", "open_captures", "open_source"]


class AssetSource(Protocol):
    """A listing of assets that are one file each, and a way to its bytes."""

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


class CaptureSource(Protocol):
    """A listing of photographed assets, which are many files each, and a way to them."""

    def list_assets(self) -> list[Asset]:
        """As `AssetSource.list_assets`."""
        ...

    def open_capture(self, asset: Asset) -> OpenCapture:
        """Return the files of a capture, by kind and name; its bytes are read by who wants them.

        Raises:
            AssetError: the files cannot be had, or are not those that were planned.
        """
        ...


def open_source(spec: DatasetSpec) -> AssetSource:
    """Return the source that the spec names; touches neither disk nor network.

    Raises:
        UserError: its assets are photographs.
    """
    source = spec.source
    if isinstance(source, ProceduralSource):
        return ProceduralAssets(source)
    if isinstance(source, DirectorySource):
        return DirectoryAssets(source)
    if isinstance(source, ObjaverseSource):
        # Only this source needs the fetcher, and with it an HTTP client.
        from pipeline.sources.objaverse import ObjaverseAssets

        return ObjaverseAssets(source, fetch=spec.fetch, max_asset_bytes=spec.admission.max_asset_bytes)
    raise UserError(
        f"spec {spec.name}: source {source.kind} holds photographs, which are not rendered; see `make ingest`"
    )


def open_captures(spec: DatasetSpec) -> CaptureSource:
    """Return the source of captures that the spec names; touches neither disk nor network.

    Raises:
        UserError: its assets are no captures.
    """
    source, limit = spec.source, spec.admission.max_asset_bytes
    if isinstance(source, MvimgnetSource):
        return MvimgnetAssets(source, max_capture_bytes=limit)
    if isinstance(source, ColmapSource):
        return ColmapAssets(source, max_capture_bytes=limit)
    raise UserError(f"spec {spec.name}: source {source.kind} holds no photographs to ingest; see `make render`")


def list_assets(spec: DatasetSpec) -> list[Asset]:
    """List whatever the spec's source holds."""
    return (open_captures(spec) if spec.is_captured else open_source(spec)).list_assets()
