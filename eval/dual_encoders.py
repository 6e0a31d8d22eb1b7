"""Models that embed texts and images in one space: CLIP, SigLIP and similar models of transformers, and OpenCLIP."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from data_pipelines.images import unambiguous
from eval.digests import processor_digest, weights_digest
from mmdora.core.config_files import find_path
from mmdora.core.distributed import to_local_device
from mmdora.core.errors import UserError
from mmdora.models.loading_errors import LOADING_ERRORS, check_complete, why

OPEN_CLIP = "open_clip:"  # open_clip:ViT-B-32/openai: an architecture, and a tag or a file of weights


@dataclass(frozen=True)
class DualEncoder:
    """A model that embeds texts and images.

    `texts` and `images` return features [texts or images, width] to compare by cosine similarity. `weights` and
    `preprocessing` are digests of everything that the features depend on.
    """

    texts: Callable[[Sequence[str]], Tensor]
    images: Callable[[Sequence[PILImage.Image]], Tensor]
    weights: str
    preprocessing: str


def load_dual_encoder(target: str, trust_remote_code: bool = False) -> DualEncoder:
    """Load a model with text and image features.

    `target` is a hub id, a directory (of transformers, of OpenCLIP, or of an adapter on one of them) or
    `open_clip:ARCHITECTURE/WEIGHTS`. Raises UserError.
    """
    from mmdora.adapters.save_load import load_adapter

    folder = find_path(target)
    adapter_config, base = folder / "adapter_config.json", target
    if adapter_config.is_file():
        base = str(json.loads(adapter_config.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
        if not base:
            raise UserError(f"{target}: adapter_config.json has no base_model_name_or_path")
    has_config, has_open_clip_config = (
        (find_path(base) / name).is_file() for name in ("config.json", "open_clip_config.json")
    )  # LAION's directories have both
    is_open_clip = base.startswith(OPEN_CLIP) or (has_open_clip_config and not has_config)
    try:
        model, build = _open_clip(base) if is_open_clip else _transformers(base, trust_remote_code)
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise UserError(f"cannot load {base!r} as a model with text and image features: {why(error, base)}") from error
    if adapter_config.is_file():
        load_adapter(model, folder)
    return build(to_local_device(model).eval())


def _transformers(name: str, trust_remote_code: bool) -> tuple[nn.Module, Callable[[nn.Module], DualEncoder]]:
    from transformers import AutoModel, AutoProcessor

    path = find_path(name)
    source = {"pretrained_model_name_or_path": str(path) if path.exists() else name}
    model, loading_info = AutoModel.from_pretrained(
        **source,
        trust_remote_code=trust_remote_code,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
        raise UserError(f"{name}: a {type(model).__name__} has no text and image features to compare")
    check_complete("the model", name, loading_info)
    processor = AutoProcessor.from_pretrained(**source, trust_remote_code=trust_remote_code)

    def build(model: Any) -> DualEncoder:
        # SigLIP was trained on texts padded to the maximum length.
        padding = "max_length" if model.config.model_type.startswith("siglip") else True
        length = model.config.text_config.max_position_embeddings

        def embed_texts(texts: Sequence[str]) -> Tensor:
            tokens = processor(
                text=list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt"
            )
            inputs = {k: v.to(model.device) for k, v in tokens.items() if k in ("input_ids", "attention_mask")}
            return _pooled(model.get_text_features(**inputs))

        def embed_images(images: Sequence[PILImage.Image]) -> Tensor:
            pixels = processor(images=[unambiguous(image) for image in images], return_tensors="pt")
            return _pooled(model.get_image_features(**pixels.to(model.device)))

        return DualEncoder(embed_texts, embed_images, weights_digest(model), processor_digest(processor))

    return model, build


def _pooled(output: Any) -> Tensor:
    """Return the features, which some releases of transformers wrap in an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _open_clip(name: str) -> tuple[nn.Module, Callable[[nn.Module], DualEncoder]]:
    import open_clip

    if name.startswith(OPEN_CLIP):
        architecture, _, weights = name.removeprefix(OPEN_CLIP).partition("/")
        model, preprocess = open_clip.create_model_from_pretrained(architecture, pretrained=weights or None)
    else:
        architecture = f"local-dir:{find_path(name)}"
        model, preprocess = open_clip.create_model_from_pretrained(architecture)
    tokenizer = open_clip.get_tokenizer(architecture)

    def build(model: Any) -> DualEncoder:
        device = next(model.parameters()).device

        def embed_texts(texts: Sequence[str]) -> Tensor:
            return model.encode_text(tokenizer(list(texts)).to(device))

        def embed_images(images: Sequence[PILImage.Image]) -> Tensor:
            return model.encode_image(torch.stack([preprocess(image) for image in images]).to(device))

        return DualEncoder(embed_texts, embed_images, weights_digest(model), f"{preprocess} {type(tokenizer).__name__}")

    return model, build
