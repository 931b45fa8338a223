"""The loss of LRM (section 3.4, equation 1): the mean over views of MSE + lambda LPIPS.

LPIPS (Zhang et al. 2018, equation 1) compares two images by what VGG16 makes of them. With y_l [C_l, H_l, W_l] the
activations of layer l, scaled to unit length along the channels, and learnt weights w_l >= 0 a channel,

    d(x, x0) = sum_l 1 / (H_l W_l) sum_{h,w} || sqrt(w_l) * (y_l(x) - y_l(x0)) ||^2

for l the last ReLU before each of VGG16's poolings, and the last of all. Written from that; torchvision is not needed.

The weights are two published files: VGG16 trained on ImageNet (Simonyan and Zisserman 2014, torchvision's) and the w_l
of LPIPS 0.1. `make weights` fetches both, checks their digests, and writes the part that is used, 14.7 M numbers, into
one safetensors file with the digests beside them. A file of other origin is refused: a loss from random weights would
look plausible for days.

Cost, paper preset: 8 images of 128^2 an object (4 rendered, with a graph; 4 true, without), 10 GFLOP each forward.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lrm.config import TrainConfig
from pipeline.types import UserError

LPIPS_NAME = "lpips-vgg16.safetensors"
VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
SOURCES = {"vgg16_sha256": VGG16_SHA256, "lpips_sha256": LPIPS_SHA256}
"""Digests of the published files, kept in the file made of them."""

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""VGG16: channels and convolutions of each block; a pooling of 2 stands between blocks."""

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet statistics, which VGG16 was trained with."""


def mse_loss(rendered: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error [] of patches [B, V, 3, P, P] in [0, 1], over objects, views and pixels alike."""
    return torch.mean((rendered - target) ** 2)


def psnr_db(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]; at most 100."""
    return -10 * float(torch.log10(torch.tensor(max(mse, 1e-10), dtype=torch.float64)))


def lpips_shapes() -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that `Lpips` takes, in order."""
    channels = [3, *(width for width, count in BLOCKS for _ in range(count))]
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (before, after) in enumerate(pairwise(channels)):
        shapes[f"conv{index}.weight"], shapes[f"conv{index}.bias"] = (after, before, 3, 3), (after,)
    return shapes | {f"linear{block}": (width,) for block, (width, _) in enumerate(BLOCKS)}


class Lpips(nn.Module):
    """The perceptual distance; its tensors are buffers, never trained, and not part of a checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in lpips_shapes():
            self.register_buffer(name.replace(".", "_"), tensors[name].float(), persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).reshape(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def _activations(self, image: Tensor) -> list[Tensor]:
        """Return y_l [N, C_l, H_l, W_l], float32, of images [N, 3, H, W] in [0, 1]."""
        hidden, out, index = (image - self.mean) / self.std, [], 0
        for block, (_, count) in enumerate(BLOCKS):
            hidden = F.max_pool2d(hidden, 2) if block else hidden
            for _ in range(count):
                weight, bias = self.get_buffer(f"conv{index}_weight"), self.get_buffer(f"conv{index}_bias")
                hidden = F.relu(F.conv2d(hidden, weight, bias, padding=1))
                index += 1
            wide = hidden.float()
            # The norm's gradient is 0 where all channels are 0; that of a square root of a sum would be NaN.
            out.append(wide / (torch.linalg.vector_norm(wide, dim=1, keepdim=True) + 1e-10))
        return out

    def forward(self, rendered: Tensor, target: Tensor) -> Tensor:
        """Return the distance [...] of images [..., 3, H, W] in [0, 1], 16 px at least; target gets no gradient."""
        lead = rendered.shape[:-3]
        ours = self._activations(rendered.flatten(0, -4))
        with torch.no_grad():
            theirs = self._activations(target.flatten(0, -4))
        distance = torch.zeros(ours[0].shape[0], device=rendered.device)
        for block, (one, other) in enumerate(zip(ours, theirs)):
            weight = self.get_buffer(f"linear{block}")[:, None, None]
            distance = distance + ((one - other) ** 2 * weight).sum(1).mean((-2, -1))
        return distance.reshape(lead)


def default_lpips_path() -> Path:
    """Return where `make weights` writes, and training looks, unless told otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lrm-corpus" / LPIPS_NAME


def load_lpips(config: TrainConfig) -> Lpips | None:
    """Return the perceptual loss that a run needs, or None if its weight is 0.

    Raises:
        UserError: if it needs one whose weights are not there, or are not the published ones.
    """
    if config.lpips_weight == 0:
        return None
    path = Path(config.lpips_path) if config.lpips_path else default_lpips_path()
    advice = "run make weights, or set train.lpips_weight=0"
    if not path.is_file():
        raise UserError(f"train.lpips_weight is {config.lpips_weight:g} and {path} is not there; {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("sources", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:120]}); {advice}") from None
    if found != SOURCES or {name: tuple(tensor.shape) for name, tensor in tensors.items()} != lpips_shapes():
        raise UserError(f"{path} was not made of the published weights of VGG16 and LPIPS 0.1; {advice}")
    return Lpips(tensors)


def write_lpips(vgg16_path: Path, lpips_path: Path, out: Path) -> None:
    """Write the file that `load_lpips` reads, of torchvision's VGG16 and LPIPS 0.1's linear layers.

    Raises:
        UserError: if a file does not hold what its name promises.
    """
    vgg16 = _read_tensors(vgg16_path)
    linear = _read_tensors(lpips_path)
    tensors: dict[str, Tensor] = {}
    convolution, place = 0, 0  # torchvision numbers ReLUs and poolings too
    for _, count in BLOCKS:
        for _ in range(count):
            for kind in ("weight", "bias"):
                tensors[f"conv{convolution}.{kind}"] = vgg16.get(f"features.{place}.{kind}", torch.empty(0))
            convolution, place = convolution + 1, place + 2
        place += 1
    for block in range(len(BLOCKS)):
        tensors[f"linear{block}"] = linear.get(f"lin{block}.model.1.weight", torch.empty(0)).flatten()
    for name, shape in lpips_shapes().items():
        if tuple(tensors[name].shape) != shape:
            source = vgg16_path if name.startswith("conv") else lpips_path
            raise UserError(f"{source}: {name} should be {shape}, found {tuple(tensors[name].shape)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    digests = {"vgg16_sha256": _sha256(vgg16_path), "lpips_sha256": _sha256(lpips_path)}
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    metadata = {"sources": json.dumps(digests)}  # one key, since several have no fixed order in a file
    save_file({name: tensors[name].float().contiguous() for name in lpips_shapes()}, part, metadata=metadata)
    part.replace(out)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors
