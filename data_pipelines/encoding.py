"""A sample as a model takes it: input_ids, labels, pixel values. The ONE place that writes -100.

Training, evaluation and chat all come through `Encoder`, so the same conversation gives the same tensors everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image as PILImage
from torch import Tensor

from data_pipelines.images import load_image
from data_pipelines.samples import Image, MediaError, Message, Part, Sample, SampleError, Text, Video
from data_pipelines.video import VideoClip, load_video, resolve_reader
from mmdora.config import VideoConfig
from mmdora.errors import UserError

IGNORED = -100  # a label that the loss skips

Encoded = dict[str, Tensor]


@dataclass(frozen=True)
class Encoder:
    """Encodes conversations with a Hugging Face processor and its chat template.

    Frames are sampled here, once; the processor is told not to sample again and gets their times.
    """

    processor: Any
    video: VideoConfig = field(default_factory=VideoConfig)
    max_length: int | None = None  # tokens

    def encode(self, sample: Sample) -> Encoded:
        """A training sample: `input_ids`, `labels` [1, tokens] and the processor's media tensors.

        Only the assistant's words and their end of sequence have labels. Raises SampleError that names the sample,
        for media that cannot be read, a sample with nothing to learn, or one longer than `max_length`.
        """
        encoded, text = self._run(sample, add_generation_prompt=False)
        for message in sample.messages:
            for part in message.parts:
                if isinstance(part, Text) and part.text.strip() not in text:
                    reason = f"the chat template leaves out or changes what the {message.role} says"
                    raise SampleError(sample.id, sample.source, reason, "encode")
        ids = encoded["input_ids"][0].tolist()
        if self.max_length is not None and len(ids) > self.max_length:
            reason = f"{len(ids)} tokens, over data.max_length {self.max_length}"
            raise SampleError(sample.id, sample.source, reason, "encode")
        supervised = self._supervised(sample, text, ids)
        if not any(supervised):
            raise SampleError(sample.id, sample.source, "no answer to learn: it has no assistant turn", "encode")
        if "labels" in encoded:
            # PaliGemma's processor leaves labels to its caller: tokens of type 0 see each other in both directions,
            # and an answer among them would be read before it is said.
            encoded["token_type_ids"][0, supervised.index(True) :] = 1
        labels = [token if yes else IGNORED for token, yes in zip(ids, supervised, strict=True)]
        encoded["labels"] = torch.tensor([labels])
        return encoded

    def encode_prompt(self, sample: Sample) -> Encoded:
        """A conversation up to the assistant's next turn, for generation. Raises SampleError."""
        encoded, _ = self._run(sample, add_generation_prompt=True)
        encoded.pop("labels", None)
        return encoded

    def render(self, sample: Sample, add_generation_prompt: bool = False) -> str:
        """The conversation as the chat template writes it, with one placeholder for each picture or video."""
        messages = [{"role": m.role, "content": [_content(p) for p in m.parts]} for m in sample.messages]
        try:
            return self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            reason = f"the chat template refuses it ({error})"
            raise SampleError(sample.id, sample.source, reason, "encode") from error

    def check_stop(self, stop: Collection[int]) -> None:
        """Raise UserError unless the chat template ends an assistant's turn with a token that stops generation; a model
        that never sees one there would not learn to stop."""
        turns = (Message("user", (Text("Hello"),)), Message("assistant", (Text("Hello"),)))
        sample = Sample("a greeting", turns, "the chat template")
        text = self.render(sample)
        ((low, high),) = self._assistant_spans(sample, text)
        said = self.processor.tokenizer(text[low:high], add_special_tokens=False)["input_ids"]
        if not set(said) & set(stop):
            names = ", ".join(self.processor.tokenizer.convert_ids_to_tokens(sorted(stop))) or "none is known"
            raise UserError(
                f"the chat template ends an answer without a token that stops generation ({names}), so the model would "
                "not learn to stop; give another template with model.chat_template"
            )

    def filler(self, kind: type[Image] | type[Video]) -> Encoded:
        """A row with a blank picture or clip and no labels.

        Under data parallelism every rank must run the vision encoder equally often, or collective operations hang; a
        micro-batch that lacks a kind of media gets this row, which adds nothing to the loss.
        """
        blank = Path("blank")
        message = Message("user", (kind(blank), Text(".")))
        encoded, _ = self._run(Sample("filler", (message,), "filler"), add_generation_prompt=True)
        encoded["labels"] = torch.full_like(encoded["input_ids"], IGNORED)
        return encoded

    def _run(self, sample: Sample, add_generation_prompt: bool) -> tuple[Encoded, str]:
        text = self.render(sample, add_generation_prompt)
        images: list[PILImage.Image] = []
        clips: list[VideoClip] = []
        for part in sample.media():
            try:
                if isinstance(part, Image):
                    images.append(_BLANK if part.path.name == "blank" else load_image(part.path, part.data))
                else:
                    clips.append(self._blank_clip() if part.path.name == "blank" else self._load(part.path))
            except MediaError as error:
                raise SampleError(sample.id, sample.source, str(error), "media", error.path) from error
        self._check_media(sample, text, len(images), len(clips))
        arguments: dict[str, Any] = {}
        if images:
            arguments["images"] = [images]
        if clips:
            arguments["videos"] = [[clip.frames for clip in clips]]
            arguments["video_metadata"] = [[_metadata(clip) for clip in clips]]
            arguments["do_sample_frames"] = False
        bos = self.processor.tokenizer.bos_token
        adds_bos = bos is None or not text.startswith(bos)
        try:
            output = self.processor(text=[text], return_tensors="pt", add_special_tokens=adds_bos, **arguments)
        except (ValueError, IndexError, StopIteration) as error:
            reason = f"the processor refuses it ({error}); does its text hold a literal media placeholder?"
            raise SampleError(sample.id, sample.source, reason, "encode") from error
        return {k: v for k, v in output.items() if isinstance(v, Tensor)}, text

    def _load(self, path: Path) -> VideoClip:
        return load_video(path, self.video.num_frames, resolve_reader(self.video.reader))

    def _blank_clip(self) -> VideoClip:
        frames = np.zeros((self.video.num_frames, 32, 32, 3), np.uint8)
        return VideoClip(frames, tuple(range(self.video.num_frames)), 1.0, self.video.num_frames)

    def _supervised(self, sample: Sample, text: str, ids: list[int]) -> list[bool]:
        """For each token of the encoded sample, whether the assistant says it."""
        spans = self._assistant_spans(sample, text)
        bos = self.processor.tokenizer.bos_token
        written = "|".join(map(re.escape, self._placeholders()))
        media = [match.span() for match in re.finditer(written, text)] if written else []
        plain = self.processor.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=bos is None or not text.startswith(bos)
        )
        offsets = plain["offset_mapping"]
        said = [any(start < end and low <= start and end <= high for low, high in spans) for start, end in offsets]
        cut = [any(start < high and low < end for low, high in media) for start, end in offsets]
        supervised = align(plain["input_ids"], said, cut, ids)
        if supervised is None:
            reason = "its media placeholders cannot be told from its text"
            raise SampleError(sample.id, sample.source, reason, "encode")
        return supervised

    def _placeholders(self) -> list[str]:
        """What the chat template writes for a picture or a video, and the processor then expands."""
        tokens = (getattr(self.processor, name, None) for name in ("image_token", "video_token"))
        return [token for token in tokens if token]

    def _check_media(self, sample: Sample, text: str, images: int, clips: int) -> None:
        """Processors pass over media that they do not know or that have no placeholder: here these are errors."""
        reason = None
        written = sum(map(text.count, self._placeholders()))
        videos: Any = getattr(self.processor, "video_processor", None)
        if clips and videos is None:
            reason = "it has a video, and the model's processor takes pictures alone"
        elif images and clips and "pixel_values" in videos.model_input_names:
            # SmolVLM's: the frames would take the pictures' place.
            reason = "it has pictures and videos, and the model's processor takes only one of the kinds at a time"
        elif self._placeholders() and written != images + clips:
            reason = (
                f"the chat template writes {written} media placeholders for {images + clips} pictures and videos; "
                "does its text hold a literal one, or does the template (model.chat_template) leave one out?"
            )
        if reason is not None:
            raise SampleError(sample.id, sample.source, reason, "encode")

    def _assistant_spans(self, sample: Sample, text: str) -> list[tuple[int, int]]:
        """Character spans of the assistant's turns: what each adds to the rendering of everything before it."""
        spans = []
        for index, message in enumerate(sample.messages):
            if message.role != "assistant":
                continue
            before = self.render(replace(sample, messages=sample.messages[:index]), add_generation_prompt=True)
            after = self.render(replace(sample, messages=sample.messages[: index + 1]))
            if not text.startswith(before) or not text.startswith(after.rstrip()):
                raise UserError(
                    "the chat template rewrites earlier turns when later ones follow, so that the assistant's words "
                    "cannot be found in it; give another with model.chat_template"
                )
            spans.append((len(before), len(after.rstrip())))
        return spans


def align(
    plain: Sequence[int], said: Sequence[bool], cut: Sequence[bool], expanded: Sequence[int]
) -> list[bool] | None:
    """For each token of `expanded`, whether the assistant says it, given that for each token of `plain`.

    `expanded` is `plain` with every media placeholder (`cut`) replaced by a run, which may hold text, as the times of
    frames, and whose ends may melt into one token with the text beside it. None where an answer is not found.
    """
    supervised = [False] * len(expanded)
    at = 0
    for is_media, group in groupby(zip(plain, said, cut, strict=True), key=lambda token: token[2]):
        segment = list(group)
        answers = [place for place, token in enumerate(segment) if token[1]]
        if is_media or not answers:
            continue
        start = _place([token[0] for token in segment], answers, expanded, at)
        if start is None:
            return None
        for place in answers:
            supervised[start + place] = True
        at = start + answers[-1] + 1
    return supervised


MELTED = 2  # tokens at each end of a text between media that may be others once these are expanded


def _place(tokens: list[int], answers: list[int], expanded: Sequence[int], at: int) -> int | None:
    """Where the text begins in `expanded`, with as few melted ends as can be."""
    for low, high in sorted(product(range(MELTED + 1), repeat=2), key=sum):
        if low <= answers[0] and answers[-1] < len(tokens) - high:
            start = _find(tokens[low : len(tokens) - high], expanded, at)
            if start is not None:
                return start - low
    return None


def _find(wanted: list[int], within: Sequence[int], at: int) -> int | None:
    """The first place from `at` on where `wanted` stands in a row."""
    for start in range(at, len(within) - len(wanted) + 1):
        if within[start] == wanted[0] and list(within[start : start + len(wanted)]) == wanted:
            return start
    return None


_BLANK = PILImage.new("RGB", (32, 32))


def _content(part: Part) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "image" if isinstance(part, Image) else "video"}


def _metadata(clip: VideoClip) -> dict[str, Any]:
    return {
        "total_num_frames": clip.total_frames,
        "fps": clip.fps,
        "frames_indices": list(clip.indices),
        "duration": clip.total_frames / clip.fps if clip.fps else None,
    }
