"""What Cycles renders on: refused where it is not there, warmed up, its kernels kept from child to child."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.types import UserError
from render.process import scrubbed_environment
from render.worker import RenderWorker
from tests.render.conftest import asset_of, make_spec

CACHES = ("XDG_CACHE_HOME", "CUDA_CACHE_PATH", "OPTIX_CACHE_PATH")


@pytest.mark.blender
@pytest.mark.parametrize("device", ["optix", "cuda", "hip"])
def test_20_a_device_that_is_not_here_is_refused_and_not_replaced(tmp_path: Path, device: str) -> None:
    """Hidden from Blender where there is one. A HIP device is unknown to Blender's builds without it."""
    spec = make_spec(workers={"device": device, "num_gpus": 1})
    environment = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with pytest.MonkeyPatch.context() as patch, RenderWorker(spec, fingerprint="f", scratch_dir=tmp_path) as worker:
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(UserError, match=rf"workers.device = '{device}'"):
            worker.render(asset_of(Path("/nowhere/box.glb")), Path("/nowhere/box.glb"))
    assert (tmp_path / "cache" / "lrm-corpus" / "gpu" / "optix").is_dir(), "children of a GPU keep its kernels"


@pytest.mark.blender
def test_a_warm_up_renders_what_blender_starts_with() -> None:
    code = (
        "import os, bpy\nfrom render.devices import use_device, warm_up\n"
        "bpy.app.handlers.render_stats.append(lambda text, *_: print(text))\n"  # 5.2 says nothing of its own accord
        "warm_up(use_device('cpu'))\n"
        "bpy.context.scene.camera = None\n"
        "try:\n    warm_up(use_device('cpu'))\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
        "import sys; sys.stdout.flush(); os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "Sample 1/1" in done.stdout
    assert "DeviceError CPU is here but cannot render: Error: " in done.stdout


def test_children_share_what_a_gpu_compiled_and_nothing_else(tmp_path: Path) -> None:
    given = {"HOME": str(tmp_path / "me"), "SECRET": "x", "PATH": "/bin"}
    on_cpu = scrubbed_environment(tmp_path / "a", 1, given)
    assert not set(CACHES) & set(on_cpu)
    assert not (tmp_path / "me").exists()
    one, other = (scrubbed_environment(tmp_path / name, 1, given, device="optix") for name in "ab")
    assert one["HOME"] != other["HOME"]
    assert [one[name] for name in CACHES] == [other[name] for name in CACHES]
    kept = tmp_path / "me" / ".cache" / "lrm-corpus" / "gpu"
    for name in CACHES:
        assert Path(one[name]).is_relative_to(kept)
        assert Path(one[name]).is_dir()
    assert kept.stat().st_mode & 0o777 == 0o700
    assert "SECRET" not in one


def test_the_place_of_kernels_is_the_users_to_set(tmp_path: Path) -> None:
    given = {"XDG_CACHE_HOME": str(tmp_path / "xdg"), "OPTIX_CACHE_PATH": str(tmp_path / "local")}
    found = scrubbed_environment(tmp_path / "home", 1, given, device="cuda")
    assert found["XDG_CACHE_HOME"] == str(tmp_path / "xdg" / "lrm-corpus" / "gpu")
    assert found["OPTIX_CACHE_PATH"] == str(tmp_path / "local")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/lrm-corpus/gpu .* set XDG_CACHE_HOME"):
        scrubbed_environment(tmp_path / "home", 1, {"XDG_CACHE_HOME": str(tmp_path / "file")}, device="cuda")
