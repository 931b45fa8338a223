"""Inception v3 as FID has it: images to 2048 numbers (Szegedy et al. 2016, table 1; Heusel et al. 2017).

FID compares features of one network: TensorFlow's Inception of 2015-12-05. Its weights were ported to PyTorch as
`pt_inception-2015-12-05-6726825d.pth`, which the public packages for FID use. Those packages need torchvision; this
file builds the same network from a table, under the names that the weights have, on torch alone.

It differs from torchvision's Inception where TensorFlow's graph does: average pooling leaves the padding out of its
mean, and the last block pools by maximum. With random weights and pictures it gave the features of pytorch-fid 0.3.0 to
the last bit; `tests/lrm/test_inception.py` holds what can be held without that package. torch-fidelity scales pictures
by 128 instead of 127.5 and resizes as TensorFlow 1 did, so that its features differ a little.

21.8 M parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.types import UserError

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256_START = "6726825d"
"""The published file carries the start of its digest in its name, as all of PyTorch's do."""
IMAGE_PX, NUM_FEATURES = 299, 2048

Kernel = int | tuple[int, int]
Step = tuple[str, int, Kernel, int]
"""A convolution: its name, output channels, kernel and stride. Padding keeps the size at stride 1, is none at 2."""
Branch = list[Step | tuple[Step, Step]]
"""Convolutions one after another; a pair at the end reads one input, side by side."""


def _a(pooled: int) -> tuple[list[Branch], str, int]:
    return (
        [
            [("branch1x1", 64, 1, 1)],
            [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
            [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
        ],
        "average",
        pooled,
    )


def _c(width: int) -> tuple[list[Branch], str, int]:
    row, column = (1, 7), (7, 1)
    return (
        [
            [("branch1x1", 192, 1, 1)],
            [("branch7x7_1", width, 1, 1), ("branch7x7_2", width, row, 1), ("branch7x7_3", 192, column, 1)],
            [
                ("branch7x7dbl_1", width, 1, 1), ("branch7x7dbl_2", width, column, 1),
                ("branch7x7dbl_3", width, row, 1), ("branch7x7dbl_4", width, column, 1),
                ("branch7x7dbl_5", 192, row, 1),
            ],
        ],
        "average",
        192,
    )  # fmt: skip


def _e(pool: str) -> tuple[list[Branch], str, int]:
    row, column = (1, 3), (3, 1)
    return (
        [
            [("branch1x1", 320, 1, 1)],
            [("branch3x3_1", 384, 1, 1), (("branch3x3_2a", 384, row, 1), ("branch3x3_2b", 384, column, 1))],
            [
                ("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 1),
                (("branch3x3dbl_3a", 384, row, 1), ("branch3x3dbl_3b", 384, column, 1)),
            ],
        ],
        pool,
        192,
    )  # fmt: skip


_B: list[Branch] = [
    [("branch3x3", 384, 3, 2)],
    [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)],
]
_D: list[Branch] = [
    [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
    [
        ("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, (1, 7), 1), ("branch7x7x3_3", 192, (7, 1), 1),
        ("branch7x7x3_4", 192, 3, 2),
    ],
]  # fmt: skip

BLOCKS: dict[str, tuple[list[Branch], str, int]] = {
    "Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64), "Mixed_6a": (_B, "stride", 0),
    "Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192),
    "Mixed_7a": (_D, "stride", 0), "Mixed_7b": _e("average"), "Mixed_7c": _e("max"),
}  # fmt: skip
"""Each block's branches, how its last branch pools, and the channels of the convolution behind that pooling."""


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, step: Step, padding: tuple[int, int] | None = None) -> None:
        super().__init__()
        _, out, kernel, stride = step
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        same = (sides[0] // 2, sides[1] // 2) if stride == 1 else (0, 0)
        self.conv = nn.Conv2d(channels, out, sides, stride, same if padding is None else padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, out, H', W'] of [N, in, H, W]."""
        out: Tensor = F.relu(self.bn(self.conv(x)))
        return out


class Mixed(nn.Module):
    """Branches side by side, and one that pools; their channels one after another."""

    def __init__(self, channels: int, branches: list[Branch], pool: str, pooled: int) -> None:
        super().__init__()
        self.pool, self.branches, self.channels = pool, branches, 0
        for branch in branches:
            width = channels
            for step in branch:
                pair = step if isinstance(step[0], tuple) else (step,)
                for one in pair:
                    assert len(one) == 4
                    self.add_module(str(one[0]), Convolution(width, one))
                width = sum(one[1] for one in pair)
            self.channels += width
        if pooled:
            self.branch_pool = Convolution(channels, ("branch_pool", pooled, 1, 1))
        self.channels += pooled or channels

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, channels, H', W'] of [N, in, H, W]."""
        out = []
        for branch in self.branches:
            state = x
            for step in branch:
                names = [str(one[0]) for one in step] if isinstance(step[0], tuple) else [str(step[0])]
                state = torch.cat([self.get_submodule(name)(state) for name in names], 1)
            out.append(state)
        if self.pool == "stride":
            return torch.cat([*out, F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "max":
            pooled = F.max_pool2d(x, 3, 1, 1)
        else:
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*out, self.branch_pool(pooled)], 1)


class FidInception(nn.Module):
    """Images to the 2048 features that FID compares."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, ("", 32, 3, 2))
        self.Conv2d_2a_3x3 = Convolution(32, ("", 32, 3, 1), (0, 0))
        self.Conv2d_2b_3x3 = Convolution(32, ("", 64, 3, 1))
        self.Conv2d_3b_1x1 = Convolution(64, ("", 80, 1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, ("", 192, 3, 1), (0, 0))
        channels = 192
        for name, (branches, pool, pooled) in BLOCKS.items():
            block = Mixed(channels, branches, pool, pooled)
            self.add_module(name, block)
            channels = block.channels
        assert channels == NUM_FEATURES
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return features [N, 2048] of images [N, 3, H, W] in [0, 1], resized to 299^2 as pytorch-fid does."""
        x = F.interpolate(images, (IMAGE_PX, IMAGE_PX), mode="bilinear", align_corners=False) * 2 - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean((-2, -1))


def load_inception(path: Path) -> FidInception:
    """Return the network with the published weights.

    Raises:
        UserError: if the file is not the published one.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(WEIGHTS_SHA256_START):
        raise UserError(f"{path}: sha256 begins {digest[:8]}, that of the published file {WEIGHTS_SHA256_START}")
    return fill(FidInception(), torch.load(path, map_location="cpu", weights_only=True), str(path))


def fill(network: FidInception, tensors: Mapping[str, Tensor], where: str) -> FidInception:
    """Put tensors into the network, whose classifier `fc` is left out."""
    used = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    try:
        network.load_state_dict(used)
    except RuntimeError as error:
        raise UserError(f"{where}: not the weights of FID's Inception: {' '.join(str(error).split())[:200]}") from None
    return network
