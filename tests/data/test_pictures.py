"""One picture is the same picture for everybody who looks at it."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.pictures import fit, open_image

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
