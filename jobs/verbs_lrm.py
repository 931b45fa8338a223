"""The verbs of the model: what is run on a corpus once it is there. `jobs.cli` makes commands of them, in this order.

Plain functions with typer's annotations: this file needs no application object, so it imports nothing of `jobs.cli`.
Heavy packages (torch, transformers) are imported by the verb that runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Corpus, Json, Overrides, VersionText


def train(
    corpus: Corpus,
    out: Annotated[Path, typer.Option(help="folder for checkpoints and metrics; an existing one is resumed")],
    version: VersionText = "latest",
    config: Annotated[str, typer.Option(help="tiny, small, paper, or a TOML file")] = "tiny",
    overrides: Overrides = None,
) -> None:
    """Train an LRM on a version, streamed by ranged reads; resumes from the newest checkpoint in --out."""
    from lrm.config import load_config
    from lrm.train import TrainingError
    from lrm.train import train as run
    from pipeline.version import parse_version

    try:
        result = run(load_config(config, overrides or ()), corpus, parse_version(version), out)
    except TrainingError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if result.stopped:
        raise KeyboardInterrupt


def weights(
    out: Annotated[
        Path | None, typer.Option(help="file to write; training looks in the cache folder by default")
    ] = None,
) -> None:
    """Fetch and verify the published weights of the perceptual loss (553 MB, once)."""
    from jobs.weights import make_weights
    from lrm.losses import default_lpips_path
    from pipeline.spec import FetchSpec

    path = out or default_lpips_path()
    make_weights(path, spec=FetchSpec())
    typer.echo(f"wrote {path}", err=True)


def learn(
    out: Annotated[Path, typer.Option(help="folder for the corpus, the checkpoint and the pictures; resumed")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Does it learn? Render procedural objects, train `tiny` on them, judge it on unseen views and objects."""
    from jobs.learn import as_text, run_learn
    from lrm.train import TrainingError

    try:
        found = run_learn(out, overrides or ())
    except TrainingError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(as_text(found), err=True)
    typer.echo(f"wrote {out / 'unseen_objects.png'}, {out / 'unseen_views.png'}", err=True)
    if as_json:
        typer.echo(json.dumps(found))


VERBS: tuple[Callable[..., None], ...] = (train, weights, learn)
