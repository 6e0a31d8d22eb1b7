"""Render conversations with the chat template, and find the assistant's turns in the rendered text."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from data_pipelines.samples import Image, Message, Part, Sample, SampleError, Text
from mmdora.core.errors import UserError

Span: TypeAlias = tuple[int, int]  # characters of the rendered text: start, end (exclusive)

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(
    processor: Any, sample: Sample, add_generation_prompt: bool = False, continue_final_message: bool = False
) -> str:
    """Render a conversation with one placeholder per image or video. `continue_final_message` leaves the last turn
    open. Raises SampleError if the template rejects the conversation."""
    options = {"continue_final_message": True} if continue_final_message else {}
    try:
        return processor.apply_chat_template(
            _conversation(processor, sample), tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except TemplateError as error:
        raise _template_error(sample, error) from error


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
    except TemplateError as error:
        raise _template_error(sample, error) from error
    return texts[0], spans[0]


def answer_spans(processor: Any, sample: Sample, text: str, marked: list[Span] | None) -> list[Span]:
    """Return the span of each assistant turn in `text`, with its end-of-sequence token and without trailing white
    space.

    The template's markers are used if there is one pair per turn and each contains the turn's text. Otherwise a turn is
    what it adds to the rendering of the turns before it. Raises UserError for a template that rewrites earlier turns.
    """
    answers = [message for message in sample.messages if message.role == "assistant"]
    if marked is not None and len(marked) == len(answers):
        spans = [_with_end(text, span, processor.tokenizer.eos_token) for span in marked]
        if all(_contains(text[low:high], message) for (low, high), message in zip(spans, answers, strict=True)):
            return spans
    return _prefix_differences(processor, sample, text)


def placeholders(processor: Any) -> list[str]:
    """Return the image and video placeholders, which the chat template writes and the processor expands."""
    tokens = (getattr(processor, name, None) for name in ("image_token", "video_token"))
    return [token for token in tokens if token]


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


def _prefix_differences(processor: Any, sample: Sample, text: str) -> list[Span]:
    spans = []
    for index, message in enumerate(sample.messages):
        if message.role != "assistant":
            continue
        before = render(processor, replace(sample, messages=sample.messages[:index]), add_generation_prompt=True)
        after = render(processor, replace(sample, messages=sample.messages[: index + 1]))
        if not text.startswith(before) or not text.startswith(after.rstrip()):
            raise UserError(
                "the chat template rewrites earlier turns when later ones follow, so the assistant's turns cannot be "
                "located; set model.chat_template to another template"
            )
        spans.append((len(before), max(len(before), len(after.rstrip()))))
    return spans


def _conversation(processor: Any, sample: Sample) -> list[dict[str, Any]]:
    if getattr(processor, "content_is_string", False):  # a language model's chat template
        return [{"role": m.role, "content": m.text} for m in sample.messages]
    return [{"role": m.role, "content": [_content(p) for p in m.parts]} for m in sample.messages]


def _content(part: Part) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, Image) else "video"}


def _template_error(sample: Sample, error: TemplateError) -> SampleError:
    return SampleError(sample.id, sample.source, f"the chat template rejects it ({error})", "encode")
