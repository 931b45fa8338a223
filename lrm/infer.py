"""One picture to 3D: a textured mesh, a turntable, and views that nobody took.

    picture -> object over white [S, S, 3] -> planes [3, C, R, R] -> densities [N, N, N] -> mesh -> texture -> GLB
                                                                  -> views of an orbit -> MP4, GIF, PNG

A folder's pictures go through encoder and decoder in batches, through the rest one by one. What one picture fails at is
told by name, and the others go on. `lrm.photo` says which camera is assumed, `lrm.mesh` how the surface is found.

Every stage is timed by itself, on a GPU after its work is done, and the table says where the time went. A picture's
files are OUT/<name>/mesh.glb, turntable.mp4 (VP9 where OpenCV has it, else MPEG-4), turntable.gif and views.png.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor

from lrm import checkpoint, mesh
from lrm.config import RunConfig, Strict
from lrm.data import input_fields
from lrm.model import LRM
from lrm.parallel import fast_attention
from lrm.photo import Background, assumed_distance, frame_object, list_pictures, orbit_camera, read_cutout
from lrm.pixels import Float32
from pipeline.spec import apply_overrides, validate_config
from pipeline.types import Camera, UserError

RENDER_CHUNK_RAYS = 16384
"""Rays rendered at a time where the reference renders, so that memory does not grow with the picture."""
SHEET_VIEWS = 8
FRAMES_PER_S = 15


class InferConfig(BaseModel):
    """How pictures become meshes and films."""

    model_config = Strict
    background: Background = Field(
        "cut", description="cut: by the picture's alpha, or rembg; white: the object already stands before white"
    )
    fill: float = Field(0.85, gt=0.1, le=1, description="the object's longer side over the frame's")
    fov_deg: float = Field(
        50.0, gt=1, lt=170, description="field of view assumed of the picture; that of the renders it learnt from"
    )
    resolution: int = Field(256, ge=16, le=512, description="points of the density grid along a side; paper 384")
    level: float | None = Field(
        None, gt=0, description="density of the surface; default: half opaque within one training sample"
    )
    colours: Literal["texture", "vertices"] = Field("texture", description="where the mesh holds its colours")
    texture_px: int = Field(2048, ge=64, le=mesh.MAX_TEXTURE_PX, description="least side of the texture")
    frames: int = Field(45, ge=0, le=720, description="pictures of a turn; 0 makes no film")
    frame_px: int = Field(256, ge=16, le=2048, multiple_of=2, description="width and height of films and views")
    elevation_deg: float = Field(0.0, ge=-89, le=89, description="height of the turn; 0 is the picture's own")
    batch_size: int = Field(4, ge=1, description="pictures through encoder and decoder at a time")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")


def infer_config(overrides: Sequence[str] = ()) -> InferConfig:
    """Return the defaults with `key=value` overrides."""
    return validate_config(InferConfig, apply_overrides({}, overrides), "infer")


class LoadedModel(NamedTuple):
    """A run's model, what it was made by, how many steps it was trained, and on which version, by digest."""

    model: LRM
    config: RunConfig
    step: int
    version_digest: str


def load_model(path: Path) -> LoadedModel:
    """Return the model that a run's folder holds, for inference. Averaged weights are preferred.

    Raises:
        UserError: if there is no readable checkpoint.
    """
    model, config, state = checkpoint.load_model(path)
    volume = model.config.volume
    chunk_rays = min(volume.chunk_rays or RENDER_CHUNK_RAYS, RENDER_CHUNK_RAYS)
    model.config = model.config.model_copy(update={"volume": volume.model_copy(update={"chunk_rays": chunk_rays})})
    return LoadedModel(model, config, int(state["step"]), str(state.get("version_digest", "unknown")))


def pick_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return the device that a config names; a GPU that is asked for and absent is a UserError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda was asked for and torch finds no GPU; set device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def precision_of(device: torch.device) -> Iterator[None]:
    """Work in bfloat16 on a GPU, which the fused renderer needs, and with its fastest attention; float32 elsewhere."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), fast_attention(device):
        yield


@dataclass(slots=True)
class Stages:
    """Seconds by stage, in the order of their first use."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time inside, the GPU's work included, to a stage."""
        self._wait()
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start_s

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferred:
    """What became of one picture: its name, its mesh's size, its files, or why it failed."""

    name: str
    vertices: int = 0
    faces: int = 0
    files: tuple[str, ...] = ()
    failure: str | None = None


MESH_STAGES = ("picture", "planes", "density", "surface", "colours", "glb")
"""Stages up to the mesh's file; the model is loaded before them, films come after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferResult:
    """All pictures, and seconds by stage over all of them."""

    pictures: tuple[Inferred, ...]
    seconds: dict[str, float]
    device: str

    @property
    def failed(self) -> list[Inferred]:
        """Pictures that came to no mesh."""
        return [one for one in self.pictures if one.failure is not None]

    @property
    def to_mesh_s(self) -> float:
        """Mean seconds a picture from its file to its mesh's file, without loading the model."""
        return sum(self.seconds.get(name, 0.0) for name in MESH_STAGES) / max(1, len(self.pictures))

    def as_json(self) -> dict[str, Any]:
        """Return one JSON object of all of it."""
        pictures = [
            {"name": p.name, "vertices": p.vertices, "faces": p.faces, "files": p.files, "failure": p.failure}
            for p in self.pictures
        ]
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        totals = {"device": self.device, "infer_s": round(self.to_mesh_s, 4), "seconds": seconds}
        return {"num_pictures": len(self.pictures), "failed": len(self.failed), **totals, "pictures": pictures}

    def as_text(self) -> str:
        """Return the table of seconds by stage."""
        total = sum(self.seconds.values())
        lines = [f"{'stage':<10} {'seconds':>9} {'share':>6}"]
        lines += [f"{name:<10} {value:9.3f} {value / total:6.0%}" for name, value in self.seconds.items()]
        lines.append(f"{'all':<10} {total:9.3f}   {self.to_mesh_s:.3f} s a picture to its mesh, on {self.device}")
        return "\n".join(lines)


def infer(path: Path, checkpoint_dir: Path, out_dir: Path, config: InferConfig) -> InferResult:
    """Make a mesh, a film and views of a picture, or of each picture of a folder.

    Raises:
        UserError: for what keeps every picture from it; what keeps one from it stands in the result.
    """
    pictures, device = list_pictures(path), pick_device(config.device)
    stages = Stages(device)
    with stages("load"):
        loaded = load_model(checkpoint_dir)
        loaded.model.to(device)
    worker, done = _Worker(loaded.model, loaded.config, config, stages), []
    for start in range(0, len(pictures), config.batch_size):
        done += worker.batch(_names(pictures)[start : start + config.batch_size], out_dir)
    return InferResult(pictures=tuple(done), seconds=stages.seconds, device=str(device))


def _names(pictures: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return a folder name for each picture: its stem, or its whole name where two have one stem."""
    stems = Counter(picture.stem for picture in pictures)
    return [(picture.stem if stems[picture.stem] == 1 else picture.name, picture) for picture in pictures]


class _Worker:
    """A model on its device, and what to do with each picture."""

    def __init__(self, model: LRM, run: RunConfig, config: InferConfig, stages: Stages) -> None:
        self.model, self.config, self.stages, self.device = model, config, stages, stages.device
        self.distance = assumed_distance(run.data, config.fill, config.fov_deg)
        self.image_px = run.model.encoder.image_px
        self.level = config.level or mesh.half_opaque_density(run.model.volume.samples_per_ray)

    def batch(self, named: Sequence[tuple[str, Path]], out_dir: Path) -> list[Inferred]:
        """Read pictures, make their planes at once, then each one's files."""
        images: list[tuple[str, Float32]] = []
        out: dict[str, Inferred] = {}
        with self.stages("picture"):
            for name, path in named:
                try:
                    rgba = read_cutout(path, self.config.background)
                    images.append((name, frame_object(rgba, self.image_px, self.config.fill, str(path))))
                except UserError as error:
                    out[name] = Inferred(name=name, failure=str(error))
        if images:
            planes = self._planes([image for _, image in images])
            for (name, image), plane in zip(images, planes):
                out[name] = self._one(name, image, plane, out_dir / name)
        return [out[name] for name, _ in named]

    @torch.no_grad()
    def _planes(self, images: Sequence[Float32]) -> Tensor:
        camera = orbit_camera(0, 0, self.distance, self.config.fov_deg, self.image_px)
        fields = [input_fields(image, camera, camera.world_from_camera, self.image_px) for image in images]
        with self.stages("planes"), precision_of(self.device):
            inputs = (np.stack([one[name] for one in fields]) for name in ("input_image", "input_camera"))
            image, numbers = (torch.from_numpy(value.astype(np.float32)).to(self.device) for value in inputs)
            return self.model.planes(image, numbers).float()

    def _one(self, name: str, image: Float32, planes: Tensor, folder: Path) -> Inferred:
        folder.mkdir(parents=True, exist_ok=True)
        made, failure = mesh.Mesh(vertices=np.zeros((0, 3), np.float32), faces=np.zeros((0, 3), np.int64)), None
        try:
            made = self._mesh(planes, folder / "mesh.glb")
        except UserError as error:
            failure = f"picture {name}: {error}"
            (folder / "mesh.glb").unlink(missing_ok=True)  # one of an earlier run would pass for this one's
        with self.stages("views"):
            count = self.config.frames or SHEET_VIEWS
            frames = render_orbit(self.model, planes, self._orbit(count))
        with self.stages("files"):
            sheet = [to_uint8(image), *(frames[i * count // SHEET_VIEWS] for i in range(min(SHEET_VIEWS, count)))]
            write_sheet(folder / "views.png", sheet, self.config.frame_px)
            if self.config.frames:
                write_mp4(folder / "turntable.mp4", frames)
                write_gif(folder / "turntable.gif", frames)
        wrote = ["mesh.glb"] * (failure is None) + ["views.png"]
        wrote += ["turntable.mp4", "turntable.gif"] * (self.config.frames > 0)
        return Inferred(
            name=name, vertices=len(made.vertices), faces=len(made.faces), failure=failure,
            files=tuple(str(folder / file) for file in wrote),
        )  # fmt: skip

    def _orbit(self, count: int) -> list[Camera]:
        c = self.config
        turn = (360 * i / count for i in range(count))
        return [orbit_camera(angle, c.elevation_deg, self.distance, c.fov_deg, c.frame_px) for angle in turn]

    def _mesh(self, planes: Tensor, path: Path) -> mesh.Mesh:
        with self.stages("density"):
            density = mesh.triplane_density_grid(planes, self.model.field, self.config.resolution)
        with self.stages("surface"):
            surface = mesh.extract_surface(density, self.level)
        ask = mesh.triplane_field(planes, self.model.field)
        texture = colours = None
        with self.stages("colours"):
            if self.config.colours == "texture":
                texture = mesh.bake_texture(ask, surface, self.config.texture_px, self.device)
            else:
                colours = mesh.field_colours(ask, surface.vertices, self.device)
        with self.stages("glb"):
            mesh.write_glb(path, surface, texture, colours)
        return surface


@torch.no_grad()
def render_orbit(model: LRM, planes: Tensor, cameras: Sequence[Camera]) -> list[NDArray[np.uint8]]:
    """Render planes [3, C, R, R] from cameras in the model's world, one view at a time; each [P, P, 3] uint8."""
    out = []
    for camera in cameras:
        pose, k = (
            torch.from_numpy(value.astype(np.float32))[None, None].to(planes.device)
            for value in (camera.world_from_camera, camera.intrinsics)
        )
        with precision_of(planes.device):
            rendered = model.render(planes[None], pose, k, camera.height, camera.width)
        out.append(to_uint8(rendered.rgb[0, 0].float().permute(1, 2, 0).cpu().numpy()))
    return out


def to_uint8(image: Float32) -> NDArray[np.uint8]:
    """Return a picture of [0, 1] in 8 bits."""
    out: NDArray[np.uint8] = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return out


def write_sheet(path: Path, tiles: Sequence[NDArray[np.uint8]], tile_px: int) -> None:
    """Write pictures side by side in lines of three, resized to squares, as a PNG."""
    how = {True: Image.Resampling.BOX, False: Image.Resampling.BICUBIC}
    resized = [Image.fromarray(t).resize((tile_px, tile_px), how[len(t) % tile_px == 0]) for t in tiles]
    lines = -(-len(tiles) // 3)
    sheet = Image.new("RGB", (3 * tile_px, lines * tile_px), "white")
    for i, tile in enumerate(resized):
        sheet.paste(tile, (i % 3 * tile_px, i // 3 * tile_px))
    sheet.save(path)


def write_mp4(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """Write a film. VP9 plays in browsers; MPEG-4, which every OpenCV can write, does not.

    Raises:
        OSError: if OpenCV can write neither.
    """
    high, wide = frames[0].shape[:2]
    for codec in ("vp09", "mp4v"):
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), FRAMES_PER_S, (wide, high))
        if not writer.isOpened():
            continue
        for frame in frames:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
        return
    raise OSError(f"{path}: OpenCV can write neither VP9 nor MPEG-4")


def write_gif(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """Write an endless GIF; its times count in hundredths of a second."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=round(100 / FRAMES_PER_S) * 10, loop=0)
