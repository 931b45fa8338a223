"""The numbers of the paper for a checkpoint, on the objects that a version holds out.

The paper's own alignment rules, seeds and backbones are not public, so here are ours, and every output repeats them.

**Objects.** The split that the version names: a pure rule on the uid, so that no later version trains on them. Of more
than `max_objects` those with the smallest hash of (seed, uid) are taken.

**Views.** Of an object's views `reference_views` are drawn by a generator seeded with (seed, uid); each of the first
`input_views` of them is fed alone, and all are predicted from it: the paper's 15 and 5 of its ablations (its main table
has 20 reference views). Figures are means over novel views, which leave out the one that was fed, and beside them over
all, as the paper's are said to be.

**Alignment of views: none.** Predictions live in the world of the input camera (`lrm.cameras`); true cameras are turned
into it by their known poses, as in training, and so the input's true pose, distance and intrinsics are given to the
model. Nothing is fitted afterwards.

**Pictures.** Square, `image_px` wide, sRGB over white; true ones resized by area. `lrm.image_metrics` has the formulas.
A view's figure is taken first, then the mean over an input's views, an object's inputs, and objects. FID compares all
predicted novel views of all objects with the true ones, a true view as often as it was predicted.

**Meshes.** One for each input, by `lrm.mesh`, turned back into the object's world by the inverse of the input's
rotation and scale: no scaling to fit, no ICP. The true surface is what the version's depth planes show
(`lrm.mesh_metrics`); a version without them has no figures of meshes. Inputs whose density has no surface are counted
in `no_surface`, and are no part of the means.

What lacks its weights or its truth is left out, and named with its reason. The same call gives the same bytes in
`objects.parquet`, on the same machine and number of threads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, Field
from torch import Tensor
from tqdm import tqdm

from lrm import image_metrics as images
from lrm import mesh, mesh_metrics
from lrm.cameras import normalizing_rotation
from lrm.config import Strict, TrainConfig
from lrm.data import input_fields, normalized_poses
from lrm.inception import WEIGHTS_NAME, FidInception, load_inception
from lrm.infer import load_model, pick_device, precision_of, to_uint8, write_sheet
from lrm.losses import Lpips, default_lpips_path, load_lpips
from lrm.pixels import Float32, cut_window, decode_view
from pipeline.reader import VersionReader, ViewsRead
from pipeline.sample import decode_data
from pipeline.spec import apply_overrides, validate_config
from pipeline.types import Camera, Float64, Plane, UserError, derive_seed

THRESHOLDS = (0.05, 0.1, 0.2)
"""Of the F-score, in world units: the object's box is 2 wide."""
SHEET_OBJECTS = 8


class EvalConfig(BaseModel):
    """How a checkpoint is measured."""

    model_config = Strict
    split: Literal["heldout", "train"] = Field("heldout", description="train is for comparison, and is no evaluation")
    max_objects: int = Field(100, ge=1, description="objects at most; paper 50 rendered and 50 captured, or 100 of GSO")
    reference_views: int = Field(15, ge=2, description="views of an object that are predicted; paper 15, or 20")
    input_views: int = Field(5, ge=1, description="views of those that are fed, one by one; paper 5")
    image_px: int = Field(0, ge=0, le=2048, description="side of the pictures; 0 is the training's largest")
    meshes: bool = Field(True, description="measure meshes, where the version has depth planes")
    resolution: int = Field(256, ge=16, le=512, description="points of the density grid along a side; paper 384")
    level: float | None = Field(
        None, gt=0, description="density of the surface; default: half opaque within one training sample"
    )
    surface_points: int = Field(10_000, ge=100, description="points drawn from each surface")
    seed: int = Field(0, ge=0, description="of objects, views and points; 0 is a seed like any other")
    lpips_path: str = Field("", description="file made by `make weights`; empty takes where that writes by default")
    weights_dir: str = Field(
        "", description="folder of clip/ and Inception's file; empty takes $LRM_METRIC_WEIGHTS, or the cache's metrics/"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")


def eval_config(overrides: Sequence[str] = ()) -> EvalConfig:
    """Return the defaults with `key=value` overrides."""
    config = validate_config(EvalConfig, apply_overrides({}, overrides), "evaluate")
    if config.input_views > config.reference_views:
        raise UserError(f"input_views {config.input_views} are more than reference_views {config.reference_views}")
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Means over objects, what was left out and why, and how it was measured."""

    means: dict[str, float | None]
    left_out: dict[str, str]
    protocol: dict[str, Any]
    num_objects: int
    no_surface: int
    elapsed_s: float

    def as_json(self) -> dict[str, Any]:
        """Return one JSON object of all of it; a mean over nothing is null."""
        means = {name: None if value is None else round(value, 6) for name, value in self.means.items()}
        counts = {"num_objects": self.num_objects, "no_surface": self.no_surface}
        rest = {"left_out": self.left_out, "elapsed_s": round(self.elapsed_s, 2), "protocol": self.protocol}
        return counts | means | rest

    def as_text(self) -> str:
        """Return the table."""
        p, m = self.protocol, self.means
        lines = [
            f"{self.num_objects} objects of version {p['version']} ({p['split']}), step {p['step']}: "
            f"up to {p['input_views']} inputs x {p['reference_views']} views at {p['image_px']} px, seed {p['seed']}",
            f"{'':<12} {'novel':>9} {'all':>9}",
        ]
        for name, label in (("psnr_db", "PSNR dB"), ("ssim", "SSIM"), ("lpips", "LPIPS"), ("clip", "CLIP")):
            if name in m:
                lines.append(f"{label:<12} {_number(m[name])} {_number(m[_all(name)])}")
        for name, label in (("fid", "FID"), ("chamfer", "Chamfer"), *((_f(t), f"F at {t:g}") for t in THRESHOLDS)):
            if name in m:
                lines.append(f"{label:<12} {_number(m[name])}")
        if p["trained_on_digest"] not in ("unknown", p["version_digest"]):  # an exported file does not say
            lines.append("trained on another version: where its rule holds out other objects, these may be known to it")
        if self.no_surface:
            lines.append(
                f"{self.no_surface} input(s) gave no surface at this level, and are no part of the mesh figures"
            )
        lines += [f"left out: {name} ({reason})" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:9.4f}"


def _all(name: str) -> str:
    return "psnr_all_db" if name == "psnr_db" else f"{name}_all"


def _f(threshold: float) -> str:
    return f"f_{threshold:g}"


def choose_rows(reader: VersionReader, config: EvalConfig) -> list[int]:
    """Return the rows to measure, in the version's order.

    Raises:
        UserError: if the split is empty.
    """
    wanted = config.split == "heldout"
    uids, flags = reader.rows["uid"].to_pylist(), reader.rows["heldout"].to_pylist()
    rows = [row for row, heldout in enumerate(flags) if heldout == wanted]
    if not rows:
        raise UserError(
            f"version {reader.number} has no sample in its {config.split} split; it holds out "
            f"{reader.version.spec.split.heldout_per_mille} of 1000 uids (split.heldout_per_mille of its spec)"
        )
    drawn = sorted(rows, key=lambda row: derive_seed("evaluated object", config.seed, uids[row]))
    return sorted(drawn[: config.max_objects])


def choose_views(uid: str, num_views: int, config: EvalConfig) -> list[int]:
    """Return the reference views of an object, the fed ones first: a pure function of (seed, uid, number of views)."""
    order = np.random.default_rng(derive_seed("evaluated views", config.seed, uid)).permutation(num_views)
    return [int(view) for view in order[: config.reference_views]]


class Measures:
    """The measures that can be taken, and why the others cannot."""

    def __init__(
        self, config: EvalConfig, train: TrainConfig, reader: VersionReader, rows: Sequence[int], device: torch.device
    ) -> None:
        self.left_out: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.lpips: Lpips | None = None
        self.clip: images.ClipImages | None = None
        self.inception: FidInception | None = None
        lpips_path = Path(config.lpips_path).expanduser() if config.lpips_path else default_lpips_path()
        if lpips_path.is_file():
            self.lpips = load_lpips(train.model_copy(update={"lpips_weight": 1.0, "lpips_path": str(lpips_path)}))
            self.lpips = None if self.lpips is None else self.lpips.to(device)
            self.names["lpips"] = "VGG16, LPIPS 0.1"
        else:
            self.left_out["lpips"] = f"{lpips_path} is not there; run make weights"
        folder = images.metric_weights_dir(config.weights_dir)
        if (folder / images.CLIP_FOLDER).is_dir():
            self.clip = images.ClipImages(folder / images.CLIP_FOLDER, device)
            self.names["clip"] = self.clip.name
        else:
            self.left_out["clip"] = (
                f"{folder / images.CLIP_FOLDER} is not there; put a CLIP model of transformers into it"
            )
        if (folder / WEIGHTS_NAME).is_file():
            self.inception = load_inception(folder / WEIGHTS_NAME).to(device)
            self.names["fid"] = f"{WEIGHTS_NAME}, 2048 features, bilinear to 299 px"
        else:
            self.left_out["fid"] = f"{folder / WEIGHTS_NAME} is not there; pytorch-fid publishes it"
        planes = reader.rows["planes"]
        self.depth = config.meshes and all("depth" in planes[row].as_py() for row in rows)
        if not self.depth:
            lack = "not every object has a depth plane to measure against" if config.meshes else "meshes=false"
            self.left_out["chamfer"] = self.left_out["f_score"] = lack

    def views(self, predicted: Tensor, true: Tensor) -> dict[str, list[float]]:
        """Return each measure of each pair of views [V, 3, P, P]."""
        out = {"psnr_db": images.psnr(predicted, true), "ssim": images.ssim(predicted, true)}
        if self.lpips is not None:
            parts = zip(images.in_batches(predicted), images.in_batches(true))
            with torch.no_grad():
                out["lpips"] = [value for one, other in parts for value in self.lpips(one, other).tolist()]
        if self.clip is not None:
            parts = zip(images.in_batches(predicted), images.in_batches(true))
            out["clip"] = [value for one, other in parts for value in self.clip.similarity(one, other)]
        return out

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Float32:
        """Return Inception's features [V, 2048] of pictures, or none [V, 0] where it is left out."""
        if self.inception is None:
            return np.zeros((len(pictures), 0), np.float32)
        parts = images.in_batches(images.eight_bits(pictures))
        return np.concatenate([self.inception(part).cpu().numpy() for part in parts])


@dataclass(slots=True)
class _Object:
    """An object as it is measured: what was read, its true views, and its true surface if it has one."""

    uid: str
    views: list[int]
    read: ViewsRead
    pictures: list[Float32]
    intrinsics: Float64
    true: Tensor
    surface: Float64 | None


class Evaluator:
    """A model on its device, and the measuring of one object after another."""

    def __init__(self, checkpoint_dir: Path, reader: VersionReader, config: EvalConfig) -> None:
        self.config, self.reader, self.device = config, reader, pick_device(config.device)
        self.model, self.run, self.step, self.trained_on = load_model(checkpoint_dir)
        self.model.to(self.device)
        self.rows = choose_rows(reader, config)
        self.measures = Measures(config, self.run.train, reader, self.rows, self.device)
        self.image_px = config.image_px or self.run.data.max_render_px
        self.level = config.level or mesh.half_opaque_density(self.run.model.volume.samples_per_ray)
        self.features: list[tuple[Float32, Float32]] = []
        self.tiles: list[Float32] = []
        if self.image_px < 16:
            raise UserError(f"image_px {self.image_px}: SSIM and LPIPS need 16 px at least; set image_px=64")

    def protocol(self) -> dict[str, Any]:
        """Return how it was measured: with the same of it, the figures come out the same."""
        asked = self.config.model_dump(mode="json", exclude={"lpips_path", "weights_dir", "device"})
        spec = self.reader.version.spec.split
        return asked | {
            "image_px": self.image_px, "level": self.level, "step": self.step, "version": self.reader.number,
            "version_digest": self.reader.digest, "trained_on_digest": self.trained_on,
            "heldout_rule": f"sha256({spec.salt!r}, uid) mod 1000 < {spec.heldout_per_mille}",
            "backbones": self.measures.names, "precision": "bf16" if self.device.type == "cuda" else "fp32",
            "alignment": "views: true input camera given, nothing fitted; meshes: inverse of the input's rotation and "
            "scale, nothing fitted; Chamfer: sum of both mean distances in world units, box [-1, 1]^3",
        }  # fmt: skip

    def load(self, row: int) -> _Object:
        """Read an object's reference views and, where it has them, its depth planes."""
        uid, num_views = (self.reader.rows[name][row].as_py() for name in ("uid", "num_views"))
        views = choose_views(uid, num_views, self.config)
        if len(views) < 2:
            raise UserError(f"object {uid}: it has {num_views} view(s), and a novel one needs a second")
        read = self.reader.read_views(row, views)
        pictures = [decode_view(planes["rgba"], camera, read.key) for planes, camera in zip(read.planes, read.cameras)]
        size = self.image_px
        cut = [cut_window(picture, c.intrinsics, size, 0, 0, size) for picture, c in zip(pictures, read.cameras)]
        true = torch.from_numpy(np.stack([window.image for window in cut])).permute(0, 3, 1, 2).contiguous()
        surface = self._true_surface(row, uid, num_views) if self.measures.depth else None
        intrinsics = np.stack([window.intrinsics for window in cut])
        return _Object(uid, views, read, pictures, intrinsics, true.to(self.device), surface)

    def _true_surface(self, row: int, uid: str, num_views: int) -> Float64:
        read = self.reader.read_views(row, range(num_views), ("depth",))
        points = []
        for planes, camera, view in zip(read.planes, read.cameras, read.header.metadata["views"]):
            plane = Plane(codec="png", data=bytes(planes["depth"]), scale=view["planes"]["depth"]["scale"])
            points.append(mesh_metrics.depth_points(decode_data("depth", plane), camera))
        thinned = mesh_metrics.thin(np.concatenate(points))
        if not len(thinned):
            raise UserError(f"object {uid}: its depth planes show nothing; set meshes=false to leave meshes out")
        seed = derive_seed("true points", self.config.seed, uid)
        return mesh_metrics.draw(thinned, self.config.surface_points, seed)

    @torch.no_grad()
    def predict(self, item: _Object, fed: int) -> tuple[Tensor, Tensor]:
        """Return predicted views [V, 3, P, P] and planes [3, C, R, R] of an object from its view number `fed`."""
        cameras = _input_first(item.read.cameras, fed)
        poses = normalized_poses(cameras, self.run.data, item.read.source)
        inputs = input_fields(item.pictures[fed], cameras[0], poses[0], self.run.model.encoder.image_px)

        def tensor(value: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(value, np.float32))[None].to(self.device)

        with precision_of(self.device):
            planes = self.model.planes(tensor(inputs["input_image"]), tensor(inputs["input_camera"])).float()
            order = [fed, *(i for i in range(len(poses)) if i != fed)]
            out = torch.empty_like(item.true)
            for place, view in enumerate(order):  # one at a time: memory does not grow with views
                k = tensor(item.intrinsics[view : view + 1])
                rendered = self.model.render(
                    planes, tensor(poses[place : place + 1]), k, self.image_px, self.image_px
                )  # fmt: skip
                out[view] = rendered.rgb[0, 0].clamp(0, 1)
        return out, planes[0]

    def measure(self, row: int) -> dict[str, Any]:
        """Measure one object; keeps its features for FID, and its tiles for the sheet."""
        item = self.load(row)
        fed_views = range(min(self.config.input_views, len(item.views)))
        true_features = self.measures.features(item.true)
        values: dict[str, list[float]] = {}
        surfaces: list[dict[str, float]] = []
        for fed in fed_views:
            predicted, planes = self.predict(item, fed)
            novel = [i for i in range(len(item.views)) if i != fed]
            for name, each in self.measures.views(predicted, item.true).items():
                values.setdefault(name, []).append(float(np.mean([each[i] for i in novel])))
                values.setdefault(_all(name), []).append(float(np.mean(each)))
            self.features.append((self.measures.features(predicted[novel]), true_features[novel]))
            if item.surface is not None:
                surfaces += self._measure_mesh(item, fed, planes)
            if fed == 0 and len(self.tiles) < 3 * SHEET_OBJECTS:
                shown = (
                    item.pictures[0],
                    *(t[novel[0]].permute(1, 2, 0).cpu().numpy() for t in (item.true, predicted)),
                )
                self.tiles += shown
        record: dict[str, Any] = {
            "uid": item.uid, "key": item.read.key, "source": item.read.source, "views": item.views,
            "num_inputs": len(fed_views), "no_surface": 0,
        }  # fmt: skip
        record |= {name: float(np.mean(each)) for name, each in values.items()}
        if item.surface is not None:
            record["no_surface"] = len(fed_views) - len(surfaces)
            for name in ("chamfer", *map(_f, THRESHOLDS)):
                record[name] = float(np.mean([one[name] for one in surfaces])) if surfaces else None
        return record

    def _measure_mesh(self, item: _Object, fed: int, planes: Tensor) -> list[dict[str, float]]:
        """Return one record of the mesh's distances, or none if there is no surface."""
        density = mesh.triplane_density_grid(planes, self.model.field, self.config.resolution)
        try:
            surface = mesh.extract_surface(density, self.level)
        except UserError:  # counted: a model of few steps has none
            return []
        seed = derive_seed("predicted points", self.config.seed, item.uid, fed)
        points = mesh_metrics.sample_surface(surface, self.config.surface_points, seed)
        assert item.surface is not None
        back = self.to_object(points, item, fed)
        chamfer, scores = mesh_metrics.surface_distances(back, item.surface, THRESHOLDS)
        return [{"chamfer": chamfer, **dict(zip(map(_f, THRESHOLDS), scores))}]

    def to_object(self, points: Float64, item: _Object, fed: int) -> Float64:
        """Turn points [N, 3] from the world of an input camera back into the object's."""
        camera = item.read.cameras[fed].world_from_camera
        pose = normalized_poses(_input_first(item.read.cameras, fed), self.run.data, item.read.source)[0]
        scale = np.linalg.norm(pose[:3, 3]) / np.linalg.norm(camera[:3, 3])
        out: Float64 = points @ normalizing_rotation(camera) / scale
        return out


def _input_first(cameras: Sequence[Camera], fed: int) -> list[Camera]:
    return [cameras[fed], *(camera for i, camera in enumerate(cameras) if i != fed)]


def evaluate(checkpoint_dir: Path, corpus: str, version: int | None, out_dir: Path, config: EvalConfig) -> EvalResult:
    """Measure a checkpoint on a version; writes objects.parquet, table.txt, evaluation.json and examples.png.

    Raises:
        UserError: for what the user can put right.
        DamagedDataError: if an object that is measured is not what was written.
    """
    begun = time.perf_counter()
    reader = VersionReader.open(corpus, version)
    evaluator = Evaluator(checkpoint_dir, reader, config)
    records = [evaluator.measure(row) for row in tqdm(evaluator.rows, desc="evaluate", unit="object", mininterval=2)]
    skip = ("uid", "key", "source", "views", "num_inputs", "no_surface")
    means: dict[str, float | None] = {}
    for name in (name for name in records[0] if name not in skip):
        known = [record[name] for record in records if record[name] is not None]
        means[name] = float(np.mean(known)) if known else None
    if evaluator.measures.inception is not None:
        ours, theirs = (np.concatenate(parts) for parts in zip(*evaluator.features))
        means["fid"] = images.frechet_distance(ours, theirs)
    result = EvalResult(
        means=means, left_out=evaluator.measures.left_out, protocol=evaluator.protocol(), num_objects=len(records),
        no_surface=sum(record["no_surface"] for record in records), elapsed_s=time.perf_counter() - begun,
    )  # fmt: skip
    _write(out_dir, records, result, evaluator)
    return result


def _write(out_dir: Path, records: Sequence[dict[str, Any]], result: EvalResult, evaluator: Evaluator) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(records))
    notes = {"protocol": json.dumps(result.protocol), "left_out": json.dumps(result.left_out)}
    pq.write_table(table.replace_schema_metadata(notes), out_dir / "objects.parquet")
    (out_dir / "table.txt").write_text(result.as_text() + "\n", encoding="utf-8")
    (out_dir / "evaluation.json").write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    write_sheet(out_dir / "examples.png", [to_uint8(tile) for tile in evaluator.tiles], evaluator.image_px)
