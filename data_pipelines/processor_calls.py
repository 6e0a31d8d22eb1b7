"""Call a model's Hugging Face processor on rendered texts with media in memory, one sample or a batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from data_pipelines.images import CHANNELS, channels_first, load_image, unambiguous
from data_pipelines.layout import Encoded, Layout, Media, blank_video, find_layout
from data_pipelines.prompts import Prompts
from data_pipelines.rendering import placeholders, render
from data_pipelines.samples import Image, Message, Sample, SampleError, Text, Video
from data_pipelines.video import SampledVideo, load_video
from data_pipelines.video.metadata import seconds_per_grid, video_metadata
from mmdora.core.config import VideoConfig

# The exceptions that processors raise for text or media that they cannot process.
PROCESSOR_ERRORS = (
    ValueError, LookupError, StopIteration, RuntimeError, TypeError, AttributeError, ArithmeticError, MemoryError
)  # fmt: skip

MediaKind: TypeAlias = type[Image] | type[Video]
# Stands for the path of a blank image or video. It is compared by identity, because a file may have this name.
_BLANK_PATH = Path("blank")
_BLANK_IMAGE = PILImage.new("RGB", (32, 32))


class ProcessorCalls:
    """A model's processor, called with texts and their media.

    Raises any of PROCESSOR_ERRORS for what the processor does not accept.
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, texts: list[str], media: list[list[Media]], **options: Any) -> Encoded:
        """Call the processor on a batch of texts with their media."""
        images = [[self._readable(m) for m in own if isinstance(m, PILImage.Image)] for own in media]
        videos = [[m for m in own if isinstance(m, SampledVideo)] for own in media]
        if any(images):
            options["images"] = images
        if any(videos):
            options["videos"] = [[channels_first(video.frames) for video in own] for own in videos]
            options["video_metadata"] = [[video_metadata(video) for video in own] for own in videos]
            options |= {"do_sample_frames": False, "return_metadata": True}
        adds_bos = Prompts(self.processor.tokenizer).adds_bos(texts[0])
        output = self.processor(text=texts, return_tensors="pt", add_special_tokens=adds_bos, **options)
        encoded = {key: value for key, value in output.items() if isinstance(value, Tensor)}
        for key, value in encoded.items():
            seconds = seconds_per_grid(key, [video for own in videos for video in own], self.processor)
            encoded[key] = value if seconds is None else torch.tensor(seconds, dtype=value.dtype)
        return encoded

    def _readable(self, image: PILImage.Image) -> PILImage.Image | np.ndarray:
        return unambiguous(image) if image.height in CHANNELS and self._confuses_rows else image

    @cached_property
    def _confuses_rows(self) -> bool:
        """Whether the image processor takes the rows of an image of 3 rows for its channels."""
        image = PILImage.fromarray(np.arange(360).reshape(3, 40, 3).astype(np.uint8))
        try:
            read, right = (self.processor.image_processor(i, return_tensors="pt") for i in (image, unambiguous(image)))
        except PROCESSOR_ERRORS:  # it accepts no arrays
            return False
        if isinstance(right, Tensor):  # Idefics
            return not torch.equal(read, right)
        return any(isinstance(right[key], Tensor) and not torch.equal(read[key], right[key]) for key in right)

    @cached_property
    def layout(self) -> Layout:
        """How the processor's tensors form a batch. Computed on first access, because it processes blank media."""
        kinds = {"image_processor": PILImage.Image, "video_processor": SampledVideo}
        return find_layout(self._probe, [k for name, k in kinds.items() if getattr(self.processor, name, None)])

    def _probe(self, batch: Sequence[tuple[list[Media], str]]) -> Encoded | None:
        """Encode questions about media in memory as one batch; None if the processor rejects them."""
        parts = [
            [Image(_BLANK_PATH) if isinstance(m, PILImage.Image) else Video(_BLANK_PATH) for m in media]
            for media, _ in batch
        ]
        samples = [
            Sample("probe", (Message("user", (*own, Text(text))),), "probe")
            for own, (_, text) in zip(parts, batch, strict=True)
        ]
        tokenizer = self.processor.tokenizer
        pad_token, tokenizer.pad_token = tokenizer.pad_token, tokenizer.pad_token or tokenizer.eos_token
        try:
            texts = [render(self.processor, sample, add_generation_prompt=True) for sample in samples]
            encoded = self(texts, [media for media, _ in batch], **({"padding": True} if len(batch) > 1 else {}))
        except (SampleError, *PROCESSOR_ERRORS):
            return None
        finally:
            tokenizer.pad_token = pad_token
        return encoded if "input_ids" in encoded else None


def check_media(processor: Any, sample: Sample, text: str, images: int, videos: int) -> None:
    """Raise SampleError for media that the processor would ignore: of an unsupported kind, or without a placeholder."""
    reason = None
    known = placeholders(processor)
    written = sum(map(text.count, known))
    video_processor: Any = getattr(processor, "video_processor", None)
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


def load_medium(part: Image | Video, settings: VideoConfig) -> Media:
    """Load an image, or the frames of a video. Raises MediaError."""
    blank = part.path is _BLANK_PATH
    if isinstance(part, Image):
        return _BLANK_IMAGE if blank else load_image(part.path, part.data)
    if blank:
        return blank_video(np.zeros((settings.num_frames, 32, 32, 3), np.uint8))
    return load_video(part.path, settings.model_copy(update=part.bounds), part.data)


def blank_sample(*kinds: MediaKind) -> Sample:
    """Return a prompt with a blank image or video of each kind."""
    parts = (*(kind(_BLANK_PATH) for kind in kinds), Text("."))
    return Sample("a blank sample", (Message("user", parts),), "a blank sample")
