"""Autocast in layers that call autograd functions of their own: cast the input as a plain layer does, once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def cast_input(x: Tensor) -> Tensor:
    """Return x in autocast's dtype if autocast is on. Like torch's own layers, it leaves float64 as it is."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if enabled and x.dtype != torch.float64 else x


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Turn autocast off. The meta device, on which `mmdora plan` runs a model, has none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
