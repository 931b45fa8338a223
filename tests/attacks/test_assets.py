"""Hostile files end as a typed failure or a clean sample, and nothing outside is read, written, told or left behind.

Each file is judged by its headers first; and then given to the child all the same, as if the headers had lied, so that
the border is tried with each. One child takes them all, under the strict border.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.admission import check_file
from pipeline.sample import decode_rgba
from pipeline.spec import AdmissionSpec
from pipeline.types import MAX_MESSAGE_CHARS, AssetError, Failure, FailureKind, Sample, printable
from render import landlock
from render.process import family
from render.worker import RenderWorker
from tests.attacks.hostile import ATTACKS, image_uri, usd
from tests.attacks.outside import CANARY, Cage, Ear
from tests.render.blends import write_blend
from tests.render.conftest import asset_of, make_spec
from tests.render.files import one_mesh_glb

pytestmark = [
    pytest.mark.blender,
    pytest.mark.skipif(landlock.version() < 1, reason="this kernel has no Landlock"),
]
STRICT = "strict: limits,user,net,ipc,pid,caps,landlock,seccomp"


@dataclass(slots=True)
class Scene:
    """Where the attacks are made: a folder for each asset, the cage beside them, the ear, and one worker."""

    folder: Path
    cage: Cage
    ear: Ear
    worker: RenderWorker


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("attacks")
    cage, ear = Cage(folder / "cage"), Ear()
    spec = make_spec(limits={"memory_bytes": 3 * 2**29, "silence_s": 30.0, "deadline_s": 60.0})
    scratch = folder / "scratch"
    with RenderWorker(spec, fingerprint="f", num_threads=2, scratch_dir=scratch) as worker:
        yield Scene(folder, cage, ear, worker)
    ear.close()
    assert list(scratch.iterdir()) == [], "a temporary folder was left behind"


def told(result: Sample | Failure) -> str:
    """Return every text that leaves an asset's making, as the rows hold it."""
    if isinstance(result, Failure):
        return json.dumps([result.message, result.log_tail, dict(result.provenance)])
    return json.dumps([dict(result.quality), dict(result.lights), dict(result.provenance)])


def green(sample: Sample) -> bool:
    """Whether the canary's picture can be seen."""
    for view in sample.views:
        rgba = decode_rgba(view.planes["rgba"].data).astype(int)
        shown = rgba[rgba[..., 3] > 128]
        if np.any(shown[:, 1] > 40 + np.maximum(shown[:, 0], shown[:, 2])):
            return True
    return False


def judged(path: Path) -> tuple[str | None, str]:
    """Return the kind and message with which a file's headers are refused, (None, "") if they are not."""
    try:
        check_file(path, path.suffix[1:], AdmissionSpec())
    except AssetError as error:
        return error.kind.value, error.message
    return None, ""


def render(scene: Scene, path: Path) -> Sample | Failure:
    try:
        return scene.worker.render(asset_of(path), path)
    except AssetError as error:
        return Failure.from_error(path.name, error)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_file_ends_typed_or_clean_and_touches_nothing_outside(scene: Scene, name: str) -> None:
    attack = ATTACKS[name]
    home = scene.folder / f"asset{len(list(scene.folder.iterdir()))}"
    home.mkdir()
    path = attack.build(home, scene.cage.folder, scene.ear.port)
    before, files = scene.cage.state(), sorted(scene.folder.iterdir())
    kind, message = judged(path)
    assert kind in attack.checked, message
    assert message == printable(message)
    assert len(message) <= MAX_MESSAGE_CHARS
    if attack.child:
        result = render(scene, path)
        assert (result.kind.value if isinstance(result, Failure) else None) in attack.child, told(result)
        assert CANARY not in told(result)
        assert "\\u001b" not in told(result)
        assert "root:" not in told(result)
        if isinstance(result, Sample):
            assert result.quality["num_triangles"] == 12, "more than the cube is there"
            assert not green(result)
            assert result.provenance["sandbox"] == STRICT
    assert scene.cage.state() == before
    assert sorted(scene.folder.iterdir()) == files
    assert scene.ear.heard == []
    child = scene.worker._child
    assert child is None or len(family(child.pid)) == 3, "the child started something"


@pytest.mark.parametrize(
    ("kind", "limits", "ends"),
    [
        ("grower", {"memory_bytes": 3 * 2**28, "silence_s": 30.0}, FailureKind.OUT_OF_MEMORY),
        ("idler", {"silence_s": 2.0}, FailureKind.RENDER_TIMEOUT),
    ],
)
def test_a_file_that_eats_memory_or_time_is_cut_and_the_next_object_renders(
    scene: Scene, tmp_path: Path, kind: str, limits: dict[str, float], ends: FailureKind
) -> None:
    path = write_blend(kind, tmp_path / "a.blend")
    assert judged(path) == (None, "")
    before = scene.cage.state()
    with RenderWorker(make_spec(limits=limits), fingerprint="f", scratch_dir=tmp_path / "scratch") as worker:
        worker.start()
        assert worker._child is not None
        pids = family(worker._child.pid)
        assert len(pids) == 3
        with pytest.raises(AssetError) as caught:
            worker.render(asset_of(path), path)
        assert caught.value.kind is ends, caught.value.message
        assert worker.sandbox == STRICT
        assert worker._child is None
        until = time.monotonic() + 5
        while (left := [pid for pid in pids if family(pid)]) and time.monotonic() < until:
            time.sleep(0.02)  # the kernel takes a while to free a gigabyte
        assert not left, "a process was left behind"
        good = one_mesh_glb(tmp_path / "good.glb")
        assert worker.render(asset_of(good), good).quality["num_triangles"] == 12
    assert list((tmp_path / "scratch").iterdir()) == []
    assert (scene.cage.state(), scene.ear.heard) == (before, [])


def test_the_canary_would_be_seen(scene: Scene) -> None:
    """What the attacks are after is found by these tests where it is allowed to be."""
    home = scene.folder / "honest"
    home.mkdir()
    for name in ("secret.png", "secret.usda"):
        (home / name).write_bytes((scene.cage.folder / name).read_bytes())
    textured = render(scene, image_uri(lambda cage, port: "secret.png")(home, home, 0))
    assert isinstance(textured, Sample)
    assert green(textured)
    path = usd(lambda cage, port: "references = @./secret.usda@</Secret>")(home, home, 0)
    referring = render(scene, path)
    assert isinstance(referring, Sample)
    assert referring.quality["num_triangles"] == 12 + 8


def test_after_all_attacks_an_honest_object_renders(scene: Scene) -> None:
    home = scene.folder / "last"
    home.mkdir()
    sample = render(scene, one_mesh_glb(home / "a.glb"))
    assert isinstance(sample, Sample)
    assert sample.quality["num_triangles"] == 12
