"""Load a model and its processor: an existing model, or one composed of parts (composing.py). Save it again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from mmdora.core.config import ModelConfig
from mmdora.core.config_files import find_path
from mmdora.core.deepspeed import load_unpartitioned
from mmdora.core.errors import UserError
from mmdora.models.composed_processor import check_chat_template
from mmdora.models.composing import compose
from mmdora.models.language_models import TextProcessor, auto_class, check_decoder, is_language_model
from mmdora.models.llava_resampler import LlavaResamplerForConditionalGeneration
from mmdora.models.loading_errors import LOADING_ERRORS, check_complete, why
from mmdora.models.model_card import write_model_card
from mmdora.models.new_tokens import add_tokens
from mmdora.models.preprocessing import pad_to_square
from mmdora.models.projectors import keep_linear
from mmdora.models.quantization import quantize_language_model
from mmdora.models.vision_encoders.open_clip import OpenCLIPVisionModel
from mmdora.models.vision_encoders.open_clip_convnext import OpenCLIPConvNextModel
from mmdora.models.vision_encoders.open_clip_timm import OpenCLIPTimmModel

log = logging.getLogger(__name__)

FAILED_MERGE = "MERGE_FAILED.txt"  # marks the directory of a merged model that is not the adapted model


def load_model(
    config: ModelConfig, change: Callable[[PreTrainedModel], None] = lambda model: None
) -> tuple[PreTrainedModel, Any]:
    """Return the model in `config.dtype` and in evaluation mode, and its processor.

    `change` is called with the model before its weights are quantized. Raises UserError.
    """
    with load_unpartitioned():
        if config.path is None:
            model, processor = compose(config)
            model.to(getattr(torch, config.dtype))
        else:
            model_config = _load_config(config)
            processor, model = _load_processor(config, model_config), _load_weights(config, model_config)
        if config.new_tokens:
            add_tokens(model, processor, config.new_tokens)
    _prepare(processor, config)
    model.eval()
    change(model)
    if config.quantization is not None:
        quantize_language_model(model, config.quantization)
    return model, processor


def load_shape(config: ModelConfig) -> tuple[PreTrainedModel, Any]:
    """Return the model on the meta device (shapes without data), and its processor.

    Reads no weights, except for a composed model. Raises UserError.
    """
    if config.path is None:
        model, processor = load_model(config)
        return model.to("meta"), processor
    model_config = _load_config(config)
    processor = _load_processor(config, model_config)
    try:
        with torch.device("meta"):
            model = auto_class(model_config).from_config(
                model_config,
                dtype=getattr(torch, config.dtype),
                # FlashAttention may not be installed here. It needs as much memory as PyTorch's fused attention.
                attn_implementation=None if config.attention == "flash_attention_2" else config.attention,
                trust_remote_code=config.trust_remote_code,
            )
    except LOADING_ERRORS as error:
        raise _cannot_load(config, error, model_config) from error
    keep_linear(model)
    if config.new_tokens:
        add_tokens(model, processor, config.new_tokens)
    _prepare(processor, config)
    return model, processor


def _prepare(processor: Any, config: ModelConfig) -> None:
    """Apply the chat template and the preprocessing of the config to a processor, in place."""
    if config.chat_template is not None:
        template = find_path(config.chat_template)
        if not template.is_file():
            raise UserError(f"model.chat_template: no such file {config.chat_template!r}")
        try:
            processor.chat_template = template.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"model.chat_template: {template} is not UTF-8 ({error})") from error
    if isinstance(processor.chat_template, str):  # a byte order mark would begin every prompt
        processor.chat_template = processor.chat_template.removeprefix("\ufeff")
    if processor.chat_template is None and isinstance(processor, TextProcessor):
        processor.use_plain_template(str(config.path))
    if processor.chat_template is None:
        raise UserError(f"{config.path or 'the model'} has no chat template; name a Jinja file in model.chat_template")
    if config.path is None:
        check_chat_template(processor)
    if config.pad_to_square:
        pad_to_square(processor, config.path or "a composed model")


def load_saved_processor(model: PreTrainedModel, folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the processor of a model as a run or a merged model has saved it."""
    kind = TextProcessor if is_language_model(model.config) else AutoProcessor
    return kind.from_pretrained(str(folder), trust_remote_code=trust_remote_code)


def _load_config(config: ModelConfig) -> Any:
    """Return the config of the model in `config.path`. Raises UserError."""
    try:
        model_config = AutoConfig.from_pretrained(**_source(config))
    except LOADING_ERRORS as error:
        raise _cannot_load(config, error) from error
    if is_language_model(model_config):
        check_decoder(model_config, str(config.path))
    return model_config


def _load_processor(config: ModelConfig, model_config: Any) -> Any:
    kind = TextProcessor if is_language_model(model_config) else AutoProcessor
    try:
        return kind.from_pretrained(**_source(config))
    except UserError as error:
        raise UserError(f"model.path: {error}") from error
    except LOADING_ERRORS as error:
        raise _cannot_load(config, error, model_config) from error


def _load_weights(config: ModelConfig, model_config: Any) -> PreTrainedModel:
    try:
        model, info = auto_class(model_config).from_pretrained(
            **_source(config),
            dtype=getattr(torch, config.dtype),  # except for modules that the family keeps in fp32
            attn_implementation=config.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_complete names them; transformers would not
        )
    except LOADING_ERRORS as error:
        raise _cannot_load(config, error, model_config) from error
    check_complete("model.path", str(config.path), info)
    keep_linear(model)
    return model


def _source(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments of `from_pretrained`. Raises UserError for a path that is no directory and no hub id."""
    name = str(config.path)
    path = find_path(name)
    if not path.exists() and (name.startswith(("/", "./", "../", "~")) or name.count("/") != 1):
        raise UserError(f"model.path: no such directory {name!r}")
    if (path / FAILED_MERGE).is_file():
        raise UserError(f"model.path: {name} is a merge that failed; {path / FAILED_MERGE} says why")
    return {
        "pretrained_model_name_or_path": str(path) if path.exists() else name,
        "trust_remote_code": config.trust_remote_code,
        "revision": config.revision,
    }


def _cannot_load(config: ModelConfig, error: BaseException, model_config: Any = None) -> UserError:
    reason = why(error, str(config.path), config.revision)
    kind = "an image-text-to-text model or a causal language model"
    if "Unrecognized configuration class" in reason:
        reason = f"a model of type {model_config.model_type!r} is neither"
    elif model_config is not None:
        kind = "a causal language model" if is_language_model(model_config) else "an image-text-to-text model"
    return UserError(f"model.path: cannot load {config.path!r} as {kind}: {reason}")


def to_plain_transformers(model: PreTrainedModel) -> PreTrainedModel:
    """Convert an OpenCLIP tower to transformers' CLIP or SigLIP tower, so that the model loads without mmdora.

    In place. A tower without an equivalent in transformers is kept, with a warning; see `needs_mmdora`.
    """
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
        log.warning("%s; the saved model loads only after `import mmdora.models`", error)
    model.config.vision_config = inner.vision_tower.config
    return model


def needs_mmdora(model: PreTrainedModel) -> bool:
    """Return whether the Auto classes can load the saved model only after `import mmdora.models`."""
    tower = getattr(getattr(model, "model", model), "vision_tower", None)
    classes = (LlavaResamplerForConditionalGeneration, OpenCLIPVisionModel, OpenCLIPTimmModel, OpenCLIPConvNextModel)
    return isinstance(model, classes) or isinstance(tower, classes)


def save_model(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Save a model and its processor; a composed model, or one that needs mmdora, with a README.md (`save_card`)."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if needs_mmdora(model) or getattr(model.config, "composed_of", None):
        save_card(model, folder)


def save_card(model: PreTrainedModel, folder: Path) -> None:
    """Write the README.md of a saved model, unless there is one: how to load it and what it was made from."""
    write_model_card(model, folder, needs_mmdora(model))
