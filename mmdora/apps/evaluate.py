"""`mmdora eval`: score a run's own benchmarks, or any benchmark on any model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from data_pipelines.encoding import Encoder
from eval.benchmarks import BENCHMARKS
from eval.contamination import contamination_check
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
from mmdora.core.registry import nearest
from mmdora.core.run_directory import RunDir

log = logging.getLogger(__name__)
PATIENCE = timedelta(days=30)  # of a process that has answered its share, for the others


@dataclass(frozen=True)
class Request:
    """The command line."""

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
    console = make_console()
    run_dir = RunDir(Path(request.target))
    config = run_dir.config() if run_dir.config_file.is_file() else None
    entries = [as_requested(entry, request) for entry in choose(request, config)]
    out = request.out or (run_dir.path / "eval" if config else None)
    if out is None:
        raise UserError(f"{request.target} is not a run; say with --out where the results go")
    if request.benchmark is not None and BENCHMARKS[request.benchmark].compares_features:
        run_by_features(entries[0], request, trust_remote_code, out)
        return
    questions = {entry.name: read_questions(entry) for entry in entries}

    with processes():
        # A run says in which dtype it computes. Any other is quickest in fp32 on a CPU.
        loaded = load_target(request.target, trust_remote_code, None if torch.cuda.is_available() else "float32")
        encoder, weights = Encoder(loaded.processor, loaded.video), weights_digest(loaded.model)
        contamination = None
        if config is not None:
            contamination = contamination_check(config.data.train, config.training.seed, entries, questions)
        reports = []
        for entry in entries:
            asked, origin = questions[entry.name], {"target": request.target}
            with progress_bar(console, entry.name, len(asked)) as advance:
                report = evaluate(
                    loaded.model,
                    encoder,
                    entry,
                    asked,
                    out / entry.name,
                    advance,
                    origin,
                    overwrite=request.overwrite,
                    weights=weights,
                    contamination=contamination,
                )
                reports.append(report)
    console.print(results_table([(report, None) for report in reports]))
    console.print(f"Results are in {out}", soft_wrap=True)


def run_by_features(entry: EvaluationConfig, request: Request, trust_remote_code: bool, out: Path) -> None:
    """For a benchmark of retrieval: the target is a model with text and image features. It is quick, and under torchrun
    one process does it all."""
    if not is_main():
        return
    asked, console, folder = read_questions(entry, by_features=True), make_console(), out / entry.name
    encoder = load_dual_encoder(request.target, trust_remote_code)
    with progress_bar(console, entry.name, len(asked)) as advance:
        origin = {"target": request.target}
        report = evaluate_by_features(encoder, entry, asked, folder, advance, origin, request.overwrite)
    console.print(results_table([(report, None)]))
    console.print(f"Results are in {out}", soft_wrap=True)


@contextmanager
def processes() -> Iterator[None]:
    """Under torchrun, make this process one of those that share the questions out, with a GPU of its own."""
    if world_size() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)  # they only wait for each other; files say the rest
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def choose(request: Request, config: RunConfig | None) -> list[EvaluationConfig]:
    """The entries to score. Raises UserError where the command line does not say what."""
    if request.benchmark is not None:
        if request.data is None:
            raise UserError("--benchmark needs --data, the folder or file with its questions")
        name = request.only or request.benchmark
        entry = {"name": name, "benchmark": request.benchmark, "data": request.data}
        return [parse_section(EvaluationConfig, entry, "the command line")]
    if config is None:
        raise UserError(f"{request.target} is not a run; say --benchmark NAME --data DIR --out DIR")
    names = [entry.name for entry in config.evaluation]
    if request.only is not None and request.only not in names:
        raise UserError(
            f"--only {request.only}: the run has no such entry.{nearest(request.only, names)} It has: {names}"
        )
    entries = [e for e in config.evaluation if request.only in (None, e.name)]
    if not entries:
        raise UserError(f"{request.target}: its config has no `evaluation`; say --benchmark NAME --data DIR")
    return entries


def as_requested(entry: EvaluationConfig, request: Request) -> EvaluationConfig:
    """The entry with the command line's changes. A run may come from elsewhere: the address of a judge in its config
    gets no answers, and no key, unless it is given again."""
    changes = {key: getattr(request, key) for key in ("format", "split", "prompt", "limit", "batch_size", "judge")}
    changes = {key: value for key, value in changes.items() if value is not None}
    if request.judge is None and entry.judge is not None and entry.judge.url is not None:
        log.warning("%s: its judge at %s is not asked unless it is given again", entry.name, entry.judge.url)
        changes["judge"] = None
    return parse_section(EvaluationConfig, entry.model_dump() | changes, "the command line")
