"""Models with their processors: loaded whole, or composed (mmdora/models/composing.py)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from mmdora.core.config import ModelConfig
from mmdora.core.config_files import find_path
from mmdora.core.deepspeed import load_unpartitioned
from mmdora.core.errors import UserError
from mmdora.models.composed_processor import check_chat_template
from mmdora.models.composing import compose
from mmdora.models.llava_resampler import LlavaResamplerForConditionalGeneration
from mmdora.models.loading_errors import LOADING_ERRORS, check_complete, why
from mmdora.models.new_tokens import add_tokens, extend_tokenizer
from mmdora.models.preprocessing import pad_to_square
from mmdora.models.projectors import keep_linear
from mmdora.models.quantization import quantize_language_model
from mmdora.models.vision_encoders.open_clip import OpenCLIPVisionModel
from mmdora.models.vision_encoders.open_clip_convnext import OpenCLIPConvNextModel
from mmdora.models.vision_encoders.open_clip_timm import OpenCLIPTimmModel

log = logging.getLogger(__name__)


def load_model(config: ModelConfig) -> tuple[PreTrainedModel, Any]:
    """The model in `config.dtype`, in evaluation mode, with its processor. Raises UserError that says what is wrong."""
    with load_unpartitioned():
        if config.path is None:
            model, processor = compose(config)
            model.to(getattr(torch, config.dtype))
        else:
            processor, model = _read_processor(config), _load_whole(config)
        if config.new_tokens:
            add_tokens(model, processor, config.new_tokens)
    _prepare(processor, config)
    model.eval()
    if config.quantization is not None:
        quantize_language_model(model, config.quantization)
    return model, processor


def load_processor(config: ModelConfig) -> Any:
    """The processor alone, as `load_model` gives it; of a whole model no weights are read. Raises UserError."""
    if config.path is None:
        return load_model(config)[1]
    processor = _read_processor(config)
    if config.new_tokens:
        extend_tokenizer(processor.tokenizer, config.new_tokens)
    _prepare(processor, config)
    return processor


def load_shape(config: ModelConfig) -> tuple[PreTrainedModel, Any]:
    """The model on the meta device, where it has shapes and no numbers, with its processor. Of a whole model no weights
    are read. Raises UserError."""
    if config.path is None:
        model, processor = load_model(config)
        return model.to("meta"), processor
    processor = _read_processor(config)
    try:
        source = _source(config)
        about = AutoConfig.from_pretrained(**source)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                about,
                dtype=getattr(torch, config.dtype),
                # Flash-attention keeps what PyTorch's own fused attention does, and may not be installed here.
                attn_implementation=None if config.attention == "flash_attention_2" else config.attention,
                trust_remote_code=config.trust_remote_code,
            )
    except LOADING_ERRORS as error:
        raise _cannot_load(config, error) from error
    keep_linear(model)
    if config.new_tokens:
        add_tokens(model, processor, config.new_tokens)
    _prepare(processor, config)
    return model, processor


def _prepare(processor: Any, config: ModelConfig) -> None:
    """The template and the preprocessing that the config asks for."""
    if config.chat_template is not None:
        template = find_path(config.chat_template)
        if not template.is_file():
            raise UserError(f"model.chat_template: no such file {config.chat_template!r}")
        processor.chat_template = template.read_text(encoding="utf-8")
    if processor.chat_template is None:
        raise UserError(
            f"{config.path or 'the model'} comes without a chat template; name a Jinja file in model.chat_template"
        )
    if config.path is None:
        check_chat_template(processor)
    if config.pad_to_square:
        pad_to_square(processor, config.path or "a composed model")


def _read_processor(config: ModelConfig) -> Any:
    try:
        return AutoProcessor.from_pretrained(**_source(config))
    except LOADING_ERRORS as error:
        raise _cannot_load(config, error) from error


def _load_whole(config: ModelConfig) -> PreTrainedModel:
    try:
        # What has another shape is named below, where transformers would only say that something has.
        model, found = AutoModelForImageTextToText.from_pretrained(
            **_source(config),
            dtype=getattr(torch, config.dtype),  # but for what the family keeps in fp32
            attn_implementation=config.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except LOADING_ERRORS as error:
        raise _cannot_load(config, error) from error
    check_complete("model.path", str(config.path), found)
    keep_linear(model)
    return model


def _source(config: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` wants to know. Raises UserError for what is no directory and can be no hub id."""
    name = str(config.path)
    path = find_path(name)
    if not path.exists() and (name.startswith(("/", "./", "../", "~")) or name.count("/") != 1):
        raise UserError(f"model.path: no such directory {name!r}")
    return {
        "pretrained_model_name_or_path": str(path) if path.exists() else name,
        "trust_remote_code": config.trust_remote_code,
        "revision": config.revision,
    }


def _cannot_load(config: ModelConfig, error: BaseException) -> UserError:
    reason = why(error, str(config.path), config.revision)
    if "Unrecognized configuration class" in reason:
        reason += " It may be a language model alone: compose one with model.language_model and vision_encoder"
    return UserError(f"model.path: cannot load {config.path!r} as an image-text-to-text model: {reason}")


def to_plain_transformers(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its OpenCLIP tower, if it has one, as transformers' own CLIP or SigLIP tower: loads without
    mmdora. In place. A tower that has no equal there stays, with a warning; `needs_mmdora` then says so."""
    inner = model.model if hasattr(model, "model") else model
    tower = getattr(inner, "vision_tower", None)
    try:
        if isinstance(tower, OpenCLIPVisionModel):
            inner.vision_tower = tower.to_clip()
        elif isinstance(tower, OpenCLIPTimmModel):
            inner.vision_tower = tower.to_siglip()
        else:
            return model
    except UserError as error:
        log.warning("%s; the model loads after `import mmdora`", error)
    model.config.vision_config = inner.vision_tower.config
    return model


def needs_mmdora(model: PreTrainedModel) -> bool:
    """Whether the Auto classes can load the saved model only after `import mmdora`."""
    tower = getattr(getattr(model, "model", model), "vision_tower", None)
    own = (LlavaResamplerForConditionalGeneration, OpenCLIPVisionModel, OpenCLIPTimmModel, OpenCLIPConvNextModel)
    return isinstance(model, own) or isinstance(tower, own)


def save_model(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
