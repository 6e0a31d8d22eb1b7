"""RunConfig: a run is one YAML. Frozen, unknown keys are errors with the nearest known key, all errors are told at
once.

The classes are the reference for every key: `mmdora train CONFIG section.key=value` sets any of them. config_files.py
reads and writes the YAML.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmdora.core.registry import nearest

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class VisionEncoderConfig(Section):
    """`type` is a name in VISION_ENCODERS; the other keys are that encoder's (docs/models.md)."""

    type: str
    name: str  # open_clip: an architecture; the others: a hub id or directory
    pretrained: str | None = None  # open_clip: a tag or a file, null: random weights; the others: a revision of the hub
    model_config_: dict[str, Any] | None = Field(None, alias="model_config")  # for an architecture of one's own


class LanguageModelConfig(Section):
    path: str  # hub id or directory of any causal language model, with its tokenizer


class ModelConfig(Section):
    """A whole model (`path`), or one composed of a vision encoder, a projector and a language model."""

    path: str | None = None
    revision: str = "main"  # of `path` on the hub: a branch, a tag or a commit
    vision_encoder: VisionEncoderConfig | None = None
    language_model: LanguageModelConfig | None = None
    projector: Literal["linear", "mlp2x_gelu", "resampler"] = "mlp2x_gelu"  # of a composed model (docs/models.md)
    num_queries: Positive | None = None  # of a resampler: the tokens of a picture, and of each frame; null: 64
    vision_feature_layer: int = -2  # of a composed model: the hidden state that the projector reads, as in LLaVA-1.5
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None  # null: what the family is built with
    quantization: Literal["4bit", "8bit"] | None = None  # of the language model's linear layers, which stay frozen
    trust_remote_code: bool = False
    chat_template: str | None = None  # a Jinja file, for a model that comes without a template
    new_tokens: list[str] = []  # given to the vocabulary; of embeddings and head, their rows alone are trained
    pad_to_square: bool = False  # pictures of a LLaVA-1.5: padded with the mean colour, where its processor crops them

    @model_validator(mode="after")
    def _whole_or_composed(self) -> ModelConfig:
        composed = self.vision_encoder is not None and self.language_model is not None
        if (self.path is not None) == composed:
            raise ValueError("give either 'path', or both 'vision_encoder' and 'language_model'")
        if self.projector == "resampler" and not composed:
            raise ValueError("'projector: resampler' is of a composed model; with 'path' leave it out")
        if self.num_queries is not None and self.projector != "resampler":
            raise ValueError(f"'num_queries' is of 'projector: resampler', not of {self.projector!r}; leave it out")
        return self


class PartConfig(Section):
    """How one part of the model is tuned. `method` is a name in ADAPTERS."""

    method: str
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    peft_dropout: bool = False  # DoRA: drop the input of the base product too, as PEFT does; costs a second product
    use_rslora: bool = False  # scale alpha / sqrt(rank) in place of alpha / rank
    targets: str | list[str] = "all-linear"  # or a regex over the path inside the part, or names (dotted suffixes)
    magnitude_targets: str | list[str] | None = None  # DoRA: layers with a magnitude; null: those of targets
    exclude: str | list[str] = []  # of targets: a regex, or names
    rank_pattern: dict[str, Positive] = {}  # regex over the end of a layer's path → its rank
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    forward: Literal["auto", "exact", "merged"] = "auto"  # linear layers: x meets A and B, or W + sBA; auto: the faster
    last_blocks: Positive | None = None  # tune only the last so many of the part's blocks; null: the whole part
    learning_rate: Rate | None = None  # null: training.learning_rate
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # each block learns at so much of the next one's rate
    weight_decay: Rate | None = None  # null: training.weight_decay


class SourceConfig(Section):
    path: str  # a file, a folder, or a pattern of shards (docs/data.md)
    format: str | None = None  # a name in DATASET_FORMATS; null: guessed from the file
    media: str | None = None  # folder that media paths start from; null: the file's own folder
    where: dict[str, list[str | int | bool]] = {}  # keep only rows whose field has one of these values
    take: str | None = None  # only some rows: first:N, random:N or random:P%, drawn by training.seed; null: all
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0  # 2.0 shows every sample twice an epoch

    @field_validator("take")
    @classmethod
    def _rule(cls, value: str | None) -> str | None:
        match = re.fullmatch(r"(?:first|random):([1-9]\d{0,17})|random:(\d{1,3}(?:\.\d+)?)%", value or "first:1")
        if match is None or not 0 < float(match[2] or 1) <= 100:
            raise ValueError("'take' must be first:N, random:N or random:P%, as first:1000 or random:10%")
        return value


class VideoConfig(Section):
    """Which frames of a video the model sees, and how they are read."""

    reader: str = "auto"  # a name in VIDEO_READERS; auto: pyav, and frames for a directory
    num_frames: Positive = 8  # of each video; with sampling fps or keyframe the most of them
    sampling: Literal["uniform", "fps", "keyframe"] = "uniform"  # equal steps, or so many a second, or whole pictures
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # of sampling fps: frames a second
    start: Rate | None = None  # seconds: only the frames from here on
    end: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # seconds: only the frames before this
    frames_fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # of a directory of pictures; null: 1
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = 60.0  # seconds for each; null: no limit, same process

    @model_validator(mode="after")
    def _keys_go_together(self) -> VideoConfig:
        if (self.fps is not None) != (self.sampling == "fps"):
            raise ValueError("'fps' and 'sampling: fps' go together: give both, or neither")
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise ValueError(f"'start' {self.start:g} must be before 'end' {self.end:g}")
        if self.frames_fps is not None and self.reader in ("decord", "pyav", "torchcodec"):
            raise ValueError(f"'frames_fps' is of directories of pictures, which reader {self.reader!r} does not read")
        return self


class DataConfig(Section):
    train: list[SourceConfig] = Field(min_length=1)
    validation: list[SourceConfig] = []  # held-out samples: their loss is told every training.evaluate_every steps
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0  # above 1: small sources are shown more often
    video: VideoConfig = VideoConfig()
    max_length: Positive | None = None  # tokens, media included; null: as long as they come
    overlong: Literal["skip", "truncate"] = "skip"  # over max_length: to the ledger, or shortened and told there
    group_by: Literal["length", "modality"] | None = None  # which samples of a step share a micro-batch; null: any
    max_tokens: Positive | None = (
        None  # that a micro-batch holds, about and with padding; long samples share with fewer
    )
    packing: bool = False  # samples of a micro-batch behind one another, in rows of max_length, and not padded
    max_skipped: Share = 0.01  # a larger share of unusable samples stops the run
    num_workers: Annotated[int, Field(ge=0)] = 0  # processes that load and encode samples

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: Any) -> Any:
        """`data.train=[FILE]` stands for one entry with the format guessed; `data.validation=[FILE]` too."""
        if not isinstance(data, dict):
            return data
        lists = [key for key in ("train", "validation") if isinstance(data.get(key), list)]
        return data | {key: [{"path": e} if isinstance(e, str) else e for e in data[key]] for key in lists}

    @field_validator("validation")
    @classmethod
    def _unweighted(cls, value: list[SourceConfig]) -> list[SourceConfig]:
        if any(source.weight != 1 for source in value):
            raise ValueError("'weight' is of training data; of 'validation' every sample counts once, so leave it out")
        return value

    @model_validator(mode="after")
    def _lengths(self) -> DataConfig:
        if self.max_length is None and self.overlong == "truncate":
            raise ValueError("'overlong: truncate' needs 'max_length', the tokens that a sample is shortened to")
        if self.max_length is None and self.packing:
            raise ValueError("'packing' needs 'max_length', the tokens of a row")
        if self.packing and self.group_by == "length":
            raise ValueError("'group_by: length' saves padding, of which 'packing' leaves none; leave one of them out")
        if self.max_tokens is not None and self.max_tokens < (self.max_length or 0):
            raise ValueError(
                f"'max_tokens' {self.max_tokens} has no room for a sample of 'max_length' {self.max_length}"
            )
        return self


class TrainingConfig(Section):
    output: str
    seed: int = 0
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None  # null: as many as the epochs take
    batch_size: Positive = 32  # samples an optimizer step, over all processes
    micro_batch_size: Positive = 8  # samples a process holds at once, or its share of batch_size where that is less
    learning_rate: Rate = 2.0e-4
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.03  # of the steps
    weight_decay: Rate = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    max_grad_norm: Rate = 1.0  # 0: no clipping
    max_bad_steps: Positive = 10  # with a loss of nan, inf or far over a guess's: not taken, and the last ends the run
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # 0.999, say: the adapter is this average over the steps
    gradient_checkpointing: bool = False
    evaluate_every: Positive | None = None  # steps, and after the last; null: no evaluation during training
    best: str | None = None  # `loss` of data.validation, or an `evaluation` entry: the best adapter is kept as best/
    save_every: Positive | None = None  # steps; null: at the end only
    keep: Positive = 2  # checkpoints, the newest; the best one is kept beside them
    on_sigterm: Literal["save", "stop"] = "save"  # after the step: write a checkpoint and stop, or just stop
    deepspeed: str | None = None  # zero2, zero3 … (docs/scaling.md), or a JSON's path; null: without DeepSpeed
    report_to: list[Literal["wandb", "tensorboard"]] = []  # curves, beside those in metrics.jsonl

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _batches(self) -> TrainingConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"'batch_size' {self.batch_size} must be a multiple of 'micro_batch_size' {self.micro_batch_size}"
            )
        return self


class JudgeConfig(Section):
    """Who says what an answer is worth: a model at an OpenAI-compatible address, or verdicts that are there already."""

    url: str | None = None  # what /chat/completions follows: https://api.openai.com/v1; OPENAI_API_KEY holds the key
    model: str | None = None  # at the address
    verdicts: str | None = None  # in place of an address: JSON lines with `id` and `verdict`

    @model_validator(mode="after")
    def _address_or_verdicts(self) -> JudgeConfig:
        if (self.verdicts is None) == (self.url is None) or (self.url is None) != (self.model is None):
            raise ValueError("give either 'url' and 'model', or 'verdicts'")
        if self.url is not None and (not re.match(r"https?://[^/]", self.url) or "@" in self.url):
            raise ValueError("'url' is an http(s) address without a key: that is read from OPENAI_API_KEY")
        return self


class EvaluationConfig(Section):
    """One benchmark to score after training. `benchmark` is a name in BENCHMARKS."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    benchmark: str
    data: str
    format: str | None = None
    media: str | None = None
    where: dict[str, list[str | int | bool]] = {}
    split: str | None = None  # of the benchmark's official splits; None: its first
    prompt: str | None = None  # the words around {question} in place of the benchmark's own
    limit: Positive | None = None
    before: bool = False  # score the base model too, before training
    during: bool = False  # score the model every training.evaluate_every steps too
    batch_size: Positive = 16
    max_new_tokens: Positive | None = None  # None: as many as the benchmark's answers take
    judge: JudgeConfig | None = None  # of benchmarks that are judged (mmvet); null: they have no judged score


class RunConfig(Section):
    model: ModelConfig
    parts: dict[str, PartConfig] = Field(min_length=1)  # what is not named is frozen
    data: DataConfig
    training: TrainingConfig
    evaluation: list[EvaluationConfig] = []
    plugins: list[str] = []  # modules to import first: they register what the config then names

    @model_validator(mode="after")
    def _names_are_known_once(self) -> RunConfig:
        names = [e.name for e in self.evaluation]
        if doubled := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two 'evaluation' entries are named {doubled[0]!r}")
        return self

    @model_validator(mode="after")
    def _evaluation_during_training(self) -> RunConfig:
        every, best = self.training.evaluate_every, self.training.best
        during = [entry.name for entry in self.evaluation if entry.during]
        measured = (["loss"] if self.data.validation else []) + during
        if reserved := {"loss", "seconds"} & set(during):
            raise ValueError(f"an 'evaluation' entry with 'during' is named {reserved.pop()!r}, as a figure of its own")
        if every is None and best is not None:
            raise ValueError(
                "'training.best' needs 'training.evaluate_every', the steps after which models are compared"
            )
        if every is None and measured:
            key = "data.validation" if self.data.validation else "evaluation.*.during"
            raise ValueError(f"{key!r} needs 'training.evaluate_every', the steps after which the model is evaluated")
        if every is not None and not measured:
            raise ValueError(
                "'training.evaluate_every' has nothing to evaluate: give 'data.validation', or an 'evaluation' entry "
                "with 'during: true'"
            )
        if best is not None and best not in measured:
            raise ValueError(
                f"'training.best' {best!r} is not evaluated during training.{nearest(best, measured)} It may be: "
                f"{', '.join(measured)}"
            )
        return self
