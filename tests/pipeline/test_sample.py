"""Pixels to bytes and back, and the JSON of a sample as untrusted input."""

from __future__ import annotations

import contextlib
import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sample import (
    SampleError,
    decode_rgba,
    encode_rgba,
    linear_to_srgb,
    parse_sample_json,
    premultiplied_linear_to_rgba8,
    sample_members,
    srgb_to_linear,
)
from pipeline.types import KEY_PATTERN, sample_key
from tests.conftest import make_sample


def noise(seed: int, alpha: int | None = None) -> np.ndarray:
    rgba = np.random.default_rng(seed).integers(0, 256, (24, 24, 4)).astype(np.uint8)
    if alpha is not None:
        rgba[..., 3] = alpha
    rgba[rgba[..., 3] == 0] = 0
    return rgba


@pytest.mark.parametrize("codec", ["webp", "png"])
@pytest.mark.parametrize("alpha", [None, 255, 0])
def test_lossless_codecs_return_every_pixel_in_four_channels(codec: str, alpha: int | None) -> None:
    rgba = noise(1, alpha)
    plane = encode_rgba(rgba, codec)
    assert (decode_rgba(plane.data) == rgba).all()
    raw = cv2.imdecode(np.frombuffer(plane.data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert raw.shape == (24, 24, 4), "an opaque picture must keep its alpha channel"


def test_invisible_pixels_stay_black_in_lossless_webp() -> None:
    rgba = noise(5)
    rgba[8:, 4:] = 0
    assert (decode_rgba(encode_rgba(rgba, "webp").data) == rgba).all()


@pytest.mark.parametrize("alpha", [None, 255])
def test_lossy_webp_keeps_four_channels(alpha: int | None) -> None:
    rgba = noise(2, alpha)
    found = decode_rgba(encode_rgba(rgba, "webp-q95").data)
    assert found.shape == rgba.shape
    assert abs(found[..., 3].astype(int) - rgba[..., 3]).max() <= 1


def test_equal_pixels_give_equal_bytes() -> None:
    assert encode_rgba(noise(3), "webp").data == encode_rgba(noise(3), "webp").data


def test_the_srgb_curve_has_its_standard_values() -> None:
    # IEC 61966-2-1: linear 0.18 is 0.4614 encoded, 0.5 is 0.7354, the knee is at 0.0031308
    assert linear_to_srgb(np.array([0.0, 0.0031308, 0.18, 0.5, 1.0])) == pytest.approx(
        [0.0, 0.04045, 0.46136, 0.73536, 1.0], abs=2e-5
    )
    values = np.linspace(0, 1, 100, dtype=np.float32)
    assert srgb_to_linear(linear_to_srgb(values)) == pytest.approx(values, abs=1e-6)


def test_premultiplied_pixels_become_straight() -> None:
    pixels = np.zeros((1, 4, 4), np.float32)
    pixels[0, 0] = [0.5, 0.0, 0.0, 0.5]  # full red, half covered
    pixels[0, 1] = [9.0, 9.0, 9.0, 1.0]  # over-exposed
    pixels[0, 2] = [np.nan, np.inf, -1.0, 1.0]
    pixels[0, 3] = [0.4, 0.4, 0.4, 0.0005]  # alpha rounds to 0
    out = premultiplied_linear_to_rgba8(pixels)[0].tolist()
    assert out == [[255, 0, 0, 128], [255, 255, 255, 255], [0, 255, 0, 255], [0, 0, 0, 0]]


def test_members_stand_in_the_order_of_the_format() -> None:
    names = [name for name, _ in sample_members(make_sample("ball-7", num_views=3))]
    assert names == ["ball-7.json", "ball-7.000.rgba.webp", "ball-7.001.rgba.webp", "ball-7.002.rgba.webp"]


def good_json() -> dict[str, object]:
    value = json.loads(next(data for _, data in sample_members(make_sample(num_views=2))))
    assert isinstance(value, dict)
    return value


def test_a_sample_json_round_trips() -> None:
    sample = make_sample(num_views=2)
    header = parse_sample_json(json.dumps(good_json()).encode())
    assert (header.key, header.plane_names) == (sample.key, ("rgba",))
    assert (header.cameras[1].intrinsics == sample.views[1].camera.intrinsics).all()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_to_a_sample_json_is_one_typed_error(data: st.DataObject) -> None:
    value = good_json()
    target: object = value
    while True:
        if isinstance(target, dict) and target:
            name = data.draw(st.sampled_from(sorted(target)))
        elif isinstance(target, list) and target:
            name = data.draw(st.integers(0, len(target) - 1))
        else:
            break
        if data.draw(st.booleans()):
            target[name] = data.draw(json_values)  # type: ignore[index]
            break
        target = target[name]  # type: ignore[index]
    with contextlib.suppress(SampleError):  # any other exception fails the test
        parse_sample_json(json.dumps(value).encode())


@given(st.binary(max_size=200))
def test_any_bytes_for_a_sample_json_are_one_typed_error(data: bytes) -> None:
    with pytest.raises(SampleError):
        parse_sample_json(data)


@given(st.text(min_size=1, max_size=300))
def test_any_uid_has_a_valid_key(uid: str) -> None:
    assert KEY_PATTERN.match(sample_key(uid))


def test_keys_tell_uids_apart() -> None:
    uids = ["a/b.glb", "a-b.glb", "A/B.glb", "a b.glb", "ä"]
    assert len({sample_key(uid) for uid in uids}) == len(uids)
