"""One picture is the same picture for everybody who looks at it."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data.human import read_pair
from data.ids import image_uid
from data.pictures import FORMATS, decode_image, fit, open_image
from data.row_checks import row_problems
from data.schema import IMAGE

RED, GREEN = (255, 0, 0), (0, 255, 0)


def _half_clear() -> Image.Image:
    """Two pixels: opaque red, and a green that nobody sees."""
    picture = Image.new("RGBA", (2, 1), (*RED, 255))
    picture.putpixel((1, 0), (*GREEN, 0))
    return picture


def _palette() -> Image.Image:
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *GREEN])
    picture.putpixel((1, 0), 1)
    picture.info["transparency"] = 1
    return picture


@pytest.mark.parametrize(
    "picture",
    [_half_clear(), _half_clear().convert("RGBa"), _palette()],
    ids=["RGBA", "premultiplied", "palette with a clear colour"],
)
def test_transparent_pictures_are_seen_on_white(picture: Image.Image) -> None:
    assert open_image(picture).tolist() == [[list(RED), [255, 255, 255]]]


def test_half_transparent_grey_is_mixed_with_white() -> None:
    assert open_image(Image.new("LA", (1, 1), (0, 128))).tolist() == [[[127] * 3]]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "I", "F"])
def test_other_modes_become_rgb(mode: str) -> None:
    array = open_image(Image.new("L", (3, 2), 255).convert(mode))
    assert array.shape == (2, 3, 3) and array.dtype == np.uint8 and array.min() >= 254


def test_files_bytes_and_pictures_give_the_same_array(tmp_path: Path) -> None:
    """A clear colour stored in the file counts too; a picture out of an array comes back as it was."""
    _palette().save(tmp_path / "x.png", transparency=1)
    from_file = open_image(tmp_path / "x.png")
    assert from_file.tolist() == [[list(RED), [255, 255, 255]]]
    np.testing.assert_array_equal(open_image((tmp_path / "x.png").read_bytes()), from_file)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(open_image(Image.fromarray(pixels)), pixels)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:60])
    for source, name in ((tmp_path / "cut.png", "cut.png"), (tmp_path / "none.png", "none.png"), (b"text", "4 bytes")):
        with pytest.raises(ValueError, match=f"{name}: is no picture that can be read"):
            open_image(source)


def test_a_picture_is_covered_cropped_and_told_of() -> None:
    wide = np.zeros((50, 200, 3), np.uint8)
    wide[:, 75:125] = 255  # what a square crop in the middle shows
    pixels, time_ids = fit(Image.fromarray(wide), 32, 32)
    assert time_ids == [50, 200, 0, 48, 32, 32] and pixels.shape == (32, 32, 3)
    assert (pixels[:, 2:-2] > 250).all()
    pixels, time_ids = fit(Image.fromarray(wide.transpose(1, 0, 2)), 32, 64)
    assert time_ids == [200, 50, 112, 0, 32, 64] and pixels.shape == (32, 64, 3)
    stripes = np.repeat(np.arange(512) % 2 * 255, 3).reshape(1, 512, 3).astype(np.uint8).repeat(512, 0)
    grey = fit(Image.fromarray(stripes), 64, 64)[0]
    assert abs(grey.astype(float) - 127.5).max() < 10, "shrunk without smoothing, stripes stay black or white"


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


MODES = {"JPEG": ("RGB", "L"), "WEBP": ("RGB", "L"), "PPM": ("RGB", "L", "1")}


@pytest.mark.parametrize(("kind", "mode"), [(k, m) for k in FORMATS for m in MODES.get(k, ("RGB", "L", "1", "P"))])
def test_opaque_pictures_are_what_pillow_decodes(kind: str, mode: str) -> None:
    """Nothing but transparency is treated: latents and scores of such pictures stay what they were."""
    data = saved(NOISE.convert(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(open_image(data), expected)
    decoded = decode_image(data)
    assert (decoded.mode, decoded.format, decoded.size) == ("RGB", kind, (32, 24))


@pytest.mark.parametrize("picture", [_half_clear(), _palette()], ids=["RGBA", "palette"])
def test_a_transparent_picture_is_one_picture(picture: Image.Image, tmp_path: Path) -> None:
    """To scorers, to the import of human preferences, and to the deep check of shards."""
    data = saved(picture, "PNG", **({"transparency": 1} if picture.mode == "P" else {}))
    seen = open_image(data)
    assert seen.tolist() == [[list(RED), [255, 255, 255]]]
    pair = read_pair({"caption": "a", "jpg_0": data, "jpg_1": data, "label_0": 1.0}, 0, height=1, width=2)
    assert pair is not None and pair.files == (data, data)
    for imported in pair.pictures:
        np.testing.assert_array_equal(imported, seen)


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "EPS"])
def test_other_formats_are_no_pictures_to_anybody(kind: str) -> None:
    data = saved(NOISE, kind)
    with pytest.raises(ValueError, match="is no picture that can be read"):
        decode_image(data)
    assert read_pair({"caption": "a", "jpg_0": data, "jpg_1": data, "label_0": 1.0}, 0, height=8, width=8) is None
    batch = pa.record_batch({"image": pa.array([{"bytes": data, "path": None}], IMAGE), "image_uid": [image_uid(data)]})
    assert [problem.split(" (")[0] for _, problem in row_problems(batch)] == ["image does not decode"]


@pytest.mark.parametrize("kind", FORMATS)
def test_damage_is_never_more_than_a_value_error(kind: str) -> None:
    """Whatever Pillow's decoders raise."""
    whole, random = saved(NOISE, kind), np.random.default_rng(1)
    for _ in range(60):
        data = bytearray(whole[: random.integers(1, len(whole) + 1)])
        for place in random.integers(0, len(data), 4):
            data[place] = random.integers(0, 256)
        with contextlib.suppress(ValueError), warnings.catch_warnings(action="ignore"):
            assert open_image(bytes(data)).dtype == np.uint8
