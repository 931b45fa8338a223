"""What a training step computes: floating-point operations an object, counted from the config.

A multiply-add counts as 2. Counted are matrix products, convolutions and attention; not norms, activations, samples of
planes, nor the loss (LPIPS among it). A step is 3 forward passes, the backward pass being 2. Work done twice to save
memory is not counted, so that model FLOPs utilisation, which divides by this, compares runs however they are computed.

The renderer's count is the paper's field, sample by sample. The fused renderer does less, since it folds the first
layer into the planes, and gets no credit for what it does not do otherwise than by its speed.
"""

from __future__ import annotations

from dataclasses import dataclass

from lrm.cameras import CAMERA_NUMBERS
from lrm.config import DecoderConfig, EncoderConfig, RunConfig, VolumeConfig

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bfloat16 operations per second with float32 sums, by a part of the device's name (makers' data sheets)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Operations of one forward pass of one object."""

    encoder: int
    decoder: int
    renderer: int

    @property
    def forward(self) -> int:
        """All of a forward pass."""
        return self.encoder + self.decoder + self.renderer

    @property
    def train(self) -> int:
        """All of a training step."""
        return 3 * self.forward

    def __str__(self) -> str:
        parts = ("encoder", "decoder", "renderer", "train")
        return ", ".join(f"{name} {getattr(self, name) / 1e12:.3f} TFLOP" for name in parts)


def count_flops(config: RunConfig) -> Flops:
    """Count the operations of an object whose side views and input view are rendered as patches."""
    model, views = config.model, config.data.side_views + 1
    return Flops(
        encoder=_encoder(model.encoder),
        decoder=_decoder(model.decoder, model.encoder),
        renderer=views * config.data.patch_px**2 * _ray(model.volume, model.decoder.plane_channels),
    )


def peak_flops(device_name: str) -> float | None:
    """Return what the device can do at most, per second, or None for one that the table does not know."""
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in device_name), None)


def _attention(tokens: int, context: int, width: int, context_width: int) -> int:
    query_and_out, key_and_value = 2 * 2 * tokens * width**2, 2 * 2 * context * context_width * width
    return query_and_out + key_and_value + 2 * 2 * tokens * context * width


def _encoder(config: EncoderConfig) -> int:
    patches, width = (config.image_px // config.patch_px) ** 2, config.width
    tokens = patches + 1
    mlp = 2 * 2 * tokens * width**2 * config.mlp_ratio
    embedding = 2 * patches * 3 * config.patch_px**2 * width
    return embedding + config.num_layers * (_attention(tokens, tokens, width, width) + mlp)


def _decoder(config: DecoderConfig, encoder: EncoderConfig) -> int:
    tokens, width = 3 * config.token_grid**2, config.width
    image_tokens = (encoder.image_px // encoder.patch_px) ** 2 + 1
    cross = _attention(tokens, image_tokens, width, encoder.width)
    itself = _attention(tokens, tokens, width, width)
    mlp = 2 * 2 * tokens * width**2 * config.mlp_ratio
    modulation = 3 * 2 * width * 2 * width
    camera = 2 * (CAMERA_NUMBERS * width + width**2)
    upsample = 2 * tokens * width * 4 * config.plane_channels
    return camera + config.num_layers * (cross + itself + mlp + modulation) + upsample


def _ray(config: VolumeConfig, plane_channels: int) -> int:
    first, last = 3 * plane_channels * config.mlp_width, config.mlp_width * 4
    return config.samples_per_ray * 2 * (first + (config.mlp_layers - 2) * config.mlp_width**2 + last)
