"""Objaverse 1.0: its own package reads the catalogue, over files that were fetched and verified by us.

The package (0.1.7) downloads without retries, time limits or checks, and keeps for ever what it got, an error page
included. Its reading functions are sound. So the catalogue's files are fetched by `pipeline.fetch`, linked into the
layout in which the package keeps its downloads, and read by the package, which then has nothing left to download:

    <cache_dir>/objaverse/<digest of the hub>/hf-objaverse-v1/object-paths.json.gz
                                                              lvis-annotations.json.gz
                                                              metadata/000-023.json.gz

Only the metadata files that hold wanted uids are fetched, and a few are read at a time: all annotations at once would
take over 10 GB. The digest of each GLB, which this catalogue lacks, comes from the Objaverse-XL table where it has one.
Objects are fetched straight into the content-addressed cache.
"""

from __future__ import annotations

import difflib
import gzip
import json
import logging
import os
import re
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.admission import UNKNOWN_LICENCE, sketchfab_licence
from pipeline.fetch import Fetcher, default_hub
from pipeline.gltf import check_glb_length
from pipeline.spec import FetchSpec, ObjaverseSource
from pipeline.types import Asset, AssetError, FailureKind, UserError

logger = logging.getLogger(__name__)

MISSING_URI = "objaverse:missing"
_ROOT = "datasets/allenai/objaverse/resolve/main"
_XL_TABLE = "datasets/allenai/objaverse-xl/resolve/main/sketchfab/sketchfab.parquet"
_UID = re.compile(r"[0-9a-f]{32}")
_OBJECT_PATH = re.compile(r"glbs/([0-9]{3}-[0-9]{3})/([0-9a-f]{32})\.glb")
_MAX_INDEX_BYTES = 1 << 30
_MAX_JSON_BYTES = 1 << 30
_MAX_TABLE_BYTES = 8 << 30
_CHUNKS_A_READ = 8
_package_lock = threading.Lock()


class ObjaverseAssets:
    """Objaverse objects as Assets.

    Attributes:
        warnings: what the last listing could not have, such as the table of digests.
    """

    def __init__(self, source: ObjaverseSource, *, fetch: FetchSpec, max_asset_bytes: int) -> None:
        self._source = source
        self._base = (source.base_url or default_hub()).rstrip("/")
        self._fetcher = Fetcher(fetch, token_host=urlsplit(self._base).hostname)
        self._max_asset_bytes = max_asset_bytes
        hub = sha256(self._base.encode()).hexdigest()[:16]
        self._folder = self._fetcher.cache_dir / "objaverse" / hub / "hf-objaverse-v1"
        self.warnings: list[str] = []

    def list_assets(self) -> list[Asset]:
        """Return the wanted objects sorted by uid, unknown uids among them.

        Raises:
            UserError: the catalogue cannot be had, or a category or list of uids is not what it should be.
        """
        self.warnings = []
        self._place("object-paths.json.gz")
        with self._package() as package:
            paths: dict[str, Any] = package._load_object_paths()
        uids = sorted(self._wanted_uids(paths))[: self._source.max_objects]
        chunks = {uid: match[1] for uid in uids if (match := _valid_path(uid, paths.get(uid)))}
        paths = {uid: paths[uid] for uid in chunks}
        annotations = self._annotations(chunks)
        digests = self._digests(set(chunks)) if self._source.use_xl_digests else {}
        if missing := len(uids) - len(chunks):
            self._warn(f"{missing} of {len(uids)} uids are not in the catalogue; they are planned and will fail")
        return [self._asset(uid, paths.get(uid), annotations.get(uid, {}), digests.get(uid)) for uid in uids]

    def fetch(self, asset: Asset) -> Path | None:
        """Return the path of the GLB in the cache; its name has no ending.

        Raises:
            AssetError: as `Fetcher.fetch`; NOT_FOUND where the catalogue does not hold the uid.
        """
        if asset.uri == MISSING_URI:
            raise AssetError(FailureKind.NOT_FOUND, f"uid {asset.uid!r} is not in the Objaverse catalogue")
        return self._fetcher.fetch(
            asset.uri,
            sha256=asset.sha256,
            num_bytes=asset.num_bytes,
            max_bytes=self._max_asset_bytes,
            label=f"objaverse {asset.uid}",
            check=check_glb_length,
        ).path

    def _asset(self, uid: str, path: str | None, annotation: dict[str, str], digest: str | None) -> Asset:
        try:
            return Asset(
                uid=uid,
                source="objaverse",
                uri=f"{self._base}/{_ROOT}/{path}" if path else MISSING_URI,
                format="glb",
                license=annotation.get("license", UNKNOWN_LICENCE),
                attribution=annotation.get("attribution", ""),
                sha256=digest,
            )
        except ValueError as error:
            raise UserError(f"objaverse: {error}") from None

    def _wanted_uids(self, paths: Mapping[str, Any]) -> set[str]:
        """Return the union of the spec's uids, its file's, and its categories'; all where it names none."""
        source = self._source
        named = [("source.uids", number, uid) for number, uid in enumerate(source.uids, 1)]
        if source.uids_file is not None:
            named += [(f"uids file {source.uids_file}", number, uid) for number, uid in _lines(source.uids_file)]
        uids: set[str] = set()
        for where, number, text in named:
            uid = text.strip().removesuffix(".glb")
            if not uid or uid in uids:
                raise UserError(
                    f"{where}, entry {number}: uid {text!r} is {'a duplicate' if uid else 'empty'}; remove it"
                )
            uids.add(uid)
        if source.lvis_categories:
            uids |= self._lvis_uids()
        if not (named or source.uids_file or source.lvis_categories):
            return set(paths)
        if not uids:
            raise UserError(f"uids file {source.uids_file}: holds no uid; remove source.uids_file to take all objects")
        return uids

    def _lvis_uids(self) -> set[str]:
        self._place("lvis-annotations.json.gz")
        with self._package() as package:
            categories: dict[str, list[str]] = package.load_lvis_annotations()
        uids: set[str] = set()
        for name in self._source.lvis_categories:
            if name not in categories:
                near = difflib.get_close_matches(name, categories, n=3, cutoff=0.5)
                hint = f"; near it: {', '.join(near)}" if near else ""
                raise UserError(f"source.lvis_categories: no category {name!r} among {len(categories)}{hint}")
            uids.update(uid for uid in categories[name] if isinstance(uid, str))
        return uids

    def _annotations(self, chunks: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """Return licence and credit line by uid.

        Args:
            chunks: uid -> name of the metadata file that holds it.
        """
        by_chunk: dict[str, list[str]] = {}
        for uid, chunk in chunks.items():
            by_chunk.setdefault(chunk, []).append(uid)
        names = sorted(by_chunk)
        found: dict[str, dict[str, str]] = {}
        for start in range(0, len(names), _CHUNKS_A_READ):
            group = names[start : start + _CHUNKS_A_READ]
            for name in group:
                self._place(f"metadata/{name}.json.gz")
            with self._package() as package:
                annotations = package.load_annotations([uid for name in group for uid in by_chunk[name]])
            for uid, annotation in annotations.items():
                if isinstance(annotation, dict):
                    found[uid] = {
                        "license": sketchfab_licence(annotation.get("license")),
                        "attribution": _attribution(uid, annotation),
                    }
        if missing := len(chunks) - len(found):
            self._warn(f"{missing} of {len(chunks)} objects have no annotation; their licence counts as unknown")
        return found

    def _digests(self, uids: set[str]) -> dict[str, str]:
        """Return the sha256 of each GLB that the Objaverse-XL table knows."""
        try:
            table = self._fetcher.fetch(
                f"{self._base}/{_XL_TABLE}",
                max_bytes=_MAX_TABLE_BYTES,
                label="Objaverse-XL table of digests",
                check=_check_parquet,
            )
        except AssetError as error:
            # A hub without the table is a fact to record. A network fault is not: the plan is frozen, and would lack
            # its digests for ever because of one bad minute.
            if error.kind not in (FailureKind.NOT_FOUND, FailureKind.ACCESS_DENIED):
                raise self._refusal(error, "; or set source.use_xl_digests = false") from error
            self._warn(f"GLBs are fetched without known digests: {error.message}")
            return {}
        found = dict(_table_digests(table.path, uids))
        if missing := len(uids) - len(found):
            self._warn(f"the Objaverse-XL table knows no digest of {missing} of {len(uids)} objects")
        return found

    def _place(self, name: str) -> None:
        """Fetch one file of the catalogue, and link it to where the package looks for it."""
        try:
            file = self._fetcher.fetch(
                f"{self._base}/{_ROOT}/{name}",
                max_bytes=_MAX_INDEX_BYTES,
                label=f"Objaverse {name}",
                check=_check_json_gz,
            )
        except AssetError as error:
            raise self._refusal(error) from error
        place = self._folder / name
        if place.exists() and place.samefile(file.path):
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f"{place.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(file.path)
        except OSError:
            shutil.copyfile(file.path, temporary)  # a file system without hard links
        temporary.replace(place)
        temporary.unlink(missing_ok=True)  # renaming one link of a file to another leaves both

    def _refusal(self, error: AssetError, more: str = "") -> UserError:
        hint = f"check the network, HF_ENDPOINT and source.base_url{more}"
        return UserError(f"objaverse: cannot list assets: {error.message}; {hint}")

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        logger.warning("objaverse: %s", message)

    @contextmanager
    def _package(self) -> Iterator[Any]:
        """Lend the objaverse package, pointed at our folder. Its paths are globals, hence the lock."""
        try:
            import objaverse
        except ImportError:
            raise UserError("source.kind = 'objaverse' needs the package objaverse: pip install objaverse") from None
        with _package_lock:
            before = objaverse.BASE_PATH, objaverse._VERSIONED_PATH
            objaverse.BASE_PATH, objaverse._VERSIONED_PATH = str(self._folder.parent), str(self._folder)
            try:
                yield objaverse
            finally:
                objaverse.BASE_PATH, objaverse._VERSIONED_PATH = before


def _valid_path(uid: str, path: object) -> re.Match[str] | None:
    """Return the match of a catalogue path that is of the known form and belongs to the uid.

    The path becomes part of a URL and of a file name, so nothing else is let through, `..` least of all.
    """
    match = _OBJECT_PATH.fullmatch(path) if isinstance(path, str) else None
    return match if match and _UID.fullmatch(uid) and match[2] == uid else None


def _attribution(uid: str, annotation: Mapping[str, Any]) -> str:
    """Return the credit line: name by user (url)."""
    user = annotation.get("user")
    user = user if isinstance(user, dict) else {}
    name = _text(annotation.get("name")) or "untitled"
    author = _text(user.get("displayName")) or _text(user.get("username")) or "unknown author"
    url = _text(annotation.get("viewerUrl"))
    if not url.startswith("https://sketchfab.com/"):
        url = f"https://sketchfab.com/3d-models/{uid}"
    return f"{name} by {author} ({url})"


def _text(value: object) -> str:
    """Return foreign text on one line, printable and of bounded length; "" for what is no text."""
    if not isinstance(value, str):
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in value[:1000]).split())[:200]


def _lines(path: str) -> list[tuple[int, str]]:
    """Return the numbered lines of a file that are neither empty nor comments (#)."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"uids file {path}: cannot be read: {error}") from None
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]


def _check_json_gz(path: Path) -> None:
    """Refuse what is not a whole gzip of one JSON object.

    Raises:
        AssetError: TRUNCATED, NOT_AN_ASSET, TOO_LARGE or CORRUPT_FILE.
    """
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            raise AssetError(FailureKind.NOT_AN_ASSET, "not a gzip stream")
    try:
        with gzip.open(path) as stream:
            data = stream.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            raise AssetError(FailureKind.TOO_LARGE, f"unpacks to more than {_MAX_JSON_BYTES} bytes")
        value = json.loads(data)
    except EOFError:
        raise AssetError(FailureKind.TRUNCATED, "the gzip stream ends early") from None
    except (gzip.BadGzipFile, zlib.error, ValueError, RecursionError) as error:
        raise AssetError(FailureKind.CORRUPT_FILE, f"not a gzip of JSON: {error}") from None
    if not isinstance(value, dict):
        raise AssetError(FailureKind.CORRUPT_FILE, f"holds a JSON {type(value).__name__}; an object is required")


def _check_parquet(path: Path) -> None:
    """Refuse what is not a Parquet file with the columns that we read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        with path.open("rb") as file:
            starts_well = file.read(4) == b"PAR1"
        kind = FailureKind.TRUNCATED if starts_well else FailureKind.NOT_AN_ASSET
        raise AssetError(kind, f"not a whole Parquet file: {str(error).splitlines()[0]}") from None
    if not {"fileIdentifier", "sha256"} <= set(names):
        raise AssetError(FailureKind.CORRUPT_FILE, f"columns {names}; fileIdentifier and sha256 are required")


def _table_digests(path: Path, uids: set[str]) -> Iterable[tuple[str, str]]:
    """Yield (uid, sha256) of the wanted rows, reading two columns in pieces."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["fileIdentifier", "sha256"]):
            for identifier, digest in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                uid = str(identifier).rstrip("/")[-32:]
                if uid in uids and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest):
                    yield uid, digest
