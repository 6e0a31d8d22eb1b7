"""A conversation as the chat template writes it, and where in it the assistant speaks."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from data_pipelines.samples import Image, Message, Part, Sample, SampleError, Text
from mmdora.core.errors import UserError

Span: TypeAlias = tuple[int, int]  # characters of the rendering, the second left out

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render(
    processor: Any, sample: Sample, add_generation_prompt: bool = False, continue_final_message: bool = False
) -> str:
    """The conversation with one placeholder for each picture or video; `continue_final_message` leaves the last turn
    open. Raises SampleError where the template refuses it."""
    how = {"continue_final_message": True} if continue_final_message else {}
    try:
        return processor.apply_chat_template(
            _conversation(sample), tokenize=False, add_generation_prompt=add_generation_prompt, **how
        )
    except TemplateError as error:
        raise _refused(sample, error) from error


def render_marked(processor: Any, sample: Sample) -> tuple[str, list[Span] | None]:
    """`render`, and what the template itself marks as the assistant's with `{% generation %}` in the same rendering;
    None where it has no such markers. Raises SampleError."""
    template = processor.chat_template
    # SmolVLM's processor has a way of its own, which takes another template for clips.
    own_way = type(processor).apply_chat_template is not ProcessorMixin.apply_chat_template
    if own_way or not isinstance(template, str) or not _MARKER.search(template):
        return render(processor, sample), None
    try:
        texts, spans = render_jinja_template(
            [_conversation(sample)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise _refused(sample, error) from error
    return texts[0], spans[0]


def answer_spans(processor: Any, sample: Sample, text: str, marked: list[Span] | None) -> list[Span]:
    """Where in `text` each of the assistant's turns stands, with its end of sequence and without the white space
    behind it.

    Markers are believed where there is one pair a turn and it holds the turn's words; else a turn is what it adds to
    the rendering of everything before it. Raises UserError for a template that rewrites earlier turns.
    """
    answers = [message for message in sample.messages if message.role == "assistant"]
    if marked is not None and len(marked) == len(answers):
        spans = [_with_end(text, span, processor.tokenizer.eos_token) for span in marked]
        if all(_holds(text[low:high], message) for (low, high), message in zip(spans, answers, strict=True)):
            return spans
    return _differences(processor, sample, text)


def placeholders(processor: Any) -> list[str]:
    """What the chat template writes for a picture or a video, and the processor then expands."""
    tokens = (getattr(processor, name, None) for name in ("image_token", "video_token"))
    return [token for token in tokens if token]


def _with_end(text: str, span: Span, end: str | None) -> Span:
    """Some templates close their marker before the end of sequence, which must be learnt too."""
    low, high = span
    if end and text.startswith(end, high):
        high += len(end)
    return low, low + len(text[low:high].rstrip())


def _holds(said: str, message: Message) -> bool:
    """A marker inside a macro or a `set` block is told with the wrong place."""
    return all(part.text.strip() in said for part in message.parts if isinstance(part, Text))


def _differences(processor: Any, sample: Sample, text: str) -> list[Span]:
    spans = []
    for index, message in enumerate(sample.messages):
        if message.role != "assistant":
            continue
        before = render(processor, replace(sample, messages=sample.messages[:index]), add_generation_prompt=True)
        after = render(processor, replace(sample, messages=sample.messages[: index + 1]))
        if not text.startswith(before) or not text.startswith(after.rstrip()):
            raise UserError(
                "the chat template rewrites earlier turns when later ones follow, so that the assistant's words "
                "cannot be found in it; give another with model.chat_template"
            )
        spans.append((len(before), max(len(before), len(after.rstrip()))))
    return spans


def _conversation(sample: Sample) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": [_content(p) for p in m.parts]} for m in sample.messages]


def _content(part: Part) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, Image) else "video"}


def _refused(sample: Sample, error: TemplateError) -> SampleError:
    return SampleError(sample.id, sample.source, f"the chat template refuses it ({error})", "encode")
