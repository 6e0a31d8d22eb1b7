"""One conversation gives one encoding everywhere, and labels only where the assistant speaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipelines.collator import Collator
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.labels import align
from data_pipelines.samples import Image, Message, Sample, SampleError, Text, Video
from mmdora.apps.chat import reply
from mmdora.core.config import VideoConfig
from mmdora.core.errors import UserError
from tests.media import write_image, write_video


def user(*parts) -> Message:
    return Message("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def assistant(text: str) -> Message:
    return Message("assistant", (Text(text),))


@pytest.fixture
def encoder(tiny) -> Encoder:
    return Encoder(tiny[1], VideoConfig(num_frames=4))


def supervised(encoder: Encoder, sample: Sample) -> str:
    labels = encoder.encode(sample)["labels"][0].tolist()
    return encoder.processor.tokenizer.decode([t for t in labels if t != IGNORED])


def test_labels_against_hand_written_expectations(encoder, tmp_path):
    picture, clip = Image(write_image(tmp_path / "a.png")), Video(write_video(tmp_path / "a.mp4"))
    cases = [
        ((user(picture, "What?"), assistant("red")), " red</s>"),
        ((user("One?"), assistant("a b"), user("Two?"), assistant("c")), " a b</s> c</s>"),
        (
            (user(picture, picture, "Which?"), assistant("first"), user(clip, "And?"), assistant("no")),
            " first</s> no</s>",
        ),
        (
            (Message("system", (Text("Be brief."),)), user("Hm?"), assistant("ASSISTANT: yes")),
            " ASSISTANT: yes</s>",
        ),
        ((user("Is it?", picture), assistant("naïve 図")), " naïve 図</s>"),
    ]
    for messages, expected in cases:
        assert supervised(encoder, Sample("s", messages, "test")) == expected


def test_labels_are_the_templates_own_generation_mask(encoder):
    """The prefix difference finds what `{% generation %}` marks."""
    sample = Sample("s", (user("One?"), assistant("a b"), user("Two?"), assistant("c")), "test")
    messages = [{"role": m.role, "content": [{"type": "text", "text": m.text}]} for m in sample.messages]
    marked = encoder.processor.tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        chat_template=encoder.processor.chat_template,
    )
    encoded = encoder.encode(sample)
    assert encoded["input_ids"][0].tolist() == marked["input_ids"]
    assert (encoded["labels"][0] != IGNORED).int().tolist() == marked["assistant_masks"]


def test_nothing_to_learn_is_an_error_that_names_the_sample(encoder):
    with pytest.raises(SampleError, match=r"sample 'lonely' of test: no answer to learn"):
        encoder.encode(Sample("lonely", (user("Hello?"),), "test"))


def test_too_long_is_an_error_that_names_the_limit(tiny):
    encoder = Encoder(tiny[1], max_length=5)
    with pytest.raises(SampleError, match=r"over data.max_length 5"):
        encoder.encode(Sample("s", (user("A long question, is it not?"), assistant("yes")), "test"))


def test_a_literal_placeholder_in_the_text_is_an_error(encoder, tmp_path):
    picture = Image(write_image(tmp_path / "a.png"))
    with pytest.raises(SampleError, match="sample 's'"):
        encoder.encode(Sample("s", (user(picture, "What is <image> here?"), assistant("red")), "test"))


def test_one_sample_is_the_same_in_training_evaluation_and_chat(tiny, encoder, tmp_path, monkeypatch):
    """The tokens and pixels up to the answer are equal, whichever way they are made."""
    model, _ = tiny
    for media in (Image(write_image(tmp_path / "a.png")), Video(write_video(tmp_path / "a.mp4"))):
        question = user(media, "What color is the circle?")
        training = encoder.encode(Sample("s", (question, assistant("red")), "test"))
        evaluation = encoder.encode_prompt(Sample("s", (question,), "test"))
        seen = {}

        def generate(_model=model, _seen=seen, **inputs):
            _seen.update(inputs)
            return inputs["input_ids"]

        monkeypatch.setattr(model, "generate", generate)
        reply(model, encoder, Sample("s", (question,), "test"), 4)
        length = evaluation["input_ids"].shape[1]
        assert torch.equal(training["input_ids"][:, :length], evaluation["input_ids"])
        assert torch.equal(seen["input_ids"], evaluation["input_ids"])
        pixels = [k for k in evaluation if k.startswith("pixel_values")]
        assert pixels
        for key in pixels:
            assert torch.equal(training[key], evaluation[key])
            assert torch.equal(seen[key], evaluation[key])


def test_align():
    def places(plain, said, expanded):
        """9 is the placeholder."""
        found = align(plain, [t in said for t in plain], [t == 9 for t in plain], expanded)
        return None if found is None else [i for i, yes in enumerate(found) if yes]

    assert places([1, 9, 2, 3], [3], [1, 9, 9, 9, 2, 3]) == [5]
    assert places([1, 9, 2, 9, 3], [2, 3], [1, 9, 9, 2, 9, 9, 9, 3]) == [3, 7]
    assert places([1, 2], [2], [1, 2]) == [1]
    assert places([1, 9, 5, 2, 3], [3], [1, 7, 9, 2, 9, 57, 2, 3, 4]) == [7]  # text in the run, its end melted with 5
    assert places([1, 9, 2], [2], [1, 9, 9, 4]) is None


def test_batches_pad_tokens_and_join_media(encoder, tmp_path):
    wide = Image(write_image(tmp_path / "wide.png", size=(200, 50)))
    square = Image(write_image(tmp_path / "square.png", size=(64, 64)))
    rows = [
        encoder.encode(Sample("a", (user(wide, "What?"), assistant("red")), "t")),
        encoder.encode(Sample("b", (user(square, "What is this?"), assistant("blue")), "t")),
        encoder.encode(Sample("c", (user("Text?"), assistant("yes")), "t")),
    ]
    batch = Collator(encoder.processor.tokenizer.pad_token_id)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].shape[:2] == (2, 5)  # the wide picture has four crops and the whole
    assert batch["attention_mask"][2].sum() == rows[2]["input_ids"].shape[1]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_fillers_bring_the_missing_media_and_no_labels(tiny, encoder, tmp_path):
    """What ranks without pictures or clips add under data parallelism leaves the loss as it is."""
    model, _ = tiny
    pad = encoder.processor.tokenizer.pad_token_id
    row = encoder.encode(Sample("c", (user("Text?"), assistant("yes")), "t"))
    fillers = {"pixel_values": encoder.filler(Image), "pixel_values_videos": encoder.filler(Video)}
    filled = Collator(pad, fillers=fillers)([row])
    assert filled["input_ids"].shape[0] == 3
    assert {"pixel_values", "pixel_values_videos"} <= set(filled)
    torch.testing.assert_close(model(**filled).loss, model(**row).loss)


def test_frames_are_sampled_once(encoder, tmp_path):
    """The processor gets exactly the frames that the reader chose."""
    from data_pipelines.video import load_video

    path = write_video(tmp_path / "a.mp4", frames=12)
    clip = load_video(path, VideoConfig(num_frames=4))
    encoded = encoder.encode_prompt(Sample("s", (user(Video(path), "What?"),), "t"))
    expected = encoder.processor.video_processor([clip.frames], return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(encoded["pixel_values_videos"], expected)
    assert np.array_equal(clip.indices, (0, 4, 7, 11))


def test_a_template_that_loses_or_refuses_words_is_noticed(encoder):
    sample = Sample("s7", (Message("system", (Text("Be brief."),)), user("Hm?"), assistant("yes")), "test")
    template = encoder.processor.chat_template
    silent = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content[0].text }}</s>{% endfor %}"
    refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    refusing += "{{ m.role }}: {{ m.content[0].text }}</s>{% endfor %}"
    for broken, reason in ((silent, "leaves out or changes what the system says"), (refusing, "no system role")):
        encoder.processor.chat_template = broken
        with pytest.raises(SampleError, match=rf"s7.*{reason}"):
            encoder.encode(sample)
    encoder.processor.chat_template = template
    encoder.encode(sample)


def test_a_template_that_never_stops_is_an_error(encoder):
    stop = {encoder.processor.tokenizer.eos_token_id}
    encoder.check_stop(stop)
    encoder.processor.chat_template = encoder.processor.chat_template.replace("eos_token", "bos_token[:0]")
    with pytest.raises(UserError, match=r"without a token that stops generation \(</s>\).*model.chat_template"):
        encoder.check_stop(stop)


def test_a_turn_that_is_only_read_has_no_labels(encoder, tmp_path):
    picture = Image(write_image(tmp_path / "a.png"))
    read = Message("assistant", (Text("one"),), train=False)
    # The same words stand in front of both pictures' answers; only the second is learnt.
    messages = (user(picture, "Q?"), read, user(picture, "Q?"), assistant("one"), user("And?"), read)
    row = encoder.encode(Sample("s", messages, "test"))
    taught = (row["labels"][0] != IGNORED).nonzero().flatten()
    assert encoder.processor.tokenizer.decode(row["input_ids"][0][taught]) == " one</s>"
    image = encoder.processor.tokenizer.convert_tokens_to_ids("<image>")
    assert taught[0] > (row["input_ids"][0] == image).nonzero().max()
    with pytest.raises(SampleError, match=r"'s'.*no assistant turn of it is to be learnt"):
        encoder.encode(Sample("s", messages[:2], "test"))


def test_an_empty_answer_is_not_learnt(encoder):
    told: list[str] = []
    sample = Sample("s", (user("One?"), assistant("  "), user("Two?"), assistant("c")), "test")
    labels = encoder.encode(sample, told.append)["labels"][0]
    assert encoder.processor.tokenizer.decode(labels[labels != IGNORED]) == " c</s>"
    assert told == ["1 empty answers are read, not learnt"]
    with pytest.raises(SampleError, match=r"'s'.*its answer is empty"):
        encoder.encode(Sample("s", (user("One?"), assistant("\n")), "test"))


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, ZeroDivisionError, OverflowError, MemoryError])
def test_whatever_a_processor_raises_for_a_picture_names_the_sample(encoder, tmp_path, monkeypatch, kind):
    def refuse(self, *args, **kwargs):
        raise kind()

    monkeypatch.setattr(type(encoder.processor), "__call__", refuse)
    sample = Sample("odd", (user(Image(write_image(tmp_path / "a.png")), "What?"), assistant("red")), "t")
    with pytest.raises(SampleError, match=rf"'odd' of t: the processor refuses it \({kind.__name__}\)"):
        encoder.encode(sample)
