"""Decoding into place gives the pixels of the plain decoders."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from lrm import webp
from lrm.webp import decode_rgba_into, libwebp
from pipeline.sample import SampleError, decode_rgba, encode_rgba
from tests.conftest import ball_image, orbit_camera


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    colours = np.random.default_rng(0).integers(0, 256, (8, 3))
    return ball_image(orbit_camera(0.3, 0.5, 2.0, 96), 0.7, colours)


@pytest.fixture(params=[True, False], ids=["libwebp", "opencv"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to decode: Pillow's libwebp, and OpenCV where there is none."""
    if request.param:
        assert libwebp() is not None, "Pillow's wheel brings libwebp"
    else:
        monkeypatch.setattr(webp, "libwebp", lambda: None)
    return bool(request.param)


@pytest.mark.parametrize("codec", ["webp", "webp-q95", "png"])
@pytest.mark.parametrize("opaque", [False, True])
def test_pixels_are_those_of_opencv_and_pillow(picture: np.ndarray, codec: str, opaque: bool, decoder: bool) -> None:
    rgba = picture.copy()
    if opaque:
        rgba[..., 3] = 255
    data = encode_rgba(rgba, codec).data
    out = np.full((96, 96, 4), 7, np.uint8)
    decode_rgba_into(memoryview(data), out)
    np.testing.assert_array_equal(out, decode_rgba(data))
    if codec != "webp-q95":
        np.testing.assert_array_equal(out, rgba)
        np.testing.assert_array_equal(out, np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")))


def test_it_writes_into_a_part_of_a_batch_alone(picture: np.ndarray, decoder: bool) -> None:
    batch = np.full((3, 96, 96, 4), 9, np.uint8)
    decode_rgba_into(encode_rgba(picture, "webp").data, batch[1])
    np.testing.assert_array_equal(batch[1], picture)
    assert (batch[[0, 2]] == 9).all()


def test_what_is_no_such_picture_is_an_error_and_never_pixels(picture: np.ndarray, decoder: bool) -> None:
    whole = encode_rgba(picture, "webp").data
    three = cv2.imencode(".webp", picture[..., :3].copy(), [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    frames = io.BytesIO()
    one, two = (Image.fromarray(np.roll(picture, by, 0), "RGBA") for by in (0, 9))
    one.save(frames, "WEBP", save_all=True, append_images=[two], duration=100)
    for data in (b"", b"RIFF", whole[:30], whole[: len(whole) // 2], b"\0" * 500, whole[:12] + b"\xff" * 600, three):
        with pytest.raises(SampleError):
            decode_rgba_into(data, np.empty((96, 96, 4), np.uint8))
    if decoder:
        with pytest.raises(SampleError):
            decode_rgba_into(frames.getvalue(), np.empty((96, 96, 4), np.uint8))
    with pytest.raises(SampleError, match="image of 96 x 96 px, camera of 64 x 96 px"):
        decode_rgba_into(whole, np.empty((96, 64, 4), np.uint8))
