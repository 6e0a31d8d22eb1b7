"""`mmdora doctor`: what a config's data becomes, shown before it trains, on a CPU and without the model's weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.text import Text
from transformers import AutoConfig, GenerationConfig

from data_pipelines.dataset import Source, TrainDataset, read_source
from data_pipelines.encoding import IGNORED, Encoded, Encoder
from data_pipelines.inspection import Look, look, readable, repeated, spelled
from data_pipelines.ledger import Ledger, by_reason, from_rejected
from eval.benchmarks import Question
from eval.contamination import Asked, Overlap, find_overlaps
from eval.run import read_questions
from mmdora.core.config import RunConfig
from mmdora.core.config_files import find_path
from mmdora.core.console import make_console, make_table, progress_bar
from mmdora.core.errors import UserError
from mmdora.core.logs import quiet_libraries
from mmdora.models.loading import load_processor
from mmdora.training.arguments import micro_batches
from mmdora.training.batches import check_batches
from mmdora.training.metrics import PIXELS, frames_of
from mmdora.training.packing import check_packing

MOST_FILES = 1000  # on each side, compared by their looks
FEW_LEARNT = 0.02  # a smaller share of supervised tokens than this is worth a look
GRAVITY = {"error": "red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class Problem:
    """`error`: the run would stop, or learn something else. `setting` is what to change."""

    gravity: str
    text: str
    setting: str


def examine(config: RunConfig, samples: int, html: Path | None) -> int:
    """Print what was found. Returns 1 where a problem is an error, else 0. Raises UserError for a config that no run
    could begin with."""
    quiet_libraries()
    console = make_console()
    console.record = html is not None
    training = [read_source(source, config.training.seed) for source in config.data.train]
    validation = [read_source(source, config.training.seed) for source in config.data.validation]
    sources = training + validation
    settings = [f"data.train.{i}" for i in range(len(training))]
    settings += [f"data.validation.{i}" for i in range(len(validation))]
    questions = {entry.name: read_questions(entry) for entry in config.evaluation}
    processor = load_processor(config.model)
    encoder = Encoder(processor, config.data.video, config.data.max_length, config.data.overlong)
    problems = check_stop(config, encoder) + plan_problems(config, training, encoder)
    looks = []
    for source in sources:
        with progress_bar(console, f"looking at {source.path.name}", min(samples, len(source))) as advance:
            looks.append(look(source, encoder, samples, advance, frames_in))
    for source, found in zip(sources, looks, strict=True):
        show_example(console, encoder, source, found)
    show_tables(console, sources, looks)
    problems += losses(config, sources, looks) + lengths(config, sources, looks, settings)
    names = {f"evaluation.{i}": entry.name for i, entry in enumerate(config.evaluation)}
    asked = {setting: questions[name] for setting, name in names.items()}
    for setting, source in list(zip(settings, sources, strict=True))[len(training) :]:
        names[setting], asked[setting] = source.path.name, as_questions(source)
    problems += contamination(console, config, training, asked, names)
    show_problems(console, problems)
    if html is not None:
        console.save_html(str(html))
    return int(any(problem.gravity == "error" for problem in problems))


def frames_in(encoded: Encoded) -> int:
    return sum(frames_of(encoded, key) for key in PIXELS if key in encoded)


def check_stop(config: RunConfig, encoder: Encoder) -> list[Problem]:
    """Whether an answer ends with a token at which generation stops."""
    stop = {encoder.processor.tokenizer.eos_token_id}
    if config.model.path is not None:
        try:
            ids = GenerationConfig.from_pretrained(
                find_path(config.model.path), revision=config.model.revision
            ).eos_token_id
        except OSError:  # many models come without that file; their tokenizer's end token counts
            ids = None
        stop |= set(ids if isinstance(ids, list) else [ids])
    try:
        encoder.check_stop({token for token in stop if token is not None})
    except UserError as error:
        return [Problem("error", str(error), "model.chat_template")]
    return []


def plan_problems(config: RunConfig, sources: list[Source], encoder: Encoder) -> list[Problem]:
    """What a run would refuse of the batches that the config asks for, in one process."""
    problems = []
    try:
        micro, _ = micro_batches(config.training, 1)
        ledger = Ledger(Path(os.devnull), 0, 1.0)
        check_batches(config, micro, 1, TrainDataset(sources, encoder, ledger, 0, config.data.temperature))
    except UserError as error:
        problems.append(Problem("error", str(error), "data.max_tokens"))
    if config.data.packing and config.model.path is not None:
        try:
            check_packing(AutoConfig.from_pretrained(find_path(config.model.path), revision=config.model.revision))
        except UserError as error:
            problems.append(Problem("error", str(error), "data.packing"))
    return problems


def show_example(console: Console, encoder: Encoder, source: Source, found: Look) -> None:
    """One conversation as the model will read it; what it learns to say is green."""
    if found.example is None:
        return
    sample, encoded = found.example
    text = Text()
    for piece, said in spelled(encoder, encoded):
        text.append(piece, style="bold green" if said else "dim" if piece.startswith("[") else "")
    learnt = sum(label != IGNORED for label in encoded["labels"][0].tolist())
    console.rule(Text(f"{source.path.name}: sample {sample.id}"), align="left")
    console.print(text, soft_wrap=True)
    console.print(f"{encoded['input_ids'].shape[1]} tokens; the {learnt} in green are learnt", style="dim")


def show_tables(console: Console, sources: list[Source], looks: list[Look]) -> None:
    columns = ("source", "looked at", "pictures", "clips", "frames", "tokens", "learnt")
    table = make_table("what the samples become", *columns)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"  # a file's name may be long; figures stay whole
    for source, found in zip(sources, looks, strict=True):
        pictures, clips = (sum(kind[i] for kind in found.kinds) for i in (0, 1))
        counted = (found.frames, found.lengths)
        frames, tokens = (f"{median(each):.0f}, ≤ {max(each)}" if each else "–" for each in counted)
        learnt = f"{sum(found.supervised) / sum(found.lengths):.1%}" if found.lengths else "–"
        counts = [f"{found.looked} of {len(source):,}", str(pictures), str(clips)]
        table.add_row(source.path.name, *counts, frames, tokens, learnt)
    console.print(table)
    for source, found in zip(sources, looks, strict=True):
        rejected = [from_rejected(row) for row in source.rejected]
        for total, entries in ((f"{source.total} rows", rejected), (f"{found.looked} looked at", found.entries)):
            for count, entry in by_reason(entries):
                what = f"{source.path.name}: {count} of {total} {'changed' if entry.changed else 'lost'}: "
                where = f" ({entry.file or entry.id}, at stage {entry.stage!r})"
                console.print(Text(what + entry.reason + where), soft_wrap=True)


def losses(config: RunConfig, sources: list[Source], looks: list[Look]) -> list[Problem]:
    """What would not be used, and whether a run would stop for it."""
    total = sum(source.total for source in sources)
    rejected = sum(len(source.rejected) for source in sources)
    broken = sum(
        len(source) * len(found.skipped) / found.looked
        for source, found in zip(sources, looks, strict=True)
        if found.looked
    )
    share = (rejected + broken) / total
    if not share:
        return []
    about = f"{rejected} of {total} rows are no samples" if rejected else f"of {total} samples"
    text = f"{about}, and about {broken:.0f} more cannot be used: {share:.1%} in all"
    if share > config.data.max_skipped:
        return [Problem("error", f"{text}, over data.max_skipped {config.data.max_skipped:.1%}", "data.max_skipped")]
    return [Problem("warning", f"{text}; they would be skipped", "data.train")]


def lengths(config: RunConfig, sources: list[Source], looks: list[Look], settings: list[str]) -> list[Problem]:
    """Samples of which next to nothing is learnt, and a config that does not bound their length."""
    problems = []
    for source, found, setting in zip(sources, looks, settings, strict=True):
        if found.lengths and sum(found.supervised) < FEW_LEARNT * sum(found.lengths):
            share = sum(found.supervised) / sum(found.lengths)
            text = f"{source.path.name}: only {share:.1%} of the tokens are learnt; most of each step is reading"
            problems.append(Problem("note", text, setting))
        if again := repeated(readable(source)):
            text = f"{source.path.name}: {again} of {len(source)} samples repeat an earlier one word for word"
            problems.append(Problem("warning", text, setting))
    longest = max((max(found.lengths) for found in looks if found.lengths), default=0)
    if config.data.max_length is None:
        text = f"no bound on the length of a sample; the longest looked at has {longest} tokens"
        problems.append(Problem("note", text, "data.max_length"))
    return problems


def as_questions(source: Source) -> list[Question]:
    """What held-out conversations ask last, without the answer."""
    found = []
    for sample in readable(source):
        last = max((i for i, message in enumerate(sample.messages) if message.role == "user"), default=None)
        if last is not None:
            found.append(Question(sample.id, replace(sample, messages=sample.messages[: last + 1]), (), sample.id))
    return found


def contamination(
    console: Console, config: RunConfig, sources: list[Source], asked: Asked, names: dict[str, str]
) -> list[Problem]:
    """Held-out files and questions that are training data too, and a table of what was compared; by their setting."""
    if not asked:
        return []
    with progress_bar(console, "comparing with held-out data", sum(len(source) for source in sources)) as advance:
        found = find_overlaps(sources, config.evaluation, asked, MOST_FILES, advance)
    columns = ("held out", "files", "the same", "look alike", "questions", "words alone")
    table = make_table("what is in the training data too", *columns)
    for setting, overlap in found.items():
        counts = (overlap.files, len(overlap.exact), len(overlap.near), len(overlap.questions), overlap.words_alone)
        table.add_row(names[setting], *(f"{count:,}" for count in counts))
    console.print(table)
    some = next(iter(found.values()))
    compared = f"{some.training_files_compared:,} of {some.training_files:,} training files"
    console.print(f"Looks were compared with {compared}, bytes with all.", style="dim")
    return [problem for setting in asked for problem in leaks(setting, names[setting], found[setting])]


def leaks(setting: str, name: str, overlap: Overlap) -> list[Problem]:
    """What of the held-out data is trained on."""
    told = []
    for pairs, what in ((overlap.exact, "are training data too"), (overlap.near, "look like training data")):
        if pairs:
            ours, theirs = min(pairs.items())
            told.append(f"{len(pairs)} of its {overlap.files} files {what}, such as {ours} ({theirs})")
    if overlap.questions:
        count = len(overlap.questions)
        told.append(
            f"{count} of its questions are asked in training too, about the same, such as {overlap.questions[0]!r}"
        )
    return [Problem("warning", f"{name}: {text}", setting) for text in told]


def show_problems(console: Console, problems: list[Problem]) -> None:
    if not any(problem.gravity != "note" for problem in problems):
        console.print("Nothing wrong was found.", style="green")
    for gravity, colour in GRAVITY.items():
        for problem in problems:
            if problem.gravity == gravity:
                line = Text.assemble((f"{gravity}: ", colour), problem.text, (f"  [{problem.setting}]", "dim"))
                console.print(line, soft_wrap=True)
