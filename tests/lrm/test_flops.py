"""Operations as counted from the config, against torch's own count of what is run."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lrm.config import load_config
from lrm.flops import count_flops, peak_flops
from lrm.train import build_model
from tests.lrm.conftest import nano_config


def test_the_papers_count() -> None:
    counted = count_flops(load_config("paper"))
    assert counted.decoder == pytest.approx(2.32e12, rel=0.03)
    assert counted.encoder == pytest.approx(0.21e12, rel=0.05)
    assert counted.renderer == pytest.approx(0.81e12, rel=0.01)
    assert counted.train == pytest.approx(10e12, rel=0.03)


def test_it_is_what_torch_counts() -> None:
    config = nano_config("model.volume.mlp_layers=5")
    model = build_model(config, load_weights=True)
    views, side = config.data.side_views + 1, config.data.patch_px
    poses = torch.eye(4).repeat(1, views, 1, 1)
    poses[..., 2, 3] = -2.5
    k = torch.tensor([[10.0, 0, 4], [0, 10.0, 4], [0, 0, 1]]).repeat(1, views, 1, 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.rand(1, 3, 32, 32), torch.rand(1, 20), poses, k, side)
    turning_rays = views * side**2 * 2 * 3 * 3  # into the world, which is not the model's
    assert counter.get_total_flops() - turning_rays == count_flops(config).forward


def test_a_device_is_known_by_its_name_or_not_at_all() -> None:
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("some other thing") is None
