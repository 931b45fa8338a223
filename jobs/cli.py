"""The command line: one verb a job. Everything else is in the dataset spec, a TOML file.

    lrm-corpus render --spec jobs/specs/demo.toml --corpus out/corpus --shards all
    lrm-corpus publish --corpus out/corpus
    lrm-corpus train --corpus out/corpus --version latest --config tiny --out out/train

What the user can mend ends in one line on stderr and exit status 2: a wrong setting, a store that fails, damaged data.
An interrupt ends in 130.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from pipeline.shard import DamagedDataError
from pipeline.store import StoreError
from pipeline.types import UserError

app = typer.Typer(
    help="Build the multi-view training corpus of a Large Reconstruction Model, and train the model on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a verb of a function; an interrupt inside it is said in one line and ends in exit status 130."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except KeyboardInterrupt:
            typer.echo("\ninterrupted: committed shards and checkpoints stay; run the same command to go on", err=True)
            raise typer.Exit(130) from None

    app.command()(run)
    return function


SpecPath = Annotated[Path, typer.Option("--spec", help="dataset spec, a TOML file; examples in jobs/specs/")]
Corpus = Annotated[str, typer.Option("--corpus", help="a folder, or s3://, gs://, az:// URL")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override one key of the spec, such as render.samples=32; repeatable")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout")]


@command
def render(
    spec: SpecPath,
    corpus: Corpus,
    shards: Annotated[str, typer.Option(help="shards of the frozen plan: all, 7, 0-63 or 3,9")] = "all",
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Render the asked shards on Ray: locally, or on the cluster of RAY_ADDRESS. Running it again is safe."""
    from jobs.build import build
    from pipeline.spec import load_spec

    summary = build(load_spec(spec, overrides or ()), corpus, shards)
    failed = sum(summary.failures.values())
    if summary.shards_done_before == summary.shards_asked:
        typer.echo(f"nothing to do: all {summary.shards_asked} asked shard(s) are committed", err=True)
    typer.echo(
        f"{summary.planned} planned = {summary.samples} samples + {failed} failures "
        f"in {summary.shards_asked} shard(s), {summary.shards_committed} committed now, {summary.elapsed_s:.1f} s",
        err=True,
    )
    for kind, count in sorted(summary.failures.items()):
        typer.echo(f"  {count:6d} {kind}", err=True)
    if as_json:
        typer.echo(json.dumps(summary.as_json()))
    if not summary.accounted:
        raise typer.Exit(1)


@command
def plan(spec: SpecPath, corpus: Corpus, overrides: Overrides = None, as_json: Json = False) -> None:
    """Freeze the plan of a spec, and say what SHARDS= may be; `render` does this by itself."""
    from jobs.build import freeze_plan
    from pipeline.spec import load_spec
    from pipeline.store import open_store

    store = open_store(corpus)
    store.probe()
    frozen = freeze_plan(load_spec(spec, overrides or ()), store)
    last = len(frozen.shards) - 1
    typer.echo(f"plan {frozen.id}: {frozen.num_assets} objects in {last + 1} shard(s), SHARDS=0-{last}", err=True)
    if as_json:
        typer.echo(json.dumps({"plan_set": frozen.id, "objects": frozen.num_assets, "shards": last + 1}))


@command
def calibrate(
    spec: SpecPath,
    overrides: Overrides = None,
    assets: Annotated[int, typer.Option(help="how many of the source's first objects")] = 6,
    views: Annotated[int, typer.Option(help="views of each")] = 3,
    resolution: Annotated[int, typer.Option(help="width and height in pixels")] = 256,
    reference_samples: Annotated[int, typer.Option(help="samples a pixel of the render to compare with")] = 2048,
    as_json: Json = False,
) -> None:
    """Print what samples, denoising and the noise target give and cost, on a dataset's own objects."""
    from jobs import calibrate as job
    from pipeline.spec import load_spec

    rows = job.calibrate(
        load_spec(spec, overrides or ()), num_assets=assets, num_views=views, resolution_px=resolution,
        reference_samples=reference_samples,
    )  # fmt: skip
    typer.echo(job.table(rows))
    if as_json:
        typer.echo(json.dumps(job.as_json(rows)))


@command
def publish(
    corpus: Corpus,
    spec: Annotated[Path | None, typer.Option("--spec", help="publish this spec's plan only, by its rules")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Make a version of what is committed, after checking that every shard is there. Versions never change."""
    from pipeline import plan as plans
    from pipeline import version
    from pipeline.spec import load_spec
    from pipeline.store import open_store
    from render import producer

    if overrides and spec is None:
        raise UserError(f"--set {overrides[0]!r} needs --spec: settings change a spec, and publish took none")
    store = open_store(corpus, must_exist=True)
    store.probe()
    loaded = None
    if spec is None:
        chosen = version.plan_sets(store)
    else:
        loaded = load_spec(spec, overrides or ())
        try:
            chosen = [plans.load(store, loaded.plan_set_id(loaded.fingerprint(producer())))]
        except FileNotFoundError:
            raise UserError(
                f"corpus {corpus}: spec {spec} has no plan here under these settings; give the SET= that it was "
                f"rendered with, or run `make render SPEC={spec}` first"
            ) from None
    published, new = version.publish(store, chosen, loaded)
    counts = published.counts
    word = "published version" if new else "nothing changed since version"
    typer.echo(
        f"{word} {published.number}: {counts['samples']} samples, {counts['views']} views, "
        f"{sum(counts['failures'].values())} failures, {counts['heldout']} held out",
        err=True,
    )
    if counts["shards_committed"] < counts["shards_planned"]:
        typer.echo(
            f"  holds {counts['shards_committed']} of {counts['shards_planned']} planned shards; "
            "`make status` names the missing ones",
            err=True,
        )
    if as_json:
        record = {"version": published.number, "digest": published.digest, "new": new, "counts": counts}
        typer.echo(json.dumps(record))


@command
def status(corpus: Corpus, as_json: Json = False) -> None:
    """Tell where a corpus stands, from its receipts alone."""
    from jobs.status import corpus_status, status_text
    from pipeline.store import open_store

    found = corpus_status(open_store(corpus, must_exist=True))
    typer.echo(status_text(found), err=as_json)
    if as_json:
        typer.echo(json.dumps(found))


@command
def report(
    corpus: Corpus,
    out: Annotated[Path, typer.Option(help="folder for report.html and its pictures")],
    version: Annotated[str, typer.Option(help="a number, or latest")] = "latest",
) -> None:
    """Draw a version: contact sheet, cameras around the object, counts and failures, as one static page."""
    from pipeline.reader import VersionReader
    from pipeline.report import write_report
    from pipeline.version import parse_version

    page = write_report(VersionReader.open(corpus, parse_version(version)), out)
    typer.echo(f"wrote {page}", err=True)


@command
def train(
    corpus: Corpus,
    out: Annotated[Path, typer.Option(help="folder for checkpoints and metrics; an existing one is resumed")],
    version: Annotated[str, typer.Option(help="a number, or latest")] = "latest",
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


@command
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


@command
def demo(out: Annotated[Path, typer.Option(help="folder for the corpus, the checkpoint and report.html")]) -> None:
    """Run the main job small: 12 procedural objects, 2 shards, a version, a training run, report.html."""
    from jobs.demo import run_demo

    run_demo(out)


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _interrupt)
    # Idle OpenMP threads that spin take the cores from Blender and from the loader: 6 s a step instead of 0.25 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("pipeline", "render", "lrm", "jobs"):  # ours only: libraries keep their own counsel
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(handler)
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (StoreError, DamagedDataError, OSError) as error:
        typer.echo(f"error: {str(error).splitlines()[0] if str(error) else type(error).__name__}", err=True)
        sys.exit(2)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
