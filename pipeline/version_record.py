"""Versions as a reader meets them: found, opened, checked. `pipeline.version` makes them and tells their layout.

Apart, so that opening a version loads neither the models of a spec nor the code that merges receipts: 0.14 s in every
rank and every worker of a DataLoader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.canonical import check_schema, digest_json, parse_json
from pipeline.store import Store
from pipeline.types import UserError

if TYPE_CHECKING:
    from pipeline.spec import DatasetSpec

MAX_VERSION_BYTES = 64 * 2**20
NOT_IN_DIGEST = ("number", "digest", "parent", "code_commit", "created_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A published version. `digest` covers what a reader sees: equal digests mean equal data."""

    number: int
    digest: str
    manifest_sha256: str
    manifest_bytes: int
    parent: int | None
    tombstones: frozenset[str]
    counts: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def spec(self) -> DatasetSpec:
        """The spec that the version was published under."""
        from pipeline.spec import DatasetSpec  # pydantic's models take 60 ms to build, and no reader asks

        return DatasetSpec.model_validate(self.record["spec"])


def version_key(number: int) -> str:
    """Return the key of a version in a corpus."""
    return f"versions/{number:06d}.json"


def parse_version(text: str) -> int | None:
    """Return a version number as the command lines take it, or None for "latest"."""
    if text == "latest":
        return None
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) < 10**6:
        raise UserError(f"VERSION={text}: expected a number from 1, or latest")
    return int(text)


def latest_number(store: Store) -> int:
    """Return the number of the newest version, 0 if there is none, with O(log n) requests and no listing."""
    if store.size(version_key(1)) is None:
        return 0
    low, high = 1, 2
    while store.size(version_key(high)) is not None:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if store.size(version_key(middle)) is not None:
            low = middle
        else:
            high = middle
    return low


def open_version(store: Store, number: int | None = None) -> Version:
    """Read a version; None takes the newest.

    Raises:
        UserError: if there is none, or it was written under another schema.
    """
    if isinstance(number, str):
        raise UserError(f"corpus {store.url}: version {number!r} is a text; give a number, or None for the newest")
    if number is None:
        number = latest_number(store)
        if number == 0:
            raise UserError(f"corpus {store.url}: no version is published yet; run `make publish CORPUS={store.url}`")
    try:
        record = parse_json(store.get(version_key(number), MAX_VERSION_BYTES))
    except FileNotFoundError:
        newest = latest_number(store)
        raise UserError(f"corpus {store.url}: there is no version {number}; versions 1 to {newest} exist") from None
    except ValueError as error:
        raise UserError(f"corpus {store.url}: version {number} is not readable: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"corpus {store.url}: version {number} is not a JSON object")
    check_schema(record.get("schema"), store.url, f"version {number}")
    body = {name: value for name, value in record.items() if name not in NOT_IN_DIGEST}
    if record.get("digest") != digest_json(body):
        raise UserError(f"corpus {store.url}: version {number} does not match its digest; restore its file")
    try:
        return Version(
            number=number,
            digest=str(record["digest"]),
            manifest_sha256=str(record["manifest"]["sha256"]),
            manifest_bytes=int(record["manifest"]["num_bytes"]),
            parent=record["parent"],
            tombstones=frozenset(record["tombstones"]),
            counts=dict(record["counts"]),
            record=record,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"corpus {store.url}: version {number} is malformed: {error!r}") from None


def shards_of(store: Store, number: int) -> list[str]:
    """Return the digests of a version's shards, by its list for plain readers; a missing list names none."""
    try:
        lines = store.get(list_key(number)).decode().split()
    except FileNotFoundError:
        return []
    return [line.removeprefix("shards/").removesuffix(".tar") for line in lines]


def list_key(number: int) -> str:
    """Return the key of the list of shards beside a version."""
    return f"versions/{number:06d}.shards.txt"


def manifest_key(sha256: str) -> str:
    """Return the key of a manifest in a corpus."""
    return f"manifests/{sha256}.parquet"
