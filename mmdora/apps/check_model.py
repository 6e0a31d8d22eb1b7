"""Check before training that the model, its processor and the data fit together.

The model may be on the meta device: nothing is computed. The tokens that the processor writes for an image are compared
with the features that the model makes of it.
"""

from __future__ import annotations

import inspect
import io
from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.func import functional_call

from data_pipelines.dataset import TrainDataset, kinds_in
from data_pipelines.encoding import Encoded, Encoder
from data_pipelines.processor_calls import MediaKind, blank_sample
from data_pipelines.samples import Image, Message, Sample, SampleError, Text, Video
from data_pipelines.sources import IMAGES, VIDEOS
from mmdora.core.config import RunConfig
from mmdora.core.errors import UserError
from mmdora.models.architectures import embeddings_of

Found: TypeAlias = tuple[str, str]  # the setting to change, and what is wrong
SAME_SETTINGS = (
    "make vision_feature_select_strategy, patch_size and the number of image tokens in the processor's config those of "
    "config.json"
)
MAX_DELIMITERS = 2  # tokens that delimit an image or its crops, per token of the image itself
IMAGE_SIZES = ((64, 64), (640, 200), (200, 640))
NAMES = {0: "no image or video", IMAGES: "an image", VIDEOS: "a video", IMAGES | VIDEOS: "an image and a video"}


def check_model(config: RunConfig, model: Any, dataset: TrainDataset) -> None:
    """Raise UserError that names each thing in which the model, its processor and the training data do not fit."""
    if problems := model_problems(config, model, dataset):
        raise UserError("; ".join(f"{setting}: {text}" for setting, text in problems))


def model_problems(config: RunConfig, model: Any, dataset: TrainDataset) -> list[Found]:
    """Return each thing in which the model, its processor and the training data do not fit, with its setting."""
    encoder = dataset.encoder
    problems = tokenizer_problems(model, encoder.processor.tokenizer) + kind_problems(config, dataset)
    for kind in dataset.media_kinds():
        problems += media_problems(model, encoder, kind)
    return problems


def tokenizer_problems(model: Any, tokenizer: Any) -> list[Found]:
    """Check that the embeddings have a row for every token."""
    table = embeddings_of(model, "input")
    if not isinstance(table, nn.Embedding):
        return []
    rows = table.weight.shape[0] + getattr(table, "num_additional_embeddings", 0)  # Idefics has a second table
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest < rows:
        return []
    text = f"the tokenizer has a token {highest} ({token!r}), but the embeddings have only {rows} rows; use the "
    return [("model.path", f"{text}tokenizer of this model, and add tokens with model.new_tokens")]


def kind_problems(config: RunConfig, dataset: TrainDataset) -> list[Found]:
    """Check that the processor accepts each kind of sample in the data: text alone, or with images or videos."""
    problems = []
    for kind, name in NAMES.items():
        count = int(np.count_nonzero(dataset.kinds == kind))
        if count > config.data.max_skipped * len(dataset):
            try:
                dataset.encoder.filler(*kinds_in(np.array([kind])))
            except SampleError as error:
                text = f"{count} of {len(dataset)} samples have {name}, which the model does not accept: {error.reason}"
                problems.append(("data.train", f"{text}; remove these samples"))
    return problems


def media_problems(model: Any, encoder: Encoder, kind: MediaKind) -> list[Found]:
    """Check that the processor writes as many tokens for an image or a video as the model makes features of it."""
    name, medium = ("image", "an image") if kind is Image else ("video", "a video")
    token = _placeholder_id(model.config, name)
    text = _encode(encoder, blank_sample())
    usual = Counter() if text is None else Counter(text["input_ids"].flatten().tolist())
    words = encoder.processor.tokenizer.convert_ids_to_tokens
    for encoded in (_encode(encoder, sample) for sample in _examples(kind)):
        if token is None or encoded is None:
            continue
        written = Counter(encoded["input_ids"].flatten().tolist()) - usual
        if kind is Video and _placeholder_id(model.config, "image") in written:
            continue  # GLM writes frames as images
        other = _media_token(encoder.processor.tokenizer, written)
        if other not in (token, None) and written[other] > MAX_DELIMITERS * written[token]:
            wrong = f"the processor writes {other} ({words(other)!r}) for {medium}, but {name}_token_id in config.json "
            return [("model.path", f"{wrong}is {token} ({words(token)!r}); correct it there")]
        try:
            features = count_features(model, encoded, name)
        except ValueError as error:
            return [
                ("model.path", f"the model rejects what its processor makes of {medium} ({error}); {SAME_SETTINGS}")
            ]
        if features is not None and features != written[token]:
            wrong = f"the processor writes {written[token]} tokens for {medium} of which the model makes {features} "
            return [("model.path", f"{wrong}features; {SAME_SETTINGS}")]
    return []


def _media_token(tokenizer: Any, written: Counter[int]) -> int | None:
    """Return the added token that is most frequent among those written for an image or a video."""
    padding = tokenizer.pad_token_id
    added = [token for token in written if token in tokenizer.added_tokens_decoder and token != padding]
    return max(added, key=lambda token: written[token], default=None)


def _examples(kind: MediaKind) -> list[Sample]:
    """Return prompts with a square, a wide and a tall image, or with a video."""
    if kind is Video:
        return [blank_sample(Video)]
    samples = []
    for size in IMAGE_SIZES:
        file = io.BytesIO()
        PILImage.new("RGB", size).save(file, "PNG")
        parts = (Image(Path("example.png"), file.getvalue()), Text("."))
        samples.append(Sample("an example", (Message("user", parts),), "an example"))
    return samples


def _encode(encoder: Encoder, sample: Sample) -> Encoded | None:
    """Encode a prompt. None if the processor rejects it, which `kind_problems` reports."""
    try:
        return encoder.encode_prompt(sample)
    except SampleError:
        return None


def _placeholder_id(config: Any, name: str) -> int | None:
    ids = (getattr(config, f"{name}_token_{suffix}", None) for suffix in ("id", "index"))
    return next((token for token in ids if isinstance(token, int)), None)


class _Features(nn.Module):
    """A model whose forward pass returns the features of its images or videos."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, **inputs: Any) -> Any:
        return getattr(self.model, self.method)(**inputs)


def count_features(model: Any, encoded: Encoded, name: str) -> int | None:
    """Return the number of features that replace tokens in an encoded sample. None if the model has no such features,
    or if their number depends on values, which the meta device does not have. Raises the model's own ValueError."""
    method = f"get_{name}_features"
    if not hasattr(getattr(model, "model", model), "get_placeholder_mask") or not hasattr(model, method):
        return None
    known = inspect.signature(getattr(model, method)).parameters
    inputs = {k: v.to("meta") if v.is_floating_point() else v for k, v in encoded.items() if k in known}
    module = _Features(model, method)
    # Each module once: `functional_call` would leave the tensors of a module with two names on the meta device.
    weights = {
        f"{path}.{key}": torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # `to` changes quantized weights
        for path, part in module.named_modules()
        for key, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
    }
    try:
        with torch.no_grad():
            return _count(functional_call(module, weights, (), inputs, tie_weights=False))
    except ValueError:
        raise
    except Exception:  # any error of an operation that the meta device does not have
        return None


def _count(features: Any) -> int:
    features = getattr(features, "pooler_output", features)
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    return sum(map(_count, features))
