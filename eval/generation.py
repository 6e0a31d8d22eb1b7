"""Stage one: a model's answers, as `responses.jsonl`, one fsynced line a question.

A line is keyed by everything that the answer depends on: prompt, media bytes, frames, reader, decoding and weights.
Killed and restarted, a run asks only what is not answered; anything changed is asked again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.collator import Collator
from data_pipelines.encoding import Encoded, Encoder, MediaKind
from data_pipelines.samples import Image, Video
from data_pipelines.video import resolve_reader
from eval.benchmarks import Question
from mmdora.ranks import any_process
from mmdora.zero import device_of, gathered, is_partitioned

log = logging.getLogger(__name__)


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

    `keys` holds each question's `question_key`; `advance` hears how many more questions are answered. Several
    processes share the questions out and all return all answers.
    """
    ids = [q.id for q in questions]
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder.mkdir(parents=True, exist_ok=True)
    known = read_responses(folder, keys)
    advance(len(known))
    mine = [q for i, q in enumerate(questions) if i % world == rank and q.id not in known]
    with (folder / f"responses.{rank}.jsonl").open("a", encoding="utf-8") as file:
        kinds = media_of(questions) if world > 1 and is_partitioned(next(model.parameters())) else None
        for question, text in generate(model, encoder, mine, batch_size, max_new_tokens, kinds):
            line = {"id": question.id, "response": text, "key": keys[question.id]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            advance(1)
    _barrier()
    answered = read_responses(folder, keys)
    missing = [i for i in ids if i not in answered]
    assert not missing, f"{len(missing)} questions have no answer, such as {missing[0]!r}"
    _barrier()
    if rank == 0:
        _merge(folder, [answered[i] for i in ids])
    _barrier()
    return {i: answered[i]["response"] for i in ids}


@torch.no_grad()  # and not inference_mode: what it makes (gathered weights, kept norms) could not be trained with
def generate(
    model: Any,
    encoder: Encoder,
    questions: list[Question],
    batch_size: int,
    max_new_tokens: int,
    kinds: Collection[MediaKind] | None = None,
) -> Iterator[tuple[Question, str]]:
    """Greedy answers, batched by length and padded on the left.

    `kinds` is for a model in ZeRO-3 partitions, of which every process must run each module equally often: the media
    that any process's questions have. Every process then has as many batches as the one with
    most, each with a blank row for the kinds that it lacks, and generates as long as any. None: each by itself.
    """
    tokenizer = encoder.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    fillers = encoder.fillers(kinds or ())
    collate = Collator(pad, side="left", fillers=fillers)
    was_training, device = model.training, device_of(model)
    model.eval()
    batches = _batches(encoder, questions, batch_size)
    for batch in batches if kinds is None else _as_many(batches):
        rows = [row for _, row in batch] or ([] if fillers else [encoder.blank()])
        inputs = {k: v.to(device) for k, v in collate(rows).items() if k != "labels"}  # a filler's
        length = inputs["input_ids"].shape[1]
        # Said in so many words: left alone, transformers keeps processes in step wherever a ZeRO-3 config exists, also
        # for whole models, and waits for ever for one that has no batch left.
        with gathered(outside_of_modules(model)):
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                synced_gpus=kinds is not None,
            )
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)[: len(batch)]  # fillers come last
        yield from zip([q for q, _ in batch], (t.strip() for t in texts), strict=True)
    model.train(was_training)


def outside_of_modules(model: Any) -> list[nn.Parameter]:
    """Parameters that the model itself holds, as LLaVA-NeXT's `image_newline`: `generate` makes pictures into features
    before it calls the model, whose forward pass would gather them."""
    return [p for module in (model, model.base_model) for p in module.parameters(recurse=False)]


def _as_many(batches: Iterator[list[tuple[Question, Encoded]]]) -> Iterator[list[tuple[Question, Encoded]]]:
    """This process's batches, and then empty ones as long as another has some left."""
    while any_process(bool(batch := next(batches, []))):
        yield batch


def media_of(questions: list[Question]) -> list[MediaKind]:
    """The kinds of media in the questions."""
    found = {type(part) for question in questions for part in question.sample.media()}
    return [kind for kind in (Image, Video) if kind in found]


def _batches(encoder: Encoder, questions: list[Question], size: int) -> Iterator[list[tuple[Question, Encoded]]]:
    """Batches of about equal length: sorted inside a window, so that memory holds a few batches and not the
    benchmark."""
    window = 16 * size
    for start in range(0, len(questions), window):
        rows = [(q, encoder.encode_prompt(q.sample)) for q in questions[start : start + window]]
        # Kinds of media are kept apart: a batch then has one shape of pixels.
        rows.sort(key=lambda row: (sorted(row[1]), row[1]["input_ids"].shape[1]))
        yield from (rows[i : i + size] for i in range(0, len(rows), size))


def question_key(question: Question, encoder: Encoder, max_new_tokens: int, weights: str) -> str:
    """A digest of everything that the answer depends on."""
    media = list(question.sample.media())
    parts = [encoder.render(question.sample, add_generation_prompt=True), str(max_new_tokens), weights]
    parts += [processor_digest(encoder.processor)]
    parts += [media_digest(part) for part in media]
    parts += [json.dumps(part.bounds) for part in media if isinstance(part, Video)]
    if any(isinstance(part, Video) for part in media):
        parts += [encoder.video.model_dump_json(exclude={"reader", "timeout"}), resolve_reader(encoder.video.reader)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def media_digest(part: Image | Video) -> str:
    return file_digest(part.path) if part.data is None else hashlib.sha256(part.data).hexdigest()


@cache
def file_digest(path: Path) -> str:
    """Of a file, or of the files of a directory, as of a video that is one of pictures."""
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if file.is_file())
        named = [f"{file.name} {file_digest(file)}" for file in inside]
        return hashlib.sha256("\n".join(named).encode()).hexdigest()
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def processor_digest(processor: Any) -> str:
    return hashlib.sha256(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """A digest of every weight that the model computes with, adapters included."""
    return tensors_digest(model.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:32]


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data


def read_responses(folder: Path, keys: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Answers by question id, from the merged file and from every process's own, where they were given to the question
    that `keys` stands for; a torn last line is dropped."""
    answers = {}
    for path in sorted(folder.glob("responses*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            if not line:
                continue
            try:
                row = json.loads(line)
                if row["key"] == keys.get(row["id"]):
                    answers[row["id"]] = row
            except (ValueError, KeyError, TypeError):
                log.warning("%s: dropped a line that was cut off", path)
    return answers


def _merge(folder: Path, rows: list[dict[str, str]]) -> None:
    aside = folder / ".responses.jsonl"
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    aside.replace(folder / "responses.jsonl")
    for path in folder.glob("responses.*.jsonl"):
        path.unlink()


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
