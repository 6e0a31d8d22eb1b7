"""Stage one: batches answer as single questions do, in every family; what fails is named, and the rest is kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Sample, Text, Video
from eval import generation
from eval.benchmarks import Question
from eval.digests import file_digest, processor_digest, weights_digest
from eval.generation import answer_all, answer_batches, generate
from eval.responses import Responses, question_keys
from mmdora.core.config import VideoConfig
from mmdora.core.errors import RunError
from tests.families import FAMILIES
from tests.media import write_image, write_video
from tests.test_families import build


def question(name: str, *parts: Text | Image | Video | str) -> Question:
    message = Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))
    return Question(name, Sample(name, (message,), "test"), ("red",), name)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, list[Question]]:
    """Questions of all kinds and lengths, pictures and clips of several shapes."""
    folder = tmp_path_factory.mktemp("media")
    sizes = [(48, 32), (32, 80), (150, 40)]
    small, tall, wide = (Image(write_image(folder / f"{i}.png", i, size)) for i, size in enumerate(sizes))
    clips = [Video(write_video(folder / f"{i}.mp4", frames=4, size=(64, 48 + 16 * i))) for i in range(2)]
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
        "video": [question("clip", clips[0], "What is it?"), question("clips", clips[1], clips[0], long)],
        "text": [question("short", "What?"), question("long", long)],
    }


def attentive(name: str):
    """The family's tiny model with weights so large that what it says depends on all that it reads."""
    model, processor = build(name)
    for path, weight in model.named_parameters():
        if weight.dim() == 2 and ("language_model" in path or "text_model" in path):
            nn.init.normal_(weight, std=0.3)
    return model, processor


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_answer_token_for_token_as_single_questions(name, kinds, monkeypatch):
    """Pictures, two of them, clips and words alone, side by side; and as plain transformers answers each."""
    model, processor = attentive(name)
    encoder = Encoder(processor, VideoConfig(num_frames=3))
    asked = [q for kind in FAMILIES[name].media for q in kinds[kind]]
    alone = {}
    for q in asked:
        prompt = encoder.encode_prompt(q.sample)
        ids = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
        end = processor.tokenizer.eos_token_id
        alone[q.id] = " ".join(map(str, ids[: ids.index(end)] if end in ids else ids))
    assert len(set(alone.values())) > len(alone) // 2
    monkeypatch.setattr(processor.tokenizer, "decode", lambda row, **_: " ".join(map(str, row)))
    for size in (3, len(asked)):
        assert {q.id: tokens for q, tokens in generate(model, encoder, asked, size, 6)} == alone


def test_a_model_with_a_penalty_is_asked_greedily(kinds):
    """Padding, which is the end of sequence where a tokenizer has no other, would be penalised with the rest."""
    model, processor = build("llava")
    processor.tokenizer.pad_token = None
    encoder, asked = Encoder(processor), kinds["image"] + kinds["text"]
    plain = {q.id: text for q, text in generate(model, encoder, asked, 1, 6)}
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.num_beams = 2
    for size in (1, 5):
        assert {q.id: text for q, text in generate(model, encoder, asked, size, 6)} == plain


class Forgetful:
    """The model's `generate`, for which there is memory for so many questions only."""

    def __init__(self, model, room: int):
        self.generate, self.room, self.tried = model.generate, room, []

    def __call__(self, input_ids, **inputs):
        self.tried.append(len(input_ids))
        if len(input_ids) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.generate(input_ids=input_ids, **inputs)


def test_a_batch_without_memory_is_halved(tiny, kinds, monkeypatch, caplog):
    model, processor = tiny
    encoder, asked = Encoder(processor), kinds["image"] + kinds["text"] * 2
    asked = [question(str(i), *q.sample.messages[0].parts) for i, q in enumerate(asked)]
    single = {q.id: text for q, text in generate(model, encoder, asked, 1, 4)}
    forgetful = Forgetful(model, room=2)
    monkeypatch.setattr(model, "generate", forgetful)
    with caplog.at_level(logging.WARNING, logger="eval.generation"):
        halved = {q.id: text for q, text in generate(model, encoder, asked, 4, 4)}
    assert halved == single
    assert "no memory for 4 questions at once: from here on at most 2" in caplog.text
    assert forgetful.tried.count(4) <= 1
    assert max(forgetful.tried[forgetful.tried.index(2) :]) == 2
    forgetful.room = 0
    with pytest.raises(RunError, match="cannot be answered: out of the device's memory"):
        list(generate(model, encoder, asked, 2, 4))


def test_what_fails_is_named_and_the_rest_is_kept(tiny, kinds, tmp_path, monkeypatch):
    model, processor = tiny
    encoder, folder = Encoder(processor), tmp_path / "result"
    torn = tmp_path / "torn.png"
    torn.write_bytes(write_image(tmp_path / "whole.png").read_bytes()[:200])
    asked = [*kinds["image"], question("torn", Image(torn), "What?"), question("odd", "<image> What?"), *kinds["text"]]
    refused = encoder.encode_prompt(kinds["text"][1].sample)["input_ids"].shape[1]
    plain, seen = model.generate, []

    def picky(input_ids, attention_mask, **inputs):
        seen.extend(attention_mask.sum(1).tolist())
        if refused in attention_mask.sum(1):
            raise RuntimeError("no such length")
        return plain(input_ids=input_ids, attention_mask=attention_mask, **inputs)

    def answers(*left_out: str) -> dict[str, str]:
        chosen = [q for q in asked if q.id not in left_out]
        keys = question_keys(chosen, encoder, 4, weights_digest(model))
        return answer_all(model, encoder, chosen, keys, folder, 8, 4)

    monkeypatch.setattr(model, "generate", picky)
    with pytest.raises(RunError, match=r"3 of 7 questions could not be answered, such as 'torn': .*torn\.png"):
        answers()
    failed = {row["id"]: row["reason"] for row in map(json.loads, (folder / "failed.jsonl").open())}
    assert list(failed) == ["torn", "odd", "long"]
    assert "literal placeholder" in failed["odd"]
    assert failed["long"] == "the model refuses it (no such length)"
    assert len((folder / "responses.jsonl").read_text().splitlines()) == 4
    assert {path.name for path in folder.iterdir()} == {"failed.jsonl", "responses.jsonl"}
    torn.write_bytes((tmp_path / "whole.png").read_bytes())
    monkeypatch.setattr(model, "generate", plain)
    told: list[int] = []
    keys = question_keys([q for q in asked if q.id != "odd"], encoder, 4, weights_digest(model))
    answer_all(model, encoder, [q for q in asked if q.id != "odd"], keys, folder, 8, 4, told.append)
    assert told == [4, 1, 1] or told == [4, 2]  # only the two that were mended
    assert {path.name for path in folder.iterdir()} == {"responses.jsonl"}


def test_a_line_behind_a_torn_one_is_a_line(tmp_path):
    """A killed process leaves half a line, to which nothing is to be glued."""
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
    killed.add([("c", "\udcff")])  # half a character
    assert killed.finish(["a", "b", "c"]) == {**killed.known, "c": "\udcff"}
    assert [path.name for path in tmp_path.iterdir()] == ["responses.jsonl"]


def test_answers_under_other_keys_are_kept_until_the_end_and_never_told(tmp_path):
    wrong = Responses(tmp_path, {"a": "wrong prompt"})
    wrong.add([("a", "old")])
    right = Responses(tmp_path, {"a": "right", "b": "right"})
    assert right.known == {}
    right.add([("b", "new")])
    assert Responses(tmp_path, {"a": "wrong prompt"}).known == {"a": "old"}  # gone back to, it is there still
    last = Responses(tmp_path, {"a": "right", "b": "right"})
    last.add([("a", "new")])
    assert last.finish(["a", "b"]) == {"a": "new", "b": "new"}
    assert "old" not in (tmp_path / "responses.jsonl").read_text()


def test_a_question_that_nobody_answered_is_our_mistake(tmp_path):
    with pytest.raises(AssertionError):
        Responses(tmp_path, {"a": "1"}).finish(["a"])


def test_the_first_window_is_one_batch_and_windows_are_encoded_ahead(tiny, monkeypatch):
    asked = [question(str(i), "word " * (i % 7)) for i in range(40)]
    windows = [len(window) for window in generation._windows(Encoder(tiny[1]), asked, 2)]
    assert windows == [2, 4, 8, 16, 10]
    monkeypatch.setattr(generation, "WINDOW_BYTES", 1)
    assert set(map(len, generation._windows(Encoder(tiny[1]), asked, 2))) == {2, 0}
    assert list(generation._ahead(iter(range(5)))) == list(range(5))
    with pytest.raises(ZeroDivisionError):
        list(generation._ahead(1 // (2 - i) for i in range(4)))

    def batches(apart: bool) -> list[list[str]]:
        found = generation._batches(Encoder(tiny[1]), asked, 4, lambda *_: None, apart)
        return [[q.id for q, _ in batch] for batch in found]

    assert batches(apart=True) == batches(apart=False)


def test_a_model_that_trains_goes_on_training(tiny, kinds):
    model, processor = tiny
    model.train()
    asked = answer_batches(model, Encoder(processor), kinds["text"], 2, 2, None, lambda *_: None)
    next(asked)
    assert not model.training
    asked.close()
    assert model.training


def test_a_digest_knows_what_makes_tensors(tiny, tmp_path):
    _, processor = tiny
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
