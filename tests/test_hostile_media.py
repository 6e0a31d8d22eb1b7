"""Damaged media files: each is read, or rejected with an error that names it, and the next file is read."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.images import load_image
from data_pipelines.samples import MediaError
from data_pipelines.video import isolation, load_video
from mmdora.core.config import VideoConfig
from tests.media import picture, write_image, write_video

IMAGES = ("png", "jpg", "gif", "webp", "bmp", "tif", "ppm", "ico", "tga", "jp2")
VIDEOS = {
    "a.mp4": {},
    "a.mkv": {},
    "a.ts": {"codec": "mpeg1video", "rate": 25},
    "a.avi": {"codec": "mpeg4"},
    "a.webm": {"codec": "libvpx-vp9"},
    "a.gif": {"codec": "gif", "pixels": "rgb8"},
    "a.mov": {"codec": "mjpeg", "pixels": "yuvj420p"},
}
THREE_FRAMES = VideoConfig(num_frames=3, timeout=20)

Load = Callable[[Path], object]


def flip(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 4, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def flip_head(data: bytearray, rng: random.Random) -> bytes:
    """Damage the head, which holds sizes, rates and durations."""
    for _ in range(rng.choice((1, 3, 9))):
        data[rng.randrange(min(len(data), 512))] = rng.choice((0, 1, 127, 128, 255))
    return bytes(data)


def flip_tail(data: bytearray, rng: random.Random) -> bytes:
    """Damage the tail, which holds the index of an MP4."""
    low = max(0, len(data) - 1200)
    for _ in range(rng.choice((1, 3, 9))):
        data[rng.randrange(low, len(data))] = rng.choice((0, 1, 127, 128, 255))
    return bytes(data)


def cut(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def hole(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return bytes(data[:start]) + bytes(rng.randrange(2000)) + bytes(data[start + rng.randrange(2000) :])


MUTATIONS = (flip, flip_head, flip_tail, cut, hole)


def mutants(originals: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Yield `count` damaged files, with each kind of damage in turn; some have the header of another file."""
    rng = random.Random(seed)
    for number in range(count):
        data = bytearray(originals[number % len(originals)])
        if number % 11 == 0:
            data[:64] = rng.choice(originals)[:64]
        yield MUTATIONS[number % len(MUTATIONS)](data, rng)


def count_outcomes(load: Load, folder: Path, suffixes: list[str], files: Iterator[bytes]) -> tuple[int, int]:
    """Count the files that are read, and those rejected with a MediaError that names the file."""
    read = rejected = 0
    for number, data in enumerate(files):
        path = folder / f"m{number}.{suffixes[number % len(suffixes)]}"
        path.write_bytes(data)
        try:
            load(path)
            read += 1
        except MediaError as error:
            rejected += str(path) in str(error)
        path.unlink()
    return read, rejected


def test_damaged_images_are_read_or_rejected(tmp_path):
    good = [write_image(tmp_path / f"good.{suffix}").read_bytes() for suffix in IMAGES]

    def load(path: Path) -> None:
        image = load_image(path)
        assert image.mode == "RGB"
        assert min(image.size) > 0

    # Seven suffixes for ten formats: most files have the suffix of another format.
    read, rejected = count_outcomes(load, tmp_path, [*IMAGES[:7]], mutants(good, 700, seed=1))
    assert read + rejected == 700
    assert read > 50
    assert rejected > 200
    load(tmp_path / "good.png")


def test_damaged_videos_are_read_or_rejected(tmp_path):
    good = [write_video(tmp_path / f"good{name}", 8, **how).read_bytes() for name, how in VIDEOS.items()]

    def load(path: Path) -> None:
        video = load_video(path, THREE_FRAMES)
        assert video.frames.shape[0] == len(video.indices)
        assert np.isfinite(video.fps)

    suffixes = [name.removeprefix("a.") for name in VIDEOS]
    read, rejected = count_outcomes(load, tmp_path, [*suffixes, "mp4"], mutants(good, 400, seed=2))
    assert read + rejected == 400
    assert read > 20
    assert rejected > 100
    load(tmp_path / "gooda.mp4")
    isolation.stop()


def test_paths_that_are_not_regular_files_are_rejected(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("pipe", "folder", "loop", "dangling", "nothing", "x" * 300, "a\0b", "pipe/inside"):
        for load in (load_image, lambda path: load_video(path, THREE_FRAMES)):
            with pytest.raises(MediaError):
                load(tmp_path / name)
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(MediaError, match="not a regular file"):
            load_video(Path(device), THREE_FRAMES)


def png(width: int, height: int) -> bytes:
    """Return a PNG whose header claims more pixels than it has."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height"), [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (2**31 - 1, 1), (0, 5), (9000, 9000)]
)
def test_gigantic_images_are_rejected_by_their_header(tmp_path, width, height):
    (tmp_path / "a.png").write_bytes(png(width, height))
    with pytest.raises(MediaError, match=r"a\.png: (too large|cannot be read)"):
        load_image(tmp_path / "a.png")


def test_an_undamaged_image_over_the_limit_is_rejected(tmp_path):
    Image.new("1", (10_000, 9_500)).save(tmp_path / "bomb.png")  # a few KiB that decode to 285 MB
    with pytest.raises(MediaError, match=r"bomb\.png: too large to decode safely"):
        load_image(tmp_path / "bomb.png")


def patched(path: Path, box: bytes, offset: int, value: bytes) -> Path:
    """Overwrite a field in a box of an MP4."""
    data = bytearray(path.read_bytes())
    at = data.index(box) + 4 + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("box", "offset", "value"),
    [
        (b"mvhd", 12, bytes(4)),  # a time scale of zero
        (b"mdhd", 12, bytes(4)),
        (b"mdhd", 12, b"\xff" * 4),
        (b"mdhd", 16, b"\xff" * 4),  # an endless duration
        (b"mvhd", 16, bytes(4)),
        (b"stts", 8, bytes(4)),  # no frames; frames without duration; frames of 2³² units
        (b"stts", 12, bytes(4)),
        (b"stts", 12, b"\xff" * 4),
        (b"stsz", 8, b"\xff" * 4),  # 2³² frames
        (b"avc1", 24, b"\xff" * 4),  # 65535 × 65535 pixels
        (b"avc1", 24, bytes(4)),
    ],
)
@pytest.mark.parametrize("keys", [{}, {"sampling": "fps", "fps": 3.0}], ids=["uniform", "fps"])
def test_invalid_times_and_sizes_are_read_or_rejected(tmp_path, box, offset, value, keys):
    path = patched(write_video(tmp_path / "a.mp4"), box, offset, value)
    try:
        video = load_video(path, VideoConfig(num_frames=3, timeout=20, **keys))
    except MediaError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    assert np.isfinite(video.fps)
    assert video.frames.shape[1:] == np.asarray(picture()).shape
