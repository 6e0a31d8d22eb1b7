"""Examine a config's data, chat template and batches before training, on a CPU and without model weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, GenerationConfig

from data_pipelines.dataset import TrainDataset
from data_pipelines.encoding import IGNORED, Encoded, Encoder
from data_pipelines.inspection import Inspection, count_duplicates, decode_pieces, inspect_samples, readable_samples
from data_pipelines.ledger import Entry, Ledger, from_rejected
from data_pipelines.sources import Source
from data_pipelines.splitting import read_sources
from eval.benchmarks import Question
from eval.contamination import Overlap, find_overlaps
from eval.run import read_questions
from mmdora.apps.check_media import check_text_only
from mmdora.apps.check_model import model_problems
from mmdora.core.config import RunConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError
from mmdora.models.batching import check_micro_batch_size
from mmdora.models.loading import load_shape
from mmdora.training.arguments import micro_batches
from mmdora.training.batches import check_batches, check_media
from mmdora.training.metrics import PIXELS, frames_of
from mmdora.training.packing import check_packing

MAX_HASHED_FILES = 1000  # files on each side whose perceptual hashes are compared
LOW_SUPERVISION = 0.02  # a share of supervised tokens below this is reported

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Problem:
    """A problem and the setting to change. An `error` stops the run or makes it train on something else."""

    severity: Literal["error", "warning", "note"]
    text: str
    setting: str


@dataclass(frozen=True)
class Example:
    """An encoded sample as text."""

    sample_id: str
    pieces: list[tuple[str, bool]]  # text, and whether its tokens are supervised
    tokens: int
    supervised: int


@dataclass(frozen=True)
class SourceDiagnosis:
    """One entry of `data.train` or `data.validation`."""

    setting: str  # data.train.0
    name: str  # of its file
    rows: int
    samples: int  # rows that are samples
    repeats: int  # samples with the same text and files as an earlier one
    rejected: list[Entry]  # rows that are not samples
    inspected: Inspection
    example: Example | None

    @property
    def supervised_share(self) -> float | None:
        """Supervised tokens over all tokens of the inspected samples."""
        total = sum(self.inspected.lengths)
        return sum(self.inspected.supervised) / total if total else None


@dataclass(frozen=True)
class HeldOut:
    """One `evaluation` entry or validation source, and what it shares with the training data."""

    setting: str
    name: str
    overlap: Overlap


@dataclass(frozen=True)
class Diagnosis:
    sources: list[SourceDiagnosis]
    held_out: list[HeldOut]
    problems: list[Problem]

    @property
    def has_errors(self) -> bool:
        return any(problem.severity == "error" for problem in self.problems)


@contextmanager
def no_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda count: None


def examine(config: RunConfig, samples: int, progress: Progress = no_progress) -> Diagnosis:
    """Examine a config that `check_config` accepts, encoding at most `samples` samples of each source.

    Raises UserError for data or a processor that cannot be read at all.
    """
    seed = config.training.seed
    train_sources, validation_sources = read_sources(config.data, seed)
    training = {f"data.train.{i}": source for i, source in enumerate(train_sources)}
    validation = {f"data.validation.{i}": source for i, source in enumerate(validation_sources)}
    questions = {entry.name: read_questions(entry) for entry in config.evaluation}
    model, processor = load_shape(config.model)
    encoder = Encoder(processor, config.data.video, config.data.max_length, config.data.overlong)
    by_setting = {f"evaluation.{i}": questions[entry.name] for i, entry in enumerate(config.evaluation)}
    problems = _template_problems(config, encoder) + _batch_problems(config, list(training.values()), encoder, model)
    try:
        check_text_only(encoder, training | validation, by_setting)
    except UserError as error:
        problems.append(Problem("error", str(error), "model.path"))
    sources = []
    for setting, source in (training | validation).items():
        with progress(f"encoding {source.path.name}", min(samples, len(source))) as advance:
            sources.append(_diagnose(setting, source, encoder, samples, advance))
    problems += _unusable_samples(config, sources) + _supervision_problems(config, sources)

    names = {f"evaluation.{i}": entry.name for i, entry in enumerate(config.evaluation)}
    held_out_questions = {setting: questions[name] for setting, name in names.items()}
    for setting, source in validation.items():
        names[setting], held_out_questions[setting] = source.path.name, _as_questions(source)
    held_out = []
    if held_out_questions:
        with progress("comparing with held-out data", sum(len(source) for source in training.values())) as advance:
            overlaps = find_overlaps(
                list(training.values()), config.evaluation, held_out_questions, MAX_HASHED_FILES, advance
            )
        held_out = [HeldOut(setting, names[setting], overlaps[setting]) for setting in held_out_questions]
    problems += [problem for entry in held_out for problem in _contamination_problems(entry)]
    return Diagnosis(sources, held_out, problems)


def _diagnose(
    setting: str, source: Source, encoder: Encoder, samples: int, advance: Callable[[int], None]
) -> SourceDiagnosis:
    inspected = inspect_samples(source, encoder, samples, advance, _count_frames)
    example = None
    if inspected.example is not None:
        sample, encoded = inspected.example
        supervised = sum(label != IGNORED for label in encoded["labels"][0].tolist())
        example = Example(sample.id, decode_pieces(encoder, encoded), encoded["input_ids"].shape[1], supervised)
    rejected = [from_rejected(row) for row in source.rejected]
    repeats = count_duplicates(readable_samples(source))
    return SourceDiagnosis(setting, source.path.name, source.total, len(source), repeats, rejected, inspected, example)


def _count_frames(encoded: Encoded) -> int:
    """Return the images and video frames that the vision encoder sees, crops included."""
    return sum(frames_of(encoded, key) for key in PIXELS if key in encoded)


def _template_problems(config: RunConfig, encoder: Encoder) -> list[Problem]:
    """Check that the chat template ends an answer with a token at which generation stops."""
    stop = {encoder.processor.tokenizer.eos_token_id}
    if config.model.path is not None:
        try:
            ids = GenerationConfig.from_pretrained(
                find_path(config.model.path), revision=config.model.revision
            ).eos_token_id
        except OSError:  # a model without generation_config.json: the tokenizer's end token counts
            ids = None
        stop |= set(ids if isinstance(ids, list) else [ids])
    try:
        encoder.check_stop({token for token in stop if token is not None})
    except UserError as error:
        return [Problem("error", str(error), "model.chat_template")]
    return []


def _batch_problems(config: RunConfig, training: Sequence[Source], encoder: Encoder, model: Any) -> list[Problem]:
    """Check the media, batches and packing that the config asks for, as a run in one process would.

    `model` is on the meta device.
    """
    dataset = TrainDataset(training, encoder, Ledger(Path(os.devnull), 0, 1.0), 0, config.data.temperature)
    problems = [Problem("error", text, setting) for setting, text in model_problems(config, model, dataset)]
    try:
        check_media(config, dataset)
    except UserError as error:
        problems.append(Problem("error", str(error), "parts"))
    try:
        micro, _ = micro_batches(config.training, 1)
        check_batches(config, micro, 1, dataset)
    except UserError as error:
        problems.append(Problem("error", str(error), "data.max_tokens"))
    if config.model.path is not None:
        architecture = AutoConfig.from_pretrained(
            find_path(config.model.path),
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
        try:
            check_micro_batch_size(architecture, micro_batches(config.training, 1)[0])
        except UserError as error:
            problems.append(Problem("error", str(error), "training.micro_batch_size"))
        if config.data.packing:
            try:
                check_packing(architecture)
            except UserError as error:
                problems.append(Problem("error", str(error), "data.packing"))
    return problems


def _unusable_samples(config: RunConfig, sources: Sequence[SourceDiagnosis]) -> list[Problem]:
    """Estimate the share of samples that would be skipped, and whether the run would stop for it."""
    total = sum(source.rows for source in sources)
    rejected = sum(len(source.rejected) for source in sources)
    broken = sum(
        source.samples * len(source.inspected.skipped) / source.inspected.inspected
        for source in sources
        if source.inspected.inspected
    )
    share = (rejected + broken) / total
    if not share:
        return []
    text = f"{rejected} of {total} rows are not samples, and about {broken:.0f} samples cannot be used: {share:.1%}"
    if share > config.data.max_skipped:
        return [Problem("error", f"{text}, over data.max_skipped {config.data.max_skipped:.1%}", "data.max_skipped")]
    return [Problem("warning", f"{text}; they are skipped", "data.train")]


def _supervision_problems(config: RunConfig, sources: Sequence[SourceDiagnosis]) -> list[Problem]:
    """Report sources with few supervised tokens or repeated samples, and a config without a maximum length."""
    problems = []
    for source in sources:
        share = source.supervised_share
        if share is not None and share < LOW_SUPERVISION:
            text = f"{source.name}: only {share:.1%} of the tokens are supervised; most compute is spent on the prompt"
            problems.append(Problem("note", text, source.setting))
        if source.repeats:
            text = f"{source.name}: {source.repeats} of {source.samples} samples repeat an earlier one word for word"
            problems.append(Problem("warning", text, source.setting))
    if config.data.max_length is None:
        longest = max((max(s.inspected.lengths) for s in sources if s.inspected.lengths), default=0)
        text = f"the length of a sample is not limited; the longest inspected sample has {longest} tokens"
        problems.append(Problem("note", text, "data.max_length"))
    return problems


def _as_questions(source: Source) -> list[Question]:
    """Return validation samples as questions: each conversation up to its last user message."""
    questions = []
    for sample in readable_samples(source):
        last = max((i for i, message in enumerate(sample.messages) if message.role == "user"), default=None)
        if last is not None:
            prompt = replace(sample, messages=sample.messages[: last + 1])
            questions.append(Question(sample.id, prompt, (), sample.id))
    return questions


def _contamination_problems(held_out: HeldOut) -> list[Problem]:
    """Report held-out files and questions that the training data contains."""
    overlap, texts = held_out.overlap, []
    for pairs, relation in ((overlap.exact, "are training data too"), (overlap.near, "look like training data")):
        if pairs:
            file, training_file = min(pairs.items())
            texts.append(f"{len(pairs)} of its {overlap.files} files {relation}, such as {file} ({training_file})")
    if overlap.questions:
        texts.append(
            f"{len(overlap.questions)} of its questions are in the training data about the same media, such as "
            f"{overlap.questions[0]!r}"
        )
    return [Problem("warning", f"{held_out.name}: {text}", held_out.setting) for text in texts]
