"""A training run on one page: config → model → adapters → data → trainer → adapter → evaluation."""

from __future__ import annotations

import gc
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, set_seed

from data_pipelines.collator import Collator
from data_pipelines.dataset import TrainDataset
from data_pipelines.encoding import Encoder
from data_pipelines.held_out import HeldOutDataset
from data_pipelines.ledger import Ledger, drop_incomplete_line, from_rejected
from data_pipelines.sources import Source, ledger_names, read_source
from eval.contamination import contamination_check
from eval.digests import weights_digest
from eval.report import write_report
from eval.results import read_report
from eval.run import evaluate, read_questions
from mmdora.adapters.injection import inject_adapters, resolve_parts
from mmdora.adapters.save_load import save_adapter
from mmdora.analysis.plots import plot_loss
from mmdora.apps.during_training import Evaluator, Questions, check_scored, sample_predictions
from mmdora.apps.load_target import load_target
from mmdora.apps.tables import results_table, show_adapters, show_best, show_groups
from mmdora.core.config import RunConfig
from mmdora.core.console import progress_bar
from mmdora.core.deepspeed import is_zero3_enabled
from mmdora.core.distributed import from_main, is_main, to_local_device, world_size
from mmdora.core.errors import UserError
from mmdora.core.logs import RunLogs
from mmdora.core.run_directory import RunDir, check_space
from mmdora.models.loading import load_model
from mmdora.training.arguments import training_arguments
from mmdora.training.batches import check_batches
from mmdora.training.callbacks import EvaluateEvery, RunLog
from mmdora.training.optimizer import optimizer_groups
from mmdora.training.packing import check_packing, row_length
from mmdora.training.reporting import Reports, open_reports
from mmdora.training.signals import StopOnSigterm
from mmdora.training.trainer import AdapterTrainer


def train(config: RunConfig, resume: bool, overwrite: bool, console: Console, logs: RunLogs) -> None:
    run_dir = RunDir(Path(config.training.output))
    arguments = training_arguments(config, run_dir.path)  # first: it starts the process group
    set_seed(config.training.seed)
    with arguments.main_process_first(local=False):
        if is_main():
            run_dir.begin(config, resume, overwrite)
        logs.into(run_dir.path)
        sources = [read_source(source, config.training.seed) for source in config.data.train]
        # Read now: what evaluation will want is missed before training, not after.
        held_out = [read_source(source, config.training.seed) for source in config.data.validation]
        questions = {entry.name: read_questions(entry) for entry in config.evaluation}
        check_scored(config, questions)
    checkpoint = find_checkpoint(run_dir) if resume else None
    ledger = open_ledger(config, sources, held_out, run_dir)

    model, processor = load_model(config.model)
    resolve_parts(model, config.parts)  # a part that is not there is told now, not after the base has been scored
    if config.data.packing:
        check_packing(model.config)
    encoder = Encoder(processor, config.data.video, config.data.max_length, config.data.overlong)
    encoder.check_stop(stop_tokens(model, processor))
    dataset = TrainDataset(sources, encoder, ledger, config.training.seed, config.data.temperature)
    check_batches(config, arguments.per_device_train_batch_size, arguments.world_size, dataset)
    if is_main():
        processor.save_pretrained(run_dir.processor)
    evaluate_base(config, questions, model, encoder, run_dir, console)

    report = inject_adapters(model, config.parts)
    show_adapters(console, report)
    check_space(run_dir.path, 12 * report.trainable * (config.training.keep + 2))
    trainer = make_trainer(config, arguments, model, dataset)
    show_groups(console, optimizer_groups(trainer.model, config))
    with open_reports(config, run_dir.metrics, is_main()) as reports:
        watched = HeldOutDataset(held_out, encoder, ledger) if held_out else None
        log = watch(trainer, console, reports)
        trainer.evaluator = Evaluator(config, run_dir, encoder, questions, watched, log)
        try:
            with StopOnSigterm(config.training.on_sigterm) as stop:
                trainer.add_callback(stop)
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            log.close()
        if stop.stopped:
            tell_stopped(config, trainer.state.global_step)
        with trainer.averaged():
            save_adapter(trainer.model, run_dir.adapter)

        step = trainer.state.global_step
        trainer.end_workers()
        del trainer, model, log
        gc.collect()
        arguments.distributed_state.wait_for_everyone()
        finish(config, questions, run_dir, ledger, console)
        hand_over(config, run_dir, reports, step)


def find_checkpoint(run_dir: RunDir) -> Path | None:
    """The checkpoint that all processes go on from, as rank 0 finds it.

    Raises UserError where none is whole, or where this process cannot see it.
    """
    found: Path | None = from_main(run_dir.checkpoint() if is_main() else None)
    if found is not None and not found.is_dir():
        raise UserError(f"--resume: {found} is not on this machine; training.output must be a folder that all share")
    return found


def tell_stopped(config: RunConfig, step: int) -> None:
    """End the command after SIGTERM, with the exit code that shells tell of it."""
    saved = f"a checkpoint of step {step} is written" if config.training.on_sigterm == "save" else "nothing is written"
    if is_main():
        sys.stderr.write(f"stopped by SIGTERM after step {step}; {saved}. The same command with --resume goes on\n")
    sys.exit(128 + signal.SIGTERM)


def stop_tokens(model: Any, processor: Any) -> set[int]:
    """Tokens at which the model's generation ends."""
    ids = model.generation_config.eos_token_id
    found = set(ids if isinstance(ids, list) else [ids]) | {processor.tokenizer.eos_token_id}
    return {token for token in found if token is not None}


def evaluate_base(
    config: RunConfig, questions: Questions, model: Any, encoder: Encoder, run_dir: RunDir, console: Console
) -> None:
    """Score the model as it is, for the entries that say `before: true`. Only for these is a model on the GPU as a
    whole that ZeRO-3 is to partition: it need not fit there."""
    partitioned = is_zero3_enabled()
    if not partitioned or any(entry.before for entry in config.evaluation):
        to_local_device(model)
    for entry in config.evaluation:
        folder = run_dir.result(entry.name, before=True)
        if entry.before:
            asked, origin = questions[entry.name], {"model": config.model.path, "adapter": None}
            with progress_bar(console, f"{entry.name}, before", len(asked)) as advance:
                evaluate(model, encoder, entry, asked, folder, advance, origin)
    if partitioned:
        model.to("cpu")


def open_ledger(config: RunConfig, sources: list[Source], held_out: list[Source], run_dir: RunDir) -> Ledger:
    """The ledger with the rows that are no samples. Raises UserError where these alone are too many."""
    total = sum(source.total for source in sources + held_out)
    ledger = Ledger(run_dir.skipped, total, config.data.max_skipped)
    if is_main():
        drop_incomplete_line(run_dir.skipped)
        names = ledger_names(sources) + ledger_names(held_out, "validation")
        named = zip(sources + held_out, names, strict=True)
        ledger.record(*(replace(from_rejected(row), source=name) for source, name in named for row in source.rejected))
    return ledger


def make_trainer(config: RunConfig, arguments: Any, model: Any, dataset: TrainDataset) -> AdapterTrainer:
    encoder = dataset.encoder
    fillers = encoder.fillers(dataset.media_kinds()) if world_size() > 1 else {}
    trainer = AdapterTrainer(
        config,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(encoder.pad_token_id, fillers=fillers, pack=row_length(model, config.data)),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def watch(trainer: AdapterTrainer, console: Console, reports: Reports) -> RunLog:
    """Tell what the trainer does, and have it evaluated where the config says so."""
    log = RunLog(trainer, console, reports)
    trainer.add_callback(log)
    if (steps := trainer.run_config.training.evaluate_every) is not None:
        trainer.add_callback(EvaluateEvery(steps))
    return log


def finish(config: RunConfig, questions: Questions, run_dir: RunDir, ledger: Ledger, console: Console) -> None:
    """Score the tuned model as anyone would who has the run, then write the report and say what to do next."""
    results = []
    loaded = load_target(str(run_dir.path), config.model.trust_remote_code)
    encoder = Encoder(loaded.processor, config.data.video)
    origin = {"model": config.model.path, "adapter": str(run_dir.adapter)}
    contamination = contamination_check(config.data.train, config.training.seed, config.evaluation, questions)
    weights = weights_digest(loaded.model) if config.evaluation else None
    for entry in config.evaluation:
        asked = questions[entry.name]
        with progress_bar(console, f"{entry.name}, after", len(asked)) as advance:
            folder = run_dir.result(entry.name)  # a run that was resumed may hold results of fewer steps
            evaluate(loaded.model, encoder, entry, asked, folder, advance, origin, True, weights, contamination)
        before = run_dir.result(entry.name, before=True)
        results.append((run_dir.result(entry.name), before if (before / "report.json").exists() else None))
    if not is_main():
        return
    loss = run_dir.path / "loss.png"
    plot_loss(run_dir.metrics, loss)
    write_report(run_dir.path / "report.html", f"mmdora · {run_dir.path.name}", results, config.data.video, loss)
    if results:
        console.print(results_table([(read_report(a), read_report(b) if b else None) for a, b in results]))
    console.print(f"{ledger.summary()}" + (f", see {run_dir.skipped}" if run_dir.skipped.stat().st_size else ""))
    show_best(console, run_dir)
    console.print(
        f"\nThe run is in {run_dir.path}. Next:\n"
        f"  open {run_dir.path}/report.html          pictures, questions, answers before and after\n"
        f"  mmdora eval {run_dir.path}               its scores again\n"
        f"  mmdora chat {run_dir.path} --image FILE  talk with it\n"
        f"  mmdora merge {run_dir.path} OUT          a plain Hugging Face model",
        soft_wrap=True,
    )


def hand_over(config: RunConfig, run_dir: RunDir, reports: Reports, step: int) -> None:
    """Sample predictions of the tuned model, and its adapter, to where the run reports to."""
    if not is_main():
        return
    for entry in config.evaluation:
        reports.predictions(step, entry.name, sample_predictions(run_dir.result(entry.name), config.data.video))
    reports.adapter(run_dir.adapter)
