"""Labels from the template's generation markers equal those from prefix differences, for any conversation."""

from __future__ import annotations

import copy
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.rendering import answer_spans, render_marked
from data_pipelines.samples import Image, Message, Sample, SampleError, Text
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError
from tests.conversations import assistant, tiny_processor, user
from tests.families import FAMILIES
from tests.media import write_image
from tests.tiny_models import CHAT_TEMPLATE
from tests.tiny_parts import template

MARKER = re.compile(r"\{%-? (end)?generation -?%\}")
TINY = find_path("assets/tiny-llava/chat_template.jinja").read_text(encoding="utf-8")
VICUNA = find_path("assets/vicuna_v1.jinja").read_text(encoding="utf-8")
# The templates of the model families and of the test models, with markers.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{% for part in message.content %}{{ part.text }}{% endfor %}"
    "<|im_end|>{% endgeneration %}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHORT_MARKER = CHATML.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>").replace(
    "<|im_end|>", "{{ eos_token }}"
)
TRIMMED = CHATML.replace("{{ part.text }}", "{{ part.text | trim }}")
PLAIN = CHAT_TEMPLATE.replace("+ message.content[0].text + eos_token", "").replace(
    "{{- ' ASSISTANT: '  -}}",
    "{{- ' ASSISTANT:' -}}{%- generation -%}{{- ' ' + message.content[0].text + eos_token -}}{%- endgeneration -%}",
)
TEMPLATES = {
    "tiny base": TINY,
    "vicuna": VICUNA,
    "chatml": CHATML,
    "end after the marker": SHORT_MARKER,
    "trimmed": TRIMMED,
    "test models": PLAIN,
}

LOOKS_LIKE_A_ROLE = [
    "USER: ",
    " ASSISTANT:",
    "<|im_start|>user\n",
    "assistant\n",
    "</s>",
    "{% generation %}",
    "{{ x }}",
]
letters = st.characters(exclude_categories=("Cs",))
words = st.lists(
    st.one_of(st.text(letters, max_size=8), st.sampled_from([*LOOKS_LIKE_A_ROLE, " ", "\n", "\u00a0", "é", "図"])),
    min_size=1,
    max_size=5,
).map("".join)
nonempty = words.filter(lambda text: text.strip() != "")


@st.composite
def conversations(draw, image: Image) -> Sample:
    messages = []
    if draw(st.booleans()):
        messages.append(Message("system", (Text(draw(nonempty)),)))
    for _ in range(draw(st.integers(1, 3))):
        media = (image,) if draw(st.integers(0, 3)) == 0 else ()
        messages.append(Message("user", (*media, Text(draw(nonempty)))))
        messages.append(Message("assistant", (Text(draw(nonempty)),), train=draw(st.booleans())))
    if draw(st.booleans()):
        messages.append(Message("user", (Text(draw(nonempty)),)))
    return Sample("s", tuple(messages), "test")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Image:
    return Image(write_image(tmp_path_factory.mktemp("labels") / "a.png", size=(16, 16)))


def encoders(processor, chat_template: str) -> tuple[Encoder, Encoder]:
    """Return an encoder with the template, and one with the same template without markers."""
    pair = []
    for text in (chat_template, MARKER.sub("", chat_template)):
        own = copy.copy(processor)
        own.chat_template = text
        pair.append(Encoder(own))
    return pair[0], pair[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_markers_and_prefix_differences_give_equal_labels(name, processor, image):
    marked, plain = encoders(processor, TEMPLATES[name])
    assert MARKER.search(marked.processor.chat_template)
    assert not MARKER.search(plain.processor.chat_template)

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(conversations(image))
    def check(sample: Sample) -> None:
        text, spans = render_marked(marked.processor, sample)
        assert spans is not None
        assert render_marked(plain.processor, sample) == (text, None)
        from_markers = answer_spans(marked.processor, sample, text, spans)
        assert from_markers == answer_spans(plain.processor, sample, text, None)
        answers = [m.text for m in sample.messages if m.role == "assistant"]
        for (low, high), answer in zip(from_markers, answers, strict=True):
            assert answer.strip() in text[low:high]
        results = []
        for encoder in (marked, plain):
            try:
                encoded = encoder.encode(sample)
                results.append((encoded["input_ids"].tolist(), encoded["labels"].tolist()))
            except SampleError as error:
                results.append((error.reason, None))
        assert results[0] == results[1]

    check()


def test_markers_are_preferred_to_prefix_differences(processor):
    """A template that rewrites earlier turns has no prefix differences, but its markers are still right."""
    thinking = CHATML.replace(
        "{{ part.text }}{% endfor %}<|im_end|>{% endgeneration %}",
        "{{ part.text if message is sameas messages[-1] else part.text.split('|')[-1] }}{% endfor %}"
        "{{ eos_token }}{% endgeneration %}",
    )
    marked, plain = encoders(processor, thinking)
    sample = Sample("s", (user("One?"), assistant("a"), user("Two?"), assistant("hm|b")), "test")
    labels = marked.encode(sample)["labels"][0]
    assert processor.tokenizer.decode(labels[labels != IGNORED]) == "a</s>hm|b</s>"
    assert plain.encode(sample)["labels"].tolist() == [labels.tolist()]
    rewritten = Sample("s", (user("One?"), assistant("hm|a"), user("Two?"), assistant("b")), "test")
    for encoder in (marked, plain):
        with pytest.raises(SampleError, match="'s' of test: the chat template drops or changes"):
            encoder.encode(rewritten)
    text, _ = render_marked(plain.processor, rewritten)
    with pytest.raises(UserError, match=r"rewrites earlier turns.*model\.chat_template"):
        answer_spans(plain.processor, rewritten, text, None)


def test_markers_with_a_wrong_position_are_not_used(processor):
    """Jinja computes a marker's position without the text of the same expression, which is not written yet."""
    macro = (
        "{% macro turn(m) %}{% generation %}{{ m.content[0].text }}<|im_end|>{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' ~ turn(m) ~ '\n' }}"
        "{% else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content[0].text ~ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    comment = CHATML.replace("{% generation %}", "{# {% generation %} #}").replace("{% endgeneration %}", "")
    sample = Sample("s", (user("One?"), assistant("a b"), user("Two?"), assistant("c")), "test")
    reference = encoders(processor, CHATML)[0]
    expected = reference.encode(sample)["labels"].tolist()
    for template_text in (macro, comment):
        encoder = encoders(processor, template_text)[0]
        assert encoder.render(sample) == reference.render(sample)
        assert encoder.encode(sample)["labels"].tolist() == expected


@pytest.mark.parametrize("name", [name for name in FAMILIES if "text" in FAMILIES[name].media])
def test_text_without_media_is_encoded_as_by_the_processor(name, monkeypatch):
    """The processor is called once, to learn which keys it adds; then the tokenizer alone gives the same tensors."""
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="the processor of SmolVLM needs num2words")
    _, processor = FAMILIES[name].build()
    encoder, calls = Encoder(processor), count_calls(monkeypatch, processor)
    for words in ("Hi", "é図 two\n\nlines", "<|im_start|>user\n assistant <s> <pad>", "a " * 50):
        sample = Sample("s", (user(words), assistant(words)), "t")
        encoded = encoder.encode(sample)
        assert len(calls) == 1
        expected = processor(text=[encoder.render(sample)], return_tensors="pt")
        calls.pop()
        assert set(encoded) == {*expected, "labels"}
        for key, value in expected.items():
            assert encoded[key].dtype == value.dtype
            assert encoded[key].tolist() == value.tolist()


def count_calls(monkeypatch, processor) -> list[None]:
    """Return a list that grows by one with each call of the processor."""
    calls: list[None] = []
    call = type(processor).__call__
    monkeypatch.setattr(
        type(processor), "__call__", lambda self, *rest, **named: calls.append(None) or call(self, *rest, **named)
    )
    return calls


def test_a_processor_that_extends_the_text_is_called_for_every_text(processor, monkeypatch):
    encoder = Encoder(processor)
    sample = Sample("s", (user("One?"), assistant("a")), "test")
    before = encoder.encode(sample)["input_ids"]
    call = type(processor).__call__
    monkeypatch.setattr(
        type(processor), "__call__", lambda self, text, **rest: call(self, text=[t + "</s>" for t in text], **rest)
    )
    after = Encoder(processor).encode(sample)["input_ids"]
    assert after.tolist() == [[*before[0].tolist(), processor.tokenizer.eos_token_id]]


def test_the_template_of_the_families_is_covered():
    """CHATML renders the same text as the families' template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {"role": role, "content": [{"type": "image"}, {"type": "text", "text": "x"}][role == "assistant" :]}
        for role in ("system", "user", "assistant")
    ]
    with_markers, without = (
        render_jinja_template([messages], chat_template=t)[0] for t in (CHATML, template("<image>\n"))
    )
    assert with_markers == without
