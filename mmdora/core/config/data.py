"""`data`: what the model is trained on, and how images and videos are read."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from mmdora.core.config.section import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section


class SourceConfig(Section):
    """One dataset of `data.train` or `data.validation`. A plain path is short for an entry with only `path`."""

    path: str = Field(description="A file, a folder, or a pattern of shards ([data](data.md)).")
    format: str | None = Field(
        default=None, description="A name that `mmdora list formats` prints; null means: detect it from the file."
    )
    media: str | None = Field(
        default=None, description="The folder that image and video paths start from; null means the file's own folder."
    )
    where: dict[str, list[str | int | bool]] = Field(
        default={}, description="Keep only rows whose field has one of these values: field -> values."
    )
    take: str | None = Field(
        default=None,
        description="Use only some rows: `first:N`, `random:N` or `random:P%` (drawn with `training.seed`).",
    )
    weight: PositiveFloat = Field(
        default=1.0, description="How often each sample is shown per epoch: 2.0 shows every sample twice."
    )

    @field_validator("take")
    @classmethod
    def _take_is_a_rule(cls, value: str | None) -> str | None:
        match = re.fullmatch(r"(?:first|random):([1-9]\d{0,17})|random:(\d{1,3}(?:\.\d+)?)%", value or "first:1")
        if match is None or not 0 < float(match[2] or 1) <= 100:
            raise ValueError("'take' must be first:N, random:N or random:P%, for example first:1000 or random:10%")
        return value


class VideoConfig(Section):
    """Which frames of a video the model sees, and how they are read."""

    reader: str = Field(
        default="auto",
        description="A name that `mmdora list video-readers` prints; `auto` means `pyav`, and `frames` for a folder.",
    )
    num_frames: PositiveInt = Field(
        default=8, description="Frames per video; with `sampling: fps` or `keyframe` the maximum."
    )
    sampling: Literal["uniform", "fps", "keyframe"] = Field(
        default="uniform",
        description="Frames at equal distances, at `fps` frames per second, or the video's key frames.",
    )
    fps: PositiveFloat | None = Field(default=None, description="`sampling: fps`: frames per second of video.")
    start: NonNegativeFloat | None = Field(default=None, description="Use only frames from this second on.")
    end: PositiveFloat | None = Field(default=None, description="Use only frames before this second.")
    frames_fps: PositiveFloat | None = Field(
        default=None, description="The frame rate of videos that are folders of images; null means 1."
    )
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        default=60.0,
        description="Seconds after which decoding a video is killed and the sample skipped; "
        "null means no limit, and no separate process.",
    )

    @model_validator(mode="after")
    def _keys_go_together(self) -> VideoConfig:
        if (self.fps is not None) != (self.sampling == "fps"):
            raise ValueError("'fps' and 'sampling: fps' go together: give both, or neither")
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise ValueError(f"'start' {self.start:g} must be before 'end' {self.end:g}")
        if self.frames_fps is not None and self.reader in ("decord", "pyav", "torchcodec"):
            raise ValueError(f"'frames_fps' is for folders of images, which reader {self.reader!r} does not read")
        return self


def _share(value: Any) -> str:
    """Return a percentage of the training data, such as `2%`."""
    if not re.fullmatch(r"\d{1,2}(\.\d+)?%", str(value)) or float(str(value)[:-1]) == 0:
        raise ValueError("must be a list of datasets, or a share over 0% and under 100%, such as 2%")
    return str(value)


class DataConfig(Section):
    """The datasets, and how their samples become batches."""

    train: list[SourceConfig] = Field(min_length=1, description="The training datasets.")
    validation: Annotated[
        Annotated[list[SourceConfig], Tag("a list")] | Annotated[str, BeforeValidator(_share), Tag("a share")],
        Discriminator(lambda value: "a list" if isinstance(value, list) else "a share"),
    ] = Field(
        default=[],
        description="Held-out datasets whose loss is computed every `training.evaluate_every` steps; or a share of the "
        "training data to hold out, such as `2%`, with whole images and videos.",
    )
    temperature: PositiveFloat = Field(
        default=1.0, description="Above 1, small datasets are sampled more often than their size suggests."
    )
    video: VideoConfig = Field(default=VideoConfig(), description="How videos are read; the keys are below.")
    max_length: PositiveInt | None = Field(
        default=None, description="The maximum number of tokens per sample, media included; null means no limit."
    )
    overlong: Literal["skip", "truncate"] = Field(
        default="skip",
        description="What happens to samples over `max_length`. Truncation never cuts an image or a video.",
    )
    group_by: Literal["length", "modality"] | None = Field(
        default=None,
        description="Which samples of a step share a micro-batch: similar lengths, or the same media; null: any.",
    )
    max_tokens: PositiveInt | None = Field(
        default=None,
        description="The maximum number of tokens per micro-batch, padding included: long samples then share a "
        "micro-batch with fewer others.",
    )
    packing: bool = Field(
        default=False,
        description="Concatenate the samples of a micro-batch into rows of `max_length` instead of padding them.",
    )
    max_skipped: Fraction = Field(
        default=0.01, description="The run stops when a larger share of the samples cannot be used."
    )
    num_workers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Processes that load and encode samples; 0 means the training process itself."
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, data: Any) -> Any:
        """`data.train=[FILE]` stands for one entry whose format is detected; `data.validation=[FILE]` likewise."""
        if not isinstance(data, dict):
            return data
        lists = [key for key in ("train", "validation") if isinstance(data.get(key), list)]
        return data | {key: [{"path": e} if isinstance(e, str) else e for e in data[key]] for key in lists}

    @property
    def validation_sources(self) -> list[SourceConfig]:
        """The validation datasets; none if a share of the training data is held out."""
        return [] if isinstance(self.validation, str) else self.validation

    @property
    def validation_share(self) -> float | None:
        """The share of the training data to hold out, from 0 to 1; None if there is none."""
        return float(self.validation.removesuffix("%")) / 100 if isinstance(self.validation, str) else None

    @field_validator("validation")
    @classmethod
    def _validation_has_no_weights(cls, value: list[SourceConfig] | str) -> list[SourceConfig] | str:
        if isinstance(value, str):
            return value
        if any(source.weight != 1 for source in value):
            raise ValueError("'weight' is for training data; every validation sample counts once, so remove it")
        return value

    @model_validator(mode="after")
    def _lengths_fit(self) -> DataConfig:
        if self.max_length is None and self.overlong == "truncate":
            raise ValueError("'overlong: truncate' needs 'max_length', the number of tokens to truncate to")
        if self.max_length is None and self.packing:
            raise ValueError("'packing' needs 'max_length', the number of tokens per row")
        if self.packing and self.group_by == "length":
            raise ValueError("'group_by: length' reduces padding, and 'packing' removes it; use one of them")
        if self.max_tokens is not None and self.max_tokens < (self.max_length or 0):
            raise ValueError(f"'max_tokens' {self.max_tokens} is less than 'max_length' {self.max_length}, one sample")
        return self
