"""What every stored JSON has in common: one text of a value, its digest, and the schema that it was written under."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from pipeline import SCHEMA
from pipeline.types import UserError


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode()


def parse_json(text: str | bytes) -> Any:
    """Parse a value that has a canonical text, which NaN, 1e999 and what is nested too deeply have not.

    Raises:
        ValueError: saying what was found.
    """
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
        canonical_json(value)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def digest_json(value: Any) -> str:
    """Return the sha256 of the canonical JSON of a value, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def check_schema(found: object, where: str, what: str) -> None:
    """Raise UserError unless a stored thing was written under the schema that this code reads."""
    if str(found) != str(SCHEMA):
        raise UserError(
            f"corpus {where}: {what} has schema {found!r}, this code reads schema {SCHEMA}; "
            "use the release that wrote it, or another CORPUS"
        )
