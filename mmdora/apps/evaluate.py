"""`mmdora eval`: score a run's own benchmarks, or any benchmark on any model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from data_pipelines.encoding import Encoder
from eval.contamination import contamination_check
from eval.digests import weights_digest
from eval.dual_encoders import load_dual_encoder
from eval.features import evaluate_by_features
from eval.run import evaluate, read_questions
from mmdora.apps.evaluation_request import Request
from mmdora.apps.load_target import load_target
from mmdora.apps.tables import results_table
from mmdora.core.config import EvaluationConfig
from mmdora.core.console import make_console, progress_bar
from mmdora.core.distributed import is_main, local_rank, world_size

PATIENCE = timedelta(days=30)  # of a process that has answered its share, for the others


def run(request: Request, trust_remote_code: bool) -> None:
    console = make_console()
    config, entries, out = request.run_config, request.entries, request.results
    if request.compares_features:
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
