"""Stage one of an evaluation: generate answers greedily, in left-padded batches of similar length.

eval/responses.py stores them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from data_pipelines.collator import Collator
from data_pipelines.encoding import Encoded, Encoder, MediaKind
from data_pipelines.samples import Image, SampleError, Video
from eval.benchmarks import Question
from eval.responses import Responses
from mmdora.core.deepspeed import compute_device, gathered, is_partitioned
from mmdora.core.distributed import any_rank, rank, world_size
from mmdora.core.errors import RunError
from mmdora.models.batching import needs_single_samples, separate_samples

log = logging.getLogger(__name__)

OnFailure = Callable[[Question, str], None]  # called with a question that cannot be answered, and the reason
Row = tuple[Question, Encoded]
T = TypeVar("T")

WINDOW = 16  # the most batches that are encoded and sorted together
WINDOW_BYTES = 2**30  # about the most memory that their encoded questions take
OUT_OF_MEMORY = "the device is out of memory"
# Errors that a model raises for inputs it cannot process.
INPUT_ERRORS = (RuntimeError, ValueError, IndexError, ArithmeticError, MemoryError)


def answer_all(
    model: Any,
    encoder: Encoder,
    questions: list[Question],
    keys: Mapping[str, str],
    folder: Path,
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Return every question's answer by id. Answers stored in `folder` under the same key are not generated again.

    `keys` are the `question_keys`; `advance` is called with the number of questions answered since the last call.
    Several processes divide the questions among themselves, and all of them return all answers.

    Raises RunError if questions could not be answered.
    """
    responses = Responses(folder, keys)
    advance(len(responses.known))
    remaining = sorted((q for q in questions if q.id not in responses.known), key=_estimated_length, reverse=True)
    partitioned = world_size() > 1 and is_partitioned(next(model.parameters()))
    kinds = media_kinds(questions) if partitioned else None

    def on_failure(question: Question, reason: str) -> None:
        responses.fail(question.id, reason)
        advance(1)

    own_share = remaining[rank() :: world_size()]
    for answers in answer_batches(model, encoder, own_share, batch_size, max_new_tokens, kinds, on_failure):
        responses.add((question.id, text) for question, text in answers)
        advance(len(answers))
    return responses.finish([q.id for q in questions])


def generate(
    model: Any, encoder: Encoder, questions: list[Question], batch_size: int, max_new_tokens: int
) -> Iterator[tuple[Question, str]]:
    """Yield greedy answers, the longest questions first. Raises RunError for a question that cannot be answered."""

    def on_failure(question: Question, reason: str) -> None:
        raise RunError(f"question {question.id!r} cannot be answered: {reason}")

    ordered = sorted(questions, key=_estimated_length, reverse=True)
    for answers in answer_batches(model, encoder, ordered, batch_size, max_new_tokens, None, on_failure):
        yield from answers


# Not inference_mode: tensors made in it (gathered weights, cached norms) could not be used in training afterwards.
@torch.no_grad()
def answer_batches(
    model: Any,
    encoder: Encoder,
    questions: list[Question],
    batch_size: int,
    max_new_tokens: int,
    kinds: Collection[MediaKind] | None,
    on_failure: OnFailure,
) -> Iterator[list[tuple[Question, str]]]:
    """Yield greedy answers, batch by batch.

    A batch that raises an error, out of memory or other, is split in half until it succeeds. A question that raises an
    error on its own has failed, as has a question that cannot be encoded.

    `kinds` is for a model partitioned by ZeRO-3, where every process must run every module equally often: the kinds of
    media in any process's questions. Every process then runs as many batches as the process with the most, adds a
    filler row to a batch for each kind that it lacks, and generates for as long as any process does. An error ends all
    processes. With None, processes run independently.
    """
    if batch_size > 1 and needs_single_samples(getattr(model, "config", None), left_padded=True):
        family = model.config.model_type
        log.warning("%s computes other answers in a batch; questions are answered one at a time", family)
        batch_size = 1
    answer = Answerer(model, encoder, max_new_tokens, kinds)
    was_training = model.training
    model.eval()
    try:
        batches = _batches(encoder, questions, batch_size, on_failure, in_background=answer.device.type != "cpu")
        if kinds is None:
            yield from _answer_or_split(batches, answer, batch_size, on_failure)
        else:
            for batch in _until_all_done(batches):
                yield _paired(batch, answer(batch))
    finally:
        model.train(was_training)


class Answerer:
    """Generate greedy answers for a batch of encoded questions."""

    def __init__(self, model: Any, encoder: Encoder, max_new_tokens: int, kinds: Collection[MediaKind] | None):
        self.model, self.tokenizer, self.device = model, encoder.processor.tokenizer, compute_device(model)
        separate_samples(model)
        fillers = encoder.fillers(kinds or ())
        self.blank = [encoder.blank()] if kinds is not None and not fillers else []
        end = self.tokenizer.eos_token_id
        stop = model.generation_config.eos_token_id
        self.stop = stop if isinstance(stop, list) else [end if stop is None else stop]
        self.collate = Collator(encoder.pad_token_id, side="left", fillers=fillers, layout=encoder.layout)
        self.settings = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            # A penalty counts padding tokens too, and would make an answer depend on the rest of its batch.
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "pad_token_id": encoder.pad_token_id,
            "eos_token_id": self.stop,
            # The default synchronizes processes wherever a ZeRO-3 config exists, even for a model that is not
            # partitioned, and then waits forever for a process that has no batches remaining.
            "synced_gpus": kinds is not None,
        }

    def __call__(self, batch: list[Row]) -> list[str]:
        rows = [row for _, row in batch] or self.blank
        inputs = {k: v.to(self.device) for k, v in self.collate(rows).items() if k != "labels"}  # of fillers
        length = inputs["input_ids"].shape[1]
        with gathered(outside_of_modules(self.model)):
            output = self.model.generate(**inputs, **self.settings)
        generated = [self._until_stop(row) for row in output[: len(batch), length:].tolist()]  # fillers come last
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in generated]

    def _until_stop(self, row: list[int]) -> list[int]:
        """Return the tokens before the first stop token, without the padding that follows it."""
        return row[: next((i for i, token in enumerate(row) if token in self.stop), len(row))]


def outside_of_modules(model: Any) -> list[nn.Parameter]:
    """Return the parameters that the model itself holds, such as LLaVA-NeXT's `image_newline`.

    ZeRO-3 gathers them in the model's forward pass, but `generate` computes image features before that.
    """
    return [p for module in (model, model.base_model) for p in module.parameters(recurse=False)]


def _answer_or_split(
    batches: Iterator[list[Row]], answer: Callable[[list[Row]], list[str]], largest: int, on_failure: OnFailure
) -> Iterator[list[tuple[Question, str]]]:
    """Answer batches of at most `largest` questions; split a batch that fails. Running out of memory lowers the limit
    for all batches after it."""
    for first in batches:
        pending = [first]
        while pending:
            batch = pending.pop()
            texts, reason = None, ""
            if len(batch) <= largest:
                texts, reason = _try(answer, batch)
            if texts is not None:
                yield _paired(batch, texts)
            elif len(batch) == 1:
                on_failure(batch[0][0], reason)
            else:
                if reason == OUT_OF_MEMORY:
                    largest = len(batch) // 2
                    log.warning("Out of memory with %d questions in a batch; using at most %d", len(batch), largest)
                middle = len(batch) // 2
                pending += [batch[middle:], batch[:middle]]


def _try(answer: Callable[[list[Row]], list[str]], batch: list[Row]) -> tuple[list[str] | None, str]:
    """Return the answers, or None and the reason. Its own function, so that a failed attempt's memory is freed."""
    try:
        return answer(batch), ""
    except torch.OutOfMemoryError:
        return None, OUT_OF_MEMORY
    except torch.AcceleratorError:  # the device is unusable after it
        raise
    except INPUT_ERRORS as error:
        return None, f"the model raised an error ({str(error) or type(error).__name__})"


def _paired(batch: list[Row], texts: list[str]) -> list[tuple[Question, str]]:
    return list(zip([question for question, _ in batch], texts, strict=True))


def _until_all_done(batches: Iterator[list[Row]]) -> Iterator[list[Row]]:
    """Yield this process's batches, then empty ones while another process has batches remaining."""
    while any_rank(bool(batch := next(batches, []))):
        yield batch


def media_kinds(questions: list[Question]) -> list[MediaKind]:
    """Return the kinds of media in the questions."""
    kinds = {type(part) for question in questions for part in question.sample.media()}
    return [kind for kind in (Image, Video) if kind in kinds]


def _estimated_length(question: Question) -> tuple[int, int, int]:
    """Return what is known of a question's length before it is encoded: videos, images, characters."""
    media = list(question.sample.media())
    videos = sum(isinstance(part, Video) for part in media)
    return videos, len(media) - videos, sum(len(message.text) for message in question.sample.messages)


def _batches(
    encoder: Encoder, questions: list[Question], size: int, on_failure: OnFailure, in_background: bool
) -> Iterator[list[Row]]:
    """Yield batches of similar length, the longest first, so that a lack of memory shows at once.

    `questions` are sorted by estimated length; within a window of them, rows are sorted by their number of tokens. With
    `in_background` a thread encodes the next window while the model answers this one.
    """
    windows = _windows(encoder, questions, size)
    for window in _prefetch(windows) if in_background else windows:
        rows = []
        for question, row in window:
            if isinstance(row, SampleError):
                on_failure(question, row.reason)
            else:
                rows.append((question, row))
        # Kinds of media are kept together, so that the pixels of a batch have one shape.
        rows.sort(key=lambda row: (sorted(row[1]), row[1]["input_ids"].shape[1]), reverse=True)
        yield from (rows[i : i + size] for i in range(0, len(rows), size))


def _windows(
    encoder: Encoder, questions: list[Question], size: int
) -> Iterator[list[tuple[Question, Encoded | SampleError]]]:
    """Encode questions in windows: one batch in the first, for a quick first answer, then twice as many in each, up to
    WINDOW batches or WINDOW_BYTES."""
    window: list[tuple[Question, Encoded | SampleError]] = []
    held, largest = 0, size
    for question in questions:
        try:
            row: Encoded | SampleError = encoder.encode_prompt(question.sample)
        except SampleError as error:
            row = error
        window.append((question, row))
        held += 0 if isinstance(row, SampleError) else sum(tensor.nbytes for tensor in row.values())
        if len(window) >= largest or (held >= WINDOW_BYTES and len(window) % size == 0):
            yield window
            window, held, largest = [], 0, min(2 * largest, WINDOW * size)
    yield window


def _prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yield the items; a thread makes the next one while the caller uses the current one."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        upcoming: Any = pool.submit(next, iterator, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, iterator, end)
            yield item
