"""FID's network: its shape by what is known of it, its pooling by hand, and only its published weights.

Its values were compared with pytorch-fid's network on random weights; see the docstring of `lrm.inception`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lrm.inception import BLOCKS, WEIGHTS_NAME, FidInception, Mixed, fill, load_inception
from pipeline.types import UserError


@pytest.fixture(scope="module")
def network() -> FidInception:
    return FidInception()


def test_it_has_inception_s_parameters_and_the_names_of_the_published_file(network: FidInception) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) == 21_785_568  # without the classifier
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert sum(name.endswith("conv.weight") for name in shapes) == 94
    assert shapes["Conv2d_4a_3x3.conv.weight"] == (192, 80, 3, 3)
    assert shapes["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert shapes["Mixed_6c.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
    assert shapes["Mixed_7a.branch7x7x3_2.conv.weight"] == (192, 192, 1, 7)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)


def test_features_of_pictures_of_any_size(network: FidInception) -> None:
    pictures = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert network(pictures).shape == (1, 2048)


def test_average_pooling_leaves_out_the_padding_and_the_last_block_takes_the_maximum() -> None:
    for name, wanted in (("Mixed_5b", 2.0), ("Mixed_7c", 3.0)):
        branches, pool, pooled = BLOCKS[name]
        block = Mixed(4, branches, pool, pooled).eval()
        block.branch_pool.conv.weight.data.fill_(0.25)  # the mean of the four channels
        state = torch.full((1, 4, 5, 5), 2.0)
        state[..., 2, 2] = 3.0 if pool == "max" else 2.0
        out = block(state)[0, -pooled:] * (1 + 1e-3) ** 0.5  # undo the batch norm's epsilon
        torch.testing.assert_close(out[:, 1:4, 1:4], torch.full((pooled, 3, 3), wanted))
        torch.testing.assert_close(out[:, 0, 0], torch.full((pooled,), 2.0))  # a corner: 4 of 9 places are there


def test_weights_are_taken_by_name_without_the_classifier(network: FidInception) -> None:
    tensors = {name: torch.ones_like(tensor) for name, tensor in network.state_dict().items()}
    filled = fill(FidInception(), {**tensors, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, "x")
    assert float(filled.Conv2d_1a_3x3.conv.weight.min()) == 1
    del tensors["Mixed_6e.branch1x1.conv.weight"]
    with pytest.raises(UserError, match=r"weights\.pth: not the weights of FID's Inception.*Mixed_6e"):
        fill(FidInception(), tensors, "weights.pth")


def test_another_file_under_its_name_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(UserError, match="that of the published file 6726825d"):
        load_inception(tmp_path / WEIGHTS_NAME)
