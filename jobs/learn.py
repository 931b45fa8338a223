"""`make learn`: does it learn? The whole chain on the embedded source, judged on what the model has not seen.

    render    procedural objects, cached in OUT/corpus: jobs/specs/learn.toml through the same job as `make dataset`
    train     the preset `tiny` on the first views of the objects that are not held out, from checkpoints in OUT/train
    measure   PSNR on unseen views and on unseen objects, beside two guesses (`lrm.learn`), and pictures of both

Every stage goes on from what is there, so a second run that finds all of it done only measures. The road not taken is
a time limit on training: the learning rate falls to zero over `train.steps`, so a number of steps is what can be
repeated, and `SET="train.steps=1000 source.num_objects=128"` makes it shorter.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from jobs.dataset import make_dataset
from jobs.produce import Producer
from lrm.checkpoint import load_model
from lrm.config import load_config
from lrm.learn import Protocol, mean_view, measure, write_lines
from lrm.preview import write_loss_curve
from lrm.train import train
from pipeline.reader import VersionReader
from pipeline.spec import load_spec

SPEC = Path(__file__).parent / "specs" / "learn.toml"
SETTINGS = ("data.max_views=16", "train.steps=3500", "train.checkpoint_every_steps=250", "train.log_every_steps=25")
"""What this run changes of `tiny`: four views of each object stay unseen, and it goes on for longer."""

RUN_SECTIONS = ("model", "data", "train")
"""Sections of settings that belong to the training run; the others are the dataset spec's."""

SHOWN = 16
"""Objects in each picture."""


def run_learn(
    out_dir: Path,
    overrides: Iterable[str] = (),
    *,
    spec_path: Path = SPEC,
    protocol: Protocol | None = None,
    produce: Producer | None = None,
) -> dict[str, Any]:
    """Render, train and measure in a folder; returns the JSON object of the result.

    Args:
        out_dir: gets corpus/, train/, unseen_objects.png, unseen_views.png and loss.png.
        overrides: `section.key=value` settings of the training run and of the spec.
        spec_path: dataset spec, which must hold some objects out and have more views than data.max_views.
        protocol: what is measured; default at the size of the views.
        produce: what turns an asset into a sample, default Blender; tests pass one without.

    Raises:
        UserError: in one line, for what the user can mend.
        KeyboardInterrupt: if a signal ended a stage; the same call goes on from there.
    """
    begun = time.monotonic()
    of_run, of_spec = split_overrides(overrides)
    config, spec = load_config("tiny", (*SETTINGS, *of_run)), load_spec(spec_path, of_spec)
    corpus = str(out_dir / "corpus")
    _say("1/3 render: procedural objects, seen whole")
    version = make_dataset(spec, corpus, produce=produce, say=_say).version
    assert version is not None  # only a dry run publishes none
    rendered = time.monotonic()
    reader = VersionReader.open(corpus, version.number)
    held_out = version.counts["heldout"]
    _say(f"2/3 train: {len(reader) - held_out} objects, {config.data.max_views} views each; {held_out} objects unseen")
    result = train(config, corpus, version.number, out_dir / "train")
    if result.stopped:
        raise KeyboardInterrupt
    trained = time.monotonic()
    _say("3/3 measure")
    protocol = protocol or Protocol(image_px=spec.render.resolution_px)
    model, config, state = load_model(out_dir / "train")
    mean = mean_view(reader, config.data.max_views, protocol)
    objects, object_lines = measure(model, config, reader, mean, protocol, heldout=True)
    views, view_lines = measure(model, config, reader, mean, protocol, heldout=False)
    write_lines(object_lines[:SHOWN], out_dir / "unseen_objects.png")
    write_lines(view_lines[:SHOWN], out_dir / "unseen_views.png")
    write_loss_curve(out_dir / "train" / "metrics.jsonl", out_dir / "loss.png")
    return {
        "psnr_unseen_objects_db": objects.psnr_db,
        "psnr_unseen_views_db": views.psnr_db,
        "baseline_mean_db": objects.baseline_mean_db,
        "baseline_copy_db": objects.baseline_copy_db,
        "steps": int(state["step"]),
        "elapsed_s": round(time.monotonic() - begun, 1),
        "render_s": round(rendered - begun, 1),
        "train_s": round(trained - rendered, 1),
        "train_objects": len(reader) - held_out,
        "unseen_objects": asdict(objects),
        "unseen_views": asdict(views),
        "image_px": protocol.image_px,
        "parameters": model.parameter_counts().total,
    }


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the settings of the training run, and those of the dataset spec."""
    both: tuple[list[str], list[str]] = ([], [])
    for item in overrides:
        both[item.partition(".")[0] not in RUN_SECTIONS].append(item)
    return both


def as_text(found: dict[str, Any]) -> str:
    """Tell the result in a few lines."""
    lines = [f"{'PSNR, dB':16s}{'predicted':>10s}{'mean view':>11s}{'input copied':>14s}"]
    for name in ("unseen_objects", "unseen_views"):
        s = found[name]
        values = f"{s['psnr_db']:10.2f}{s['baseline_mean_db']:11.2f}{s['baseline_copy_db']:14.2f}"
        lines.append(f"{name.replace('_', ' '):16s}{values}   ({s['objects']} objects, {s['pairs']} views predicted)")
    return "\n".join(lines)


def _say(text: str) -> None:
    typer.echo(text, err=True)
