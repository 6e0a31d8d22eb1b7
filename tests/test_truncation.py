"""Samples over data.max_length: how they are shortened, and that every change is reported."""

from __future__ import annotations

import pytest
import transformers as hf

from data_pipelines import processor_calls
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Image, Message, Sample, SampleError
from mmdora.core.config_files import load_config
from mmdora.core.errors import UserError
from tests.conversations import assistant, tiny_processor, user
from tests.media import write_image


@pytest.fixture
def image(tmp_path) -> Image:
    return Image(write_image(tmp_path / "a.png", size=(16, 16)))


@pytest.fixture
def processor():
    """A processor that encodes an image in the same way whatever follows: that of the tiny base does not."""
    tiny = tiny_processor()
    square = {"height": 16, "width": 16}
    images = hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square)
    strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return hf.LlavaProcessor(images, tiny.tokenizer, patch_size=4, chat_template=tiny.chat_template, **strategy)


def count_tokens(processor, *messages: Message) -> int:
    return Encoder(processor).encode(Sample("s", messages, "t"))["input_ids"].shape[1]


def encode(processor, limit: int, *messages: Message):
    """Return the encoded sample and the reported changes."""
    changes: list[str] = []
    encoder = Encoder(processor, max_length=limit, overlong="truncate")
    return encoder.encode(Sample("s", messages, "t"), changes.append), changes


def supervised_text(processor, encoded) -> str:
    labels = encoded["labels"][0]
    return processor.tokenizer.decode(labels[labels != IGNORED])


def test_the_last_turns_are_dropped_first(processor, image):
    pairs = [
        user(image, "One?"),
        assistant("a b"),
        user(image, "Two?"),
        assistant("c"),
        user("Three?"),
        assistant("d"),
    ]
    two, one = count_tokens(processor, *pairs[:4]), count_tokens(processor, *pairs[:2])
    whole, changes = encode(processor, count_tokens(processor, *pairs), *pairs)
    assert changes == []
    encoded, changes = encode(processor, two, *pairs)
    assert encoded["input_ids"].shape[1] == two
    assert supervised_text(processor, encoded) == " a b</s> c</s>"
    assert len(encoded["pixel_values"]) == len(whole["pixel_values"])
    assert changes == [f"over data.max_length {two} tokens: its last 2 turns are dropped"]
    encoded, changes = encode(processor, two - 1, *pairs)
    assert encoded["input_ids"].shape[1] == one
    assert supervised_text(processor, encoded) == " a b</s>"
    assert 2 * len(encoded["pixel_values"]) == len(whole["pixel_values"])  # the image is dropped with its question
    assert changes == [f"over data.max_length {two - 1} tokens: its last 4 turns are dropped"]


def test_media_are_loaded_once_however_many_turns_are_dropped(processor, image, monkeypatch):
    messages = [user(image, "One?"), assistant("a")]
    for i in range(20):
        messages += [user("And?", *([image] if i == 10 else [])), assistant("b")]
    loaded: list[str] = []
    load = processor_calls.load_image
    monkeypatch.setattr(processor_calls, "load_image", lambda path, data: loaded.append(path.name) or load(path, data))
    limit = count_tokens(processor, *messages[:2])
    loaded.clear()
    encoded, changes = encode(processor, limit, *messages)
    assert changes == [f"over data.max_length {limit} tokens: its last 40 turns are dropped"]
    assert len(encoded["pixel_values"]) == 1
    assert loaded == ["a.png", "a.png"]


def test_untrained_turns_are_dropped_before_an_answer_is_cut(processor):
    untrained = assistant("not trained", train=False)
    messages = [user("One?"), assistant("a"), user("Two?"), untrained, user("Three?")]
    encoded, changes = encode(processor, count_tokens(processor, *messages[:2]), *messages)
    assert supervised_text(processor, encoded) == " a</s>"
    assert "its last 3 turns are dropped" in changes[0]
    messages = [user("One?"), untrained, user("Two?"), assistant("a much longer answer")]
    encoded, changes = encode(processor, count_tokens(processor, *messages) - 2, *messages)
    assert supervised_text(processor, encoded).startswith(" a much")
    assert "the end of the answer is cut" in changes[0]


def test_the_only_answer_is_cut_without_an_end_token(processor, image):
    messages = user(image, "One?"), assistant("a long answer of many words")
    whole = Encoder(processor).encode(Sample("s", messages, "t"))
    length = whole["input_ids"].shape[1]
    first = int((whole["labels"][0] != IGNORED).nonzero()[0])
    for limit in (length - 1, first + 1):
        encoded, changes = encode(processor, limit, *messages)
        for key in ("input_ids", "labels", "attention_mask"):
            assert encoded[key].tolist() == whole[key][:, :limit].tolist()
        assert processor.tokenizer.eos_token_id not in encoded["labels"]
        assert encoded["pixel_values"].shape == whole["pixel_values"].shape
        assert changes == [f"over data.max_length {limit} tokens: the end of the answer is cut"]
    with pytest.raises(
        SampleError, match=f"'s' of t: {length} tokens, over data.max_length {first}; {first} of them come before"
    ):
        encode(processor, first, *messages)


def test_media_are_never_cut(processor, image):
    messages = user("Draw."), Message("assistant", (assistant("here").parts[0], image))
    processor.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{% for p in m.content %}"
        "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{{ eos_token }}{% endgeneration %}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    with pytest.raises(SampleError, match="its answer holds media, which cannot be cut"):
        encode(processor, count_tokens(processor, *messages) - 1, *messages)


def test_skipping_is_the_default_and_names_the_setting(processor):
    with pytest.raises(SampleError, match=r"tokens, over data\.max_length 5; data\.overlong=truncate shortens"):
        Encoder(processor, max_length=5).encode(Sample("s", (user("A long question?"), assistant("yes")), "t"))


def test_truncation_needs_max_length():
    assert load_config("quickstart").data.overlong == "skip"
    with pytest.raises(UserError, match="'overlong: truncate' needs 'max_length'"):
        load_config("quickstart", ["data.overlong=truncate"])
