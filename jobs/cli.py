"""The command line: one verb a job. Everything else is in the dataset spec, a TOML file.

    lrm-corpus render --spec jobs/specs/demo.toml --corpus out/corpus --shards all
    lrm-corpus ingest --spec jobs/specs/mvimgnet.toml --corpus out/corpus
    lrm-corpus publish --corpus out/corpus
    lrm-corpus train --corpus out/corpus --version latest --config tiny --out out/train

What the user can mend ends in one line on stderr and exit status 2: a wrong setting, a store that fails, damaged data.
An interrupt ends in 130.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import logs, verbs_lrm, verbs_watch
from jobs.options import Corpus, Deep, Json, Overrides, SpecPath, VersionText
from pipeline.shard import DamagedDataError
from pipeline.store import StoreError
from pipeline.types import UserError

if TYPE_CHECKING:
    from pipeline.version import Version

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


Shards = Annotated[str, typer.Option(help="shards of the frozen plan: all, 7, 0-63, 3,9, or a part of them: all:2/64")]
PlanName = Annotated[str | None, typer.Option("--plan", help="a frozen plan by name, such as a delta")]


@command
def render(
    spec: SpecPath,
    corpus: Corpus,
    shards: Shards = "all",
    plan_set: PlanName = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Render the asked shards on Ray: locally, or on the cluster of RAY_ADDRESS. Running it again is safe."""
    _build(spec, corpus, shards, plan_set, overrides, as_json, captured=False)


@command
def ingest(
    spec: SpecPath,
    corpus: Corpus,
    shards: Shards = "all",
    plan_set: PlanName = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Ingest the asked shards of a spec of photographs, on Ray as `render`. Running it again is safe."""
    _build(spec, corpus, shards, plan_set, overrides, as_json, captured=True)


def _build(
    path: Path,
    corpus: str,
    shards: str,
    plan_set: str | None,
    overrides: list[str] | None,
    as_json: bool,
    *,
    captured: bool,
) -> None:
    from jobs.build import build
    from pipeline.spec import load_spec

    spec = load_spec(path, overrides or ())
    if spec.is_captured is not captured:
        holds, verb = ("photographs", "ingest") if spec.is_captured else ("3D assets", "render")
        raise UserError(f"spec {path}: source {spec.source.kind} holds {holds}; use `make {verb} SPEC={path}`")
    summary = build(spec, corpus, shards, plan_set=plan_set)
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
def plan(
    spec: SpecPath,
    corpus: Corpus,
    delta: Annotated[bool, typer.Option(help="plan what `dataset` would make, and say what that is")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Freeze the plan of a spec, and say what SHARDS= may be; `render` does this by itself."""
    from jobs.build import freeze_plan
    from jobs.dataset import plan_delta
    from pipeline.spec import load_spec
    from pipeline.store import open_store

    loaded = load_spec(spec, overrides or ())
    if delta:
        frozen = plan_delta(loaded, corpus, _say)
    else:
        store = open_store(corpus)
        store.probe()
        frozen = freeze_plan(loaded, store)
    if frozen is None:
        typer.echo("nothing is lacking: no plan was frozen", err=True)
    else:
        last = len(frozen.shards) - 1
        typer.echo(f"plan {frozen.id}: {frozen.num_assets} objects in {last + 1} shard(s), SHARDS=0-{last}", err=True)
    if as_json:
        names = ("plan_set", "objects", "shards")
        values = (frozen.id, frozen.num_assets, len(frozen.shards)) if frozen else (None, 0, 0)
        typer.echo(json.dumps(dict(zip(names, values))))


@command
def dataset(
    spec: SpecPath,
    corpus: Corpus,
    dry_run: Annotated[bool, typer.Option(help="say what would be made, and make nothing")] = False,
    deep: Deep = False,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Bring a corpus to what a spec says: make what it lacks, retry what may end otherwise, and publish."""
    from jobs.dataset import dump, make_dataset
    from pipeline.spec import load_spec

    done = make_dataset(load_spec(spec, overrides or ()), corpus, dry_run=dry_run, deep=deep, say=_say)
    if done.version is not None:
        _say(version_text(done.version, done.new))
    if as_json:
        typer.echo(dump(done))
    if done.summary is not None and not done.summary.accounted:
        raise typer.Exit(1)


@command
def retry(
    spec: SpecPath,
    corpus: Corpus,
    kind: Annotated[str, typer.Option(help="kinds of failure, such as render_timeout,network; status counts them")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Try again what failed with these kinds; publish afterwards. Receipts stay as they are."""
    from jobs.dataset import dump
    from jobs.dataset import retry as run
    from pipeline.rebuild import parse_kinds
    from pipeline.spec import load_spec

    done = run(load_spec(spec, overrides or ()), corpus, parse_kinds(kind), say=_say)
    if done.summary is not None:
        failed = sum(done.summary.failures.values())
        _say(f"{done.summary.samples} became samples, {failed} failed again; `make dataset` or `make publish` next")
    if as_json:
        typer.echo(dump(done))


def _say(text: str) -> None:
    typer.echo(text, err=True)


@command
def check_captures(
    spec: SpecPath,
    out: Annotated[Path, typer.Option(help="folder for checks.html, checks.json and their pictures")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Run the checks alone over an archive of photographs, and draw what they reject and why."""
    from jobs import check as job
    from pipeline.capture_checks import ACCEPTED
    from pipeline.spec import load_spec

    checks, page = job.check_captures(load_spec(spec, overrides or ()), out, num_workers=os.cpu_count() or 1)
    counts = Counter(check.kind for check in checks)
    for kind, count in sorted(counts.items(), key=lambda item: (item[0] != ACCEPTED, -item[1], item[0])):
        typer.echo(f"  {count:6d} {kind}", err=True)
    typer.echo(f"wrote {page}", err=True)
    if as_json:
        typer.echo(json.dumps({"captures": len(checks), "counts": dict(sorted(counts.items())), "page": str(page)}))


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
    spec: Annotated[Path | None, typer.Option("--spec", help="publish this spec's plans only, by its rules")] = None,
    deep: Deep = False,
    overrides: Overrides = None,
    public: Annotated[bool, typer.Option(help="mark the store as one that anybody can read, for good")] = False,
    as_json: Json = False,
) -> None:
    """Make a version of what is committed, after checking that every shard is there. Versions never change."""
    from jobs.produce import producer_of
    from pipeline import version
    from pipeline.listing import Listing
    from pipeline.spec import load_spec
    from pipeline.store import open_store

    if overrides and spec is None:
        raise UserError(f"--set {overrides[0]!r} needs --spec: settings change a spec, and publish took none")
    store = open_store(corpus, must_exist=True)
    store.probe()
    if public:
        version.mark_public(store)
    chosen, loaded, table = version.plan_sets(store), None, None
    if spec is not None:
        loaded = load_spec(spec, overrides or ())
        chosen, table = version.plans_of(chosen, loaded, loaded.fingerprint(producer_of(loaded)[1]))
        if not chosen:
            raise UserError(
                f"corpus {corpus}: spec {spec} has no plan here under these settings; give the SET= that it was "
                f"rendered with, or run `make render SPEC={spec}` first"
            )
    listing = None if table is None else Listing.of(table)
    published, new = version.publish(store, chosen, loaded, listing=listing, deep=deep)
    counts = published.counts
    _say(version_text(published, new))
    if counts["shards_committed"] < counts["shards_planned"]:
        typer.echo(
            f"  holds {counts['shards_committed']} of {counts['shards_planned']} planned shards; "
            "`make status` names the missing ones",
            err=True,
        )
    if as_json:
        record = {"version": published.number, "digest": published.digest, "new": new, "counts": counts}
        typer.echo(json.dumps(record))


def version_text(published: Version, new: bool) -> str:
    """Tell what a version holds in a line."""
    counts, word = published.counts, "published version" if new else "nothing changed since version"
    return (
        f"{word} {published.number}: {counts['samples']} samples, {counts['views']} views, "
        f"{sum(counts['failures'].values())} failures, {counts['heldout']} held out"
    )


@command
def diff(
    corpus: Corpus,
    a: Annotated[str, typer.Option("--a", help="the older version, a number")],
    b: Annotated[str, typer.Option("--b", help="the younger version, a number or latest")] = "latest",
    out: Annotated[Path | None, typer.Option(help="write every object that differs into this JSON file")] = None,
    as_json: Json = False,
) -> None:
    """Tell what changed between two versions, by object, and what a reader must fetch anew."""
    from pipeline import diff as differences
    from pipeline.store import open_store
    from pipeline.version import open_version, parse_version

    store = open_store(corpus, must_exist=True)
    versions = [open_version(store, parse_version(text)) for text in (a, b)]
    found = differences.diff(store, *versions)
    typer.echo(differences.as_text(found), err=True)
    if out is not None:
        out.write_text(json.dumps(found.as_json(), indent=1) + "\n", encoding="utf-8")
        typer.echo(f"wrote {out}", err=True)
    if as_json:
        typer.echo(json.dumps(found.as_json(limit=1000)))


@command
def verify(corpus: Corpus, version: VersionText = "latest", deep: Deep = False, as_json: Json = False) -> None:
    """Check that all that a version names is there and is what was written; exit status 1 if not."""
    from pipeline.store import open_store
    from pipeline.verify import as_json as found_json
    from pipeline.version import parse_version, verify_version

    found = verify_version(open_store(corpus, must_exist=True), parse_version(version), deep=deep)
    for problem in found.problems[:20]:
        typer.echo(f"  {problem}", err=True)
    what = f"{found.shards} shards, {found.digested} digested, {found.decoded_samples} samples decoded"
    typer.echo(f"{len(found.problems)} problem(s): {what}", err=True)
    if as_json:
        typer.echo(json.dumps(found_json(found)))
    if found.problems:
        raise typer.Exit(1)


@command
def tombstone(
    corpus: Corpus,
    uid: Annotated[str, typer.Option(help="uids to withdraw, separated by commas")],
    as_json: Json = False,
) -> None:
    """Withdraw objects: the next version, made now, and all later ones leave them out."""
    from pipeline.store import open_store
    from pipeline.version import tombstone as withdraw

    store = open_store(corpus, must_exist=True)
    store.probe()
    uids = [part.strip() for part in uid.split(",") if part.strip()]
    if not uids:
        raise UserError("UID is empty; give the uids of a version's objects, separated by commas")
    published, new = withdraw(store, uids)
    _say(version_text(published, new))
    if as_json:
        record = {"version": published.number, "new": new, "tombstones": sorted(published.tombstones)}
        typer.echo(json.dumps(record))


@command
def compact(
    corpus: Corpus,
    dead: Annotated[float, typer.Option(min=0, max=1, help="rewrite shards with a larger share of dead bytes")] = 0.5,
    as_json: Json = False,
) -> None:
    """Copy live samples out of shards full of dead ones, without rendering, into the next version."""
    from pipeline import compact as compaction
    from pipeline.store import open_store

    store = open_store(corpus, must_exist=True)
    store.probe()
    done = compaction.compact(store, dead_share=dead)
    _say(compaction.as_text(done))
    if as_json:
        typer.echo(json.dumps(done.as_json()))


@command
def gc(
    corpus: Corpus,
    grace_s: Annotated[float, typer.Option(min=0, help="seconds; whatever is younger stays; longer than any job")] = (
        7 * 24 * 3600.0
    ),
    delete: Annotated[bool, typer.Option(help="delete what was found; default is to list it")] = False,
    as_json: Json = False,
) -> None:
    """List shards, receipts and manifests that nothing names and that are older than the grace; delete if asked."""
    from pipeline import garbage
    from pipeline.store import open_store

    found = garbage.collect(open_store(corpus, must_exist=True), grace_s=grace_s, delete=delete)
    _say(garbage.as_text(found))
    if as_json:
        typer.echo(json.dumps(found.as_json()))


for verb in verbs_watch.VERBS:
    command(verb)


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


for verb in verbs_lrm.VERBS:  # here, so that --help tells the verbs in the order of the work
    command(verb)


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
    try:
        logs.setup()
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("pipeline", "render", "lrm", "jobs"):
            raise
        typer.echo(
            f"error: this needs the package {package}, which is not installed here: pip install 'lrm-corpus[render]' "
            "to make corpora, 'lrm-corpus[train]' to train on them",
            err=True,
        )
        sys.exit(2)
    except (StoreError, DamagedDataError, OSError) as error:
        typer.echo(f"error: {str(error).splitlines()[0] if str(error) else type(error).__name__}", err=True)
        sys.exit(2)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
