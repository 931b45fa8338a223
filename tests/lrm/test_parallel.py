"""How the model is computed changes nothing that it computes. Sharding over ranks: tests/lrm/test_resume.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lrm.config import RunConfig
from lrm.model import LRM
from lrm.parallel import blocks, shard, wrap
from lrm.ranks import Ranks
from lrm.train import build_model
from tests.lrm.conftest import nano_config

ALONE = Ranks(rank=0, size=1, device=torch.device("cpu"))
TWO_LAYERS = ("model.encoder.num_layers=2", "model.decoder.num_layers=2")


def loss_and_gradients(config: RunConfig, model: LRM) -> tuple[float, dict[str, Tensor], int]:
    """Return the loss of a made-up batch, every gradient, and how many numbers autograd kept."""
    generator = torch.Generator().manual_seed(0)
    image, camera = torch.rand(2, 3, 32, 32, generator=generator), torch.rand(2, 20, generator=generator)
    poses = torch.eye(4).repeat(2, 3, 1, 1)
    poses[..., 2, 3] = -2.5
    k = torch.tensor([[10.0, 0, 4], [0, 10.0, 4], [0, 0, 1]]).repeat(2, 3, 1, 1)
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        planes = wrap(model, config.train, ALONE).planes(image, camera)
    loss = (model.render(planes, poses, k, 8, 8).rgb ** 2).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients, kept


@pytest.mark.parametrize(
    "overrides",
    [("train.activation_checkpointing=true",), ("train.compile='aot_eager'",)],
    ids=["checkpoint", "compile"],
)
def test_a_block_gives_the_same_values_and_gradients(overrides: tuple[str, ...]) -> None:
    plain_config, config = nano_config(*TWO_LAYERS), nano_config(*TWO_LAYERS, *overrides)
    plain, other = (build_model(plain_config, load_weights=True) for _ in range(2))
    assert len(blocks(other)) == 4
    shard(other, config.train, ALONE)
    assert list(other.state_dict()) == list(plain.state_dict())
    expected, found = loss_and_gradients(plain_config, plain), loss_and_gradients(config, other)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)
    if config.train.activation_checkpointing:
        assert found[2] < 0.4 * expected[2]
