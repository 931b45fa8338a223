"""Depth, normals and base colour against scenes whose every pixel is known: the traps 11 and 14 to 18."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.sample import decode_data, decode_rgba, linear_to_srgb
from pipeline.types import PlaneName, Sample
from render.cameras import depth_scale
from render.worker import RenderWorker
from tests.render.analytic import Array, Quad, cast, matt, rays, unproject, write_quads
from tests.render.conftest import asset_of, make_spec
from tests.render.files import Glb, ball, write_obj

pytestmark = [pytest.mark.blender, pytest.mark.timeout(120)]

PLANES = ("rgba", "depth", "normal", "albedo")
STEP = 1 / 8192
FLOAT = 8 * 5 * 2**-24  # eight roundings of Cycles' float32 at distances up to 5
RIM = 0.01  # share of a rectangle's side, less than a pixel, where rounding decides what a ray meets


@pytest.fixture
def shoot(tmp_path: Path) -> Callable[..., Sample]:
    """Return a function that renders a file with all planes."""

    def run(path: Path, **render: Any) -> Sample:
        spec = make_spec(render={"num_views": 6, "resolution_px": 64, "planes": PLANES} | render)
        with RenderWorker(spec, fingerprint="f", num_threads=2, scratch_dir=tmp_path) as worker:
            return worker.render(asset_of(path), path)

    return run


def planes_of(sample: Sample, view: int) -> tuple[Array, Array, Array]:
    """Return depth in world units, normal and albedo as they are stored."""
    names: tuple[PlaneName, ...] = ("depth", "normal", "albedo")
    depth, normal, albedo = (decode_data(name, sample.views[view].planes[name]) for name in names)
    return depth, normal, albedo


def stored(normal: Array) -> Array:
    return (np.asarray(normal) + 1) * 127.5


CORNER = [
    Quad([-1, 0.3, -1], [2, 0, 0], [0, 0, 0.9], matt([0.5, 0.18, 0.02])),
    Quad([-0.8, 0, -0.8], [0.7, 0, 0], [0, 0, 1.5], matt([0.02, 0.2, 0.8], 0.35)),
    Quad([0.1, -0.1, -0.8], [0.7, 0.1, 0], [-0.03, 0.21, 1.5], matt([0.1, 0.8, 0.2]), reverse=True),
]
"""A low wall, a translucent pane before it, and a leaning board whose face looks away from its normal."""


@pytest.mark.parametrize("see_through", ["white", "alpha"])
def test_14_to_18_depth_normal_and_albedo_are_those_of_the_first_surface(
    shoot: Callable[..., Sample], tmp_path: Path, see_through: str
) -> None:
    """Each pixel, edges included, shows one surface: what its centre's ray meets first, see-through or not.

    Planar depth, stale or mixed camera matrices, sensor fit and pixel centres all show here: the rays are those of the
    stored cameras. Ray lengths would be up to 20 % longer, half a pixel shifts the depth of a slanted board by 100
    steps, and a filter mixes depths at edges.
    """
    sample = shoot(write_quads(tmp_path / "corner.glb", CORNER), see_through=see_through, num_views=8)
    num_seen = np.zeros((len(CORNER), 2), int)
    for view in range(len(sample.views)):
        depth, normal, albedo = planes_of(sample, view)
        hits = cast(sample, view, CORNER)
        near = np.where(hits.inside(), hits.depth, np.inf).min(axis=0)
        sure = (hits.inside(-RIM) == hits.inside(RIM)).all(axis=0)
        expected = np.where(np.isfinite(near), near, 0)
        assert np.abs(depth - expected)[sure].max() <= 0.5 * STEP + FLOAT
        # At rims one of the surfaces that the ray comes near, exactly; never a depth between two.
        error = np.abs(depth - np.where(hits.inside(-RIM), hits.depth, np.inf)).min(axis=0)
        assert np.minimum(error, depth).max() <= 0.5 * STEP + FLOAT

        shown = np.abs(depth - hits.depth) <= 0.5 * STEP + FLOAT
        facing = np.sign(-(hits.normal[:, None, None] * rays(sample.views[view].camera)).sum(axis=-1))
        for which, quad in enumerate(CORNER):
            mine = hits.inside(RIM)[which] & shown[which] & (depth > 0)
            colour = quad.material["pbrMetallicRoughness"]["baseColorFactor"][:3]
            outwards = stored(hits.normal[which] * facing[which][..., None])
            assert np.abs(normal - outwards)[mine].max(initial=0) <= 0.51
            assert np.abs(albedo - 255 * linear_to_srgb(colour))[mine].max(initial=0) <= 0.51
            for side, sign in enumerate((1, -1)):
                num_seen[which, side] += int((mine & (facing[which] == sign)).sum())
        nothing = depth == 0
        assert not normal[nothing].any() and not albedo[nothing].any()  # noqa: PT018 - one background
        assert normal[~nothing].any(axis=1).all()
    assert (num_seen > 50).all(), f"a side of a rectangle is not seen: {num_seen.tolist()}"


def test_15_a_wall_that_faces_the_camera_has_one_depth(shoot: Callable[..., Sample], tmp_path: Path) -> None:
    """Planar z, and not the length of the ray, which is 1.2 times as long in the corners."""
    wall = [
        Quad([-1, -0.5, -1], [2, 0, 0], [0, 0, 2], matt([0.5, 0.5, 0.5])),
        Quad([0, 0.5, 0], [0.1, 0, 0], [0, 0, 0.1]),
    ]
    sample = shoot(write_quads(tmp_path / "wall.glb", wall), preset="openlrm", num_views=1)
    depth = planes_of(sample, 0)[0]
    distance = -sample.views[0].camera.world_from_camera[1, 3] - 0.5
    assert (depth > 0).mean() > 0.3
    assert set(np.unique(depth)) == {0, np.float32(round(distance * 8192) / 8192)}


def test_15_to_18_a_sphere_has_its_depth_and_normals(shoot: Callable[..., Sample], tmp_path: Path) -> None:
    """A unit sphere of 2 x 256 x 512 triangles, whose flat faces lie up to their sagitta inside it.

    A face of two edges h = pi / 256 lies in a circle of radius r = h / sqrt(2); its plane passes 1 - cos(r) = 3.8e-5
    under the sphere. Along a ray that meets the sphere at a cosine c that is 1 / c as much.
    """
    num_rings = 256
    sagitta = 1 - np.cos(np.pi / num_rings / np.sqrt(2))
    vertices, triangles = ball(num_rings)
    glb = Glb()
    normals = glb.accessor(vertices.astype(np.float32), "VEC3")
    glb.scene(glb.node(mesh=glb.mesh(vertices, triangles, NORMAL=normals)))
    sample = shoot(glb.write(tmp_path / "ball.glb"), num_views=4)
    assert sample.normalization.scale == pytest.approx(1, abs=1e-6)
    for view in range(4):
        depth, normal, _ = planes_of(sample, view)
        camera = sample.views[view].camera
        directions, centre = rays(camera), camera.world_from_camera[:3, 3] - sample.normalization.translation
        a, b, c = (directions**2).sum(axis=2), directions @ centre, centre @ centre - 1
        root = np.sqrt(np.maximum(b * b - a * c, 0))
        expected = (-b - root) / a
        points = centre + directions * expected[..., None]
        cosine = -(points * directions).sum(axis=2) / np.sqrt(a)
        clear = (b * b > a * c) & (cosine > 0.2)
        assert clear.mean() > 0.1
        # The step of z is that of the ray over its length, which is 1 / sqrt(a).
        bound = 0.5 * STEP + FLOAT + sagitta / cosine[clear] / np.sqrt(a)[clear]
        error = depth[clear] - expected[clear]
        assert (error <= bound).all()
        assert (error >= -0.5 * STEP - FLOAT).all(), "no face lies outside the sphere"
        assert np.abs(normal - stored(points))[clear].max() <= 0.5 + 127.5 * np.pi / num_rings / 8
        # The same by the stored camera's way back: what a reader of the corpus computes.
        away = np.linalg.norm(unproject(camera, depth) - sample.normalization.translation, axis=2)[clear] - 1
        assert np.abs(away).max() <= STEP / 2 * 1.2 + FLOAT + sagitta
        assert (depth[b * b < a * c] == 0).all()


CHECKS = np.random.default_rng(8).integers(0, 256, (6, 5, 3)).astype(np.uint8)


def texels(hits_s: Array, hits_t: Array, texture: Array, margin: float = 0.06) -> tuple[Array, Array]:
    """Return the texel's value [H, W, C] at s, t, and where it is at least a margin (of a texel) inside one."""
    height, width = texture.shape[:2]
    x, y = hits_s * width, hits_t * height
    column, row = (np.clip(np.floor(v), 0, n - 1).astype(int) for v, n in ((x, width), (y, height)))
    inner = (np.abs(x - np.rint(x)) > margin) & (np.abs(y - np.rint(y)) > margin)
    return texture[row, column], inner


METALS: dict[str, dict[str, Any]] = {
    "matt": matt([1, 1, 1]),
    "metal": {"pbrMetallicRoughness": {"metallicFactor": 1.0, "roughnessFactor": 0.2}},
    "mirror": {"pbrMetallicRoughness": {"metallicFactor": 1.0, "roughnessFactor": 0.0}},
    "half metal": {"pbrMetallicRoughness": {"metallicFactor": 0.5, "roughnessFactor": 0.5}},
    "shining": matt([1, 1, 1], emissiveFactor=[1, 0.5, 0.2]),
    "glass": {
        "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 0.0},
        "extensions": {"KHR_materials_transmission": {"transmissionFactor": 1.0}},
    },
    "unlit": {"pbrMetallicRoughness": {}, "extensions": {"KHR_materials_unlit": {}}},
}


@pytest.mark.parametrize("kind", METALS)
def test_10_and_11_albedo_is_the_texture_whatever_the_surface_does_with_light(
    shoot: Callable[..., Sample], tmp_path: Path, kind: str
) -> None:
    board = [Quad([-1, 0, -0.8], [2, 0, 0], [0, 0.3, 1.6], METALS[kind], texture=CHECKS)]
    sample = shoot(write_quads(tmp_path / "board.glb", board), preset="openlrm", num_views=3)
    num_checked = 0
    for view in range(3):
        albedo = planes_of(sample, view)[2].astype(int)
        hits = cast(sample, view, board)
        expected, inner = texels(hits.s[0], hits.t[0], CHECKS)
        where = hits.inside(RIM)[0] & inner
        assert np.abs(albedo - expected.astype(int))[where].max(initial=0) <= 2
        num_checked += int(where.sum())
    assert num_checked > 500


HOLES = np.zeros((4, 4, 4), np.uint8)
HOLES[..., :3] = (200, 120, 40)
HOLES[..., 3] = [[255, 0, 255, 255], [0, 255, 255, 0], [255, 255, 0, 255], [64, 64, 160, 160]]


@pytest.mark.parametrize("mode", ["MASK", "BLEND"])
def test_14_cut_out_holes_show_what_is_behind(shoot: Callable[..., Sample], tmp_path: Path, mode: str) -> None:
    """A hole is a hole in every plane; a texel of alpha 64 is one by the file's cutoff of a half, and glass without."""
    scene = [
        Quad([-1, -0.2, -1], [2, 0, 0], [0, 0, 2], matt([1, 1, 1], alphaMode=mode), texture=HOLES),
        Quad([-0.9, 0.2, -0.9], [1.8, 0, 0], [0, 0, 0.9], matt([0.02, 0.2, 0.8])),
    ]
    sample = shoot(write_quads(tmp_path / "fence.glb", scene), preset="openlrm", num_views=4)
    num_holes = num_behind = 0
    for view in range(4):
        depth, normal, albedo = planes_of(sample, view)
        hits = cast(sample, view, scene)
        texel, inner = texels(hits.s[0], hits.t[0], HOLES)
        solid = texel[..., 3] > (128 if mode == "MASK" else 0)
        sure = (hits.inside(-RIM) == hits.inside(RIM)).all(axis=0) & inner
        there = hits.inside() & np.stack([solid, np.ones_like(solid)])
        near = np.where(there, hits.depth, np.inf).min(axis=0)
        expected = np.where(np.isfinite(near), near, 0)
        assert np.abs(depth - expected)[sure].max() <= 0.5 * STEP + FLOAT
        hole = sure & hits.inside()[0] & ~solid
        behind = hole & there[1] & (near == hits.depth[1])
        assert not normal[hole & (expected == 0)].any()
        blue = np.rint(255 * linear_to_srgb([0.02, 0.2, 0.8]))
        assert np.abs(albedo - blue)[behind].max(initial=0) <= 1
        front = sure & there[0] & (near == hits.depth[0])
        assert np.abs(albedo.astype(int) - texel[..., :3])[front].max(initial=0) <= 2
        num_holes, num_behind = num_holes + int(hole.sum()), num_behind + int(behind.sum())
    assert num_holes > 200 and num_behind > 50  # noqa: PT018 - what the scene must show


def test_14_what_is_fainter_than_a_tenth_is_no_surface(shoot: Callable[..., Sample], tmp_path: Path) -> None:
    scene = [
        Quad([-1, -0.2, -1], [2, 0, 0], [0, 0, 2], matt([1, 1, 1], 0.05)),
        Quad([-0.9, 0.2, -0.9], [1.8, 0, 0], [0, 0, 0.9], matt([0.02, 0.2, 0.8])),
    ]
    sample = shoot(write_quads(tmp_path / "haze.glb", scene), preset="openlrm", num_views=2)
    for view in range(2):
        hits = cast(sample, view, scene)
        sure = hits.inside(-RIM)[1] == hits.inside(RIM)[1]
        expected = np.where(hits.inside()[1], hits.depth[1], 0)
        assert np.abs(planes_of(sample, view)[0] - expected)[sure].max() <= 0.5 * STEP + FLOAT


def test_15_the_scale_is_recorded_and_holds_the_farthest_camera(shoot: Callable[..., Sample], tmp_path: Path) -> None:
    """A field of view of 5 degrees puts the cameras 40 units away, where 8192 steps a unit do not fit 16 bits."""
    render = {"preset": "uncropped", "fov_deg": 5.0, "num_views": 2}
    sample = shoot(write_quads(tmp_path / "corner.glb", CORNER), **render)
    scale = depth_scale(make_spec(render=render).render)
    assert scale == 1024
    for view in range(2):
        plane = sample.views[view].planes["depth"]
        assert (plane.codec, plane.scale) == ("png", scale)
        hits = cast(sample, view, CORNER)
        near = np.where(hits.inside(), hits.depth, np.inf).min(axis=0)
        sure = (hits.inside(-RIM) == hits.inside(RIM)).all(axis=0) & np.isfinite(near)
        assert np.abs(planes_of(sample, view)[0] - near)[sure].max() <= 0.5 / scale + FLOAT * 45 / 5


@pytest.mark.parametrize("lighting", ["random", "ambient"])
def test_planes_are_of_the_scene_and_not_of_its_light_its_order_or_its_codec(
    shoot: Callable[..., Sample], tmp_path: Path, lighting: str
) -> None:
    """Lights, samples, denoising, the codec and the order of planes change nothing of what a data plane says."""
    path = write_quads(tmp_path / "corner.glb", CORNER)
    order: tuple[PlaneName, ...] = ("albedo", "rgba", "normal", "depth")
    plain = shoot(path, num_views=2)
    other = shoot(
        path, num_views=2, planes=order, lighting=lighting, codec="png", samples=4, denoise=True, see_through="alpha"
    )
    some = shoot(path, num_views=2, planes=("rgba", "normal"), codec="webp-q95")
    for view in range(2):
        assert list(plain.views[view].planes) == list(PLANES)
        assert list(other.views[view].planes) == list(order)
        assert list(some.views[view].planes) == ["rgba", "normal"]
        assert {plane.codec for plane in other.views[view].planes.values()} == {"png"}
        for one, two in zip(planes_of(plain, view), planes_of(other, view), strict=True):
            np.testing.assert_array_equal(one, two)
        normal = decode_data("normal", some.views[view].planes["normal"])
        np.testing.assert_array_equal(normal, planes_of(plain, view)[1])


def test_data_and_picture_cover_the_same_pixels(shoot: Callable[..., Sample], tmp_path: Path) -> None:
    """Depth is there where the picture is more than half covered, but for pixels that an edge halves."""
    vertices, triangles = ball(24)
    path = write_obj(tmp_path / "ball.obj", [(vertices, triangles, (0.5, 0.5, 0.5))], smooth=True)
    sample = shoot(path, samples=32)
    for view in range(6):
        depth = planes_of(sample, view)[0]
        alpha = decode_rgba(sample.views[view].planes["rgba"].data)[..., 3]
        assert (depth[alpha > 200] > 0).all()
        assert (depth[alpha < 55] == 0).all()
