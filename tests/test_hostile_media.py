"""Media that were damaged on purpose: each is read or refused by name, and the one after it is read."""

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

PICTURES = ("png", "jpg", "gif", "webp", "bmp", "tif", "ppm", "ico", "tga", "jp2")
VIDEOS = {
    "a.mp4": {},
    "a.mkv": {},
    "a.ts": {"codec": "mpeg1video", "rate": 25},
    "a.avi": {"codec": "mpeg4"},
    "a.webm": {"codec": "libvpx-vp9"},
    "a.gif": {"codec": "gif", "pixels": "rgb8"},
    "a.mov": {"codec": "mjpeg", "pixels": "yuvj420p"},
}
HASTY = VideoConfig(num_frames=3, timeout=20)

Load = Callable[[Path], object]


def flip(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 4, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def flip_head(data: bytearray, rng: random.Random) -> bytes:
    """Where the sizes, rates and durations stand."""
    for _ in range(rng.choice((1, 3, 9))):
        data[rng.randrange(min(len(data), 512))] = rng.choice((0, 1, 127, 128, 255))
    return bytes(data)


def flip_tail(data: bytearray, rng: random.Random) -> bytes:
    """Where MP4 keeps its index."""
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
    """`count` damaged files, each kind of damage in turn; some wear another's header."""
    rng = random.Random(seed)
    for number in range(count):
        data = bytearray(originals[number % len(originals)])
        if number % 11 == 0:
            data[:64] = rng.choice(originals)[:64]
        yield MUTATIONS[number % len(MUTATIONS)](data, rng)


def run(load: Load, folder: Path, suffixes: list[str], files: Iterator[bytes]) -> tuple[int, int]:
    """How many were read and how many refused; anything but a MediaError that names the file goes through."""
    read = refused = 0
    for number, data in enumerate(files):
        path = folder / f"m{number}.{suffixes[number % len(suffixes)]}"
        path.write_bytes(data)
        try:
            load(path)
            read += 1
        except MediaError as error:
            refused += str(path) in str(error)
        path.unlink()
    return read, refused


def test_damaged_pictures(tmp_path):
    good = [write_image(tmp_path / f"good.{suffix}").read_bytes() for suffix in PICTURES]

    def load(path: Path) -> None:
        found = load_image(path)
        assert found.mode == "RGB"
        assert min(found.size) > 0

    # Every seventh wears a wrong extension, since seven and ten have no common factor.
    read, refused = run(load, tmp_path, [*PICTURES[:7]], mutants(good, 700, seed=1))
    assert read + refused == 700
    assert read > 50
    assert refused > 200
    load(tmp_path / "good.png")


def test_damaged_videos(tmp_path):
    good = [write_video(tmp_path / f"good{name}", 8, **how).read_bytes() for name, how in VIDEOS.items()]

    def load(path: Path) -> None:
        clip = load_video(path, HASTY)
        assert clip.frames.shape[0] == len(clip.indices)
        assert np.isfinite(clip.fps)

    suffixes = [name.removeprefix("a.") for name in VIDEOS]
    read, refused = run(load, tmp_path, [*suffixes, "mp4"], mutants(good, 400, seed=2))
    assert read + refused == 400
    assert read > 20
    assert refused > 100
    load(tmp_path / "gooda.mp4")
    isolation.stop()


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("pipe", "folder", "loop", "dangling", "nothing", "x" * 300, "a\0b", "pipe/inside"):
        for load in (load_image, lambda path: load_video(path, HASTY)):
            with pytest.raises(MediaError):
                load(tmp_path / name)
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(MediaError, match="no regular file"):
            load_video(Path(device), HASTY)


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises more than is there."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height"), [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (2**31 - 1, 1), (0, 5), (9000, 9000)]
)
def test_gigantic_pictures_are_refused_by_their_header(tmp_path, width, height):
    (tmp_path / "a.png").write_bytes(png(width, height))
    with pytest.raises(MediaError, match=r"a\.png: (too large|cannot be read)"):
        load_image(tmp_path / "a.png")


def test_a_picture_over_the_limit_is_refused_whole_or_not(tmp_path):
    Image.new("1", (10_000, 9_500)).save(tmp_path / "bomb.png")  # a few KiB that become 285 MB
    with pytest.raises(MediaError, match=r"bomb\.png: too large to decode safely"):
        load_image(tmp_path / "bomb.png")


def patched(path: Path, box: bytes, offset: int, value: bytes) -> Path:
    """An MP4 with a field of one of its boxes overwritten."""
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
        (b"mdhd", 16, b"\xff" * 4),  # a duration without end
        (b"mvhd", 16, bytes(4)),
        (b"stts", 8, bytes(4)),  # no frames; every frame of no duration; frames of 2³² units
        (b"stts", 12, bytes(4)),
        (b"stts", 12, b"\xff" * 4),
        (b"stsz", 8, b"\xff" * 4),  # four thousand million frames
        (b"avc1", 24, b"\xff" * 4),  # 65535 × 65535 pixels
        (b"avc1", 24, bytes(4)),
    ],
)
@pytest.mark.parametrize("keys", [{}, {"sampling": "fps", "fps": 3.0}], ids=["uniform", "fps"])
def test_clocks_and_sizes_that_make_no_sense(tmp_path, box, offset, value, keys):
    path = patched(write_video(tmp_path / "a.mp4"), box, offset, value)
    try:
        clip = load_video(path, VideoConfig(num_frames=3, timeout=20, **keys))
    except MediaError:
        return
    assert np.isfinite(clip.fps)
    assert clip.frames.shape[1:] == np.asarray(picture()).shape
