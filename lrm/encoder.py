"""The image encoder: transformers' ViT or DINOv2, all of whose tokens go to the decoder (LRM, section 3.1).

The paper takes DINO's ViT-B/16 (arXiv 2104.14294) at 512 px, 1025 tokens of width 768, its position embedding
interpolated from 224 px, and trains it with the rest. A config with `weights` must get those weights, from a local
folder or the hub's cache or the hub: a run that silently starts from random ones would look the same for days.
A config with empty `weights` starts from random ones, and the log says so.

DINOv2 (`kind = "dinov2"`, patches of 14 px, so 448 px for as many tokens) is the same transformer with a learnt scale
behind each of its sub-layers. Variants with registers are another architecture and are refused.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from lrm.config import EncoderConfig
from lrm.positions import fourier_grid
from pipeline.types import UserError

log = logging.getLogger(__name__)

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet statistics, which DINO was trained with."""


class ImageEncoder(nn.Module):
    """An image [B, 3, S, S] in [0, 1] to tokens [B, 1 + (S / patch)^2, width]."""

    def __init__(self, config: EncoderConfig, *, load_weights: bool = True) -> None:
        super().__init__()
        if config.weights and load_weights:
            self.vit = _pretrained(config)
        else:
            self.vit = _build(config)
            places = fourier_grid(config.image_px // config.patch_px, config.width)
            with torch.no_grad():
                self.vit.embeddings.position_embeddings[0, 1:] = places
            if load_weights:
                log.info("encoder starts from random weights: model.encoder.weights is empty")
        if config.kind == "dinov2":  # for masked pre-training alone; it never gets a gradient
            self.vit.embeddings.mask_token.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).reshape(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer's layers."""
        return list(self.vit.layers if isinstance(self.vit, ViTModel) else self.vit.encoder.layer)

    def checkpoint_activations(self) -> None:
        """From now on keep only the input of each layer for the backward pass."""
        newer = getattr(self.vit, "activation_checkpointing_enable", None)  # the other name goes with transformers 6
        (newer or self.vit.gradient_checkpointing_enable)({"use_reentrant": False})

    def forward(self, image: Tensor) -> Tensor:
        """Return all tokens [B, 1 + (S / patch)^2, width], the class token first."""
        tokens: Tensor = self.vit((image - self.mean) / self.std).last_hidden_state
        return tokens


def _build(config: EncoderConfig) -> Any:
    common = {
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_px,
        "patch_size": config.patch_px,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if config.kind == "dinov2":
        return Dinov2Model(Dinov2Config(**common, mlp_ratio=config.mlp_ratio))
    return ViTModel(ViTConfig(**common, intermediate_size=config.width * config.mlp_ratio), add_pooling_layer=False)


def _pretrained(config: EncoderConfig) -> Any:
    try:
        found_kind = AutoConfig.from_pretrained(config.weights).model_type
        if found_kind != config.kind:
            raise UserError(
                f"encoder weights {config.weights!r} are of kind {found_kind!r}, the config says {config.kind!r}; set "
                "model.encoder.kind to it if it is vit or dinov2"
            )
        if config.kind == "dinov2":
            given = Dinov2Model.from_pretrained(config.weights)
        else:
            given = ViTModel.from_pretrained(config.weights, add_pooling_layer=False)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"encoder weights {config.weights!r} are neither a local folder nor to be had from the hub ({reason}); "
            "set model.encoder.weights to a folder, or to '' to start from random weights"
        ) from None
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    found = tuple(getattr(given.config, name) for name in names)
    wanted = (config.width, config.num_layers, config.num_heads, config.patch_px)
    if found != wanted:
        raise UserError(
            f"encoder weights {config.weights!r} have (width, layers, heads, patch) {found}; the config says {wanted}"
        )
    settings = given.config.to_dict() | {"image_size": config.image_px}
    if config.kind == "dinov2":
        vit = Dinov2Model(Dinov2Config(**settings))
    else:
        vit = ViTModel(ViTConfig(**settings), add_pooling_layer=False)
    state, name = given.state_dict(), "embeddings.position_embeddings"
    state[name] = resize_position_embedding(state[name], config.image_px // config.patch_px)
    vit.load_state_dict(state)
    log.info("encoder starts from %s, position embedding at %d px", config.weights, config.image_px)
    return vit


def resize_position_embedding(embedding: Tensor, side: int) -> Tensor:
    """Interpolate [1, 1 + n^2, D], the class token's entry first, to [1, 1 + side^2, D]: once, then it is trained."""
    old_side = round((embedding.shape[1] - 1) ** 0.5)
    grid = embedding[:, 1:].transpose(1, 2).reshape(1, -1, old_side, old_side)
    resized = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:, :1], resized.flatten(2).transpose(1, 2)], 1)
