"""Stage one: a model's answers. Batched, sorted by length, padded on the left, greedy; eval/responses.py keeps them."""

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

log = logging.getLogger(__name__)

Failed = Callable[[Question, str], None]  # hears of a question that cannot be answered, and why
Row = tuple[Question, Encoded]
T = TypeVar("T")

WINDOW = 16  # batches at most that are encoded and sorted together
WINDOW_BYTES = 2**30  # and about as much memory as they may take
NO_MEMORY = "out of the device's memory"
# What a model raises for inputs that it cannot take, memory that it does not get among them.
REFUSALS = (RuntimeError, ValueError, IndexError, ArithmeticError, MemoryError)


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
    """Every question's answer by id; those already in `folder` under the same key are not asked again.

    `keys` are the `question_keys`; `advance` hears how many more questions are answered. Several processes share the
    questions out and all return all answers. Raises RunError that names the questions that could not be answered.
    """
    responses = Responses(folder, keys)
    advance(len(responses.known))
    left = sorted((q for q in questions if q.id not in responses.known), key=_size, reverse=True)
    partitioned = world_size() > 1 and is_partitioned(next(model.parameters()))
    kinds = media_of(questions) if partitioned else None

    def failed(question: Question, reason: str) -> None:
        responses.fail(question.id, reason)
        advance(1)

    mine = left[rank() :: world_size()]
    for answers in answer_batches(model, encoder, mine, batch_size, max_new_tokens, kinds, failed):
        responses.add((question.id, text) for question, text in answers)
        advance(len(answers))
    return responses.finish([q.id for q in questions])


def generate(
    model: Any, encoder: Encoder, questions: list[Question], batch_size: int, max_new_tokens: int
) -> Iterator[tuple[Question, str]]:
    """Greedy answers, the longest questions first. Raises RunError for a question that cannot be answered."""

    def failed(question: Question, reason: str) -> None:
        raise RunError(f"question {question.id!r} cannot be answered: {reason}")

    ordered = sorted(questions, key=_size, reverse=True)
    for answers in answer_batches(model, encoder, ordered, batch_size, max_new_tokens, None, failed):
        yield from answers


@torch.no_grad()  # and not inference_mode: what it makes (gathered weights, kept norms) could not be trained with
def answer_batches(
    model: Any,
    encoder: Encoder,
    questions: list[Question],
    batch_size: int,
    max_new_tokens: int,
    kinds: Collection[MediaKind] | None,
    failed: Failed,
) -> Iterator[list[tuple[Question, str]]]:
    """Greedy answers, batch by batch.

    A batch that the model refuses, for want of memory or otherwise, is halved until it goes through; a question that
    it refuses alone has failed, as has one that cannot be encoded.

    `kinds` is for a model in ZeRO-3 partitions, of which every process must run each module equally often: the media
    that any process's questions have. Every process then has as many batches as the one with most, each with a blank
    row for the kinds that it lacks, and generates as long as any; a refusal ends them all. None: each by itself.
    """
    answer = Answerer(model, encoder, max_new_tokens, kinds)
    was_training = model.training
    model.eval()
    try:
        batches = _batches(encoder, questions, batch_size, failed, apart=answer.device.type != "cpu")
        if kinds is None:
            yield from _in_pieces(batches, answer, batch_size, failed)
        else:
            for batch in _as_many(batches):
                yield _paired(batch, answer(batch))
    finally:
        model.train(was_training)


class Answerer:
    """A batch of encoded questions in, the model's greedy answers out."""

    def __init__(self, model: Any, encoder: Encoder, max_new_tokens: int, kinds: Collection[MediaKind] | None):
        self.model, self.tokenizer, self.device = model, encoder.processor.tokenizer, compute_device(model)
        fillers = encoder.fillers(kinds or ())
        self.blank = [encoder.blank()] if kinds is not None and not fillers else []
        end = self.tokenizer.eos_token_id
        stop = model.generation_config.eos_token_id
        self.stop = stop if isinstance(stop, list) else [end if stop is None else stop]
        self.collate = Collator(encoder.pad_token_id, side="left", fillers=fillers)
        self.settings = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            # A penalty would count padding too, so that an answer would depend on the questions beside it.
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "pad_token_id": encoder.pad_token_id,
            "eos_token_id": self.stop,
            # Said in so many words: left alone, transformers keeps processes in step wherever a ZeRO-3 config exists,
            # also for whole models, and waits for ever for one that has no batch left.
            "synced_gpus": kinds is not None,
        }

    def __call__(self, batch: list[Row]) -> list[str]:
        rows = [row for _, row in batch] or self.blank
        inputs = {k: v.to(self.device) for k, v in self.collate(rows).items() if k != "labels"}  # a filler's
        length = inputs["input_ids"].shape[1]
        with gathered(outside_of_modules(self.model)):
            output = self.model.generate(**inputs, **self.settings)
        said = [self._until_stop(row) for row in output[: len(batch), length:].tolist()]  # fillers come last
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in said]

    def _until_stop(self, row: list[int]) -> list[int]:
        """Without the padding of a row that stopped before others."""
        return row[: next((place for place, token in enumerate(row) if token in self.stop), len(row))]


def outside_of_modules(model: Any) -> list[nn.Parameter]:
    """Parameters that the model itself holds, as LLaVA-NeXT's `image_newline`: `generate` makes pictures into features
    before it calls the model, whose forward pass would gather them."""
    return [p for module in (model, model.base_model) for p in module.parameters(recurse=False)]


def _in_pieces(
    batches: Iterator[list[Row]], answer: Callable[[list[Row]], list[str]], most: int, failed: Failed
) -> Iterator[list[tuple[Question, str]]]:
    for whole in batches:
        waiting = [whole]
        while waiting:
            batch = waiting.pop()
            texts, reason = None, ""
            if len(batch) <= most:
                texts, reason = _tried(answer, batch)
            if texts is not None:
                yield _paired(batch, texts)
            elif len(batch) == 1:
                failed(batch[0][0], reason)
            else:
                if reason == NO_MEMORY:
                    most = len(batch) // 2
                    log.warning("no memory for %d questions at once: from here on at most %d", len(batch), most)
                middle = len(batch) // 2
                waiting += [batch[middle:], batch[:middle]]


def _tried(answer: Callable[[list[Row]], list[str]], batch: list[Row]) -> tuple[list[str] | None, str]:
    """The answers; or None and why there are none. What the attempt held is let go of when this returns."""
    try:
        return answer(batch), ""
    except torch.OutOfMemoryError:
        return None, NO_MEMORY
    except torch.AcceleratorError:  # the device takes nothing more after it
        raise
    except REFUSALS as error:
        return None, f"the model refuses it ({str(error) or type(error).__name__})"


def _paired(batch: list[Row], texts: list[str]) -> list[tuple[Question, str]]:
    return list(zip([question for question, _ in batch], texts, strict=True))


def _as_many(batches: Iterator[list[Row]]) -> Iterator[list[Row]]:
    """This process's batches, and then empty ones as long as another has some left."""
    while any_rank(bool(batch := next(batches, []))):
        yield batch


def media_of(questions: list[Question]) -> list[MediaKind]:
    """The kinds of media in the questions."""
    found = {type(part) for question in questions for part in question.sample.media()}
    return [kind for kind in (Image, Video) if kind in found]


def _size(question: Question) -> tuple[int, int, int]:
    """What is known of a question's length before it is encoded: videos, pictures, characters."""
    media = list(question.sample.media())
    videos = sum(isinstance(part, Video) for part in media)
    return videos, len(media) - videos, sum(len(message.text) for message in question.sample.messages)


def _batches(
    encoder: Encoder, questions: list[Question], size: int, failed: Failed, apart: bool
) -> Iterator[list[Row]]:
    """Batches of about equal length, the longest first, so that memory that does not suffice is told at once.

    `questions` are sorted by what is known of their lengths; a window of them is sorted by their tokens. With `apart`
    the next window is encoded in a thread while the model is at this one's batches.
    """
    windows = _windows(encoder, questions, size)
    for window in _ahead(windows) if apart else windows:
        rows = []
        for question, row in window:
            if isinstance(row, SampleError):
                failed(question, row.reason)
            else:
                rows.append((question, row))
        # Kinds of media are kept apart: a batch then has one shape of pixels.
        rows.sort(key=lambda row: (sorted(row[1]), row[1]["input_ids"].shape[1]), reverse=True)
        yield from (rows[i : i + size] for i in range(0, len(rows), size))


def _windows(
    encoder: Encoder, questions: list[Question], size: int
) -> Iterator[list[tuple[Question, Encoded | SampleError]]]:
    """The first holds one batch, for a quick first answer, and each later one twice as many, up to what memory is
    for."""
    window: list[tuple[Question, Encoded | SampleError]] = []
    held, most = 0, size
    for question in questions:
        try:
            row: Encoded | SampleError = encoder.encode_prompt(question.sample)
        except SampleError as error:
            row = error
        window.append((question, row))
        held += 0 if isinstance(row, SampleError) else sum(tensor.nbytes for tensor in row.values())
        if len(window) >= most or (held >= WINDOW_BYTES and len(window) % size == 0):
            yield window
            window, held, most = [], 0, min(2 * most, WINDOW * size)
    yield window


def _ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made in a thread while the one before it is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming: Any = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item
