"""Shapes and sizes of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from lrm.config import load_config
from lrm.encoder import ImageEncoder
from lrm.model import LRM
from lrm.train import build_model
from pipeline.types import UserError
from tests.lrm.conftest import nano_config


def test_the_paper_preset_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        counts = LRM(load_config("paper").model, load_weights=False).parameter_counts()
    assert counts.decoder_layers == pytest.approx(361e6, rel=0.005)
    assert counts.encoder == pytest.approx(86e6, rel=0.01)
    assert counts.decoder_other + counts.field == pytest.approx(4e6, rel=0.2)
    assert counts.total == pytest.approx(452e6, rel=0.005)  # 1.81 GB / 4 of OpenLRM-large
    assert "decoder_layers 360.9" in str(counts)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("paper", (86.43, 360.92, 4.55, 0.05)), ("small", (21.69, 25.99, 1.40, 0.02)), ("tiny", (0.42, 0.61, 0.04, 0.00))],
)
def test_presets_keep_their_size(preset: str, millions: tuple[float, ...]) -> None:
    """A change of architecture must be meant."""
    with torch.device("meta"):
        counts = LRM(load_config(preset).model, load_weights=False).parameter_counts()
    found = (counts.encoder, counts.decoder_layers, counts.decoder_other, counts.field)
    assert tuple(round(count / 1e6, 2) for count in found) == millions


def test_the_paper_s_decoder_by_hand() -> None:
    """D = 1024, E = 768: three modulations, cross-attention, self-attention, MLP; biases where the module has them."""
    d, e = 1024, 768
    modulations = 3 * (d * 2 * d + 2 * d)
    cross, itself = d * d + e * 2 * d + (d * d + d), d * d + d * 2 * d + (d * d + d)
    mlp = (d * 4 * d + 4 * d) + (4 * d * d + d)
    with torch.device("meta"):
        counts = LRM(load_config("paper").model, load_weights=False).parameter_counts()
    assert counts.decoder_layers == 16 * (modulations + cross + itself + mlp)
    assert counts.field == (240 * 64 + 64) + 8 * (64 * 64 + 64) + (64 * 4 + 4)
    tokens, camera = 3 * 32 * 32 * d, (20 * d + d) + (d * d + d)
    assert counts.decoder_other == tokens + camera + 2 * d + (d * 80 * 4 + 80)


def test_the_paper_preset_has_the_paper_s_shapes() -> None:
    config = load_config("paper").model
    with torch.device("meta"):
        model = LRM(config, load_weights=False)
        image, camera = torch.empty(2, 3, 512, 512), torch.empty(2, 20)
        assert model.encoder(image).shape == (2, 1025, 768)
        assert model.decoder.tokens.shape == (3 * 32 * 32, 1024)
        assert model.decoder.camera_embedding(camera).shape == (2, 1024)
        assert model.planes(image, camera).shape == (2, 3, 80, 64, 64)
    assert (len(model.decoder.layers), model.decoder.layers[0].self_attention.num_heads) == (16, 16)
    linears = [module for module in model.field.modules() if isinstance(module, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(240, 64), *[(64, 64)] * 8, (64, 4)]


def test_dinov2_is_an_encoder_too(tmp_path: Path) -> None:
    settings = ("model.encoder.kind='dinov2'", "model.encoder.patch_px=4")
    model = build_model(nano_config(*settings), load_weights=True)
    assert model.encoder(torch.rand(2, 3, 32, 32)).shape == (2, 65, 32)
    model.planes(torch.rand(1, 3, 32, 32), torch.rand(1, 20)).sum().backward()
    lacking = [name for name, p in model.encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []  # DDP would wait for them
    given = Dinov2Model(
        Dinov2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=4, image_size=16, patch_size=4
        )
    )
    given.save_pretrained(tmp_path)
    encoder = ImageEncoder(nano_config(*settings, f"model.encoder.weights='{tmp_path}'").model.encoder)
    name = "encoder.layer.0.mlp.fc1.weight"
    assert torch.equal(encoder.vit.state_dict()[name], given.state_dict()[name])
    assert encoder(torch.rand(1, 3, 32, 32)).shape == (1, 65, 32)
    with pytest.raises(UserError, match="are of kind 'dinov2', the config says 'vit'"):
        ImageEncoder(nano_config(f"model.encoder.weights='{tmp_path}'").model.encoder)


def test_an_image_becomes_planes_and_views() -> None:
    config = nano_config()
    model = build_model(config, load_weights=True)
    assert model.encoder(torch.rand(2, 3, 32, 32)).shape == (2, 17, 32)
    planes = model.planes(torch.rand(2, 3, 32, 32), torch.rand(2, 20))
    assert planes.shape == (2, 3, 6, 12, 12)
    poses = torch.eye(4).repeat(2, 3, 1, 1)
    poses[..., 2, 3] = -2.5
    k = torch.tensor([[10.0, 0, 4], [0, 10.0, 5], [0, 0, 1]]).repeat(2, 3, 1, 1)
    out = model.render(planes, poses, k, 10, 8)
    assert (out.rgb.shape, out.alpha.shape, out.depth.shape) == ((2, 3, 3, 10, 8), (2, 3, 10, 8), (2, 3, 10, 8))
    assert 0 <= out.rgb.min() <= out.rgb.max() <= 1


def test_the_camera_reaches_the_planes_through_the_modulation() -> None:
    model = build_model(nano_config(), load_weights=True)
    for layer in model.decoder.layers:
        torch.nn.init.normal_(layer.cross_norm.modulation.weight, generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(model.planes(image, torch.zeros(1, 20)), model.planes(image, torch.ones(1, 20)))


def test_initial_weights_are_a_function_of_the_seed_and_leave_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    first, second = (build_model(nano_config(), load_weights=True).state_dict() for _ in range(2))
    other = build_model(nano_config("train.seed=1"), load_weights=True).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["decoder.tokens"], other["decoder.tokens"])


def test_pretrained_weights_are_taken_from_a_folder_with_the_position_embedding_resized(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, image_size=16, patch_size=8
    )
    vit = ViTModel(config, add_pooling_layer=False)
    vit.save_pretrained(tmp_path)
    encoder = ImageEncoder(nano_config(f"model.encoder.weights='{tmp_path}'").model.encoder)
    ours, theirs = encoder.vit.state_dict(), vit.state_dict()
    name = "embeddings.position_embeddings"
    assert ours[name].shape == (1, 17, 32)
    torch.testing.assert_close(ours[name][:, 0], theirs[name][:, 0])
    assert all(torch.equal(ours[other], theirs[other]) for other in theirs if other != name)
    assert encoder(torch.rand(1, 3, 32, 32)).shape == (1, 17, 32)
    with pytest.raises(UserError, match=r"\(width, layers, heads, patch\) \(32, 1, 2, 8\); the config says"):
        ImageEncoder(nano_config(f"model.encoder.weights='{tmp_path}'", "model.encoder.num_layers=2").model.encoder)


def test_weights_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="neither a local folder nor to be had from the hub") as caught:
        ImageEncoder(nano_config(f"model.encoder.weights='{tmp_path / 'none'}'").model.encoder)
    assert "\n" not in str(caught.value)
