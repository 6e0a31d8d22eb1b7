"""Digests of what an answer depends on: media, weights, and how a conversation becomes tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.samples import Image, Video


def media_digest(part: Image | Video) -> str:
    return file_digest(part.path) if part.data is None else hashlib.sha256(part.data).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of the files of a directory, as of a video that is one of pictures. A file that did not
    change since is not read again."""
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if file.is_file())
        named = [f"{file.name} {file_digest(file)}" for file in inside]
        return hashlib.sha256("\n".join(named).encode()).hexdigest()
    if not path.is_file():
        return "missing"
    about = path.stat()
    return _content_digest(path, about.st_size, about.st_mtime_ns)


@lru_cache(1 << 17)
def _content_digest(path: Path, size: int, mtime: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def processor_digest(processor: Any) -> str:
    """Of all that makes tensors of a conversation: settings of the preprocessing, template and tokenizer."""
    tokenizer = processor.tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        json.dumps(processor.to_dict(), sort_keys=True, default=str),
        json.dumps([processor.chat_template, tokenizer.special_tokens_map], sort_keys=True, default=str),
        json.dumps(sorted(tokenizer.get_vocab().items())) if fast is None else fast.to_str(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """A digest of every weight that the model computes with, adapters included."""
    return tensors_digest(model.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of tensors and their names."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        found = list(pool.map(lambda name: _tensor_digest(tensors[name]), names))
    digest = hashlib.sha256()
    for name, content in zip(names, found, strict=True):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)} {content}\n".encode())
    return digest.hexdigest()[:32]


def _tensor_digest(tensor: Tensor) -> str:
    content = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    return hashlib.sha256(content.data).hexdigest()
