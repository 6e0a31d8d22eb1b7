"""LLaVA with a resampler: every image and every video frame takes a fixed number of tokens.

The model is transformers' LLaVA-1.5 class with another projector and with video input, where a video is a sequence of
images. `import mmdora.models` registers it with the Auto classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    ProcessorMixin,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from mmdora.models.resampler import Resampler


class LlavaResamplerConfig(LlavaConfig):
    """`image_seq_length` is the number of queries, i.e. tokens per image or frame."""

    model_type = "llava_resampler"
    attribute_map = LlavaConfig.attribute_map | {"video_token_id": "video_token_index"}

    video_token_index: int = 32001
    image_seq_length: int = 64
    vision_feature_layer: int = -2


class LlavaResamplerModel(LlavaModel):
    """A vision tower, a resampler and a language model without its head.

    Takes pixel_values [images, 3, size, size] and pixel_values_videos [videos, frames, 3, size, size], both in the
    order of their placeholders in input_ids [batch, tokens].
    """

    config_class = LlavaResamplerConfig
    input_modalities = ("image", "video", "text")

    def __init__(self, config: LlavaResamplerConfig):
        super().__init__(config)
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        self.multi_modal_projector = Resampler(config.image_seq_length, *widths)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            init.normal_(module.queries, std=getattr(self.config.text_config, "initializer_range", 0.02))

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode videos. `pooler_output` lists the tokens of each video [frames · queries, width], frame by frame."""
        output = self.get_image_features(pixel_values_videos.flatten(0, 1), **kwargs)
        frames = torch.stack(tuple(output.pooler_output))
        output.pooler_output = list(frames.unflatten(0, pixel_values_videos.shape[:2]).flatten(1, 2))
        return output

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """Return the hidden states of the language model.

        `mm_encoder_outputs` holds precomputed outputs of `get_image_features` ("image") and `get_video_features`
        ("video") in place of pixels; `generate` computes them once. Raises ValueError if the number of placeholders
        does not match the number of media tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = dict(mm_encoder_outputs or {})
        if pixel_values is not None:
            features["image"] = self.get_image_features(pixel_values, return_dict=True)
        if pixel_values_videos is not None:
            features["video"] = self.get_video_features(pixel_values_videos, return_dict=True)
        for kind, token in (("image", self.config.image_token_id), ("video", self.config.video_token_id)):
            if features.get(kind) is not None:
                inputs_embeds = _fill_placeholders(inputs_embeds, input_ids, token, features[kind].pooler_output)
        outputs = self.language_model(inputs_embeds=inputs_embeds, **kwargs)
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _fill_placeholders(embeds: Tensor, input_ids: Tensor | None, placeholder: int, features: list[Tensor]) -> Tensor:
    """Replace the placeholder embeddings by the features [tokens, width] of each image or video."""
    if input_ids is None:
        raise ValueError("images and videos need input_ids, which hold their placeholders")
    tokens = torch.cat(list(features)).to(embeds)
    mask = input_ids == placeholder
    if mask.sum() != len(tokens):
        raise ValueError(
            f"input_ids hold {int(mask.sum())} placeholders (token {placeholder}) for {len(tokens)} media tokens"
        )
    return embeds.masked_scatter(mask[..., None], tokens)


class LlavaResamplerForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaResamplerModel` with the output head of its language model."""

    config_class = LlavaResamplerConfig
    input_modalities = ("image", "video", "text")

    def __init__(self, config: LlavaResamplerConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)  # skips building an unused LlavaModel
        self.model = LlavaResamplerModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Return the logits, and the loss if `labels` are given.

        `logits_to_keep` is the number of last positions to compute logits for (0: all), or their indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LlavaResamplerProcessor(ProcessorMixin):
    """Write `num_image_tokens` placeholders for each image and for each frame of a video."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        video_processor: Any = None,
        num_image_tokens: int = 64,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        **kwargs: Any,
    ):
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.video_token = video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.num_image_tokens

    def replace_video_token(self, video_inputs: Any, video_idx: int, **kwargs: Any) -> str:
        return self.video_token * (self.num_image_tokens * len(video_inputs["pixel_values_videos"][video_idx]))


AutoConfig.register(LlavaResamplerConfig.model_type, LlavaResamplerConfig)
AutoModel.register(LlavaResamplerConfig, LlavaResamplerModel)
AutoModelForImageTextToText.register(LlavaResamplerConfig, LlavaResamplerForConditionalGeneration)
AutoProcessor.register(LlavaResamplerConfig, LlavaResamplerProcessor)
