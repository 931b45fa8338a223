"""One process of a training run among others, as `torchrun` describes it: RANK, WORLD_SIZE, LOCAL_RANK."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from pipeline.types import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process's place. With one process nothing is communicated."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes checkpoints, metrics and progress."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over ranks."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def from_first(self, value: Any) -> Any:
        """Return the first rank's picklable value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def pick_device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """Return the device of this process.

    Raises:
        UserError: if a GPU is asked for and there is none for this process.
    """
    num_gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise UserError(f"train.device {wanted!r}: process {local_rank} of this node finds {num_gpus} GPUs")
    return torch.device("cuda", local_rank)


@contextmanager
def joined_ranks(wanted: Literal["auto", "cpu", "cuda"]) -> Iterator[Ranks]:
    """Join the process group that the environment describes, if any, and leave it at the end.

    A group that the caller (Ray Train, say) has already made is used and left alone.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = pick_device(wanted, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ours = size > 1 and not dist.is_initialized()
    if ours:
        # Checkpoints speak over a group of their own, on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank=rank, size=size, device=device)
    finally:
        if ours:
            dist.destroy_process_group()
