"""The shipped Vicuna v1 template writes LLaVA-1.5's training format, character by character."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from mmdora.core.config import ModelConfig
from mmdora.core.config_files import find_path
from mmdora.models.loading import load_shape

NAME = "assets/vicuna_v1.jinja"
TWO_TURNS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"
)
SYSTEM = TWO_TURNS.split("USER:")[0]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def message(role: str, *parts: str) -> dict:
    """Return a message; the parts `<image>` and `<video>` are media."""
    media = {"<image>": {"type": "image"}, "<video>": {"type": "video"}}
    return {"role": role, "content": [media.get(part) or text(part) for part in parts]}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(find_path("assets/tiny-llava"))
    assert tokenizer.eos_token == "</s>"
    tokenizer.chat_template = find_path(NAME).read_text(encoding="utf-8")
    return tokenizer


def render(tokenizer, messages: list[dict], prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


TURNS = [message("user", "<image>", "Q1"), message("assistant", "A1"), message("user", "Q2")]


def test_two_turns_with_the_generation_prompt(tokenizer):
    assert render(tokenizer, TURNS, prompt=True) == TWO_TURNS


def test_two_turns_without_the_generation_prompt(tokenizer):
    assert render(tokenizer, [*TURNS, message("assistant", "A2")]) == f"{TWO_TURNS} A2</s>"
    assert render(tokenizer, TURNS) == TWO_TURNS.removesuffix("ASSISTANT:")


def test_string_content_is_rendered_like_parts(tokenizer):
    plain = [{"role": r, "content": c} for r, c in (("user", "<image>\nQ1"), ("assistant", "A1"), ("user", "Q2"))]
    assert render(tokenizer, plain, prompt=True) == TWO_TURNS


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("Q1", "<image>"), "<image>\nQ1"),  # LLaVA's loader moves it to the front
        (("Left of", "<image>", "is", "<image>", "?"), "<image>\n<image>\nLeft of is ?"),
        (("<video>", "Q1"), "<video>\nQ1"),
        (("Q", "1"), "Q1"),
    ],
)
def test_media_come_first(tokenizer, parts, expected):
    assert render(tokenizer, [message("user", *parts)], prompt=True) == f"{SYSTEM}USER: {expected} ASSISTANT:"


def test_a_system_message_replaces_the_default(tokenizer):
    assert render(tokenizer, [message("system", "Be brief."), message("user", "Q1")]) == "Be brief. USER: Q1 "


def test_the_generation_markers_enclose_answers_and_their_end_tokens(tokenizer):
    turns = [message("user", "One?"), message("assistant", "a b"), message("user", "Two?"), message("assistant", "c")]
    encoded = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, marked in pairs if marked]) == " a b</s> c</s>"


def test_a_config_can_name_the_template():
    processor = load_shape(ModelConfig(path="assets/tiny-llava", dtype="float32", chat_template=NAME))[1]
    assert processor.apply_chat_template(TURNS, add_generation_prompt=True) == TWO_TURNS
