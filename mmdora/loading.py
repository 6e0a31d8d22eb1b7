"""Models with their processors: loaded whole, or composed of a vision encoder, a projector and a language model."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
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
from mmdora.vision_encoders import VISION_ENCODERS

# A picture is cut into squares of the tower's size in the grid (rows, columns) that wastes least of it.
GRIDS = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1)]


def compose(config: ModelConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A stock LLaVA-OneVision model (images and videos) around a registered vision encoder and any causal LM, in fp32."""
    assert config.vision_encoder is not None
    assert config.language_model is not None
    encoder = config.vision_encoder
    tower = VISION_ENCODERS[encoder.type](encoder.name, encoder.pretrained, encoder.model_config_)
    path = str(find_path(config.language_model.path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    new_tokens = [t for t in ("<image>", "<video>") if t not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": new_tokens})
    language_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
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
