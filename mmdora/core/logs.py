"""Logging of a run: rank 0 prints warnings on the terminal, and every process writes `logs/rank-N.log`."""

from __future__ import annotations

import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

from mmdora.core.deepspeed import quiet_deepspeed
from mmdora.core.distributed import is_main, rank, world_size
from mmdora.core.errors import UserError

OWN_LOGGERS = ("mmdora", "data_pipelines", "eval")  # logged from INFO on
LIBRARY_LOGGERS = ("transformers", "accelerate", "DeepSpeed")  # logged from WARNING on; the terminal shows errors only
BUFFERED = 10_000  # records kept until the run directory exists

log = logging.getLogger("mmdora")


def quiet_libraries() -> None:
    """Turn off progress bars and warnings of transformers, torch, accelerate and DeepSpeed on the terminal.

    Commands that load a model call this. It imports torch and transformers, so commands that need neither do not.
    """
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    quiet_deepspeed()
    warnings.filterwarnings("ignore", module=r"torch|deepspeed|transformers|accelerate")


class TerminalHandler(logging.StreamHandler):
    """Prints warnings to the current `sys.stderr`, which a live progress display replaces."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.WARNING)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.name.partition(".")[0] not in LIBRARY_LOGGERS


class RunLogs:
    """This process's log records. They stay in memory until `open`; a start that fails before it writes nothing."""

    def __init__(self) -> None:
        self.memory = MemoryHandler(BUFFERED, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self.file: logging.FileHandler | None = None

    def open(self, run: Path) -> None:
        """Write all records, past and future, to `logs/rank-N.log` in an existing run directory. Raises UserError."""
        if not run.is_dir():
            raise UserError(f"training.output: {run} is not on {platform.node()}; all machines must share this folder")
        (run / "logs").mkdir(exist_ok=True)
        self.file = logging.FileHandler(log_file(run, rank()), encoding="utf-8")
        self.file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.memory.setTarget(self.file)
        self.memory.flush()
        self.memory.capacity = 1  # write every later record at once
        log.info("process %d of %d, pid %d on %s", rank(), world_size(), os.getpid(), platform.node())

    def descriptor(self) -> int:
        """Return the file descriptor of the open log file."""
        assert self.file is not None
        assert self.file.stream is not None
        return self.file.stream.fileno()

    def close(self) -> None:
        """Close the log file; later records are kept in memory again."""
        if self.file is not None:
            self.memory.setTarget(None)
            self.memory.capacity = BUFFERED
            self.file.close()
            self.file = None


def log_file(run: Path, rank: int) -> Path:
    return run / "logs" / f"rank-{rank}.log"


@contextmanager
def logged() -> Iterator[RunLogs]:
    """Send logging and warnings, including those of libraries, to this process's RunLogs, and in rank 0 to the
    terminal."""
    logs = RunLogs()
    root = logging.getLogger()
    handlers: list[logging.Handler] = [logs.memory] + ([TerminalHandler()] if is_main() else [])
    before = {name: _state(logging.getLogger(name)) for name in (*OWN_LOGGERS, *LIBRARY_LOGGERS)}
    for handler in handlers:
        root.addHandler(handler)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    capture_libraries()
    logging.captureWarnings(True)
    try:
        yield logs
    finally:
        logging.captureWarnings(False)
        for name, state in before.items():
            _restore(logging.getLogger(name), state)
        for handler in handlers:
            root.removeHandler(handler)
        logs.close()
        logs.memory.close()


def capture_libraries() -> None:
    """Pass warnings of libraries on to the handlers of `logged`. Call it again once the libraries are imported: they
    set up their loggers then."""
    for name in LIBRARY_LOGGERS:
        _restore(logging.getLogger(name), (logging.WARNING, True, []))


def _state(logger: logging.Logger) -> tuple[int, bool, list[Any]]:
    return logger.level, logger.propagate, list(logger.handlers)


def _restore(logger: logging.Logger, state: tuple[int, bool, list[Any]]) -> None:
    level, logger.propagate, logger.handlers = state
    logger.setLevel(level)
