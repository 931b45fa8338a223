"""One picture to 3D: with a model whose field is known, and with one that was trained for a few steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from jobs.cli import app
from lrm import checkpoint
from lrm.infer import Stages, _Worker, infer, infer_config, load_model, render_orbit
from lrm.model import LRM
from lrm.photo import orbit_camera
from lrm.train import train
from pipeline.types import UserError
from tests.conftest import ball_image
from tests.conftest import orbit_camera as world_camera
from tests.lrm.conftest import nano_config

COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]] * 2)


class Known(nn.Module):
    """A field for planes that hold coordinates: a ball at (0.3, 0, 0.2), right half red, upper half green too."""

    density_bias = 0.0

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        x, y, z = features[..., 0], features[..., 1], features[..., 3]
        away = torch.stack([x - 0.3, y, z - 0.2], -1)
        rgb = torch.stack([(away[..., 0] > 0).float(), (away[..., 2] > 0).float(), torch.full_like(x, 0.5)], -1)
        return rgb, torch.nn.functional.softplus(400 * (0.4 - away.norm(dim=-1)))


def coordinate_planes() -> Tensor:
    """Planes [3, 2, R, R] whose two channels are a plane's two coordinates: (x, y), (x, z), (y, z)."""
    texels = (2 * torch.arange(64) + 1) / 64 - 1
    rows, columns = torch.meshgrid(texels, texels, indexing="ij")
    return torch.stack([columns, rows]).expand(3, -1, -1, -1).contiguous()


def test_views_of_a_known_field_show_it_where_it_is() -> None:
    config = nano_config("model.volume.samples_per_ray=128")
    model = LRM(config.model, load_weights=False)
    model.field = Known()  # type: ignore[assignment]
    front, side = render_orbit(
        model, coordinate_planes(), [orbit_camera(0, 0, 2.5, 50, 64), orbit_camera(90, 0, 2.5, 50, 64)]
    )
    seen = front[..., 2] < 200
    rows, columns = np.nonzero(seen)
    camera = orbit_camera(0, 0, 2.5, 50, 64)
    middle = camera.project(np.array([[0.3, 0, 0.2]]))[0]
    assert columns.mean() + 0.5 == pytest.approx(middle[0], abs=1.0)
    assert rows.mean() + 0.5 == pytest.approx(middle[1], abs=1.0)
    v, u = round(middle[1]), round(middle[0])
    np.testing.assert_allclose(front[v - 4, u + 4], [255, 255, 128], atol=3)  # up and right
    np.testing.assert_allclose(front[v + 4, u - 4], [0, 0, 128], atol=3)
    middle = orbit_camera(90, 0, 2.5, 50, 64).project(np.array([[0.3, 0, 0.2]]))[0]  # from +x: only its red half
    np.testing.assert_allclose(side[round(middle[1]) - 4, round(middle[0])], [255, 255, 128], atol=3)


@pytest.fixture(scope="module")
def trained(ball_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(nano_config("train.steps=40", "train.ema_decay=0.5"), ball_corpus, None, out)
    return out


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "pictures" / "ball.png"
    path.parent.mkdir()
    Image.fromarray(ball_image(world_camera(0.3, 0.2, 2.0, 96), 0.7, COLOURS)).save(path)
    return path


LITTLE = ("resolution=24", "texture_px=512", "frames=6", "frame_px=32")


@pytest.fixture
def little(trained: Path, picture: Path, tmp_path: Path) -> tuple[str, ...]:
    """Settings for a model of a few steps, which holds fog: the level that is advised where there is no surface."""
    failed = infer(picture, trained, tmp_path / "fog", infer_config([*LITTLE, "level=1e6"])).failed[0]
    assert not (tmp_path / "fog" / "ball" / "mesh.glb").exists()
    assert (tmp_path / "fog" / "ball" / "views.png").is_file()
    advised = re.search(r"below level 1e\+06; train longer, or set (level=\S+)", str(failed.failure))
    assert advised is not None
    return (*LITTLE, advised[1])


def test_a_picture_to_a_mesh_a_film_and_views_by_the_command_line(
    trained: Path, picture: Path, little: tuple[str, ...], tmp_path: Path
) -> None:
    sets = [part for item in little for part in ("--set", item)]
    told = CliRunner().invoke(
        app, ["infer", "--image", str(picture), "--checkpoint", str(trained), "--out", str(tmp_path), "--json", *sets]
    )
    assert told.exit_code == 0, told.output
    record = json.loads(told.stdout.splitlines()[-1])
    assert record["num_pictures"] == 1
    assert record["failed"] == 0
    assert list(record["seconds"]) == [
        "load", "picture", "planes", "density", "surface", "colours", "glb", "views", "files"
    ]  # fmt: skip
    assert 0 < record["infer_s"] < sum(record["seconds"].values())
    assert "density" in told.stderr
    folder = tmp_path / "ball"
    loaded = trimesh.load(folder / "mesh.glb", process=False).to_mesh()
    assert len(loaded.faces) == record["pictures"][0]["faces"] > 0
    assert loaded.visual.material.baseColorTexture.size == (512, 512)
    assert np.abs(loaded.vertices).max() <= 1
    film = cv2.VideoCapture(str(folder / "turntable.mp4"))
    assert int(film.get(cv2.CAP_PROP_FRAME_COUNT)) == 6
    assert film.read()[1].shape == (32, 32, 3)
    with Image.open(folder / "turntable.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (6, (32, 32), 0)
    with Image.open(folder / "views.png") as sheet:
        assert sheet.size == (96, 96)


def test_a_folder_goes_on_past_what_fails_and_gives_what_one_picture_gives(
    trained: Path, picture: Path, little: tuple[str, ...], tmp_path: Path
) -> None:
    alone = infer(picture, trained, tmp_path / "alone", infer_config([*little, "colours=vertices", "frames=0"]))
    (picture.parent / "bad.png").write_bytes(b"no")
    other = ball_image(world_camera(2.0, -0.4, 2.2, 96), 0.5, COLOURS[::-1])
    Image.fromarray(other).save(picture.parent / "ball.webp", lossless=True)
    done = infer(picture.parent, trained, tmp_path / "all", infer_config([*little, "colours=vertices", "frames=0"]))
    assert [one.name for one in done.pictures] == ["bad", "ball.png", "ball.webp"]
    assert [one.name for one in done.failed] == ["bad"]
    assert "cannot be read" in str(done.failed[0].failure)
    meshes = [trimesh.load(one.files[0], process=False).to_mesh() for one in (alone.pictures[0], *done.pictures[1:])]
    assert len(meshes[0].vertices) == len(meshes[1].vertices) > 0
    np.testing.assert_allclose(meshes[0].vertices, meshes[1].vertices, atol=1e-4)  # in a batch of two, or alone
    assert len(meshes[2].vertices) != len(meshes[1].vertices)


def test_the_model_is_the_checkpoint_s_and_renders_in_pieces(trained: Path) -> None:
    model, config, step, digest = load_model(trained)
    saved, _, _ = checkpoint.load_model(trained)
    for name, tensor in saved.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    assert model.config.volume.chunk_rays == 16384
    assert config.model.volume.chunk_rays == 0
    assert not model.training
    assert step == 40
    assert len(digest) == 64


def test_what_is_asked_for_wrongly_is_said_in_one_line(trained: Path, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resolution = 1024"):
        infer_config(["resolution=1024"])
    with pytest.raises(UserError, match="unknown key 'reslution'"):
        infer_config(["reslution=64"])
    with pytest.raises(UserError, match="no checkpoint here"):
        load_model(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch finds no GPU"):
            infer(picture, trained, tmp_path, infer_config(["device=cuda"]))


def test_the_level_follows_the_training_s_samples(trained: Path) -> None:
    model, config, *_ = load_model(trained)
    worker = _Worker(model, config, infer_config(), Stages(torch.device("cpu")))
    assert worker.level == pytest.approx(16 * np.log(2) / 2)
