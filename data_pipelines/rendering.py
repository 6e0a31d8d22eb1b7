"""Render conversations with the chat template, and find the assistant's turns in the rendered text.

An assistant turn begins where the generation prompt ends: the template's rendering of the conversation before the turn,
with `add_generation_prompt`. So a model is trained on exactly what it generates after that prompt.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from data_pipelines.samples import Image, Message, Part, Sample, SampleError, Text

Span: TypeAlias = tuple[int, int]  # characters of the rendered text: start, end (exclusive)

# The exceptions that templates raise: Jinja's own, and those of the Python expressions in them.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWER = "\u2039the answer\u203a"  # stands for an answer, to see what a template writes around one
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token")


def render(
    processor: Any, sample: Sample, add_generation_prompt: bool = False, continue_final_message: bool = False
) -> str:
    """Render a conversation with one placeholder per image or video. `continue_final_message` leaves the last turn
    open. Raises SampleError if the template rejects the conversation."""
    options = {"continue_final_message": True} if continue_final_message else {}
    conversation: Any = _conversation(processor, sample)
    try:
        text = processor.apply_chat_template(
            conversation or [conversation],  # a conversation without turns is accepted only as a batch of one
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **options,
        )
    except TEMPLATE_ERRORS as error:
        raise _template_error(sample, error) from error
    return text if conversation else text[0]


def render_marked(processor: Any, sample: Sample) -> tuple[str, list[Span] | None]:
    """Render a conversation, and return the spans that the template marks with `{% generation %}` in the same
    rendering; None if the template has no such markers. Raises SampleError."""
    template = processor.chat_template
    # SmolVLM's processor overrides apply_chat_template: it uses another template for videos.
    is_mixin = isinstance(processor, ProcessorMixin)
    overridden = is_mixin and type(processor).apply_chat_template is not ProcessorMixin.apply_chat_template
    if overridden or not isinstance(template, str) or not _MARKER.search(template):
        return render(processor, sample), None
    try:
        texts, spans = render_jinja_template(
            [_conversation(processor, sample)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
    except TEMPLATE_ERRORS as error:
        raise _template_error(sample, error) from error
    return texts[0], spans[0]


def answer_spans(
    processor: Any, sample: Sample, text: str, marked: list[Span] | None, wanted: Collection[int] | None = None
) -> list[Span | None]:
    """Return the span of each assistant turn in `text`, with its end-of-sequence token and without trailing white
    space.

    A turn begins at the end of its generation prompt. It ends where the template's marker does, if there is one pair of
    markers per turn and each contains the turn's text, or else with what the template writes after its text.

    Only the `wanted` turns, counted from 1, must be found (default: all): others are None if the text up to them is not
    their generation prompt, and end where they begin if their end is not found. Raises SampleError if a wanted turn is
    not found, for example because the template rewrites earlier turns.
    """
    indices = [i for i, message in enumerate(sample.messages) if message.role == "assistant"]
    ends = _marked_ends(processor, sample, text, marked, indices)
    spans: list[Span | None] = []
    previous = 0
    for turn, (index, end) in enumerate(zip(indices, ends, strict=True), start=1):
        low = None
        try:
            low = len(generation_prompt(processor, sample, index, text))
            high = max(low, _answer_end(processor, sample, text, index, low) if end is None else end)
            if low < previous:
                raise _rewritten(sample)
        except SampleError:
            if wanted is None or turn in wanted:
                raise
            high = low or 0
        spans.append(None if low is None else (low, high))
        previous = high
    return spans


def _marked_ends(
    processor: Any, sample: Sample, text: str, marked: list[Span] | None, indices: list[int]
) -> list[int | None]:
    """Return the ends of the template's markers; None for each turn if they are not those of the assistant turns."""
    if marked is not None and len(marked) == len(indices):
        spans = [_with_end(text, span, processor.tokenizer.eos_token) for span in marked]
        if all(_contains(text[low:high], sample.messages[i]) for (low, high), i in zip(spans, indices, strict=True)):
            return [high for _, high in spans]
    return [None] * len(indices)


def prompt_ends(processor: Any, sample: Sample, text: str) -> list[int]:
    """Return where in `text`, the rendering of a sample, the generation prompts of its assistant turns end.

    Those of turns that do not follow their generation prompt are left out.
    """
    ends = []
    for index, message in enumerate(sample.messages):
        if message.role == "assistant":
            with suppress(SampleError):
                ends.append(len(generation_prompt(processor, sample, index, text)))
    return ends


def generation_prompt(processor: Any, sample: Sample, index: int, text: str) -> str:
    """Return the generation prompt of the assistant turn at `index` of the messages.

    Raises SampleError if `text`, the rendering of the whole sample, does not begin with it.
    """
    before = replace(sample, messages=sample.messages[:index])
    prompt = render(processor, before, add_generation_prompt=True)
    if text.startswith(prompt):
        return prompt
    if not text.startswith(render(processor, before).rstrip()):
        raise _rewritten(sample)
    ending = repr(prompt[-40:])
    reason = (
        f"the chat template writes another text before an answer than its generation prompt, which ends with {ending}; "
        "set model.chat_template to another template, or train: false on such answers"
    )
    raise SampleError(sample.id, sample.source, reason, "encode")


def placeholders(processor: Any) -> list[str]:
    """Return the image and video placeholders, which the chat template writes and the processor expands."""
    tokens = (getattr(processor, name, None) for name in ("image_token", "video_token"))
    return [str(token) for token in tokens if token]  # BLIP-2's is an AddedToken


def _with_end(text: str, span: Span, end: str | None) -> Span:
    """Include the end-of-sequence token, which must be trained too: some templates close their marker before it."""
    low, high = span
    if end and text.startswith(end, high):
        high += len(end)
    return low, low + len(text[low:high].rstrip())


def _contains(span_text: str, message: Message) -> bool:
    """Whether a span contains the message's text. Jinja reports a wrong position for a marker inside a macro or a `set`
    block."""
    return all(part.text.strip() in span_text for part in message.parts if isinstance(part, Text))


def _answer_end(processor: Any, sample: Sample, text: str, index: int, low: int) -> int:
    """Return where the assistant turn at `index`, which begins at `low`, ends in `text`. Raises SampleError."""
    after = render(processor, replace(sample, messages=sample.messages[: index + 1])).rstrip()
    if text.startswith(after):
        return len(after)
    # The template writes a last turn in another way than an earlier one: thinking templates do. What it writes before
    # and after an answer shows where this one ends. Phi-3's writes an end-of-sequence token only after the last turn.
    around = replace(sample, messages=(*sample.messages[:index], Message("assistant", (Text(_ANSWER),))))
    shown = render(processor, around)
    if shown.count(_ANSWER) == 1 and shown[:low] == text[:low]:
        opening, closing = (part.strip() for part in shown[low:].split(_ANSWER))
        answer = sample.messages[index].text.strip()
        trailing = rf"\s{{0,{len(sample.messages[index].text) - len(sample.messages[index].text.rstrip())}}}"
        special = "|".join(re.escape(token.content) for token in processor.tokenizer.added_tokens_decoder.values())
        for start in {opening: None, "": None}:
            begin = r"\s*" + r"\s*".join(map(re.escape, (start, answer)))
            if found := re.compile(rf"{begin}(\s*{re.escape(closing)}|{trailing}({special}))").match(text, low):
                return found.end()
    raise _rewritten(sample)


def _rewritten(sample: Sample) -> SampleError:
    reason = (
        "the chat template rewrites earlier turns when later ones follow, so the assistant's turns cannot be located"
    )
    return SampleError(sample.id, sample.source, f"{reason}; set model.chat_template to another template", "encode")


def _conversation(processor: Any, sample: Sample) -> list[dict[str, Any]]:
    template = processor.chat_template
    if isinstance(template, str) and takes_strings(template):
        return [{"role": m.role, "content": _joined(m)} for m in sample.messages]
    return [{"role": m.role, "content": [_content(p) for p in m.parts]} for m in sample.messages]


def _joined(message: Message) -> str | list[dict[str, str]]:
    """Return a message without media as one string."""
    has_media = any(not isinstance(part, Text) for part in message.parts)
    return [_content(part) for part in message.parts] if has_media else message.text


@lru_cache(64)
def takes_strings(template: str) -> bool:
    """Return whether a chat template expects each message's content as a string, not as a list of parts.

    Most templates of language models do. Given a list, they fail or write its Python representation.
    """
    parts, string = [{"type": "text", "text": _ANSWER}], _ANSWER
    return not _writes_content(template, parts) and _writes_content(template, string)


def _writes_content(template: str, content: Any) -> bool:
    messages = [{"role": role, "content": content} for role in ("user", "assistant")]
    try:
        text = render_jinja_template([messages], chat_template=template, **dict.fromkeys(_SPECIAL_TOKENS, ""))[0][0]
    except TEMPLATE_ERRORS:
        return False
    return text.count(_ANSWER) == 2 and f"'{_ANSWER}'" not in text and f'"{_ANSWER}"' not in text


def _content(part: Part) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, Image) else "video"}


def _template_error(sample: Sample, error: Exception) -> SampleError:
    reason = str(error) or type(error).__name__
    return SampleError(sample.id, sample.source, f"the chat template rejects it ({reason})", "encode")
