"""Encode samples for the model: input_ids, labels and media tensors.

Training, evaluation and chat all use `Encoder`, so that a conversation gives the same tensors everywhere. Only the
encoder labels tokens with -100 (IGNORED); the collator pads labels with the same value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from data_pipelines.images import load_image
from data_pipelines.labels import align, assign_turns, overlapping, supervised_turns
from data_pipelines.rendering import Span, answer_spans, placeholders, render, render_marked
from data_pipelines.samples import Image, MediaError, Message, Sample, SampleError, Text, Video
from data_pipelines.truncation import check_cut, without_last_answer
from data_pipelines.video import SampledVideo, load_video
from mmdora.core.config import VideoConfig
from mmdora.core.errors import UserError

IGNORED = -100  # label of the tokens that the loss ignores
# The exceptions that processors raise for text or media that they cannot process.
PROCESSOR_ERRORS = (ValueError, IndexError, StopIteration, RuntimeError, TypeError, ArithmeticError, MemoryError)
PER_TOKEN = ("input_ids", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids")

Encoded = dict[str, Tensor]
Media = PILImage.Image | SampledVideo  # loaded media
MediaKind: TypeAlias = type[Image] | type[Video]
GREETING = Sample(
    "a greeting", (Message("user", (Text("Hello"),)), Message("assistant", (Text("Hello"),))), "the chat template"
)


class PlainTokens(NamedTuple):
    """The tokens of a rendered text before media are expanded, and the characters of each."""

    ids: list[int]
    offsets: list[Span]


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
                encoded = {
                    key: value[:, : self.max_length] if key in PER_TOKEN else value for key, value in encoded.items()
                }
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
        plain = self._plain_tokens(text)
        encoded = self._process(sample, text, plain, media)
        turns = self._turns(sample, text, marked, plain, encoded["input_ids"][0].tolist())
        # The first token is never supervised: there is nothing before it to predict it from.
        supervised = [i for i, turn in enumerate(turns) if turn in trained and i > 0]
        if not supervised:
            reason = "no answer to train on: none of its tokens belongs to an answer"
            raise SampleError(sample.id, sample.source, reason, "encode")
        if "labels" in encoded:
            # PaliGemma's processor leaves labels to the caller. Tokens of type 0 attend in both directions, so an
            # answer of that type would attend to the tokens that it is to predict.
            encoded["token_type_ids"][0, supervised[0] :] = 1
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
        text = self.render(sample, add_generation_prompt=True)
        media = self._load(sample)
        encoded = self._process(sample, text, None if media else self._plain_tokens(text), media)
        encoded.pop("labels", None)
        return encoded

    def render(self, sample: Sample, add_generation_prompt: bool = False) -> str:
        """Render a conversation with the chat template, one placeholder per image or video. With a generation prompt,
        an assistant turn at the end is left open for the model to continue."""
        continued = add_generation_prompt and sample.messages[-1].role == "assistant"
        return render(self.processor, sample, add_generation_prompt and not continued, continue_final_message=continued)

    def check_stop(self, stop: Collection[int]) -> None:
        """Raise UserError unless the chat template ends an assistant turn with one of the `stop` tokens. A model that
        is never trained on such a token there would not stop generating."""
        text, marked = render_marked(self.processor, GREETING)
        ((low, high),) = answer_spans(self.processor, GREETING, text, marked)
        answer = self.processor.tokenizer(text[low:high], add_special_tokens=False)["input_ids"]
        if not set(answer) & set(stop):
            names = ", ".join(self.processor.tokenizer.convert_ids_to_tokens(sorted(stop))) or "none is known"
            raise UserError(
                f"the chat template ends an answer without a token that stops generation ({names}), so the model would "
                "not be trained to stop; set model.chat_template to another template"
            )

    def filler(self, kind: MediaKind) -> Encoded:
        """Encode a prompt with a blank image or video, without labels.

        With several processes, every rank must run the vision encoder equally often, or collective operations hang. A
        micro-batch without one kind of media gets this sequence, which adds nothing to the loss.
        """
        message = Message("user", (kind(_BLANK_PATH), Text(".")))
        encoded = self.encode_prompt(Sample("filler", (message,), "filler"))
        encoded["labels"] = torch.full_like(encoded["input_ids"], IGNORED)
        return encoded

    def fillers(self, kinds: Iterable[MediaKind]) -> dict[str, Encoded]:
        """Return a filler of each kind, keyed by its pixel tensor, as Collator expects them."""
        encoded = [self.filler(kind) for kind in kinds]
        return {next(key for key in filler if key.startswith("pixel_values")): filler for filler in encoded}

    def blank(self) -> Encoded:
        """Encode a text without labels, for a process that has no samples while others still do."""
        encoded = self.encode_prompt(Sample("blank", (Message("user", (Text("."),)),), "blank"))
        return encoded | {"labels": torch.full_like(encoded["input_ids"], IGNORED)}

    def media_tokens(self, sample: Sample) -> int:
        """Return the number of tokens of the sample's images and videos, without `max_length`. Raises SampleError."""
        text, media = self.render(sample), self._load(sample)
        plain = self._plain_tokens(text)
        return self._process(sample, text, plain, media)["input_ids"].shape[1] - len(plain.ids) + len(media)

    def _plain_tokens(self, text: str) -> PlainTokens:
        output = self.processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=self._adds_bos(text))
        return PlainTokens(output["input_ids"], output["offset_mapping"])

    def _adds_bos(self, text: str) -> bool:
        bos = self.processor.tokenizer.bos_token
        return bos is None or not text.startswith(bos)

    @cached_property
    def _text_keys(self) -> tuple[str, ...] | None:
        """The keys that the processor adds to the plain tokens of a text without media, all zeros (`token_type_ids`,
        for example): such a text need not go through the processor. None if the processor does more, or if it does not
        accept text without media."""
        try:
            text = self.render(GREETING)
            plain = self._plain_tokens(text)
            output = self._call_processor(GREETING, text, {})
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
            return [self._load_part(part) for part in sample.media()]
        except MediaError as error:
            raise SampleError(sample.id, sample.source, str(error), "media", error.path) from error

    def _load_part(self, part: Image | Video) -> Media:
        blank = part.path is _BLANK_PATH
        if isinstance(part, Image):
            return _BLANK_IMAGE if blank else load_image(part.path, part.data)
        if blank:
            frames = np.zeros((self.video.num_frames, 32, 32, 3), np.uint8)
            return SampledVideo(frames, tuple(range(len(frames))), 1.0, len(frames))
        return load_video(part.path, self.video.model_copy(update=part.bounds), part.data)

    def _process(self, sample: Sample, text: str, plain: PlainTokens | None, media: list[Media]) -> Encoded:
        own = media[: len(list(sample.media()))]
        images = [medium for medium in own if isinstance(medium, PILImage.Image)]
        videos = [medium for medium in own if isinstance(medium, SampledVideo)]
        self._check_media(sample, text, len(images), len(videos))
        arguments: dict[str, Any] = {}
        if images:
            arguments["images"] = [images]
        if videos:
            arguments["videos"] = [[video.frames for video in videos]]
            arguments["video_metadata"] = [[_metadata(video) for video in videos]]
            arguments["do_sample_frames"] = False
        if arguments or self._text_keys is None:
            return self._call_processor(sample, text, arguments)
        assert plain is not None, "plain tokens may be omitted only for samples with media"
        ids = torch.tensor([plain.ids])
        encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return encoded | {key: torch.zeros_like(ids) for key in self._text_keys}

    def _call_processor(self, sample: Sample, text: str, media: dict[str, Any]) -> Encoded:
        try:
            output = self.processor(text=[text], return_tensors="pt", add_special_tokens=self._adds_bos(text), **media)
        except PROCESSOR_ERRORS as error:
            why = str(error) or type(error).__name__
            reason = f"the processor rejects it ({why}); does its text contain a literal media placeholder?"
            raise SampleError(sample.id, sample.source, reason, "encode") from error
        return {k: v for k, v in output.items() if isinstance(v, Tensor)}

    def _turns(
        self, sample: Sample, text: str, marked: list[Span] | None, plain: PlainTokens, ids: list[int]
    ) -> list[int]:
        """Return, for each token of the encoded sample, the number of its assistant turn, from 1; 0 for none."""
        spans = answer_spans(self.processor, sample, text, marked)
        turns = assign_turns(plain.offsets, spans)
        if plain.ids == ids:
            return turns
        pattern = "|".join(map(re.escape, placeholders(self.processor)))
        media = [match.span() for match in re.finditer(pattern, text)] if pattern else []
        aligned = align(plain.ids, turns, overlapping(plain.offsets, media), ids)
        if aligned is None:
            reason = "its media placeholders cannot be told apart from its text"
            raise SampleError(sample.id, sample.source, reason, "encode")
        return aligned

    def _check_media(self, sample: Sample, text: str, images: int, videos: int) -> None:
        """Raise SampleError for media that the processor would silently ignore: an unsupported kind, or media without a
        placeholder."""
        reason = None
        known = placeholders(self.processor)
        written = sum(map(text.count, known))
        video_processor: Any = getattr(self.processor, "video_processor", None)
        if videos and video_processor is None:
            reason = "it has a video, and the model's processor accepts images only"
        elif images and videos and "pixel_values" in video_processor.model_input_names:
            # SmolVLM: the video frames would replace the images.
            reason = "it has images and videos, and the model's processor accepts only one kind per sample"
        elif known and written != images + videos:
            reason = (
                f"the chat template writes {written} media placeholders for {images + videos} images and videos; "
                "does its text contain a literal placeholder, or does the template (model.chat_template) omit one?"
            )
        if reason is not None:
            raise SampleError(sample.id, sample.source, reason, "encode")


_BLANK_PATH = Path(
    "blank"
)  # compared by identity: this object stands for a filler's media, and a file may have the name
_BLANK_IMAGE = PILImage.new("RGB", (32, 32))


def _metadata(video: SampledVideo) -> dict[str, Any]:
    return {
        "total_num_frames": video.total_frames,
        "fps": video.fps,
        "frames_indices": list(video.indices),
        "duration": video.duration,
    }
