"""What is let in, and why not: licences before the fetch, headers before Blender sees the file. Pure predicates."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline import gltf, headers, sniff
from pipeline.gltf_data import check_data
from pipeline.spec import AdmissionSpec
from pipeline.types import AssetError, FailureKind

LicencePolicy = Literal["any", "commercial"] | tuple[str, ...]

UNKNOWN_LICENCE = "unknown"
_SKETCHFAB = {
    "by": "CC-BY-4.0",
    "by-sa": "CC-BY-SA-4.0",
    "by-nd": "CC-BY-ND-4.0",
    "by-nc": "CC-BY-NC-4.0",
    "by-nc-sa": "CC-BY-NC-SA-4.0",
    "by-nc-nd": "CC-BY-NC-ND-4.0",
    "cc0": "CC0-1.0",
}
# Licences that are known to allow commercial use of copies and of adaptations, such as renders. An allow-list: a text
# that nobody here has read ("free for students") must not pass because it holds no forbidden word.
_COMMERCIAL = re.compile(
    r"cc0-1\.0|cc-pddc|pddl-1\.0|odc-by-1\.0|cc-by(-sa)?-[0-9.]+(-[a-z]+)?|mit(-0)?|0bsd|bsd-[23]-clause|apache-2\.0|isc"
    r"|zlib|unlicense|bsl-1\.0|mpl-2\.0|(a|l)?gpl-[0-9.]+(-only|-or-later)?|wtfpl|fal-1\.3|ofl-1\.1"
)

_CHECKS: dict[str, Callable[[Path, int], None]] = {
    "obj": headers.check_obj,
    "stl": headers.check_stl,
    "ply": headers.check_ply,
    "fbx": headers.check_fbx,
    "dae": headers.check_dae,
    "usd": headers.check_usd,
    "usda": headers.check_usd,
    "usdc": headers.check_usd,
    "usdz": headers.check_usdz,
    "blend": headers.check_blend,
}
FORMATS = frozenset({"glb", "gltf", *_CHECKS})


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What the header of an admitted file tells.

    Attributes:
        num_bytes: size of the main file.
        expected_triangles: triangles of the default scene as the file counts them; None where its format does not
            tell before an import, or tells something else than an importer makes (duplicates are merged).
        stated_licence: what a glTF file says of its own licence, free text; it may differ from the catalogue's.
    """

    num_bytes: int
    expected_triangles: int | None = None
    stated_licence: str | None = None


def check_file(path: Path, format: str, spec: AdmissionSpec) -> FileFacts:
    """Judge a file by its headers and tables before anything opens it in earnest; nothing in it is trusted.

    Args:
        path: main file; its ending is not looked at.
        format: as in `Asset.format`.
        spec: limits.

    Raises:
        AssetError: NOT_FOUND, EMPTY_FILE, TOO_LARGE, NOT_AN_ASSET, TRUNCATED, CORRUPT_FILE, UNSUPPORTED_FORMAT,
            MISSING_RESOURCE, MISSING_TEXTURE, EMPTY_SCENE or DEGENERATE_GEOMETRY, naming what was found.
    """
    try:
        return _check(path, format, spec)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise AssetError(FailureKind.NOT_FOUND, f"{path} is not there any more, or not a file") from None
    except OSError as error:
        raise AssetError(FailureKind.INTERNAL, f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError:
        raise AssetError(FailureKind.TOO_LARGE, "not enough memory to look at it") from None


def _check(path: Path, format: str, spec: AdmissionSpec) -> FileFacts:
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise AssetError(FailureKind.EMPTY_FILE, "0 bytes")
    if num_bytes > spec.max_asset_bytes:
        message = f"{num_bytes} bytes; at most {spec.max_asset_bytes} are allowed (admission.max_asset_bytes)"
        raise AssetError(FailureKind.TOO_LARGE, message)
    if format not in FORMATS:
        message = f"format {format!r}; {', '.join(sorted(FORMATS))} can be read"
        raise AssetError(FailureKind.UNSUPPORTED_FORMAT, message)
    with path.open("rb") as file:
        head = file.read(sniff.HEAD_BYTES)
    if page := sniff.error_page(head, num_bytes):
        raise AssetError(FailureKind.NOT_AN_ASSET, f"{page} of {num_bytes} bytes instead of a {format} file")
    if format in _CHECKS:
        _CHECKS[format](path, spec.max_triangles)
        return FileFacts(num_bytes=num_bytes)
    document = gltf.read_document(path)
    gltf.check_references(document)
    check_data(document, max_side_bytes=spec.max_asset_bytes)
    return FileFacts(
        num_bytes=num_bytes,
        expected_triangles=gltf.count_triangles(document, max_triangles=spec.max_triangles),
        stated_licence=gltf.stated_licence(document),
    )


def sketchfab_licence(slug: object) -> str:
    """Return the SPDX identifier of a Sketchfab licence slug, "unknown" for anything that is none."""
    return _SKETCHFAB.get(slug.strip().lower(), UNKNOWN_LICENCE) if isinstance(slug, str) else UNKNOWN_LICENCE


def licence_admits(policy: LicencePolicy, license: str) -> str | None:
    """Return None where the policy admits the licence, else the reason why not.

    Args:
        policy: "any"; "commercial" (known to allow commercial use and adaptations, so no NC, no ND, no unknown); or the
            SPDX identifiers that are admitted.
        license: SPDX identifier, or an expression of them with OR (any part will do) or AND (every part must do).
    """
    if policy == "any":
        return None
    text = license.strip()
    if not text or text.lower() in (UNKNOWN_LICENCE, "noassertion", "none"):
        return f"licence {license!r} is not known; the policy is {_name(policy)}"
    if alternatives := [part for part in re.split(r"\s+OR\s+", text) if part != text]:
        reasons = [licence_admits(policy, part.strip("() ")) for part in alternatives]
        return None if None in reasons else reasons[0]
    if parts := [part for part in re.split(r"\s+AND\s+", text) if part != text]:
        return next((reason for part in parts if (reason := licence_admits(policy, part.strip("() ")))), None)
    if policy != "commercial":
        allowed = {entry.strip().lower() for entry in policy}
        return None if text.lower() in allowed else f"licence {text!r} is not in the list {_name(policy)}"
    words = set(text.lower().split("-"))
    if "nc" in words or "nd" in words:
        return (
            f"licence {text!r} forbids {'commercial use' if 'nc' in words else 'adaptations'}; the policy is commercial"
        )
    if not _COMMERCIAL.fullmatch(text.lower()):
        return (
            f"licence {text!r} is not known to allow commercial use; to admit it, list it in admission.licenses "
            "with the others"
        )
    return None


def _name(policy: LicencePolicy) -> str:
    return policy if isinstance(policy, str) else f"[{', '.join(policy)}]"
