"""Training on a Ray cluster: Ray Train places one process a GPU, and each runs the trainer of `lrm.train` as it is.

    RAY_ADDRESS=head:6379 lrm-corpus train --corpus s3://bucket/corpus --config paper --out /shared/run

Ray Train starts the workers, tells each its rank, and joins them; checkpoints, metrics and the loader's place are the
trainer's own, in the run's folder, which all nodes must share. Where a worker or a node is lost the run goes on from
its newest checkpoint, on as many workers as the cluster then has, up to `max_failures` times. The first SIGTERM or
Ctrl-C asks the run to stop through a file in that folder: it saves and ends; the second ends it at once.

Ray Train could hold the checkpoints, too; then a run could not leave Ray, and `torchrun` could not take it up.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from jobs.nodes import check_reachable
from lrm.config import RunConfig
from lrm.train import STOP_NAME, TrainingError, TrainResult
from pipeline.shard import DamagedDataError
from pipeline.types import UserError

log = logging.getLogger(__name__)

MAX_FAILURES = 3
ERRORS_OF_THE_RUN = (UserError, TrainingError, DamagedDataError)
"""Errors that come again with every try."""


def train_on_ray(
    config: RunConfig,
    corpus: str,
    version: int | None,
    out_dir: Path,
    *,
    workers: int = 0,
    max_failures: int = MAX_FAILURES,
) -> TrainResult:
    """Train on the cluster that this process has joined; see `lrm.train.train`.

    Args:
        config: the run.
        corpus: folder that all nodes share, or URL.
        version: number, or None for the newest.
        out_dir: folder that all nodes share.
        workers: processes; 0 takes one for every GPU of the cluster, or one where there is none.
        max_failures: times that a lost worker is made good.

    Raises:
        UserError, TrainingError, DamagedDataError: as the trainer raises them.
    """
    TorchTrainer, ScalingConfig, RayRunConfig, TrainingFailedError = _ray_train()
    out = out_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    place = corpus if "://" in corpus else str(Path(corpus).resolve())
    asked = {"config": config.model_dump(mode="json"), "corpus": place, "version": version, "out_dir": str(out)}
    failures = 0
    while True:
        num_workers, use_gpu = _workers(config, workers)
        trainer = TorchTrainer(
            _work,
            train_loop_config=asked,
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
            run_config=RayRunConfig(name="ray-train", storage_path=str(out)),
        )
        log.info("Ray Train: %d worker(s)%s", num_workers, ", one GPU each" if use_gpu else " on CPUs")
        try:
            with _stop_file(out / STOP_NAME):
                result: TrainResult = trainer.fit().return_value
        except TrainingFailedError as error:
            failures += 1
            _raise_if_it_would_come_again(error)
            text = " ".join(str(error).split())[:300]
            if failures > max_failures:
                raise TrainingError(f"workers failed {failures} times, at last: {text}") from None
            log.warning("workers failed (%d of %d allowed): %s; going on", failures, max_failures, text)
        else:
            return result


def _work(asked: dict[str, Any]) -> TrainResult:
    """Be one worker."""
    from lrm.train import train

    # Idle OpenMP threads that spin take the cores from the loader.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return train(RunConfig.model_validate(asked["config"]), asked["corpus"], asked["version"], asked["out_dir"])


def _ray_train() -> tuple[Any, Any, Any, Any]:
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    try:
        from ray.train import RunConfig as RayRunConfig
        from ray.train import ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError
    except ImportError as error:
        raise UserError(
            f"training on Ray needs Ray Train, which does not load here ({error}): pip install "
            "'lrm-corpus[train,ray]', or unset RAY_ADDRESS to train in this process"
        ) from None
    return TorchTrainer, ScalingConfig, RayRunConfig, TrainingFailedError


def _workers(config: RunConfig, wanted: int) -> tuple[int, bool]:
    """Return how many workers to start and whether each gets a GPU.

    Raises:
        UserError: if the cluster cannot hold them, or a batch does not divide among them.
    """
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if config.train.device == "cuda" and not gpus:
        raise UserError("train.device is 'cuda' and Ray sees no GPU; run where one is, or set train.device=cpu")
    use_gpu = config.train.device != "cpu" and gpus > 0
    num_workers = wanted or (gpus if use_gpu else 1)
    if num_workers > (most := gpus if use_gpu else cpus):
        raise UserError(f"{num_workers} workers are asked for; the cluster has {most} {'GPU' if use_gpu else 'CPU'}(s)")
    if config.train.batch_size % num_workers:
        raise UserError(
            f"train.batch_size {config.train.batch_size} must divide by the {num_workers} workers of this run"
        )
    return num_workers, use_gpu


def _raise_if_it_would_come_again(error: BaseException) -> None:
    """Raise the worker's own error if it is one of the run's, not of a machine."""
    for failure in getattr(error, "worker_failures", {}).values():
        own = getattr(failure, "_base_exc", failure)  # Ray wraps it with its traceback, and has no public way back
        if isinstance(own, ERRORS_OF_THE_RUN):
            raise own from None


@contextmanager
def _stop_file(path: Path) -> Iterator[None]:
    """Make the first SIGTERM or SIGINT create a file, and the second interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        if path.exists():
            raise KeyboardInterrupt
        log.warning("%s: asking the workers to save and stop", signal.Signals(number).name)
        path.touch()

    old: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Join a running cluster, and leave it at the end.

    Raises:
        UserError: if it cannot be reached.
    """
    check_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)  # ray.init puts one of its own in its place
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR)
    except Exception as error:  # noqa: BLE001 - Ray raises bare Exceptions
        text = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"Ray at {address} cannot be reached ({text}); give RAY_ADDRESS=host:port of a running head, and "
            "RAY_AUTH_MODE=token with the cluster's token where it asks for one; unset it to train in this process"
        ) from None
    try:
        signal.signal(signal.SIGTERM, handler)
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)
