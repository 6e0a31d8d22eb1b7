"""Tiny checkpoints in the layout of LLaVA's own code, and the logits that a converted model must give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

from mmdora.cli import main

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?'1234567890"
VOCABULARY = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS]
ROWS = len(VOCABULARY)
SIDE, PATCH, WIDTH = 8, 4, 16  # four patches per image


class Parts:
    """The modules of a checkpoint, and their logits computed by hand."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        vision = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        )
        self.text = LlamaConfig(
            vocab_size=ROWS,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
        )
        self.tower = CLIPVisionModel(vision).eval()
        self.language = LlamaForCausalLM(self.text).eval()
        self.projector = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, 24))
        for p in [*self.tower.parameters(), *self.language.parameters(), *self.projector.parameters()]:
            nn.init.normal_(p, std=0.3)  # large enough that any error changes the logits

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, image: int, pixels: torch.Tensor, language: nn.Module | None = None):
        """Put the projected layer −2, without the class token, in place of the placeholders. `ids` is one row."""
        language = language or self.language
        features = self.tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        embedded = F.embedding(ids.where(ids != image, 0), language.get_input_embeddings().weight)
        embedded[0, ids[0] == image] = self.projector(features)
        return language(inputs_embeds=embedded).logits

    def config(self, **changes) -> dict:
        llama = {k: v for k, v in self.text.to_dict().items() if k not in ("rope_parameters", "model_type")}
        return llama | {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava",
            "rope_scaling": None,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "mm_hidden_size": WIDTH,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
            "tune_mm_mlp_adapter": False,
            "use_mm_proj": True,
            **changes,
        }

    def projector_tensors(self, prefix: str = "model.mm_projector.") -> dict[str, torch.Tensor]:
        return {f"{prefix}{name}": tensor.clone() for name, tensor in self.projector.state_dict().items()}

    def whole(self) -> dict[str, torch.Tensor]:
        old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        return {k: v.clone() for k, v in self.language.state_dict().items()} | self.projector_tensors() | old


def write_checkpoint(folder: Path, parts: Parts, tensors: dict[str, torch.Tensor], **config) -> Path:
    """Write a whole checkpoint in two .bin shards, with its tokenizer."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(parts.config(**config)))
    LlamaTokenizer(vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[]).save_pretrained(folder)
    return folder


def write_base(folder: Path, parts: Parts) -> Path:
    """Write the language model alone, as Vicuna is published."""
    parts.language.save_pretrained(folder)
    LlamaTokenizer(vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[]).save_pretrained(folder)
    return folder


def write_tower(folder: Path, parts: Parts) -> Path:
    """Write the vision encoder alone, with its image processor."""
    parts.tower.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder)
    return folder


def run(*arguments: object, code: int = 0) -> None:
    """Run a command of `mmdora` and check its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == code
