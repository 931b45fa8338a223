"""What may not be handed on: licences that forbid it, and stores that anybody can read.

A store is public if it holds an object `public` (what is in it does not matter): whoever opens a bucket to the world
puts it there, `make publish PUBLIC=1` does so too. Into a public store nothing is ingested and nothing is published
that holds samples under a licence of `NOT_REDISTRIBUTABLE`; elsewhere a version that holds some says
`"redistributable": false`.

Not promised: that a store without the mark is private, nor that all other licences allow redistribution. `unknown`
means that nobody knows, and NC and ND have conditions of their own; the counts by licence are in every version.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.spec import DatasetSpec
from pipeline.store import Store
from pipeline.types import UserError

NOT_REDISTRIBUTABLE = frozenset({"MVImgNet-ToU"})
"""Licences under which no frame, crop or shard may be handed on."""

PUBLIC_MARK = "public"
_TEXT = b"Anybody may read this store: what may not be redistributed is kept out of it.\n"


def is_public(store: Store) -> bool:
    """Whether the store is marked as one that anybody can read; one request."""
    return store.size(PUBLIC_MARK) is not None


def mark_public(store: Store) -> None:
    """Mark a store as public. Safe to repeat."""
    store.create(PUBLIC_MARK, _TEXT)


def redistributable(licenses: Iterable[str]) -> bool:
    """Whether none of these licences is known to forbid it."""
    return not NOT_REDISTRIBUTABLE & set(licenses)


def refuse_public(store: Store, licenses: Iterable[str], what: str) -> None:
    """Refuse to put what must not be handed on into a public store.

    Raises:
        UserError: in one line.
    """
    held = sorted(NOT_REDISTRIBUTABLE & set(licenses))
    if held and is_public(store):
        raise UserError(
            f"corpus {store.url} is marked public (object {PUBLIC_MARK!r}), and {what} holds samples under "
            f"{', '.join(held)}, which forbids redistribution; use another CORPUS"
        )


def licenses_of_source(spec: DatasetSpec) -> list[str]:
    """Return the licences that a spec's source is known to give to all it lists; for the others, see the rows."""
    given = {"mvimgnet": ["MVImgNet-ToU"]}
    return given.get(spec.source.kind, [getattr(spec.source, "license", "unknown")])
