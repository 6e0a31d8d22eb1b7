"""Training begins each answer with exactly the tokens of its generation prompt, in every family and chat template."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.images import load_image
from data_pipelines.samples import Image, Message, Sample, SampleError, Text, Video
from mmdora.core.config import ModelConfig, VideoConfig
from mmdora.models.loading import load_shape
from tests.conversations import assistant, tiny_processor, user
from tests.families import FAMILIES, paligemma
from tests.media import write_image, write_video
from tests.tiny_parts import SIDE, SQUARE

ANSWERS = ("one of two", "\n\none", "  one\n", "(b) one", "1")


def check_parity(encoder: Encoder, messages: tuple[Message, ...]) -> str:
    """Check each trained answer of a sample, and return the supervised text. Raises SampleError if it is refused."""
    encoded = encoder.encode(Sample("named", messages, "test"))
    ids, labels = encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist()
    indices = [i for i, m in enumerate(messages) if m.role == "assistant" and m.train and m.text.strip()]
    starts = [i for i, label in enumerate(labels) if label != IGNORED and labels[i - 1] == IGNORED]
    assert len(starts) == len(indices)
    for start, index in zip(starts, indices, strict=True):
        prompt = encoder.encode_prompt(Sample("named", messages[:index], "test"))
        assert ids[:start] == prompt["input_ids"][0].tolist()
        for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            assert key not in prompt or encoded[key][0, :start].tolist() == prompt[key][0].tolist()
    return encoder.processor.tokenizer.decode([label for label in labels if label != IGNORED])


def conversations(*media: Image | Video) -> Iterator[tuple[Message, ...]]:
    """Yield conversations of one and two turns with answers of many beginnings."""
    system = Message("system", (Text("Be brief."),))
    question = user(*media, "What is it?")
    for answer in ANSWERS:
        yield question, assistant(answer)
        yield system, question, assistant(answer)
        yield question, assistant(answer), user("And?"), assistant("two")
        yield question, assistant("two", train=False), user("And?\n"), assistant(answer)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> dict[str, Any]:
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
    shown = {"image": ["image"], "two images": ["image", "other"], "video": ["video"], "text": []}
    for kind in FAMILIES[name].media:
        for messages in itertools.islice(conversations(*(media[key] for key in shown[kind])), 8):
            text = check_parity(encoder, messages)
            assert all(m.text in text for m in messages if m.role == "assistant" and m.train)


# How the templates of model families lay out a conversation, reduced to what they write around its texts.
LOOP = "{% for m in messages %}"
END = "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}"
LLAMA_2 = (
    LOOP + "{% if m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% else %}"
    "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% endif %}" + END
)
LLAMA_3 = (
    "{{ bos_token }}" + LOOP + "{{ '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot|>' }}" + END
    + PROMPT + "{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)  # fmt: skip
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + LOOP
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + END
    + PROMPT + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
GEMMA = (
    "{{ bos_token }}" + LOOP + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<turn>' + role + '\n' + m.content | trim + '<eot>\n' }}" + END + PROMPT + "{{ '<turn>model\n' }}{% endif %}"
)
PHI_3 = (  # an end-of-sequence token after the whole conversation only
    LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}" + END
    + PROMPT + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)  # fmt: skip
ALPACA = (
    LOOP + "{% if m.role == 'assistant' %}{{ '### Response:\n\n' + m.content + eos_token + '\n\n' }}{% else %}"
    "{{ '### Instruction:\n\n' + m.content + '\n\n' }}{% endif %}" + END
    + PROMPT + "{{ '### Response:\n\n' }}{% endif %}"
)  # fmt: skip
SPACE_AT_THE_END = ALPACA.replace("### Response:\n\n", "Assistant: ")
NO_PROMPT = LOOP + "{{ m.role + ': ' + m.content + eos_token + '\n' }}" + END
THINKING = (  # Qwen3: only the last answer has a block of thoughts
    LOOP + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}"
    + END + PROMPT + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
TEMPLATES = {
    "llama 2": LLAMA_2,
    "llama 3": LLAMA_3,
    "chatml": CHATML,
    "gemma": GEMMA,
    "phi 3": PHI_3,
    "alpaca": ALPACA,
    "space at the end": SPACE_AT_THE_END,
    "no prompt": NO_PROMPT,
    "thinking": THINKING,
}
SPECIAL = (
    "<|header|>",
    "<|/header|>",
    "<|eot|>",
    "<|im_start|>",
    "<|im_end|>",
    "<turn>",
    "<eot>",
    "<think>",
    "</think>",
)
ROLES = ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>")
# The regular expressions with which GPT-2 and Qwen2 split text: only the second keeps line breaks in one piece.
QWEN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
)
SPLITS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "qwen": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN[0]), "isolated"), QWEN[1]]),
}


def text_processor(split: str, template: str, begins: bool = True, ends: bool = False) -> Any:
    """Return a processor whose tokenizer splits text as GPT-2 or Qwen2 do, and adds `<s>` and `</s>` as told."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = SPLITS[split], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(["assistant\n\n\n\n", "\n\n", "### Response:\n\n", "one of two ( one"] * 2, trainer)
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", image_token="<image>"
    )
    words.add_special_tokens({"additional_special_tokens": ["<image>", *SPECIAL, *ROLES]})
    layout = " ".join([*["<s>"] * begins, "$A", *["</s>"] * ends])
    known = [(token, words.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(layout, special_tokens=known)
    images = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return hf.LlavaProcessor(images, words, patch_size=4, chat_template=template, **strategy)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_trains_an_answer_after_its_generation_prompt(name, split):
    for ends in (False, True):
        encoder = Encoder(text_processor(split, TEMPLATES[name], ends=ends))
        for messages in conversations():
            text = check_parity(encoder, messages)
            assert all(m.text.strip() in text for m in messages if m.role == "assistant" and m.train)
            end = next(token for token in ("<|eot|>", "<|im_end|>", "<eot>", "<|end|>", "</s>") if token in text)
            assert text.count(end) == sum(m.role == "assistant" and m.train for m in messages)


def test_the_prompt_of_one_question_is_the_text_that_other_engines_tokenize():
    for split, name in itertools.product(SPLITS, TEMPLATES):
        encoder = Encoder(text_processor(split, TEMPLATES[name]))
        sample = Sample("s", (user("What is it?"),), "test")
        text = encoder.render(sample, add_generation_prompt=True)
        expected = encoder.processor.tokenizer(text, add_special_tokens=not text.startswith("<s>"))["input_ids"]
        assert encoder.encode_prompt(sample)["input_ids"][0].tolist() == expected


def test_a_prompt_does_not_end_with_the_end_token_of_the_tokenizer():
    encoder = Encoder(text_processor("qwen", CHATML, ends=True))
    prompt = encoder.encode_prompt(Sample("s", (user("What?"),), "test"))
    assert encoder.processor.tokenizer.decode(prompt["input_ids"][0]).endswith("<|im_start|>assistant\n")
    assert prompt["attention_mask"].shape == prompt["input_ids"].shape
    opened = encoder.encode_prompt(Sample("s", (user("What?"), assistant("It is")), "test"))
    assert encoder.processor.tokenizer.decode(opened["input_ids"][0]).endswith("assistant\nIt is")


def test_answers_that_cannot_follow_their_generation_prompt_are_refused_by_name():
    """DeepSeek-R1's generation prompt opens a block of thoughts that its rendered answers do not have."""
    one = (user("What?"), assistant("one"))
    two = (*one, user("And?"), assistant("two"))
    opened = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    encoder = Encoder(text_processor("qwen", opened))
    with pytest.raises(SampleError, match=r"'named' of test: .*generation prompt, which ends with .*<think>"):
        check_parity(encoder, one)
    # Qwen3.5 and others write the block before the last answer only.
    last = THINKING.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n\n</think>\n\n' }}{% endif %}")
    encoder = Encoder(text_processor("qwen", last))
    assert check_parity(encoder, one) == "one<|im_end|>"
    with pytest.raises(SampleError, match=r"'named' of test: .*train: false"):
        check_parity(encoder, two)
    assert check_parity(encoder, (one[0], assistant("one", train=False), *two[2:])) == "two<|im_end|>"
    # Thoughts in an earlier answer are dropped.
    encoder = Encoder(text_processor("qwen", THINKING))
    with pytest.raises(SampleError, match=r"'named' of test: the chat template drops or changes the text"):
        check_parity(encoder, (user("What?"), assistant("<think>\nhm\n</think>\n\none"), *two[2:]))


def test_a_rewritten_answer_is_not_found_in_a_later_turn():
    dropping = (
        LOOP + "{% if m.role == 'user' or loop.last %}{{ m.role + ': ' + m.content + eos_token }}{% endif %}" + END
    )
    encoder = Encoder(text_processor("gpt2", dropping))
    two = (user("What?"), assistant("yes"), user("And?"), assistant("yes"))
    with pytest.raises(SampleError, match="rewrites earlier turns"):
        check_parity(encoder, two)


def test_an_image_that_is_encoded_in_another_way_when_more_follow_is_refused(media):
    """LLaVA-OneVision encodes the only image of a conversation in crops, but several images without."""
    _, processor = FAMILIES["llava_onevision"].build()
    encoder = Encoder(processor)
    first, second = (user(media["other"], "What?"), assistant("one")), (user(media["image"], "And?"), assistant("two"))
    check_parity(encoder, first)
    with pytest.raises(SampleError, match=r"'named' of test: .*its answer 1 .*when more images"):
        check_parity(encoder, (*first, *second))
    check_parity(encoder, (first[0], assistant("one", train=False), *second))
    _, processor = FAMILIES["qwen2_vl"].build()
    check_parity(Encoder(processor), (*first, *second))


def test_paligemma_is_trained_on_what_its_processor_makes_of_a_prompt(media):
    """Its processor appends a line break to every text."""
    model, processor = paligemma()
    encoder = Encoder(processor)
    prompt = (user(media["image"], "What is it?"),)
    text = encoder.render(Sample("s", prompt, "test"), add_generation_prompt=True)
    image = load_image(media["image"].path)
    plain = processor(text=[text], images=[[image]], return_tensors="pt")["input_ids"]
    assert torch.equal(encoder.encode_prompt(Sample("s", prompt, "test"))["input_ids"], plain)
    row = encoder.encode(Sample("s", (*prompt, assistant("one")), "test"))
    assert torch.equal(row["input_ids"][:, : plain.shape[1]], plain)
    opened = encoder.encode_prompt(Sample("s", (*prompt, assistant("one")), "test"))["input_ids"]
    assert torch.equal(opened, row["input_ids"][:, : opened.shape[1]])
    assert processor.tokenizer.decode(opened[0]).endswith("one")
    # The first token's logits are those of generation.
    length = plain.shape[1]
    inputs = encoder.encode_prompt(Sample("s", prompt, "test"))
    with torch.no_grad():
        alone, trained = model.eval()(**inputs).logits[0, -1], model(**row).logits[0, length - 1]
    torch.testing.assert_close(alone, trained, atol=1e-4, rtol=1e-4)


def test_a_byte_order_mark_is_no_part_of_a_chat_template(tmp_path):
    base = "assets/tiny-llava"
    template = load_shape(ModelConfig(path=base))[1].chat_template
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8-sig")
    assert load_shape(ModelConfig(path=base, chat_template=str(tmp_path / "t.jinja")))[1].chat_template == template
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template, encoding="utf-8-sig")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava_onevision"}')
    assert load_shape(ModelConfig(path=str(tmp_path / "model")))[1].chat_template == template
