"""Compose a model from a vision encoder, a projector and a causal language model.

The result is a stock LLaVA-OneVision model of transformers, or, with a resampler, mmdora's own class
(llava_resampler.py). A LLaVA class does not fit every part: both parts are run once, and a part whose output the class
would change or misread is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from mmdora.core.config import ModelConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError
from mmdora.models.composed_processor import image_token, make_processor, video_token
from mmdora.models.llava_resampler import LlavaResamplerConfig, LlavaResamplerForConditionalGeneration
from mmdora.models.loading_errors import LOADING_ERRORS, check_complete, why
from mmdora.models.model_card import describe_parts, public_name
from mmdora.models.projectors import IDENTITY, make_linear
from mmdora.models.resampler import Resampler
from mmdora.models.vision_encoders import VISION_ENCODERS

SEED = 0  # for all new weights, so that the same config gives the same model and a saved adapter fits it again


def compose(config: ModelConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a LLaVA model for images and videos in fp32, and its processor.

    It is a stock LLaVA-OneVision model, or with a resampler mmdora's own class. Raises UserError for a part that the
    class cannot hold.
    """
    assert config.vision_encoder is not None
    assert config.language_model is not None
    encoder = config.vision_encoder
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        tower = VISION_ENCODERS[encoder.type](encoder.name, encoder.pretrained, encoder.model_config_).eval()
        strategy = feature_select_strategy(tower, config.vision_feature_layer, f"{encoder.type}, {encoder.name}")
        language_model, tokenizer = load_language_model(config.language_model.path, config.trust_remote_code)
        # Run it before it joins the LLaVA config, which changes the attention settings of its config.
        probe = _LogitsProbe(language_model)
        processor = make_processor(tower.config, tokenizer, strategy, config)
        settings = {
            "vision_config": tower.config,
            "text_config": language_model.config,
            "image_token_index": processor.image_token_id,
            "video_token_index": processor.video_token_id,
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": strategy,
            "tie_word_embeddings": language_model.config.tie_word_embeddings,
        }
        if config.projector == "resampler":
            llava = LlavaResamplerConfig(**settings, image_seq_length=processor.num_image_tokens)
        else:
            act = IDENTITY if config.projector == "linear" else "gelu"
            grids = processor.image_processor.image_grid_pinpoints
            llava = LlavaOnevisionConfig(**settings, image_grid_pinpoints=grids, projector_hidden_act=act)
        model = assemble(llava, tower, language_model, config.language_model.path)
        probe.check(model, config.language_model.path)
        model.config.composed_of = describe_parts(config)
        for part in (tower, language_model):  # transformers would save local paths in config.json
            part.config.name_or_path = public_name(part.config.name_or_path)
        if config.projector == "linear":
            make_linear(model.model.multi_modal_projector)
    if config.attention is not None:
        try:
            model.set_attn_implementation(config.attention)
        except (ValueError, ImportError) as error:
            raise UserError(f"model.attention: {str(error).strip().splitlines()[0]}") from error
    return model, processor


def feature_select_strategy(tower: PreTrainedModel, layer: int, name: str) -> str:
    """Return `default` if the tower's hidden states begin with a class token, `full` if they are patches only.

    It is determined by running the tower on a blank image. Raises UserError if the hidden states are not the patches
    of a single square.
    """
    config = tower.config
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        raise UserError(
            f"model.vision_encoder ({name}): LLaVA classes need square images and patches, but the tower has "
            f"image_size {size} and patch_size {patch}"
        )
    with torch.no_grad():
        states = tower(torch.zeros(1, 3, size, size), output_hidden_states=True).hidden_states
    depth = len(states)
    if not -depth <= layer < depth:
        raise UserError(f"model.vision_feature_layer: {name} has hidden states {-depth} to {depth - 1}, not {layer}")
    patches, tokens = (size // patch) ** 2, states[layer].shape[1] if states[layer].dim() == 3 else -1
    if tokens not in (patches, patches + 1):
        shape = list(states[layer].shape)
        raise UserError(
            f"model.vision_encoder ({name}): hidden state {layer} has shape {shape}, but LLaVA classes need "
            f"{patches} patches ({size} px in squares of {patch} px), with or without one class token"
        )
    return "full" if tokens == patches else "default"


def load_language_model(name: str, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM in fp32 and its tokenizer, and add the tokens that a composed model needs.

    These are the placeholders of images and videos and a padding token. Raises UserError for a model that cannot be
    loaded, an encoder-decoder, and a tokenizer without an end token.
    """
    path = find_path(name)
    source = str(path) if path.exists() else name
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    key = f"model.language_model.path ({name})"
    try:
        if getattr(AutoConfig.from_pretrained(source, **options), "is_encoder_decoder", False):
            raise UserError(
                f"{key} is an encoder-decoder: a LLaVA class feeds images and text to a decoder as one sequence and "
                "cannot run an encoder; use a decoder-only model"
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except UserError:
        raise
    except LOADING_ERRORS as error:
        reason = why(error, name)
        if "Unrecognized configuration class" in reason:
            reason += " If it is a vision-language model, name it in model.path instead"
        raise UserError(f"{key}: cannot load it as a causal language model: {reason}") from error
    check_complete("model.language_model.path", name, info)
    if tokenizer.eos_token is None:
        raise UserError(f"{key}: its tokenizer has no eos_token, so answers could not end; set one in its files")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token  # padding is always masked
    placeholders = [image_token(tokenizer), video_token(tokenizer)]
    new = [t for t in placeholders if t not in tokenizer.get_vocab()]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    generation = model.generation_config
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def assemble(
    llava: PreTrainedConfig, tower: PreTrainedModel, language_model: PreTrainedModel, name: str
) -> PreTrainedModel:
    """Put the parts into a LLaVA class with a new projector. Raises UserError if the class cannot hold them."""
    body, head = language_model.base_model, language_model.get_output_embeddings()
    _check_language_model(body, head, llava, name)
    if llava.tie_word_embeddings and not hasattr(body, "embed_tokens"):
        # The stock class ties weights by the path `embed_tokens`. OPT has none, so its head becomes a separate matrix.
        head = nn.Linear(head.in_features, head.out_features, bias=False)
        head.weight = nn.Parameter(language_model.get_input_embeddings().weight.detach().clone())
        llava.tie_word_embeddings = llava.text_config.tie_word_embeddings = False
        body.config.tie_word_embeddings = False
    with torch.device("meta"):  # avoids a second copy of tower and language model
        resampler = isinstance(llava, LlavaResamplerConfig)
        model = (LlavaResamplerForConditionalGeneration if resampler else LlavaOnevisionForConditionalGeneration)(llava)
    if type(model.model.language_model) is not type(body):
        raise UserError(
            f"model.language_model.path ({name}): transformers reloads its config as "
            f"{type(model.model.language_model).__name__}, not {type(body).__name__}; use another language model"
        )
    model.model.vision_tower = tower
    model.model.language_model = body
    model.lm_head = head
    model.model.multi_modal_projector = _new_projector(model.model.multi_modal_projector, llava)
    if not resampler:  # the stock class puts it behind each row of patches
        width = llava.text_config.hidden_size
        model.model.image_newline = nn.Parameter(torch.randn(width) / width**0.5)
    model.generation_config = language_model.generation_config
    return model.eval()


class _LogitsProbe:
    """Compare a language model's logits for a few tokens with its logits inside the LLaVA class."""

    def __init__(self, language_model: PreTrainedModel):
        self.input_ids = torch.arange(4)[None]
        with torch.no_grad():
            self.logits = language_model(input_ids=self.input_ids).logits

    def check(self, model: PreTrainedModel, name: str) -> None:
        try:
            with torch.no_grad():
                difference = (model(input_ids=self.input_ids).logits - self.logits).abs().max().item()
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"model.language_model.path ({name}): the LLaVA class cannot run it ({error}); use a transformer"
            ) from error
        if not difference <= 1e-4 * max(1.0, self.logits.abs().max().item()):
            raise UserError(
                f"model.language_model.path ({name}): the LLaVA class does not apply this family's scaling or capping "
                f"of logits (they differ by {difference:.2g}); use another language model"
            )


def _check_language_model(body: PreTrainedModel, head: Any, llava: PreTrainedConfig, name: str) -> None:
    width = llava.text_config.hidden_size
    embedded = body.get_input_embeddings().embedding_dim
    if getattr(llava.text_config, "final_logit_softcapping", None) is not None:
        raise UserError(
            f"model.language_model.path ({name}): the LLaVA class does not cap logits, but this model's config.json "
            "has final_logit_softcapping; set it to null there to train without the cap (greedy answers do not depend "
            "on it), or use another language model"
        )
    if embedded != width:
        raise UserError(
            f"model.language_model.path ({name}): its embeddings have width {embedded} and its layers {width}, but a "
            "LLaVA class needs them equal; use another language model"
        )
    if not isinstance(head, nn.Linear) or head.bias is not None or head.in_features != width:
        raise UserError(
            f"model.language_model.path ({name}): a LLaVA class needs a head that is one linear layer without bias "
            f"over {width} features, but this model has {head}; use another language model"
        )


def _new_projector(shape: Any, llava: PreTrainedConfig) -> nn.Module:
    """Return a randomly initialised projector in fp32; `shape` is one on the meta device."""
    projector = shape.to_empty(device="cpu").float()
    std = getattr(llava.text_config, "initializer_range", 0.02)
    if isinstance(projector, Resampler):
        projector.init_weights(std)
        return projector
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return projector
