"""The Typer app, the options that several commands share, and `main` with its error reporting and exit codes."""

from __future__ import annotations

import errno
import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="mmdora",
    help="Fine-tune vision-language models with DoRA and evaluate them with confidence intervals.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # typer's rich mode alone takes half a second to import
    pretty_exceptions_enable=False,
)

# Most errors occur in every process. Ranks above 0 wait this many seconds, so that rank 0 reports the error first and
# the launcher then ends the other processes.
SHARED_ERROR = 3.0

Config = Annotated[str, typer.Argument(help="YAML file, or the name of a shipped config such as quickstart.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Settings to override.")]
Target = Annotated[str, typer.Argument(help="Run directory, adapter directory, model directory or hub id.")]
Split = Annotated[str | None, typer.Option(help="Split of the benchmark. Default: its first split.")]
JsonOutput = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished result.")]
JudgeUrl = Annotated[str | None, typer.Option(help="OpenAI-compatible URL of the judge, for judged benchmarks.")]
JudgeModel = Annotated[str | None, typer.Option(help="Name of the judge's model at that URL.")]
Verdicts = Annotated[str | None, typer.Option(help="JSON lines file of verdicts, instead of a judge.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", help="Python module to import first; repeatable.")]
NewModel = Annotated[Path, typer.Argument(help="Directory of the new model; new or empty.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 invalid input, 130 interrupted."""
    from mmdora.core.errors import RunError, UserError

    # bitsandbytes warns about a missing package when it is imported on a CPU, with or without a quantized model.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(arguments)
    except UserError as error:
        _exit_with_error(str(error), 2)
    except RunError as error:
        _exit_with_error(str(error), 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        path = error.filename or "the run"
        _exit_with_error(f"no disk space left on device while writing {path}; free some and continue with --resume", 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _exit_with_error(message: str, code: int) -> None:
    from mmdora.core.distributed import rank

    if rank():
        time.sleep(SHARED_ERROR)
    sys.stderr.write(f"error{f' (rank {rank()})' if rank() else ''}: {message}\n")
    sys.exit(code)
