"""Models with their processors: loaded whole, or composed of a vision encoder, a projector and a language model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mmdora.config import ModelConfig, find_path
from mmdora.errors import UserError
from mmdora.quantization import quantize_language_model
from mmdora.vision_encoders import VISION_ENCODERS
from mmdora.vision_encoders.open_clip import OpenCLIPVisionModel
from mmdora.zero import whole_models

log = logging.getLogger(__name__)

# A picture is cut into squares of the tower's size in the grid (rows, columns) that wastes least of it.
GRIDS = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1)]


def load_model(config: ModelConfig) -> tuple[PreTrainedModel, Any]:
    """The model in `config.dtype`, in evaluation mode, with its processor. Raises UserError that says what is wrong."""
    with whole_models():
        if config.path is None:
            model, processor = compose(config)
            model.to(getattr(torch, config.dtype))
        else:
            model, processor = _load_whole(config, config.path)
    if config.chat_template is not None:
        template = find_path(config.chat_template)
        if not template.is_file():
            raise UserError(f"model.chat_template: no such file {config.chat_template!r}")
        processor.chat_template = template.read_text(encoding="utf-8")
    if processor.chat_template is None:
        raise UserError(
            f"{config.path or 'the model'} comes without a chat template; name a Jinja file in model.chat_template"
        )
    model.eval()
    if config.quantization is not None:
        quantize_language_model(model, config.quantization)
    return model, processor


def _load_whole(config: ModelConfig, name: str) -> tuple[PreTrainedModel, Any]:
    path = find_path(name)
    if not path.exists() and (name.startswith(("/", "./", "../", "~")) or name.count("/") != 1):
        raise UserError(f"model.path: no such directory {name!r}")
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
    source = str(path) if path.exists() else name
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
        # What has another shape is named below, where transformers would only say that something has.
        model, found = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=getattr(torch, config.dtype),  # but for what the family keeps in fp32
            attn_implementation=config.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, SafetensorError):
            reason = f"its weights are damaged or cut short ({reason}); fetch them again"
        if "Unrecognized configuration class" in reason:
            reason += " It may be a language model alone: compose one with model.language_model and vision_encoder"
        raise UserError(f"model.path: cannot load {name!r} as an image-text-to-text model: {reason}") from error
    _check_complete(name, found)
    return model, processor


def _check_complete(name: str, found: dict[str, Any]) -> None:
    """transformers gives random weights to whatever a checkpoint lacks, and only warns."""
    wrong = [f"{key} is {list(have)} where the model has {list(want)}" for key, have, want in found["mismatched_keys"]]
    wrong += [f"{key} is missing" for key in sorted(found["missing_keys"])]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"model.path: the weights of {name!r} do not fit its config.json: {wrong[0]}{more}")


def to_plain_transformers(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its OpenCLIP tower, if it has one, as transformers' own CLIP tower: loads without mmdora. In
    place."""
    inner = model.model if hasattr(model, "model") else model
    tower = getattr(inner, "vision_tower", None)
    if isinstance(tower, OpenCLIPVisionModel):
        clip: CLIPVisionModel = tower.to_clip()
        inner.vision_tower = clip
        model.config.vision_config = clip.config
    return model


def save_model(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def compose(config: ModelConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A stock LLaVA-OneVision model (images and videos) around a registered vision encoder and any causal LM, in
    fp32."""
    assert config.vision_encoder is not None
    assert config.language_model is not None
    encoder = config.vision_encoder
    tower = VISION_ENCODERS[encoder.type](encoder.name, encoder.pretrained, encoder.model_config_)
    path = str(find_path(config.language_model.path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    new_tokens = [t for t in ("<image>", "<video>") if t not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": new_tokens})
    language_model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=config.attention
    )
    if new_tokens:
        language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)

    size = tower.config.image_size
    grids = [[rows * size, columns * size] for rows, columns in GRIDS]
    llava = LlavaOnevisionConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy="default",  # without the class token
        image_grid_pinpoints=grids,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    llava._attn_implementation = config.attention
    model = LlavaOnevisionForConditionalGeneration(llava)
    model.model.vision_tower = tower
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    model.generation_config = language_model.generation_config
    return model, _processor(tower.config, tokenizer, grids)


def _processor(
    vision: PreTrainedModel.config_class, tokenizer: PreTrainedTokenizerBase, grids: list[list[int]]
) -> ProcessorMixin:
    size = {"height": vision.image_size, "width": vision.image_size}
    statistics = {
        "image_mean": getattr(vision, "image_mean", None) or OPENAI_CLIP_MEAN,
        "image_std": getattr(vision, "image_std", None) or OPENAI_CLIP_STD,
    }
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids, **statistics),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size, **statistics),
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2 + 1,  # with the class token
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
    )
