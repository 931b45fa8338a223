"""The fused renderer against the reference: by Triton's interpreter on a CPU, on the GPU where there is one.

Tolerances, of the Euclidean norm of each output and each gradient relative to the reference's in float32:

    products in float32     5e-6 for rgb, alpha and depth, 2e-5 for gradients     (largest seen over 121 random scenes,
                            from mist to walls: 7e-7 and 4.3e-6)
    products in bfloat16    1e-2 for rgb, alpha and depth                         (largest seen over 45: 3.5e-3)

Gradients in bfloat16 are off by as much as rounding makes a ReLU change sides, 2e-2 in the median and 0.17 at most in
these small scenes. So they are judged by what autocast, rounding in the same places, makes of the reference's own.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrm.config import VolumeConfig
from lrm.volume import fused, reference, render
from pipeline.types import UserError
from tests.lrm.scenes import Scene, make_scene, outputs_and_gradients, relative_error, scenes

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes in the interpreter
)  # fmt: skip


def by_reference(scene: Scene, *, autocast: bool = False) -> dict[str, Tensor]:
    rays = (scene.origins, scene.directions, scene.num_samples, scene.jitter)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        return outputs_and_gradients(scene, lambda planes, field: reference.render_rays(planes, field, *rays))


def by_fused(scene: Scene, precision: fused.Precision) -> dict[str, Tensor]:
    rays = (scene.origins, scene.directions, scene.num_samples, scene.jitter)
    return outputs_and_gradients(
        scene,
        lambda planes, field: fused.render_rays(planes, field, *rays, image_px=scene.image_px, precision=precision),
    )


@QUICK
@given(scene=scenes(device=DEVICE))
def test_it_gives_what_the_reference_gives(scene: Scene) -> None:
    wanted, found = by_reference(scene), by_fused(scene, "fp32")
    assert found.keys() == wanted.keys()
    errors = {name: relative_error(found[name], value) for name, value in wanted.items()}
    for name, error in errors.items():
        assert error < (5e-6 if name in ("rgb", "alpha", "depth") else 2e-5), errors


def test_a_deep_mlp_gets_its_gradients_in_several_passes() -> None:
    """12 layers are 10 hidden ones: passes of 4, 4 and 2, and signs of 11 activations."""
    scene = make_scene(seed=3, image_px=(4, 8), layers=12, num_samples=6, jitter=1, device=DEVICE)
    wanted, found = by_reference(scene), by_fused(scene, "fp32")
    errors = {name: relative_error(found[name], value) for name, value in wanted.items()}
    assert len(errors) == 3 + 1 + 12  # weight and bias of a layer together
    assert max(errors.values()) < 2e-5, errors
    assert all(value.norm() > 0 for value in wanted.values())


def test_rounding_to_bfloat16_costs_no_more_than_it_costs_the_reference_under_autocast() -> None:
    squares: dict[str, float] = {"fused": 0.0, "autocast": 0.0}
    for seed in range(8):
        scene = make_scene(
            seed=seed, image_px=(4, 4), views=2, width=(16, 32)[seed % 2], layers=3 + seed % 3, num_samples=8,
            jitter=seed, device=DEVICE,
        )  # fmt: skip
        wanted = by_reference(scene)
        for name, found in (("fused", by_fused(scene, "bf16")), ("autocast", by_reference(scene, autocast=True))):
            assert all(relative_error(found[n], wanted[n]) < 1e-2 for n in ("rgb", "alpha", "depth")), name
            gradients = [n for n in wanted if n not in ("rgb", "alpha", "depth")]
            squares[name] += sum(relative_error(found[n], wanted[n]) ** 2 / len(gradients) for n in gradients)
    rms = {name: math.sqrt(total / 8) for name, total in squares.items()}
    assert rms["fused"] < 1.25 * rms["autocast"], rms
    assert rms["fused"] > 1e-3, "products were not rounded at all"


def test_rays_that_miss_the_box_touch_neither_planes_nor_mlp() -> None:
    scene = make_scene(seed=0, image_px=(4, 8), num_samples=4, device=DEVICE)
    with torch.no_grad():
        for poisoned in (scene.planes, *scene.field.parameters()):
            poisoned.fill_(torch.nan)
    planes = scene.planes.requires_grad_()
    out = fused.render_rays(planes, scene.field, scene.origins, -scene.directions, 4, image_px=(4, 8))
    assert (out.rgb == 1).all()
    assert (out.alpha == 0).all()
    weights = [layer.weight for layer in scene.field.layers]
    for gradient in torch.autograd.grad(out.rgb.sum(), weights[1:]):  # those that the kernel itself gives
        assert (gradient == 0).all()


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_samples() -> None:
    def kept_bytes(num_samples: int) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        scene = make_scene(seed=0, num_samples=num_samples, jitter=3, device=DEVICE)
        rays = (scene.origins, scene.directions, num_samples, 3)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            fused.render_rays(scene.planes.requires_grad_(), scene.field, *rays)
        return total

    assert kept_bytes(4) == kept_bytes(12) > 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), resolution=st.integers(2, 9), channels=st.integers(1, 6), width=st.integers(1, 9))
def test_folding_the_first_layer_into_the_planes_is_exact(
    seed: int, resolution: int, channels: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, channels, resolution, resolution), (width, 3 * channels), (width,), (2, 11, 3)]
    planes, weight, bias, points = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    wanted = torch.nn.functional.linear(reference.sample_triplane(planes, points), weight, bias)
    folded = fused.fold_first_layer(planes, weight, bias).permute(0, 1, 4, 2, 3)
    found = reference.sample_triplane(folded, points).unflatten(-1, (3, width)).sum(-2)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(pictures=st.integers(1, 4), rows=st.integers(1, 13), columns=st.integers(1, 13))
def test_tiles_hold_every_ray_once_and_only_neighbours(pictures: int, rows: int, columns: int) -> None:
    for tiling in (fused.FORWARD, fused.BACKWARD):
        check_tiles(pictures, rows, columns, tiling)


def check_tiles(pictures: int, rows: int, columns: int, tiling: fused.Tiling) -> None:
    order = fused._tile_order(pictures * rows * columns, (rows, columns), tiling, torch.device("cpu"))
    assert sorted(order[order >= 0].tolist()) == list(range(pictures * rows * columns))
    for tile in order.reshape(-1, tiling.rows * tiling.columns).tolist():
        rays = [ray for ray in tile if ray >= 0]
        picture, place = zip(*(divmod(ray, rows * columns) for ray in rays))
        row, column = zip(*(divmod(p, columns) for p in place))
        assert len(set(picture)) == 1
        assert max(row) - min(row) < tiling.rows
        assert max(column) - min(column) < (tiling.columns if rows >= tiling.rows else tiling.rows * tiling.columns)


def test_a_choice_that_cannot_be_kept_is_refused_and_auto_takes_the_reference() -> None:
    narrow = make_scene(seed=0, width=16).field
    odd = reference.RadianceField(3, VolumeConfig(mlp_layers=3, mlp_width=24, samples_per_ray=4))
    config = VolumeConfig(mlp_layers=3, mlp_width=24, samples_per_ray=4, renderer="fused")
    with pytest.raises(
        UserError, match=r"'fused': the MLP's width is 24, .* set it to 'auto' or 'reference'"
    ) as caught:
        render.uses_fused(odd, config, torch.device(DEVICE))
    assert "\n" not in str(caught.value)
    assert render.uses_fused(narrow, config, torch.device(DEVICE))
    auto = config.model_copy(update={"renderer": "auto"})
    with torch.autocast("cpu", torch.bfloat16):
        assert not render.uses_fused(narrow, auto, torch.device("cpu"))
    scene = make_scene(seed=0, device=DEVICE)
    with pytest.raises(ValueError, match="rays no gradient"):
        fused.render_rays(scene.planes, scene.field, scene.origins.requires_grad_(), scene.directions, 4)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lrm.volume import fused, kernels

passes = [(0, 8, fused.FORWARD)] + [(low, low + 4, fused.BACKWARD) for low in (4, 0)]
for low, high, tiling in passes:
    kernel = kernels.forward_kernel if tiling is fused.FORWARD else kernels.backward_kernel
    constants = {"NUM_HIDDEN": 8, "WIDTH": 64, "RAYS": tiling.rows * tiling.columns, "STEPS": tiling.steps,
                 "SIDE": fused.WINDOW_SIDE, "JITTER": True, "PRECISION": "bf16"}
    if kernel is kernels.backward_kernel:
        constants |= {"LOW": low, "HIGH": high}
    kinds = {"density_bias": "fp32", "order": "*i32"} | dict.fromkeys(("planes", "weights", "out_weight"), "*bf16")
    kinds |= dict.fromkeys(("biases", "out_bias", "origins", "directions", "sums"), "*fp32")
    kinds |= dict.fromkeys((name for name in kernel.arg_names if name.startswith("grad")), "*fp32")
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: kinds.get(name, "i32") for name in kernel.arg_names}, constants)
    options = {"num_warps": tiling.warps, "num_stages": fused.NUM_STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= fused.shared_bytes(8, 4, 64, 9) <= 227 * 1024, compiled.metadata.shared
    assert "wgmma" in compiled.asm["ptx"]
    print(kernel.__name__, compiled.metadata.shared)
"""


def test_the_papers_kernels_compile_for_hopper_and_fit_its_shared_memory() -> None:
    """To machine code, by the ptxas that Triton brings; no GPU is needed for that."""
    command = [
        sys.executable,
        "-c",
        COMPILE.replace("import sys\n", "import os\nos.environ.pop('TRITON_INTERPRET', 0)\n"),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 3
