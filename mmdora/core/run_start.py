"""Begin a run, so that a start which fails before training leaves no run directory behind."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from types import TracebackType

import yaml

from mmdora.core.atomic import clear_leftovers
from mmdora.core.config import RunConfig
from mmdora.core.config_files import dump_config, parse_config
from mmdora.core.distributed import is_main, run_on_main
from mmdora.core.errors import UserError
from mmdora.core.logs import RunLogs, log_file
from mmdora.core.resuming import check_resumable
from mmdora.core.run_directory import RunDir

log = logging.getLogger(__name__)


class RunStart:
    """Everything that happens before the first optimizer step.

        with RunStart(run, config, resume, overwrite, logs) as start:
            ...             # load data and model; there is no run directory yet
            start.create()  # make it, or move an old run aside (--overwrite)
            ...             # evaluate the base model, inject adapters, build the trainer

    Entering checks that the run may begin, and changes nothing. If the block fails, Ctrl-C included, the disk is put
    back: a new directory is removed, an old run that was moved aside gets its name back, and a resumed run its config.

    There is one exception. Answers of the base model (`before: true`) may have taken hours, so a directory that holds
    some is kept, and the same command, corrected or not, continues from it without `--resume`. Answers are stored under
    a key of weights, prompt, media and settings, so those that a correction invalidates are generated again. A start
    that was killed outright is continued likewise, unless its process still runs: it holds a lock on its log file.

    Rank 0 changes the disk. Entering and `create` are collectives: all processes succeed, or raise the same error.
    """

    def __init__(self, run: RunDir, config: RunConfig, resume: bool, overwrite: bool, logs: RunLogs):
        self.run, self.config, self.resume, self.overwrite, self.logs = run, config, resume, overwrite, logs
        self.outcome = "training has not begun, and nothing was written"  # after a failure, for the user
        self.created = False  # whether there is something to undo
        self.was_empty = True
        self.keeps_answers = False
        self.moved_aside: Path | None = None
        self.previous_config: str | None = None  # of the run that is resumed

    def __enter__(self) -> RunStart:
        run_on_main(self.check)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None and self.created:
            self.logs.close()
            if is_main():
                self._undo()
                if self.keeps_answers and not isinstance(error, KeyboardInterrupt):
                    log.warning("%s", self.outcome)

    def create(self) -> None:
        """Create the run directory with its config, and open the log files. Raises UserError."""
        run_on_main(self._create)
        if not is_main():
            self.created = True
            self.logs.open(self.run.path)

    def check(self) -> None:
        """Raise UserError if the run may not begin. A resumed run is only repaired (`clear_leftovers`)."""
        if self.resume and self.overwrite:
            raise UserError("--resume continues an existing run and --overwrite moves it aside: give one of them")
        path = self.run.path
        if path.exists() and not path.is_dir():
            raise UserError(f"training.output: {path} is a file")
        if self.resume:
            clear_leftovers(path)
            clear_leftovers(self.run.checkpoints)
            if self.run.config_file.exists() and self.run.has_trained():
                tree = yaml.safe_load(self.run.config_file.read_text(encoding="utf-8"))
                check_resumable(parse_config(tree, str(self.run.config_file)), self.config, path)
        elif not self.run.is_empty() and not self.overwrite and not self._may_continue_start():
            raise UserError(
                f"{path} already holds a run; --resume continues it, --overwrite moves it aside, "
                "or give another training.output"
            )
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"training.output: cannot create {path} ({parent} is not a writable directory)")

    def _may_continue_start(self) -> bool:
        """Return whether the directory is what a failed start left, and its process is gone."""
        if self.run.has_trained() or not log_file(self.run.path, 0).is_file():
            return False
        with log_file(self.run.path, 0).open("a", encoding="utf-8") as file:
            return try_lock(file.fileno()) is True

    def _create(self) -> None:
        self.check()  # again: another process may have begun a run here since
        run, path = self.run, self.run.path
        self.was_empty, exists = run.is_empty(), path.exists()
        if self.resume:
            self.previous_config = run.config_file.read_text(encoding="utf-8") if run.config_file.exists() else None
        elif not self.was_empty and not self._may_continue_start():
            aside = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            path.rename(aside)
            self.moved_aside, exists = aside, False
        busy = UserError(f"{path}: another process has just begun a run here; give another training.output")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=exists)
        except FileExistsError:
            raise busy from None
        except OSError as error:
            raise UserError(f"training.output: cannot create {path} ({error.strerror})") from error
        self.logs.open(path)
        if try_lock(self.logs.descriptor()) is False and not self.resume:
            raise busy
        self.created = True
        clear_leftovers(path)
        clear_leftovers(run.checkpoints)
        self._write_config(dump_config(self.config))
        if self.resume:
            run.skipped.touch()
        else:
            run.skipped.write_bytes(b"")

    def _write_config(self, text: str) -> None:
        aside = self.run.config_file.with_suffix(".new")
        aside.write_text(text, encoding="utf-8")
        aside.replace(self.run.config_file)

    def _undo(self) -> None:
        """Put the disk back as it was before `create`, or keep the base model's answers, and say so in `outcome`."""
        path = self.run.path
        if self.resume and not self.was_empty:
            if self.previous_config is not None:
                self._write_config(self.previous_config)
            self.outcome = f"{path} is as it was; the same command continues"
        elif self.run.has_base_answers():
            self.keeps_answers = True
            self.outcome = f"the base model's answers so far are kept in {path}; the same command continues from them"
        else:
            shutil.rmtree(path, ignore_errors=True)
            if self.moved_aside is not None and not path.exists():
                self.moved_aside.rename(path)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open, writable file until it is closed or this process ends.

    Returns False if another process holds the lock, and None if the system or file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True
