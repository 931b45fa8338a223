"""The Large Reconstruction Model: one image and its camera to a triplane, and from there to any view.

image [B, 3, S, S] --ViT--> tokens [B, 1 + (S/16)^2, E] --decoder(camera [B, 20])--> planes [B, 3, C, R, R]
planes + rays of V cameras --quadrature--> rgb [B, V, 3, P, P]
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lrm.cameras import pixel_rays
from lrm.config import ModelConfig
from lrm.decoder import TriplaneDecoder
from lrm.encoder import ImageEncoder
from lrm.volume.reference import RadianceField, Rendered
from lrm.volume.render import render_rays


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Learnable numbers of each part."""

    encoder: int
    decoder_layers: int
    decoder_other: int
    field: int

    @property
    def total(self) -> int:
        """All learnable numbers."""
        return self.encoder + self.decoder_layers + self.decoder_other + self.field

    def __str__(self) -> str:
        parts = ("encoder", "decoder_layers", "decoder_other", "field", "total")
        return ", ".join(f"{name} {getattr(self, name) / 1e6:.2f} M" for name in parts)


class LRM(nn.Module):
    """Encoder, decoder and radiance field.

    `load_weights=False` builds the shape only: for a checkpoint to fill, or on the meta device to count parameters.
    """

    def __init__(self, config: ModelConfig, *, load_weights: bool = True) -> None:
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config.encoder, load_weights=load_weights)
        self.decoder = TriplaneDecoder(config.decoder, config.encoder.width)
        self.field = RadianceField(config.decoder.plane_channels, config.volume)

    def planes(self, image: Tensor, camera: Tensor) -> Tensor:
        """Return planes [B, 3, C, R, R] of an image [B, 3, S, S] in [0, 1] and its camera's 20 numbers [B, 20]."""
        out: Tensor = self.decoder(self.encoder(image), camera)
        return out

    def render(
        self,
        planes: Tensor,
        world_from_camera: Tensor,
        intrinsics: Tensor,
        height: int,
        width: int,
        jitter: int | None = None,
    ) -> Rendered:
        """Render views of planes [B, 3, C, R, R].

        Args:
            planes: [B, 3, C, R, R].
            world_from_camera: [B, V, 4, 4], in the normalised world of the input camera.
            intrinsics: [B, V, 3, 3] in pixels of the rendered window.
            height: rows of the window.
            width: columns of the window.
            jitter: seed of the samples' places in their intervals. None takes the middles.

        Returns:
            rgb [B, V, 3, H, W], alpha [B, V, H, W], depth [B, V, H, W].
        """
        batch, views = world_from_camera.shape[:2]
        origins, directions = (rays.flatten(1, 2) for rays in pixel_rays(world_from_camera, intrinsics, height, width))
        out = render_rays(
            planes.float(), self.field, origins, directions, self.config.volume, jitter, image_px=(height, width)
        )
        window = (batch, views, height, width)
        rgb = out.rgb.reshape(*window, 3).permute(0, 1, 4, 2, 3)
        return Rendered(rgb, out.alpha.reshape(window), out.depth.reshape(window))

    def forward(
        self,
        image: Tensor,
        camera: Tensor,
        world_from_camera: Tensor,
        intrinsics: Tensor,
        window_px: int,
        jitter: int | None = None,
    ) -> Rendered:
        """Render square windows of V views of the object in an image: `planes`, then `render`."""
        planes = self.planes(image, camera)
        return self.render(planes, world_from_camera, intrinsics, window_px, window_px, jitter)

    def checkpoint_activations(self) -> None:
        """From now on keep only the input of each transformer block for the backward pass."""
        self.encoder.checkpoint_activations()
        self.decoder.checkpointing = True

    def parameter_counts(self) -> ParameterCounts:
        """Count the learnable numbers of each part."""

        def count(module: nn.Module) -> int:
            return sum(parameter.numel() for parameter in module.parameters())

        layers = count(self.decoder.layers)
        return ParameterCounts(
            encoder=count(self.encoder),
            decoder_layers=layers,
            decoder_other=count(self.decoder) - layers,
            field=count(self.field),
        )
