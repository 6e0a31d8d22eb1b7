"""Load the TARGET of a command: a run, an adapter directory or a plain model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdora.adapters.merging import merge_adapters
from mmdora.adapters.peft_format import read_adapter
from mmdora.adapters.save_load import load_adapter
from mmdora.core.config import ModelConfig, RunConfig, VideoConfig
from mmdora.core.distributed import to_local_device
from mmdora.core.errors import UserError
from mmdora.core.run_directory import RunDir, find_adapter
from mmdora.models.loading import load_model, load_saved_processor
from mmdora.models.model_state import state_of


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to generate, with what encodes its inputs."""

    model: Any
    processor: Any
    video: VideoConfig
    config: RunConfig | None  # if the target is a run

    @property
    def merge_memory(self) -> float | None:
        """Most host memory for the unmerged weights while the model generates, in GiB (`merged_weights`)."""
        return None if self.config is None else self.config.model.merge_memory


def load_base(config: ModelConfig) -> tuple[Any, Any]:
    """Return the model of a config, with its frozen adapter in the weights, and its processor. Raises UserError."""
    name = config.frozen_adapter
    return load_model(config) if name is None else load_model(config, lambda model: _add_frozen(model, name))


def _add_frozen(model: Any, name: str) -> None:
    """Add an adapter to the weights for good, after the one that it was trained on itself, if any."""
    try:
        folder = find_adapter(name)
    except UserError as error:
        raise UserError(f"model.frozen_adapter: {error}") from error
    if below := read_adapter(folder).frozen_adapter:
        _add_frozen(model, below)
    load_adapter(model, folder)
    merge_adapters(model)
    state_of(model).frozen_adapter = str(folder)


def load_target(target: str, trust_remote_code: bool = False, dtype: str | None = None) -> Loaded:
    """Load a run directory, an adapter directory (on the base model that it names) or a model, onto the local device.

    `dtype` is used unless the target is a run, whose config defines it. Raises UserError.
    """
    run = RunDir(Path(target))
    if run.config_file.is_file():
        config = run.config(trust_remote_code)
        if not run.adapter.is_dir():
            raise UserError(
                f"{target}: the run is not finished and has no adapter yet; mmdora train CONFIG --resume continues it"
            )
        model, _ = load_base(config.model)
        load_adapter(model, run.adapter)
        processor = load_saved_processor(model, run.processor, trust_remote_code)
        return Loaded(to_local_device(model).eval(), processor, config.data.video, config)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code} | ({"dtype": dtype} if dtype else {})
    if (run.path / "adapter_config.json").is_file():
        adapter_config = json.loads((run.path / "adapter_config.json").read_text(encoding="utf-8"))
        base = adapter_config.get("base_model_name_or_path")
        if not base:
            raise UserError(f"{target}: its adapter_config.json does not name the base model")
        adapter = read_adapter(run.path)
        tokens, frozen = list(adapter.new_tokens), adapter.frozen_adapter
        model, processor = load_base(ModelConfig(path=base, new_tokens=tokens, frozen_adapter=frozen, **options))
        load_adapter(model, run.path)
        return Loaded(to_local_device(model).eval(), processor, VideoConfig(), None)
    model, processor = load_model(ModelConfig(path=target, **options))
    return Loaded(to_local_device(model), processor, VideoConfig(), None)
