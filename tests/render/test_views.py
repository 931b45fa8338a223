"""A view between the child and the shard: what is packed is unpacked, and nothing else is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sample import decode_data, decode_rgba
from pipeline.spec import RenderSpec
from render.cameras import cameras_for, depth_scale
from render.views import bytes_per_pixel, encode_view, pack_view, unpack_view

SIZE = 16
PLANES = ("depth", "rgba", "albedo", "normal")  # no order that code could have by itself
KINDS: dict[str, tuple[Any, int]] = {
    "rgba": (np.float32, 4),
    "depth": (np.uint16, 1),
    "normal": (np.uint8, 3),
    "albedo": (np.uint8, 3),
}


def spec_of(*planes: str, **more: Any) -> RenderSpec:
    return RenderSpec.model_validate({"resolution_px": SIZE, "planes": planes or ("rgba",)} | more)


def random_planes(names: tuple[str, ...], height: int, width: int, seed: int) -> dict[Any, np.ndarray]:
    """Return planes of a part of a view as the engine makes them: depth without a channel axis."""
    rng = np.random.default_rng(seed)
    out: dict[Any, np.ndarray] = {}
    for name in names:
        kind, channels = KINDS[name]
        shape = (height, width) if name == "depth" else (height, width, channels)
        values = rng.random(shape) if kind is np.float32 else rng.integers(1, np.iinfo(kind).max, shape)
        out[name] = values.astype(kind)
    return out


def header_of(box: Any, planes: Any = ("rgba",)) -> dict[str, Any]:
    return {"type": "view", "box": box, "planes": list(planes)}


@given(
    box=st.tuples(*[st.integers(0, SIZE - 1)] * 2, *[st.integers(1, SIZE)] * 2),
    names=st.permutations(PLANES).flatmap(lambda p: st.integers(1, 4).map(lambda n: tuple(p[:n]))),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_what_is_packed_comes_back_in_its_place_and_nothing_around_it(
    box: tuple[int, int, int, int], names: tuple[str, ...], seed: int
) -> None:
    names = names if "rgba" in names else (*names, "rgba")
    left, top = min(box[0], box[2] - 1), min(box[1], box[3] - 1)
    right, bottom = max(box[2], left + 1), max(box[3], top + 1)
    planes = random_planes(names, bottom - top, right - left, seed)
    payload = bytearray(pack_view(planes))
    assert len(payload) == (bottom - top) * (right - left) * sum(bytes_per_pixel(name) for name in planes)
    whole = unpack_view(header_of([left, top, right, bottom], names), payload, spec_of(*names))
    assert list(whole) == list(names)
    for name, plane in whole.items():
        kind, channels = KINDS[name]
        assert (plane.shape, plane.dtype) == ((SIZE, SIZE, channels), kind)
        part = plane[top:bottom, left:right]
        np.testing.assert_array_equal(part, planes[name].reshape(part.shape))
        outside = np.ones((SIZE, SIZE), bool)
        outside[top:bottom, left:right] = False
        assert not plane[outside].any()


BAD_BOXES = [
    None,
    7,
    "0022",
    {"0": 0, "1": 0, "2": 2, "3": 2},
    [],
    [0, 0, 2],
    [0, 0, 2, 2, 2],
    [0, 0, 2.0, 2],
    [0, 0, 2, float("nan")],
    [False, 0, 2, 2],
    [0, False, 2, True],
    [0, 0, "2", 2],
    [0, 0, None, 2],
    [[0], 0, 2, 2],
    [-1, 0, 1, 2],
    [0, -2, 2, 0],
    [0, 0, SIZE + 1, 2],
    [0, 0, 2, SIZE + 1],
    [SIZE, 0, SIZE + 2, 2],
    [2, 0, 0, 2],
    [0, 2, 2, 0],
    [0, 0, 0, 0],
    [4, 4, 4, 6],
    [0, 0, 2**70, 2**70],
]


@pytest.mark.parametrize("box", BAD_BOXES, ids=str)
def test_a_box_that_is_not_one_of_the_picture_is_refused(box: Any) -> None:
    with pytest.raises(ValueError, match=r"its box .* (is not four integers|does not lie in 16 x 16 px)"):
        unpack_view(header_of(box), bytearray(64), spec_of())
    assert unpack_view(header_of([0, 0, 2, 2]), bytearray(64), spec_of())["rgba"].shape == (SIZE, SIZE, 4)


@pytest.mark.parametrize(
    "planes",
    [None, "rgba", [], ["rgba"], ["rgba", "depth", "depth"], ["depth", "rgba"], ["rgba", "Depth"], [["rgba"], "depth"],
     ["rgba", "depth", "normal"], {"rgba": 1, "depth": 2}],
    ids=str,
)  # fmt: skip
def test_planes_that_were_not_asked_for_in_this_order_are_refused(planes: Any) -> None:
    header = {"type": "view", "box": [0, 0, 2, 2], "planes": planes}
    with pytest.raises(ValueError, match=r"it came with the planes .*; \['rgba', 'depth'\] were asked for"):
        unpack_view(header, bytearray(72), spec_of("rgba", "depth"))
    with pytest.raises(ValueError, match="it came with the planes None"):
        unpack_view({"box": [0, 0, 2, 2]}, bytearray(72), spec_of("rgba", "depth"))


@pytest.mark.parametrize("num_bytes", [0, 63, 65, 72, 16 * SIZE * SIZE])
def test_a_payload_of_another_length_is_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"{num_bytes} bytes of pixels; 64 are right"):
        unpack_view(header_of([3, 5, 5, 7]), bytearray(num_bytes), spec_of())


def test_an_endless_header_makes_a_short_message() -> None:
    for header in (header_of(list(range(10**5))), header_of([0, 0, 2, 2], ["x"] * 10**5)):
        with pytest.raises(ValueError) as caught:
            unpack_view(header, bytearray(64), spec_of())
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("codec", ["webp", "webp-q95", "png"])
def test_data_planes_come_back_from_every_codec_as_they_were(codec: str) -> None:
    """Depth as PNG; normal and albedo without loss also where the picture has one."""
    spec = spec_of(*PLANES, codec=codec)
    planes = random_planes(PLANES, SIZE, SIZE, seed=3)
    planes["depth"] = np.minimum(planes["depth"], 5 * 8192)
    planes["rgba"][..., 3] = 1
    camera = cameras_for(spec, 1)[0]
    whole = unpack_view(header_of([0, 0, SIZE, SIZE], PLANES), bytearray(pack_view(planes)), spec)
    view = encode_view(whole, {"cropped": 0.25, "alpha_coverage": 0.5}, spec, camera)
    assert list(view.planes) == list(PLANES)
    kinds = {name: plane.codec for name, plane in view.planes.items()}
    picture = "png" if codec == "png" else "webp"
    assert kinds == {"depth": "png", "rgba": picture, "albedo": picture, "normal": picture}
    assert {name: plane.scale for name, plane in view.planes.items()} == {
        "depth": depth_scale(spec), "rgba": None, "albedo": None, "normal": None
    }  # fmt: skip
    depth = decode_data("depth", view.planes["depth"])
    np.testing.assert_array_equal(depth, planes["depth"] / np.float32(depth_scale(spec)))
    for name in ("normal", "albedo"):
        np.testing.assert_array_equal(decode_data(name, view.planes[name]), planes[name])
    assert decode_rgba(view.planes["rgba"].data).shape == (SIZE, SIZE, 4)
    assert view.facts["cropped"] == 0.25
    assert view.facts["alpha_coverage"] == 1, "what is measured here is not for the child to tell"
