"""mmdora: tune vision-language models with DoRA. For your own training loop, any `nn.Module` will do:

    report = mmdora.inject_adapters(model, {"language": {"method": "dora", "rank": 16}})
    mmdora.save_adapter(model, "out")

Names load on first use, so that `import mmdora` and the command line stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdora.checkpoint import load_adapter, merge_adapters, save_adapter
    from mmdora.injection import InjectionReport, disable_adapters, inject_adapters, set_adapter

__version__ = "0.1.0"

_HOMES = {
    "inject_adapters": "mmdora.injection",
    "InjectionReport": "mmdora.injection",
    "set_adapter": "mmdora.injection",
    "save_adapter": "mmdora.checkpoint",
    "load_adapter": "mmdora.checkpoint",
    "merge_adapters": "mmdora.checkpoint",
    "disable_adapters": "mmdora.injection",
}

__all__ = [
    "InjectionReport",
    "disable_adapters",
    "inject_adapters",
    "load_adapter",
    "merge_adapters",
    "save_adapter",
    "set_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmdora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
