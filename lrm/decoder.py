"""From image tokens and a camera to a triplane (LRM, section 3.2).

    c~ = MLP(c), c in R^20                      ModLN(f) = LN(f) * (1 + gamma) + beta, (gamma, beta) = Linear(SiLU(c~))

    f <- f + CrossAttention(ModLN(f), image tokens)
    f <- f + SelfAttention(ModLN(f))
    f <- f + MLP(ModLN(f))

for every layer, f [B, 3 g^2, D] being learnable tokens at first; and one deconvolution of stride 2 makes planes
[B, 3, C, 2g, 2g] of the tokens. Each of the three norms of a layer has its own modulation: with D = 1024 that is
3 x 16 x 2.1 M = 101 M parameters of the decoder's 361 M.

The modulation starts at zero (gamma = beta = 0), as in DiT, so that the decoder begins as one without a camera; the
paper does not say how it starts. Tokens start as `lrm.positions` says. Projections inside attention have no bias, like
the public reproductions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrm.cameras import CAMERA_NUMBERS
from lrm.config import DecoderConfig
from lrm.positions import fourier_grid

PLANE_CODE_STD = 0.5
"""Deviation of the random code that tells the three planes' tokens apart at the start."""


class ModLN(nn.Module):
    """Layer norm whose scale and shift come from the camera embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, camera: Tensor) -> Tensor:
        """Modulate tokens [B, T, D] by the camera embedding [B, D]."""
        gamma, beta = self.modulation(F.silu(camera))[:, None].chunk(2, -1)
        out: Tensor = self.norm(tokens) * (1 + gamma) + beta
        return out


class Attention(nn.Module):
    """Multi-head attention of queries [B, T, D] to a context [B, S, E]."""

    def __init__(self, width: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(context_width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Return [B, T, D]."""
        # Keys and values by a product each: cuDNN's attention takes none that share memory.
        halves = self.key_value.weight.chunk(2)
        projected = (self.query(tokens), F.linear(context, halves[0]), F.linear(context, halves[1]))
        heads = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in projected)
        attended = F.scaled_dot_product_attention(*heads)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(-2))
        return out


class DecoderLayer(nn.Module):
    """Cross-attention to the image, self-attention among triplane tokens, MLP; each behind a ModLN."""

    def __init__(self, config: DecoderConfig, image_width: int) -> None:
        super().__init__()
        width, hidden = config.width, config.width * config.mlp_ratio
        self.cross_norm, self.self_norm, self.mlp_norm = ModLN(width), ModLN(width), ModLN(width)
        self.cross_attention = Attention(width, image_width, config.num_heads)
        self.self_attention = Attention(width, width, config.num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor, image_tokens: Tensor, camera: Tensor) -> Tensor:
        """Return tokens [B, T, D] after the layer; image_tokens [B, S, E], camera [B, D]."""
        tokens = tokens + self.cross_attention(self.cross_norm(tokens, camera), image_tokens)
        normed = self.self_norm(tokens, camera)
        tokens = tokens + self.self_attention(normed, normed)
        out: Tensor = tokens + self.mlp(self.mlp_norm(tokens, camera))
        return out


class TriplaneDecoder(nn.Module):
    """Image tokens [B, S, E] and camera numbers [B, 20] to planes [B, 3, C, 2g, 2g]."""

    def __init__(self, config: DecoderConfig, image_width: int) -> None:
        super().__init__()
        width = config.width
        self.token_grid = config.token_grid
        self.checkpointing = False  # whether a layer's activations are computed again in the backward pass
        planes = torch.randn(3, 1, width) * PLANE_CODE_STD
        self.tokens = nn.Parameter((fourier_grid(config.token_grid, width) + planes).flatten(0, 1))
        self.camera_embedding = nn.Sequential(nn.Linear(CAMERA_NUMBERS, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(DecoderLayer(config, image_width) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.upsample = nn.ConvTranspose2d(width, config.plane_channels, kernel_size=2, stride=2)

    def forward(self, image_tokens: Tensor, camera: Tensor) -> Tensor:
        """Return planes [B, 3, C, 2g, 2g]."""
        batch, grid = image_tokens.shape[0], self.token_grid
        embedding = self.camera_embedding(camera)
        tokens = self.tokens.expand(batch, -1, -1)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(layer, tokens, image_tokens, embedding, use_reentrant=False)
            else:
                tokens = layer(tokens, image_tokens, embedding)
        maps = self.norm(tokens).reshape(batch * 3, grid, grid, -1).permute(0, 3, 1, 2)
        out: Tensor = self.upsample(maps).unflatten(0, (batch, 3))
        return out
