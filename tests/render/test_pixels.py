"""Rendered pixels: where known points land, what alpha and glass become."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.sample import decode_data, decode_rgba, linear_to_srgb
from pipeline.types import Sample, UserError
from render.worker import RenderWorker
from tests.render.analytic import Quad, cast, matt, write_quads
from tests.render.blends import write_blend
from tests.render.conftest import asset_of, make_spec
from tests.render.files import CUBE_TRIANGLES, CUBE_VERTICES, OCTAHEDRON_TRIANGLES, OCTAHEDRON_VERTICES, write_obj

pytestmark = [pytest.mark.blender, pytest.mark.timeout(120)]

# Source points of an OBJ file (y up), and their colours: no symmetry, so that no flip and no swap of axes passes.
MARKERS = np.array([[1.0, 0.35, -0.2], [-0.9, -0.6, 0.1], [0.15, 0.75, 0.95], [-0.3, 0.2, -0.8]])
COLOURS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], float)
RADIUS = 0.09


def render_once(tmp_path: Path, path: Path, **render: object) -> Sample:
    with RenderWorker(make_spec(render=render), fingerprint="f", num_threads=2, scratch_dir=tmp_path) as worker:
        return worker.render(asset_of(path), path)


def images_of(sample: Sample) -> list[np.ndarray]:
    return [decode_rgba(view.planes["rgba"].data) for view in sample.views]


@pytest.fixture(scope="module")
def markers(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Four small octahedra of known places and colours, in 12 pictures of 128 px."""
    folder = tmp_path_factory.mktemp("markers")
    parts = [
        (OCTAHEDRON_VERTICES * RADIUS + point, OCTAHEDRON_TRIANGLES, colour)
        for point, colour in zip(MARKERS, COLOURS, strict=True)
    ]
    path = write_obj(folder / "markers.obj", parts)
    return render_once(folder, path, num_views=12, resolution_px=128, samples=32, lighting="ambient")


def _centroid(image: np.ndarray, colour: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the centre of mass (x, y) in pixels, and the weight, of what has a colour; pixel centres are at + 0.5."""
    present = (image[..., :3] > 60) == (colour > 0)
    weight = image[..., 3] / 255 * present.all(axis=-1)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    total = float(weight.sum())
    return np.array([(weight * x).sum(), (weight * y).sum()]) / max(total, 1e-9), total


def test_known_points_land_where_the_cameras_say(markers: Sample) -> None:
    blender = MARKERS[:, [0, 2, 1]] * [1, -1, 1]  # OBJ's y-up becomes Blender's z-up
    norm = markers.normalization
    world = norm.scale * blender @ norm.rotation.T + norm.translation
    checked, errors = 0, []
    for view, image in zip(markers.views, images_of(markers), strict=True):
        expected = view.camera.project(world)
        apart = np.linalg.norm(expected[:, None] - expected[None], axis=-1) + 1e3 * np.eye(len(world))
        for point, colour, near in zip(expected, COLOURS, apart.min(axis=1), strict=True):
            found, weight = _centroid(image, colour)
            if near < 25 or not (point.min() > 12 and point.max() < 116):
                continue  # another marker may hide it, or the border may cut it
            assert weight > 8, f"view {view.index}: nothing of colour {colour} is near {point}"
            errors.append(found - point)
            checked += 1
    assert checked >= 15
    assert np.abs(errors).max() < 0.5
    # A principal point or pixel rule that is half a pixel off shows in the mean, where the noise of pixels does not.
    assert np.abs(np.mean(errors, axis=0)).max() < 0.12


def test_a_larger_thing_is_nearer_in_the_cameras_own_depth(markers: Sample) -> None:
    for view in markers.views:
        depth = -view.camera.world_from_camera[:3, 3] @ view.camera.world_from_camera[:3, 2]
        assert 1.5 <= depth <= 3.0 + 1e-9


def test_background_is_empty_and_alpha_is_straight(markers: Sample) -> None:
    for image in images_of(markers):
        assert (image[image[..., 3] == 0] == 0).all()
        # Straight alpha: half-covered edge pixels keep the colour of the surface instead of fading to black.
        edge = image[(image[..., 3] > 60) & (image[..., 3] < 200)]
        if len(edge) > 10:
            assert np.median(edge[:, :3].max(axis=1)) > 150


@pytest.mark.parametrize("fov_deg", [5.0, 50.0, 120.0])
def test_uncropped_leaves_the_border_empty(tmp_path: Path, fov_deg: float) -> None:
    """A cube that fills the box: its corners come nearest to the border."""
    path = write_obj(tmp_path / "cube.obj", [(CUBE_VERTICES, CUBE_TRIANGLES, (1, 0, 0))])
    sample = render_once(
        tmp_path, path, preset="uncropped", fov_deg=fov_deg, num_views=16, resolution_px=48, samples=16
    )
    for image in images_of(sample):
        alpha = image[..., 3]
        assert max(alpha[0].max(), alpha[-1].max(), alpha[:, 0].max(), alpha[:, -1].max()) == 0
        assert (alpha > 0).mean() > 0.1


@pytest.mark.parametrize("lighting", ["studio", "ambient"])
def test_10_a_known_radiance_has_its_standard_value(tmp_path: Path, lighting: str) -> None:
    """Emission of 0.5, 0.18 and 0.02 is 188, 118 and 39 in sRGB; AgX, Blender's default, makes 170 of the first.

    The file's own view transform, exposure, gamma, dither and filter are the file's, and change nothing.
    """
    sample = render_once(
        tmp_path, write_blend("shining", tmp_path / "shining.blend"), lighting=lighting, planes=("rgba", "albedo")
    )
    for view, image in zip(sample.views, images_of(sample), strict=True):
        albedo = decode_data("albedo", view.planes["albedo"])
        for pixels in (image[image[..., 3] == 255][:, :3], albedo[albedo.any(axis=2)]):
            assert len(pixels) > 50
            assert (pixels == [188, 118, 39]).all()


BASE = (0.4, 0.18, 0.02)


@pytest.mark.parametrize("see_through", ["white", "alpha"])
@pytest.mark.parametrize("lighting", ["ambient", "studio"])
def test_12_a_translucent_pane_is_straight_or_on_white(tmp_path: Path, see_through: str, lighting: str) -> None:
    """One pane of alpha 0.35 that scatters 40, 18 and 2 %, under a white world: its colour and its alpha are known.

    Premultiplied colours would be 116 where straight ones are 168. Under other light the colour is another, and the
    alpha the same.
    """
    pane = Quad([-1, 0, -1], [1.2, 0, 0], [0, 0.2, 2], matt(BASE, 0.35))
    post = Quad([0.5, 0, -1], [0.5, 0, 0], [0, 0.2, 2], matt([0.1, 0.1, 0.1]))  # pictures without one count as blank
    path = write_quads(tmp_path / "pane.glb", [pane, post])
    sample = render_once(
        tmp_path, path, preset="openlrm", num_views=2, samples=256, see_through=see_through, lighting=lighting
    )
    for view, image in enumerate(images_of(sample)):
        inside = cast(sample, view, [pane]).inside(0.2)[0]
        assert inside.sum() > 50
        found = image[inside].astype(float)
        radiance = np.array(BASE)
        if see_through == "white":
            assert (found[:, 3] == 255).all()
            radiance = 0.35 * radiance + 0.65
        else:
            assert found[:, 3].mean() == pytest.approx(0.35 * 255, abs=0.5)
        if lighting == "ambient":
            np.testing.assert_allclose(found[:, :3].mean(axis=0), 255 * linear_to_srgb(radiance), atol=1.0)


@pytest.mark.parametrize("see_through", ["white", "alpha"])
def test_13_glass_is_neither_black_nor_a_hole(tmp_path: Path, see_through: str) -> None:
    """Two faces of alpha 0.35: a mask that all views agree on with white behind it, or a translucent pane."""
    path = write_pane(tmp_path / "pane.gltf", alpha=0.35)
    sample = render_once(tmp_path, path, resolution_px=64, samples=16, num_views=6, see_through=see_through)
    for image in images_of(sample):
        inside = cv2.erode((image[..., 3] > 0).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        assert inside.any()
        alpha, colour = np.median(image[inside][:, 3]), np.median(image[inside][:, :3])
        if see_through == "white":
            assert alpha == 255
            assert 150 < colour < 250, "0.42 of the white behind must shine through"
        else:
            assert 120 < alpha < 200


def test_19_edges_are_smooth_in_the_picture(tmp_path: Path) -> None:
    """A slanted edge covers its pixels in part, each by about the share that lies inside; without a filter it is steps.

    Depth, which has no such thing as half a surface, is tested with the planes.
    """
    card = [Quad([-0.9, 0, -0.6], [1.5, 0, 0.3], [-0.22, 0, 1.1], matt((0.5, 0.5, 0.5)))]
    sample = render_once(
        tmp_path, write_quads(tmp_path / "card.glb", card), preset="openlrm", num_views=1, resolution_px=64, samples=64
    )
    alpha = images_of(sample)[0][..., 3] / 255
    hits = cast(sample, 0, card)
    # Signed distances to the four edges in pixels, from how fast s and t change.
    distances = []
    for value in (hits.s[0], hits.t[0]):
        slope = np.hypot(*np.gradient(value))
        distances += [value / slope, (1 - value) / slope]
    inwards = np.sort(np.stack(distances), axis=0)
    away_from_corners = inwards[1] > 3
    edge = away_from_corners & (np.abs(inwards[0]) < 0.3)
    assert edge.sum() > 40
    assert ((alpha > 0.05) & (alpha < 0.95))[edge].all()
    # A filter of 1.5 px is about as wide as a box of one, whose coverage of a half-plane is near its distance + 0.5.
    assert np.abs(alpha - np.clip(inwards[0] + 0.5, 0, 1))[away_from_corners].max() < 0.15
    # Blender's width is a radius: the tails of the filter reach 1.5 px to each side.
    assert (alpha[inwards[0] > 1.5] == 1).all()
    assert (alpha[inwards[0] < -1.5] == 0).all()


@pytest.mark.parametrize(("device", "backend"), [("cuda", "CUDA"), ("optix", "OPTIX"), ("hip", "HIP")])
def test_20_a_gpu_that_is_not_there_is_an_error_at_the_start(tmp_path: Path, device: str, backend: str) -> None:
    """On a machine that has one, the row names it; nowhere does a run go on in silence on the CPU."""
    path = write_obj(tmp_path / "cube.obj", [(CUBE_VERTICES, CUBE_TRIANGLES, (1, 0, 0))])
    spec = make_spec(workers={"device": device, "num_gpus": 0.25})
    started = time.monotonic()
    with RenderWorker(spec, fingerprint="f", num_threads=2, scratch_dir=tmp_path) as worker:
        try:
            sample = worker.render(asset_of(path), path)
        except UserError as error:
            message = str(error)
            assert "\n" not in message
            assert backend in message
            assert f"workers.device = {device!r}" in message
            assert worker._child is None
        else:
            assert sample.provenance["device"].endswith(f"({backend})")
    assert time.monotonic() - started < 60


def test_20_the_row_says_that_it_was_the_cpu(markers: Sample) -> None:
    assert markers.provenance["device"] == "CPU"


def write_pane(path: Path, alpha: float) -> Path:
    """Write a glTF of one box, 2 x 2 x 0.2, whose material is dark blue and blended with this alpha."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-0.1, 0.1) for z in (-1, 1)], np.float32)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    index = np.array([[a, b, c, a, c, d] for a, b, c, d in quads], np.uint16).reshape(-1)
    data = corners.tobytes() + index.tobytes()
    value = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1, "material": 0}]}],
        "materials": [{"alphaMode": "BLEND", "pbrMetallicRoughness": {"baseColorFactor": [0, 0, 0.3, alpha]}}],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": 5126,
                "count": 8,
                "type": "VEC3",
                "min": [-1, -0.1, -1],
                "max": [1, 0.1, 1],
            },
            {"bufferView": 1, "componentType": 5123, "count": len(index), "type": "SCALAR"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteLength": corners.nbytes},
            {"buffer": 0, "byteOffset": corners.nbytes, "byteLength": index.nbytes},
        ],
        "buffers": [
            {"byteLength": len(data), "uri": "data:application/octet-stream;base64," + b64encode(data).decode()}
        ],
    }
    path.write_text(json.dumps(value))
    return path
