"""What is tried before the work begins, and what ends it: hooks that cannot run, a page nobody can write, disks."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.build import build, freeze_plan
from jobs.check import check_captures
from jobs.ingest_worker import IngestWorker
from jobs.produce import _try, close_worker, ingest_capture, needs_trial
from pipeline import version
from pipeline.capture_checks import OUTLINE
from pipeline.fetch import Fetcher
from pipeline.sources import list_assets, open_captures
from pipeline.spec import AdmissionSpec, CaptureSpec, ColmapSource, DatasetSpec, FetchSpec, ProceduralSource
from pipeline.store import open_store
from pipeline.types import Asset, Failure, FailureKind, Sample, UserError
from render.confine import full_disk
from render.supervisor import FullDiskError
from tests.captures import make_capture
from tests.conftest import make_asset
from tests.mirror import Mirror

GOOD = "import sys, cv2\nphoto = cv2.imread(sys.argv[1], 0)\ncv2.imwrite(sys.argv[2], 255 - photo)\n"


def spec_of(captures: Path, **capture: Any) -> DatasetSpec:
    return DatasetSpec(
        name="photos",
        source=ColmapSource(path=str(captures)),
        capture=CaptureSpec(resolution_px=64, **capture),
    )


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One capture without masks."""
    root = tmp_path_factory.mktemp("captures")
    made = make_capture(num_frames=8, width=90, height=160, samples=1)
    for name, data in made.frames.items():
        (root / "house" / "images").mkdir(parents=True, exist_ok=True)
        (root / "house" / "images" / name).write_bytes(data)
    (root / "house" / "sparse" / "0").mkdir(parents=True)
    for name, data in made.models["0"].items():
        (root / "house" / "sparse" / "0" / name).write_bytes(data)
    return root


def hook(folder: Path, text: str) -> str:
    (folder / "hook.py").write_text(text)
    return f"{sys.executable} {folder / 'hook.py'} {{image}} {{mask}}"


def trial(captures: Path, command: str) -> str:
    with IngestWorker(spec_of(captures, mask_command=command), fingerprint="f") as worker:
        return worker.check_hook()


def test_a_hook_is_tried_in_the_child_that_will_run_it(captures: Path, tmp_path: Path) -> None:
    assert trial(captures, hook(tmp_path, GOOD)) == ""
    said = trial(captures, hook(tmp_path, "import sys; sys.exit('no weights here')"))
    assert "ended with status 1" in said
    assert said.endswith("no weights here")
    with pytest.raises(UserError, match=r"'/no/such/hook' cannot be run"):
        trial(captures, "/no/such/hook {image} {mask}")


def test_what_a_hook_said_of_the_first_frame_stands_in_the_row(captures: Path, tmp_path: Path) -> None:
    failing = "import sys\nprint('loading weights', flush=True)\nsys.exit('no weights in ' + sys.argv[1][-4:])"
    spec = spec_of(captures, mask_command=hook(tmp_path, failing))
    (asset,) = list_assets(spec)
    try:
        failure = ingest_capture(spec, "f", asset)
    finally:
        close_worker()
    assert isinstance(failure, Failure)
    assert failure.kind is FailureKind.NO_MASK
    assert failure.message.endswith("'001.jpg': no weights in .jpg")
    assert failure.log_tail.splitlines()[-2:] == ["loading weights", "no weights in .jpg"]


def test_pictures_show_the_masks_that_a_hook_made(captures: Path, tmp_path: Path) -> None:
    def outlined(**capture: Any) -> int:
        spec = spec_of(captures, **capture)
        source = open_captures(spec)
        (asset,) = source.list_assets()
        with IngestWorker(spec, fingerprint="f") as worker:
            image = worker.picture(asset, source.open_capture(asset), "003.jpg", 128)
        return int((image == OUTLINE).all(axis=2).sum())

    assert outlined(mask_command=hook(tmp_path, GOOD)) > 50
    assert outlined(mask_command=hook(tmp_path, "raise SystemExit(1)")) == 0
    assert outlined() == 0


def test_rembg_that_is_not_there_or_has_no_weights_is_one_line(captures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("U2NET_HOME", "/nowhere")
    with pytest.raises(UserError, match=r"'rembg': (the package is not installed; pip install|its network cannot be)"):
        trial(captures, "rembg")


def test_a_hook_that_cannot_be_run_ends_the_run_before_a_plan_is_frozen(captures: Path, tmp_path: Path) -> None:
    spec = spec_of(captures, mask_command="/no/such/hook {image} {mask}")
    assert needs_trial(ingest_capture)
    with pytest.raises(UserError, match="cannot be run") as caught:
        build(spec, str(tmp_path / "corpus"), show_progress=False)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "corpus").glob("plans/*"))


def test_a_page_that_cannot_be_written_is_known_first(captures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "checks"):
        with pytest.raises(UserError, match=r"OUT: .* cannot be written"):
            check_captures(spec_of(captures / "nowhere"), out, num_workers=1, show_progress=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if os.geteuid() != 0 or mount is None or umount is None:
        pytest.skip("a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this system mounts no tmpfs")
    try:
        yield disk
    finally:
        close_worker()
        subprocess.run([umount, "-l", str(disk)], check=True)


def test_a_full_scratch_disk_is_no_failure_of_a_capture(
    captures: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with this machine must not be written down as wrong with the capture, for good."""
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    spec = spec_of(captures)
    (asset,) = list_assets(spec)
    first = ingest_capture(spec, "f", asset)
    assert isinstance(first, Failure)
    assert first.kind is FailureKind.NO_MASK, "the model is read, the masks are lacking"
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(2**22))
    with pytest.raises(UserError, match=r"No space left on device; free some, or set TMPDIR") as caught:
        ingest_capture(spec, "f", asset)
    assert "\n" not in str(caught.value)


def test_a_full_fetch_cache_is_no_failure_of_an_object(small_disk: Path) -> None:
    """What it is written down as would count against the object, and be tried again by hand alone."""
    uid = "a" * 32
    with Mirror({uid: bytes(4 * 2**20)}) as mirror:
        fetcher = Fetcher(FetchSpec(cache_dir=str(small_disk / "cache")))

        def attempt(spec: DatasetSpec, fingerprint: str, asset: Asset) -> Sample:
            fetcher.fetch(mirror.object_url(asset.uid), max_bytes=2**23, label=asset.uid)
            raise AssertionError

        with pytest.raises(FullDiskError, match=r"No space left on device; free some"):
            _try(attempt, DatasetSpec(name="f", source=ProceduralSource()), "f", make_asset(uid))


def test_only_a_full_disk_is_one() -> None:
    assert "on another disk" in str(full_disk(OSError(errno.ENOSPC, "x", "/scratch/file")))
    assert "/scratch/file" in str(full_disk(OSError(errno.EDQUOT, "x", "/scratch/file")))
    assert full_disk(OSError(errno.ENOENT, "x")) is None
    assert full_disk(ValueError(errno.ENOSPC)) is None


def test_publishing_all_datasets_by_the_rules_of_one_is_said(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "corpus"))
    for name, frames in (("apples", 8), ("pears", 12)):
        rules = AdmissionSpec(min_frames=frames)
        freeze_plan(DatasetSpec(name=name, source=ProceduralSource(num_objects=2), admission=rules), store)
    plans = version.plan_sets(store)
    note = version.rules_note(plans)
    assert note is not None
    assert f"plan {plans[-1].id}" in note
    assert "apples have another admission.min_frames." in note
    assert "\n" not in note
    assert version.rules_note(plans[:1]) is None
    assert version.rules_note([]) is None
