"""What becomes of samples over data.max_length: each rule, and that every change is told."""

from __future__ import annotations

import pytest

from data_pipelines import encoding
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Image, Message, Sample, SampleError
from mmdora.core.config_files import load_config
from mmdora.core.errors import UserError
from tests.media import write_image
from tests.test_encoding import assistant, user


@pytest.fixture
def picture(tmp_path) -> Image:
    return Image(write_image(tmp_path / "a.png", size=(16, 16)))


def tokens(processor, *messages: Message) -> int:
    return Encoder(processor).encode(Sample("s", messages, "t"))["input_ids"].shape[1]


def encode(processor, limit: int, *messages: Message):
    told: list[str] = []
    row = Encoder(processor, max_length=limit, overlong="truncate").encode(Sample("s", messages, "t"), told.append)
    return row, told


def learnt(processor, row) -> str:
    labels = row["labels"][0]
    return processor.tokenizer.decode(labels[labels != IGNORED])


def test_the_last_questions_go_first(tiny, picture):
    processor = tiny[1]
    pairs = [
        user(picture, "One?"),
        assistant("a b"),
        user(picture, "Two?"),
        assistant("c"),
        user("Three?"),
        assistant("d"),
    ]
    two, one = tokens(processor, *pairs[:4]), tokens(processor, *pairs[:2])
    whole, told = encode(processor, tokens(processor, *pairs), *pairs)
    assert told == []
    row, told = encode(processor, two, *pairs)
    assert row["input_ids"].shape[1] == two
    assert learnt(processor, row) == " a b</s> c</s>"
    assert len(row["pixel_values"]) == len(whole["pixel_values"])
    assert told == [f"over data.max_length {two} tokens: its last 2 turns are left out"]
    row, told = encode(processor, two - 1, *pairs)
    assert row["input_ids"].shape[1] == one
    assert learnt(processor, row) == " a b</s>"
    assert 2 * len(row["pixel_values"]) == len(whole["pixel_values"])  # the picture goes with its question
    assert told == [f"over data.max_length {two - 1} tokens: its last 4 turns are left out"]


def test_media_are_read_once_however_many_turns_are_left_out(tiny, picture, monkeypatch):
    messages = [user(picture, "One?"), assistant("a")]
    for i in range(20):
        messages += [user("And?", *([picture] if i == 10 else [])), assistant("b")]
    read: list[str] = []
    load = encoding.load_image
    monkeypatch.setattr(encoding, "load_image", lambda path, data: read.append(path.name) or load(path, data))
    limit = tokens(tiny[1], *messages[:2])
    read.clear()
    row, told = encode(tiny[1], limit, *messages)
    assert told == [f"over data.max_length {limit} tokens: its last 40 turns are left out"]
    assert len(row["pixel_values"]) == 1
    assert read == ["a.png", "a.png"]


def test_turns_that_are_only_read_go_before_an_answer(tiny):
    processor = tiny[1]
    read = Message("assistant", assistant("to be read").parts, train=False)
    messages = [user("One?"), assistant("a"), user("Two?"), read, user("Three?")]
    row, told = encode(processor, tokens(processor, *messages[:2]), *messages)
    assert learnt(processor, row) == " a</s>"
    assert "its last 3 turns are left out" in told[0]
    messages = [user("One?"), read, user("Two?"), assistant("a much longer answer")]  # the one to learn is the last
    row, told = encode(processor, tokens(processor, *messages) - 2, *messages)
    assert learnt(processor, row).startswith(" a much")
    assert "the answer is cut" in told[0]


def test_one_answer_is_cut_and_its_end_is_not_learnt(tiny, picture):
    processor = tiny[1]
    messages = user(picture, "One?"), assistant("a long answer of many words")
    whole = Encoder(processor).encode(Sample("s", messages, "t"))
    length = whole["input_ids"].shape[1]
    first = int((whole["labels"][0] != IGNORED).nonzero()[0])
    for limit in (length - 1, first + 1):
        row, told = encode(processor, limit, *messages)
        for key in ("input_ids", "labels", "attention_mask"):
            assert row[key].tolist() == whole[key][:, :limit].tolist()
        assert processor.tokenizer.eos_token_id not in row["labels"]
        assert row["pixel_values"].shape == whole["pixel_values"].shape
        assert told == [f"over data.max_length {limit} tokens: the answer is cut there"]
    with pytest.raises(
        SampleError, match=f"'s' of t: {length} tokens, over data.max_length {first}; what comes before"
    ):
        encode(processor, first, *messages)


def test_media_are_never_cut(tiny, picture):
    processor = tiny[1]
    messages = user("Draw."), Message("assistant", (assistant("here").parts[0], picture))
    processor.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{% for p in m.content %}"
        "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{{ eos_token }}{% endgeneration %}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    with pytest.raises(SampleError, match="its answer holds media, which are not cut"):
        encode(processor, tokens(processor, *messages) - 1, *messages)


def test_skipping_is_the_default_and_says_what_would_help(tiny):
    with pytest.raises(SampleError, match=r"tokens, over data\.max_length 5; data\.overlong=truncate shortens"):
        Encoder(tiny[1], max_length=5).encode(Sample("s", (user("A long question?"), assistant("yes")), "t"))


def test_the_settings():
    assert load_config("quickstart").data.overlong == "skip"
    with pytest.raises(UserError, match="'overlong: truncate' needs 'max_length'"):
        load_config("quickstart", ["data.overlong=truncate"])
