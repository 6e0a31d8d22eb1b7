"""Which settings may change when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdora.core.config import RunConfig
from mmdora.core.errors import UserError

# What may change when a run is resumed, since the trained weights stay the same: keys, with all that is below them.
NEUTRAL = (
    "evaluation",
    "plugins",
    "model.trust_remote_code",
    "data.num_workers",
    "data.max_skipped",
    "data.max_tokens",
    "data.validation",
    "data.video.timeout",
    "training.output",
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "training.evaluate_every",
    "training.max_bad_steps",
    "training.save_every",
    "training.keep",
    "training.on_sigterm",
    "training.deepspeed",
    "training.report_to",
)
LENGTH = ("training.epochs", "training.max_steps")


def check_resumable(begun: RunConfig, config: RunConfig, run: Path) -> None:
    """Raise UserError that names the keys with which a resumed run would not be the one that was begun.

    A run may be made longer where its learning rate does not depend on its length.
    """
    old, new = flat_keys(begun.model_dump(mode="json")), flat_keys(config.model_dump(mode="json"))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    compared = "data.validation" if begun.training.best == "loss" else "evaluation"
    neutral = [name for name in NEUTRAL if name != compared or measure(begun) == measure(config)]
    changed = [key for key in changed if not any(key == n or key.startswith(f"{n}.") for n in neutral)]
    steady = config.training.lr_scheduler == "constant" and config.training.warmup_ratio == 0
    if steady and all(old[key] is not None and new[key] is not None for key in changed if key in LENGTH):
        changed = [key for key in changed if key not in LENGTH or new[key] < old[key]]
    if changed:
        listed = "\n".join(f"  {key}: {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
        longer = "; only with lr_scheduler constant and warmup_ratio 0 may a run be made longer"
        raise UserError(
            f"--resume: {run} was begun with other settings, without which it would not be the same run:\n{listed}\n"
            f"Give them as they were, or another training.output{longer if set(changed) & {*LENGTH} else ''}"
        )


def measure(config: RunConfig) -> Any:
    """By what `training.best` compares models: the best so far says nothing about a loss or a score on other data."""
    best = config.training.best
    if best == "loss":
        return config.data.validation
    return next((entry for entry in config.evaluation if entry.name == best), None)


def flat_keys(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of plain values by dotted keys, as they are given on the command line."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items:
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flat_keys(value, f"{prefix}.{key}" if prefix else str(key))
    return found
