"""Saved state of a run: whole or not there.

A checkpoint is one `step-00000100.pt` in the run's folder, written beside itself under another name, flushed to the
disk and renamed, so that a kill at any instant leaves the older ones and at most a stray temporary file. It is a
dictionary of tensors and plain values, read with `weights_only=True`: no code runs from it.

    step, version_digest, config (JSON value), model, ema (or None), optimizer, loader, skipped, window

`torch.save` writes a zip with a CRC-32 of every member; reading checks them all, so that a cut or a changed file is
noticed and the one before it is taken instead, with a warning. Checking costs one extra read of the file, seconds for
the paper's 5.4 GB. Where every file is damaged the run refuses to start over by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from lrm.config import RunConfig
from lrm.model import LRM
from pipeline.types import UserError

log = logging.getLogger(__name__)

State = dict[str, Any]
_NAME = re.compile(r"step-(\d{8})\.pt")


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def save_checkpoint(folder: Path, state: State, keep: int) -> Path:
    """Write the state of state["step"], whole or not at all, then remove all but the newest `keep`."""
    path = folder / f"step-{state['step']:08d}.pt"
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(folder)
    for old in checkpoint_paths(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(
            OSError
        ):  # some file systems cannot sync a folder; the rename is then as good as it gets
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_strays(folder: Path) -> None:
    """Remove temporary files that a killed run left; only the one writer of a folder may call this."""
    for path in folder.glob(".step-*.pt.*.tmp"):
        path.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> State:
    """Read a checkpoint onto the CPU, checking every byte.

    Raises:
        ValueError: if the file is cut, changed, or not a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"checkpoint {path}: checksum of {damaged} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"checkpoint {path} is not readable: {type(error).__name__}: {reason}") from None
    if not isinstance(state, dict) or "step" not in state or "model" not in state:
        raise ValueError(f"checkpoint {path} holds no training state")
    return state


def newest_checkpoint(folder: Path) -> tuple[Path, State] | None:
    """Return the newest checkpoint that is whole, or None where there has been none.

    Raises:
        UserError: if there are checkpoints and none is whole.
    """
    paths = checkpoint_paths(folder)
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            log.warning("%s; trying the one before", error)
    if paths:
        raise UserError(f"{folder}: none of its {len(paths)} checkpoints is readable; move them away to start anew")
    return None


def load_model(folder: Path) -> tuple[LRM, RunConfig, State]:
    """Return the model of a run's newest checkpoint, in evaluation mode, with its averaged weights where it has them.

    Raises:
        UserError: if the folder has no readable checkpoint.
    """
    found = newest_checkpoint(folder)
    if found is None:
        raise UserError(
            f"{folder}: no checkpoint here; train first, or name the folder given to training as its output"
        )
    _, state = found
    config = RunConfig.model_validate(state["config"])
    model = LRM(config.model, load_weights=False)
    model.load_state_dict(state["ema"] or state["model"])
    return model.eval(), config, state
