"""Measures of views on cases that were solved by hand, or by the equation itself."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from lrm import image_metrics
from lrm.image_metrics import ClipImages, eight_bits, frechet_distance, metric_weights_dir, psnr, ssim
from pipeline.types import UserError


def pictures(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth pictures, as views are."""
    small = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, (size, size), mode="bilinear")


def test_psnr_by_hand() -> None:
    true = pictures(3)
    shifted = true.clone()
    shifted[1] += 0.1  # an error of 0.1 everywhere: 20 dB
    shifted[2, 0] += 0.5  # of 0.5 in one channel of three: -10 log10(0.25 / 3)
    np.testing.assert_allclose(psnr(shifted, true), [100.0, 20.0, -10 * math.log10(0.25 / 3)], atol=1e-4)


def by_the_equation(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of one channel, window by window: Wang et al. 2004, equations 13 to 16."""
    places = np.arange(-5, 6)
    window = np.exp(-(places**2) / (2 * 1.5**2))
    weights = np.outer(window, window) / window.sum() ** 2
    c1, c2, values = 0.01**2, 0.03**2, []
    for i in range(5, x.shape[0] - 5):
        for j in range(5, x.shape[1] - 5):
            a, b = x[i - 5 : i + 6, j - 5 : j + 6], y[i - 5 : i + 6, j - 5 : j + 6]
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            cov = (weights * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


def test_ssim_is_its_equation() -> None:
    true = pictures(2, 24)
    other = (true + 0.2 * pictures(2, 24, seed=1) - 0.1).clamp(0, 1)
    wanted = [
        np.mean([by_the_equation(x, y) for x, y in zip(a, b)])
        for a, b in zip(other.double().numpy(), true.double().numpy())
    ]
    np.testing.assert_allclose(ssim(other, true), wanted, atol=1e-9)
    np.testing.assert_allclose(ssim(true, true), [1, 1])


@given(st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_ssim_of_two_greys(a: float, b: float) -> None:
    grey = torch.ones(1, 3, 12, 12, dtype=torch.float64)
    wanted = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(a * grey, b * grey)[0] == pytest.approx(wanted, abs=1e-9)


def features_of(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Features whose mean and covariance are exactly these."""
    drawn = np.random.default_rng(seed).normal(size=(count, len(mean)))
    drawn -= drawn.mean(0)
    white = drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn.T))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def covariance(seed: int, size: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(size, size))
    return root @ root.T + 0.1 * np.eye(size)


@given(st.integers(0, 1000), st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_fid_is_the_closed_form_of_two_gaussians(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    means, covariances = rng.normal(size=(2, size)), (covariance(seed, size), covariance(seed + 1, size))
    a, b = (features_of(m, c, 40 + 10 * i, seed + i) for i, (m, c) in enumerate(zip(means, covariances)))
    root = np.real(scipy.linalg.sqrtm(covariances[0] @ covariances[1]))
    wanted = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6, abs=1e-8)


def test_fid_of_axes_apart_by_hand_and_with_fewer_views_than_features() -> None:
    a = features_of(np.zeros(2), np.diag([4.0, 9.0]), 30, 0)
    b = features_of(np.array([3.0, 0.0]), np.diag([1.0, 25.0]), 20, 1)
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 5) ** 2)
    few = np.random.default_rng(0).normal(size=(7, 30)), np.random.default_rng(1).normal(size=(50, 30))
    covariances = [np.cov(one.T) for one in few]
    root = np.real(scipy.linalg.sqrtm(covariances[0] @ covariances[1]))
    wanted = ((few[0].mean(0) - few[1].mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(*few) == pytest.approx(wanted, rel=1e-4)
    assert frechet_distance(few[0], few[0]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few[0], few[0] + 2) == pytest.approx(30 * 4)
    with pytest.raises(ValueError, match="two of each"):
        frechet_distance(a[:1], b)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, as transformers writes one."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("weights") / image_metrics.CLIP_FOLDER
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_clip_similarity_is_the_cosine_of_its_embeddings(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    clip = ClipImages(clip_folder, torch.device("cpu"))
    assert clip.name == "CLIP of 2 layers, width 16, 8 px patches, 32 px, 12 numbers"
    one, other = pictures(3), pictures(3, seed=1)
    np.testing.assert_allclose(clip.similarity(one, one), 1, atol=1e-6)
    # At the network's own size nothing is resized: its embeddings of normalised pictures, by hand.
    network = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    shift, scale = (np.array(v).reshape(3, 1, 1) for v in (image_metrics.CLIP_MEAN, image_metrics.CLIP_STD))
    with torch.no_grad():
        a, b = (
            network(torch.from_numpy((x.numpy() - shift) / scale).float()).image_embeds.numpy() for x in (one, other)
        )
    wanted = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert wanted.max() < 1 - 1e-4
    np.testing.assert_allclose(clip.similarity(one, other), wanted, atol=1e-5)
    assert clip.embed(pictures(1, 50)).shape == (1, 12)
    with pytest.raises(UserError, match="no CLIP of transformers"):
        ClipImages(tmp_path, torch.device("cpu"))


def test_where_weights_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(image_metrics.ENVIRONMENT, raising=False)
    assert metric_weights_dir() == tmp_path / "lrm-corpus" / "metrics"
    monkeypatch.setenv(image_metrics.ENVIRONMENT, "/named/by/environment")
    assert metric_weights_dir() == Path("/named/by/environment")
    assert metric_weights_dir("/named") == Path("/named")


def test_eight_bits_are_what_a_png_holds() -> None:
    found = eight_bits(torch.tensor([-1.0, 0.001, 0.5, 1.2]))
    torch.testing.assert_close(found, torch.tensor([0, 0, 128, 255]) / 255)
