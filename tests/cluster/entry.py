"""The command line as it is, with a producer that needs no Blender: what a driver of the cluster tests runs.

    python -m tests.cluster.entry render --spec ... --corpus ...

A sample is a few views of noise, 150 KB, so that it lies in the object store of the node that made it as a real one
does; it is a pure function of the uid. MADE_S in the environment of the node says how long one takes.
"""

from __future__ import annotations

import importlib
import os
import sys
import time

import numpy as np

from pipeline.sample import encode_rgba
from pipeline.spec import DatasetSpec
from pipeline.types import Asset, Failure, FailureKind, Normalization, Sample, View, derive_seed
from tests.conftest import orbit_camera

PRODUCER = "noise 1"
NUM_VIEWS, SIZE_PX = 4, 96


def produce(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make an object of noise; seeds 3, 13, ... fail."""
    begun = time.time()
    time.sleep(float(os.environ.get("MADE_S", "0.3")))
    if asset.uid.endswith("3"):
        return Failure(uid=asset.uid, kind=FailureKind.EMPTY_SCENE, message="as asked")
    rng = np.random.default_rng(derive_seed("noise", asset.uid))
    views = []
    for i in range(NUM_VIEWS):
        picture = rng.integers(0, 256, (SIZE_PX, SIZE_PX, 4), dtype=np.uint8)
        picture[..., 3] = 255
        camera = orbit_camera(i, 0.5, 2.0, SIZE_PX)
        views.append(View(index=i, camera=camera, planes={"rgba": encode_rgba(picture, "webp")}))
    where = {"worker": os.uname().nodename, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "pid": os.getpid()}
    return Sample(
        asset=asset,
        spec_fingerprint=fingerprint,
        seed=derive_seed("noise", asset.uid),
        normalization=Normalization(scale=1.0, rotation=np.eye(3), translation=np.zeros(3)),
        views=tuple(views),
        quality={"mean_alpha_coverage": 1.0},
        provenance=where | {"begun": begun, "ended": time.time(), "attempts": 1},
    )


def main() -> None:
    """Run the command line."""
    from jobs import produce as module

    made = importlib.import_module("tests.cluster.entry")  # workers do not know what ran as __main__
    module.producer_of = lambda _: (made.produce, PRODUCER)
    from jobs import cli

    cli.main()


if __name__ == "__main__":
    # A wrapper that stands in for the interpreter of the batch scripts passes "-m jobs.cli" too.
    if sys.argv[1:3] == ["-m", "jobs.cli"]:
        del sys.argv[1:3]
    main()
