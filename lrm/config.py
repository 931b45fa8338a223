"""Every number of the model, the loader and the trainer, as pydantic models read from TOML.

Presets are files in `lrm/configs/`: `tiny`, `small` and `paper` state every section in full and differ only in
numbers, so that a diff of two files is the whole difference between two runs. `load_config` takes a preset's name or
the path of a TOML file, and `section.key=value` overrides.

Field descriptions give the paper's value where it has one. Numbers marked "paper" come from reviews and notes on the
paper, not from code of its authors, which was never published.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.spec import apply_overrides, read_toml, validate_config
from pipeline.types import UserError

Strict = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
CONFIG_DIR = Path(__file__).parent / "configs"
MAX_SEED = 2**63 - 1


class EncoderConfig(BaseModel):
    """The image encoder: a ViT whose tokens, all of them, are the keys and values of the decoder."""

    model_config = Strict
    kind: Literal["vit", "dinov2"] = Field(
        "vit", description="vit: DINO and plain ViTs; dinov2: DINOv2 without registers"
    )
    weights: str = Field(
        description="folder or hub name of pretrained ViT weights; empty starts from random; paper: DINO"
    )
    image_px: int = Field(ge=16, le=2048, description="width and height of the input image; paper 512")
    patch_px: int = Field(ge=4, le=64, description="patch size; paper 16")
    width: int = Field(ge=8, description="token width; paper 768")
    num_layers: int = Field(ge=1, description="paper 12")
    num_heads: int = Field(ge=1, description="paper 12")
    mlp_ratio: int = Field(4, ge=1, description="hidden width of the MLP over the token width")

    @model_validator(mode="after")
    def _divides(self) -> EncoderConfig:
        if self.width % self.num_heads or self.image_px % self.patch_px:
            raise ValueError("width must divide by num_heads, and image_px by patch_px")
        return self


class DecoderConfig(BaseModel):
    """The transformer from image tokens and a camera to triplane tokens."""

    model_config = Strict
    num_layers: int = Field(ge=1, description="paper 16")
    width: int = Field(ge=8, description="paper 1024")
    num_heads: int = Field(ge=1, description="paper 16")
    mlp_ratio: int = Field(4, ge=1, description="paper 4")
    token_grid: int = Field(ge=2, description="tokens along a side of each plane; paper 32, so 3 x 32 x 32 tokens")
    plane_channels: int = Field(ge=1, description="channels of the triplane; paper 80")

    @model_validator(mode="after")
    def _divides(self) -> DecoderConfig:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} must divide by num_heads {self.num_heads}")
        return self

    @property
    def plane_px(self) -> int:
        """Side of a plane after the stride-2 deconvolution."""
        return 2 * self.token_grid


class VolumeConfig(BaseModel):
    """The radiance field on the triplane, and the quadrature along rays."""

    model_config = Strict
    mlp_layers: int = Field(ge=2, description="linear layers of the NeRF MLP, the output layer included; paper 10")
    mlp_width: int = Field(ge=4, description="paper 64")
    samples_per_ray: int = Field(ge=2, description="paper 128")
    density_bias: float = Field(-1.0, description="density = softplus(raw + bias): a thin fog at the start, not a wall")
    jitter: bool = Field(True, description="in training, draw each sample inside its interval instead of at its middle")
    renderer: Literal["auto", "reference", "fused"] = Field(
        "auto", description="auto takes the fused one on a GPU under bf16, and the reference elsewhere"
    )
    chunk_rays: int = Field(
        0, ge=0, description="rays of the reference rendered at a time, again in the backward pass; 0 renders all once"
    )


class ModelConfig(BaseModel):
    """The whole model."""

    model_config = Strict
    encoder: EncoderConfig
    decoder: DecoderConfig
    volume: VolumeConfig


class DataConfig(BaseModel):
    """Which views are read, and what becomes of their pixels."""

    model_config = Strict
    side_views: int = Field(ge=0, le=31, description="views beside the input view that are rendered; paper 3, so V = 4")
    max_views: int = Field(
        0, ge=0, le=999, description="views of an object that training draws from, its first; 0 is all; paper 32"
    )
    input_views: int = Field(
        0, ge=0, le=999, description="those of them that the input is drawn from, the first; 0 is all, as in the paper"
    )
    min_render_px: int = Field(ge=8, description="least size a target view is resized to; paper 128")
    max_render_px: int = Field(ge=8, description="largest such size; paper 384")
    patch_px: int = Field(ge=8, description="side of the square cut from a resized target view; paper 128")
    input_distance: Literal["keep"] | float = Field(
        "keep", description="distance of the normalised input camera: keep the captured one, or scale the world to this"
    )
    background: Literal["white", "random"] = Field(
        "white", description="behind the target views: white, or a grey drawn by sample; paper white"
    )
    source_copies: dict[str, float] = Field(
        {},
        description="times each source enters an epoch, default 1; 0.5 is another half each epoch; paper 3 for video",
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of order, views and crops; 0 is a seed like any other")
    num_threads: int = Field(ge=1, description="threads that read and decode")
    prefetch_batches: int = Field(ge=1, description="batches in flight ahead of the model")
    prefetch_bytes: int = Field(64 * 2**20, ge=1, description="most encoded bytes asked for ahead of the decoders")
    cache_dir: str = Field(
        "", description="node-local folder for whole shards, shared by all processes; empty reads only the needed views"
    )
    cache_bytes: int = Field(200 * 10**9, ge=1, description="limit of that folder; what is in use is never evicted")
    block_shards: int = Field(
        8, ge=1, description="shards whose samples are mixed with each other, where cache_dir is set"
    )
    max_damaged_samples: int = Field(ge=0, description="damaged samples replaced and counted before the run stops")

    @model_validator(mode="after")
    def _sizes(self) -> DataConfig:
        if not self.patch_px <= self.min_render_px <= self.max_render_px:
            raise ValueError("patch_px <= min_render_px <= max_render_px is required")
        if self.input_distance != "keep" and not 0.1 <= self.input_distance <= 100:
            raise ValueError(f"input_distance {self.input_distance} must be 'keep' or 0.1 to 100 world units")
        if any(not 0 <= copies <= 1000 for copies in self.source_copies.values()):
            raise ValueError(f"source_copies {self.source_copies} must be 0 to 1000")
        return self


class TrainConfig(BaseModel):
    """The optimiser, the schedule and what is saved."""

    model_config = Strict
    steps: int = Field(ge=0, description="optimiser steps of the whole run; paper about 40,800 (30 epochs)")
    batch_size: int = Field(ge=1, description="objects a step over all ranks; paper 1024")
    lr: float = Field(gt=0, description="peak learning rate; paper 4e-4")
    warmup_steps: int = Field(ge=0, description="linear warm-up; paper 3000")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where the cosine ends, over the peak")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1, description="paper 0.95")
    weight_decay: float = Field(0.05, ge=0, description="not on biases and norms; paper 0.05")
    max_grad_norm: float = Field(1.0, gt=0, description="paper 1.0")
    lpips_weight: float = Field(0.0, ge=0, description="weight of the perceptual loss; paper 2.0")
    lpips_path: str = Field("", description="file made by `make weights`; empty takes where that writes by default")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay a step of averaged weights; 0 keeps none")
    precision: Literal["fp32", "bf16"] = Field(description="paper bf16")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes a GPU where there is one, and logs it"
    )
    num_threads: int = Field(0, ge=0, description="CPU threads of torch, for the whole process; 0 takes every core")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of initial weights and ray jitter")
    checkpoint_every_steps: int = Field(ge=1)
    keep_checkpoints: int = Field(ge=1, description="newest checkpoints kept")
    log_every_steps: int = Field(ge=1)
    max_skipped_steps: int = Field(100, ge=0, description="steps without a finite gradient before the run stops")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="with several ranks: ddp holds all on each; fsdp (FSDP2) shards parameters, moments, averages",
    )
    compile: Literal["", "inductor", "aot_eager"] = Field(
        "", description="backend of torch.compile, a transformer block at a time; empty compiles nothing"
    )
    activation_checkpointing: bool = Field(
        False, description="keep only the input of each transformer block, and compute it again in the backward pass"
    )
    heldout_every_steps: int = Field(
        0, ge=0, description="steps between measurements of PSNR on unseen views of held-out objects; 0 never"
    )
    heldout_objects: int = Field(8, ge=1, description="held-out objects that are measured, evenly spaced")
    pictures_every_steps: int = Field(
        0, ge=0, description="steps between pictures of input, targets and predictions in OUT/pictures; 0 never"
    )
    tensorboard: bool = Field(False, description="write metrics and pictures to OUT/tensorboard too")
    wandb_project: str = Field("", description="send metrics and pictures to this project of Weights & Biases too")


class RunConfig(BaseModel):
    """All that a training run is, beside the corpus."""

    model_config = Strict
    model: ModelConfig
    data: DataConfig
    train: TrainConfig


def preset_names() -> list[str]:
    """Return the names of the presets, sorted."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.toml"))


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a preset by its name, or a TOML file by its path, with `section.key=value` overrides.

    Raises:
        UserError: naming the file and the key that is wrong.
    """
    path = Path(name_or_path)
    if name_or_path in preset_names():
        path = CONFIG_DIR / f"{name_or_path}.toml"
    elif not path.is_file():
        raise UserError(f"config {name_or_path!r}: neither a file nor a preset; presets: {', '.join(preset_names())}")
    return validate_config(RunConfig, apply_overrides(read_toml(path), overrides), str(name_or_path))
