"""Supervision: whatever the child does, the asset ends typed, nothing is left behind, and the next asset renders."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.types import Asset, AssetError, Failure, FailureKind, Sample, UserError
from render.process import LOG_RING_BYTES, ScratchFolder, family, scrubbed_environment
from render.worker import RenderWorker
from tests.crash.test_failing_writes import small_disk
from tests.render.conftest import BLENDER_5, SHARED, asset_of, make_spec
from tests.render.files import ball, write_obj

POISON = Path(tempfile.mkdtemp(prefix="lrm-poison-"))
atexit.register(shutil.rmtree, POISON, ignore_errors=True)

FAKE = [sys.executable, "-P", "-s", str(Path(__file__).with_name("fake_child.py"))]
ROOT = Path(__file__).resolve().parents[2]

MakeWorker = Callable[..., RenderWorker]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[MakeWorker]:
    made = []

    def make(**sections: dict[str, object]) -> RenderWorker:
        spec = make_spec(**sections)
        made.append(RenderWorker(spec, fingerprint="f", scratch_dir=tmp_path / "scratch", child_command=FAKE))
        return made[-1]

    yield make
    for worker in made:
        worker.close()
    assert list((tmp_path / "scratch").iterdir()) == [], "a temporary folder was left behind"


def poison(mode: str) -> Path:
    """Return a file whose name tells the fake child how to behave."""
    path = POISON / f"{mode}.glb"
    path.touch()
    return path


def attempt(worker: RenderWorker, mode: str) -> AssetError:
    path = poison(mode)
    with pytest.raises(AssetError) as caught:
        worker.render(asset_of(path), path)
    return caught.value


def pid_of(worker: RenderWorker) -> int:
    return int(good(worker).quality["pid"])


def good(worker: RenderWorker) -> Sample:
    path = poison("good")
    return worker.render(asset_of(path), path)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("crash", FailureKind.RENDER_CRASH, "signal SIGSEGV"),
        ("alloc", FailureKind.OUT_OF_MEMORY, "signal SIGABRT"),
        ("memoryerror", FailureKind.OUT_OF_MEMORY, "memory"),
        ("garbage", FailureKind.RENDER_CRASH, "starts with b'Trac'"),
        ("header", FailureKind.RENDER_CRASH, "header of 2147483648 bytes"),
        ("nan", FailureKind.RENDER_CRASH, "NaN"),
        ("infinite", FailureKind.RENDER_CRASH, "1e999 is not a finite number"),
        ("digits", FailureKind.RENDER_CRASH, "an integer of 4000 digits"),
        ("deep", FailureKind.RENDER_CRASH, "nested deeper than 12"),
        ("shape", FailureKind.RENDER_CRASH, "view 0: it came with 16384 bytes of pixels; 15872 are right for its box"),
        ("box", FailureKind.RENDER_CRASH, "view 0: its box [0, 0, 32, 33] does not lie in 32 x 32 px"),
        ("planes", FailureKind.RENDER_CRASH, "['rgba', 'depth']; ['rgba'] were asked for"),
        ("big", FailureKind.RENDER_CRASH, "payload of 262144 bytes; at most 65536 are allowed"),
        ("sides", FailureKind.RENDER_CRASH, "four sides came with 16384 bytes"),
        ("sideless", FailureKind.RENDER_CRASH, "the child said 'view' after 0 views"),
        ("facts", FailureKind.RENDER_CRASH, "view 1 came with the facts ['fact 1'], view 0 with ['fact 0']"),
        ("kind", FailureKind.RENDER_CRASH, "unknown kind 'made_up'"),
        ("few", FailureKind.BAD_VIEW_COUNT, "1 views were rendered, 2 were asked for"),
        ("many", FailureKind.BAD_VIEW_COUNT, "view 2 came after 2 of 2"),
        ("order", FailureKind.BAD_VIEW_COUNT, "view 1 came after 0 of 2"),
        ("blank", FailureKind.BLANK_IMAGE, "min_alpha_coverage"),
    ],
)
def test_a_misbehaving_child_gives_a_typed_failure_and_the_next_asset_renders(
    fake: MakeWorker, mode: str, kind: FailureKind, message: str
) -> None:
    worker = fake()
    error = attempt(worker, mode)
    assert error.kind is kind
    assert message in error.message
    assert len(good(worker).views) == 2


def test_a_full_scratch_folder_is_stopped_even_if_the_file_has_no_name(fake: MakeWorker) -> None:
    for mode in ("fill", "fill-unseen"):
        worker = fake(limits={"scratch_bytes": 2**25})
        error = attempt(worker, mode)
        assert error.kind is FailureKind.TOO_LARGE
        assert "32 MiB are allowed (limits.scratch_bytes)" in error.message
        assert len(good(worker).views) == 2


def test_a_full_disk_is_the_machines_fault_unless_the_asset_filled_it(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4096) as disk:
        for limits, filler in (({}, 3 * 2**20), ({"scratch_bytes": 2**22}, 0)):
            (disk / "others").write_bytes(bytes(filler))
            with RenderWorker(make_spec(limits=limits), fingerprint="f", scratch_dir=disk, child_command=FAKE) as one:
                if filler:
                    with pytest.raises(UserError, match=r"No space left on device; free some, or set TMPDIR") as caught:
                        one.render(asset_of(poison("full")), poison("full"))
                    assert str(disk) in str(caught.value)
                else:
                    error = attempt(one, "full")
                    assert error.kind is FailureKind.TOO_LARGE
                    assert "writing a texture" in error.log_tail
                (disk / "others").unlink()
                assert len(good(one).views) == 2, "with room again it goes on"


def test_a_child_that_says_its_disk_is_full_is_not_believed(fake: MakeWorker) -> None:
    # Else any file that has taken its child over could end the run.
    error = attempt(fake(), "full-of-lies")
    assert error.kind is FailureKind.INTERNAL


def test_what_the_child_says_reaches_rows_as_printable_text(fake: MakeWorker) -> None:
    error = attempt(fake(), "escape")
    assert error.message == "red \ufffd[31m and \ufffd alone\nsecond line"
    failure = Failure.from_error("x", error)
    assert failure.message == "red \ufffd[31m and \ufffd alone second line"
    assert "\x1b" not in failure.log_tail
    assert "coloured" in failure.log_tail


def test_numbers_that_no_measurement_gives_are_dropped(fake: MakeWorker) -> None:
    path = poison("huge")
    assert "cropped" not in fake().render(asset_of(path), path).quality["views"]


def test_a_crash_keeps_the_last_words(fake: MakeWorker) -> None:
    assert "about to crash" in attempt(fake(), "crash").log_tail


def test_a_hang_ends_at_the_deadline_with_all_that_it_started(fake: MakeWorker) -> None:
    worker = fake(limits={"deadline_s": 1.0})
    pid = pid_of(worker)
    started = time.monotonic()
    family_seen: set[int] = set()
    watcher = threading.Timer(0.7, lambda: family_seen.update(family(pid)))
    watcher.start()
    error = attempt(worker, "hang")
    watcher.join()
    assert error.kind is FailureKind.RENDER_TIMEOUT
    assert "1 s" in error.message
    assert time.monotonic() - started < 5
    assert len(family_seen) == 3
    assert not any(alive(one) for one in family_seen)


def test_a_child_that_falls_silent_is_not_waited_for_until_the_deadline(fake: MakeWorker) -> None:
    started = time.monotonic()
    error = attempt(fake(limits={"silence_s": 1.0}), "hang")
    assert error.kind is FailureKind.RENDER_TIMEOUT
    assert "silence_s" in error.message
    assert time.monotonic() - started < 10


def test_a_memory_bomb_is_stopped_at_the_cap(fake: MakeWorker) -> None:
    error = attempt(fake(limits={"memory_bytes": 2**28}), "bomb")
    assert error.kind is FailureKind.OUT_OF_MEMORY
    assert "256 MiB are allowed" in error.message


def test_a_gigabyte_of_stderr_neither_blocks_nor_fills_memory(fake: MakeWorker) -> None:
    worker = fake()
    error = attempt(worker, "spam")
    assert error.kind is FailureKind.IMPORT_ERROR
    assert error.log_tail.endswith("last words")
    assert len(error.log_tail) <= 4000
    assert worker._child is not None
    assert len(worker._child.log._data) <= LOG_RING_BYTES


def test_the_child_is_kept_between_assets_and_recycled_after_so_many(fake: MakeWorker) -> None:
    worker = fake(limits={"objects_per_child": 2})
    first, second, third = (pid_of(worker) for _ in range(3))
    assert first == second != third
    assert not alive(first)


def test_failed_assets_count_towards_the_recycling(fake: MakeWorker) -> None:
    worker = fake(limits={"objects_per_child": 2})
    first = pid_of(worker)
    attempt(worker, "spam")
    assert pid_of(worker) != first


def test_the_environment_is_scrubbed(fake: MakeWorker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secrets = ["AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN"]
    for name in [*secrets, "DISPLAY", "MY_PASSWORD"]:
        monkeypatch.setenv(name, "secret")
    quality = good(fake()).quality
    environment = quality["environment"]
    assert "secret" not in environment.values()
    assert set(environment) <= {
        "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHASHSEED",
        "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", "HOME", "TMPDIR", "BLENDER_USER_RESOURCES", "OMP_NUM_THREADS",
    }  # fmt: skip
    for name in ("HOME", "TMPDIR"):
        assert Path(environment[name]).is_relative_to(tmp_path / "scratch")
    assert Path(quality["cwd"]) == Path(environment["HOME"])
    assert "PATH" not in scrubbed_environment(tmp_path, 1, {"HOME": "/home/me"})


def test_the_child_outlives_the_thread_that_first_rendered(fake: MakeWorker) -> None:
    # The kernel ties PR_SET_PDEATHSIG to the thread that started the child, not to the process.
    worker = fake()
    pids: list[int] = []
    thread = threading.Thread(target=lambda: pids.append(pid_of(worker)))
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert pid_of(worker) == pids[0]


def test_close_kills_the_child_and_may_be_called_twice(fake: MakeWorker) -> None:
    worker = fake()
    pid = pid_of(worker)
    worker.close()
    worker.close()
    assert not alive(pid)


def test_an_interrupt_kills_the_child(fake: MakeWorker) -> None:
    worker = fake()
    pid = pid_of(worker)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    path = poison("hang")
    with pytest.raises(KeyboardInterrupt):
        worker.render(asset_of(path), path)
    assert not alive(pid)


def test_a_file_is_asked_for(fake: MakeWorker) -> None:
    with pytest.raises(AssetError, match="came without a file"):
        fake().render(asset_of(Path("/nowhere/good.glb")), None)


SUPERVISOR = """
import sys, time
from pathlib import Path
from tests.render.conftest import asset_of, make_spec
from render.worker import RenderWorker
command = None if sys.argv[2] == "real" else [sys.executable, "-P", "-s", sys.argv[2]]
worker = RenderWorker(make_spec(), fingerprint="f", scratch_dir=Path(sys.argv[1]), child_command=command)
child = worker._ensure_child()
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.blender
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_supervisor_leaves_no_child(tmp_path: Path, sign: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path), "real"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        assert alive(pid)
        supervisor.send_signal(sign)
        supervisor.wait()
    until = time.monotonic() + 5
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)
    # Its folder is swept by the next owner beside it, once it is old enough not to be a newborn.
    assert len(list(tmp_path.iterdir())) == 1
    folder = ScratchFolder(tmp_path, newborn_s=0)
    assert list(tmp_path.iterdir()) == [folder.path]
    ScratchFolder(tmp_path, newborn_s=0).close()
    assert list(tmp_path.iterdir()) == [folder.path], "a living owner's folder must stay"
    folder.close()


def _ball_spec() -> dict[str, object]:
    return {"num_views": 3, "resolution_px": 48, "samples": 8, "denoise": True}


@pytest.mark.blender
def test_same_asset_same_bytes_in_any_child_with_any_threads(tmp_path: Path) -> None:
    vertices, triangles = ball()
    path = write_obj(tmp_path / "ball.obj", [(vertices, triangles, (0.8, 0.2, 0.1))], smooth=True)
    other = write_obj(tmp_path / "other.obj", [(vertices * [1, 2, 1], triangles, (0.1, 0.2, 0.9))])
    spec = make_spec(render=_ball_spec())

    def sample_bytes(worker: RenderWorker) -> tuple[str, list[bytes]]:
        sample = worker.render(asset_of(path), path)
        facts = json.dumps([dict(sample.quality), dict(sample.lights), sample.seed])
        return facts, [view.planes["rgba"].data for view in sample.views]

    with RenderWorker(spec, fingerprint="f", num_threads=2, scratch_dir=tmp_path) as worker:
        fresh = sample_bytes(worker)
        worker.render(asset_of(other), other)
        reused = sample_bytes(worker)
    with RenderWorker(spec, fingerprint="f", num_threads=1, scratch_dir=tmp_path) as worker:
        single = sample_bytes(worker)
    assert fresh == reused == single
    assert len(set(fresh[1])) == 3


@pytest.mark.blender
def test_a_procedural_asset_needs_no_file(tmp_path: Path) -> None:
    asset = Asset(uid="procedural-3", source="procedural", uri="procedural:3", format="procedural")
    with RenderWorker(make_spec(), fingerprint="f", num_threads=2, scratch_dir=tmp_path) as worker:
        sample = worker.render(asset, None)
    assert sample.quality["num_triangles"] > 0
    assert sample.provenance["device"] == "CPU"


@pytest.mark.blender
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"shared assets are not at {SHARED}")
def test_every_broken_file_ends_as_a_sample_or_a_typed_failure(tmp_path: Path) -> None:
    expected = {
        "corrupt-texture-bytes.glb": FailureKind.MISSING_TEXTURE,
        "empty-default-scene.glb": FailureKind.EMPTY_SCENE,
        "infinite-positions-BoxWithInfinites.glb": FailureKind.BLANK_IMAGE,
        "zero-extent.glb": FailureKind.DEGENERATE_GEOMETRY,
        "no-mesh.glb": FailureKind.EMPTY_SCENE,
        "truncated-half.glb": FailureKind.IMPORT_ERROR,
        "sceneWrongType.gltf": FailureKind.IMPORT_ERROR,
        "corrupt-draco-stream.glb": FailureKind.PARTIAL_IMPORT,
        "decimal-comma-teapots.DAE": FailureKind.EMPTY_SCENE,
    }
    if BLENDER_5:
        expected |= {
            "infinite-positions-BoxWithInfinites.glb": FailureKind.DEGENERATE_GEOMETRY,
            "corrupt-draco-stream.glb": FailureKind.UNSUPPORTED_FORMAT,
            "decimal-comma-teapots.DAE": FailureKind.UNSUPPORTED_FORMAT,
        }
    triangles = {"corrupt-draco-stream.glb": 178848}
    found = {}
    with RenderWorker(make_spec(), fingerprint="f", num_threads=2, scratch_dir=tmp_path) as worker:
        for path in sorted((SHARED / "broken").iterdir()):
            if path.suffix == ".bin":
                continue
            try:
                worker.render(asset_of(path), path, expected_triangles=triangles.get(path.name))
            except AssetError as error:
                found[path.name] = error.kind
    assert not {FailureKind.INTERNAL, FailureKind.RENDER_CRASH} & set(found.values())
    assert {name: found.get(name) for name in expected} == expected


def test_pixels_become_straight_srgb(fake: MakeWorker) -> None:
    from pipeline.sample import decode_rgba

    image = decode_rgba(good(fake()).views[0].planes["rgba"].data)
    # Premultiplied 0.5 under alpha 0.5 is white at half cover.
    np.testing.assert_array_equal(image[0, 0], [255, 255, 255, 128])
