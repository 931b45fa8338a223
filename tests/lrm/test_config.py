"""Presets and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrm.config import load_config, preset_names
from pipeline.types import UserError


def test_the_presets_load_and_the_paper_preset_has_the_papers_numbers() -> None:
    assert preset_names() == ["paper", "small", "tiny"]
    paper = load_config("paper")
    encoder, decoder, volume = paper.model.encoder, paper.model.decoder, paper.model.volume
    assert (encoder.image_px, encoder.patch_px, encoder.width, encoder.num_layers) == (512, 16, 768, 12)
    assert (decoder.num_layers, decoder.width, decoder.num_heads, decoder.token_grid) == (16, 1024, 16, 32)
    assert (decoder.plane_channels, decoder.plane_px) == (80, 64)
    assert (volume.mlp_layers, volume.mlp_width, volume.samples_per_ray) == (10, 64, 128)
    assert (paper.data.side_views, paper.data.min_render_px, paper.data.max_render_px) == (3, 128, 384)
    assert paper.data.source_copies == {"mvimgnet": 3}
    train = paper.train
    assert (train.batch_size, train.lr, train.beta2, train.weight_decay) == (1024, 4e-4, 0.95, 0.05)
    assert (train.max_grad_norm, train.warmup_steps, train.precision) == (1.0, 3000, "bf16")
    assert train.lpips_weight == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lpips_weight=-1.0", "train.lpips_weight"),
        ("train.stpes=3", "unknown key 'train.stpes'"),
        ("data.patch_px=500", "patch_px <= min_render_px"),
        ("model.decoder.num_heads=7", "must divide by num_heads 7"),
        ("train.steps", "expected section.key=value"),
    ],
)
def test_mistakes_are_told_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config("tiny", [override])
    assert "\n" not in str(caught.value)


def test_a_config_is_a_preset_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a file nor a preset; presets: paper, small, tiny"):
        load_config("huge")
    path = tmp_path / "own.toml"
    path.write_text((Path(__file__).parents[2] / "lrm/configs/tiny.toml").read_text())
    assert load_config(str(path), ["train.steps=7"]).train.steps == 7
