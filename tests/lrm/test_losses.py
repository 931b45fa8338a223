"""The perceptual loss against its equation, and where its weights come from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.weights import LPIPS, VGG16, WeightsFile, make_weights
from lrm import losses
from lrm.config import load_config
from lrm.losses import Lpips, load_lpips, lpips_shapes, write_lpips
from lrm.train import train
from pipeline.spec import FetchSpec
from pipeline.types import UserError
from tests.lrm.conftest import nano_config


def published(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Files laid out as the published ones, of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of VGG16's convolutions in torchvision's list
    shapes = lpips_shapes()
    vgg16: dict[str, Tensor] = {"classifier.0.bias": torch.zeros(3)}
    for index, place in enumerate(places):
        fan_in = shapes[f"conv{index}.weight"][1] * 9
        vgg16[f"features.{place}.weight"] = (
            torch.randn(shapes[f"conv{index}.weight"], generator=generator) * (2 / fan_in) ** 0.5
        )
        vgg16[f"features.{place}.bias"] = torch.randn(shapes[f"conv{index}.bias"], generator=generator) * 0.1
    linear = {
        f"lin{i}.model.1.weight": torch.rand((1, *shapes[f"linear{i}"], 1, 1), generator=generator) for i in range(5)
    }
    torch.save(vgg16, folder / "vgg16.pth")
    torch.save(linear, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as `make weights` leaves it, but of random numbers."""
    folder = tmp_path_factory.mktemp("weights")
    write_lpips(*published(folder), folder / "lpips.safetensors")
    return folder / "lpips.safetensors"


@pytest.fixture
def trusted(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same file, its digests taken for the published ones."""
    files = {"vgg16_sha256": weights.parent / "vgg16.pth", "lpips_sha256": weights.parent / "vgg.pth"}
    monkeypatch.setattr(
        losses, "SOURCES", {name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    )
    return weights


def load(path: Path) -> Lpips:
    loaded = load_lpips(nano_config("train.lpips_weight=2.0", f"train.lpips_path='{path}'").train)
    assert loaded is not None
    return loaded


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def by_the_equation(folder: Path, one: Tensor, other: Tensor) -> Tensor:
    """The distance of images [N, 3, H, W], by modules in torchvision's order, of the files themselves."""
    modules: list[nn.Module] = []
    for block, (width, count) in enumerate(losses.BLOCKS):
        for i in range(count):
            before = width if i else (3, 64, 128, 256, 512)[block]
            modules += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        modules.append(nn.MaxPool2d(2))
    vgg16 = nn.Sequential(*modules)
    state = torch.load(folder / "vgg16.pth", weights_only=True)
    vgg16.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")})
    linear = torch.load(folder / "vgg.pth", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    features = []
    for image in (one, other):
        x, kept = ((2 * image - 1) - shift[:, None, None]) / scale[:, None, None], []
        for place, module in enumerate(vgg16):
            x = module(x)
            if place in (3, 8, 15, 22, 29):  # relu1_2, 2_2, 3_3, 4_3, 5_3
                kept.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        features.append(kept)
    pairs = enumerate(zip(*features))
    return sum(F.conv2d((a - b) ** 2, linear[f"lin{i}.model.1.weight"]).mean((1, 2, 3)) for i, (a, b) in pairs)


def test_it_is_the_equation(trusted: Path) -> None:
    one, other = images(2, 3, 3, 32, 40), images(2, 3, 3, 32, 40, seed=1)
    found = load(trusted)(one, other)
    wanted = by_the_equation(trusted.parent, one.flatten(0, 1), other.flatten(0, 1)).reshape(2, 3)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-6)
    assert (load(trusted)(one, one) == 0).all()


def test_its_gradient_is_the_equations_and_finite_where_nothing_is_active(trusted: Path) -> None:
    loss, target, gradients = load(trusted), images(1, 3, 32, 32, seed=3), []
    for distance in (loss, lambda x, y: by_the_equation(trusted.parent, x, y)):
        leaf = images(1, 3, 32, 32).requires_grad_()
        distance(leaf, target).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))
    for name, buffer in loss.named_buffers():
        if name.startswith("conv"):
            buffer.zero_()
    white = torch.ones(1, 3, 16, 16, requires_grad=True)
    loss(white, torch.zeros(1, 3, 16, 16)).sum().backward()
    assert white.grad is not None
    assert white.grad.isfinite().all()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_weights_are_fetched_verified_and_kept(trusted: Path, weights: Path, tmp_path: Path) -> None:
    def served(known: WeightsFile, name: str, url: str) -> WeightsFile:
        data = (weights.parent / name).read_bytes()
        return WeightsFile(label=known.label, url=f"{url}/{name}", sha256=sha256(data).hexdigest(), num_bytes=len(data))

    spec = FetchSpec(cache_dir=str(tmp_path / "cache"), max_tries=1)
    out = tmp_path / "made.safetensors"
    with serving(weights.parent) as url:
        vgg16, lpips = served(VGG16, "vgg16.pth", url), served(LPIPS, "vgg.pth", url)
        make_weights(out, vgg16=vgg16, lpips=lpips, spec=spec)
        assert out.read_bytes() == trusted.read_bytes()
        other = tmp_path / "other.safetensors"
        wrong = WeightsFile(label=VGG16.label, url=vgg16.url, sha256=VGG16.sha256, num_bytes=vgg16.num_bytes)
        fresh = spec.model_copy(update={"cache_dir": str(tmp_path / "fresh")})
        with pytest.raises(UserError, match=r"VGG16 of torchvision.*or set train.lpips_weight=0") as caught:
            make_weights(other, vgg16=wrong, lpips=lpips, spec=fresh)
        assert "\n" not in str(caught.value)
        assert not other.exists()


def test_a_run_without_its_weights_fails_at_start_with_advice(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"is 2 and .* is not there; run make weights, or set .*=0") as caught:
        train(load_config("paper"), str(tmp_path / "no-corpus"), None, tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="was not made of the published weights"):  # random ones, digests and all
        load(weights)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load(broken)
    assert load_lpips(nano_config().train) is None


def test_a_run_with_it_logs_the_whole_loss_and_the_psnr_of_the_mse(
    trusted: Path, ball_corpus: str, tmp_path: Path
) -> None:
    overrides = ("train.steps=2", "data.patch_px=16", "data.min_render_px=16", "data.max_render_px=24")
    plain = train(nano_config(*overrides), ball_corpus, None, tmp_path / "plain")
    both = train(
        nano_config(*overrides, "train.lpips_weight=2.0", f"train.lpips_path='{trusted}'"),
        ball_corpus, None, tmp_path / "both",
    )  # fmt: skip
    first = [losses_of(tmp_path / name)[0] for name in ("plain", "both")]
    assert first[0]["psnr"] == pytest.approx(first[1]["psnr"], rel=1e-6)
    assert first[1]["loss"] > first[0]["loss"] > 0
    assert plain.loss is not None
    assert both.loss is not None


def losses_of(folder: Path) -> list[dict[str, float]]:
    from lrm.metrics import METRICS_NAME, read_metrics

    return read_metrics(folder / METRICS_NAME)
