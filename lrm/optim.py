"""The optimiser of the paper: AdamW without decay on biases and norms, warm-up, cosine; and averaged weights.

Adam's moments are made at once rather than at the first step, and every parameter counts the same updates, so that a
checkpoint of them is tensors by the parameter's name and one integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lrm.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with two groups: matrices with weight decay; vectors (biases, norms) without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for p in parameters)  # 4.6 ms instead of 10.5 for the paper preset on an H200
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)
    for parameter in parameters:
        moments = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS}
        step = torch.tensor(0.0, device=parameter.device if fused else "cpu")
        optimizer.state[parameter] = {"step": step, **moments}
    return optimizer


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield Adam's moments as `NAME.exp_avg` and `NAME.exp_avg_sq`, NAME being the parameter's."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for moment in MOMENTS:
                yield f"{name}.{moment}", optimizer.state[parameter][moment]


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Set how many updates Adam's bias correction takes its moments for."""
    for state in optimizer.state.values():
        state["step"].fill_(float(updates))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of 0-based step: linear to lr over the warm-up, then a half cosine to min_lr_ratio * lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    low = config.min_lr_ratio
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a distributed tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Ema:
    """Exponential moving average of parameters, begun at their present values: ema <- decay ema + (1 - decay) p.

    Each rank averages the part of the parameters that it holds.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters' present values into the average."""
        averages = [local(tensor) for tensor in self.tensors.values()]
        values = [local(parameter.detach()) for parameter in self._parameters.values()]
        torch._foreach_lerp_(averages, values, 1 - self.decay)
