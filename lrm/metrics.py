"""The metrics of a run: `metrics.jsonl`, one JSON object a logged step, no step twice; and TensorBoard, W&B if asked.

    {"step": 20, "loss": 0.03, "psnr": 15.2, "lr": 0.001, "grad_norm": 0.4, "objects_per_s": 8.1, "mfu": null,
     "data_wait_share": 0.01, "peak_mem_bytes": 512000000, "bytes_read": 812345, "skipped": 0, "damaged": 0}

`step` counts finished steps; loss is the mean over the steps since the line before. A resumed run first drops the lines
beyond the step it resumes from, and a line that a kill cut short. `mfu` is null on a device whose peak is not known.

TensorBoard's files are written by tensorboardX, which needs neither TensorBoard nor TensorFlow. W&B follows its own
variables: WANDB_MODE=offline keeps all on this machine.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import time
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lrm.config import RunConfig
from lrm.flops import count_flops, peak_flops
from lrm.loader import LoaderStats
from lrm.pixels import Uint8
from lrm.ranks import Ranks
from pipeline.types import UserError

METRICS_NAME = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics file, in order; none if it is not there."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # cut short by a kill
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the lines beyond `step`, replacing the file in one rename."""
    lines = [line for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    """Append one line with a single write; a value that is not finite becomes null."""
    clean = {name: None if isinstance(v, float) and v - v != 0 else v for name, v in line.items()}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(clean, allow_nan=False) + "\n").encode())
    finally:
        os.close(descriptor)


class Clock:
    """Speed since the last logged step."""

    def __init__(self, stats: LoaderStats, config: RunConfig, ranks: Ranks) -> None:
        self._stats, self._ranks = stats, ranks
        self._flops = count_flops(config).train
        self._peak = peak_flops(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
        self._mark = (time.perf_counter(), stats.num_objects, stats.data_wait_s, stats.num_bytes)
        self._apart_s = 0.0

    def leave_out(self, seconds: float) -> None:
        """Take time that was not spent on training steps, such as a measurement's, out of the next reading."""
        self._apart_s += seconds

    def read(self) -> dict[str, float | int | None]:
        """Return objects/s over all ranks, MFU, this rank's share of time spent waiting for data, and its counts."""
        stats, (start_s, objects, wait_s, num_bytes) = self._stats, self._mark
        self._mark = (time.perf_counter(), stats.num_objects, stats.data_wait_s, stats.num_bytes)
        elapsed_s = max(1e-9, self._mark[0] - start_s - self._apart_s)
        self._apart_s = 0.0
        rate = (stats.num_objects - objects) / elapsed_s  # of this rank
        return {
            "objects_per_s": round(rate * self._ranks.size, 3),
            "mfu": None if self._peak is None else round(rate * self._flops / self._peak, 4),
            "data_wait_share": round((stats.data_wait_s - wait_s) / elapsed_s, 4),
            "peak_mem_bytes": peak_memory(self._ranks.device),
            "bytes_read": stats.num_bytes,
            "bytes_per_s": round((stats.num_bytes - num_bytes) * self._ranks.size / elapsed_s),
            "wire_ratio": round(stats.wire_ratio, 3),
            "cache_hits": stats.reads.cache_hits,
            "cache_damaged": stats.reads.cache_damaged,
            "damaged": len(stats.damaged),
        }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _optional(package: str, setting: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{setting} needs the package {package}, which is not installed: pip install {package}"
        ) from None


def check_recorders(config: RunConfig) -> None:
    """Raise UserError where the config asks for metrics that this installation cannot write."""
    if config.train.tensorboard:
        _optional("tensorboardX", "train.tensorboard=true")
    if config.train.wandb_project:
        _optional("wandb", f"train.wandb_project={config.train.wandb_project!r}")


class Recorder:
    """Writes the metrics and pictures of a run to every place that its config names. One process of a run has one.

    Args:
        out_dir: the run's folder.
        config: the run.
        step: the step it begins or resumes at; what was written of later steps is dropped.
    """

    def __init__(self, out_dir: Path, config: RunConfig, step: int) -> None:
        self._out_dir = out_dir
        rewind_metrics(out_dir / METRICS_NAME, step)
        self._board: Any = None
        self._wandb: Any = None
        if config.train.tensorboard:
            package = _optional("tensorboardX", "train.tensorboard=true")
            self._board = package.SummaryWriter(str(out_dir / "tensorboard"), purge_step=step + 1)
        if config.train.wandb_project:
            package = _optional("wandb", "train.wandb_project")
            self._wandb = package.init(
                project=config.train.wandb_project, id=_run_id(out_dir), resume="allow", name=out_dir.resolve().name,
                dir=str(out_dir), config=config.model_dump(mode="json"),
            )  # fmt: skip

    def write(self, line: dict[str, Any]) -> None:
        """Write one line of metrics, with its `step`."""
        append_metrics(self._out_dir / METRICS_NAME, line)
        numbers = {name: value for name, value in line.items() if name != "step" and value is not None}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, line["step"])
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])

    def draw(self, step: int, path: Path, pixels: Uint8) -> None:
        """Show a picture [H, W, 3] sRGB that is already a file."""
        if self._board is not None:
            self._board.add_image("views", pixels, step, dataformats="HWC")
        if self._wandb is not None:
            image = _optional("wandb", "train.wandb_project").Image(str(path))
            self._wandb.log({"views": image}, step=step)

    def close(self) -> None:
        """Flush everything."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _run_id(out_dir: Path) -> str:
    """Return the run's name at W&B, kept in its folder, so that a resumed run goes on in the same one."""
    path = out_dir / "wandb-id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
