"""How the model is computed: activation checkpointing, compilation a block at a time, one process or many.

A block is a layer of the encoder or of the decoder. None of this changes what is computed, only where, and what is kept
meanwhile; names of parameters stay as they are, so that a checkpoint does not know of it.

    activation checkpointing    keeps the input of a block, computes it again in the backward pass: a third more work
    compile                     torch.compile of each block, in place; one compilation serves all blocks of a shape
    ddp                         every rank holds everything and averages gradients: 450 M parameters fit any GPU
    fsdp                        FSDP2: every rank holds a part of each parameter, its gradient, moments and average; a
                                block is gathered when it is used; the model must be called as a whole, on all ranks

FSDP2 gathers float32 parameters and leaves bfloat16 to autocast, as DDP does, so that both compute the same; its own
bfloat16 policy would halve what is sent and round the norms.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from lrm.config import TrainConfig
from lrm.model import LRM
from lrm.ranks import Ranks


def fast_attention(device: torch.device) -> AbstractContextManager[None]:
    """Return a context, for the forward and the backward pass, in which attention prefers cuDNN's kernels on a GPU.

    Forward and backward of the paper preset's self-attention, batch 8 on an H200: 2.5 ms, and 4.1 by FlashAttention 2,
    which torch prefers. What a kernel refuses goes to the next.
    """
    if device.type != "cuda":
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    out: AbstractContextManager[None] = sdpa_kernel(order, set_priority=True)
    return out


def blocks(model: LRM) -> list[nn.Module]:
    """Return the layers of encoder and decoder."""
    return [*model.encoder.blocks, *model.decoder.layers]


def shard(model: LRM, config: TrainConfig, ranks: Ranks) -> None:
    """Set up checkpointing, compilation and FSDP2 as the config says, in place; before an optimiser is built."""
    if config.activation_checkpointing:
        model.checkpoint_activations()
    if config.compile:
        for block in blocks(model):
            block.compile(backend=config.compile)
    if config.parallel == "fsdp" and ranks.size > 1:
        # Pictures leave the model as views; nothing is done to them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


def wrap(model: LRM, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """Return what to call in training: the model itself, or with its gradients averaged over ranks."""
    if config.parallel == "fsdp" or ranks.size == 1:
        return model
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)
