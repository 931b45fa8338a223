"""`make bench-train`: the renderers against each other, a training step, and an image's way to a mesh.

    python -m tests.bench.train [--preset NAME] [--batches 1,2,4,8,16] [--renderers fused,reference] [--repeats 5]
                                [--compile inductor] [--skip step,infer]

On a GPU: the paper preset under bf16, its renderers forward and backward at 4 views of 128^2 rays of 128 samples:
`fused`, `reference`, the reference compiled, `per_view` (checkpointed a view at a time, as public trainers do), and
`deferred`. On a CPU: `reference` and `deferred` in float32, at sizes that two cores do in seconds, and the step of the
tiny preset. Every case runs in a process of its own, so that its peak of memory is its own; weights are random, LPIPS'
too, since only time is measured. What cannot be measured here is null, and `why_null` says why.

The last line is one JSON object. `fused_speedup` and `fused_mem_ratio` compare the fused renderer with the reference at
the largest batch that both can do; memory is that above planes, weights and rays.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrm import mesh
from lrm.config import RunConfig, load_config
from lrm.flops import count_flops, peak_flops
from lrm.losses import Lpips, lpips_shapes, mse_loss
from lrm.model import LRM
from lrm.optim import build_optimizer
from lrm.parallel import fast_attention, shard
from lrm.ranks import Ranks
from lrm.volume import deferred, fused, reference
from lrm.volume.reference import RadianceField

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
GPU_RENDERERS = ("fused", "reference", "compiled", "per_view", "deferred")
CPU_RENDERERS = ("reference", "deferred")
CPU_SIZE = {"views": 2, "patch_px": 48, "num_samples": 64}
GRID_SIDE = 256
NO_GPU = "no CUDA GPU"


def main() -> None:
    """Measure, and print one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper" if ON_GPU else "tiny", help="of the step and of inference")
    parser.add_argument("--batches", default="1,2,4,8,16" if ON_GPU else "1", help="objects a rendering")
    parser.add_argument("--renderers", default=",".join(GPU_RENDERERS if ON_GPU else CPU_RENDERERS))
    parser.add_argument("--step-batch", type=int, default=8)
    parser.add_argument("--compile", help="train.compile of the step, where not the preset's; none compiles nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", default="", help="of: render, step, infer")
    parser.add_argument("--case", help="measure one case in this process (for the benchmark itself)")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(_measure_case(json.loads(args.case))))
        return
    skipped = args.skip.split(",")
    result: dict[str, Any] = {"benchmark": "train", "device": _device_name(), "torch": torch.__version__}
    why: dict[str, str] = {}
    if "render" not in skipped:
        batches = [int(part) for part in args.batches.split(",")]
        result |= measure_renderers(batches, args.renderers.split(","), args.repeats, why)
    common = {"preset": args.preset, "repeats": args.repeats}
    if "step" not in skipped:
        result |= measure_step(common | {"kind": "step", "batch": args.step_batch, "compile": args.compile}, why)
    if "infer" not in skipped:
        stages = _run_case(common | {"kind": "infer"})
        result |= {"infer_stages": stages, "infer_s": None}
        if "error" in stages:
            why["infer_s"] = stages["error"]
        else:
            result["infer_s"] = round(sum(value for name, value in stages.items() if name.endswith("_s")), 4)
    for name in ("objects_per_s", "mfu", "peak_mem_bytes", "fused_speedup", "fused_mem_ratio", "infer_s"):
        if name not in result:
            result[name] = None
            why[name] = "left out by --skip"
    print(json.dumps(result | {"why_null": why}, sort_keys=True))


def measure_renderers(batches: list[int], renderers: list[str], repeats: int, why: dict[str, str]) -> dict[str, Any]:
    """Return every renderer's seconds and bytes at every batch, and the fused one's gain."""
    size = {"views": 4, "patch_px": 128, "num_samples": 128} if ON_GPU else CPU_SIZE
    rows = []
    for batch in batches:
        for renderer in renderers:
            case = {"kind": "render", "renderer": renderer, "batch": batch, "repeats": repeats, **size}
            rows.append({"renderer": renderer, "batch": batch} | _run_case(case))
            print(json.dumps(rows[-1]), file=sys.stderr)
    done = {(row["renderer"], row["batch"]): row for row in rows if "error" not in row}
    both = [batch for batch in batches if ("fused", batch) in done and ("reference", batch) in done]
    result = {"render_size": size, "render": rows, "fused_speedup": None, "fused_mem_ratio": None}
    if not both:
        why["fused_speedup"] = why["fused_mem_ratio"] = "no batch that both renderers did" if ON_GPU else NO_GPU
        return result
    ours, theirs = done["fused", both[-1]], done["reference", both[-1]]
    result["fused_speedup"] = theirs["forward_s"] + theirs["backward_s"]
    result["fused_speedup"] = round(result["fused_speedup"] / (ours["forward_s"] + ours["backward_s"]), 2)
    result["fused_mem_ratio"] = round(ours["peak_mem_bytes"] / theirs["peak_mem_bytes"], 5)
    return result


def measure_step(case: dict[str, Any], why: dict[str, str]) -> dict[str, Any]:
    """Return objects a second, MFU and peak memory of a training step."""
    row = _run_case(case)
    config = load_config(case["preset"])
    peak = peak_flops(_device_name()) if ON_GPU else None
    result = {
        "preset": case["preset"], "step_batch": case["batch"], "train_flops_per_object": count_flops(config).train,
        "objects_per_s": None, "mfu": None, "peak_mem_bytes": None,
    }  # fmt: skip
    if "error" in row:
        why["objects_per_s"] = why["mfu"] = why["peak_mem_bytes"] = row["error"]
        return result
    rate = case["batch"] / row["step_s"]
    result |= {"step_s": row["step_s"], "objects_per_s": round(rate, 3), "peak_mem_bytes": row["peak_mem_bytes"]}
    if peak is None:
        why["mfu"] = f"the peak of {_device_name()} is not known" if ON_GPU else NO_GPU
    else:
        result["mfu"] = round(rate * count_flops(config).train / peak, 4)
    return result


def _run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Measure a case in a process of its own; one that fails gives {"error": its last line}."""
    command = [sys.executable, "-m", "tests.bench.train", "--case", json.dumps(case)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:200]}
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


def _measure_case(case: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    measure = {"render": _measure_render, "step": _measure_step, "infer": _measure_infer}[case["kind"]]
    with fast_attention(DEVICE):
        return measure(case)


def _measure_render(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the forward and the backward pass at the paper's planes and field, medians."""
    model = load_config("paper").model
    field = RadianceField(model.decoder.plane_channels, model.volume).to(DEVICE)
    side, views, batch = case["patch_px"], case["views"], case["batch"]
    planes = torch.randn(batch, 3, model.decoder.plane_channels, 64, 64, device=DEVICE, requires_grad=True)
    origins, directions = _rays(batch, views, side)
    render = partial(
        _renderer(case["renderer"]), planes, field, origins, directions, case["num_samples"], image_px=(side, side)
    )
    forward, backward = [], []
    baseline = _reset_peak()
    for turn in range(case["repeats"] + 1):  # the first compiles and warms up
        begun = _now()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            rgb = render(jitter=turn)
        middle = _now()
        (rgb - 0.5).square().mean().backward()
        forward.append(middle - begun)
        backward.append(_now() - middle)
        planes.grad = None
        field.zero_grad()
        del rgb
    return {
        "forward_s": round(statistics.median(forward[1:]), 6),
        "backward_s": round(statistics.median(backward[1:]), 6),
        "peak_mem_bytes": _peak() - baseline,
    }


def _renderer(name: str) -> Callable[..., Tensor]:
    """Return a function of (planes, field, origins, directions, num_samples, jitter, image_px) that gives rgb."""

    def whole(*rays: Any, jitter: int, image_px: tuple[int, int]) -> Tensor:
        return reference.render_rays(*rays, jitter).rgb

    compiled = torch.compile(lambda *rays: reference.render_rays(*rays).rgb)

    def by_compiled(*rays: Any, jitter: int, image_px: tuple[int, int]) -> Tensor:
        return compiled(*rays)  # samples in the middles, since a seed would be compiled in

    def by_fused(*rays: Any, jitter: int, image_px: tuple[int, int]) -> Tensor:
        return fused.render_rays(*rays, jitter, image_px=image_px).rgb

    def per_view(
        planes: Tensor, field: nn.Module, origins: Tensor, directions: Tensor, num_samples: int, *,
        jitter: int, image_px: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        size = image_px[0] * image_px[1]
        views = zip(origins.split(size, 1), directions.split(size, 1))
        render = partial(whole, jitter=jitter, image_px=image_px)
        return torch.cat([checkpoint(render, planes, field, *v, num_samples, use_reentrant=False) for v in views], 1)

    def by_deferred(*rays: Any, jitter: int, image_px: tuple[int, int]) -> Tensor:
        patch_rays = 8192 if ON_GPU else 512
        return deferred.render_rays(*rays, jitter, patch_rays=patch_rays).rgb

    return {
        "reference": whole, "compiled": by_compiled, "fused": by_fused, "per_view": per_view, "deferred": by_deferred,
    }[name]  # fmt: skip


def _measure_step(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a whole step on made-up data: forward, MSE and LPIPS, backward, clip, AdamW."""
    overrides = ["model.encoder.weights=''"]
    if case["compile"]:
        overrides.append("train.compile=" + {"none": "''"}.get(case["compile"], case["compile"]))
    config = load_config(case["preset"], overrides)
    model = LRM(config.model).to(DEVICE)
    shard(model, config.train, Ranks(rank=0, size=1, device=DEVICE))
    optimizer = build_optimizer(model, config.train)
    lpips = None
    if config.train.lpips_weight:
        lpips = Lpips({name: torch.rand(shape) * 0.01 for name, shape in lpips_shapes().items()}).to(DEVICE)
    batch = _batch(config, case["batch"])
    target = torch.rand(case["batch"], config.data.side_views + 1, 3, *[config.data.patch_px] * 2, device=DEVICE)
    bf16 = ON_GPU and config.train.precision == "bf16"
    seconds = []
    _reset_peak()
    for turn in range(case["repeats"] + 2):
        begun = _now()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            rgb = model(*batch, config.data.patch_px, turn).rgb
            loss = mse_loss(rgb, target)
            if lpips is not None:
                loss = loss + config.train.lpips_weight * lpips(rgb, target).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        seconds.append(_now() - begun)
    return {"step_s": round(statistics.median(seconds[2:]), 6), "peak_mem_bytes": _peak()}


def _measure_infer(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one image's stages to its mesh's file, at a grid of GRID_SIDE^3 points.

    Random weights have no surface worth the name, so the surface, its texture and its file are those of a ball of half
    the box's width: as many faces as an object has.
    """
    config = load_config(case["preset"], ["model.encoder.weights=''"])
    model = LRM(config.model).to(DEVICE).eval()
    image, camera, *_ = _batch(config, 1)
    axis = torch.linspace(-1, 1, GRID_SIDE, device=DEVICE)
    ball = 10.0 * (1 - (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()).clamp(min=0)
    stages: dict[str, list[float]] = {}
    for _ in range(case["repeats"] if ON_GPU else 1):
        marks = {"": _now()}
        with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
            tokens = model.encoder(image)
            marks["encoder_s"] = _now()
            planes = model.decoder(tokens, camera).float()[0]
            marks["decoder_s"] = _now()
        mesh.triplane_density_grid(planes, model.field, GRID_SIDE)
        marks["density_s"] = _now()
        surface = mesh.extract_surface(ball, 5.0)
        marks["surface_s"] = _now()
        texture = mesh.bake_texture(mesh.triplane_field(planes, model.field), surface, 2048, DEVICE)
        marks["colours_s"] = _now()
        mesh.glb_bytes(surface, texture)
        marks["glb_s"] = _now()
        for (_, begun), (name, ended) in zip(marks.items(), list(marks.items())[1:]):
            stages.setdefault(name, []).append(ended - begun)
    seconds = {name: round(statistics.median(values), 6) for name, values in stages.items()}
    return seconds | {"grid_side": GRID_SIDE, "faces": len(surface.faces)}


def _batch(config: RunConfig, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return an image, its camera's numbers, and poses and intrinsics of views around the object."""
    views, side, image_px = config.data.side_views + 1, config.data.patch_px, config.model.encoder.image_px
    image = torch.rand(batch, 3, image_px, image_px, device=DEVICE)
    return image, torch.rand(batch, 20, device=DEVICE), *_cameras(batch, views, side)


def _cameras(batch: int, views: int, side: int) -> tuple[Tensor, Tensor]:
    """Return poses [B, V, 4, 4] that look at the origin from 2.2 away, and K [B, V, 3, 3] of half of each view."""
    centres = nn.functional.normalize(torch.randn(batch, views, 3), dim=-1) * 2.2
    forward = nn.functional.normalize(-centres, dim=-1)
    right = nn.functional.normalize(torch.linalg.cross(forward, torch.tensor([0.0, 0, 1]).expand_as(forward)), dim=-1)
    poses = torch.eye(4).repeat(batch, views, 1, 1)
    poses[..., :3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward], -1)
    poses[..., :3, 3] = centres
    focal = 1.07 * 2 * side  # 50 degrees over the whole view
    k = torch.tensor([[focal, 0, side / 2], [0, focal, side / 2], [0, 0, 1]]).expand(batch, views, 3, 3)
    return poses.to(DEVICE), k.to(DEVICE)


def _rays(batch: int, views: int, side: int) -> tuple[Tensor, Tensor]:
    from lrm.cameras import pixel_rays

    origins, directions = pixel_rays(*_cameras(batch, views, side), side, side)
    return origins.flatten(1, 2), directions.flatten(1, 2)


def _now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak() -> int:
    """Start a new peak; returns the bytes held now."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident
    return _peak()


def _peak() -> int:
    if ON_GPU:
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def _device_name() -> str:
    if ON_GPU:
        return torch.cuda.get_device_name()
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "CPU",
    )
    return f"{model}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
