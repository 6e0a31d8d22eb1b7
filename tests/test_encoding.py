"""Encoding: equal in training, evaluation and chat, with labels only on the assistant's turns."""

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
from tests.conversations import assistant, tiny_processor, user
from tests.media import write_image, write_video


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(tiny_processor(), VideoConfig(num_frames=4))


def supervised_text(encoder: Encoder, sample: Sample) -> str:
    labels = encoder.encode(sample)["labels"][0].tolist()
    return encoder.processor.tokenizer.decode([t for t in labels if t != IGNORED])


def test_labels_equal_hand_written_expectations(encoder, tmp_path):
    image, video = Image(write_image(tmp_path / "a.png")), Video(write_video(tmp_path / "a.mp4"))
    cases = [
        ((user(image, "What?"), assistant("red")), " red</s>"),
        ((user("One?"), assistant("a b"), user("Two?"), assistant("c")), " a b</s> c</s>"),
        (
            (user(image, image, "Which?"), assistant("first"), user(video, "And?"), assistant("no")),
            " first</s> no</s>",
        ),
        (
            (Message("system", (Text("Be brief."),)), user("Hm?"), assistant("ASSISTANT: yes")),
            " ASSISTANT: yes</s>",
        ),
        ((user("Is it?", image), assistant("naïve 図")), " naïve 図</s>"),
    ]
    for messages, expected in cases:
        assert supervised_text(encoder, Sample("s", messages, "test")) == expected


def test_labels_equal_the_generation_mask_of_the_template(encoder):
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


def test_a_sample_without_an_answer_is_an_error_that_names_it(encoder):
    with pytest.raises(SampleError, match=r"sample 'lonely' of test: no answer to train on"):
        encoder.encode(Sample("lonely", (user("Hello?"),), "test"))


def test_a_sample_over_max_length_is_an_error_that_names_the_limit():
    encoder = Encoder(tiny_processor(), max_length=5)
    with pytest.raises(SampleError, match=r"over data.max_length 5"):
        encoder.encode(Sample("s", (user("A long question, is it not?"), assistant("yes")), "test"))


def test_a_literal_placeholder_in_the_text_is_an_error(encoder, tmp_path):
    image = Image(write_image(tmp_path / "a.png"))
    with pytest.raises(SampleError, match="sample 's'"):
        encoder.encode(Sample("s", (user(image, "What is <image> here?"), assistant("red")), "test"))


def test_training_evaluation_and_chat_encode_equally(tiny, encoder, tmp_path, monkeypatch):
    """The tokens and pixels up to the answer are equal."""
    model, _ = tiny
    for media in (Image(write_image(tmp_path / "a.png")), Video(write_video(tmp_path / "a.mp4"))):
        question = user(media, "What color is the circle?")
        training = encoder.encode(Sample("s", (question, assistant("red")), "test"))
        evaluation = encoder.encode_prompt(Sample("s", (question,), "test"))
        generated = {}

        def generate(_model=model, _generated=generated, **inputs):
            _generated.update(inputs)
            return inputs["input_ids"]

        monkeypatch.setattr(model, "generate", generate)
        reply(model, encoder, Sample("s", (question,), "test"), 4)
        length = evaluation["input_ids"].shape[1]
        assert torch.equal(training["input_ids"][:, :length], evaluation["input_ids"])
        assert torch.equal(generated["input_ids"], evaluation["input_ids"])
        pixels = [k for k in evaluation if k.startswith("pixel_values")]
        assert pixels
        for key in pixels:
            assert torch.equal(training[key], evaluation[key])
            assert torch.equal(generated[key], evaluation[key])


def test_align_finds_answers_between_expanded_placeholders():
    def places(plain, answer, expanded):
        """Return the positions of the answer's tokens in `expanded`; 9 is the placeholder."""
        aligned = align(plain, [t in answer for t in plain], [t == 9 for t in plain], expanded)
        return None if aligned is None else [i for i, turn in enumerate(aligned) if turn]

    assert places([1, 9, 2, 3], [3], [1, 9, 9, 9, 2, 3]) == [5]
    assert places([1, 9, 2, 9, 3], [2, 3], [1, 9, 9, 2, 9, 9, 9, 3]) == [3, 7]
    assert places([1, 2], [2], [1, 2]) == [1]
    assert places([1, 9, 5, 2, 3], [3], [1, 7, 9, 2, 9, 57, 2, 3, 4]) == [7]  # text in the run, whose end merges with 5
    assert places([1, 9, 2], [2], [1, 9, 9, 4]) is None


def test_batches_pad_tokens_and_join_media(encoder, tmp_path):
    wide = Image(write_image(tmp_path / "wide.png", size=(200, 50)))
    square = Image(write_image(tmp_path / "square.png", size=(64, 64)))
    samples = [
        encoder.encode(Sample("a", (user(wide, "What?"), assistant("red")), "t")),
        encoder.encode(Sample("b", (user(square, "What is this?"), assistant("blue")), "t")),
        encoder.encode(Sample("c", (user("Text?"), assistant("yes")), "t")),
    ]
    batch = Collator(encoder.processor.tokenizer.pad_token_id)(samples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].shape[:2] == (2, 5)  # the wide image has four crops and the whole
    assert batch["attention_mask"][2].sum() == samples[2]["input_ids"].shape[1]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_fillers_add_the_missing_media_without_changing_the_loss(tiny, encoder, tmp_path):
    """Ranks without images or videos add them under data parallelism."""
    model, _ = tiny
    pad = encoder.processor.tokenizer.pad_token_id
    encoded = encoder.encode(Sample("c", (user("Text?"), assistant("yes")), "t"))
    fillers = {"pixel_values": encoder.filler(Image), "pixel_values_videos": encoder.filler(Video)}
    filled = Collator(pad, fillers=fillers)([encoded])
    assert filled["input_ids"].shape[0] == 3
    assert {"pixel_values", "pixel_values_videos"} <= set(filled)
    torch.testing.assert_close(model(**filled).loss, model(**encoded).loss)


def test_frames_are_sampled_once(encoder, tmp_path):
    """The processor gets exactly the frames that the reader selected."""
    from data_pipelines.video import load_video

    path = write_video(tmp_path / "a.mp4", frames=12)
    video = load_video(path, VideoConfig(num_frames=4))
    encoded = encoder.encode_prompt(Sample("s", (user(Video(path), "What?"),), "t"))
    expected = encoder.processor.video_processor([video.frames], return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(encoded["pixel_values_videos"], expected)
    assert np.array_equal(video.indices, (0, 4, 7, 11))


def test_a_template_that_drops_or_rejects_a_turn_is_an_error(encoder):
    sample = Sample("s7", (Message("system", (Text("Be brief."),)), user("Hm?"), assistant("yes")), "test")
    template = encoder.processor.chat_template
    dropping = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content[0].text }}</s>{% endfor %}"
    rejecting = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    rejecting += "{{ m.role }}: {{ m.content[0].text }}</s>{% endfor %}"
    for broken, reason in ((dropping, "drops or changes the text of the system"), (rejecting, "no system role")):
        encoder.processor.chat_template = broken
        with pytest.raises(SampleError, match=rf"s7.*{reason}"):
            encoder.encode(sample)
    encoder.processor.chat_template = template
    encoder.encode(sample)


def test_a_template_without_a_stop_token_is_an_error(encoder):
    stop = {encoder.processor.tokenizer.eos_token_id}
    encoder.check_stop(stop)
    encoder.processor.chat_template = encoder.processor.chat_template.replace("eos_token", "bos_token[:0]")
    with pytest.raises(UserError, match=r"without a token that stops generation \(</s>\).*model.chat_template"):
        encoder.check_stop(stop)


def test_a_turn_with_train_false_has_no_labels(encoder, tmp_path):
    image = Image(write_image(tmp_path / "a.png"))
    untrained = assistant("one", train=False)
    # Both answers have the same text before and after an image; only the second is trained on.
    messages = (user(image, "Q?"), untrained, user(image, "Q?"), assistant("one"), user("And?"), untrained)
    encoded = encoder.encode(Sample("s", messages, "test"))
    supervised = (encoded["labels"][0] != IGNORED).nonzero().flatten()
    assert encoder.processor.tokenizer.decode(encoded["input_ids"][0][supervised]) == " one</s>"
    image_token = encoder.processor.tokenizer.convert_tokens_to_ids("<image>")
    assert supervised[0] > (encoded["input_ids"][0] == image_token).nonzero().max()
    with pytest.raises(SampleError, match=r"'s'.*none of its assistant turns is to be trained"):
        encoder.encode(Sample("s", messages[:2], "test"))


def test_an_empty_answer_is_not_trained_on(encoder):
    changes: list[str] = []
    sample = Sample("s", (user("One?"), assistant("  "), user("Two?"), assistant("c")), "test")
    labels = encoder.encode(sample, changes.append)["labels"][0]
    assert encoder.processor.tokenizer.decode(labels[labels != IGNORED]) == " c</s>"
    assert changes == ["1 empty answers are not trained on"]
    with pytest.raises(SampleError, match=r"'s'.*its answer is empty"):
        encoder.encode(Sample("s", (user("One?"), assistant("\n")), "test"))


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, ZeroDivisionError, OverflowError, MemoryError])
def test_an_exception_of_the_processor_names_the_sample(encoder, tmp_path, monkeypatch, kind):
    def fail(self, *args, **kwargs):
        raise kind()

    monkeypatch.setattr(type(encoder.processor), "__call__", fail)
    sample = Sample("odd", (user(Image(write_image(tmp_path / "a.png")), "What?"), assistant("red")), "t")
    with pytest.raises(SampleError, match=rf"'odd' of t: the processor rejects it \({kind.__name__}\)"):
        encoder.encode(sample)
