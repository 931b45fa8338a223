"""The training loop: resumable at any point, the same numbers whether it was interrupted or not.

    python -m lrm.train --corpus FOLDER_OR_URL --version latest --config tiny --out runs/a --set train.steps=100
    torchrun --nproc-per-node 8 -m lrm.train --config paper ...

Everything random is a function of (seed, step, rank) or of the sample's position, so that a run that was killed and
started again goes on from its newest checkpoint and logs the losses it would have logged. SIGTERM, SIGINT, or a file
called `stop` in the run's folder finish the step, save, and stop; a second signal stops at once. Checkpoints are
written while training goes on (`lrm.checkpoint`); a run that ends has its last one on the disk.

Past `max_skipped_steps` steps without a finite gradient the run ends. Ranks share `out_dir`; the first one writes
metrics and pictures, all write checkpoints.

On a machine with other work, OpenMP's spinning threads can make a CPU step 20 times slower with 2 threads than with 1
(measured: 6 s against 0.25 s for `tiny`); OMP_WAIT_POLICY=PASSIVE in the environment cures it.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from lrm.checkpoint import (
    WEIGHTS_NAME,
    Checkpoint,
    Saver,
    export_weights,
    newest_checkpoint,
    remove_strays,
)
from lrm.config import RunConfig, load_config
from lrm.data import Loader, open_reader
from lrm.losses import load_lpips, psnr_db
from lrm.metrics import Clock, Recorder, check_recorders
from lrm.optim import learning_rate
from lrm.parallel import fast_attention
from lrm.preview import HeldOut
from lrm.ranks import Ranks, joined_ranks
from lrm.trainer import Trainer, TrainingError, build_model
from pipeline.reader import DamagedDataError
from pipeline.store import StoreError
from pipeline.types import UserError
from pipeline.version import parse_version

__all__ = ["STOP_NAME", "TrainResult", "Trainer", "TrainingError", "build_model", "main", "stop_signals", "train"]

log = logging.getLogger(__name__)

STOP_NAME = "stop"
"""A file of this name in the run's folder stops it like SIGTERM does, from any machine that sees the folder."""

STOP_POLL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
        step: steps done in the run, earlier calls included.
        steps_now: steps done in this call.
        loss: mean loss since the last logged step, or of it; None if this call did no step.
        seconds: wall time of this call's steps.
        stopped: whether a signal ended it before the last step.
    """

    step: int
    steps_now: int
    loss: float | None
    seconds: float
    stopped: bool


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Set the event on SIGTERM or SIGINT while inside; a second signal raises KeyboardInterrupt.

    Outside the main thread no handler can be set, and the event stays clear.
    """
    event = threading.Event()

    def handle(number: int, _: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        log.warning("%s: stopping after this step", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Run:
    """The steps of a call of `train`, and what happens between them."""

    def __init__(self, trainer: Trainer, saver: Saver, out_dir: Path, heldout: HeldOut | None, stop: threading.Event):
        self.trainer, self.saver, self.out_dir, self.heldout, self.stop = trainer, saver, out_dir, heldout, stop
        self.config, self.ranks = trainer.config.train, trainer.ranks
        self.clock = Clock(trainer.loader.stats, trainer.config, trainer.ranks)
        self.recorder = Recorder(out_dir, trainer.config, trainer.step) if trainer.ranks.is_first else None
        self.loss: float | None = None
        self._polled_s = 0.0

    def steps(self) -> bool:
        """Take the steps that are left; returns whether a signal ended them early."""
        trainer, config, stopped = self.trainer, self.config, False
        bar = tqdm(
            total=config.steps, initial=trainer.step, disable=not self.ranks.is_first, desc="train", unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip
        with bar:
            while trainer.step < config.steps and not stopped:
                rate = learning_rate(trainer.step, config)
                norm = trainer.train_step(next(trainer.loader))
                bar.update()
                measured = self._look()
                if trainer.step % config.log_every_steps == 0 or trainer.step == config.steps or measured:
                    self._log({"lr": rate, "grad_norm": norm} | measured)
                    bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
                stopped = self.ranks.any(self._asked_to_stop())
                if trainer.step % config.checkpoint_every_steps == 0 or stopped or trainer.step == config.steps:
                    self.saver.save(trainer.tensors(), trainer.state())
        self.saver.wait()
        return stopped and trainer.step < config.steps

    def _log(self, more: dict[str, Any]) -> None:
        trainer = self.trainer
        means = []
        for window in (trainer.window, trainer.mse_window):
            means.append(sum(window) / len(window) if window else math.nan)
            window.clear()
        self.loss = means[0]
        line = {"step": trainer.step, "loss": means[0], "psnr": psnr_db(means[1])} | more
        if self.recorder is not None:
            self.recorder.write(line | self.clock.read() | {"skipped": trainer.skipped})

    def _look(self) -> dict[str, float]:
        """Measure and draw held-out objects where this step asks for it; all ranks take part."""
        step, config = self.trainer.step, self.config
        measure = config.heldout_every_steps and step % config.heldout_every_steps == 0
        draw = config.pictures_every_steps and step % config.pictures_every_steps == 0
        if self.heldout is None or not (measure or draw):
            return {}
        start_s = time.perf_counter()
        psnr, sheet = self.heldout.look(self.trainer.model)
        if draw and self.recorder is not None:
            path = self.heldout.write(self.out_dir / "pictures" / f"step-{step:08d}.png", sheet)
            self.recorder.draw(step, path, sheet)
        self.clock.leave_out(time.perf_counter() - start_s)
        return {f"psnr_{self.heldout.split}": psnr} if measure else {}

    def _asked_to_stop(self) -> bool:
        if self.ranks.is_first and time.monotonic() - self._polled_s > STOP_POLL_S:
            self._polled_s = time.monotonic()
            path = self.out_dir / STOP_NAME
            if path.exists():
                path.unlink(missing_ok=True)
                log.warning("%s: stopping after this step", path)
                self.stop.set()
        return self.stop.is_set()

    def close(self) -> None:
        """Let go of what the run writes to."""
        if self.recorder is not None:
            self.recorder.close()


def _share_folder(out_dir: Path, ranks: Ranks) -> None:
    """Make the run's folder, clear it of what a killed run left, and check that all ranks see the same one.

    Raises:
        UserError: naming the rank that does not.
    """
    probe = None
    if ranks.is_first:
        out_dir.mkdir(parents=True, exist_ok=True)
        remove_strays(out_dir)
        (out_dir / STOP_NAME).unlink(missing_ok=True)
        probe = out_dir / f".seen-{uuid.uuid4().hex}"
        probe.touch()
    path = ranks.from_first(probe)
    seen = path.exists()
    if ranks.any(not seen):
        if probe is not None:
            probe.unlink(missing_ok=True)
        raise UserError(
            f"{out_dir} is not one folder for all {ranks.size} ranks (rank {ranks.rank} "
            f"{'sees' if seen else 'does not see'} it); name one on a file system that all nodes share"
        )
    ranks.barrier()
    if probe is not None:
        probe.unlink(missing_ok=True)


def _newest(out_dir: Path, ranks: Ranks) -> Checkpoint | None:
    """Return the checkpoint that all ranks resume from: the newest whole one that the first rank finds."""
    found: Checkpoint | UserError | None = None
    if ranks.is_first:
        try:
            found = newest_checkpoint(out_dir)
        except UserError as error:  # told on every rank, or the others would wait for the first
            found = error
    found = ranks.from_first(found)
    if isinstance(found, UserError):
        raise found
    return found


def train(config: RunConfig, corpus: str, version: int | None, out_dir: str | os.PathLike[str]) -> TrainResult:
    """Train on a version of a corpus until `train.steps`, resuming from the newest checkpoint in `out_dir`.

    Sets torch's number of CPU threads for the process.

    Args:
        config: the run.
        corpus: folder or URL.
        version: number, or None for the newest; a resumed run must name the version it began on, if that is older.
        out_dir: folder for checkpoints and metrics.jsonl, shared by all ranks.

    Raises:
        UserError: for what the user can put right.
        DamagedDataError: past data.max_damaged_samples.
        TrainingError: past train.max_skipped_steps.
    """
    out = Path(out_dir)
    torch.set_num_threads(config.train.num_threads or os.cpu_count() or 1)
    check_recorders(config)
    lpips = load_lpips(config.train)
    reader = open_reader(corpus, version, config.data)
    with stop_signals() as stop, joined_ranks(config.train.device) as ranks, fast_attention(ranks.device):
        if config.train.batch_size % ranks.size:  # gradients are averaged over ranks as equals
            raise UserError(
                f"train.batch_size {config.train.batch_size} must divide by the {ranks.size} ranks of this run"
            )
        _share_folder(out, ranks)
        saved = _newest(out, ranks)
        loader = Loader(
            reader,
            config.data,
            image_px=config.model.encoder.image_px,
            batch_size=config.train.batch_size,
            rank=ranks.rank,
            ranks=ranks.size,
        )
        with loader, Saver(out, config.train.keep_checkpoints, ranks) as saver:
            trainer = Trainer(config, loader, reader.digest, ranks, saved, lpips)
            first_step = trainer.step
            if first_step >= config.train.steps:
                log.info("%s: all %d steps are done; nothing to do", out, config.train.steps)
                return TrainResult(step=first_step, steps_now=0, loss=None, seconds=0.0, stopped=False)
            if ranks.is_first:
                log.info(
                    "version %d (%d samples, %d an epoch), %s on %s x %d, step %d of %d; %s",
                    reader.number, len(reader), len(loader.order), config.train.precision, ranks.device, ranks.size,
                    first_step, config.train.steps, trainer.model.parameter_counts(),
                )  # fmt: skip
            start_s = time.perf_counter()
            with closing(_Run(trainer, saver, out, HeldOut.of(reader, config, ranks), stop)) as run:
                stopped = run.steps()
            seconds = time.perf_counter() - start_s
    if ranks.is_first and not stopped:
        export_weights(out, out / WEIGHTS_NAME)
    return TrainResult(
        step=trainer.step, steps_now=trainer.step - first_step, loss=run.loss, seconds=seconds, stopped=stopped
    )


def dry_run_text(config: RunConfig, corpus: str, version: int | None, ranks: int = 1) -> tuple[str, dict[str, Any]]:
    """Return what a run is and will cost, as lines and as JSON values; nothing is started. See `lrm.budget`.

    A corpus that cannot be opened yet leaves out how many epochs the run has, and says so.
    """
    from lrm.budget import describe, estimate

    epoch_objects, of = None, ""
    try:
        reader = open_reader(corpus, version, config.data)
        with Loader(reader, config.data, image_px=config.model.encoder.image_px, batch_size=1) as loader:
            epoch_objects = len(loader.order)
        of = f"version     {reader.number} of {corpus}: {len(reader)} samples, {epoch_objects} an epoch"
    except (UserError, StoreError, DamagedDataError) as error:
        of = f"version     not counted: {error}"
    precise = config.train.precision == "fp32" or config.train.device == "cpu"
    fused = config.model.volume.renderer == "fused" or (config.model.volume.renderer == "auto" and not precise)
    budget = estimate(config, ranks=ranks, epoch_objects=epoch_objects, fused=fused)
    return f"{of}\n{describe(config, budget)}", budget.as_json()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed, 2 a mistake of the user, 3 stopped by signal."""
    parser = argparse.ArgumentParser(prog="python -m lrm.train", description="Train an LRM on a version of a corpus.")
    parser.add_argument("--corpus", required=True, help="folder or URL of the corpus")
    parser.add_argument("--version", default="latest", help="version number, or latest")
    parser.add_argument("--config", default="tiny", help="preset name or TOML file")
    parser.add_argument("--out", required=True, help="folder for checkpoints and metrics; resumes from what is there")
    parser.add_argument("--dry-run", action="store_true", help="say what the run is and will cost; start nothing")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        config, version = load_config(arguments.config, arguments.set), parse_version(arguments.version)
        if arguments.dry_run:
            print(dry_run_text(config, arguments.corpus, version, int(os.environ.get("WORLD_SIZE", "1")))[0])
            return 0
        result = train(config, arguments.corpus, version, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (DamagedDataError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 3 if result.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
