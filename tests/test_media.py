"""Images: loaded as RGB, or rejected with an error that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.images import load_image
from data_pipelines.samples import MediaError
from tests.media import picture, write_image


def test_alpha_is_composited_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png").getpixel((0, 0)) == (100, 100, 100)


def test_exif_orientation_is_applied(tmp_path):
    image = picture(size=(40, 20))
    exif = image.getexif()
    exif[274] = 6  # a quarter turn
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30] * 256)
    image.save(tmp_path / "p.png", transparency=0)
    assert load_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_jpeg_is_an_error_that_names_the_file(tmp_path, share):
    path = write_image(tmp_path / "cut.jpg")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(MediaError, match=r"cut\.jpg"):
        load_image(path)


def test_missing_files_and_decompression_bombs_are_errors_that_name_the_file(tmp_path, monkeypatch):
    with pytest.raises(MediaError, match=r"gone\.png: no such file"):
        load_image(tmp_path / "gone.png")
    path = write_image(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MediaError, match=r"big\.png"):
        load_image(path)


def test_an_extreme_aspect_ratio_is_an_error(tmp_path):
    for size in ((1, 201), (402, 2)):
        Image.new("RGB", size).save(tmp_path / "line.png")
        with pytest.raises(MediaError, match=rf"line\.png: {size[0]} x {size[1]} pixels: the aspect ratio is over 200"):
            load_image(tmp_path / "line.png")
    Image.new("RGB", (1, 200)).save(tmp_path / "thin.png")
    assert load_image(tmp_path / "thin.png").size == (1, 200)


def test_embedded_bytes_are_read_and_named(tmp_path):
    data = write_image(tmp_path / "a.png").read_bytes()
    name = Path("shard.tar/a.png")
    assert np.array_equal(load_image(name, data), load_image(tmp_path / "a.png"))
    for broken in (b"", data[:40]):
        with pytest.raises(MediaError, match=r"^shard\.tar/a\.png: "):
            load_image(name, broken)


RED = (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "suffix", "color", "expected"),
    [
        ("1", "png", 1, (255, 255, 255)),
        ("L", "png", 7, (7, 7, 7)),
        ("LA", "png", (0, 0), (255, 255, 255)),
        ("P", "png", RED, RED),
        ("RGB", "png", RED, RED),
        ("RGBA", "png", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", "tif", (0, 255, 255, 0), RED),
        ("YCbCr", "tif", (76, 85, 255), RED),
        ("LAB", "tif", (255, 128, 128), (255, 255, 255)),
        ("I", "tif", 65535, (255, 255, 255)),
        ("I;16", "tif", 257 * 9, (9, 9, 9)),
        ("F", "tif", 1.0, (255, 255, 255)),
        ("F", "tif", 100.0, (100, 100, 100)),
    ],
)
def test_every_mode_is_converted_to_rgb(tmp_path, mode, suffix, color, expected):
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (4, 4), color).save(path)
    image = load_image(path)
    assert image.mode == "RGB"
    assert np.abs(np.subtract(image.getpixel((0, 0)), expected)).max() <= 3


def test_nan_pixels_are_black(tmp_path):
    Image.fromarray(np.array([[np.nan, 1.0]], np.float32)).save(tmp_path / "a.tif")
    assert [load_image(tmp_path / "a.tif").getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


def test_damaged_exif_does_not_change_the_image(tmp_path):
    path = tmp_path / "a.jpg"
    picture().save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(60)))
    expected = load_image(write_image(tmp_path / "plain.jpg"))
    assert np.array_equal(load_image(path), expected)


def test_paths_that_are_not_regular_files_are_errors_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.jpg").touch()
    for path, reason in (
        (tmp_path / "pipe.jpg", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "folder.jpg", "directory"),
        (tmp_path / "empty.jpg", "empty"),
        (tmp_path / ("x" * 300), "cannot be opened"),
        (tmp_path / "zero\0byte", "cannot be opened"),
    ):
        with pytest.raises(MediaError, match=reason):
            load_image(path)


def test_postscript_is_not_run(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    with pytest.raises(MediaError, match=r"a\.eps: .*cannot identify"):
        load_image(tmp_path / "a.eps")
