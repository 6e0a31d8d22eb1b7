"""A sample as a model takes it: input_ids, labels, pixel values. The ONE place that writes -100.

Training, evaluation and chat all come through `Encoder`, so the same conversation gives the same tensors everywhere.
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
from data_pipelines.labels import align, learnt_turns, touching, turns_of
from data_pipelines.rendering import Span, answer_spans, placeholders, render, render_marked
from data_pipelines.samples import Image, MediaError, Message, Sample, SampleError, Text, Video
from data_pipelines.truncation import check_cut, without_last_answer
from data_pipelines.video import VideoClip, load_video
from mmdora.core.config import VideoConfig
from mmdora.core.errors import UserError

IGNORED = -100  # a label that the loss skips
# What processors raise for a text or a picture that they cannot take.
REFUSALS = (ValueError, IndexError, StopIteration, RuntimeError, TypeError, ArithmeticError, MemoryError)
PER_TOKEN = ("input_ids", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids")

Encoded = dict[str, Tensor]
Media = PILImage.Image | VideoClip  # read from its file
MediaKind: TypeAlias = type[Image] | type[Video]
GREETING = Sample(
    "a greeting", (Message("user", (Text("Hello"),)), Message("assistant", (Text("Hello"),))), "the chat template"
)


class Plain(NamedTuple):
    """A rendering's tokens, one for each media placeholder, and the characters that each stands for."""

    ids: list[int]
    offsets: list[Span]


@dataclass(frozen=True)
class Encoder:
    """Encodes conversations with a Hugging Face processor and its chat template.

    Frames are sampled here, once; the processor is told not to sample again and gets their times.
    """

    processor: Any
    video: VideoConfig = field(default_factory=VideoConfig)
    max_length: int | None = None  # tokens
    overlong: Literal["skip", "truncate"] = "skip"  # what becomes of a sample longer than that

    @property
    def pad_token_id(self) -> int:
        """What fills up rows: the tokenizer's padding, or its end of sequence where it has none."""
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def encode(self, sample: Sample, changed: Callable[[str], None] = lambda reason: None) -> Encoded:
        """A training sample: `input_ids`, `labels` [1, tokens] and the processor's media tensors.

        Only the words of the assistant's turns that are to be learnt and their end of sequence have labels. `changed`
        hears why a sample is not encoded as it is. Raises SampleError that names the sample, for media that cannot be
        read, a sample with nothing to learn, or one longer than `max_length` that cannot be shortened.
        """
        media = self._load(sample)
        encoded, shortened = self._encode(sample, media), sample
        while self.max_length is not None and encoded["input_ids"].shape[1] > self.max_length:
            shorter = self._shorter(shortened, encoded)
            if shorter is None:
                encoded = {
                    key: value[:, : self.max_length] if key in PER_TOKEN else value for key, value in encoded.items()
                }
                changed(f"over data.max_length {self.max_length} tokens: the answer is cut there")
            else:
                encoded, shortened = self._encode(shorter, media), shorter
        if left_out := len(sample.messages) - len(shortened.messages):
            changed(f"over data.max_length {self.max_length} tokens: its last {left_out} turns are left out")
        if empty := sum(m.role == "assistant" and m.train and not m.text.strip() for m in shortened.messages):
            changed(f"{empty} empty answers are read, not learnt")
        return encoded

    def _encode(self, sample: Sample, media: list[Media]) -> Encoded:
        """All of the sample, however long; `media` begins with its own."""
        text, marked = render_marked(self.processor, sample)
        for message in sample.messages:
            for part in message.parts:
                if isinstance(part, Text) and part.text.strip() not in text:
                    reason = f"the chat template leaves out or changes what the {message.role} says"
                    reason += "; model.chat_template names another"
                    raise SampleError(sample.id, sample.source, reason, "encode")
        learnt = learnt_turns(sample)
        plain = self._plain(text)
        encoded = self._run(sample, text, plain, media)
        turns = self._turns(sample, text, marked, plain, encoded["input_ids"][0].tolist())
        # The first token is never learnt: nothing stands before it to tell it from.
        supervised = [place for place, turn in enumerate(turns) if turn in learnt and place > 0]
        if not supervised:
            raise SampleError(
                sample.id, sample.source, "no answer to learn: none of its tokens is the answer's", "encode"
            )
        if "labels" in encoded:
            # PaliGemma's processor leaves labels to its caller: tokens of type 0 see each other in both directions,
            # and an answer among them would be read before it is said.
            encoded["token_type_ids"][0, supervised[0] :] = 1
        encoded["labels"] = torch.full_like(encoded["input_ids"], IGNORED)
        encoded["labels"][0, supervised] = encoded["input_ids"][0, supervised]
        return encoded

    def _shorter(self, sample: Sample, encoded: Encoded) -> Sample | None:
        """The sample with fewer turns; None where its one answer is to be cut. Raises SampleError."""
        labels, limit = encoded["labels"][0], self.max_length or 0
        if self.overlong == "skip":
            reason = f"{len(labels)} tokens, over data.max_length {limit}; data.overlong=truncate shortens such samples"
            raise SampleError(sample.id, sample.source, reason, "encode")
        shorter = without_last_answer(sample, learnt_turns(sample))
        if shorter is None:
            check_cut(sample, int((labels != IGNORED).nonzero()[0]), len(labels), limit)
        return shorter

    def encode_prompt(self, sample: Sample) -> Encoded:
        """A conversation up to the assistant's next turn, for generation. Raises SampleError."""
        text = self.render(sample, add_generation_prompt=True)
        media = self._load(sample)
        encoded = self._run(sample, text, None if media else self._plain(text), media)
        encoded.pop("labels", None)
        return encoded

    def render(self, sample: Sample, add_generation_prompt: bool = False) -> str:
        """The conversation as the chat template writes it, with one placeholder for each picture or video. For
        generation, an assistant's turn at its end is one that the model goes on with."""
        begun = add_generation_prompt and sample.messages[-1].role == "assistant"
        return render(self.processor, sample, add_generation_prompt and not begun, continue_final_message=begun)

    def check_stop(self, stop: Collection[int]) -> None:
        """Raise UserError unless the chat template ends an assistant's turn with a token that stops generation; a model
        that never sees one there would not learn to stop."""
        text, marked = render_marked(self.processor, GREETING)
        ((low, high),) = answer_spans(self.processor, GREETING, text, marked)
        said = self.processor.tokenizer(text[low:high], add_special_tokens=False)["input_ids"]
        if not set(said) & set(stop):
            names = ", ".join(self.processor.tokenizer.convert_ids_to_tokens(sorted(stop))) or "none is known"
            raise UserError(
                f"the chat template ends an answer without a token that stops generation ({names}), so the model would "
                "not learn to stop; give another template with model.chat_template"
            )

    def filler(self, kind: MediaKind) -> Encoded:
        """A row with a blank picture or clip and no labels.

        Under data parallelism every rank must run the vision encoder equally often, or collective operations hang; a
        micro-batch that lacks a kind of media gets this row, which adds nothing to the loss.
        """
        message = Message("user", (kind(_NOTHING), Text(".")))
        encoded = self.encode_prompt(Sample("filler", (message,), "filler"))
        encoded["labels"] = torch.full_like(encoded["input_ids"], IGNORED)
        return encoded

    def fillers(self, kinds: Iterable[MediaKind]) -> dict[str, Encoded]:
        """A filler of each kind, by the key of the pixels that it brings, as a Collator takes them."""
        rows = [self.filler(kind) for kind in kinds]
        return {next(key for key in row if key.startswith("pixel_values")): row for row in rows}

    def blank(self) -> Encoded:
        """A row of text without labels, for a process that has nothing left while others go on."""
        encoded = self.encode_prompt(Sample("blank", (Message("user", (Text("."),)),), "blank"))
        return encoded | {"labels": torch.full_like(encoded["input_ids"], IGNORED)}

    def _plain(self, text: str) -> Plain:
        bos = self.processor.tokenizer.bos_token
        adds_bos = bos is None or not text.startswith(bos)
        output = self.processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=adds_bos)
        return Plain(output["input_ids"], output["offset_mapping"])

    @cached_property
    def _text_keys(self) -> tuple[str, ...] | None:
        """What the processor gives for text alone besides the plain tokens, all zeros (`token_type_ids`, say): then it
        need not be asked. None where it does more with a text, or takes none without media."""
        try:
            text = self.render(GREETING)
            plain = self._plain(text)
            output = self._ask(GREETING, text, {})
        except SampleError:
            return None
        known = {"input_ids": torch.tensor([plain.ids]), "attention_mask": torch.ones(1, len(plain.ids))}
        same = all(key in output and torch.equal(output[key], value.long()) for key, value in known.items())
        others = tuple(key for key in output if key not in known)
        zeros = all(output[key].shape == output["input_ids"].shape and not output[key].any() for key in others)
        return others if same and zeros else None

    def media_tokens(self, sample: Sample) -> int:
        """How many tokens the sample's pictures and clips take, however long it is. Raises SampleError."""
        text, media = self.render(sample), self._load(sample)
        plain = self._plain(text)
        return self._run(sample, text, plain, media)["input_ids"].shape[1] - len(plain.ids) + len(media)

    def _load(self, sample: Sample) -> list[Media]:
        """The sample's pictures and clips, in the order in which it shows them. Raises SampleError."""
        try:
            return [self._read(part) for part in sample.media()]
        except MediaError as error:
            raise SampleError(sample.id, sample.source, str(error), "media", error.path) from error

    def _read(self, part: Image | Video) -> Media:
        blank = part.path is _NOTHING
        if isinstance(part, Image):
            return _BLANK if blank else load_image(part.path, part.data)
        if blank:
            return self._blank_clip()
        return load_video(part.path, self.video.model_copy(update=part.bounds), part.data)

    def _run(self, sample: Sample, text: str, plain: Plain | None, media: list[Media]) -> Encoded:
        shown = media[: len(list(sample.media()))]
        images = [medium for medium in shown if isinstance(medium, PILImage.Image)]
        clips = [medium for medium in shown if isinstance(medium, VideoClip)]
        self._check_media(sample, text, len(images), len(clips))
        arguments: dict[str, Any] = {}
        if images:
            arguments["images"] = [images]
        if clips:
            arguments["videos"] = [[clip.frames for clip in clips]]
            arguments["video_metadata"] = [[_metadata(clip) for clip in clips]]
            arguments["do_sample_frames"] = False
        if arguments or self._text_keys is None:
            return self._ask(sample, text, arguments)
        assert plain is not None, "only of a sample with media are the plain tokens not asked for"
        ids = torch.tensor([plain.ids])
        encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return encoded | {key: torch.zeros_like(ids) for key in self._text_keys}

    def _ask(self, sample: Sample, text: str, media: dict[str, Any]) -> Encoded:
        """The processor's own answer."""
        bos = self.processor.tokenizer.bos_token
        adds_bos = bos is None or not text.startswith(bos)
        try:
            output = self.processor(text=[text], return_tensors="pt", add_special_tokens=adds_bos, **media)
        except REFUSALS as error:
            why = str(error) or type(error).__name__
            reason = f"the processor refuses it ({why}); does its text hold a literal media placeholder?"
            raise SampleError(sample.id, sample.source, reason, "encode") from error
        return {k: v for k, v in output.items() if isinstance(v, Tensor)}

    def _blank_clip(self) -> VideoClip:
        frames = np.zeros((self.video.num_frames, 32, 32, 3), np.uint8)
        return VideoClip(frames, tuple(range(self.video.num_frames)), 1.0, self.video.num_frames)

    def _turns(self, sample: Sample, text: str, marked: list[Span] | None, plain: Plain, ids: list[int]) -> list[int]:
        """For each token of the encoded sample, which of the assistant's turns it belongs to, from 1; 0: to none."""
        spans = answer_spans(self.processor, sample, text, marked)
        turns = turns_of(plain.offsets, spans)
        if plain.ids == ids:
            return turns
        written = "|".join(map(re.escape, placeholders(self.processor)))
        media = [match.span() for match in re.finditer(written, text)] if written else []
        aligned = align(plain.ids, turns, touching(plain.offsets, media), ids)
        if aligned is None:
            reason = "its media placeholders cannot be told from its text"
            raise SampleError(sample.id, sample.source, reason, "encode")
        return aligned

    def _check_media(self, sample: Sample, text: str, images: int, clips: int) -> None:
        """Processors pass over media that they do not know or that have no placeholder: here these are errors."""
        reason = None
        known = placeholders(self.processor)
        written = sum(map(text.count, known))
        videos: Any = getattr(self.processor, "video_processor", None)
        if clips and videos is None:
            reason = "it has a video, and the model's processor takes pictures alone"
        elif images and clips and "pixel_values" in videos.model_input_names:
            # SmolVLM's: the frames would take the pictures' place.
            reason = "it has pictures and videos, and the model's processor takes only one of the kinds at a time"
        elif known and written != images + clips:
            reason = (
                f"the chat template writes {written} media placeholders for {images + clips} pictures and videos; "
                "does its text hold a literal one, or does the template (model.chat_template) leave one out?"
            )
        if reason is not None:
            raise SampleError(sample.id, sample.source, reason, "encode")


_NOTHING = Path("blank")  # this very object names a filler's picture or clip; a file may be called so
_BLANK = PILImage.new("RGB", (32, 32))


def _metadata(clip: VideoClip) -> dict[str, Any]:
    return {
        "total_num_frames": clip.total_frames,
        "fps": clip.fps,
        "frames_indices": list(clip.indices),
        "duration": clip.duration,
    }
