"""Canaries: each private name of a library that mmdora uses still exists.

After an upgrade a failure here names the library, the name, and the file of mmdora that uses it. pyproject.toml bounds
the versions of these libraries from above; raise a bound only when this file passes with the new version.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

DISTRIBUTIONS = {"open_clip": "open_clip_torch"}  # if it differs from the module's name


@dataclass(frozen=True)
class Name:
    """`where` is "module:attribute.path", or the path of a source file that assigns the name to an object."""

    library: str
    where: str
    used_by: str

    @property
    def word(self) -> str:
        return re.split(r"[:.]", self.where)[-1]

    def exists(self) -> bool:
        if self.where.startswith("/"):
            path, _, word = self.where[1:].partition(":")
            defined = rf"\.{word}\s*(:[^=\n]+)?=[^=]|^ +{word}: |def {word}\(|\[.{word}.\] ="
            return re.search(defined, source(self.library, path), re.MULTILINE) is not None
        module, _, path = self.where.partition(":")
        value: Any = importlib.import_module(module)
        for attribute in path.split("."):
            if not hasattr(value, attribute):
                return False
            value = getattr(value, attribute)
        return True


@cache
def source(library: str, path: str) -> str:
    """The text of a library's file, without importing the library; empty if there is no such file."""
    spec = importlib.util.find_spec(library)
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / path
    return file.read_text(encoding="utf-8") if file.is_file() else ""


ZERO_PARAMETERS = "mmdora/core/deepspeed/parameters.py"
ZERO_OPTIMIZERS = "mmdora/core/deepspeed/optimizer_state.py"
TRAINER = "mmdora/training/trainer.py"
# DeepSpeed names few things with an underscore: these are attributes that its documentation does not mention.
DEEPSPEED = [
    ("ops/__init__.py:__compatible_ops__", "mmdora/core/deepspeed/config.py"),
    ("runtime/zero/partition_parameters.py:ds_id", ZERO_PARAMETERS),
    ("runtime/zero/partition_parameters.py:ds_numel", ZERO_PARAMETERS),
    ("runtime/zero/partition_parameters.py:ds_shape", ZERO_PARAMETERS),
    ("runtime/zero/partition_parameters.py:ds_tensor", ZERO_PARAMETERS),
    ("runtime/zero/partition_parameters.py:ds_process_group", ZERO_PARAMETERS),
    ("runtime/zero/stage3.py:_z3_optimizer", ZERO_PARAMETERS),
    ("utils/mixed_precision_linkage.py:_hp_mapping", ZERO_PARAMETERS),
    ("runtime/engine.py:empty_partition_cache", ZERO_PARAMETERS),
    ("runtime/engine.py:zero_optimization_stage", ZERO_OPTIMIZERS),
    ("runtime/zero/stage3.py:fp16_groups", ZERO_OPTIMIZERS),
    ("runtime/zero/stage3.py:fp32_partitioned_groups_flat", ZERO_OPTIMIZERS),
    ("runtime/zero/stage3.py:swap_optimizer", ZERO_OPTIMIZERS),
    ("runtime/zero/stage3.py:loss_scaler", ZERO_OPTIMIZERS),
    ("runtime/zero/stage_1_and_2.py:bit16_groups", ZERO_OPTIMIZERS),
    ("runtime/zero/stage_1_and_2.py:single_partition_of_fp32_groups", ZERO_OPTIMIZERS),
    ("runtime/zero/stage_1_and_2.py:_hp_optimizer_states_linked", ZERO_OPTIMIZERS),
    ("runtime/zero/stage_1_and_2.py:_lazy_init_hp_params_optimizer_state", ZERO_OPTIMIZERS),
    ("runtime/bf16_optimizer.py:bf16_groups", ZERO_OPTIMIZERS),
    ("runtime/bf16_optimizer.py:fp32_groups_flat_partition", ZERO_OPTIMIZERS),
    ("runtime/bf16_optimizer.py:_hp_optimizer_states_linked", ZERO_OPTIMIZERS),
    ("runtime/bf16_optimizer.py:_lazy_init_hp_params_optimizer_state", ZERO_OPTIMIZERS),
    ("runtime/fp16/unfused_optimizer.py:fp16_groups", ZERO_OPTIMIZERS),
    ("runtime/fp16/unfused_optimizer.py:fp32_groups", ZERO_OPTIMIZERS),
    ("runtime/fp16/unfused_optimizer.py:loss_scale_config", ZERO_OPTIMIZERS),
    ("runtime/fp16/loss_scaler.py:cur_scale", ZERO_OPTIMIZERS),
    ("runtime/fp16/loss_scaler.py:cur_iter", ZERO_OPTIMIZERS),
    ("runtime/fp16/loss_scaler.py:last_overflow_iter", ZERO_OPTIMIZERS),
    ("runtime/fp16/loss_scaler.py:cur_hysteresis", ZERO_OPTIMIZERS),
]
NAMES = [
    *(Name("deepspeed", f"/{where}", used_by) for where, used_by in DEEPSPEED if sys.platform == "linux"),
    Name("transformers", "transformers:Trainer._save_checkpoint", TRAINER),
    Name("transformers", "transformers:Trainer._init_training_state", TRAINER),
    Name("transformers", "transformers:Trainer._load_from_checkpoint", TRAINER),
    Name("transformers", "transformers:Trainer._prepare_for_training", TRAINER),
    Name("transformers", "transformers:Trainer._load_rng_state", TRAINER),
    Name("transformers", "transformers:Trainer._determine_best_metric", TRAINER),
    Name("transformers", "transformers:Trainer._get_num_items_in_batch", TRAINER),
    Name("transformers", "transformers:Trainer.get_batch_samples", TRAINER),
    Name("transformers", "transformers:Trainer._prepare_inputs", "mmdora/training/validation.py"),
    Name("transformers", "transformers:Trainer.compute_loss_context_manager", "mmdora/training/validation.py"),
    Name("transformers", "/training_args.py:_n_gpu", "mmdora/training/arguments.py"),
    Name(
        "transformers",
        "transformers.integrations.deepspeed:_hf_deepspeed_config_weak_ref",
        "mmdora/core/deepspeed/config.py",
    ),
    Name("transformers", "transformers:PretrainedConfig._attn_implementation", "mmdora/training/packing.py"),
    Name("transformers", "transformers:PreTrainedModel._init_weights", "mmdora/models/llava_resampler.py"),
    Name("transformers", "transformers:PreTrainedModel._supports_sdpa", "mmdora/models/vision_encoders/open_clip.py"),
    Name(
        "transformers", "transformers:PreTrainedModel._no_split_modules", "mmdora/models/vision_encoders/open_clip.py"
    ),
    Name("accelerate", "/hooks.py:_old_forward", "mmdora/adapters/layers/base.py"),
    Name("torch", "/utils/data/dataloader.py:_iterator", TRAINER),
    Name("torch", "torch.utils._python_dispatch:TorchDispatchMode", "mmdora/planning/activations.py"),
    Name("torch", "torch.utils._pytree:tree_map_only", "mmdora/planning/activations.py"),
    Name("torch", "torch:UntypedStorage._cdata", "mmdora/planning/activations.py"),
    Name("torch", "torch.nn.modules.conv:_ConvNd", "mmdora/adapters/layers/convolution.py"),
    Name("torch", "torch:Tensor._version", "mmdora/adapters/layers/shared_input.py"),
    Name("torch", "torch:ops.aten._unsafe_view", "mmdora/adapters/ops/autograd.py"),
    Name("torch", "torch:ops.aten._log_softmax_backward_data", "mmdora/training/chunked_loss.py"),
    Name("torch", "/nn/modules/module.py:_parameters", "mmdora/adapters/layers/experts.py"),
    Name("torch", "/nn/modules/module.py:_modules", "mmdora/adapters/layers/experts.py"),
    Name("torch", "/nn/modules/module.py:_buffers", "mmdora/adapters/merging.py"),
    Name("torch", "/nn/modules/module.py:_forward_hooks", "mmdora/models/new_tokens.py"),
    Name("torch", "/nn/modules/module.py:_forward_pre_hooks", ZERO_PARAMETERS),
    Name(
        "bitsandbytes", "/functional.py:_convert_weight_packed_for_cpu_inverse", "mmdora/adapters/layers/quantized.py"
    ),
    Name("open_clip", "open_clip.model:_build_vision_tower", "mmdora/models/vision_encoders/open_clip.py"),
    Name("open_clip", "open_clip.transformer:VisionTransformer._embeds", "mmdora/models/vision_encoders/open_clip.py"),
    Name(
        "timm",
        "timm.models.vision_transformer:VisionTransformer._pos_embed",
        "mmdora/models/vision_encoders/open_clip_timm.py",
    ),
    Name("timm", "timm.models.eva:Eva._pos_embed", "mmdora/models/vision_encoders/open_clip_timm.py"),
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name.library}-{name.word}")
def test_the_private_name_exists(name: Name):
    if importlib.util.find_spec(name.library) is None:
        pytest.skip(f"{name.library} is not installed")
    installed = version(DISTRIBUTIONS.get(name.library, name.library))
    assert name.exists(), f"{name.library} {installed} has no {name.where}, which {name.used_by} uses"


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name.library}-{name.word}")
def test_the_table_says_who_uses_the_name(name: Name):
    assert re.search(rf"\b{name.word}\b", (ROOT / name.used_by).read_text(encoding="utf-8"))


def private_names_used() -> dict[str, str]:
    """Private attributes, imports and modules that mmdora uses and does not define itself, each with a file."""
    used: dict[str, str] = {}
    defined: set[str] = set()
    for path in (file for folder in ("mmdora", "data_pipelines", "eval") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words: list[str] = []
            if isinstance(node, ast.Attribute):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                (defined.add if own else words.append)(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] != "mmdora":
                words = [alias.name for alias in node.names]
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            used |= {w: str(path.relative_to(ROOT)) for w in words if re.match(r"_[a-zA-Z]", w)}
    namedtuple = {"_fields", "_replace"}
    return {word: file for word, file in used.items() if word not in defined | namedtuple}


def test_every_private_name_that_is_used_is_in_the_table():
    table = {name.word for name in NAMES} | {"_exit", "_moved"}  # os._exit; mmdora's own module
    assert {word: file for word, file in private_names_used().items() if word not in table} == {}


@pytest.mark.parametrize("library", sorted({name.library for name in NAMES}))
def test_versions_are_bounded_from_above(library: str):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    distribution = DISTRIBUTIONS.get(library, library)
    (requirement,) = [r for r in map(Requirement, listed) if r.name == distribution]
    assert any(specifier.operator == "<" for specifier in requirement.specifier), requirement
    locked = re.search(rf"(?mi)^{distribution.replace('_', '-')}==(\S+)", (ROOT / "requirements.lock").read_text())
    assert locked is not None
    assert locked[1] in requirement.specifier
