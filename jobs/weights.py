"""Fetch the published weights that the perceptual loss needs, verify them, and keep the part that is used.

The files are BSD-licensed: VGG16 of torchvision (3-clause), and the linear layers of LPIPS 0.1 (2-clause). They come
through the content-addressed cache of all downloads, resumable, with their digests checked; 553 MB are fetched once, 59
MB are kept for training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lrm.losses import LPIPS_SHA256, VGG16_SHA256, write_lpips
from pipeline.fetch import Fetcher
from pipeline.spec import FetchSpec
from pipeline.types import AssetError, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """A published file."""

    label: str
    url: str
    sha256: str
    num_bytes: int


VGG16 = WeightsFile(
    label="VGG16 of torchvision",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256=VGG16_SHA256,
    num_bytes=553_433_881,
)
LPIPS = WeightsFile(
    label="linear layers of LPIPS 0.1",
    url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
    sha256=LPIPS_SHA256,
    num_bytes=7289,
)


def make_weights(out: Path, *, vgg16: WeightsFile = VGG16, lpips: WeightsFile = LPIPS, spec: FetchSpec) -> None:
    """Fetch both files and write `out`, which `lrm.losses.load_lpips` reads.

    Raises:
        UserError: naming the file that cannot be had, why, and what to do.
    """
    fetcher, paths = Fetcher(spec), []
    for file in (lpips, vgg16):
        try:
            got = fetcher.fetch(
                file.url, sha256=file.sha256, num_bytes=file.num_bytes, max_bytes=file.num_bytes, label=file.label
            )
        except AssetError as error:
            raise UserError(
                f"{error.message} ({file.url}); make weights elsewhere and copy {out}, or set train.lpips_weight=0"
            ) from None
        paths.append(got.path)
    write_lpips(paths[1], paths[0], out)
