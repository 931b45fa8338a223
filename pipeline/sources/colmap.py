"""Folders with photos and a COLMAP model: each is one capture; on disk or on object storage.

    <capture>/images/...                     photos; or beside the model, or below the capture itself
    <capture>/sparse/0/*.bin                 or sparse/, colmap/sparse/0, distorted/sparse/0, binary or text
    <capture>/masks/...                      optional, named after the photos (`pipeline.layout`)

`source.path` is one such folder, or a folder of them. Which folder counts as a capture is told by names alone: one that
holds a folder of photos or models, or photos, or a model's files. Nothing is read before its turn comes, and so the
digest of a capture is known only afterwards.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from pipeline.folders import Folder, open_folder
from pipeline.layout import IMAGE_ENDINGS, MODEL_FILES
from pipeline.members import Member, OpenCapture
from pipeline.sources.mvimgnet import open_members, read_lines, walk_files
from pipeline.spec import ColmapSource
from pipeline.types import Asset, AssetError, FailureKind, UserError

logger = logging.getLogger(__name__)

_SIGNS = frozenset({"images", "sparse", "colmap", "distorted"})
_LISTERS = 16
_EXCLUDED = "colmap:excluded:"


class ColmapAssets:
    """Folders with a COLMAP model as Assets; the uid is the folder's name."""

    def __init__(self, source: ColmapSource, *, max_capture_bytes: int) -> None:
        self._source = source
        self._max_bytes = max_capture_bytes
        self._opened: Folder | None = None

    @property
    def _folder(self) -> Folder:
        if self._opened is None:
            self._opened = open_folder(self._source.path, "source.path")
        return self._opened

    def list_assets(self) -> list[Asset]:
        """Return the captures sorted by name, excluded ones among them.

        Raises:
            UserError: nothing is there, or a name cannot be a uid.
        """
        excluded = {line.rstrip("/"): number for number, line in read_lines(self._source.exclude_file)}
        try:
            names = self._names()
        except AssetError as error:
            raise UserError(f"source.path: {error.message}") from None
        if not names:
            raise UserError(
                f"source.path {self._source.path!r} holds no capture; a folder with images/ and sparse/0/, or a folder "
                "of such folders, is looked for"
            )
        for name in sorted(excluded.keys() - {uid for uid, _ in names}):
            where = f"source.exclude_file {self._source.exclude_file}, line {excluded[name]}"
            logger.warning("%s: %r is no capture of %s", where, name, self._source.path)
        return [self._asset(uid, prefix, uid in excluded) for uid, prefix in names[: self._source.max_captures]]

    def open_capture(self, asset: Asset) -> OpenCapture:
        """Return the files of a capture, none of them read yet.

        Raises:
            AssetError: EXCLUDED, NOT_FOUND, TOO_LARGE, ACCESS_DENIED or NETWORK.
        """
        if asset.uri.startswith(_EXCLUDED):
            raise AssetError(FailureKind.EXCLUDED, f"{asset.uid} is on the list {self._source.exclude_file}")
        prefix = asset.uri.removeprefix("colmap:")
        members: dict[str, Member] = {
            file.name.removeprefix(prefix): file for file in walk_files(self._folder, prefix, depth=4)
        }
        return open_members(asset.uid, members, self._max_bytes)

    def _names(self) -> list[tuple[str, str]]:
        """Return (uid, prefix) of each capture, sorted."""
        folder = self._folder
        folders, files = folder.entries("")
        inner = [name for name in folders if not name.startswith(".")]
        own = urlsplit(folder.url).path.rstrip("/").rpartition("/")[2] or "capture"
        if _SIGNS & set(folders) or MODEL_FILES & {name for name, _ in files} or not inner:
            return [(own, "")] if _is_capture(folders, [name for name, _ in files]) else []
        with ThreadPoolExecutor(_LISTERS if folder.is_remote else 1) as pool:
            listings = list(pool.map(lambda name: folder.entries(f"{name}/"), inner))
        found = []
        for name, (below, beside) in zip(inner, listings, strict=True):
            if _is_capture(below, [file for file, _ in beside]):
                found.append((name, f"{name}/"))
            else:
                logger.warning("source.path: folder %s is no capture: it holds neither photos nor a model", name)
        # Photos beside folders that are captures, such as a preview, do not make one capture of all.
        return found or ([(own, "")] if _is_capture(folders, [name for name, _ in files]) else [])

    def _asset(self, uid: str, prefix: str, excluded: bool) -> Asset:
        try:
            uid.encode()
        except UnicodeEncodeError:
            raise UserError(f"source.path: folder {uid!a}: the name is not valid UTF-8; rename the folder") from None
        return Asset(
            uid=uid,
            source="colmap",
            uri=f"{_EXCLUDED if excluded else 'colmap:'}{prefix}",
            format="capture",
            license=self._source.license,
            attribution=self._source.attribution,
        )


def _is_capture(folders: list[str], files: list[str]) -> bool:
    photos = any(name.lower().endswith(IMAGE_ENDINGS) for name in files)
    return photos or bool(_SIGNS & set(folders)) or bool(MODEL_FILES & set(files))
