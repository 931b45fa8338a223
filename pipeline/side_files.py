"""Files that an asset names beside itself: where a reference leads, and whether it stays in the asset's folder.

Judged by its text alone: folders made of symbolic links (git-annex, Nix) are legitimate. A reference is foreign input,
so one that would leave the folder is refused whether or not anything is there.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from pipeline.types import AssetError, FailureKind

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_DRIVE = re.compile(r"[A-Za-z]:")
_MAX_NAME_CHARS = 4096


def show(value: object) -> str:
    """Return foreign text quoted for a message: short, printable, on one line."""
    return ascii(value)[:120]


def uri_path(uri: str) -> PurePosixPath:
    """Return the relative path that a glTF URI names, percent signs decoded, backslashes turned.

    Raises:
        AssetError: CORRUPT_FILE for another scheme, an absolute path, or a path that leaves the folder.
    """
    if _SCHEME.match(uri) or _DRIVE.match(uri):
        raise _outside(uri)
    return relative_path(unquote(uri.replace("\\", "/")))


def relative_path(name: str) -> PurePosixPath:
    """Return a file name as a normalised relative path with forward slashes.

    Raises:
        AssetError: CORRUPT_FILE for an absolute path, or one that leaves the folder at any point.
    """
    turned = name.replace("\\", "/")
    if turned.startswith("/") or _DRIVE.match(turned):
        raise _outside(name)
    if not turned or "\x00" in turned or len(turned) > _MAX_NAME_CHARS:
        raise AssetError(FailureKind.CORRUPT_FILE, f"{show(name)} is not a file name")
    parts: list[str] = []
    for part in turned.split("/"):
        if part == ".." and not parts:
            raise _outside(name)
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return PurePosixPath(*parts)


def find(folder: Path, relative: PurePosixPath) -> Path | None:
    """Return the regular file of that name in the folder, in any case of letters, or None."""
    path = folder / relative
    try:
        if path.is_file():
            return path
        path = folder
        for part in relative.parts:
            exact = path / part
            if not exact.exists():
                exact = next((entry for entry in path.iterdir() if entry.name.lower() == part.lower()), exact)
            path = exact
        return path if path.is_file() else None
    except (OSError, ValueError):  # a name too long for the file system, or with lone surrogates
        return None


def _outside(name: str) -> AssetError:
    return AssetError(FailureKind.CORRUPT_FILE, f"reference {show(name)} leads outside the asset's folder")
