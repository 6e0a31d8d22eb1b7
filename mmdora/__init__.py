"""mmdora: fine-tune vision-language models with DoRA.

The functions below work on any `nn.Module`, in your own training loop too:

    report = mmdora.inject_adapters(model, {"language": {"method": "dora", "rank": 16}})
    mmdora.save_adapter(model, "out")

Names load on first use: `import mmdora` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmdora import _moved

if TYPE_CHECKING:
    from mmdora.adapters.injection import (
        InjectionReport,
        adapters_by_row,
        disable_adapters,
        inject_adapters,
        set_adapter,
    )
    from mmdora.adapters.merging import LoRAExport, combine_adapters, export_lora, merge_adapters, unmerge_adapters
    from mmdora.adapters.save_load import load_adapter, save_adapter, swap_adapter
    from mmdora.adapters.temporary_merge import merged_weights
    from mmdora.models.new_tokens import add_tokens

__version__ = "0.1.0"

_MODULES = {
    "InjectionReport": "mmdora.adapters.injection",
    "LoRAExport": "mmdora.adapters.merging",
    "add_tokens": "mmdora.models.new_tokens",
    "adapters_by_row": "mmdora.adapters.injection",
    "combine_adapters": "mmdora.adapters.merging",
    "disable_adapters": "mmdora.adapters.injection",
    "export_lora": "mmdora.adapters.merging",
    "inject_adapters": "mmdora.adapters.injection",
    "load_adapter": "mmdora.adapters.save_load",
    "merge_adapters": "mmdora.adapters.merging",
    "merged_weights": "mmdora.adapters.temporary_merge",
    "save_adapter": "mmdora.adapters.save_load",
    "set_adapter": "mmdora.adapters.injection",
    "swap_adapter": "mmdora.adapters.save_load",
    "unmerge_adapters": "mmdora.adapters.merging",
}

__all__ = [
    "InjectionReport",
    "LoRAExport",
    "adapters_by_row",
    "add_tokens",
    "combine_adapters",
    "disable_adapters",
    "export_lora",
    "inject_adapters",
    "load_adapter",
    "merge_adapters",
    "merged_weights",
    "save_adapter",
    "set_adapter",
    "swap_adapter",
    "unmerge_adapters",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


_moved.install()
