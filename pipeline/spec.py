"""The dataset spec: every knob, read from TOML, split into what changes pixels and what does not.

`[render]` is the pixel part, or `[capture]` where the source is photos. Its digest, with the producer's version, is the
fingerprint that samples carry: two samples with one fingerprint and one asset are the same picture. Everything else may
change without a new render.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.canonical import digest_json, parse_json
from pipeline.phash import MAX_DISTANCE
from pipeline.types import CAPTURE_SOURCES, SOURCES, PlaneName, UserError

MIN_GPU_SHARE = 0.01
"""Least share of a GPU that a task may ask for: a hundred Blenders hold more memory than any GPU has."""

TASK_MEMORY_BYTES = 2 * 2**30
"""Memory that a render task reserves unless the spec says otherwise."""

Strict = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
M = TypeVar("M", bound=BaseModel)


class ProceduralSource(BaseModel):
    """Seeded compositions of textured primitives; needs no files and no network."""

    model_config = Strict
    kind: Literal["procedural"] = "procedural"
    num_objects: int = Field(12, ge=1, description="how many objects; object i has uid procedural-<first_seed + i>")
    first_seed: int = Field(0, ge=0, description="seed of the first object")


class DirectorySource(BaseModel):
    """Files on disk: a folder (searched recursively), a glob, or a CSV/Parquet list of files."""

    model_config = Strict
    kind: Literal["directory"] = "directory"
    path: str = Field(
        description="folder, glob pattern, or a .csv/.parquet list with a column `file` (and uid, license, ...)"
    )
    license: str = Field("unknown", description="SPDX licence of files whose list does not say")
    exclude: tuple[str, ...] = Field((), description="glob patterns of paths, relative to the folder, to leave out")


class ObjaverseSource(BaseModel):
    """Objaverse 1.0 through the objaverse package, over files that were fetched and verified by us."""

    model_config = Strict
    kind: Literal["objaverse"] = "objaverse"
    uids: tuple[str, ...] = Field((), description="uids to take; empty takes all (or all of lvis_categories)")
    uids_file: str | None = Field(None, description="text file with one uid a line")
    lvis_categories: tuple[str, ...] = Field((), description="LVIS categories to take")
    max_objects: int | None = Field(None, ge=1, description="take the first N of the (sorted) uids")
    base_url: str | None = Field(None, description="hub to fetch from; default HF_ENDPOINT or https://huggingface.co")
    use_xl_digests: bool = Field(
        True, description="take sha256 of each GLB from the Objaverse-XL table where it has one"
    )


class MvimgnetSource(BaseModel):
    """MVImgNet 1.0 or 2.0: its zips as they were downloaded, or extracted; on disk or on object storage."""

    model_config = Strict
    kind: Literal["mvimgnet"] = "mvimgnet"
    path: str = Field(description="folder or s3://, gs://, az:// URL of the zips, or of the tree <class>/<instance>/")
    masks: str | None = Field(
        None, description="folder or URL of the masks of 1.0, zips or tree; 2.0 has its masks beside its images"
    )
    classes: tuple[int, ...] = Field((), description="class labels to take; empty takes all")
    exclude_file: str | None = Field(
        None,
        description="text file of captures to leave out, one <class>/<instance> or <class>/<instance>-<model> a line",
    )
    max_captures: int | None = Field(None, ge=1, description="take the first N of the (sorted) captures")


class ColmapSource(BaseModel):
    """Folders with photos and a COLMAP model, masks optional: each is one capture."""

    model_config = Strict
    kind: Literal["colmap"] = "colmap"
    path: str = Field(description="one capture (a folder with images/ and sparse/), or a folder of captures, or a URL")
    license: str = Field("unknown", description="SPDX licence of the photos")
    attribution: str = Field("", description="the credit line that the licence asks for")
    exclude_file: str | None = Field(None, description="text file of captures to leave out, one folder name a line")
    max_captures: int | None = Field(None, ge=1, description="take the first N of the (sorted) captures")


Source = Annotated[
    ProceduralSource | DirectorySource | ObjaverseSource | MvimgnetSource | ColmapSource, Field(discriminator="kind")
]


class RenderSpec(BaseModel):
    """The pixel part: every field here changes pixels, and so the fingerprint."""

    model_config = Strict
    preset: Literal["lrm", "openlrm", "instantmesh", "uncropped"] = Field(
        "lrm",
        description="cameras: lrm is the paper's, which cuts large objects in near views; openlrm and instantmesh are "
        "those reproductions'; uncropped stands back until nothing is cut; numbers in render/cameras.py",
    )
    num_views: int = Field(32, ge=1, le=999, description="views an object")
    resolution_px: int = Field(512, ge=16, le=4096, description="width and height of a view in pixels")
    fov_deg: float | None = Field(
        None,
        gt=1,
        lt=170,
        description="field of view, horizontal and vertical, in degrees; default the preset's, 50 or openlrm's 67.38",
    )
    half_psnr_db: float = Field(
        40.0, ge=20, le=60, description="noise target of a view: least PSNR on white after 2 x 2 averaging"
    )
    full_psnr_db: float = Field(34.0, ge=15, le=60, description="noise target of a view: least PSNR at full resolution")
    max_samples: int = Field(
        256,
        ge=8,
        le=65536,
        description="most samples a pixel that the noise target may take; a view that misses it says so",
    )
    samples: int | None = Field(
        None, ge=1, le=65536, description="a fixed number of samples a pixel instead of the noise target"
    )
    denoise: bool = Field(True, description="OpenImageDenoise in its fast mode, guided by albedo and normal")
    lighting: Literal["studio", "ambient", "random"] = Field(
        "studio",
        description="drawn per uid: studio is an environment, a key and a fill; random is an environment and one to "
        "three lights of bounded total; ambient is a white world and no light, close to albedo, under which a white "
        "object has no edge on white and little form: for comparisons, not for a corpus",
    )
    see_through: Literal["white", "alpha"] = Field(
        "white",
        description="what glass and alpha-blended surfaces become: white shows white behind them, as on the paper's "
        "background, under an alpha that is the surface's coverage; alpha keeps them translucent",
    )
    pose: Literal["first_frame", "rest", "frames"] = Field(
        "first_frame",
        description="pose of rigs and animations: the first frame, the rest pose, or one of `frames`, drawn per uid",
    )
    frames: tuple[Annotated[int, Field(ge=-1_048_574, le=1_048_574)], ...] = Field(
        (), max_length=1000, description="frames to draw from where pose is frames; the bounds are Blender's"
    )
    max_texture_px: int | None = Field(
        4096, ge=16, description="longest side of a texture; larger ones are scaled down by powers of two"
    )
    planes: tuple[PlaneName, ...] = Field(("rgba",), description="planes of each view, in the order of the shard")
    codec: Literal["webp", "webp-q95", "png"] = Field("webp", description="webp is lossless; webp-q95 is lossy; png")
    seed: int = Field(0, ge=0, description="seed of cameras, lights and sampling; 0 is a seed like any other")

    @model_validator(mode="after")
    def _rgba_first(self) -> RenderSpec:
        if "rgba" not in self.planes or len(set(self.planes)) != len(self.planes):
            raise ValueError(f"planes {list(self.planes)} must hold 'rgba' and no plane twice")
        return self

    @model_validator(mode="after")
    def _frames_where_drawn(self) -> RenderSpec:
        if (self.pose == "frames") != bool(self.frames):
            raise ValueError(
                f"pose {self.pose!r} with frames {list(self.frames)}: pose = 'frames' needs frames = [1, ...], "
                "the others none"
            )
        return self


class CaptureSpec(BaseModel):
    """The pixel part of captures: every field here changes pixels, and so the fingerprint."""

    model_config = Strict
    num_views: int | None = Field(
        None, ge=1, le=999, description="views a capture, spread evenly over viewing angle; default: every good frame"
    )
    resolution_px: int = Field(512, ge=16, le=4096, description="width and height of a view in pixels")
    padding: float = Field(1.15, ge=1.0, le=4.0, description="side of the square crop over the mask's longer side")
    # Loss over the masked pixels of 512 px views, between what was resampled and what decodes, on white; mean over the
    # views, measured with OpenCV 4.11 on two captures of 22 and 10 views: a wooden tankard with fine grain, and a doll.
    #   quality    tankard                                    doll
    #   90         35.7 dB (luma 40.8), SSIM 0.935,  38 KB    40.4 dB (luma 43.5), SSIM 0.972,  22 KB
    #   95         37.4 dB (luma 44.9), SSIM 0.954,  55 KB    42.7 dB (luma 46.4), SSIM 0.982,  32 KB
    #   98         38.0 dB,             SSIM 0.960,  68 KB    43.9 dB,             SSIM 0.986,  41 KB
    #   lossless                                    168 KB                                     118 KB
    # Most of it is colour at half resolution, as JPEG has it too, which no quality of lossy WebP gives back.
    codec: Literal["webp", "webp-q95", "png"] = Field(
        "webp-q95", description="webp-q95 is lossy in colour, lossless in alpha: the photos were JPEG; webp is lossless"
    )
    mask_threshold: int = Field(127, ge=0, le=254, description="a mask value above it is object")
    mask_command: str | None = Field(
        None,
        description="what makes masks where the data set has none: a command with {image} and {mask}, run a frame at a "
        "time, or rembg for that package; default: such captures fail as no_mask",
    )
    margin: float = Field(1.0, ge=1.0, le=2.0, description="half side of the world's box over the object's")

    @model_validator(mode="after")
    def _command_can_be_filled_in(self) -> CaptureSpec:
        if self.mask_command not in (None, "rembg"):
            split_command(str(self.mask_command))
        return self


class ShardSpec(BaseModel):
    """How assets are dealt into shards."""

    model_config = Strict
    objects_per_shard: int = Field(64, ge=1, le=100_000, description="planned objects a shard")


class AdmissionSpec(BaseModel):
    """What is let in: licences before the fetch, sizes before the render, pictures after it."""

    model_config = Strict
    licenses: Literal["any", "commercial"] | tuple[str, ...] = Field(
        "any", description="any, commercial (no NC, no ND, no unknown), or a list of SPDX identifiers"
    )
    max_asset_bytes: int = Field(512 * 2**20, ge=1, description="largest main file")
    max_triangles: int = Field(5_000_000, ge=1, description="largest triangle count in the file or in Blender")
    min_triangle_share: float = Field(
        0.9, ge=0, le=1, description="least share of the file's triangles that must import"
    )
    min_alpha_coverage: float = Field(0.0005, ge=0, le=1, description="least mean alpha coverage over the views")
    max_cropped: float = Field(
        1.0, ge=0, le=1, description="largest share of the object outside its pictures, mean over the views"
    )
    max_border_touch: float = Field(1.0, ge=0, le=1, description="largest share of views whose edge cuts the object")
    max_clipped: float = Field(
        1.0, ge=0, le=1, description="largest share of the object that is burnt out (all channels 255), mean over views"
    )
    min_thickness: float = Field(
        0.0,
        ge=0,
        le=1,
        description="least thickness of the silhouette in the thinnest view, over the object's longest side: 0.03 "
        "refuses flat cards, poles and wires",
    )
    min_median_thickness: float = Field(
        0.0,
        ge=0,
        le=1,
        description="the same in the median view: 0.03 refuses poles, wires and line drawings, and admits flat cards",
    )
    admit_single_colour: bool = Field(True, description="admit objects of one base colour")
    admit_untextured: bool = Field(True, description="admit objects without an image and without vertex colours")
    admit_transparent: bool = Field(True, description="admit objects with glass or alpha-blended surfaces")
    min_frames: int = Field(8, ge=1, description="least good frames of a capture: posed, masked, on disk")
    min_registered_share: float = Field(0.0, ge=0, le=1, description="least share of a capture's frames with a pose")
    max_reprojection_px: float = Field(4.0, gt=0, description="largest mean reprojection error of a capture's model")
    min_sweep_deg: float = Field(0.0, ge=0, le=180, description="least widest angle between two views of a capture")
    min_mask_agreement: float = Field(
        0.6, ge=0, le=1, description="least median box overlap of a capture's masks with its projected points"
    )
    max_cut_off: float = Field(1.0, ge=0, le=1, description="largest share of a capture's views cut by their frame")
    duplicate_distance: int | None = Field(
        None,
        ge=0,
        le=MAX_DISTANCE,
        description="withdraw all but the first of objects with equal files, or whose perceptual hashes differ in up "
        "to so many of 256 bits (8 is a good start); decided at publish; default: keep duplicates",
    )


class LimitSpec(BaseModel):
    """Limits on one asset, and on the child process that opens it."""

    model_config = Strict
    deadline_s: float = Field(3600.0, gt=0, description="wall time an asset may take in the child")
    silence_s: float = Field(300.0, gt=0, description="wall time the child may take without a word: an import, a view")
    memory_bytes: int = Field(8 * 2**30, ge=2**28, description="resident memory that the child may hold")
    objects_per_child: int = Field(50, ge=1, description="recycle the child after so many objects")
    scratch_bytes: int = Field(4 * 2**30, ge=2**20, description="disk that the child may fill in its own folder")
    max_attempts: int = Field(2, ge=1, le=10, description="tries of a retryable failure, the first included")


class FetchSpec(BaseModel):
    """How downloads behave."""

    model_config = Strict
    cache_dir: str | None = Field(None, description="content-addressed cache; default $XDG_CACHE_HOME or ~/.cache")
    connect_timeout_s: float = Field(10.0, gt=0)
    read_timeout_s: float = Field(30.0, gt=0, description="longest silence between two pieces of a body")
    deadline_s: float = Field(600.0, gt=0, description="longest time one file may take, all tries included")
    max_tries: int = Field(5, ge=1, le=20)
    backoff_s: float = Field(0.5, gt=0, description="first pause between tries; doubles, with jitter; Retry-After wins")


class SplitSpec(BaseModel):
    """The held-out split: a pure rule on the uid, sha256(salt, uid) mod 1000 < heldout_per_mille."""

    model_config = Strict
    heldout_per_mille: int = Field(20, ge=0, le=1000)
    salt: str = "lrm"


class WorkerSpec(BaseModel):
    """What one render task takes of a node."""

    model_config = Strict
    num_cpus: float = Field(1.0, gt=0, description="CPUs a render task reserves, and threads its Blender uses")
    open_shards: int = Field(4, ge=1, description="shards in flight, lowest index first")
    sandbox: Literal["strict", "basic"] = Field(
        "strict",
        description="border around the child that opens assets: strict needs every layer of render/confine.py, and a "
        "system that lacks one is an error at start; basic takes those that are there. Rows say which were on",
    )
    readable: tuple[str, ...] = Field(
        (), description="absolute paths that the child may read beside the asset, Blender and the system's libraries"
    )
    device: Literal["cpu", "optix", "cuda", "hip"] = Field(
        "cpu", description="what Cycles renders on; a device that is asked for and absent is an error at start"
    )
    num_gpus: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a GPU that a render task reserves, such as 0.25 for four tasks a GPU; goes with a device "
        "other than cpu. A process renders on one GPU, so 1 is the most",
    )
    max_failure_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="largest share of failures among the last `failure_window` objects; above it the run stops with "
        "a reason. What licences, lists or rules that are off by default leave out is no failure here; 1 never stops",
    )
    failure_window: int = Field(
        200, ge=10, le=100_000, description="how many of the last objects that share is taken over; fewer never stop"
    )
    min_free_bytes: int = Field(
        2**30,
        ge=0,
        description="free disk below which a node makes no new object, and waits until there is room: its temporary "
        "folder, the fetch cache, and the corpus where that is a folder; 0 never waits",
    )
    price_per_cpu_hour: float | None = Field(
        None, ge=0, description="what a reserved CPU costs an hour, in any currency; `make status` tells the cost"
    )
    price_per_gpu_hour: float | None = Field(None, ge=0, description="what a whole GPU costs an hour")
    memory_bytes: int | None = Field(
        None,
        ge=2**26,
        description="memory of its node that a render task reserves, so that no node is packed with more tasks than it "
        "holds; default 2 GiB, or limits.memory_bytes if that is less. Set it to limits.memory_bytes where objects are "
        "large: then no mix of them can exhaust a node",
    )
    node_wait_s: float = Field(
        0.0,
        ge=0,
        le=86_400,
        description="how long a run waits at its start for a node on which a task fits; for clusters that grow by "
        "demand, whose autoscaler is asked for one",
    )

    @model_validator(mode="after")
    def _gpu_where_asked(self) -> WorkerSpec:
        if (self.device == "cpu") != (self.num_gpus == 0) or 0 < self.num_gpus < MIN_GPU_SHARE:
            raise ValueError(
                f"device {self.device!r} with num_gpus {self.num_gpus:g}: a GPU device needs a share of a GPU, "
                f"{MIN_GPU_SHARE:g} to 1; cpu needs 0"
            )
        return self

    @model_validator(mode="after")
    def _readable_absolute(self) -> WorkerSpec:
        if relative := [path for path in self.readable if not Path(path).is_absolute()]:
            raise ValueError(f"readable {relative[0]!r} must be an absolute path")
        return self


class DatasetSpec(BaseModel):
    """One dataset: where assets come from, how they are rendered, admitted, and dealt into shards."""

    model_config = Strict
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$", description="name of the dataset")
    source: Source
    render: RenderSpec = RenderSpec()
    capture: CaptureSpec = CaptureSpec()
    shards: ShardSpec = ShardSpec()
    admission: AdmissionSpec = AdmissionSpec()
    limits: LimitSpec = LimitSpec()
    fetch: FetchSpec = FetchSpec()
    split: SplitSpec = SplitSpec()
    workers: WorkerSpec = WorkerSpec()

    @property
    def is_captured(self) -> bool:
        """Whether the source's assets are photographed, and `[capture]` is the pixel part."""
        return self.source.kind in CAPTURE_SOURCES

    @property
    def task_memory_bytes(self) -> int:
        """The memory that a render task reserves of its node."""
        if self.workers.memory_bytes is not None:
            return self.workers.memory_bytes
        return min(TASK_MEMORY_BYTES, self.limits.memory_bytes)

    def fingerprint(self, producer: str) -> str:
        """Return the digest of everything that decides pixels.

        Args:
            producer: name and version of what makes the pixels, such as "blender 4.5.15, render revision 1".
        """
        name = "capture" if self.is_captured else "render"
        return digest_json({name: getattr(self, name).model_dump(mode="json"), "producer": producer})

    def plan_set_id(self, fingerprint: str) -> str:
        """Return the name of the frozen plan: a digest of all that decides which asset stands in which shard."""
        part = {
            "name": self.name,
            "fingerprint": fingerprint,
            "source": self.source.model_dump(mode="json"),
            "shards": self.shards.model_dump(mode="json"),
            "licenses": self.admission.model_dump(mode="json")["licenses"],
        }
        return f"{self.name}-{digest_json(part)[:16]}"

    def is_heldout(self, uid: str) -> bool:
        """Whether the uid belongs to the held-out split."""
        digest = hashlib.sha256(f"{self.split.salt}\x1f{uid}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") % 1000 < self.split.heldout_per_mille


def split_command(command: str) -> list[str]:
    """Return the words of a `capture.mask_command` other than rembg; ValueError where it is none."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"mask_command {command!r}: {error}") from None
    if not any("{image}" in word for word in words[1:]) or not any("{mask}" in word for word in words[1:]):
        raise ValueError(f"mask_command {command!r}: it must be rembg, or a program and {{image}} and {{mask}}")
    return words


def load_spec(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> DatasetSpec:
    """Read a DatasetSpec from a TOML file, with `section.key=value` overrides.

    A relative `source.path` or `source.uids_file` is taken relative to the working directory.

    Raises:
        UserError: naming the file and the key that is wrong.
    """
    data = apply_overrides(read_toml(path), overrides)
    return validate_config(DatasetSpec, data, str(path))


def spec_of_json(text: str, where: str) -> DatasetSpec:
    """Read the spec that a plan or a version holds; one of another release is a UserError."""
    try:
        return validate_config(DatasetSpec, parse_json(text), where)
    except ValueError as error:
        raise UserError(f"{where}: the spec in it cannot be read: {error}") from None


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file; a missing or malformed one is a UserError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"spec {path}: no such file; see jobs/specs/ for examples") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"spec {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"spec {path}: not valid TOML: {error}") from None


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return data with `a.b=value` settings applied; a value is read as TOML, else kept as a string."""
    data = json.loads(json.dumps(data, default=str))
    for item in overrides:
        name, separator, text = item.partition("=")
        if not separator or not name.strip():
            raise UserError(f"--set {item!r}: expected section.key=value, such as render.samples=32")
        try:
            parsed = tomllib.loads(f"v = {text}")
        except tomllib.TOMLDecodeError:
            parsed = {"v": text}
        if set(parsed) != {"v"}:
            raise UserError(f"--set {item!r}: one setting at a time; repeat --set for more")
        value = parsed["v"]
        *sections, key = name.strip().split(".")
        target = data
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise UserError(f"--set {item!r}: {section!r} is a value, not a section")
        target[key] = value
    return data


def validate_config(model: type[M], data: Any, where: str) -> M:
    """Build a pydantic model, turning the first validation error into a one-line UserError."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if part not in SOURCES) or "(top level)"
        if first["type"] == "extra_forbidden":
            text = f"unknown key {name!r}; remove it or check its spelling"
        elif first["type"] == "missing":
            text = f"key {name!r} is missing"
        else:
            found = first.get("input")
            said = first["msg"].removeprefix("Value error, ")
            text = f"{name} = {found!r}: {said}" if not isinstance(found, dict) else f"{name}: {said}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise UserError(f"{where}: {text}{more}") from None
