"""Build the processor of a composed model around the language model's tokenizer."""

from __future__ import annotations

from transformers import (
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipImageProcessor,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mmdora.core.config import ModelConfig
from mmdora.core.errors import UserError
from mmdora.models.llava_resampler import LlavaResamplerProcessor

# Grids (rows, columns) of squares of the tower's image size. The processor takes the one that wastes the fewest pixels.
GRIDS = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1)]
NUM_QUERIES = 64  # default of `model.num_queries`


def image_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the placeholder of an image: the tokenizer's own, or `<image>`."""
    return getattr(tokenizer, "image_token", None) or "<image>"


def video_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the placeholder of a video: the tokenizer's own, or `<video>`."""
    return getattr(tokenizer, "video_token", None) or "<video>"


def make_processor(
    vision: PreTrainedModel.config_class, tokenizer: PreTrainedTokenizerBase, strategy: str, config: ModelConfig
) -> ProcessorMixin:
    """Return the processor for a vision config; `strategy` is its `vision_feature_select_strategy`."""
    side = vision.image_size
    size = {"height": side, "width": side}
    statistics = {
        "image_mean": getattr(vision, "image_mean", None) or OPENAI_CLIP_MEAN,
        "image_std": getattr(vision, "image_std", None) or OPENAI_CLIP_STD,
    }
    common = {
        "tokenizer": tokenizer,
        "video_processor": LlavaOnevisionVideoProcessor(size=size, **statistics),
        "chat_template": tokenizer.chat_template,
        "image_token": image_token(tokenizer),
        "video_token": video_token(tokenizer),
    }
    if config.projector == "resampler":
        images = SiglipImageProcessor(size=size, **statistics)  # the whole image as one square, as for a frame
        return LlavaResamplerProcessor(images, num_image_tokens=config.num_queries or NUM_QUERIES, **common)
    grids = [[rows * side, columns * side] for rows, columns in GRIDS]
    patches = (side // vision.patch_size) ** 2
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids, **statistics),
        num_image_tokens=patches + 1 if strategy == "default" else patches,  # tokens that the tower returns
        vision_feature_select_strategy=strategy,
        **common,
    )


def check_chat_template(processor: ProcessorMixin) -> None:
    """Raise UserError if the chat template does not write the placeholders of images and videos: many are text-only."""
    for kind, token in (("image", processor.image_token), ("video", processor.video_token)):
        message = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "What is it?"}]}
        try:
            text, reason = processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True), ""
        except Exception as error:  # a template may raise any exception, in Jinja or in Python
            text, reason = "", f" ({type(error).__name__}: {error})"
        if text.count(token) != 1 or "What is it?" not in text:
            raise UserError(
                f"the language model's chat template does not write {token} for {kind} content{reason}; name a Jinja "
                "file that does in model.chat_template"
            )
