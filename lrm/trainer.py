"""The state of a training run and its one step, on this rank among others.

A batch of the rank, triplanes, V patches an object, MSE and LPIPS, backward, clip, AdamW, averaged weights. A step
whose gradient is not finite changes nothing and is counted; the decision falls after the gradients are averaged, so all
ranks take it alike.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lrm.checkpoint import Checkpoint, State, load_tensors
from lrm.config import RunConfig
from lrm.data import Batch, Loader
from lrm.losses import Lpips, mse_loss
from lrm.model import LRM
from lrm.optim import Ema, build_optimizer, learning_rate, optimizer_tensors, set_updates
from lrm.parallel import shard, wrap
from lrm.ranks import Ranks
from pipeline.types import UserError, derive_seed

log = logging.getLogger(__name__)

FREE_MODEL_SETTINGS = ("model.volume.renderer", "model.volume.chunk_rays")
"""Settings of the model that say how it is computed, not what it is; a resumed run may change them."""


class TrainingError(RuntimeError):
    """The run cannot go on: too many steps without a finite gradient."""


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
        saved: Checkpoint | None,
        lpips: Lpips | None = None,
    ) -> None:
        self.config, self.loader, self.ranks = config, loader, ranks
        self.lpips = None if lpips is None else lpips.to(ranks.device)
        self.version_digest = version_digest
        self.step = self.skipped = self.updates = 0
        self.window: list[float] = []  # losses since the last logged step
        self.mse_window: list[float] = []
        if saved is not None:
            _check_same_run(saved.run, config, version_digest)
        self.model = build_model(config, load_weights=saved is None).to(ranks.device)
        shard(self.model, config.train, ranks)
        self.optimizer = build_optimizer(self.model, config.train)
        self.ema = Ema(self.model, config.train.ema_decay) if config.train.ema_decay else None
        if saved is not None:
            self._restore(saved)
        self.wrapped = wrap(self.model, config.train, ranks)

    def _restore(self, saved: Checkpoint) -> None:
        tensors = self.tensors()
        if self.ema is not None and not any(name.startswith("ema.") for name in saved.tensors):
            log.info("the checkpoint has no averaged weights: they begin at its weights")
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("ema.")}
        load_tensors(saved, tensors, alone=self.ranks.size == 1)
        if self.ema is not None and len(tensors) < len(self.tensors()):
            self.ema = Ema(self.model, self.config.train.ema_decay)
        self.loader.load_state_dict(saved.run["loader"])
        self.step, self.skipped, self.updates = (saved.run[name] for name in ("step", "skipped", "updates"))
        self.window, self.mse_window = list(saved.run["window"]), list(saved.run["mse_window"])
        set_updates(self.optimizer, self.updates)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, by name; they share the memory of what is trained."""
        out = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            out |= {f"ema.{name}": tensor for name, tensor in self.ema.tensors.items()}
        return out | {f"optimizer.{name}": t for name, t in optimizer_tensors(self.model, self.optimizer)}

    def state(self) -> State:
        """Return the rest of a checkpoint: JSON values, the same on every rank."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "updates": self.updates,
            "window": list(self.window),
            "mse_window": list(self.mse_window),
            "version_digest": self.version_digest,
            "config": self.config.model_dump(mode="json"),
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
        whole = nn.utils.clip_grad_norm_(self.model.parameters(), train.max_grad_norm)
        norm = float(whole.full_tensor() if isinstance(whole, DTensor) else whole)
        if math.isfinite(norm):
            self.optimizer.step()
            self.updates += 1
            if self.ema is not None:
                self.ema.update()
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
