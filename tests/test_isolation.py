"""Decoding in a process of its own: a decoder that hangs or crashes costs one video, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from data_pipelines.samples import MediaError
from data_pipelines.video import isolation, load_video
from mmdora.core.config import VideoConfig
from tests import troubled_reader  # noqa: F401  (registers itself)
from tests.conftest import ROOT
from tests.media import write_video

pytestmark = pytest.mark.skipif(not isolation.AVAILABLE, reason="decoding apart needs a POSIX system")
TROUBLED = VideoConfig(reader="troubled", num_frames=3, timeout=30)
HASTY = VideoConfig(reader="troubled", num_frames=3, timeout=1)


@pytest.fixture
def clip(tmp_path) -> Path:
    return write_video(tmp_path / "good.mp4")


@pytest.fixture(autouse=True)
def _stop():
    yield
    isolation.stop()


def broken(folder: Path, how: str) -> Path:
    path = folder / f"{how}.mp4"
    path.write_text(f"{how}\n")
    return path


def gone(pid: int, within: float) -> bool:
    """Whether a process ends (an orphan that nobody waits for counts as ended)."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_frames_are_those_of_this_process(clip):
    for keys in ({}, {"num_frames": 40}, {"num_frames": 1, "start": 1.0}, {"sampling": "fps", "fps": 2.0}):
        apart = load_video(clip, VideoConfig(**keys))
        here = load_video(clip, VideoConfig(**keys, timeout=None))
        assert np.array_equal(apart.frames, here.frames)
        assert (apart.indices, apart.fps, apart.total_frames) == (here.indices, here.fps, here.total_frames)
        assert apart.frames.flags.writeable
    assert isolation._decoder is not None


def test_no_limit_means_no_process(clip):
    load_video(clip, VideoConfig(timeout=None))
    assert isolation._decoder is None


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("hang", r"decoding took over 1 s \(data\.video\.timeout\)"),
        ("hold", r"decoding took over 1 s \(data\.video\.timeout\)"),
        ("crash", r"the decoder crashed \(SIGSEGV\)"),
        ("exit", r"the decoder crashed \(exit code 3\)"),
        ("odd", r"troubled cannot decode it \(\"a decoder's own mistake\"\)|a decoder's own mistake"),
    ],
)
def test_trouble_costs_one_video(tmp_path, clip, how, reason):
    load_video(clip, TROUBLED)
    assert isolation._decoder is not None
    before = isolation._decoder.pid
    with pytest.raises(MediaError, match=rf"{how}\.mp4: .*{reason}"):
        load_video(broken(tmp_path, how), HASTY)
    if how != "odd":
        assert gone(before, 5)
    assert load_video(clip, TROUBLED).total_frames == 12  # the run goes on


def test_a_child_that_was_killed_is_replaced(clip):
    load_video(clip, TROUBLED)
    assert isolation._decoder is not None
    os.kill(isolation._decoder.pid, signal.SIGKILL)
    assert gone(isolation._decoder.pid, 5)
    assert load_video(clip, TROUBLED).total_frames == 12


def test_an_interrupted_request_is_not_answered_later(tmp_path, clip):
    """As by Ctrl-C in a notebook: the next video gets its own frames."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    load_video(clip, TROUBLED)
    other = write_video(tmp_path / "other.mp4", frames=30)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            load_video(broken(tmp_path, "hang"), TROUBLED)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert load_video(other, TROUBLED).total_frames == 30
    assert load_video(clip, TROUBLED).total_frames == 12


def test_nothing_is_left_open(tmp_path, clip):
    load_video(clip, TROUBLED)
    load_video(clip, VideoConfig(num_frames=3))
    isolation.stop()
    me = psutil.Process()
    before = me.num_fds()
    for how in ("crash", "exit"):
        for _ in range(3):
            with pytest.raises(MediaError):
                load_video(broken(tmp_path, how), TROUBLED)
            load_video(clip, TROUBLED)
    child = psutil.Process(isolation._decoder.pid)
    held = child.num_fds()
    for _ in range(20):
        load_video(clip, TROUBLED)
    assert child.num_fds() == held
    isolation.stop()
    assert me.num_fds() == before
    assert not [c for c in me.children() if "data_pipelines.video.child" in c.cmdline()]


def test_threads_take_turns(clip):
    expected = load_video(clip, TROUBLED).frames
    found: list[bool] = []
    work = [
        threading.Thread(target=lambda: found.append(np.array_equal(load_video(clip, TROUBLED).frames, expected)))
        for _ in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert found == [True] * 8


RUN = """
import sys
from pathlib import Path
from data_pipelines.video import isolation, load_video
from mmdora.core.config import VideoConfig
from tests import troubled_reader
load_video(Path(sys.argv[1]), VideoConfig(reader="troubled", timeout=30))
print(isolation._decoder.pid, flush=True)
load_video(Path(sys.argv[2]), VideoConfig(reader="troubled", timeout=float(sys.argv[3])))
"""


# A decoder that holds the interpreter's lock is ended by the kernel's timer, a few seconds after its time is up.
@pytest.mark.parametrize(("how", "timeout", "within"), [("hang", 600, 5), ("hold", 1, 60)])
def test_the_child_dies_with_its_parent(tmp_path, clip, how, timeout, within):
    command = [sys.executable, "-c", RUN, str(clip), str(broken(tmp_path, how)), str(timeout)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child, 0.3)
        parent.kill()
    assert gone(child, within)


class Clips(Dataset):
    """Per item: this process, its child, and whether the frames are right."""

    def __init__(self, path: Path, expected: np.ndarray):
        self.path, self.expected = path, expected

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, int, bool]:
        frames = load_video(self.path, VideoConfig(num_frames=3)).frames
        assert isolation._decoder is not None
        return os.getpid(), isolation._decoder.pid, np.array_equal(frames, self.expected)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_each_worker_has_a_child_of_its_own(clip, start):
    expected = load_video(clip, VideoConfig(num_frames=3)).frames
    assert isolation._decoder is not None
    ours = isolation._decoder.pid
    workers = DataLoader(Clips(clip, expected), batch_size=None, num_workers=2, multiprocessing_context=start)
    rows = list(workers)
    assert all(right for _, _, right in rows)
    assert len({child for _, child, _ in rows}) == 2
    assert ours not in {child for _, child, _ in rows}
    del workers
    for pid in {pid for row in rows for pid in row[:2]}:
        assert gone(pid, 10)
    assert np.array_equal(load_video(clip, VideoConfig(num_frames=3)).frames, expected)  # ours still serves
    assert isolation._decoder.pid == ours


def test_the_child_starts_without_torch():
    heavy = {"torch", "transformers", "pydantic"}
    code = f"import sys; import data_pipelines.video.child; print(*{heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == ""
