"""Decoding in a child process: a decoder that hangs or crashes costs one video, and no process or file stays open."""

from __future__ import annotations

import multiprocessing
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

from data_pipelines.samples import MediaError
from data_pipelines.video import isolation, load_video
from mmdora.core.config import VideoConfig
from tests import troubled_reader  # noqa: F401  (registers itself)
from tests.media import write_video

ROOT = Path(__file__).parent.parent  # conftest has it too, and imports torch, which spawned processes need not
pytestmark = pytest.mark.skipif(not isolation.AVAILABLE, reason="decoding in a child process needs a POSIX system")
TROUBLED = VideoConfig(reader="troubled", num_frames=3, timeout=30)
SHORT_TIMEOUT = VideoConfig(reader="troubled", num_frames=3, timeout=0.5)


@pytest.fixture
def video(tmp_path) -> Path:
    return write_video(tmp_path / "good.mp4")


@pytest.fixture(autouse=True)
def _stop():
    yield
    isolation.stop()


def broken(folder: Path, behaviour: str) -> Path:
    """Write a file with which the troubled reader hangs, crashes, exits or raises."""
    path = folder / f"{behaviour}.mp4"
    path.write_text(f"{behaviour}\n")
    return path


def child_pids() -> list[int]:
    """Return the decoding processes of this process."""
    children = psutil.Process().children()
    return [
        c.pid for c in children if c.status() != psutil.STATUS_ZOMBIE and "data_pipelines.video.child" in c.cmdline()
    ]


def ends(pid: int, within: float) -> bool:
    """Return whether a process ends within so many seconds; a zombie counts as ended."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_child_gives_the_same_frames_as_this_process(video):
    for keys in ({}, {"num_frames": 40}, {"num_frames": 1, "start": 1.0}, {"sampling": "fps", "fps": 2.0}):
        in_child = load_video(video, VideoConfig(**keys))
        here = load_video(video, VideoConfig(**keys, timeout=None))
        assert np.array_equal(in_child.frames, here.frames)
        assert (in_child.indices, in_child.fps) == (here.indices, here.fps)
        assert in_child.total_frames == here.total_frames
        assert in_child.frames.flags.writeable
    assert len(child_pids()) == 1


def test_without_a_timeout_there_is_no_child(video):
    load_video(video, VideoConfig(timeout=None))
    assert child_pids() == []


@pytest.mark.parametrize(
    ("behaviour", "config", "reason"),
    [
        ("hang", SHORT_TIMEOUT, r"decoding took more than 0\.5 s \(data\.video\.timeout\)"),
        ("hold", SHORT_TIMEOUT, r"decoding took more than 0\.5 s \(data\.video\.timeout\)"),
        ("crash", TROUBLED, r"the decoder crashed \(SIGSEGV\)"),
        ("exit", TROUBLED, r"the decoder crashed \(exit code 3\)"),
        ("raise", TROUBLED, r"troubled cannot decode it \('an error inside the decoder'\)"),
    ],
)
def test_a_failing_decoder_costs_one_video(tmp_path, video, behaviour, config, reason):
    load_video(video, TROUBLED)
    (before,) = child_pids()
    with pytest.raises(MediaError, match=rf"{behaviour}\.mp4: .*{reason}"):
        load_video(broken(tmp_path, behaviour), config)
    if behaviour != "raise":
        assert ends(before, 5)
    assert load_video(video, TROUBLED).total_frames == 12


def test_a_killed_child_is_replaced(video):
    load_video(video, TROUBLED)
    (child,) = child_pids()
    os.kill(child, signal.SIGKILL)
    assert ends(child, 5)
    assert load_video(video, TROUBLED).total_frames == 12


def test_the_answer_to_an_interrupted_request_is_discarded(tmp_path, video):
    """After Ctrl-C in a notebook, the next video gets its own frames."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    load_video(video, TROUBLED)
    other = write_video(tmp_path / "other.mp4", frames=30)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            load_video(broken(tmp_path, "hang"), TROUBLED)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert load_video(other, TROUBLED).total_frames == 30
    assert load_video(video, TROUBLED).total_frames == 12


def test_no_file_descriptor_or_process_stays_open(tmp_path, video):
    load_video(video, TROUBLED)
    load_video(video, VideoConfig(num_frames=3))
    isolation.stop()
    process = psutil.Process()
    before = process.num_fds()
    for behaviour in ("crash", "exit"):
        with pytest.raises(MediaError):
            load_video(broken(tmp_path, behaviour), TROUBLED)
        load_video(video, TROUBLED)
    child = psutil.Process(*child_pids())
    in_child = child.num_fds()
    for _ in range(20):
        load_video(video, TROUBLED)
    assert child.num_fds() == in_child
    isolation.stop()
    assert process.num_fds() == before
    assert child_pids() == []


def test_threads_take_turns(video):
    expected = load_video(video, TROUBLED).frames
    equal: list[bool] = []
    threads = [
        threading.Thread(target=lambda: equal.append(np.array_equal(load_video(video, TROUBLED).frames, expected)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 8


PARENT = """
import sys
from pathlib import Path
from data_pipelines.video import load_video
from mmdora.core.config import VideoConfig
from tests.test_isolation import child_pids
load_video(Path(sys.argv[1]), VideoConfig(reader="troubled", timeout=30))
print(*child_pids(), flush=True)
load_video(Path(sys.argv[2]), VideoConfig(reader="troubled", timeout=float(sys.argv[3])))
"""


# A decoder that holds the interpreter lock is ended by a timer of the kernel, a few seconds after its timeout.
@pytest.mark.parametrize(("behaviour", "timeout", "within"), [("hang", 600, 5), ("hold", 0.5, 60)])
def test_the_child_dies_with_its_parent(tmp_path, video, behaviour, timeout, within):
    command = [sys.executable, "-c", PARENT, str(video), str(broken(tmp_path, behaviour)), str(timeout)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not ends(child, 0.3)
        parent.kill()
    assert ends(child, within)


class Videos:
    """A dataset whose items are the pid of this process, the pid of its child, and whether the frames are right."""

    def __init__(self, path: Path, expected: np.ndarray):
        self.path, self.expected = path, expected

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[int, int, bool]:
        frames = load_video(self.path, VideoConfig(num_frames=3)).frames
        (child,) = child_pids()
        return os.getpid(), child, np.array_equal(frames, self.expected)


def send_item(videos: Videos, results: multiprocessing.Queue) -> None:
    """Send an item from a process that may have no multiprocessing children, as DataLoader's workers."""
    results.put(videos[0])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_each_worker_has_a_child_of_its_own(video, start):
    expected = load_video(video, VideoConfig(num_frames=3)).frames
    (own,) = child_pids()
    videos = Videos(video, expected)
    if start == "fork":
        from torch.utils.data import DataLoader

        items = list(DataLoader(videos, batch_size=None, num_workers=2, multiprocessing_context=start))
    else:  # without DataLoader, so that the workers need not import torch
        context = multiprocessing.get_context(start)
        results = context.Queue()
        workers = [context.Process(target=send_item, args=(videos, results), daemon=True) for _ in range(2)]
        for worker in workers:
            worker.start()
        items = [results.get(timeout=120) for _ in workers]
        for worker in workers:
            worker.join()
    assert all(right for _, _, right in items)
    assert len({child for _, child, _ in items}) == 2
    assert own not in {child for _, child, _ in items}
    for pid in {pid for item in items for pid in item[:2]}:
        assert ends(pid, 10)
    assert np.array_equal(load_video(video, VideoConfig(num_frames=3)).frames, expected)  # the first child still works
    assert child_pids() == [own]


def test_the_child_starts_without_torch():
    heavy = {"torch", "transformers", "pydantic", "PIL"}
    code = f"import sys; import data_pipelines.video.child; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""
