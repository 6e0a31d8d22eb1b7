"""Generation: batches give the answers of single questions in every family; failed questions are named, others kept."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoProcessor

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Sample, Text, Video
from eval import generation
from eval.benchmarks import Question
from eval.digests import file_digest, processor_digest, weights_digest
from eval.generation import answer_all, answer_batches, generate
from eval.responses import Responses, question_keys
from mmdora.core.config import ModelConfig, VideoConfig
from mmdora.core.errors import RunError
from mmdora.models.loading import load_model
from tests.conftest import ROOT
from tests.families import FAMILIES
from tests.media import write_image, write_video
from tests.test_families import build


def question(name: str, *parts: Text | Image | Video | str) -> Question:
    message = Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))
    return Question(name, Sample(name, (message,), "test"), ("red",), name)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, list[Question]]:
    """Questions of all kinds and lengths, with images and videos of several shapes."""
    folder = tmp_path_factory.mktemp("media")
    sizes = [(48, 32), (32, 80), (150, 40)]
    small, tall, wide = (Image(write_image(folder / f"{i}.png", i, size)) for i, size in enumerate(sizes))
    videos = [Video(write_video(folder / f"{i}.mp4", frames=4, size=(64, 48 + 16 * i))) for i in range(2)]
    long = "Say of one thing after another what it is and where it stands. " * 3
    return {
        "image": [
            question("small", small, "What?"),
            question("tall", tall, "What is it?"),
            question("wide", wide, long),
        ],
        "two images": [
            question("two", tall, "and", small, "Which of two?"),
            question("three", small, "and", wide, tall, long),
        ],
        "video": [question("video", videos[0], "What is it?"), question("videos", videos[1], videos[0], long)],
        "text": [question("short", "What?"), question("long", long)],
    }


@pytest.fixture(scope="module")
def model():
    """(model, processor) of the shipped base, loaded once: tests leave it as it is."""
    torch.manual_seed(0)
    return load_model(ModelConfig(path="assets/tiny-llava", dtype="float32"))


def sensitive_model(name: str):
    """Build the family's tiny model with weights so large that its answers depend on every input."""
    model, processor = build(name)
    for path, weight in model.named_parameters():
        if weight.dim() == 2 and ("language_model" in path or "text_model" in path):
            nn.init.normal_(weight, std=0.3)
    return model, processor


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_give_the_tokens_of_single_questions(name, kinds, monkeypatch):
    """One image, two images, videos and text in one batch, compared with plain transformers on single questions."""
    model, processor = sensitive_model(name)
    encoder = Encoder(processor, VideoConfig(num_frames=3))
    questions = [q for kind in FAMILIES[name].media for q in kinds[kind]]
    single = {}
    for q in questions:
        prompt = encoder.encode_prompt(q.sample)
        ids = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
        end = processor.tokenizer.eos_token_id
        single[q.id] = " ".join(map(str, ids[: ids.index(end)] if end in ids else ids))
    assert len(set(single.values())) > len(single) // 2
    monkeypatch.setattr(processor.tokenizer, "decode", lambda row, **_: " ".join(map(str, row)))
    for size in (3, len(questions)):
        assert {q.id: tokens for q, tokens in generate(model, encoder, questions, size, 6)} == single


def test_penalties_and_beams_of_the_generation_config_are_ignored(kinds):
    """A penalty would count padding, which is the end-of-sequence token if the tokenizer has no padding token."""
    model, processor = build("llava")
    processor.tokenizer.pad_token = None
    encoder, questions = Encoder(processor), kinds["image"] + kinds["text"]
    plain = {q.id: text for q, text in generate(model, encoder, questions, 1, 6)}
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.num_beams = 2
    for size in (1, 5):
        assert {q.id: text for q, text in generate(model, encoder, questions, size, 6)} == plain


class LimitedMemory:
    """The model's `generate`, with memory for a limited number of questions."""

    def __init__(self, model, limit: int):
        self.generate, self.limit, self.sizes = model.generate, limit, []

    def __call__(self, input_ids, **inputs):
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.generate(input_ids=input_ids, **inputs)


def test_a_batch_that_runs_out_of_memory_is_split(model, kinds, monkeypatch, caplog):
    llava, processor = model
    encoder, questions = Encoder(processor), kinds["image"] + kinds["text"] * 2
    questions = [question(str(i), *q.sample.messages[0].parts) for i, q in enumerate(questions)]
    single = {q.id: text for q, text in generate(llava, encoder, questions, 1, 4)}
    limited = LimitedMemory(llava, limit=2)
    monkeypatch.setattr(llava, "generate", limited)
    with caplog.at_level(logging.WARNING, logger="eval.generation"):
        split = {q.id: text for q, text in generate(llava, encoder, questions, 4, 4)}
    assert split == single
    assert "Out of memory with 4 questions in a batch; using at most 2" in caplog.text
    assert limited.sizes.count(4) <= 1
    assert max(limited.sizes[limited.sizes.index(2) :]) == 2
    limited.limit = 0
    with pytest.raises(RunError, match="cannot be answered: the device is out of memory"):
        list(generate(llava, encoder, questions, 2, 4))


def test_failed_questions_are_named_and_other_answers_kept(model, kinds, tmp_path, monkeypatch):
    llava, processor = model
    encoder, folder = Encoder(processor), tmp_path / "result"
    torn = tmp_path / "torn.png"
    torn.write_bytes(write_image(tmp_path / "whole.png").read_bytes()[:200])
    special = [question("torn", Image(torn), "What?"), question("odd", "<image> What?")]
    questions = [*kinds["image"], *special, *kinds["text"]]
    refused = encoder.encode_prompt(kinds["text"][1].sample)["input_ids"].shape[1]
    plain, progress = llava.generate, []

    def failing(input_ids, attention_mask, **inputs):
        if refused in attention_mask.sum(1):
            raise RuntimeError("no such length")
        return plain(input_ids=input_ids, attention_mask=attention_mask, **inputs)

    def answers(*excluded: str) -> dict[str, str]:
        chosen = [q for q in questions if q.id not in excluded]
        keys = question_keys(chosen, encoder, 4, weights_digest(llava))
        return answer_all(llava, encoder, chosen, keys, folder, 8, 4, progress.append)

    monkeypatch.setattr(llava, "generate", failing)
    with pytest.raises(RunError, match=r"3 of 7 questions could not be answered, such as 'torn': .*torn\.png"):
        answers()
    failed = {row["id"]: row["reason"] for row in map(json.loads, (folder / "failed.jsonl").open())}
    assert list(failed) == ["torn", "odd", "long"]
    assert "literal placeholder" in failed["odd"]
    assert failed["long"] == "the model raised an error (no such length)"
    assert len((folder / "responses.jsonl").read_text().splitlines()) == 4
    assert {path.name for path in folder.iterdir()} == {"failed.jsonl", "responses.jsonl"}
    torn.write_bytes((tmp_path / "whole.png").read_bytes())
    monkeypatch.setattr(llava, "generate", plain)
    progress.clear()
    answers("odd")
    assert progress == [4, 1, 1] or progress == [4, 2]  # 4 are stored; only the 2 repaired ones are generated
    assert {path.name for path in folder.iterdir()} == {"responses.jsonl"}


def test_nothing_is_appended_to_an_incomplete_line(tmp_path):
    """A killed process may leave half a line."""
    keys = {"a": "1", "b": "1", "c": "1"}
    first = Responses(tmp_path, keys)
    first.add([("a", "half a 𝄞 and a line\u2028separator"), ("b", "yes")])
    whole = (tmp_path / "responses.jsonl").read_bytes()
    (tmp_path / "responses.jsonl").write_bytes(whole[:-5])
    second = Responses(tmp_path, keys)
    assert set(second.known) == {"a"}
    second.add([("b", "no")])
    killed = Responses(tmp_path, keys)
    assert killed.known == {"a": "half a 𝄞 and a line\u2028separator", "b": "no"}
    killed.add([("c", "\udcff")])  # a lone surrogate
    assert killed.finish(["a", "b", "c"]) == {**killed.known, "c": "\udcff"}
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]


def test_answers_under_other_keys_are_kept_until_the_end_and_never_reported(tmp_path):
    wrong = Responses(tmp_path, {"a": "wrong prompt"})
    wrong.add([("a", "old")])
    right = Responses(tmp_path, {"a": "right", "b": "right"})
    assert right.known == {}
    right.add([("b", "new")])
    assert Responses(tmp_path, {"a": "wrong prompt"}).known == {"a": "old"}  # still there for the old setting
    last = Responses(tmp_path, {"a": "right", "b": "right"})
    last.add([("a", "new")])
    assert last.finish(["a", "b"]) == {"a": "new", "b": "new"}
    assert "old" not in (tmp_path / "responses.jsonl").read_text()


def test_a_question_without_an_answer_or_a_reason_is_an_internal_error(tmp_path):
    with pytest.raises(AssertionError, match="neither an answer nor a reason"):
        Responses(tmp_path, {"a": "1"}).finish(["a"])


class Stub(nn.Module):
    """A model that answers every question with one token, on any device: a tensor on "meta" has no data."""

    def __init__(self, device: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, device=device))
        self.generation_config = SimpleNamespace(eos_token_id=2)
        self.before_answer: Callable[[], object] = lambda: None

    @property
    def base_model(self) -> Stub:
        return self

    def generate(self, input_ids, **_):
        self.before_answer()
        return torch.zeros(len(input_ids), input_ids.shape[1] + 1, dtype=torch.long)


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The ids of the questions that have been encoded."""
    ids: list[str] = []
    encode = Encoder.encode_prompt

    def recorded(self, sample):
        ids.append(sample.id)
        return encode(self, sample)

    monkeypatch.setattr(Encoder, "encode_prompt", recorded)
    return ids


def short_questions(number: int) -> list[Question]:
    return [question(str(i), "word " * (i % 7)) for i in range(number)]


@pytest.mark.parametrize(("memory", "expected"), [(2**30, [2, 4, 8, 16, 10]), (1, [2] * 20)])
def test_windows_grow_from_one_batch_up_to_the_memory_limit(memory, expected, model, encoded, monkeypatch):
    """The first answers come after one encoded batch."""
    monkeypatch.setattr(generation, "WINDOW_BYTES", memory)
    answers = answer_batches(Stub("cpu"), Encoder(model[1]), short_questions(40), 2, 1, None, lambda *_: None)
    totals = sorted({len(encoded) for _ in answers})
    assert [total - before for before, total in zip([0, *totals], totals, strict=False)] == expected


def test_an_accelerator_computes_while_the_next_window_is_encoded(model, encoded):
    def batches(stub: Stub) -> list[list[str]]:
        answers = answer_batches(stub, Encoder(model[1]), short_questions(40), 2, 1, None, lambda *_: None)
        return [[q.id for q, _ in batch] for batch in answers]

    def wait_for_the_next_window() -> None:
        deadline = time.monotonic() + 60
        while len(encoded) <= 2:
            assert time.monotonic() < deadline, "the next window was not encoded in the background"
            time.sleep(0.01)

    stub = Stub("meta")
    stub.before_answer = wait_for_the_next_window
    assert batches(stub) == batches(Stub("cpu"))


def test_an_error_while_encoding_in_the_background_is_raised(model, monkeypatch):
    monkeypatch.setattr(Encoder, "encode_prompt", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        list(answer_batches(Stub("meta"), Encoder(model[1]), short_questions(4), 2, 1, None, lambda *_: None))


def test_training_mode_is_restored(model, kinds):
    llava, processor = model
    llava.train()
    answers = answer_batches(llava, Encoder(processor), kinds["text"], 2, 2, None, lambda *_: None)
    next(answers)
    assert not llava.training
    answers.close()
    assert llava.training
    llava.eval()


def test_digests_change_with_the_template_the_tokenizer_and_media(tmp_path):
    processor = AutoProcessor.from_pretrained(ROOT / "assets" / "tiny-llava")
    first = processor_digest(processor)
    assert processor_digest(processor) == first
    template, processor.chat_template = processor.chat_template, processor.chat_template + " "
    assert processor_digest(processor) != first
    processor.chat_template = template
    processor.tokenizer.add_tokens(["mmdora"])
    assert processor_digest(processor) != first
    file = write_image(tmp_path / "a.png")
    before = file_digest(file)
    write_image(file, seed=1)
    assert file_digest(file) != before
    assert file_digest(Path("nowhere")) == "missing"
