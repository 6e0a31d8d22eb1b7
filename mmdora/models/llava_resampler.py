"""LLaVA with a resampler: a model of pictures, clips and text whose pictures and frames cost a fixed number of tokens.

LLaVA-1.5's class with another projector, and with clips, whose frames are pictures in a row. The Auto classes know it
after `import mmdora`.
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
    """`image_seq_length` is the number of queries: the tokens of a picture or a frame."""

    model_type = "llava_resampler"
    attribute_map = LlavaConfig.attribute_map | {"video_token_id": "video_token_index"}

    video_token_index: int = 32001
    image_seq_length: int = 64
    vision_feature_layer: int = -2


class LlavaResamplerModel(LlavaModel):
    """pixel_values [pictures, 3, size, size] and pixel_values_videos [clips, frames, 3, size, size], in the order of
    their placeholders in input_ids [batch, tokens]."""

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
        """`pooler_output` holds the tokens of each clip [frames · queries, width]: its frames', one after the other."""
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
        """`mm_encoder_outputs` is what the features' methods answered, in place of pixels: `generate` asks them once.
        Raises ValueError where placeholders and media differ in number."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        seen = dict(mm_encoder_outputs or {})
        if pixel_values is not None:
            seen["image"] = self.get_image_features(pixel_values, return_dict=True)
        if pixel_values_videos is not None:
            seen["video"] = self.get_video_features(pixel_values_videos, return_dict=True)
        for kind, token in (("image", self.config.image_token_id), ("video", self.config.video_token_id)):
            if seen.get(kind) is not None:
                inputs_embeds = _place(inputs_embeds, input_ids, token, seen[kind].pooler_output)
        outputs = self.language_model(inputs_embeds=inputs_embeds, **kwargs)
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _place(embeds: Tensor, input_ids: Tensor | None, token: int, features: list[Tensor]) -> Tensor:
    """The features [tokens, width] of each picture or clip where their placeholders stand."""
    if input_ids is None:
        raise ValueError("pictures and clips need input_ids: their placeholders are found there")
    tokens = torch.cat(list(features)).to(embeds)
    mask = input_ids == token
    if mask.sum() != len(tokens):
        raise ValueError(f"the text has {int(mask.sum())} placeholders {token} for {len(tokens)} tokens of media")
    return embeds.masked_scatter(mask[..., None], tokens)


class LlavaResamplerForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaResamplerModel` with the head of its language model."""

    config_class = LlavaResamplerConfig
    input_modalities = ("image", "video", "text")

    def __init__(self, config: LlavaResamplerConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)  # past LlavaModel, which would be built in vain
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
        """`logits_to_keep` is a number of last tokens (0: all), or their places."""
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
    """Writes `num_image_tokens` placeholders for a picture, and so many for every frame of a clip."""

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
