"""The verbs of the model: what is run on a corpus once it is there. `jobs.cli` makes commands of them, in this order.

Plain functions with typer's annotations: this file needs no application object, so it imports nothing of `jobs.cli`.
Heavy packages (torch, transformers) are imported by the verb that runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Corpus, Json, VersionText
from pipeline.types import UserError

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="override one setting of the config, such as train.steps=500; repeatable"),
]
Rules = Annotated[
    list[str] | None,
    typer.Option("--set", help="override one rule of the protocol, such as max_objects=20; repeatable"),
]
Mesh = Annotated[
    list[str] | None, typer.Option("--set", help="override one setting, such as resolution=384; repeatable")
]


def train(
    corpus: Corpus,
    out: Annotated[Path, typer.Option(help="folder for checkpoints and metrics; an existing one is resumed")],
    version: VersionText = "latest",
    config: Annotated[str, typer.Option(help="tiny, small, paper, or a TOML file")] = "tiny",
    workers: Annotated[int, typer.Option(help="processes on the cluster of RAY_ADDRESS; 0 takes one a GPU")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what the run is and will cost; start nothing")
    ] = False,
    overrides: Settings = None,
    as_json: Json = False,
) -> None:
    """Train an LRM on a version, here or by Ray Train on RAY_ADDRESS; resumes from the newest checkpoint in --out."""
    from lrm.config import load_config
    from lrm.train import TrainingError, dry_run_text
    from lrm.train import train as run
    from pipeline.version import parse_version

    settings, number, address = (
        load_config(config, overrides or ()),
        parse_version(version),
        os.environ.get("RAY_ADDRESS"),
    )
    if dry_run:
        text, told = dry_run_text(settings, corpus, number, max(1, workers))
        typer.echo(text, err=True)
        if as_json:
            typer.echo(json.dumps(told))
        return
    if workers and not address:
        raise UserError(
            f"WORKERS={workers} needs RAY_ADDRESS=host:port of a Ray cluster; on one machine say torchrun "
            f"--nproc-per-node {workers} -m lrm.train, with the same options"
        )
    try:
        if address:
            from jobs.train import joined, train_on_ray

            with joined(address):
                result = train_on_ray(settings, corpus, number, out, workers=workers)
        else:
            result = run(settings, corpus, number, out)
    except TrainingError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
    if result.stopped:
        raise KeyboardInterrupt


def export(
    checkpoint: Annotated[Path, typer.Option(help="folder that training wrote, or one checkpoint in it")],
    out: Annotated[Path, typer.Option(help="safetensors file to write")],
) -> None:
    """Write a checkpoint's weights, averaged ones where it has some, as one safetensors file."""
    from lrm.checkpoint import export_weights

    typer.echo(f"wrote {out}, {export_weights(checkpoint, out)} bytes", err=True)


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


def evaluate(
    checkpoint: Annotated[Path, typer.Option(help="folder that training wrote")],
    corpus: Corpus,
    out: Annotated[Path, typer.Option(help="folder for objects.parquet, table.txt, evaluation.json, examples.png")],
    version: VersionText = "latest",
    overrides: Rules = None,
    as_json: Json = False,
) -> None:
    """Measure a checkpoint on the objects that a version holds out: PSNR, SSIM, LPIPS, CLIP, FID, Chamfer, F-score."""
    from lrm.evaluate import eval_config
    from lrm.evaluate import evaluate as run
    from pipeline.version import parse_version

    result = run(checkpoint, corpus, parse_version(version), out, eval_config(overrides or ()))
    typer.echo(result.as_text(), err=True)
    if as_json:
        typer.echo(json.dumps(result.as_json()))


def infer(
    image: Annotated[Path, typer.Option(help="a picture, or a folder of pictures")],
    checkpoint: Annotated[Path, typer.Option(help="folder that training wrote")],
    out: Annotated[Path, typer.Option(help="folder for a folder a picture: mesh, film, views")],
    overrides: Mesh = None,
    as_json: Json = False,
) -> None:
    """Make a textured mesh (GLB), a turntable (MP4, GIF) and views of a picture, or of each of a folder."""
    from lrm.infer import infer as run
    from lrm.infer import infer_config

    done = run(image, checkpoint, out, infer_config(overrides or ()))
    typer.echo(done.as_text(), err=True)
    for one in done.pictures:
        said = f"{one.vertices} vertices, {one.faces} faces: {out / one.name}"
        typer.echo(f"error: {one.failure}" if one.failure else f"  {one.name}: {said}", err=True)
    if as_json:
        typer.echo(json.dumps(done.as_json()))
    if done.failed:
        raise typer.Exit(1)


def learn(
    out: Annotated[Path, typer.Option(help="folder for the corpus, the checkpoint and the pictures; resumed")],
    overrides: Settings = None,
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


VERBS: tuple[Callable[..., None], ...] = (train, learn, export, weights, evaluate, infer)
