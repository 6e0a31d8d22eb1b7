"""Encode samples for the model: input_ids, labels and media tensors.

Training, evaluation and chat all use `Encoder`, so that a conversation gives the same tensors everywhere. Only the
encoder labels tokens with -100 (IGNORED); the collator pads labels with the same value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image as PILImage

from data_pipelines.labels import align, assign_turns, overlapping, supervised_turns
from data_pipelines.layout import Encoded as Encoded
from data_pipelines.layout import Layout, Media
from data_pipelines.processor_calls import (
    PROCESSOR_ERRORS,
    MediaKind,
    ProcessorCalls,
    blank_sample,
    check_media,
    load_medium,
)
from data_pipelines.prompts import MARK_LENGTH, Inserted, PlainTokens, Prompts, shortened, without_end
from data_pipelines.rendering import Span, answer_spans, placeholders, prompt_ends, render, render_marked
from data_pipelines.samples import Image, MediaError, Message, Sample, SampleError, Text, Video
from data_pipelines.truncation import check_cut, without_last_answer
from data_pipelines.video import SampledVideo
from mmdora.core.config import VideoConfig
from mmdora.core.errors import UserError

IGNORED = -100  # label of the tokens that the loss ignores
GREETING = Sample(
    "a greeting", (Message("user", (Text("Hello"),)), Message("assistant", (Text("Hello"),))), "the chat template"
)


@dataclass(frozen=True)
class Encoder:
    """Encodes conversations with a Hugging Face processor and its chat template.

    Video frames are sampled here, once. The processor gets their times and is told not to sample again.
    """

    processor: Any
    video: VideoConfig = field(default_factory=VideoConfig)
    max_length: int | None = None  # tokens
    overlong: Literal["skip", "truncate"] = "skip"  # what happens to samples over `max_length`

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding token, or its end-of-sequence token if it has none."""
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def encode(self, sample: Sample, on_change: Callable[[str], None] = lambda reason: None) -> Encoded:
        """Encode a training sample: `input_ids`, `labels` [1, tokens] and the processor's media tensors.

        Only the trained assistant turns and their end-of-sequence tokens have labels. `on_change` is called with the
        reason if the sample is shortened, or if an empty answer gets no labels. Raises SampleError for media that
        cannot be read, a sample without supervised tokens, or one over `max_length` that cannot be shortened.
        """
        media = self._load(sample)
        encoded, shortened = self._encode(sample, media), sample
        while self.max_length is not None and encoded["input_ids"].shape[1] > self.max_length:
            shorter = self._shorter(shortened, encoded)
            if shorter is None:
                per_token = self.layout.per_token
                encoded = {k: v[:, : self.max_length] if k in per_token else v for k, v in encoded.items()}
                on_change(f"over data.max_length {self.max_length} tokens: the end of the answer is cut")
            else:
                encoded, shortened = self._encode(shorter, media), shorter
        if dropped := len(sample.messages) - len(shortened.messages):
            on_change(f"over data.max_length {self.max_length} tokens: its last {dropped} turns are dropped")
        if empty := sum(m.role == "assistant" and m.train and not m.text.strip() for m in shortened.messages):
            on_change(f"{empty} empty answers are not trained on")
        return encoded

    def _encode(self, sample: Sample, media: list[Media]) -> Encoded:
        """Encode the whole sample, however long; `media` begins with the sample's own media."""
        text, marked = render_marked(self.processor, sample)
        for message in sample.messages:
            for part in message.parts:
                if isinstance(part, Text) and part.text.strip() not in text:
                    reason = f"the chat template drops or changes the text of the {message.role}"
                    reason += "; set model.chat_template to another template"
                    raise SampleError(sample.id, sample.source, reason, "encode")
        trained = supervised_turns(sample)
        found = answer_spans(self.processor, sample, text, marked, trained)
        inserted = self._prompts.insert(text, [low for low, _ in filter(None, found)])
        if inserted.merged:
            reason = "the beginning of an answer and the text of the chat template before it merge into one token, so "
            reason += "the answer would not be trained as it is generated; remove white space there"
            raise SampleError(sample.id, sample.source, reason, "encode")
        encoded = self._process(sample, inserted.text, inserted.tokens, media)
        turns = self._turns(sample, inserted, found, encoded["input_ids"][0].tolist())
        if inserted.marked:
            encoded, turns = self._prompts.without_marks(encoded, turns)
        # The first token is never supervised: there is nothing before it to predict it from.
        supervised = [i for i, turn in enumerate(turns) if turn in trained and i > 0]
        if not supervised:
            reason = "no answer to train on: none of its tokens belongs to an answer"
            raise SampleError(sample.id, sample.source, reason, "encode")
        self._check_earlier_media(sample, trained, encoded, turns, media)
        if "labels" in encoded:
            # PaliGemma's processor leaves labels to the caller. Tokens of type 0 attend in both directions, so an
            # answer of that type would attend to the tokens that it is to predict.
            encoded["token_type_ids"][0, next(i for i, turn in enumerate(turns) if turn) :] = 1
        encoded["labels"] = torch.full_like(encoded["input_ids"], IGNORED)
        encoded["labels"][0, supervised] = encoded["input_ids"][0, supervised]
        return encoded

    def _shorter(self, sample: Sample, encoded: Encoded) -> Sample | None:
        """Return the sample with fewer turns, or None if its only answer is to be cut. Raises SampleError."""
        labels, limit = encoded["labels"][0], self.max_length or 0
        if self.overlong == "skip":
            reason = f"{len(labels)} tokens, over data.max_length {limit}; data.overlong=truncate shortens such samples"
            raise SampleError(sample.id, sample.source, reason, "encode")
        shorter = without_last_answer(sample, supervised_turns(sample))
        if shorter is None:
            check_cut(sample, int((labels != IGNORED).nonzero()[0]), len(labels), limit)
        return shorter

    def encode_prompt(self, sample: Sample) -> Encoded:
        """Encode a conversation up to the assistant's next turn, for generation. Raises SampleError."""
        return self._encode_prompt(sample, self._load(sample))

    def _encode_prompt(self, sample: Sample, media: list[Media]) -> Encoded:
        """Encode a prompt; `media` begins with the sample's own media."""
        text = self.render(sample, add_generation_prompt=True)
        inserted = self._prompts.insert(text, prompt_ends(self.processor, sample, text))
        encoded = self._without_appended(sample, inserted, media)
        if inserted.marked:
            encoded, _ = self._prompts.without_marks(encoded, encoded["input_ids"][0].tolist())
        first = next((i for i, message in enumerate(sample.messages) if message.role == "assistant"), None)
        if encoded.pop("labels", None) is not None and first is not None:
            # PaliGemma's tokens from the first answer on do not attend in both directions, here as in training.
            prompt = self._encode_prompt(replace(sample, messages=sample.messages[:first]), media)
            encoded["token_type_ids"][0, prompt["input_ids"].shape[1] :] = 1
        return encoded

    def _without_appended(self, sample: Sample, inserted: Inserted, media: list[Media]) -> Encoded:
        """Encode the text of a prompt, without what does not belong to a prompt at its end."""
        prompts, (appended, special) = self._prompts, self._appended
        if appended and sample.messages[-1].role == "assistant":  # the model continues the text itself
            encoded = self._process(sample, inserted.text + (prompts.mark or ""), inserted.tokens, media)
            marks = prompts.marks(encoded["input_ids"][0].tolist()).nonzero()
            return shortened(encoded, int(marks[-MARK_LENGTH]))
        encoded = self._process(sample, inserted.text, inserted.tokens, media)
        if prompts.adds_bos(inserted.text):
            encoded = without_end(encoded, prompts.end)
        return without_end(encoded, special)

    def render(self, sample: Sample, add_generation_prompt: bool = False) -> str:
        """Render a conversation with the chat template, one placeholder per image or video. With a generation prompt,
        an assistant turn at the end is left open for the model to continue."""
        continued = add_generation_prompt and sample.messages[-1].role == "assistant"
        return render(self.processor, sample, add_generation_prompt and not continued, continue_final_message=continued)

    def check_stop(self, stop: Collection[int]) -> None:
        """Raise UserError unless the chat template ends an assistant turn with one of the `stop` tokens. A model that
        is never trained on such a token there would not stop generating."""
        text, marked = render_marked(self.processor, GREETING)
        (span,) = answer_spans(self.processor, GREETING, text, marked)
        assert span is not None, "every turn is wanted"
        answer = self.processor.tokenizer(text[slice(*span)], add_special_tokens=False)["input_ids"]
        if not set(answer) & set(stop):
            names = ", ".join(self.processor.tokenizer.convert_ids_to_tokens(sorted(stop))) or "none is known"
            raise UserError(
                f"the chat template ends an answer without a token that stops generation ({names}), so the model would "
                "not be trained to stop; set model.chat_template to another template"
            )

    def filler(self, *kinds: MediaKind) -> Encoded:
        """Encode a prompt with a blank image or video of each kind, without labels.

        With several processes, every rank must run the vision encoder equally often, or collective operations hang. A
        micro-batch without one kind of media gets this sequence, which adds nothing to the loss.
        """
        encoded = self.encode_prompt(blank_sample(*kinds))
        encoded["labels"] = torch.full_like(encoded["input_ids"], IGNORED)
        return encoded

    def fillers(self, kinds: Iterable[MediaKind]) -> dict[str, Encoded]:
        """Return a filler of each kind, keyed by its pixel tensor, as Collator expects them."""
        encoded = [self.filler(kind) for kind in kinds]
        return {next(key for key in filler if key.startswith("pixel_values")): filler for filler in encoded}

    def blank(self) -> Encoded:
        """Encode a text without labels, for a process that has no samples while others still do."""
        return self.filler()

    def media_tokens(self, sample: Sample) -> int:
        """Return the number of tokens of the sample's images and videos, without `max_length`. Raises SampleError."""
        text, media = self.render(sample), self._load(sample)
        plain = self._plain_tokens(text)
        return self._process(sample, text, plain, media)["input_ids"].shape[1] - len(plain.ids) + len(media)

    def _plain_tokens(self, text: str) -> PlainTokens:
        return Prompts(self.processor.tokenizer).plain(text)

    def _adds_bos(self, text: str) -> bool:
        return Prompts(self.processor.tokenizer).adds_bos(text)

    @cached_property
    def _prompts(self) -> Prompts:
        return Prompts(self.processor.tokenizer, self._appended[0])

    @cached_property
    def _appended(self) -> tuple[str, list[int]]:
        """The text that the processor appends to every text, and the special tokens that it appends then."""
        prompts = Prompts(self.processor.tokenizer)
        if self._text_keys is not None or prompts.mark is None:
            return "", []
        for sample in (blank_sample(Image), blank_sample(Video), blank_sample()):
            try:
                text = self.render(sample, add_generation_prompt=True) + prompts.mark
                ids = self._process(sample, text, None, self._load(sample))["input_ids"][0].tolist()
            except SampleError:
                continue
            return prompts.appended_after_mark(ids, prompts.adds_bos(text))
        return "", []

    @cached_property
    def _text_keys(self) -> tuple[str, ...] | None:
        """The keys that the processor adds to the plain tokens of a text without media, all zeros (`token_type_ids`,
        for example): such a text need not go through the processor. None if the processor does more, or if it does not
        accept text without media."""
        try:
            text = self.render(GREETING)
            plain = self._plain_tokens(text)
            output = self._call_processor(GREETING, text, [])
        except SampleError:
            return None
        known = {"input_ids": torch.tensor([plain.ids]), "attention_mask": torch.ones(1, len(plain.ids))}
        same = all(key in output and torch.equal(output[key], value.long()) for key, value in known.items())
        others = tuple(key for key in output if key not in known)
        zeros = all(output[key].shape == output["input_ids"].shape and not output[key].any() for key in others)
        return others if same and zeros else None

    @property
    def text_only(self) -> bool:
        """Whether the processor is that of a language model alone, and accepts neither images nor videos."""
        return getattr(self.processor, "text_only", False)

    def _load(self, sample: Sample) -> list[Media]:
        """Load the sample's images and videos, in the order of the conversation. Raises SampleError."""
        if self.text_only and (medium := next(sample.media(), None)) is not None:
            kind = "image" if isinstance(medium, Image) else "video"
            reason = f"it has the {kind} {medium.path}, and the model is a language model alone"
            raise SampleError(sample.id, sample.source, reason, "encode")
        try:
            return [load_medium(part, self.video) for part in sample.media()]
        except MediaError as error:
            raise SampleError(sample.id, sample.source, str(error), "media", error.path) from error

    def _process(self, sample: Sample, text: str, plain: PlainTokens | None, media: list[Media]) -> Encoded:
        own = media[: len(list(sample.media()))]
        images = [medium for medium in own if isinstance(medium, PILImage.Image)]
        videos = [medium for medium in own if isinstance(medium, SampledVideo)]
        check_media(self.processor, sample, text, len(images), len(videos))
        if own or self._text_keys is None:
            return self._call_processor(sample, text, own)
        assert plain is not None, "plain tokens may be omitted only for samples with media"
        ids = torch.tensor([plain.ids])
        encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return encoded | {key: torch.zeros_like(ids) for key in self._text_keys}

    def _call_processor(self, sample: Sample, text: str, media: list[Media]) -> Encoded:
        try:
            encoded = self._call([text], [media])
        except PROCESSOR_ERRORS as error:
            why = str(error) or type(error).__name__
            reason = f"the processor rejects it ({why}); does its text contain a literal media placeholder?"
            raise SampleError(sample.id, sample.source, reason, "encode") from error
        if "input_ids" not in encoded:
            raise SampleError(sample.id, sample.source, "the model's processor makes no input_ids of a text", "encode")
        return encoded

    @cached_property
    def _call(self) -> ProcessorCalls:
        return ProcessorCalls(self.processor)

    @property
    def layout(self) -> Layout:
        """How the processor's tensors form a batch. The first access is slow, because it processes blank media."""
        return self._call.layout

    def _turns(self, sample: Sample, inserted: Inserted, found: list[Span | None], ids: list[int]) -> list[int]:
        """Return, for each token of the encoded sample, the number of its assistant turn, from 1; 0 for none."""
        plain = inserted.tokens
        known = {number: span for number, span in enumerate(found, start=1) if span is not None}
        numbers = [0, *known]
        spans = [(inserted.moved(low), inserted.moved(high)) for low, high in known.values()]
        turns = [numbers[place] for place in assign_turns(plain.offsets, spans)]
        for number, (low, _) in known.items():  # a token without characters may follow the prompt
            start = inserted.num_tokens[low] or 0
            first = next((i for i in range(start, len(turns)) if turns[i] == number), start)
            turns[start:first] = [number] * (first - start)
        if plain.ids == ids:
            return turns
        pattern = "|".join(map(re.escape, placeholders(self.processor)))
        media = [match.span() for match in re.finditer(pattern, inserted.text)] if pattern else []
        aligned = align(plain.ids, turns, overlapping(plain.offsets, media), ids)
        if aligned is None:
            reason = "its media placeholders cannot be told apart from its text"
            raise SampleError(sample.id, sample.source, reason, "encode")
        return aligned

    def _check_earlier_media(
        self, sample: Sample, trained: set[int], encoded: Encoded, turns: list[int], media: list[Media]
    ) -> None:
        """Raise SampleError for an answer with media after it if its generation prompt, which lacks them, has other
        tokens: some processors encode an image in another way if more follow."""
        indices = [i for i, message in enumerate(sample.messages) if message.role == "assistant"]
        prompts = {turn: replace(sample, messages=sample.messages[: indices[turn - 1]]) for turn in sorted(trained)}
        counts = {turn: len(list(prompt.media())) for turn, prompt in prompts.items()}
        last = {count: turn for turn, count in counts.items() if count < len(list(sample.media()))}
        for turn in last.values():
            ids = self._encode_prompt(prompts[turn], media)["input_ids"]
            length = ids.shape[1]
            if turns.index(turn) != length or not torch.equal(encoded["input_ids"][:, :length], ids):
                reason = f"the processor encodes what precedes its answer {turn} in another way when more images or "
                reason += "videos follow, so it would not be trained as it is generated; split the conversation there"
                raise SampleError(sample.id, sample.source, reason, "encode")
