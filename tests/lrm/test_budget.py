"""What a run will cost, against what it does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lrm.budget import describe, estimate
from lrm.config import load_config
from lrm.train import build_model
from tests.lrm.conftest import nano_config


def test_the_paper_preset_costs_what_the_paper_s_schedule_says() -> None:
    config = load_config("paper")
    budget = estimate(config, ranks=128, epoch_objects=1_391_305, fused=True)
    told = budget.as_json()
    assert told["objects"] == pytest.approx(41.7e6, rel=0.002)
    assert told["epochs"] == pytest.approx(30, rel=0.001)
    assert told["total_flops"] == pytest.approx(4.2e20, rel=0.01)
    assert told["gpu_hours"]["H200"] == pytest.approx(4.19e20 / (989e12 * 0.35) / 3600, rel=0.01)
    assert told["memory_bytes"]["weights"] == 4 * told["parameters"]["total"]
    assert told["learning_rates"][3000] == 4e-4
    text = describe(config, budget)
    assert "[1025, 768]" in text
    assert "planes [3, 80, 64, 64]" in text
    assert "8 on a rank" in text


def test_checkpointing_and_sharding_cost_less_memory() -> None:
    layers = ("model.encoder.num_layers=4", "model.decoder.num_layers=4")
    plain = estimate(nano_config(*layers), ranks=2).memory
    less = estimate(nano_config(*layers, "train.activation_checkpointing=true"), ranks=2).memory
    sharded = estimate(nano_config(*layers, "train.parallel='fsdp'"), ranks=2).memory
    assert less.per_object < 0.6 * plain.per_object
    assert sharded.weights == plain.weights // 2
    assert sharded.training == plain.training // 2
    assert sharded.activations == plain.activations


def test_activations_are_those_that_a_real_forward_pass_keeps() -> None:
    config = nano_config("model.encoder.num_layers=2", "model.decoder.num_layers=3", "model.volume.chunk_rays=1")
    model, kept, alive = build_model(config, load_weights=True), dict[int, int](), list[Tensor]()
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    counts = []
    for batch in (2, 5):
        kept.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            planes = model.planes(torch.rand(batch, 3, 32, 32), torch.rand(batch, 20))
        counts.append(sum(kept.values()))
        del planes
    per_object = (counts[1] - counts[0]) / 3
    picture_and_patch = 3 * 64 * 5 * 4 + 16 * (3 * 6 + 2 * 16 + 4) * 4
    assert estimate(config).memory.per_object - picture_and_patch == pytest.approx(per_object, rel=0.02)
