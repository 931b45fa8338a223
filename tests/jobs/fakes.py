"""Producers without Blender, importable by Ray workers: what they do is written in the asset's uid."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from jobs import guard
from jobs import produce as produce_module
from pipeline.spec import DatasetSpec
from pipeline.types import Asset, Failure, FailureKind, Sample
from render import worker as worker_module
from render.supervisor import Supervisor
from tests.conftest import make_sample

FAKE_CHILD = Path(__file__).resolve().parents[1] / "render" / "fake_child.py"


def produce(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make a ball; seeds 3, 13, ... fail."""
    if asset.uid.endswith("3"):
        return Failure(uid=asset.uid, kind=FailureKind.EMPTY_SCENE, message="as asked")
    return make_sample(asset.uid, fingerprint=fingerprint, asset=asset)


def produce_noting(folder: str, spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make a tiny ball, and leave a file that tells so each time."""
    (Path(folder) / f"{asset.uid} {secrets.token_hex(8)}").touch()
    return make_sample(asset.uid, fingerprint=fingerprint, asset=asset, num_views=2, size_px=16)


def produce_on_a_full_disk(
    times: int, folder: str, spec: DatasetSpec, fingerprint: str, asset: Asset
) -> Sample | Failure:
    """Make a ball by the real tries, so many of which find the disk full; only for seed 1, counted in `folder`."""

    def attempt(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample:
        if asset.uid.endswith("1") and len(list(Path(folder).iterdir())) < times:
            (Path(folder) / secrets.token_hex(8)).touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch")
        return make_sample(asset.uid, fingerprint=fingerprint, asset=asset)

    guard.LOOK_S = 0.1
    return produce_module._try(attempt, spec, fingerprint, asset)


def produce_noting_full_disks(folder: str, spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """As `produce_on_a_full_disk` once, 0.1 s each, with a file in `folder` for every try of every object."""
    (Path(folder) / secrets.token_hex(8)).write_text(asset.uid)
    time.sleep(0.1)
    return produce_on_a_full_disk(1, str(Path(folder).with_name("full")), spec, fingerprint, asset)


def produce_and_fill(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make a ball; seed 1 waits for the others and fills the disk before it ends, to 8 MiB."""
    if asset.uid.endswith("1"):
        time.sleep(1.0)
        ballast = Path(os.environ["LRM_TEST_BALLAST"])
        ballast.write_bytes(bytes(shutil.disk_usage(ballast.parent).free - 8 * 2**20))
        guard.LOOK_S = 0.0
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


POISON = ("good", "crash", "hang", "bomb", "spam", "kill", "alloc", "good")
"""What object i of `produce_poison` does: modes of tests/render/fake_child.py; "kill" is the supervisor's own death."""


def produce_poison(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Render by the real supervision, in a child that misbehaves as POISON says."""
    mode = POISON[int(asset.uid.rpartition("-")[2])]
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)

    def attempt(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample:
        folder = tempfile.TemporaryDirectory()
        path = Path(folder.name, f"{mode}.glb")
        path.touch()
        if mode == "hang":
            spec = spec.model_copy(update={"limits": spec.limits.model_copy(update={"deadline_s": 2.0})})
        worker = produce_module._worker(worker_module.RenderWorker, spec, fingerprint)
        with folder:
            return worker.render(replace(asset, uri=str(path), format="glb"), path)

    worker_module.default_command = lambda: [sys.executable, "-P", "-s", str(FAKE_CHILD)]
    produce_module._render = attempt
    return produce_module.render_asset(spec, fingerprint, asset)


def produce_offline_from_12(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """Make a ball; from seed 12 on the network is gone."""
    if int(asset.uid.rpartition("-")[2]) >= 12:
        return Failure(uid=asset.uid, kind=FailureKind.NETWORK, message="no route to host")
    return make_sample(asset.uid, fingerprint=fingerprint, asset=asset)


def produce_talking(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """As `produce`, with a careless line in the log."""
    logging.getLogger("jobs.fakes").info("key %s", os.environ.get("AWS_SECRET_ACCESS_KEY"))
    return produce(spec, fingerprint, asset)


def produce_watched(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample | Failure:
    """As `produce`, in 50 ms, as if a child had been started for each."""
    time.sleep(0.05)
    Supervisor.num_started += 1
    made = produce(spec, fingerprint, asset)
    return replace(made, provenance=dict(made.provenance) | {"seconds": {"render": 0.04, "encode": 0.01}})
