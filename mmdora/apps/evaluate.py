"""`mmdora eval`: evaluate a run on its own `evaluation` entries, or any model on any benchmark."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data_pipelines.encoding import Encoder
from eval.benchmarks import BENCHMARKS
from eval.contamination import comparison
from eval.digests import weights_digest
from eval.dual_encoders import load_dual_encoder
from eval.features import evaluate_by_features
from eval.run import evaluate, read_questions
from mmdora.apps.load_target import load_target
from mmdora.apps.tables import results_table
from mmdora.core.config import EvaluationConfig, JudgeConfig, RunConfig
from mmdora.core.config_files import parse_section
from mmdora.core.console import make_console, progress_bar
from mmdora.core.distributed import is_main, local_rank, world_size
from mmdora.core.errors import UserError
from mmdora.core.interrupts import interruptible
from mmdora.core.logs import quiet_libraries
from mmdora.core.registry import nearest
from mmdora.core.run_directory import RunDir

log = logging.getLogger(__name__)
TIMEOUT = timedelta(days=30)  # a process that has answered its share waits this long for the others


@dataclass(frozen=True)
class Request:
    """The arguments of the command line."""

    target: str
    only: str | None = None
    benchmark: str | None = None
    data: str | None = None
    format: str | None = None
    split: str | None = None
    prompt: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    out: Path | None = None
    overwrite: bool = False
    judge: JudgeConfig | None = None


def run(request: Request, trust_remote_code: bool) -> None:
    """Evaluate, print the results and write them to `--out` or the run's `eval` folder. Raises UserError."""
    quiet_libraries()
    console = make_console()
    run_dir = RunDir(Path(request.target))
    config = run_dir.config() if run_dir.config_file.is_file() else None
    entries = [override_entry(entry, request) for entry in choose_entries(request, config)]
    out = request.out or (run_dir.path / "eval" if config else None)
    if out is None:
        raise UserError(f"{request.target} is not a run; give --out, the folder for the results")
    with interruptible(lambda: f"the answers so far are kept in {out}; the same command continues from them"):
        if request.benchmark is not None and BENCHMARKS[request.benchmark].compares_features:
            reports = evaluate_features(console, entries[0], request, trust_remote_code, out)
        else:
            reports = evaluate_answers(console, entries, config, request, trust_remote_code, out)
    if reports:
        console.print(results_table([(report, None) for report in reports]))
        console.print(f"Results are in {out}", soft_wrap=True)


def evaluate_answers(
    console: Console,
    entries: list[EvaluationConfig],
    config: RunConfig | None,
    request: Request,
    trust_remote_code: bool,
    out: Path,
) -> list[dict[str, Any]]:
    """Evaluate a model that generates text; returns a report per entry. `config` is the run's, if the target is one."""
    questions = {entry.name: read_questions(entry) for entry in entries}
    reports = []
    with process_group():
        # A run defines its dtype. Other models are fastest in float32 on a CPU.
        loaded = load_target(request.target, trust_remote_code, None if torch.cuda.is_available() else "float32")
        encoder, weights = Encoder(loaded.processor, loaded.video), weights_digest(loaded.model)
        contamination = None
        if config is not None:
            contamination = comparison(config.data.train, config.training.seed, entries, questions)
        for entry in entries:
            with progress_bar(console, entry.name, len(questions[entry.name])) as advance:
                report = evaluate(
                    loaded.model,
                    encoder,
                    entry,
                    questions[entry.name],
                    out / entry.name,
                    advance,
                    origin={"target": request.target},
                    overwrite=request.overwrite,
                    weights=weights,
                    contamination=contamination,
                )
            reports.append(report)
    return reports


def evaluate_features(
    console: Console, entry: EvaluationConfig, request: Request, trust_remote_code: bool, out: Path
) -> list[dict[str, Any]]:
    """Evaluate a model with text and image features on a retrieval benchmark; returns its report.

    This is fast: under torchrun rank 0 does all of it, and the other processes return an empty list.
    """
    if not is_main():
        return []
    questions = read_questions(entry, by_features=True)
    encoder = load_dual_encoder(request.target, trust_remote_code)
    with progress_bar(console, entry.name, len(questions)) as advance:
        origin, folder = {"target": request.target}, out / entry.name
        return [evaluate_by_features(encoder, entry, questions, folder, advance, origin, request.overwrite)]


@contextmanager
def process_group() -> Iterator[None]:
    """Under torchrun, join the processes that share the questions, and use this process's own GPU."""
    if world_size() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    torch.distributed.init_process_group("gloo", timeout=TIMEOUT)  # for barriers only: answers are exchanged as files
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def choose_entries(request: Request, config: RunConfig | None) -> list[EvaluationConfig]:
    """Return the entries to evaluate. Raises UserError if the command line does not define them."""
    if request.benchmark is not None:
        if request.data is None:
            raise UserError("--benchmark needs --data, the folder or file with its questions")
        name = request.only or request.benchmark
        entry = {"name": name, "benchmark": request.benchmark, "data": request.data}
        return [parse_section(EvaluationConfig, entry, "the command line")]
    if config is None:
        raise UserError(f"{request.target} is not a run; give --benchmark NAME --data DIR --out DIR")
    names = [entry.name for entry in config.evaluation]
    if request.only is not None and request.only not in names:
        raise UserError(
            f"--only {request.only}: the run has no such entry.{nearest(request.only, names)} It has: {names}"
        )
    entries = [e for e in config.evaluation if request.only in (None, e.name)]
    if not entries:
        raise UserError(f"{request.target}: its config has no `evaluation`; give --benchmark NAME --data DIR")
    return entries


def override_entry(entry: EvaluationConfig, request: Request) -> EvaluationConfig:
    """Return the entry with the command line's settings.

    A run may come from someone else, so the judge address in its config is used only if the command line repeats it:
    otherwise it would receive the answers and the API key.
    """
    changes = {key: getattr(request, key) for key in ("format", "split", "prompt", "limit", "batch_size", "judge")}
    changes = {key: value for key, value in changes.items() if value is not None}
    if request.judge is None and entry.judge is not None and entry.judge.url is not None:
        log.warning("%s: the judge at %s is not used unless --judge-url repeats it", entry.name, entry.judge.url)
        changes["judge"] = None
    return parse_section(EvaluationConfig, entry.model_dump() | changes, "the command line")
