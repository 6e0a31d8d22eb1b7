"""Training begins each answer with exactly the tokens of its generation prompt, in every family and chat template."""

from __future__ import annotations

import pytest

from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.samples import Image, Message, Sample, SampleError, Text, Video
from mmdora.core.config import VideoConfig
from tests.conversations import assistant, tiny_processor, user
from tests.families import FAMILIES
from tests.media import write_image, write_video


def check_parity(encoder: Encoder, sample: Sample) -> dict:
    """Check each trained answer of a sample that the encoder accepts. Returns the encoded sample."""
    encoded = encoder.encode(sample)
    ids, labels = encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist()
    indices = [i for i, m in enumerate(sample.messages) if m.role == "assistant" and m.train and m.text.strip()]
    starts = [i for i, label in enumerate(labels) if label != IGNORED and labels[i - 1] == IGNORED]
    assert len(starts) == len(indices)
    for start, index in zip(starts, indices, strict=True):
        prompt = encoder.encode_prompt(Sample("s", sample.messages[:index], "test"))
        assert ids[:start] == prompt["input_ids"][0].tolist()
        for key in ("token_type_ids", "mm_token_type_ids"):
            assert key not in prompt or encoded[key][0, :start].tolist() == prompt[key][0].tolist()
    return encoded


def supervised(encoder: Encoder, encoded: dict) -> str:
    labels = encoded["labels"][0]
    return encoder.processor.tokenizer.decode(labels[labels != IGNORED])


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("media")
    return {
        "image": Image(write_image(folder / "a.png", 0)),
        "other": Image(write_image(folder / "b.png", 1, size=(90, 40))),
        "video": Video(write_video(folder / "a.mp4", frames=4)),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_an_answer_after_its_generation_prompt(name, media):
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="the processor of SmolVLM needs num2words")
    _, processor = FAMILIES[name].build()
    encoder = Encoder(processor, VideoConfig(num_frames=4))
    openings = {"image": [media["image"]], "two images": [media["image"], media["other"]], "video": [media["video"]], "text": []}
    for kind in FAMILIES[name].media:
        for answer in ("one of two", "\n\none", "  one\n", "\n"):
            messages = (user(*openings[kind], "What is it?"), assistant("one"), user("And?"), assistant(answer))
            for part in (messages[:2], messages[2:] if kind == "text" else messages):
                try:
                    encoded = check_parity(encoder, Sample("named", part, "test"))
                except SampleError as error:
                    assert "'named' of test" in str(error)
                    print(name, kind, repr(answer), error)
                    continue
