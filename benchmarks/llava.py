"""A LLaVA-1.5 processor and images for it, built without a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from mmdora.core.config_files import find_path

QUESTION, ANSWER = "What is on the table beside the window?", "A blue vase with yellow tulips."


def make_processor(pixels: int = 336) -> LlavaProcessor:
    """Return a processor with patches of 14 × 14 pixels and the small vocabulary of the shipped base model."""
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}),
        AutoTokenizer.from_pretrained(find_path("assets/tiny-llava")),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=find_path("assets/vicuna_v1.jinja").read_text(encoding="utf-8"),
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def write_images(folder: Path, count: int = 16) -> list[Path]:
    """Write JPEGs of 640 × 480 pixels and return their paths."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
    return paths
