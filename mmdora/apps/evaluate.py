"""`mmdora eval`: evaluate a run on its own `evaluation` entries, or any model on any benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data_pipelines.encoding import Encoder
from eval.contamination import contamination_check
from eval.digests import weights_digest
from eval.dual_encoders import load_dual_encoder
from eval.features import evaluate_by_features
from eval.run import evaluate, read_questions
from mmdora.apps.check_media import check_text_only
from mmdora.apps.evaluation_request import Request
from mmdora.apps.load_target import load_target
from mmdora.apps.tables import results_table
from mmdora.core.config import EvaluationConfig, RunConfig
from mmdora.core.console import make_console, progress_bar
from mmdora.core.distributed import is_main, local_rank, world_size
from mmdora.core.interrupts import interruptible
from mmdora.core.logs import quiet_libraries

TIMEOUT = timedelta(days=30)  # a process that has answered its share waits this long for the others


def run(request: Request, trust_remote_code: bool) -> None:
    """Evaluate, print the results and write them to `--out` or the run's `eval` folder. Raises UserError."""
    quiet_libraries()
    console = make_console()
    config, entries, out = request.run_config, request.entries, request.results
    with interruptible(lambda: f"the answers so far are kept in {out}; the same command continues from them"):
        if request.compares_features:
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
        check_text_only(encoder, {}, questions)
        contamination = None
        if config is not None:
            data, seed = config.data, config.training.seed
            contamination = contamination_check(data.train, seed, entries, questions, data.validation_share)
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
                    merge_memory=loaded.merge_memory,
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
