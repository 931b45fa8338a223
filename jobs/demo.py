"""`make demo`: the main job, small, on the embedded source. Ends with a page of pictures.

Every stage is the real one: Ray, Blender, shards, a version, the streaming loader, the trainer. Only the numbers are
small. Running it again reuses what is there.
"""

from __future__ import annotations

import time
from pathlib import Path

import typer

from jobs.build import build
from lrm.config import load_config
from lrm.preview import write_loss_curve, write_predictions
from lrm.train import train
from pipeline import version
from pipeline.reader import VersionReader
from pipeline.report import Section, write_report
from pipeline.spec import load_spec
from pipeline.store import open_store

SPEC = Path(__file__).parent / "specs" / "demo.toml"
STEPS = 600


def run_demo(out_dir: Path) -> Path:
    """Render, publish, train and report into a folder; return the path of report.html."""
    begun = time.monotonic()
    corpus = str(out_dir / "corpus")
    _say("1/4 render: 12 procedural objects, 32 views each, in 2 shards")
    summary = build(load_spec(SPEC), corpus)
    if summary.shards_committed == 0:
        _say("    nothing to do: both shards are committed")
    _say(f"    {summary.planned} planned = {summary.samples} samples + {sum(summary.failures.values())} failures")
    store = open_store(corpus)
    published, new = version.publish(store, version.plan_sets(store))
    _say(f"2/4 publish: version {published.number}{'' if new else ' (unchanged)'}, {published.counts['views']} views")
    _say("3/4 train: a tiny LRM, streamed from the shards by ranged reads")
    result = train(load_config("tiny", [f"train.steps={STEPS}"]), corpus, published.number, out_dir / "train")
    if result.stopped:
        raise KeyboardInterrupt
    _say("4/4 report")
    reader = VersionReader.open(corpus, published.number)
    section = training_section(reader, out_dir / "train", out_dir)
    page = write_report(reader, out_dir, [section])
    _say(f"done in {time.monotonic() - begun:.0f} s: open {page}")
    return page


def training_section(reader: VersionReader, train_dir: Path, out_dir: Path) -> Section:
    """Draw the loss curve and predictions of a training run, as a part of the report."""
    write_loss_curve(train_dir / "metrics.jsonl", out_dir / "loss.png")
    found = write_predictions(train_dir, reader, out_dir / "predictions.png", num_objects=6)
    table = [
        ("steps", found["step"]),
        ("PSNR of predicted novel views", f"{found['psnr_db']:.2f} dB"),
        ("PSNR of the mean training view", f"{found['baseline_psnr_db']:.2f} dB"),
    ]
    images = [
        ("loss.png", "training loss"),
        (
            "predictions.png",
            "a line an object: the input view, then pairs of true and predicted views it was not given",
        ),
    ]
    text = (
        f"A tiny model after {STEPS} steps, about two minutes of CPU: place, size and main colour of an object "
        "show, its detail does not. The larger presets in lrm/configs/ are for GPUs."
    )
    return Section(title="Training", text=text, images=images, table=table)


def _say(text: str) -> None:
    typer.echo(text, err=True)
