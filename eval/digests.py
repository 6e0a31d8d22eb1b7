"""Digests of everything that an answer depends on: media files, model weights and preprocessing.

torch is imported inside the function that needs it, because predictions are scored without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.samples import Image, Video

if TYPE_CHECKING:
    from torch import Tensor, nn


def json_digest(value: Any, sort_keys: bool = False) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of a value written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=sort_keys).encode()).hexdigest()[:32]


def media_digest(part: Image | Video) -> str:
    """Return the SHA-256 of an image's or video's content."""
    return file_digest(part.path) if part.data is None else hashlib.sha256(part.data).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the files in a directory (a video stored as images).

    Digests are cached by size and modification time, so an unchanged file is read once. A path that does not exist
    gives "missing".
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        lines = [f"{file.name} {file_digest(file)}" for file in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if not path.is_file():
        return "missing"
    status = path.stat()
    return _content_digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(1 << 17)
def _content_digest(path: Path, size: int, mtime: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def processor_digest(processor: Any) -> str:
    """Return a digest of a processor: preprocessing settings, chat template and tokenizer."""
    tokenizer = processor.tokenizer
    fast = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        json.dumps(processor.to_dict(), sort_keys=True, default=str),
        json.dumps([processor.chat_template, tokenizer.special_tokens_map], sort_keys=True, default=str),
        json.dumps(sorted(tokenizer.get_vocab().items())) if fast is None else fast.to_str(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Return a digest of all weights of a model, adapters included."""
    return tensors_digest(model.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors and their names, dtypes and shapes."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        contents = list(pool.map(lambda name: _tensor_digest(tensors[name]), names))
    digest = hashlib.sha256()
    for name, content in zip(names, contents, strict=True):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)} {content}\n".encode())
    return digest.hexdigest()[:32]


def _tensor_digest(tensor: Tensor) -> str:
    import torch

    content = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    return hashlib.sha256(content.data).hexdigest()
