"""The verbs that look: where a corpus stands, and what is known of one object. `jobs.cli` makes commands of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Corpus, Json

Prices = Annotated[
    list[str] | None,
    typer.Option("--set", help="a price to reckon with, such as workers.price_per_cpu_hour=0.03; repeatable"),
]


def status(corpus: Corpus, overrides: Prices = None, as_json: Json = False) -> None:
    """Tell where a corpus stands: planned, done, failed, running, stale; speed, time left, cost; by node."""
    from jobs.status import corpus_status, status_text
    from pipeline.store import open_store

    found = corpus_status(open_store(corpus, must_exist=True), overrides or ())
    typer.echo(status_text(found), err=as_json)
    if as_json:
        typer.echo(json.dumps(found))


def why(
    corpus: Corpus,
    uid: Annotated[str, typer.Option(help="the object, by its uid or its key in the shards")],
    out: Annotated[Path | None, typer.Option(help="folder for the object's contact sheet, a PNG")] = None,
    as_json: Json = False,
) -> None:
    """Tell all that is known of one object: plans, receipts, versions, failures and what to do, and its pictures."""
    from jobs.why import explain, why_text
    from pipeline.store import open_store

    found = explain(open_store(corpus, must_exist=True), uid, out)
    typer.echo(why_text(found), err=as_json)
    if as_json:
        typer.echo(json.dumps(found))


VERBS: tuple[Callable[..., None], ...] = (status, why)
