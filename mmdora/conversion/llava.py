"""Convert checkpoints written by LLaVA-1.5's own code to the stock LlavaForConditionalGeneration of transformers.

llava_files.py reads the files.
"""

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
PAD_TO_MULTIPLE_OF = 64  # for the vocabulary, as in the published conversions; tensor cores need such sizes
IMAGE = "<image>"
TEMPLATE = "assets/vicuna_v1.jinja"


@dataclass(frozen=True)
class Converted:
    """A converted model that can be saved; the whole checkpoint was checked."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    kind: str  # layout of the checkpoint
    tower: str  # source of the vision encoder's weights


def convert_llava(folder: Path, vision_tower: str, base: Path | None = None) -> Converted:
    """Convert the checkpoint in `folder` to a LlavaForConditionalGeneration with its processor, in its own dtype.

    `vision_tower` is the directory or hub id of the CLIP model that the checkpoint was trained with. If the checkpoint
    contains the tower's weights, these are used. `base` is the model that a projector or a LoRA run was trained on. A
    plain Llama in `folder` gets a new projector, for LLaVA's first stage. Writes no files. Raises UserError with every
    tensor that is missing, unexpected or of the wrong shape.
    """
    config = read_config(folder)
    kind, tensors = read_layout(folder, base)
    text = _text_config(config, folder)
    tower, images = _load_tower(vision_tower, config, folder)
    with torch.device("meta"):
        language_model = LlamaForCausalLM(text)
    if "mm_hidden_size" not in config:  # a plain Llama, before LLaVA's first stage
        config["mm_hidden_size"], kind = tower.config.hidden_size, "language model with a new projector"
        tensors |= _new_projector(config["mm_hidden_size"], text.hidden_size)
    if text.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors.get("model.embed_tokens.weight", torch.empty(0)))
    has_tower = any(name.startswith(TOWER) for name in tensors)
    tokenizer = _load_tokenizer(folder, base, text.vocab_size)
    check_tensors(folder, tensors, _expected_shapes(language_model, config, tower if has_tower else None))

    dtype = tensors["model.embed_tokens.weight"].dtype
    names = language_model.state_dict()
    language_model.load_state_dict({name: tensors[name].to(dtype) for name in names}, assign=True)
    if kind == "LoRA":
        load_adapter(language_model, folder)
        language_model = merge_adapters(language_model)
    if has_tower:
        prefix = _tower_prefix(tower)
        tower.load_state_dict({name: tensors[f"{TOWER}{prefix}{name}"] for name in tower.state_dict()})
    model = _assemble(language_model, tower.to(dtype), tensors, config, tokenizer)
    processor = _make_processor(model.config, images, tokenizer, config)
    return Converted(model, processor, kind, str(folder) if has_tower else vision_tower)


def _text_config(config: Mapping[str, Any], folder: Path) -> LlamaConfig:
    """Return the language model's settings from LLaVA's flat config. Raises UserError."""
    known = set(LlamaConfig().to_dict()) | {"rope_theta", "rope_scaling"}
    of_llava = {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path"}
    try:
        return LlamaConfig(**{k: v for k, v in config.items() if k in known - of_llava})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{folder / 'config.json'}: not a valid Llama config ({error})") from error


def _load_tower(name: str, config: Mapping[str, Any], folder: Path) -> tuple[CLIPVisionModel, Any]:
    """Return the CLIP vision encoder and its image processor. Raises UserError."""
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
        raise UserError(f"--vision-tower: {name!r} is not a CLIP model: {sorted(info['missing_keys'])[0]} is missing")
    if tower.config.hidden_size != config.get("mm_hidden_size", tower.config.hidden_size):
        raise UserError(
            f"--vision-tower: {name!r} has hidden size {tower.config.hidden_size}, but {folder} was trained with "
            f"{config['mm_hidden_size']} ('mm_vision_tower': {config.get('mm_vision_tower')!r})"
        )
    return tower, images


def _tower_prefix(tower: nn.Module) -> str:
    """Return what LLaVA's files have before the tower's names: newer versions of transformers lack that module."""
    return "" if any(name.startswith("vision_model.") for name in tower.state_dict()) else "vision_model."


def _expected_shapes(
    language_model: LlamaForCausalLM, config: Mapping[str, Any], tower: nn.Module | None
) -> dict[str, torch.Size]:
    """Return the shape of every tensor that the checkpoint must contain."""
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
    """Return the tokenizer with `<image>`, and with `<unk>` as the padding token as in LLaVA. Raises UserError."""
    files = ("tokenizer.json", "tokenizer.model")
    source = next((f for f in (folder, base) if f is not None and any((f / file).is_file() for file in files)), None)
    if source is None:
        raise UserError(f"{folder}: no tokenizer.json and no tokenizer.model" + (" in it or in --base" if base else ""))
    try:
        # LLaVA's config.json does not name a Llama, so the config is given.
        tokenizer = AutoTokenizer.from_pretrained(source, config=LlamaConfig())
    except (OSError, ValueError, KeyError, ImportError) as error:
        hint = "; without tokenizer.json it needs the packages sentencepiece and protobuf"
        raise UserError(f"{source}: its tokenizer cannot be loaded ({error}){hint}") from error
    if tokenizer.bos_token is None or tokenizer.eos_token is None:
        raise UserError(f"{source}: its tokenizer has no bos_token or no eos_token")
    if len(tokenizer) > rows:
        raise UserError(f"{source}: its tokenizer has {len(tokenizer)} tokens, but config.json's vocab_size is {rows}")
    tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False))
    if tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        # The template relies on the tokenizer to add <s>, which not all tokenizer files configure.
        tokenizer.add_bos_token = True
        tokenizer.update_post_processor()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _new_projector(inner: int, outer: int) -> Tensors:
    """Return a projector with torch's default initialisation, as in LLaVA, from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {"0": nn.Linear(inner, outer), "2": nn.Linear(outer, outer)}
    return {f"{PROJECTOR}{n}.{k}": t for n, layer in layers.items() for k, t in layer.state_dict().items()}


def _assemble(
    language_model: LlamaForCausalLM,
    tower: CLIPVisionModel,
    tensors: Tensors,
    config: Mapping[str, Any],
    tokenizer: Any,
) -> LlavaForConditionalGeneration:
    """Build one model from the parts; its vocabulary gets a row for `<image>`."""
    text: LlamaConfig = language_model.config
    embedding, head = language_model.model.embed_tokens.weight.data, language_model.lm_head.weight.data
    multiple = PAD_TO_MULTIPLE_OF
    grown = math.ceil(len(tokenizer) / multiple) * multiple if len(tokenizer) > text.vocab_size else text.vocab_size
    new_rows, text.vocab_size = grown - text.vocab_size, grown
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
    state["model.language_model.embed_tokens.weight"] = _append_mean_rows(embedding, new_rows)
    state["lm_head.weight"] = _append_mean_rows(head, new_rows)
    for number, name in PROJECTOR_NAMES.items():
        for kind in ("weight", "bias"):
            tensor = tensors[f"{PROJECTOR}{number}.{kind}"].to(embedding.dtype)
            state[f"model.multi_modal_projector.{name}.{kind}"] = tensor
    model.load_state_dict(state, assign=True)
    model.config.dtype = embedding.dtype
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**ends, pad_token_id=tokenizer.pad_token_id)
    return model.eval()


def _append_mean_rows(weight: Tensor, rows: int) -> Tensor:
    """Append rows that are the mean of the others, so that an unused token is no likelier than an average one."""
    return torch.cat([weight, weight.float().mean(0, keepdim=True).to(weight.dtype).expand(rows, -1)])


def _make_processor(model: LlavaConfig, images: Any, tokenizer: Any, config: Mapping[str, Any]) -> LlavaProcessor:
    """Return a processor that prepares images as LLaVA's code does, with Vicuna's chat template."""
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=model.vision_config.patch_size,
        vision_feature_select_strategy=model.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops
        chat_template=find_path(TEMPLATE).read_text(encoding="utf-8"),
        image_token=IMAGE,
    )
    if config.get("image_aspect_ratio") == "pad":
        pad_to_square(processor, "the checkpoint")
    return processor
