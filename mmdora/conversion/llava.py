"""LLaVA's own checkpoints, what LLaVA-1.5's code wrote, as plain Hugging Face models for all that reads the stock
LlavaForConditionalGeneration. `llava_layout.py` reads the files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mmdora.adapters.merging import merge_adapters
from mmdora.adapters.save_load import load_adapter
from mmdora.conversion.llava_files import FEATURES, Tensors, check_tensors, read_config, read_layout
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError
from mmdora.models.loading_errors import LOADING_ERRORS, why
from mmdora.models.preprocessing import pad_to_square

TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."
PROJECTOR_NAMES = {"0": "linear_1", "2": "linear_2"}  # of mlp2x_gelu; 1 is the GELU
ROWS = 64  # the vocabulary is filled up to a multiple of it, as in the published conversions: tensor cores want that
IMAGE = "<image>"
TEMPLATE = "assets/vicuna_v1.jinja"


@dataclass(frozen=True)
class Converted:
    """A model that is ready to be saved: all of the checkpoint was checked."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    kind: str  # which of the layouts it was
    tower: str  # where the vision encoder's weights are from


def convert_llava(folder: Path, vision_tower: str, base: Path | None = None) -> Converted:
    """The checkpoint in `folder` as a LlavaForConditionalGeneration with its processor, in the checkpoint's dtype.

    `vision_tower` is the directory or hub id of the CLIP model that it was trained with; where the checkpoint has the
    tower's weights too, they count. `base` holds the rest of a projector or of a LoRA run. A plain Llama in `folder`
    gets a new projector, for LLaVA's first stage. Writes nothing. Raises UserError that names every missing, unexpected
    or misshapen tensor.
    """
    config = read_config(folder)
    kind, found = read_layout(folder, base)
    text = _text_config(config, folder)
    tower, images = _load_tower(vision_tower, config, folder)
    with torch.device("meta"):
        language_model = LlamaForCausalLM(text)
    if "mm_hidden_size" not in config:  # a Llama: stage 1 has yet to come
        config["mm_hidden_size"], kind = tower.config.hidden_size, "language model with a new projector"
        found |= _new_projector(config["mm_hidden_size"], text.hidden_size)
    if text.tie_word_embeddings:
        found.setdefault("lm_head.weight", found.get("model.embed_tokens.weight", torch.empty(0)))
    tuned_tower = any(name.startswith(TOWER) for name in found)
    tokenizer = _load_tokenizer(folder, base, text.vocab_size)
    check_tensors(folder, found, _expected(language_model, config, tower if tuned_tower else None))

    dtype = found["model.embed_tokens.weight"].dtype
    names = language_model.state_dict()
    language_model.load_state_dict({name: found[name].to(dtype) for name in names}, assign=True)
    if kind == "LoRA":
        load_adapter(language_model, folder)
        language_model = merge_adapters(language_model)
    if tuned_tower:
        prefix = _tower_prefix(tower)
        tower.load_state_dict({name: found[f"{TOWER}{prefix}{name}"] for name in tower.state_dict()})
    model = _assemble(language_model, tower.to(dtype), found, config, tokenizer)
    processor = _processor(model.config, images, tokenizer, config)
    return Converted(model, processor, kind, str(folder) if tuned_tower else vision_tower)


def _text_config(config: Mapping[str, Any], folder: Path) -> LlamaConfig:
    """The language model's part of LLaVA's config, in which all keys stand side by side."""
    known = set(LlamaConfig().to_dict()) | {"rope_theta", "rope_scaling"}
    foreign = {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path"}
    try:
        return LlamaConfig(**{k: v for k, v in config.items() if k in known - foreign})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{folder / 'config.json'}: not the settings of a Llama ({error})") from error


def _load_tower(name: str, config: Mapping[str, Any], folder: Path) -> tuple[CLIPVisionModel, Any]:
    """The CLIP vision encoder and its image processor. Raises UserError."""
    path = find_path(name)
    source = str(path) if path.exists() else name
    if not path.exists() and (name.startswith(("/", "./", "../", "~")) or name.count("/") != 1):
        raise UserError(f"--vision-tower: no such directory {name!r}")
    try:
        tower, info = CLIPVisionModel.from_pretrained(source, output_loading_info=True, dtype="auto")
        images = AutoImageProcessor.from_pretrained(source)
    except LOADING_ERRORS as error:
        raise UserError(f"--vision-tower: cannot load {name!r} as a CLIP model: {why(error, name)}") from error
    if info["missing_keys"]:
        raise UserError(f"--vision-tower: {name!r} is no CLIP model: {sorted(info['missing_keys'])[0]} is missing")
    if tower.config.hidden_size != config.get("mm_hidden_size", tower.config.hidden_size):
        raise UserError(
            f"--vision-tower: {name!r} has hidden size {tower.config.hidden_size}, and {folder} was trained with "
            f"{config['mm_hidden_size']} ('mm_vision_tower': {config.get('mm_vision_tower')!r})"
        )
    return tower, images


def _tower_prefix(tower: nn.Module) -> str:
    """What LLaVA's files have before the tower's names: newer versions of transformers lack the inner module."""
    return "" if any(name.startswith("vision_model.") for name in tower.state_dict()) else "vision_model."


def _expected(
    language_model: LlamaForCausalLM, config: Mapping[str, Any], tower: nn.Module | None
) -> dict[str, torch.Size]:
    """The shape of every tensor that the checkpoint must hold."""
    expected = {name: tensor.shape for name, tensor in language_model.state_dict().items()}
    inner, outer = int(config["mm_hidden_size"]), int(language_model.config.hidden_size)
    for number, width in (("0", inner), ("2", outer)):
        expected[f"{PROJECTOR}{number}.weight"] = torch.Size((outer, width))
        expected[f"{PROJECTOR}{number}.bias"] = torch.Size((outer,))
    if tower is not None:
        prefix = _tower_prefix(tower)
        expected |= {f"{TOWER}{prefix}{name}": tensor.shape for name, tensor in tower.state_dict().items()}
    return expected


def _load_tokenizer(folder: Path, base: Path | None, rows: int) -> Any:
    """The tokenizer with `<image>`, and `<unk>` for padding, as LLaVA pads."""
    files = ("tokenizer.json", "tokenizer.model")
    source = next((f for f in (folder, base) if f is not None and any((f / file).is_file() for file in files)), None)
    if source is None:
        raise UserError(f"{folder}: no tokenizer.json and no tokenizer.model" + (" in it or in --base" if base else ""))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, config=LlamaConfig())  # its own config is no Llama's by name
    except (OSError, ValueError, KeyError, ImportError) as error:
        hint = "; a tokenizer.model alone needs the packages sentencepiece and protobuf"
        raise UserError(f"{source}: its tokenizer cannot be loaded ({error}){hint}") from error
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        raise UserError(f"{source}: its tokenizer has no token that begins or none that ends a sequence")
    if len(tokenizer) > rows:
        raise UserError(f"{source}: its tokenizer has {len(tokenizer)} tokens, and config.json's vocab_size is {rows}")
    tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False))
    if tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        # The template leaves <s> to the tokenizer, and not all files say that it is wanted.
        tokenizer.add_bos_token = True
        tokenizer.update_post_processor()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _new_projector(inner: int, outer: int) -> Tensors:
    """As torch starts linear layers, which is how LLaVA starts it; from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {"0": nn.Linear(inner, outer), "2": nn.Linear(outer, outer)}
    return {f"{PROJECTOR}{n}.{k}": t for n, layer in layers.items() for k, t in layer.state_dict().items()}


def _assemble(
    language_model: LlamaForCausalLM, tower: CLIPVisionModel, found: Tensors, config: Mapping[str, Any], tokenizer: Any
) -> LlavaForConditionalGeneration:
    """The parts as one model, whose vocabulary has a row for `<image>`."""
    text: LlamaConfig = language_model.config
    embedding, head = language_model.model.embed_tokens.weight.data, language_model.lm_head.weight.data
    missing = 0 if len(tokenizer) <= text.vocab_size else math.ceil(len(tokenizer) / ROWS) * ROWS - text.vocab_size
    text.vocab_size += missing
    size, patch = tower.config.image_size, tower.config.patch_size
    llava = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(size // patch) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=FEATURES[config.get("mm_vision_select_feature") or "patch"],
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava)
    model.model.vision_tower = tower
    state = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    for name, tensor in language_model.model.state_dict().items():
        state[f"model.language_model.{name}"] = tensor
    state["model.language_model.embed_tokens.weight"] = _filled(embedding, missing)
    state["lm_head.weight"] = _filled(head, missing)
    for number, name in PROJECTOR_NAMES.items():
        for kind in ("weight", "bias"):
            tensor = found[f"{PROJECTOR}{number}.{kind}"].to(embedding.dtype)
            state[f"model.multi_modal_projector.{name}.{kind}"] = tensor
    model.load_state_dict(state, assign=True)
    model.config.dtype = embedding.dtype
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**ends, pad_token_id=tokenizer.pad_token_id)
    return model.eval()


def _filled(weight: Tensor, rows: int) -> Tensor:
    """With more rows at its end, at the mean: an unused token is then no likelier than an average one."""
    return torch.cat([weight, weight.float().mean(0, keepdim=True).to(weight.dtype).expand(rows, -1)])


def _processor(model: LlavaConfig, images: Any, tokenizer: Any, config: Mapping[str, Any]) -> LlavaProcessor:
    """Pictures as LLaVA's code prepares them, and Vicuna's conversation."""
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=model.vision_config.patch_size,
        vision_feature_select_strategy=model.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token, which "default" then takes off
        chat_template=find_path(TEMPLATE).read_text(encoding="utf-8"),
        image_token=IMAGE,
    )
    if config.get("image_aspect_ratio") == "pad":
        pad_to_square(processor, "the checkpoint")
    return processor
