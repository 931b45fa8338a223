"""Assets on disk: a folder, a glob pattern, or a CSV or Parquet list of files.

A folder or pattern takes the files whose ending names a 3D format; what lies beside them (.bin, .mtl, textures) belongs
to an asset and is none itself. Names that start with a dot are left out (version control, AppleDouble files). The
digest of each main file is computed at listing and checked again at fetch, so that a plan means the bytes that were
there when it was made. Side files are not covered by that digest.

    folder, glob    uid is the file's path relative to the folder, or to the part of the pattern before its first
                    wildcard, with forward slashes
    list            columns: file (relative to the list's folder, or absolute), and optionally uid, license (or
                    licence), attribution, sha256; other columns are ignored. Without uid it is `file` as written.
                    A listed file that does not exist is a planned asset that fails at fetch.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.spec import DirectorySource
from pipeline.types import Asset, AssetError, FailureKind, UserError, printable

logger = logging.getLogger(__name__)

ASSET_FORMATS = ("glb", "gltf", "obj", "fbx", "dae", "stl", "ply", "usd", "usda", "usdc", "usdz", "blend")
LIST_FORMATS = (".csv", ".parquet")
_CHUNK_BYTES = 1 << 20
_MAX_UID_CHARS = 500


class DirectoryAssets:
    """Assets that are files on this machine, or on storage that it mounts."""

    def __init__(self, source: DirectorySource) -> None:
        self._source = source

    def list_assets(self) -> list[Asset]:
        """Return the assets of the folder or pattern sorted by relative path, or of the list in its order.

        Raises:
            UserError: nothing is there, a row is malformed, or a uid occurs twice.
        """
        path = Path(self._source.path).expanduser()
        if path.is_dir():
            assets = self._from_files(path, _walk(path), f"folder {path}")
        elif path.suffix.lower() in LIST_FORMATS:
            assets = self._from_list(path)
        elif path.is_file():
            assets = self._from_files(path.parent, [path.name], f"file {path}")
        elif glob.has_magic(str(path)):
            base = _fixed_part(path)
            # Not Path.glob: it takes no absolute pattern.
            names = (os.path.relpath(name, base) for name in glob.iglob(str(path), recursive=True))  # noqa: PTH207
            assets = self._from_files(base, names, f"pattern {path}")
        else:
            raise UserError(
                f"source.path {self._source.path!r}: no such folder or file; give a folder, a glob pattern in quotes, "
                "or a .csv or .parquet list"
            )
        return assets

    def fetch(self, asset: Asset) -> Path | None:
        """Return the path of the main file, after its bytes were checked against the planned digest.

        Raises:
            AssetError: NOT_FOUND, ACCESS_DENIED, or CHECKSUM_MISMATCH where the file changed since it was listed.
        """
        path = Path(asset.uri)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise AssetError(FailureKind.NOT_FOUND, f"{path} is not a regular file")
            digest, num_bytes = digest_file(path)
        except PermissionError:
            raise AssetError(FailureKind.ACCESS_DENIED, f"{path} cannot be read: permission denied") from None
        except (FileNotFoundError, NotADirectoryError):
            raise AssetError(FailureKind.NOT_FOUND, f"{path} does not exist") from None
        except OSError as error:
            raise AssetError(FailureKind.INTERNAL, f"{path} cannot be read: {error.strerror}") from None
        if asset.sha256 is not None and digest != asset.sha256:
            raise AssetError(
                FailureKind.CHECKSUM_MISMATCH,
                f"{path} has {num_bytes} bytes of sha256 {digest}; {asset.sha256} was planned. "
                "Restore the file, or plan a new version",
            )
        return path

    def _from_files(self, base: Path, names: Sequence[str] | Iterator[str], what: str) -> list[Asset]:
        """Return the assets among the files `names`, relative to `base`, sorted."""
        posix = sorted({PurePosixPath(name).as_posix() for name in names})
        found = [name for name in posix if _is_asset_name(name) and (base / name).is_file()]
        kept = [name for name in found if not _excluded(name, self._source.exclude)]
        for pattern in self._source.exclude:
            if not any(_excluded(name, (pattern,)) for name in found):
                logger.warning("source.exclude %r matches no asset of %s", pattern, what)
        if not kept:
            left_out = f"; source.exclude leaves out all {len(found)}" if found else ""
            raise UserError(
                f"source.path: {what} holds no asset among its {len(posix)} files{left_out}; "
                f"endings that count: {', '.join(ASSET_FORMATS)}"
            )
        return [self._asset(uid=_file_uid(name, what), file=base / name, where=f"{what}: {name}") for name in kept]

    def _from_list(self, path: Path) -> list[Asset]:
        """Return the assets of a CSV or Parquet list, in its order."""
        if not path.is_file():
            raise UserError(f"source.path: list {path} does not exist; write it, or name a folder")
        rows = _parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path)
        assets: list[Asset] = []
        places: dict[str, str] = {}
        for place, row in rows:
            where = f"list {path}, {place}"
            name = row["file"]
            if not name or "\x00" in name:
                raise UserError(f"{where}: column 'file' is {name!r}; a file name is required")
            if _excluded(PurePosixPath(name).as_posix(), self._source.exclude):
                continue
            uid = row["uid"] or _file_uid(name, where)
            if not uid.isprintable():
                raise UserError(f"{where}: uid {uid!a} holds characters that cannot be printed; give it another")
            if uid in places:
                raise UserError(f"{where}: uid {uid!r} stands on {places[uid]} too; uids must be unique")
            places[uid] = place
            assets.append(self._asset(uid=uid, file=path.parent / name, where=where, row=row))
        if not assets:
            raise UserError(f"source.path: list {path} holds no rows, or source.exclude leaves out all of them")
        return assets

    def _asset(self, *, uid: str, file: Path, where: str, row: dict[str, str] | None = None) -> Asset:
        row = row or {}
        sha256: str | None = row.get("sha256", "").lower() or None
        num_bytes: int | None = None
        try:
            file = Path(os.path.abspath(file))  # noqa: PTH100 - symbolic links are kept as the user wrote them
            if stat.S_ISREG(file.stat().st_mode):
                num_bytes = file.stat().st_size
                if sha256 is None:
                    sha256, num_bytes = digest_file(file)
        except OSError as error:
            # Planned all the same: fetch finds the same fault and gives it a kind.
            logger.warning("%s: %s cannot be read: %s", where, file, error.strerror)
        try:
            uid.encode()
            str(file).encode()
            return Asset(
                uid=uid,
                source="directory",
                uri=str(file),
                format=file.suffix[1:].lower() or "unknown",
                license=row.get("license") or self._source.license,
                attribution=row.get("attribution", ""),
                sha256=sha256,
                num_bytes=num_bytes,
            )
        except UnicodeEncodeError:
            raise UserError(f"{where!a}: the name is not valid UTF-8; rename the file or exclude it") from None
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None


def digest_file(path: Path) -> tuple[str, int]:
    """Return sha256 in hex and size in bytes of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
            num_bytes += len(piece)
    return digest.hexdigest(), num_bytes


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, relative to it; links to folders are not followed, so there are no loops."""

    def refuse(error: OSError) -> None:
        raise UserError(f"source.path: folder {error.filename} cannot be read: {error.strerror}") from None

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(root, name), folder)  # noqa: PTH118 - once for each of many files


def _fixed_part(pattern: Path) -> Path:
    """Return the folder of a glob pattern before its first wildcard."""
    parts: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts) if parts else Path()


def _is_asset_name(name: str) -> bool:
    return PurePosixPath(name).suffix[1:].lower() in ASSET_FORMATS


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the relative path; `*` crosses slashes, a leading `**/` also matches no folder."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, pattern.removeprefix("**/")) for pattern in patterns)


def _file_uid(name: str, where: str) -> str:
    """Return the uid of a file: its relative path; with a digest, where that is too long or breaks lines."""
    uid = PurePosixPath(name).as_posix()
    if len(uid) <= _MAX_UID_CHARS and (uid.isprintable() or not _is_utf8(uid)):
        return uid
    logger.warning(
        "%a: the path is longer than %d characters or cannot be printed; its uid is another", where, _MAX_UID_CHARS
    )
    digest = hashlib.sha256(uid.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{digest}-{printable(uid)[-(_MAX_UID_CHARS - 17) :]}"


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _columns(names: Sequence[str], where: str) -> dict[str, str]:
    """Return column of the list by our name for it."""
    aliases = {"file": ("file",), "uid": ("uid",), "license": ("license", "licence")}
    aliases |= {"attribution": ("attribution",), "sha256": ("sha256",)}
    columns: dict[str, str] = {}
    for ours, allowed in aliases.items():
        found = [name for name in names if name in allowed]
        if len(found) > 1:
            raise UserError(f"{where}: columns {found} mean the same thing; keep one")
        if found:
            columns[ours] = found[0]
    if "file" not in columns:
        raise UserError(f"{where}: no column 'file'; found {list(names)[:20]}")
    return columns


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("line N", row) of a CSV list with a header line."""
    where = f"list {path}"
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            columns = {ours: header.index(name) for ours, name in _columns(header, where).items()}
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"{where}, line {reader.line_num}: {len(cells)} cells; the header has {len(header)}"
                    )
                row = {ours: cells[column].strip() for ours, column in columns.items()}
                yield f"line {reader.line_num}", {"uid": "", **row}
        except csv.Error as error:
            raise UserError(f"{where}, line {reader.line_num}: not valid CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{where}, after line {reader.line_num}: not valid UTF-8: {error.reason}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("row N", row) of a Parquet list, counted from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"list {path}"
    try:
        with pq.ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, where)
            number = 0
            for batch in file.iter_batches(columns=list(columns.values())):
                for values in batch.to_pylist():
                    number += 1
                    yield f"row {number}", {"uid": "", **_text_row(values, columns, f"{where}, row {number}")}
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{where}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _text_row(values: dict[str, Any], columns: dict[str, str], where: str) -> dict[str, str]:
    row = {ours: values[name] for ours, name in columns.items()}
    for ours, value in row.items():
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: column {columns[ours]!r} holds {type(value).__name__}; text is required")
    return {ours: (value or "").strip() for ours, value in row.items()}
