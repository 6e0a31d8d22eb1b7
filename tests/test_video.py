"""Videos: every reader gives the frames that the settings select, or an error that names the file."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipelines.samples import MediaError
from data_pipelines.video import VIDEO_READERS, load_video, resolve_reader
from data_pipelines.video.sampling import Sampling as S
from data_pipelines.video.sampling import fps_indices, frame_range, select_indices, thin_out, uniform_indices
from mmdora.core.config import VideoConfig
from mmdora.core.errors import UserError
from tests.conftest import ROOT
from tests.media import decode_all, picture, turn_video, write_image, write_video

HAS_DECORD = importlib.util.find_spec("decord") is not None
OPEN_GOP = {"g": "12", "x264-params": "open-gop=1:bframes=3:scenecut=0"}
UNEVEN = [0, 40, 60, 260, 300, 330, 700, 720, 1000, 1010, 1500, 1600, 1640, 1700, 1800, 2400, 2440, 2500, 2600, 3000]

# Per file: how it is written, and whether decord reads it exactly.
VIDEOS = {
    "h264.mp4": ({"g": "10"}, True),
    "b_frames.mkv": ({"b_frames": 3, "g": "10"}, True),
    "mpeg4.mp4": ({"codec": "mpeg4"}, True),
    "mpeg4_b.mp4": ({"codec": "mpeg4", "b_frames": 2}, False),
    "mpeg4_b.avi": ({"codec": "mpeg4", "b_frames": 2}, False),
    "h264.avi": ({"b_frames": 3}, False),
    "hevc.mp4": ({"codec": "libx265", "b_frames": 3, "g": "10", "x265-params": "log-level=none:pools=1"}, True),
    "vp9.webm": ({"codec": "libvpx-vp9", "g": "8"}, True),
    "mjpeg.avi": ({"codec": "mjpeg", "pixels": "yuvj420p"}, True),
    "av1.mp4": ({"codec": "libsvtav1", "size": (128, 96), "svtav1-params": "lp=1"}, False),
    "moving.gif": ({"codec": "gif", "pixels": "rgb8"}, False),
    "uneven.mp4": ({"times": UNEVEN, "g": "6"}, True),
    "uneven.mkv": ({"times": UNEVEN, "g": "6"}, True),
    "open_gop.mp4": (OPEN_GOP, False),
    "open_gop.mkv": (OPEN_GOP, False),
    "open_gop.ts": (OPEN_GOP, False),
    "mpeg1.mpg": ({"codec": "mpeg1video", "rate": 25}, False),
    "windows.wmv": ({"codec": "wmv2"}, False),
    "odd.mp4": ({"codec": "mpeg4", "size": (67, 49)}, False),
    "ten_bit.mp4": ({"pixels": "yuv420p10le"}, False),
    "raw.h264": ({}, False),
}
FRAMES = 20


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, (options, _) in VIDEOS.items():
        write_video(folder / name, FRAMES, **options)
    return folder


def config(**keys) -> VideoConfig:
    return VideoConfig(**{"timeout": None, **keys})


@pytest.mark.parametrize("name", VIDEOS)
def test_readers_give_the_frames_of_sequential_decoding(videos, name):
    expected = decode_all(videos / name)
    assert len(expected) == FRAMES
    readers = ["pyav", "auto", *(["decord"] if HAS_DECORD and VIDEOS[name][1] else [])]
    for reader in readers:
        for count in (1, 3, 7, FRAMES + 5):
            video = load_video(videos / name, config(reader=reader, num_frames=count))
            assert video.indices == tuple(uniform_indices(FRAMES, count))
            assert video.total_frames == FRAMES
            for frame, index in zip(video.frames, video.indices, strict=True):
                assert np.array_equal(frame, expected[index]), (reader, index)
    # frames in random order, so that each needs a seek
    file = VIDEO_READERS["pyav"](videos / name)
    for index in np.random.default_rng(0).integers(0, FRAMES, 2 * FRAMES).tolist():
        assert np.array_equal(file.read([index])[0], expected[index]), index
    file.close()


def test_an_open_file_has_no_thread_and_a_closed_one_no_reference(videos):
    """Otherwise a forked process would wait for the threads of its parent, or free objects that it does not own."""
    tasks = Path("/proc/self/task")
    before = set(tasks.iterdir()) if tasks.is_dir() else None
    file = VIDEO_READERS["pyav"](videos / "h264.mp4")
    file.read([0, FRAMES - 1])
    assert before is None or set(tasks.iterdir()) == before
    reference = weakref.ref(file)
    file.close()
    del file
    assert reference() is None


@pytest.mark.parametrize("name", ["b_frames.mkv", "hevc.mp4"])
def test_unreferenced_frames_before_the_target_are_not_decoded(videos, name):
    file = VIDEO_READERS["pyav"](videos / name)
    decoded = []
    every = file._decoded
    file._decoded = lambda: (decoded.append(frame.pts) or frame for frame in every())
    expected = decode_all(videos / name)
    assert np.array_equal(file.read([FRAMES - 2])[0], expected[FRAMES - 2])
    assert len(decoded) < FRAMES - 2 - 10  # only those from the keyframe on
    file.close()


@pytest.mark.skipif(not HAS_DECORD, reason="decord has no wheel for this machine")
@pytest.mark.parametrize("name", VIDEOS)
def test_decord_rejects_files_that_it_does_not_read_exactly(videos, name):
    if VIDEOS[name][1]:
        assert load_video(videos / name, config(reader="decord", num_frames=3)).reader == "decord"
    else:
        with pytest.raises(MediaError, match=rf"{name}: decord"):
            load_video(videos / name, config(reader="decord"))
        assert load_video(videos / name, config(num_frames=3)).reader == "pyav"


def test_frames_resemble_the_images_that_were_encoded(videos):
    video = load_video(videos / "h264.mp4", config(num_frames=5))
    images = [np.asarray(picture(i)).astype(int) for i in range(FRAMES)]
    for frame, index in zip(video.frames, video.indices, strict=True):
        assert np.argmin([np.abs(frame - image).mean() for image in images]) == index


@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)], ids=["right", "over", "left"]
)
@pytest.mark.parametrize("reader", ["pyav", "auto"])
def test_rotated_videos_give_upright_frames(tmp_path, matrix, turns, reader):
    path = write_video(tmp_path / "a.mp4")
    plain = load_video(path, config(reader=reader)).frames
    turned = load_video(turn_video(path, matrix), config(reader=reader)).frames
    assert np.array_equal(turned, np.rot90(plain, turns, axes=(1, 2)))


def test_torchcodec_gives_the_same_frames(videos):
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError):
        pytest.skip("torchcodec is not installed, or finds no FFmpeg")
    rejected = []
    for name in VIDEOS:
        try:
            frames = load_video(videos / name, config(reader="torchcodec")).frames
        except MediaError:
            rejected.append(name)
        else:
            assert np.array_equal(frames, load_video(videos / name, config(reader="pyav")).frames), name
    assert set(rejected) <= {name for name, (_, exact) in VIDEOS.items() if not exact}


@pytest.mark.parametrize(
    ("total", "num_frames", "indices"),
    [(8, 4, [0, 2, 5, 7]), (1, 3, [0, 0, 0]), (10, 1, [4]), (3, 3, [0, 1, 2]), (2, 4, [0, 0, 1, 1])],
)
def test_uniform_indices_are_evenly_spaced(total, num_frames, indices):
    assert uniform_indices(total, num_frames) == indices


def test_sampling_by_fps_keyframe_and_span():
    even = [i / 10 for i in range(40)]
    assert fps_indices(even, 2, 99) == [0, 5, 10, 15, 20, 25, 30, 35]
    assert fps_indices(even, 2, 3) == [0, 20, 35]  # thinned out evenly, not cut off
    assert fps_indices(even, 1000, 99) == list(range(40))
    assert fps_indices([0, 0.1, 3, 3.1], 1, 9) == [0, 1, 2]  # uneven times: the frame that is visible at each second
    assert fps_indices([0.0], 2, 9) == [0]
    assert thin_out([3, 4, 5], 5) == [3, 4, 5]
    assert frame_range(even, 1, 2) == range(10, 20)
    assert frame_range(even, None, None) == range(40)
    with pytest.raises(ValueError, match=r"no frame from 9 s"):
        frame_range(even, 9, None)
    assert select_indices(S(3, start=1.0, end=2.0), even, [0]) == [10, 15, 19]
    assert select_indices(S(9, "fps", 2.0, start=3.0), even, [0]) == [30, 35]
    assert select_indices(S(2, "keyframe"), even, [0, 12, 24, 36]) == [0, 36]
    assert select_indices(S(9, "keyframe", start=1.0, end=3.0), even, [0, 12, 24, 36]) == [12, 24]
    with pytest.raises(ValueError, match="no keyframe"):
        select_indices(S(9, "keyframe", start=1.0, end=1.1), even, [0])


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_settings_select_the_frames_of_a_file(videos, reader):
    if reader == "decord" and not HAS_DECORD:
        pytest.skip("decord has no wheel for this machine")

    def indices(name="h264.mp4", **keys) -> tuple[int, ...]:
        return load_video(videos / name, config(reader=reader, **keys)).indices

    expected = [i for i, key in enumerate(_keyframes(videos / "h264.mp4")) if key]
    assert len(expected) > 1
    assert list(indices(sampling="keyframe", num_frames=FRAMES)) == expected
    assert indices(sampling="fps", fps=2, num_frames=99) == (0, 3, 6, 9, 12, 15, 18)  # the file has 6 frames per second
    assert indices(start=1, end=2, num_frames=2) == (6, 11)
    assert indices("uneven.mkv", sampling="fps", fps=1, num_frames=9) == (0, 8, 14, 19)  # by time, not by index


def _keyframes(path: Path) -> list[bool]:
    import av

    with av.open(str(path)) as container:
        return [bool(frame.key_frame) for frame in container.decode(video=0)]


def test_sampled_videos_have_indices_rate_and_duration(videos):
    video = load_video(videos / "h264.mp4", config(num_frames=2))
    assert (video.indices, video.total_frames, video.fps) == ((0, 19), 20, 6.0)
    assert video.duration == pytest.approx(20 / 6)


def test_a_directory_of_images_is_a_video(tmp_path):
    for i in range(12):
        write_image(tmp_path / f"frame_{i}.png", seed=i)
    (tmp_path / "notes.txt").write_text("not an image")
    video = load_video(tmp_path, config(num_frames=3))
    assert (video.reader, video.indices, video.fps, video.total_frames) == ("frames", (0, 6, 11), 1.0, 12)
    for frame, index in zip(video.frames, video.indices, strict=True):
        assert np.array_equal(frame, np.asarray(picture(index)))
    fast = load_video(tmp_path, config(reader="frames", sampling="fps", fps=2, frames_fps=4, num_frames=9))
    assert fast.indices == (0, 2, 4, 6, 8, 10)
    assert fast.duration == 3.0
    write_image(tmp_path / "frame_3.png", size=(10, 10))
    with pytest.raises(MediaError, match=r"frame_3\.png: 10×10 pixels, but the first image has 64×48"):
        load_video(tmp_path, config(num_frames=12))
    (tmp_path / "none").mkdir()
    with pytest.raises(MediaError, match=r"none: the directory has no images"):
        load_video(tmp_path / "none", config())
    with pytest.raises(MediaError, match=r"is a directory, which data\.video\.reader=pyav cannot read"):
        load_video(tmp_path, config(reader="pyav"))
    with pytest.raises(MediaError, match="is not a directory"):
        load_video(tmp_path / "frame_0.png", config(reader="frames"))


@pytest.mark.parametrize("timeout", [None, 60])
def test_embedded_bytes_are_read_and_named(videos, timeout):
    data = (videos / "h264.mp4").read_bytes()
    name = Path("shard.tar/a.mp4")
    video = load_video(name, config(timeout=timeout), data)
    assert np.array_equal(video.frames, load_video(videos / "h264.mp4", config()).frames)
    for broken in (b"", data[: len(data) // 2]):
        with pytest.raises(MediaError, match=r"^shard\.tar/a\.mp4: "):
            load_video(name, config(timeout=timeout), broken)


@pytest.mark.parametrize("reader", ["decord", "pyav", "auto"])
@pytest.mark.parametrize("kind", ["empty", "noise", "truncated", "missing", "pipe", "audio"])
def test_broken_videos_are_errors_that_name_the_file(tmp_path, reader, kind):
    if reader == "decord" and not HAS_DECORD:
        pytest.skip("decord has no wheel for this machine")
    path = tmp_path / "bad.mp4"
    if kind == "truncated":
        data = write_video(path, frames=60).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "audio":
        _write_audio(path)
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else bytes(range(256)) * 40)
    with pytest.raises(MediaError, match=r"bad\.mp4"):
        load_video(path, config(reader=reader))


def _write_audio(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)


def test_too_many_pixels_are_an_error_before_decoding(videos, monkeypatch):
    monkeypatch.setattr("data_pipelines.video.decoding.MAX_BYTES", 64 * 48 * 3 * 4)
    load_video(videos / "h264.mp4", config(num_frames=4))
    with pytest.raises(MediaError, match=r"5 frames of 64×48 pixels take .* lower data\.video\.num_frames"):
        load_video(videos / "h264.mp4", config(num_frames=5))
    monkeypatch.setattr("data_pipelines.video.decoding.MAX_PIXELS", 1000)
    with pytest.raises(MediaError, match=r"64×48 pixels are too large"):
        load_video(videos / "h264.mp4", config(num_frames=1))


def test_only_the_named_reader_imports_its_library(tmp_path):
    """The registries import no reader's library, nor torch; `auto` does not import decord."""
    write_video(tmp_path / "a.mp4", frames=3)
    code = """
import sys
from pathlib import Path
import data_pipelines.formats, data_pipelines.samples, data_pipelines.video
from data_pipelines.video import load_video

heavy = {"torch", "transformers", "decord", "torchcodec", "av", "PIL", "pydantic"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
import data_pipelines.sources
assert not (heavy - {"pydantic"}) & set(sys.modules), heavy & set(sys.modules)
from mmdora.core.config import VideoConfig

path, has_decord = Path(sys.argv[1]), sys.argv[2] == "True"
for reader in ("auto", "pyav"):
    load_video(path, VideoConfig(reader=reader, timeout=None))
assert "av" in sys.modules
assert not {"decord", "torchcodec", "torch"} & set(sys.modules)
if has_decord:
    load_video(path, VideoConfig(reader="decord", timeout=None))
    assert "decord" in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.mp4"), str(HAS_DECORD)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_whose_package_is_missing_is_an_error(monkeypatch):
    monkeypatch.setattr("data_pipelines.video.PACKAGES", {"torchcodec": "no_such_package"})
    with pytest.raises(UserError, match=r"torchcodec is not installed; pip install no_such_package"):
        resolve_reader("torchcodec")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sampling": "fps"}, "'fps' and 'sampling: fps' go together"),
        ({"fps": 2}, "'fps' and 'sampling: fps' go together"),
        ({"start": 3, "end": 2}, "'start' 3 must be before 'end' 2"),
        ({"reader": "pyav", "frames_fps": 2}, "'frames_fps' is for folders of images"),
        ({"timeout": 0}, "greater than 0"),
    ],
)
def test_contradictory_settings_are_errors(keys, message):
    with pytest.raises(ValidationError, match=message):
        VideoConfig(**keys)
