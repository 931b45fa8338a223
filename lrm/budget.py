"""What a run is and will cost, before it costs anything: `train --dry-run`.

Parameters are counted on torch's meta device, operations from the config (`lrm.flops`). Memory of activations is that
of the tensors which autograd keeps in a forward pass of fake tensors, which have shapes and no numbers, for one object
and for two: the difference is what an object costs. That takes seconds and no memory to speak of. Only the reference
renderer's is a formula: every sample keeps its inputs and the activations of each layer.

Not in the estimate: the caching allocator's waste, buffers of communication, work space of kernels, and what lives only
for a moment in the backward pass. Take a fifth more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from lrm.config import RunConfig
from lrm.flops import PEAK_BF16_FLOPS, Flops, count_flops
from lrm.losses import Lpips, lpips_shapes
from lrm.model import LRM, ParameterCounts
from lrm.optim import learning_rate

ASSUMED_MFU = 0.35
"""Share of the peak that hours are stated for; what a run reaches is in its metrics."""

GPUS = ("H200", "H100", "A100")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: parameters, float32.
        training: gradients, Adam's two moments, averaged weights.
        activations: kept for the backward pass, for all objects of the rank.
        per_object: of these, what one object more adds.
    """

    weights: int
    training: int
    activations: int
    per_object: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.training + self.activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A run, its schedule, and its cost."""

    parameters: ParameterCounts
    flops: Flops
    memory: Memory
    ranks: int
    steps: int
    batch_size: int
    epoch_objects: int | None
    rates: dict[int, float] = field(default_factory=dict)

    @property
    def objects(self) -> int:
        """Objects that the run sees, counting each as often as it is seen."""
        return self.steps * self.batch_size

    @property
    def total_flops(self) -> int:
        """Operations of the whole run."""
        return self.objects * self.flops.train

    def gpu_hours(self, gpu: str, mfu: float = ASSUMED_MFU) -> float:
        """Return hours of one GPU, by its name in `lrm.flops.PEAK_BF16_FLOPS`, at a share of its peak."""
        return self.total_flops / (PEAK_BF16_FLOPS[gpu] * mfu) / 3600

    def as_json(self) -> dict[str, Any]:
        """Return every number."""
        parts = ("encoder", "decoder_layers", "decoder_other", "field", "total")
        return {
            "parameters": {name: getattr(self.parameters, name) for name in parts},
            "flops_per_object": self.flops.train,
            "total_flops": self.total_flops,
            "objects": self.objects,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "ranks": self.ranks,
            "epochs": None if self.epoch_objects is None else self.objects / self.epoch_objects,
            "memory_bytes": {
                name: getattr(self.memory, name)
                for name in ("weights", "training", "activations", "per_object", "total")
            },
            "learning_rates": self.rates,
            "assumed_mfu": ASSUMED_MFU,
            "gpu_hours": {gpu: self.gpu_hours(gpu) for gpu in GPUS},
        }


def estimate(config: RunConfig, *, ranks: int = 1, epoch_objects: int | None = None, fused: bool = False) -> Budget:
    """Return what a run will be.

    Args:
        config: the run.
        ranks: number of processes, one GPU each.
        epoch_objects: draws an epoch of the version has; None if no version is known.
        fused: whether the fused renderer is taken, which keeps the picture alone; the reference otherwise.
    """
    with torch.device("meta"):
        model = LRM(config.model, load_weights=False)
    counts, train = model.parameter_counts(), config.train
    shards = ranks if train.parallel == "fsdp" else 1
    weights = 4 * counts.total // shards
    fixed, per_object = _activations(config)
    per_object += _rendering(config, fused=fused)
    objects = -(-train.batch_size // ranks)
    corners = (0, train.warmup_steps, (train.warmup_steps + train.steps) // 2, train.steps - 1)
    return Budget(
        parameters=counts,
        flops=count_flops(config),
        memory=Memory(
            weights=weights,
            training=weights * (4 if train.ema_decay else 3),
            activations=fixed + objects * per_object,
            per_object=per_object,
        ),
        ranks=ranks,
        steps=train.steps,
        batch_size=train.batch_size,
        epoch_objects=epoch_objects,
        rates={step: learning_rate(step, train) for step in corners if 0 <= step < train.steps},
    )


def _rendering(config: RunConfig, *, fused: bool) -> int:
    """Return the bytes that rendering an object's views keeps for the backward pass."""
    volume, views = config.model.volume, config.data.side_views + 1
    rays = views * config.data.patch_px**2
    picture = rays * 5 * 4
    if fused:
        return picture
    if volume.chunk_rays:
        rays = min(rays, volume.chunk_rays)
    numbers = 3 * config.model.decoder.plane_channels + (volume.mlp_layers - 1) * volume.mlp_width + 4
    return picture + rays * volume.samples_per_ray * numbers * (2 if config.train.precision == "bf16" else 4)


@contextmanager
def _counted(kept: dict[int, int], known: set[int]) -> Iterator[None]:
    """Count the bytes of what autograd keeps meanwhile, each memory once, except memory that is `known`."""

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        alive.append(storage)  # or its place may be given to the next
        return tensor

    alive: list[Any] = []
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def _activations(config: RunConfig) -> tuple[int, int]:
    """Return the bytes that encoder, decoder and perceptual loss keep: once, and for each object."""
    one, two = (_kept_bytes(config, batch) for batch in (1, 2))
    return max(0, 2 * one - two), two - one


def _kept_bytes(config: RunConfig, batch: int) -> int:
    kept: dict[int, int] = {}
    views, side, image_px = config.data.side_views + 1, config.data.patch_px, config.model.encoder.image_px
    with torch.device("meta"):
        model = LRM(config.model, load_weights=False)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"),
    ):
        model = model.to_empty(device="cpu")
        if config.train.activation_checkpointing:
            model.checkpoint_activations()
        known = {tensor.untyped_storage()._cdata for tensor in model.parameters()}
        image, camera = torch.empty(batch, 3, image_px, image_px), torch.empty(batch, 20)
        with _counted(kept, known):
            planes = model.planes(image, camera)
            if config.train.lpips_weight:
                lpips = Lpips({name: torch.empty(shape) for name, shape in lpips_shapes().items()})
                known |= {tensor.untyped_storage()._cdata for tensor in lpips.buffers()}
                rendered = torch.empty(batch, views, 3, side, side, requires_grad=True)
                lpips(rendered, torch.empty(batch, views, 3, side, side))
            del planes
    return sum(kept.values())


def describe(config: RunConfig, budget: Budget) -> str:
    """Return the budget as lines to read."""
    train, model, memory = config.train, config.model, budget.memory
    tokens, views = (model.encoder.image_px // model.encoder.patch_px) ** 2 + 1, config.data.side_views + 1
    grid, plane = model.decoder.token_grid, model.decoder.plane_px
    epochs = "" if not budget.epoch_objects else f", {budget.objects / budget.epoch_objects:.2f} epochs"
    rates = ", ".join(f"{rate:.3g} at step {step}" for step, rate in budget.rates.items())
    hours = ", ".join(f"{budget.gpu_hours(gpu):,.1f} on {gpu}" for gpu in GPUS)
    gib = 2**30
    return "\n".join(
        [
            f"parameters  {budget.parameters}",
            f"shapes      image [3, {model.encoder.image_px}, {model.encoder.image_px}] -> tokens "
            f"[{tokens}, {model.encoder.width}]; camera [20] -> [{model.decoder.width}]; "
            f"[{3 * grid * grid}, {model.decoder.width}] x {model.decoder.num_layers} layers -> planes "
            f"[3, {model.decoder.plane_channels}, {plane}, {plane}]; {views} views of {config.data.patch_px}^2 rays, "
            f"{model.volume.samples_per_ray} samples each",
            f"schedule    {budget.steps} steps of {budget.batch_size} objects, {budget.objects} in all{epochs}; "
            f"AdamW ({train.beta1}, {train.beta2}), decay {train.weight_decay}, clip {train.max_grad_norm}, "
            f"{train.precision}; rate {rates}",
            f"operations  {budget.flops} an object; {budget.total_flops:.3g} FLOP in all",
            f"GPU hours   {hours}, assuming {ASSUMED_MFU:.0%} of the peak ({budget.ranks} rank(s))",
            f"memory      a rank, estimated: weights {memory.weights / gib:.2f} GiB, gradients, moments and averages "
            f"{memory.training / gib:.2f} GiB, activations {memory.activations / gib:.2f} GiB "
            f"({memory.per_object / gib:.3f} GiB an object, {-(-budget.batch_size // budget.ranks)} on a rank)",
        ]
    )
