"""Pictures and videos: read rightly, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_pipelines.images import load_image
from data_pipelines.samples import MediaError
from data_pipelines.video import VIDEO_READERS, load_video, resolve_reader
from data_pipelines.video.sampling import uniform_indices
from tests.media import picture, write_image, write_video


def test_alpha_lies_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png").getpixel((0, 0)) == (100, 100, 100)


def test_exif_orientation_is_applied(tmp_path):
    image = picture(size=(40, 20))
    exif = image.getexif()
    exif[274] = 6  # turned by a quarter
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
def test_truncated_jpeg_is_refused_by_name(tmp_path, share):
    path = write_image(tmp_path / "cut.jpg")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(MediaError, match=r"cut\.jpg"):
        load_image(path)


def test_missing_and_bombs_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(MediaError, match=r"gone\.png: no such file"):
        load_image(tmp_path / "gone.png")
    path = write_image(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(MediaError, match=r"big\.png"):
        load_image(path)


@pytest.mark.parametrize(
    ("total", "wanted", "indices"),
    [(8, 4, [0, 2, 5, 7]), (1, 3, [0, 0, 0]), (10, 1, [4]), (3, 3, [0, 1, 2]), (2, 4, [0, 0, 1, 1])],
)
def test_uniform_indices(total, wanted, indices):
    assert uniform_indices(total, wanted) == indices


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_readers_agree_frame_by_frame(tmp_path, codec):
    path = write_video(tmp_path / "a.mp4", codec=codec)
    clips = [load_video(path, 5, reader) for reader in VIDEO_READERS if _installed(reader)]
    assert len(clips) == len(list(VIDEO_READERS))
    for clip in clips:
        assert clip.indices == clips[0].indices
        assert clip.total_frames == 12
        assert np.array_equal(clip.frames, clips[0].frames)
    # the right frames, too: frame i looks more like picture(i) than like any other
    pictures = [np.asarray(picture(i)).astype(int) for i in range(12)]
    for frame, index in zip(clips[0].frames, clips[0].indices, strict=True):
        assert np.argmin([np.abs(frame - p).mean() for p in pictures]) == index


@pytest.mark.parametrize("reader", ["decord", "pyav"])
@pytest.mark.parametrize("kind", ["empty", "noise", "truncated", "missing"])
def test_broken_videos_are_refused_by_name(tmp_path, reader, kind):
    if not _installed(reader):
        pytest.skip(f"{reader} has no wheel for this machine")
    path = tmp_path / "bad.mp4"
    if kind == "truncated":
        data = write_video(path, frames=60).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else bytes(range(256)) * 40)
    with pytest.raises(MediaError, match=r"bad\.mp4"):
        load_video(path, 4, reader)


def test_auto_takes_what_is_installed():
    assert resolve_reader("auto") == ("decord" if _installed("decord") else "pyav")


def _installed(reader: str) -> bool:
    import importlib.util

    return importlib.util.find_spec({"decord": "decord", "pyav": "av"}[reader]) is not None
