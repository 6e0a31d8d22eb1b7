"""Old module paths stay importable for one release: `import mmdora.loading` warns and forwards to the new module.

Delete this file, and its lines in `mmdora/__init__.py`, in the release after 0.2.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

# Old path -> the modules that now hold its names.
MOVED: dict[str, tuple[str, ...]] = {
    "mmdora.adapters.base": ("mmdora.adapters.methods.base", "mmdora.adapters.spec"),
    "mmdora.adapters.convolution": ("mmdora.adapters.layers.convolution",),
    "mmdora.adapters.dora": ("mmdora.adapters.methods.dora",),
    "mmdora.adapters.dvora": ("mmdora.adapters.methods.dvora",),
    "mmdora.adapters.embedding": ("mmdora.adapters.layers.embedding",),
    "mmdora.adapters.experts": ("mmdora.adapters.layers.experts",),
    "mmdora.adapters.functional": ("mmdora.adapters.ops.functional", "mmdora.adapters.ops.autograd"),
    "mmdora.adapters.kernels": ("mmdora.adapters.ops.triton_kernels",),
    "mmdora.adapters.layer": ("mmdora.adapters.layers.base",),
    "mmdora.adapters.linear": ("mmdora.adapters.layers.linear",),
    "mmdora.adapters.linear_function": ("mmdora.adapters.ops.autograd",),
    "mmdora.adapters.lora": ("mmdora.adapters.methods.lora",),
    "mmdora.adapters.magnitude": ("mmdora.adapters.methods.magnitude",),
    "mmdora.adapters.norms": ("mmdora.adapters.ops.norm_cache",),
    "mmdora.adapters.quantized": ("mmdora.adapters.layers.quantized",),
    "mmdora.adapters.siblings": ("mmdora.adapters.layers.shared_input",),
    "mmdora.adapters.whole": ("mmdora.adapters.methods.full",),
    "mmdora.adapters.wrapping": ("mmdora.adapters.layers.wrapping",),
    "mmdora.architectures": ("mmdora.models.architectures",),
    "mmdora.atomic": ("mmdora.core.atomic",),
    "mmdora.attention": ("mmdora.models.attention",),
    "mmdora.blocks": ("mmdora.models.blocks",),
    "mmdora.checkpoint": ("mmdora.adapters.save_load",),
    "mmdora.commands": ("mmdora.cli",),
    "mmdora.commands.__main__": ("mmdora.cli.__main__",),
    "mmdora.commands.analyze": ("mmdora.cli.analyze",),
    "mmdora.commands.chat": ("mmdora.apps.chat",),
    "mmdora.commands.compare": ("eval.compare_results",),
    "mmdora.commands.console": ("mmdora.core.console", "mmdora.apps.tables", "mmdora.core.registry"),
    "mmdora.commands.convert": ("mmdora.cli.convert",),
    "mmdora.commands.doctor": ("mmdora.apps.doctor",),
    "mmdora.commands.eval": ("mmdora.apps.evaluate", "mmdora.apps.evaluation_request"),
    "mmdora.commands.evaluating": ("mmdora.apps.during_training",),
    "mmdora.commands.leaderboard": ("mmdora.cli.leaderboard",),
    "mmdora.commands.list_names": ("mmdora.cli.list_names",),
    "mmdora.commands.logs": ("mmdora.core.logs",),
    "mmdora.commands.merge": ("mmdora.apps.merge",),
    "mmdora.commands.plan": ("mmdora.planning.planner",),
    "mmdora.commands.score": ("eval.predictions",),
    "mmdora.commands.submit": ("eval.submission",),
    "mmdora.commands.train": ("mmdora.apps.train", "mmdora.apps.check_config"),
    "mmdora.composed_processor": ("mmdora.models.composed_processor",),
    "mmdora.composing": ("mmdora.models.composing",),
    "mmdora.config": ("mmdora.core.config",),
    "mmdora.config_files": ("mmdora.core.config_files",),
    "mmdora.errors": ("mmdora.core.errors",),
    "mmdora.injection": ("mmdora.adapters.injection",),
    "mmdora.llava_checkpoints": ("mmdora.conversion.llava",),
    "mmdora.llava_layout": ("mmdora.conversion.llava_files",),
    "mmdora.llava_resampler": ("mmdora.models.llava_resampler",),
    "mmdora.loading": ("mmdora.models.loading",),
    "mmdora.loading_errors": ("mmdora.models.loading_errors",),
    "mmdora.merging": ("mmdora.adapters.merging",),
    "mmdora.peft_format": ("mmdora.adapters.peft_format", "mmdora.models.new_tokens"),
    "mmdora.planning.engines": ("mmdora.planning.engine_memory",),
    "mmdora.planning.meter": ("mmdora.planning.activations",),
    "mmdora.preprocessing": ("mmdora.models.preprocessing",),
    "mmdora.projectors": ("mmdora.models.projectors",),
    "mmdora.quantization": ("mmdora.models.quantization",),
    "mmdora.ranks": ("mmdora.core.distributed",),
    "mmdora.registry": ("mmdora.core.registry",),
    "mmdora.resampler": ("mmdora.models.resampler",),
    "mmdora.rundir": ("mmdora.core.run_directory", "mmdora.core.resuming", "mmdora.apps.load_target"),
    "mmdora.tokens": ("mmdora.models.new_tokens", "mmdora.adapters.token_rows"),
    "mmdora.training.average": ("mmdora.training.ema",),
    "mmdora.training.meter": ("mmdora.training.metrics",),
    "mmdora.training.workers": ("mmdora.training.loader_workers",),
    "mmdora.vision_encoders": ("mmdora.models.vision_encoders",),
    "mmdora.vision_encoders.clip": ("mmdora.models.vision_encoders.clip",),
    "mmdora.vision_encoders.dinov2": ("mmdora.models.vision_encoders.dinov2",),
    "mmdora.vision_encoders.hub_towers": ("mmdora.models.vision_encoders.hub_towers",),
    "mmdora.vision_encoders.open_clip": ("mmdora.models.vision_encoders.open_clip",),
    "mmdora.vision_encoders.open_clip_convnext": ("mmdora.models.vision_encoders.open_clip_convnext",),
    "mmdora.vision_encoders.open_clip_timm": ("mmdora.models.vision_encoders.open_clip_timm",),
    "mmdora.vision_encoders.open_clip_weights": ("mmdora.models.vision_encoders.open_clip_weights",),
    "mmdora.vision_encoders.registry": ("mmdora.models.vision_encoders.registry",),
    "mmdora.vision_encoders.siglip": ("mmdora.models.vision_encoders.siglip",),
    "mmdora.zero": ("mmdora.core.deepspeed",),
}


class MovedFinder(MetaPathFinder, Loader):
    """Finds the old paths only. It comes last on `sys.meta_path`, so every other finder is asked first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MOVED:
            return None
        is_package = any(other.startswith(f"{fullname}.") for other in MOVED)
        return ModuleSpec(fullname, self, origin=__file__, is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old, modules = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} moved to {' and '.join(modules)}", DeprecationWarning, stacklevel=2)
        module.__dict__["__getattr__"] = partial(_forward, old, modules)

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of `python -m mmdora.commands`."""
        return compile("from mmdora.cli import main\n\nmain()\n", fullname, "exec")


def _forward(old: str, modules: tuple[str, ...], name: str) -> Any:
    for new in modules:
        if not name.startswith("__") and hasattr(module := importlib.import_module(new), name):
            return getattr(module, name)
    raise AttributeError(f"module {old!r} has no attribute {name!r}; its names moved to {' and '.join(modules)}")


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
