"""What is let in, and why not: licences before the fetch, headers before Blender sees the file. Pure predicates."""

from __future__ import annotations

import re
from typing import Literal

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
