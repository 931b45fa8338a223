"""The training loop: resumable at any point, the same numbers whether it was interrupted or not.

    python -m lrm.train --corpus FOLDER_OR_URL --version latest --config tiny --out runs/a --set train.steps=100
    torchrun --nproc-per-node 8 -m lrm.train --config paper ...

One step: a batch of the rank, triplanes, V patches an object, MSE and LPIPS, backward, clip, AdamW. Everything random
is a function of (seed, step, rank) or of the sample's position, so that a run that was killed and started again goes on
from its newest checkpoint and logs the losses it would have logged. SIGTERM and SIGINT finish the step, save, and stop;
a second one stops at once.

A step whose gradient is not finite changes nothing, is counted, and past `max_skipped_steps` ends the run. The decision
falls after the gradients are averaged, so all ranks take it alike. Ranks share `out_dir`; the first one writes.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from lrm.checkpoint import State, newest_checkpoint, read_checkpoint, remove_strays, save_checkpoint
from lrm.config import RunConfig, load_config
from lrm.data import Batch, Loader, open_reader
from lrm.losses import Lpips, load_lpips, mse_loss, psnr_db
from lrm.metrics import METRICS_NAME, append_metrics, rewind_metrics
from lrm.model import LRM
from lrm.optim import build_optimizer, learning_rate
from lrm.ranks import Ranks, joined_ranks
from pipeline.reader import DamagedDataError
from pipeline.types import UserError, derive_seed
from pipeline.version import parse_version

log = logging.getLogger(__name__)

FREE_MODEL_SETTINGS = ("model.volume.renderer", "model.volume.chunk_rays")
"""Settings of the model that say how it is computed, not what it is; a resumed run may change them."""


class TrainingError(RuntimeError):
    """The run cannot go on: too many steps without a finite gradient."""


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


def build_model(config: RunConfig, *, load_weights: bool) -> LRM:
    """Build the model; its initial weights are a function of train.seed, and the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(derive_seed("weights", config.train.seed))
        return LRM(config.model, load_weights=load_weights)


class Trainer:
    """The state of a run and its one step."""

    def __init__(
        self,
        config: RunConfig,
        loader: Loader,
        version_digest: str,
        ranks: Ranks,
        saved: State | None,
        lpips: Lpips | None = None,
    ) -> None:
        self.config, self.loader, self.ranks = config, loader, ranks
        self.lpips = None if lpips is None else lpips.to(ranks.device)
        self.version_digest = version_digest
        self.step = self.skipped = 0
        self.window: list[float] = []  # losses since the last logged step
        self.mse_window: list[float] = []
        if saved is not None:
            _check_same_run(saved, config, version_digest)
        self.model = build_model(config, load_weights=saved is None).to(ranks.device)
        self.wrapped: nn.Module = self.model
        self.optimizer = build_optimizer(self.model, config.train)
        decay = config.train.ema_decay
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(self.model, multi_avg_fn=average) if decay else None
        if saved is not None:
            self._restore(saved)
        if ranks.size > 1:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.model, device_ids=devices)

    def _restore(self, saved: State) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"] or saved["model"])
            self.ema.n_averaged.fill_(1)
        self.loader.load_state_dict(saved["loader"])
        self.step, self.skipped, self.window = saved["step"], saved["skipped"], list(saved["window"])
        self.mse_window = list(saved["mse_window"])

    def state(self) -> State:
        """Return all that a later process needs to go on from here."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "window": list(self.window),
            "mse_window": list(self.mse_window),
            "version_digest": self.version_digest,
            "config": self.config.model_dump(mode="json"),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
        }

    def train_step(self, batch: Batch) -> float:
        """Take one optimiser step on a batch of this rank; returns the norm of the gradient before clipping."""
        train = self.config.train
        rate = learning_rate(self.step, train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        on_device = {name: value.to(self.ranks.device, non_blocking=True) for name, value in batch.items()}
        jitter = None
        if self.config.model.volume.jitter:
            jitter = derive_seed("rays", train.seed, self.step, self.ranks.rank)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            rendered = self.wrapped(
                on_device["input_image"], on_device["input_camera"], on_device["target_world_from_camera"],
                on_device["target_intrinsics"], self.config.data.patch_px, jitter,
            )  # fmt: skip
            rgb = rendered.rgb
            if self.config.data.background != "white":  # the renderer composites over white
                behind = on_device["background"][:, None, :, None, None] - 1
                rgb = rgb + (1 - rendered.alpha)[:, :, None] * behind
            target = on_device["target_rgb"]
            perceptual = None if self.lpips is None else self.lpips(rgb, target).mean()
        loss = mse = mse_loss(rgb, target)
        if perceptual is not None:
            loss = mse + train.lpips_weight * perceptual
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), train.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            means = self.ranks.mean(torch.stack([loss.detach(), mse.detach()])).tolist()
            self.window.append(means[0])
            self.mse_window.append(means[1])
        else:
            self._skip(norm)
        self.step += 1
        return norm

    def _skip(self, norm: float) -> None:
        self.skipped += 1
        log.warning("step %d skipped: gradient norm is %s (%d skipped so far)", self.step, norm, self.skipped)
        if self.skipped > self.config.train.max_skipped_steps:
            raise TrainingError(
                f"{self.skipped} steps had no finite gradient, train.max_skipped_steps allows "
                f"{self.config.train.max_skipped_steps}; lower train.lr or look at the data of step {self.step}"
            )


def _check_same_run(saved: State, config: RunConfig, version_digest: str) -> None:
    """Refuse a checkpoint of another model or version; name the settings that changed and may."""
    if saved["version_digest"] != version_digest:
        raise UserError(
            f"checkpoint is of version {saved['version_digest'][:12]}, this run reads {version_digest[:12]}; "
            "name that version, or start in a new folder"
        )
    old, new = _flat(saved["config"]), _flat(config.model_dump(mode="json"))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    fixed = [name for name in changed if name.startswith("model.") and name not in FREE_MODEL_SETTINGS]
    if fixed:
        first = fixed[0]
        raise UserError(
            f"checkpoint was trained with {first} = {old.get(first)!r}, the config says {new.get(first)!r}; "
            "a model cannot change while it is trained: start in a new folder"
        )
    if changed:
        log.info(
            "resuming with changed settings: %s", ", ".join(f"{n} {old.get(n)!r} -> {new.get(n)!r}" for n in changed)
        )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, item in value.items():
        out |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}
    return out


class Clock:
    """Speed since the last logged step."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._mark = (time.perf_counter(), 0, 0.0, 0)

    def read(self, ranks: int) -> dict[str, float | int]:
        """Return objects/s over all ranks, this rank's share of time spent waiting for data, and its counts."""
        stats, (start_s, objects, wait_s, num_bytes) = self._loader.stats, self._mark
        self._mark = (time.perf_counter(), stats.num_objects, stats.data_wait_s, stats.num_bytes)
        elapsed_s = max(1e-9, self._mark[0] - start_s)
        return {
            "objects_per_s": round((stats.num_objects - objects) * ranks / elapsed_s, 3),
            "data_wait_share": round((stats.data_wait_s - wait_s) / elapsed_s, 4),
            "bytes_read": stats.num_bytes,
            "bytes_per_s": round((stats.num_bytes - num_bytes) * ranks / elapsed_s),
            "wire_ratio": round(stats.wire_ratio, 3),
            "cache_hits": stats.reads.cache_hits,
            "damaged": len(stats.damaged),
        }


def _run_steps(trainer: Trainer, out_dir: Path, stop: threading.Event) -> tuple[float | None, bool]:
    """Take the steps that are left; returns (last logged loss, whether a signal stopped it)."""
    config, ranks, loss = trainer.config.train, trainer.ranks, None
    clock, saved_step, stopped = Clock(trainer.loader), trainer.step, False
    quiet_s = 0.5 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        total=config.steps,
        initial=trainer.step,
        disable=not ranks.is_first,
        mininterval=quiet_s,
        desc="train",
        unit="step",
    )
    with bar:
        while trainer.step < config.steps and not stopped:
            rate = learning_rate(trainer.step, config)
            norm = trainer.train_step(next(trainer.loader))
            bar.update()
            if trainer.step % config.log_every_steps == 0 or trainer.step == config.steps:
                loss = sum(trainer.window) / len(trainer.window) if trainer.window else math.nan
                mse = sum(trainer.mse_window) / len(trainer.mse_window) if trainer.mse_window else math.nan
                trainer.window.clear()
                trainer.mse_window.clear()
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                line = {"step": trainer.step, "loss": loss, "psnr": psnr_db(mse), "lr": rate, "grad_norm": norm}
                if ranks.is_first:
                    speed = clock.read(ranks.size)
                    append_metrics(out_dir / METRICS_NAME, line | speed | {"skipped": trainer.skipped})
            stopped = ranks.any(stop.is_set())
            if trainer.step % config.checkpoint_every_steps == 0 or stopped or trainer.step == config.steps:
                if ranks.is_first:
                    save_checkpoint(out_dir, trainer.state(), config.keep_checkpoints)
                saved_step = trainer.step
    assert saved_step == trainer.step
    return loss, stopped and trainer.step < config.steps


def _newest_state(out_dir: Path, ranks: Ranks) -> State | None:
    """Return the state that all ranks resume from: the newest whole one that the first rank finds."""
    if ranks.is_first:
        out_dir.mkdir(parents=True, exist_ok=True)
        remove_strays(out_dir)
    found = newest_checkpoint(out_dir) if ranks.is_first else None
    path = ranks.from_first(None if found is None else found[0])
    if path is None:
        return None
    return found[1] if found is not None else read_checkpoint(path)


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
    lpips = load_lpips(config.train)
    reader = open_reader(corpus, version, config.data)
    with stop_signals() as stop, joined_ranks(config.train.device) as ranks:
        if config.train.batch_size % ranks.size:  # gradients are averaged over ranks as equals
            raise UserError(
                f"train.batch_size {config.train.batch_size} must divide by the {ranks.size} ranks of this run"
            )
        saved = _newest_state(out, ranks)
        loader = Loader(
            reader,
            config.data,
            image_px=config.model.encoder.image_px,
            batch_size=config.train.batch_size,
            rank=ranks.rank,
            ranks=ranks.size,
        )
        with loader:
            trainer = Trainer(config, loader, reader.digest, ranks, saved, lpips)
            del saved
            first_step = trainer.step
            if first_step >= config.train.steps:
                log.info("%s: all %d steps are done; nothing to do", out, config.train.steps)
                return TrainResult(step=first_step, steps_now=0, loss=None, seconds=0.0, stopped=False)
            if ranks.is_first:
                rewind_metrics(out / METRICS_NAME, first_step)
                log.info(
                    "version %d (%d samples, %d an epoch), %s on %s x %d, step %d of %d; %s",
                    reader.number, len(reader), len(loader.order), config.train.precision, ranks.device, ranks.size,
                    first_step, config.train.steps, trainer.model.parameter_counts(),
                )  # fmt: skip
            start_s = time.perf_counter()
            loss, stopped = _run_steps(trainer, out, stop)
            seconds = time.perf_counter() - start_s
    return TrainResult(
        step=trainer.step, steps_now=trainer.step - first_step, loss=loss, seconds=seconds, stopped=stopped
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 failed, 2 a mistake of the user, 3 stopped by signal."""
    parser = argparse.ArgumentParser(prog="python -m lrm.train", description="Train an LRM on a version of a corpus.")
    parser.add_argument("--corpus", required=True, help="folder or URL of the corpus")
    parser.add_argument("--version", default="latest", help="version number, or latest")
    parser.add_argument("--config", default="tiny", help="preset name or TOML file")
    parser.add_argument("--out", required=True, help="folder for checkpoints and metrics; resumes from what is there")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        config = load_config(arguments.config, arguments.set)
        result = train(config, arguments.corpus, parse_version(arguments.version), arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (DamagedDataError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 3 if result.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
