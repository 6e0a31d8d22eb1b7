"""Who says what where: rank 0 speaks on the terminal, every process writes `logs/rank-N.log` in the run directory."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

from mmdora.core.distributed import is_main, rank, world_size

OURS = ("mmdora", "data_pipelines", "eval")  # whose notes are kept too; of others warnings are
TALKATIVE = ("transformers", "accelerate", "DeepSpeed")  # on the terminal only their errors
KEPT_BEFORE = 10_000  # records, before there is a run directory to write them in

log = logging.getLogger("mmdora")


class Terminal(logging.StreamHandler):
    """Warnings on whatever `sys.stderr` is at the time: a live display puts itself there."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.WARNING)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.name.partition(".")[0] not in TALKATIVE


class RunLogs:
    """Records of this process: kept in memory until `into` names the run directory."""

    def __init__(self) -> None:
        self.memory = MemoryHandler(KEPT_BEFORE, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self.file: logging.FileHandler | None = None

    def into(self, run: Path) -> None:
        folder = run / "logs"
        folder.mkdir(exist_ok=True)
        self.file = logging.FileHandler(folder / f"rank-{rank()}.log", encoding="utf-8")
        self.file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.memory.setTarget(self.file)
        self.memory.flush()
        self.memory.capacity = 1  # from now on each record at once
        log.info("process %d of %d, pid %d on %s", rank(), world_size(), os.getpid(), platform.node())


@contextmanager
def logged() -> Iterator[RunLogs]:
    """Inside the block logging and warnings, those of transformers, accelerate and DeepSpeed too, go to the log file of
    this process, and on rank 0 to the terminal."""
    logs = RunLogs()
    root = logging.getLogger()
    handlers: list[logging.Handler] = [logs.memory] + ([Terminal()] if is_main() else [])
    before = {name: _state(logging.getLogger(name)) for name in (*OURS, *TALKATIVE)}
    for handler in handlers:
        root.addHandler(handler)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    for name in TALKATIVE:
        _restore(logging.getLogger(name), (logging.WARNING, True, []))
    logging.captureWarnings(True)
    try:
        yield logs
    finally:
        logging.captureWarnings(False)
        for name, state in before.items():
            _restore(logging.getLogger(name), state)
        for handler in handlers:
            root.removeHandler(handler)
        logs.memory.close()
        if logs.file is not None:
            logs.file.close()


def _state(logger: logging.Logger) -> tuple[int, bool, list[Any]]:
    return logger.level, logger.propagate, list(logger.handlers)


def _restore(logger: logging.Logger, state: tuple[int, bool, list[Any]]) -> None:
    level, logger.propagate, logger.handlers = state
    logger.setLevel(level)
