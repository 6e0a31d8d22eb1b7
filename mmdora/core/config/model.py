"""`model`: which model is fine-tuned, and how it is loaded."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mmdora.core.config.section import NonNegativeFloat, PositiveInt, Section


class VisionEncoderConfig(Section):
    """The vision encoder of a composed model."""

    type: str = Field(description="A name that `mmdora list vision-encoders` prints.")
    name: str = Field(description="`open_clip`: an architecture of OpenCLIP. Other types: a hub id or a directory.")
    pretrained: str | None = Field(
        default=None,
        description="`open_clip`: a pretrained tag or a weights file; null gives random weights. "
        "Other types: a revision on the hub.",
    )
    model_config_: dict[str, Any] | None = Field(
        default=None,
        alias="model_config",
        description="Describes an architecture of your own, with random weights: the contents of an OpenCLIP model "
        "config file, or the fields of the encoder's Hugging Face config.",
    )


class LanguageModelConfig(Section):
    """The language model of a composed model."""

    path: str = Field(description="Hub id or directory of a causal language model, with its tokenizer.")


class ModelConfig(Section):
    """A model that exists (`path`), or one composed of a vision encoder, a projector and a language model."""

    path: str | None = Field(
        default=None, description="Hub id or directory of an image-text-to-text model or a causal language model."
    )
    revision: str = Field(default="main", description="Branch, tag or commit of `path` on the hub.")
    vision_encoder: VisionEncoderConfig | None = Field(
        default=None,
        description="The vision encoder of a composed model; goes with `language_model`, instead of `path`.",
    )
    language_model: LanguageModelConfig | None = Field(
        default=None,
        description="The language model of a composed model; goes with `vision_encoder`, instead of `path`.",
    )
    projector: Literal["linear", "mlp2x_gelu", "resampler"] = Field(
        default="mlp2x_gelu", description="The projector of a composed model ([models](models.md#projectors))."
    )
    num_queries: PositiveInt | None = Field(
        default=None, description="`projector: resampler`: tokens per image and per video frame; null means 64."
    )
    vision_feature_layer: int = Field(
        default=-2, description="Composed models: the hidden state of the vision encoder that the projector reads."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16",
        description="The dtype of the frozen weights; trained ones are in fp32. On a CPU, float16 trains in float32.",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        default=None, description="The attention implementation; null takes the model's default."
    )
    quantization: Literal["4bit", "8bit"] | None = Field(
        default=None, description="Quantizes the frozen linear layers of the language model with bitsandbytes (QDoRA)."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")
    chat_template: str | None = Field(
        default=None,
        description="A Jinja file that replaces the chat template. A language model without one gets "
        "`assets/alpaca.jinja`; any other model without one needs this key.",
    )
    new_tokens: list[str] = Field(
        default=[],
        description="Tokens to add to the vocabulary. Of the embeddings and the head, only their rows are trained.",
    )
    adapter: str | None = Field(
        default=None,
        description="A run or an adapter directory, PEFT's too, from which training continues; `parts` describes the "
        "same adapter.",
    )
    frozen_adapter: str | None = Field(
        default=None,
        description="A run or an adapter directory that stays frozen below the trained one: it is added to the weights "
        "when they are loaded.",
    )
    merge_memory: NonNegativeFloat | None = Field(
        default=None,
        description="While a model generates (evaluation, chat), its adapter is merged into the weights, and the "
        "original weights are kept in host memory. The most that each process may use for them, in GiB; null means "
        "half of its share of the available memory. Beyond it the adapter stays separate, which is slower; 0 never "
        "merges.",
    )
    pad_to_square: bool = Field(
        default=False,
        description="LLaVA-1.5 only: pad images to a square with the mean color, as LLaVA's own code does, "
        "instead of cropping them.",
    )

    @model_validator(mode="after")
    def _whole_or_composed(self) -> ModelConfig:
        composed = self.vision_encoder is not None and self.language_model is not None
        if (self.path is not None) == composed:
            raise ValueError("give either 'path', or both 'vision_encoder' and 'language_model'")
        if self.projector == "resampler" and not composed:
            raise ValueError("'projector: resampler' needs a composed model; remove it, or replace 'path'")
        if self.num_queries is not None and self.projector != "resampler":
            raise ValueError(f"'num_queries' belongs to 'projector: resampler', not to {self.projector!r}; remove it")
        return self
