"""Saved state of a run: whole or not there, written by all ranks while training goes on, read by any number of them.

    RUN/step-00000100/
        shard-00001-model-00001-of-00001.safetensors     tensors that the first rank wrote
        shard-00002-model-00001-of-00001.safetensors     the second's; as many as ranks had something to write
        complete.json                                    written last, alone: without it the folder does not count

    complete.json   {"schema": 1, "files": {name: [bytes, crc32]}, "run": {"step": 100, "config": {...}, ...}}

One format for one rank and many. Tensors go through torch.distributed.checkpoint, which writes each shard, or each
copy, once, and hands every reader the slices that it needs, whatever the number of ranks was. Their names are

    model.NAME    ema.NAME    optimizer.NAME.exp_avg    optimizer.NAME.exp_avg_sq

Everything else (step, config, the loader's place, losses since the last logged step) is JSON, equal on all ranks.
The default storage of torch.distributed.checkpoint keeps its index as a pickle; its safetensors storage keeps none, and
so nothing is ever unpickled here and no code can run from a file.

A save copies the state to the CPU and returns; a thread writes, flushes to the disk and checksums, and the first rank
commits when all have done so, then removes all but the newest K. One save is in flight at most. Memory: one copy of the
rank's tensors, twice while they are put into the file.

A kill at any instant leaves the older checkpoints, and at most a folder that does not count. Reading checks every
byte: where the newest is cut or changed, the one before is taken, with a warning; where all are, the run refuses to
start over by itself. The check reads the files once more, seconds for the paper's 7.2 GB with averaged weights.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from lrm.config import RunConfig
from lrm.model import LRM
from lrm.ranks import Ranks
from pipeline.types import UserError

log = logging.getLogger(__name__)

State = dict[str, Any]
SCHEMA = 1
MARKER = "complete.json"
WEIGHTS_NAME = "model.safetensors"
_NAME = re.compile(r"step-(\d{8})")
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was complete, and whole, when it was looked at.

    Attributes:
        path: its folder.
        run: the JSON part: step, config, version_digest, loader, skipped, updates, window, mse_window.
        tensors: names of what it holds.
    """

    path: Path
    run: State
    tensors: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """A file that a rank wrote."""

    name: str
    num_bytes: int
    crc32: int


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run's folder, newest first."""
    return [path for path in _all_paths(folder) if (path / MARKER).is_file()]


def _all_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), reverse=True)


def remove_strays(folder: Path) -> None:
    """Remove checkpoints that a killed run left incomplete; only the one writer of a folder may call this."""
    for path in _all_paths(folder):
        if not (path / MARKER).is_file():
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; interrupted at any point, what is left does not count."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


class _Writer(HuggingFaceStorageWriter):
    """Writes shards, and the marker when every rank's are on the disk."""

    def __init__(self, folder: Path, run: State, keep: int) -> None:
        self._folder, self._run, self._keep = folder, run, keep
        super().__init__(str(folder / f"step-{run['step']:08d}"), save_distributed=True)

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write this rank's shard, flushed; each result carries what the marker will say of it."""
        future = super().write_data(plan, planner)
        results = future.wait()
        names = {result.storage_data.relative_path for result in results}
        written = {name: _checksum(Path(self.path) / name) for name in names}
        told: torch.futures.Future[Any] = torch.futures.Future()
        told.set_result(
            [dataclasses.replace(result, storage_data=written[result.storage_data.relative_path]) for result in results]
        )
        return told

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:  # noqa: ARG002  # the base class' signature
        """Commit, on the first rank alone, and let go of older checkpoints."""
        files = {result.storage_data.name: result.storage_data for rank in results for result in rank}
        marker = {
            "schema": SCHEMA,
            "files": {name: [files[name].num_bytes, files[name].crc32] for name in sorted(files)},
            "run": self._run,
        }
        path = Path(self.path)
        _sync_folder(path)
        temporary = path / f".{MARKER}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(marker, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path / MARKER)
        _sync_folder(path)
        for old in checkpoint_paths(self._folder)[self._keep :]:
            _remove(old)


def _checksum(path: Path) -> _Written:
    crc, num_bytes = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc, num_bytes = zlib.crc32(block, crc), num_bytes + len(block)
    return _Written(name=path.name, num_bytes=num_bytes, crc32=crc)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot sync a folder; the rename is then as good as it gets
        log.debug("%s: %s", folder, error)
    finally:
        os.close(descriptor)


class _Stager(DefaultStager):
    """Keeps the memory of copies for the next save: before torch 2.13 `async_save` closes the stager it is given."""

    def close(self) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Give the memory of copies back."""
        super().close()


class Saver:
    """Saves checkpoints of a run in the background, one at a time. Every rank has one, and all save at the same steps.

    Use as a context manager, or `close` it: that waits for the save in flight.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        self._folder, self._keep, self._ranks = folder, keep, ranks
        # Its own group: the thread's messages must not meet those of the steps that go on meanwhile.
        self._group = dist.new_group(backend="gloo") if ranks.size > 1 else None
        on_gpu = ranks.device.type == "cuda"
        self._stager = _Stager(
            StagingOptions(
                use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
            )
        )
        self._in_flight: Future[Any] | None = None

    def save(self, tensors: Mapping[str, Tensor], run: State) -> None:
        """Copy the state and begin to write it; waits for the save before.

        Args:
            tensors: of this rank; a DTensor is this rank's part, a plain tensor is the same on all ranks.
            run: the JSON part, with `step`; the same on all ranks.

        Raises:
            OSError: if the save before failed, on any rank.
        """
        self.wait()
        if self._ranks.is_first and (old := self._folder / f"step-{run['step']:08d}").exists():
            _remove(old)  # found damaged when the run was resumed
        self._ranks.barrier()
        _hush()
        self._in_flight = async_save(  # type: ignore[assignment]
            dict(tensors),
            storage_writer=_Writer(self._folder, run, self._keep),
            process_group=self._group,
            async_stager=self._stager,
        )

    def wait(self) -> None:
        """Wait until the save in flight, if any, counts.

        Raises:
            OSError: if it failed.
        """
        future, self._in_flight = self._in_flight, None
        if future is None:
            return
        try:
            future.result()
        except (CheckpointException, OSError) as error:
            reason = " ".join(str(_first_failure(error)).split())[:200]
            raise OSError(f"a checkpoint could not be written to {self._folder}: {reason}") from error

    def close(self) -> None:
        """Wait for the save in flight, and give the memory of copies back."""
        try:
            self.wait()
        finally:
            self._stager.release()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()


def _first_failure(error: BaseException) -> BaseException:
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


def _hush() -> None:
    """Let torch not warn, in whatever thread, that a single process is a single process."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def read_checkpoint(path: Path) -> Checkpoint:
    """Look at a checkpoint, checking every byte of its files; tensors are not loaded.

    Raises:
        ValueError: if it is not complete, cut, changed, or not a checkpoint.
    """
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        if marker["schema"] != SCHEMA:
            raise ValueError(f"checkpoint {path} has schema {marker['schema']!r}, this code reads {SCHEMA}")
        run, files = marker["run"], {str(name): tuple(told) for name, told in marker["files"].items()}
        there = {file.name for file in path.glob("*.safetensors")}
        if there != set(files):
            raise ValueError(f"checkpoint {path}: files {sorted(there)} are there, {sorted(files)} were written")
        tensors: set[str] = set()
        for name, told in files.items():
            found = _checksum(path / name)
            if (found.num_bytes, found.crc32) != told:
                raise ValueError(
                    f"checkpoint {path}: {name} has {found.num_bytes} bytes of checksum {found.crc32}, "
                    f"{told[0]} of {told[1]} were written"
                )
            with safe_open(path / name, framework="pt") as file:
                tensors.update(file.keys())
    except (
        OSError,
        KeyError,
        TypeError,
        AttributeError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"checkpoint {path} is not readable: {type(error).__name__}: {reason}") from None
    if not isinstance(run, dict) or not isinstance(run.get("step"), int):
        raise ValueError(f"checkpoint {path} holds no training state")
    return Checkpoint(path=path, run=run, tensors=frozenset(tensors))


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None where there has been none.

    Raises:
        UserError: if there are checkpoints and none is whole, or only ones of another format.
    """
    paths = checkpoint_paths(folder)
    for path in paths:
        try:
            return read_checkpoint(path)
        except ValueError as error:
            log.warning("%s; trying the one before", error)
    if paths:
        raise UserError(f"{folder}: none of its {len(paths)} checkpoints is readable; move them away to start anew")
    if folder.is_dir() and any(folder.glob("step-*.pt")):
        raise UserError(f"{folder} holds checkpoints of an older format; move them away, or name another folder")
    return None


def load_tensors(checkpoint: Checkpoint, tensors: dict[str, Tensor], *, alone: bool = True) -> None:
    """Fill tensors, plain or distributed, from a checkpoint of any number of ranks.

    Args:
        checkpoint: as `read_checkpoint` found it.
        tensors: by their name in the checkpoint; filled in place.
        alone: False where every rank of the process group calls this together, as distributed tensors need.

    Raises:
        UserError: if the checkpoint lacks one of them.
    """
    if lacking := sorted(tensors.keys() - checkpoint.tensors):
        raise UserError(f"checkpoint {checkpoint.path} lacks {lacking[0]} and {len(lacking) - 1} other tensor(s)")
    _hush()
    load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint.path)), no_dist=alone)


def load_model(path: Path) -> tuple[LRM, RunConfig, State]:
    """Return a model in evaluation mode, with averaged weights where there are some, its config, and its `step`.

    Args:
        path: a run's folder, whose newest checkpoint is taken; a checkpoint's folder; or a file of `export_weights`.

    Raises:
        UserError: if there is no readable checkpoint.
    """
    if path.suffix == ".safetensors":
        return _load_exported(path)
    try:
        found = read_checkpoint(path) if _NAME.fullmatch(path.name) else newest_checkpoint(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    if found is None:
        raise UserError(f"{path}: no checkpoint here; train first, or name the folder given to training as its output")
    config = RunConfig.model_validate(found.run["config"])
    model = LRM(config.model, load_weights=False)
    part = "ema" if any(name.startswith("ema.") for name in found.tensors) else "model"
    # Averaged are parameters only; whatever else the model keeps is in the other part.
    state = model.state_dict()
    names = {name: f"{part}.{name}" if f"{part}.{name}" in found.tensors else f"model.{name}" for name in state}
    load_tensors(found, {names[name]: tensor for name, tensor in state.items()})
    return model.eval(), config, found.run


def export_weights(model_from: Path, out: Path) -> int:
    """Write the weights that `load_model` takes from a run as one safetensors file; returns its bytes.

    Its metadata hold `config` (JSON of the whole run's) and `step`; any reader of safetensors can open it.
    """
    model, config, state = load_model(model_from)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, {"config": config.model_dump_json(), "step": str(state["step"]), "format": "pt"})
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return out.stat().st_size


def _load_exported(path: Path) -> tuple[LRM, RunConfig, State]:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        config = RunConfig.model_validate_json(about["config"])
        model = LRM(config.model, load_weights=False)
        model.load_state_dict(load_file(path))
        step = int(about["step"])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is not a file of exported weights ({type(error).__name__}: {reason})") from None
    return model.eval(), config, {"step": step, "config": config.model_dump(mode="json")}
