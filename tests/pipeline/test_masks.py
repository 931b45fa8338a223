"""Masks and frames from bytes: what is believed, what is repaired, what is refused."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import masks
from pipeline.masks import clean, hook_mask, hook_name
from pipeline.photos import decode_mask, decode_photo, image_size
from pipeline.types import AssetError, FailureKind
from tests.captures import bomb, jpeg, png


def disc(radius: int = 60, at: tuple[int, int] = (100, 140), size: tuple[int, int] = (280, 200)) -> np.ndarray:
    return cv2.circle(np.zeros(size, np.uint8), at, radius, 255, -1)


def test_a_good_mask_is_measured() -> None:
    binary, facts = clean(disc(), 127)
    assert facts.fault is None
    assert facts.cut == (False, False, False, False)
    assert facts.piece == 1
    assert facts.area == pytest.approx(np.pi * 60**2 / 56000, rel=0.02)
    np.testing.assert_allclose(facts.centroid, [100.5, 140.5], atol=0.2)
    np.testing.assert_allclose(facts.hull.min(axis=0), [40, 80])
    np.testing.assert_allclose(facts.hull.max(axis=0), [161, 201])
    assert set(np.unique(binary)) == {0, 255}


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.zeros((280, 200), np.uint8), "empty"),
        (np.full((280, 200), 255, np.uint8), "covers 100"),
        (disc(10), "covers 0.6%"),
        (disc(40, (50, 60)) | disc(40, (150, 220)), "largest piece is 50%"),
    ],
)
def test_masks_that_cannot_be_believed_say_why(mask: np.ndarray, said: str) -> None:
    fault = clean(mask, 127)[1].fault
    assert fault is not None
    assert said in fault


@pytest.mark.parametrize(
    ("at", "side"), [((58, 140), 0), ((100, 59), 1), ((140, 140), 2), ((100, 221), 3), ((61, 140), None)]
)
def test_the_sides_that_cut_the_object_are_named(at: tuple[int, int], side: int | None) -> None:
    assert clean(disc(60, at), 127)[1].cut == tuple(i == side for i in range(4))


def test_specks_go_and_holes_and_second_parts_stay() -> None:
    whole = disc(70)
    cv2.circle(whole, (100, 140), 12, 0, -1)
    part = whole | disc(18, (180, 30))
    binary, facts = clean(part | disc(2, (10, 270)), 127)
    assert (binary == part).all()
    assert facts.hull.min(axis=0)[1] == 12


@given(st.integers(0, 254), st.integers(0, 255))
@settings(max_examples=30, deadline=None)
def test_the_threshold_decides_what_is_object(threshold: int, value: int) -> None:
    binary, _ = clean((disc() > 0).astype(np.uint8) * np.uint8(value), threshold)
    assert bool(binary.any()) == (value > threshold)


def test_masks_of_every_kind_decode_to_one() -> None:
    mask = disc()
    sink = io.BytesIO()
    Image.fromarray(mask > 0).save(sink, "PNG")
    rgba = np.dstack([np.full((280, 200, 3), 77, np.uint8), mask])
    kinds = {
        "grey": png(mask), "zero and one": png(mask // 255), "one bit": sink.getvalue(), "rgba": png(rgba),
        "colour": png(np.dstack([mask] * 3)), "opaque rgba": png(np.dstack([mask, mask, mask, 0 * mask + 255])),
        "16 bits": cv2.imencode(".png", mask.astype(np.uint16) * 257)[1].tobytes(),
    }  # fmt: skip
    for kind, data in kinds.items():
        assert (decode_mask(data, kind) == mask).all(), kind
    assert ((decode_mask(jpeg(np.dstack([mask] * 3)), "jpeg") > 127) == (mask > 0)).mean() > 0.998


@pytest.mark.parametrize("decode", [decode_mask, decode_photo])
def test_a_picture_is_refused_by_its_header_before_it_is_decoded(decode: Callable[[bytes, str], object]) -> None:
    with pytest.raises(AssetError) as error:
        decode(bomb(), "bomb.png")
    assert error.value.kind == FailureKind.TOO_LARGE


@pytest.mark.parametrize("data", [b"", b"<html>no</html>", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_picture_is_named(data: bytes) -> None:
    with pytest.raises(AssetError) as error:
        decode_photo(data, "x.jpg")
    assert error.value.kind == FailureKind.CORRUPT_FILE


def test_a_jpeg_that_ends_early_is_refused_although_many_decoders_fill_it_with_grey() -> None:
    data = jpeg(np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8))
    for length in (len(data) // 2, len(data) - 200, len(data) - 1):
        with pytest.raises(AssetError, match="without its end"):
            decode_photo(data[:length], "x.jpg")
    assert decode_photo(data + b"trailer of a phone", "x.jpg")[0].shape == (200, 300, 3)


@lru_cache
def textured() -> np.ndarray:
    """A picture as photos are: smooth here, rough there."""
    rng = np.random.default_rng(4)
    rough = cv2.GaussianBlur(rng.integers(0, 255, (240, 320, 3)).astype(np.uint8), (0, 0), 1.5)
    ramp = np.linspace(0, 1, 320)[None, :, None]
    return np.asarray(rough * ramp + 120 * (1 - ramp), np.uint8)


@given(st.sampled_from((60, 75, 92, 98)), st.floats(0.05, 0.9), st.sampled_from((200, 512, 4096)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_jpeg_with_a_hole_of_zeros_is_refused(quality: int, where: float, length: int, optimised: bool) -> None:
    """As a download leaves it that was never finished; decoders go on without a word."""
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, int(optimised)]
    data = bytearray(cv2.imencode(".jpg", textured(), flags)[1].tobytes())
    start = data.index(b"\xff\xda") + 12
    at = start + int(where * (len(data) - start))
    end = min(at + length, len(data) - 2)
    data[at:end] = bytes(end - at)
    assert cv2.imdecode(np.frombuffer(bytes(data), np.uint8), cv2.IMREAD_COLOR) is not None
    for decode in (decode_photo, decode_mask):
        with pytest.raises(AssetError, match="damaged within") as error:
            decode(bytes(data), "a.jpg")
        assert error.value.kind == FailureKind.CORRUPT_FILE


@pytest.mark.parametrize("padding", [1, 8, 16])
def test_a_camera_that_pads_its_pictures_is_forgiven(padding: int) -> None:
    data = jpeg(textured())
    padded = data[:-2] + b"\x55" * padding + data[-2:]
    assert (decode_photo(padded, "a.jpg")[0] == decode_photo(data, "a.jpg")[0]).all()
    with pytest.raises(AssetError, match="extraneous bytes"):
        decode_photo(data[:-2] + b"\x55" * 200 + data[-2:], "a.jpg")


@given(st.integers(8, 70), st.integers(8, 70), st.sampled_from((1, 2, 4, 8)), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_photos_decode_to_the_pixels_that_opencv_gives(
    width: int, height: int, shrink: int, progressive: bool, is_grey: bool
) -> None:
    photo = textured()[:height, :width]
    flags = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    data = cv2.imencode(".jpg", photo[..., 0] if is_grey else photo, flags)[1].tobytes()
    how = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), how.get(shrink, cv2.IMREAD_REDUCED_COLOR_8))
    found, *size = decode_photo(data, "a.jpg", shrink)
    assert size == [width, height]
    assert found.shape == expected.shape
    assert (found == expected).all()


def test_a_photo_in_inks_is_read_too() -> None:
    sink = io.BytesIO()
    Image.fromarray(textured()).convert("CMYK").save(sink, "JPEG", quality=95)
    photo = decode_photo(sink.getvalue(), "print.jpg")[0]
    assert np.abs(photo[..., ::-1].astype(int) - textured()).mean() < 6


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_a_shrunk_photo_covers_the_same_ground_whatever_its_format(shrink: int) -> None:
    columns, rows = np.meshgrid(np.arange(203) / 203, np.arange(117) / 117)
    photo = np.rint(np.stack([columns, rows, 0.5 + 0 * rows], -1) * 255).astype(np.uint8)
    for data in (jpeg(photo, 98), png(photo)):
        image, width, height = decode_photo(data, "x", shrink)
        assert (width, height) == (203, 117)
        assert image.shape[:2] == (-(-117 // shrink), -(-203 // shrink))
        centre = image[1, 3].astype(float)  # BGR; its middle lies at ((3.5, 1.5) * shrink) of the photo
        assert abs(centre[2] - (3.5 * shrink - 0.5) / 203 * 255) < 4
        assert abs(centre[1] - (1.5 * shrink - 0.5) / 117 * 255) < 4


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_any_bytes_give_a_picture_or_a_typed_error(data: bytes) -> None:
    for start in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBP"):
        kinds = set()
        for decode in (image_size, decode_mask, decode_photo):
            try:
                decode(start + data, "x")
            except AssetError as error:
                kinds.add(error.kind)
        assert kinds <= {FailureKind.CORRUPT_FILE, FailureKind.TOO_LARGE}


def test_a_hook_that_hangs_is_ended_and_one_that_talks_without_end_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "COMMAND_TIMEOUT_S", 0.5)
    hang = tmp_path / "hang.py"
    hang.write_text("import time; time.sleep(60)")
    with pytest.raises(AssetError, match="took over") as error:
        hook_mask(f"{sys.executable} {hang} {{image}} {{mask}}", b"x", "a.jpg")
    assert error.value.kind == FailureKind.NO_MASK
    monkeypatch.setattr(masks, "COMMAND_TIMEOUT_S", 60.0)
    talk = tmp_path / "talk.py"
    talk.write_text("import sys; print('x' * 200000, 'the end'); sys.exit(1)")
    with pytest.raises(AssetError) as said:
        hook_mask(f"{sys.executable} {talk} {{image}} {{mask}}", b"x", "b c.JPG")
    assert said.value.log_tail.strip().endswith("the end")
    assert len(said.value.log_tail) <= 4000


def test_a_command_is_named_in_the_row() -> None:
    assert hook_name("cut {image} {mask}") == "command: cut {image} {mask}"
