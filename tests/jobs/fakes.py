"""Producers without Blender, importable by Ray workers: what they do is written in the asset's uid."""

from __future__ import annotations

import os
import signal
import time

from pipeline.spec import DatasetSpec
from pipeline.types import Asset, Failure, FailureKind, Sample
from tests.conftest import make_sample


def produce(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make a ball; seeds 3, 13, ... fail."""
    if asset.uid.endswith("3"):
        return Failure(uid=asset.uid, kind=FailureKind.EMPTY_SCENE, message="as asked")
    return make_sample(asset.uid, fingerprint=fingerprint, asset=asset)


def produce_slowly(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make a ball, 0.3 s each."""
    time.sleep(0.3)
    return make_sample(asset.uid, fingerprint=fingerprint, asset=asset)


def produce_deadly(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Seed 1 kills its worker every time, seed 2 raises, the others are balls."""
    if asset.uid.endswith("1"):
        os.kill(os.getpid(), signal.SIGKILL)
    if asset.uid.endswith("2"):
        raise RuntimeError("a bug")
    return make_sample(asset.uid, fingerprint=fingerprint, asset=asset)
