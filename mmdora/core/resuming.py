"""Settings that may change when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdora.core.config import RunConfig
from mmdora.core.errors import UserError

# Keys, with all keys below them, that may change because the trained weights do not depend on them.
NEUTRAL_KEYS = (
    "evaluation",
    "plugins",
    "model.trust_remote_code",
    "model.merge_memory",
    "data.num_workers",
    "data.max_skipped",
    "data.max_tokens",
    "data.validation",
    "data.video.timeout",
    "training.output",
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "training.evaluate_every",
    "training.patience",
    "training.max_bad_steps",
    "training.save_every",
    "training.keep",
    "training.on_sigterm",
    "training.deepspeed",
    "training.report_to",
)
LENGTH_KEYS = ("training.epochs", "training.max_steps")


def check_resumable(begun: RunConfig, config: RunConfig, run: Path) -> None:
    """Raise UserError that names the keys in which `config` must not differ from the config the run was begun with.

    A run may become longer if its learning rate does not depend on its length.
    """
    old, new = flat_keys(begun.model_dump(mode="json")), flat_keys(config.model_dump(mode="json"))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    best_key = "data.validation" if begun.training.best == "loss" else "evaluation"
    neutral = [key for key in NEUTRAL_KEYS if key != best_key or best_measure(begun) == best_measure(config)]
    if begun.data.validation_share != config.data.validation_share:  # the training data is another
        neutral = [key for key in neutral if key != "data.validation"]
    changed = [key for key in changed if not any(key == n or key.startswith(f"{n}.") for n in neutral)]
    training = config.training
    fixed_warmup = training.warmup_steps is not None or training.warmup_ratio == 0
    is_constant = training.lr_scheduler == "constant" and fixed_warmup
    if is_constant and all(old[key] is not None and new[key] is not None for key in changed if key in LENGTH_KEYS):
        changed = [key for key in changed if key not in LENGTH_KEYS or new[key] < old[key]]
    if changed:
        listed = "\n".join(f"  {key}: {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
        longer = "; a run can be made longer only with lr_scheduler constant, and warmup_ratio 0 or warmup_steps"
        raise UserError(
            f"--resume: {run} was begun with other settings, which change the training:\n{listed}\n"
            f"Restore them, or give another training.output{longer if set(changed) & {*LENGTH_KEYS} else ''}"
        )


def best_measure(config: RunConfig) -> Any:
    """Return the data or the `evaluation` entry that `training.best` compares models on; other data would make the best
    value so far meaningless."""
    best = config.training.best
    if best == "loss":
        return config.data.validation
    return next((entry for entry in config.evaluation if entry.name == best), None)


def flat_keys(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a tree of plain values into dotted keys, as on the command line."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flat_keys(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
