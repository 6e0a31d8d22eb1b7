"""`mmdora train`: config, data, model, adapters, trainer, adapter directory, evaluation."""

from __future__ import annotations

import gc
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.training_args import ParallelMode

from data_pipelines.collator import Collator
from data_pipelines.dataset import TrainDataset
from data_pipelines.encoding import Encoder
from data_pipelines.held_out import HeldOutDataset
from data_pipelines.ledger import Entry, Ledger, drop_incomplete_line, from_rejected
from data_pipelines.sources import Source, ledger_names
from data_pipelines.splitting import read_sources
from eval.contamination import contamination_check
from eval.digests import weights_digest
from eval.report import write_report
from eval.results import read_report
from eval.run import evaluate, read_questions
from mmdora.adapters.injection import inject_adapters, resolve_parts
from mmdora.adapters.save_load import continue_adapter, save_adapter
from mmdora.analysis.plots import plot_loss
from mmdora.apps.check_media import check_text_only
from mmdora.apps.check_model import check_model
from mmdora.apps.during_training import Evaluator, Questions, check_scored, sample_predictions
from mmdora.apps.load_target import load_base, load_target
from mmdora.apps.tables import results_table, show_adapters, show_best, show_groups
from mmdora.core.config import RunConfig
from mmdora.core.console import progress_bar
from mmdora.core.deepspeed import is_zero3_enabled
from mmdora.core.distributed import is_main, run_on_main, to_local_device
from mmdora.core.errors import UserError
from mmdora.core.interrupts import interruptible
from mmdora.core.logs import RunLogs, capture_libraries, quiet_libraries
from mmdora.core.run_directory import RunDir, check_space, find_adapter
from mmdora.core.run_start import RunStart
from mmdora.models.batching import check_micro_batch_size, separate_samples
from mmdora.training.arguments import training_arguments
from mmdora.training.batches import check_batches, check_media
from mmdora.training.callbacks import EvaluateEvery, MetricsCallback
from mmdora.training.loader_workers import limited_threads
from mmdora.training.optimizer import optimizer_groups
from mmdora.training.packing import check_packing, row_length
from mmdora.training.reporting import Reports, open_reports
from mmdora.training.signals import StopOnSignal
from mmdora.training.trainer import AdapterTrainer


def train(config: RunConfig, resume: bool, overwrite: bool, console: Console, logs: RunLogs) -> None:
    quiet_libraries()
    capture_libraries()
    run_dir = RunDir(Path(config.training.output))
    arguments = training_arguments(config, run_dir.path)  # first, because it starts the process group
    set_seed(config.training.seed)
    start = RunStart(run_dir, config, resume, overwrite, logs)
    with ExitStack() as until_the_end:
        with interruptible(lambda: start.outcome), start:
            checkpoint = find_checkpoint(run_dir) if resume else None
            data = read_data(config, arguments)
            ledger = Ledger(run_dir.skipped, data.total, config.data.max_skipped)
            ledger.check(data.rejected)
            model, processor = load_base(config.model)
            resolve_parts(model, config.parts)  # fails here for a part that does not exist, not after `evaluate_base`
            encoder = make_encoder(config, model, processor)
            dataset = TrainDataset(data.train, encoder, ledger, config.training.seed, config.data.temperature)
            check_run(config, arguments, model, data, dataset)

            start.create()
            if is_main():
                processor.save_pretrained(run_dir.processor)
                drop_incomplete_line(run_dir.skipped)
                ledger.record(*data.rejected)
            if config.model.adapter is None:
                evaluate_base(config, data.questions, model, encoder, run_dir, console)
                report = inject_adapters(model, config.parts)
            else:  # `before` is the model that training starts from
                report = inject_adapters(model, config.parts)
                continue_adapter(model, find_adapter(config.model.adapter))
                evaluate_base(config, data.questions, model, encoder, run_dir, console)
            show_adapters(console, report)
            check_space(run_dir.path, 12 * report.trainable * (config.training.keep + 2))
            trainer = make_trainer(config, arguments, model, dataset)
            show_groups(console, optimizer_groups(trainer.model, config))
            reports = until_the_end.enter_context(open_reports(config, run_dir.metrics, is_main()))

        metrics = add_callbacks(trainer, console, reports)
        validation = HeldOutDataset(data.validation, encoder, ledger) if data.validation else None
        trainer.evaluator = Evaluator(config, run_dir, encoder, data.questions, validation, metrics)
        run_trainer(trainer, metrics, checkpoint)
        with trainer.averaged():
            save_adapter(trainer.model, run_dir.adapter)

        step = trainer.state.global_step
        trainer.end_workers()
        del trainer, model, metrics  # frees the memory for the model that is evaluated
        gc.collect()
        arguments.distributed_state.wait_for_everyone()
        hint = f"the adapter is in {run_dir.adapter}; the same command with --resume finishes the evaluation"
        with interruptible(lambda: hint):
            evaluate_adapter(config, data.questions, run_dir, ledger, console)
        report_predictions(config, run_dir, reports, step)


@dataclass(frozen=True)
class RunData:
    """The data of a run, opened but not encoded."""

    train: list[Source]
    validation: list[Source]
    questions: Questions

    @property
    def sources(self) -> dict[str, Source]:
        """The training and validation sources by their settings: `data.train.0`, ..."""
        named = {"data.train": self.train, "data.validation": self.validation}
        return {f"{key}.{i}": source for key, sources in named.items() for i, source in enumerate(sources)}

    def by_setting(self, config: RunConfig) -> Questions:
        """Return the questions of each `evaluation` entry by its setting: `evaluation.0`, ..."""
        return {f"evaluation.{i}": self.questions[entry.name] for i, entry in enumerate(config.evaluation)}

    @property
    def total(self) -> int:
        """Number of rows, rejected ones included."""
        return sum(source.total for source in self.train + self.validation)

    @property
    def rejected(self) -> list[Entry]:
        """Ledger entries of the rows that are not valid samples."""
        names = ledger_names(self.train) + ledger_names(self.validation, "validation")
        sources = zip(self.train + self.validation, names, strict=True)
        return [replace(from_rejected(row), source=name) for source, name in sources for row in source.rejected]


def read_data(config: RunConfig, arguments: TrainingArguments) -> RunData:
    """Open the training data and everything that is evaluated later, so that missing files are reported before
    training. Rank 0 goes first, because it builds the indexes that the others read."""
    seed = config.training.seed
    with arguments.main_process_first(local=False):
        train, validation = read_sources(config.data, seed)
        questions = {entry.name: read_questions(entry) for entry in config.evaluation}
        check_scored(config, questions)
    return RunData(train, validation, questions)


def make_encoder(config: RunConfig, model: Any, processor: Any) -> Encoder:
    """Return the encoder for this model's inputs. Raises UserError if the data settings do not fit the model."""
    if config.data.packing:
        check_packing(model.config)
    encoder = Encoder(processor, config.data.video, config.data.max_length, config.data.overlong)
    encoder.check_stop(stop_tokens(model, processor))
    return encoder


def stop_tokens(model: Any, processor: Any) -> set[int]:
    """Return the tokens that end generation."""
    ids = model.generation_config.eos_token_id
    stop = set(ids if isinstance(ids, list) else [ids]) | {processor.tokenizer.eos_token_id}
    return {token for token in stop if token is not None}


def check_run(
    config: RunConfig, arguments: TrainingArguments, model: Any, data: RunData, dataset: TrainDataset
) -> None:
    """Raise UserError if the config, the model and the data do not fit together."""
    check_text_only(dataset.encoder, data.sources, data.by_setting(config))
    check_media(config, dataset)
    check_micro_batch_size(model.config, arguments.per_device_train_batch_size)
    check_model(config, model, dataset)
    check_batches(config, arguments.per_device_train_batch_size, arguments.world_size, dataset)


def find_checkpoint(run_dir: RunDir) -> Path | None:
    """Return the checkpoint that rank 0 resumes from, in every process; None if there is none.

    Raises UserError if every checkpoint is damaged, or if this process cannot see the one that rank 0 found.
    """
    checkpoint = run_on_main(run_dir.checkpoint)
    if checkpoint is not None and not checkpoint.is_dir():
        raise UserError(f"--resume: {checkpoint} is not on this machine; all machines must share training.output")
    return checkpoint


def evaluate_base(
    config: RunConfig, questions: Questions, model: Any, encoder: Encoder, run_dir: RunDir, console: Console
) -> None:
    """Evaluate the model that training starts from on the entries with `before: true`.

    The model moves to the GPU as a whole. Under ZeRO-3 that happens only if an entry needs it, since the model may not
    fit there before it is partitioned.
    """
    partitioned = is_zero3_enabled()
    if not partitioned or any(entry.before for entry in config.evaluation):
        to_local_device(model)
    start = config.model.adapter
    for entry in config.evaluation:
        if entry.before:
            folder, origin = run_dir.result(entry.name, before=True), {"model": config.model.path, "adapter": start}
            with progress_bar(console, f"{entry.name}, before", len(questions[entry.name])) as advance:
                # Overwrites the report of a start that was corrected. Answers whose key is the same are kept.
                args = (entry, questions[entry.name], folder, advance, origin)
                evaluate(model, encoder, *args, overwrite=True, merge_memory=config.model.merge_memory)
    if partitioned:
        model.to("cpu")


def make_trainer(config: RunConfig, arguments: Any, model: Any, dataset: TrainDataset) -> AdapterTrainer:
    encoder = dataset.encoder
    separate_samples(model)
    # DDP fails after a batch that leaves a parameter out. Accelerate uses it even with one process under torchrun.
    distributed = arguments.parallel_mode == ParallelMode.DISTRIBUTED
    fillers = encoder.fillers(dataset.media_kinds()) if distributed else {}
    trainer = AdapterTrainer(
        config,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(
            encoder.pad_token_id, fillers=fillers, pack=row_length(model, config.data), layout=encoder.layout
        ),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def add_callbacks(trainer: AdapterTrainer, console: Console, reports: Reports) -> MetricsCallback:
    """Record metrics, show progress, and evaluate every `training.evaluate_every` steps."""
    metrics = MetricsCallback(trainer, console, reports)
    trainer.add_callback(metrics)
    if (steps := trainer.run_config.training.evaluate_every) is not None:
        trainer.add_callback(EvaluateEvery(steps))
    return metrics


def run_trainer(trainer: AdapterTrainer, metrics: MetricsCallback, checkpoint: Path | None) -> None:
    """Train to the end. Exits with 130 after Ctrl-C and with 143 after SIGTERM, once the step in progress is done."""
    settings = trainer.run_config
    hint = "stopped at once; the same command with --resume continues from the last checkpoint"
    with interruptible(lambda: hint), limited_threads(settings.data.num_workers):
        try:
            with StopOnSignal(settings.training.on_sigterm) as stop:
                trainer.add_callback(stop)
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            metrics.close()
    if stop.stopped is not None:
        exit_stopped(stop, trainer.state.global_step)


def exit_stopped(stop: StopOnSignal, step: int) -> None:
    """Say how to resume, and exit with the code that shells use for the signal."""
    assert stop.stopped is not None
    saved = f"checkpoint-{step} is saved" if stop.saves else "no checkpoint is saved"
    cause = "Ctrl-C" if stop.stopped == signal.SIGINT else "SIGTERM"
    if is_main():
        sys.stderr.write(f"stopped by {cause} after step {step}; {saved}. The same command with --resume continues\n")
    sys.exit(128 + stop.stopped)


def evaluate_adapter(
    config: RunConfig, questions: Questions, run_dir: RunDir, ledger: Ledger, console: Console
) -> None:
    """Load the finished run as `mmdora eval` does, evaluate it, write the report, and print the results."""
    results = []
    loaded = load_target(str(run_dir.path), config.model.trust_remote_code)
    encoder = Encoder(loaded.processor, config.data.video)
    origin = {"model": config.model.path, "adapter": str(run_dir.adapter)}
    contamination = contamination_check(
        config.data.train, config.training.seed, config.evaluation, questions, config.data.validation_share
    )
    weights = weights_digest(loaded.model) if config.evaluation else None
    for entry in config.evaluation:
        after, before = run_dir.result(entry.name), run_dir.result(entry.name, before=True)
        with progress_bar(console, f"{entry.name}, after", len(questions[entry.name])) as advance:
            # A resumed run may hold the results of fewer steps: overwrite them.
            args = (entry, questions[entry.name], after, advance, origin, True, weights, contamination)
            evaluate(loaded.model, encoder, *args, merge_memory=config.model.merge_memory)
        results.append((after, before if (before / "report.json").exists() else None))
    if not is_main():
        return
    loss = run_dir.path / "loss.png"
    plot_loss(run_dir.metrics, loss)
    write_report(run_dir.path / "report.html", f"mmdora · {run_dir.path.name}", results, config.data.video, loss)
    if results:
        console.print(results_table([(read_report(a), read_report(b) if b else None) for a, b in results]))
    see = f", see {run_dir.skipped}" if run_dir.skipped.stat().st_size else ""
    console.print(f"{ledger.summary()}{see}", soft_wrap=True)
    show_best(console, run_dir)
    show_next_commands(console, run_dir, not encoder.text_only)


def show_next_commands(console: Console, run_dir: RunDir, takes_media: bool) -> None:
    console.print(
        f"\nThe run is in {run_dir.path}. Next:\n"
        f"  open {run_dir.path}/report.html          images, questions, answers before and after\n"
        f"  mmdora eval {run_dir.path}               evaluate it again\n"
        f"  mmdora chat {run_dir.path}{' --image FILE' if takes_media else '             '}  chat with the model\n"
        f"  mmdora merge {run_dir.path} OUT          write a plain Hugging Face model",
        soft_wrap=True,
    )


def report_predictions(config: RunConfig, run_dir: RunDir, reports: Reports, step: int) -> None:
    """Send sample predictions of the fine-tuned model, and the adapter, to the run's reports (W&B)."""
    if not is_main():
        return
    for entry in config.evaluation:
        reports.predictions(step, entry.name, sample_predictions(run_dir.result(entry.name), config.data.video))
    reports.adapter(run_dir.adapter)
