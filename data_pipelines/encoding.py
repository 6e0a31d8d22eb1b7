"""A sample as a model takes it: input_ids, labels, pixel values. The ONE place that writes -100.

Training, evaluation and chat all come through `Encoder`, so the same conversation gives the same tensors everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
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
        labels = [token if yes else IGNORED for token, yes in zip(ids, supervised, strict=True)]
        encoded["labels"] = torch.tensor([labels])
        return encoded

    def encode_prompt(self, sample: Sample) -> Encoded:
        """A conversation up to the assistant's next turn, for generation. Raises SampleError."""
        return self._run(sample, add_generation_prompt=True)[0]

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
        labels = self.encode(Sample("a greeting", turns, "the chat template"))["labels"]
        if not set(labels.flatten().tolist()) & set(stop):
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
                    images.append(_BLANK if part.path.name == "blank" else load_image(part.path))
                else:
                    clips.append(self._blank_clip() if part.path.name == "blank" else self._load(part.path))
            except MediaError as error:
                raise SampleError(sample.id, sample.source, str(error), "media", error.path) from error
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
        plain = self.processor.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=bos is None or not text.startswith(bos)
        )
        said = [
            any(start < end and low <= start and end <= high for low, high in spans)
            for start, end in plain["offset_mapping"]
        ]
        places = align(plain["input_ids"], ids)
        if places is None:
            reason = "its media placeholders cannot be told from its text"
            raise SampleError(sample.id, sample.source, reason, "encode")
        supervised = [False] * len(ids)
        for place, yes in zip(places, said, strict=True):
            if yes:
                supervised[place] = True
        return supervised

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


def align(plain: Sequence[int], expanded: Sequence[int]) -> list[int] | None:
    """Where each token of `plain` stands in `expanded`, which has every media placeholder replaced by a run of its
    kind.

    None where the two do not match.
    """
    surplus = Counter(expanded) - Counter(plain)
    places: list[int] = []
    at = 0
    for token in plain:
        places.append(at)
        if token in surplus:  # a placeholder; a second one right behind it shares the run
            while at < len(expanded) and expanded[at] in surplus:
                at += 1
        elif at < len(expanded) and expanded[at] == token:
            at += 1
        else:
            return None
    return places if at == len(expanded) else None


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
