"""Python programs in processes of their own that start with their imports done.

Importing torch, transformers and DeepSpeed takes 10 s of CPU in a fresh interpreter. Here a server imports them once
per test session, and each program is a fork of it. The server itself computes nothing, so that a fork inherits no
threads. Launchers (torchrun, deepspeed) and programs that are about imports start in fresh interpreters instead.
"""

from __future__ import annotations

import atexit
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context, set_start_method
from pathlib import Path

import torch

from tests.conftest import ROOT

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Started:
    """A program that runs: `python ARGUMENTS` in a session of its own.

    Args:
        arguments: those of `python`: a script, `-m module` or `-c code`, and what follows.
        environment: variables in addition to those of this process.
        folder: the working directory.
        max_file_size: bytes; writing more to a file fails (RLIMIT_FSIZE).
        output: a file to which stdout and stderr are appended; otherwise `wait` returns them.
    """

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str] | None = None,
        folder: Path = ROOT,
        max_file_size: int | None = None,
        output: Path | None = None,
    ):
        self.arguments = arguments
        self.files = tempfile.TemporaryDirectory(prefix="mmdora-process-")
        self.printed = [output or Path(self.files.name, name) for name in ("stdout", "stderr")]
        for path in self.printed:
            path.touch()
        variables = {**os.environ, **(environment or {})}
        self.process = CONTEXT.Process(target=_run, args=(arguments, variables, folder, self.printed, max_file_size))
        self.process.start()

    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait(self, limit: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end. Raises AssertionError with the output if it takes longer than `limit` seconds."""
        self.process.join(limit)
        late = self.process.is_alive()
        if late:
            self.kill()
        code = self.process.exitcode
        printed = [path.read_text(encoding="utf-8", errors="replace") for path in self.printed]
        self.files.cleanup()
        assert not late, f"{self.arguments} took longer than {limit} s:\n{printed[0][-3000:]}{printed[1][-3000:]}"
        return subprocess.CompletedProcess(self.arguments, code, *printed)


def python(*arguments: str, limit: float = 300, **settings) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end; see `Started`."""
    return Started(list(arguments), **settings).wait(limit)


def ranks(arguments: list[str], port: str, count: int = 2, **settings) -> list[Started]:
    """Start `python ARGUMENTS` in `count` processes with the variables that torchrun sets."""
    environment = settings.pop("environment", {}) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Started(arguments, environment | place, **settings) for place in places]


def wait_for_all(processes: list[Started], limit: float) -> list[subprocess.CompletedProcess[str]]:
    """Wait for all. When one fails, the others get SIGTERM, and SIGKILL after 30 s, as torchrun ends them."""
    deadline, failed = time.monotonic() + limit, False
    while any(process.running() for process in processes) and time.monotonic() < deadline:
        if not failed and any(process.process.exitcode for process in processes):
            deadline, failed = time.monotonic() + 30, True
            for process in processes:
                process.process.terminate()
        time.sleep(0.05)
    for process in processes:
        if process.running():
            process.kill()
    return [process.wait() for process in processes]


def _run(
    arguments: list[str], variables: dict[str, str], folder: Path, printed: list[Path], max_file_size: int | None
) -> None:
    """Become `python ARGUMENTS`, in a process that the server forked."""
    os.setsid()
    set_start_method("fork", force=True)  # the default on Linux; the server's children inherit "forkserver"
    for descriptor, path in enumerate(printed, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(variables)
    if threads := variables.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # OpenMP read the variable when the server imported torch
    os.chdir(folder)
    if max_file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    try:
        _execute(arguments, folder)
    finally:
        atexit._run_exitfuncs()  # a forked process does not run them on its own


def _execute(arguments: list[str], folder: Path) -> None:
    first, *rest = arguments
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = rest, str(folder)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(folder, first).resolve().parent)
        runpy.run_path(first, run_name="__main__")
