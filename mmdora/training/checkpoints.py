"""mmdora's checkpoints: the same for every ZeRO stage and number of processes, without the frozen base model.

    adapter/                      the weights, as `save_adapter` writes them
    optimizer-00000.safetensors   optimizer state by parameter name (optimizer_state.py), in shards, with the moving
                                  average of `training.ema`
    state.json                    scheduler, loss scale, step, number of processes, counts of bad steps and of
                                  evaluations since the best one
    rng-00000.json                random states, one file per process
    trainer_state.json            the state of transformers' Trainer
    manifest.json                 size and SHA-256 of all these files

Every process makes every call; rank 0 alone writes.
"""

from __future__ import annotations

import base64
import json
import logging
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import set_seed

from mmdora.adapters.save_load import adapter_contents, load_weights, write_adapter
from mmdora.core.atomic import remove, write_manifest, written_aside
from mmdora.core.deepspeed.optimizer_state import (
    MASTER,
    ParameterState,
    loss_scaler,
    read_loss_scale,
    write_loss_scale,
)
from mmdora.core.distributed import all_gather_objects, from_main, is_main, rank, world_size
from mmdora.core.errors import UserError
from mmdora.core.run_directory import checkpoints_in
from mmdora.training.optimizer_state import optimizer_state

log = logging.getLogger(__name__)

AVERAGE = "average"  # the kind of tensor that holds a parameter's moving average
SHARD_BYTES = 2**30  # optimizer state that rank 0 gathers before it writes a file


def save_checkpoint(trainer: Any, folder: Path) -> None:
    """Write a checkpoint atomically.

    Raises:
        UserError: the checkpoint cannot be written; raised in every process.
    """
    state, random_states = _run_state(trainer), all_gather_objects(_random_state())
    weights = adapter_contents(trainer.model, "default")
    tensors = optimizer_tensors(trainer)
    problem = ""
    if is_main():
        try:
            with written_aside(folder) as aside:
                write_adapter(aside / "adapter", *weights)
                write_shards(aside, tensors)
                _write_json(aside / "state.json", state)
                for process, random_state in enumerate(random_states):
                    _write_json(aside / f"rng-{process:05d}.json", random_state)
                replace(trainer.state, log_history=[]).save_to_json(str(aside / "trainer_state.json"))
                write_manifest(aside, step=trainer.state.global_step)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            problem = (
                f"{folder} cannot be written: {reason}. Earlier checkpoints are complete: free some disk space, then "
                "continue with --resume"
            )
    for _ in tensors:  # gathering needs all processes, even if rank 0 failed
        pass
    if problem := from_main(problem):
        raise UserError(problem)


def rotate(checkpoints: Path, newest: int, keep: int, best: int | None) -> None:
    """Remove all checkpoints except the `keep` newest ones and the best one.

    Checkpoints of later steps than `newest` date from before the run was resumed at an earlier step; they go too.
    """
    steps = checkpoints_in(checkpoints)
    kept = {*sorted(step for step in steps if step <= newest)[-keep:], best}
    for step, path in steps.items():
        if step not in kept:
            remove(path)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def optimizer_tensors(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (`<kind>.<parameter>`, full tensor), gathered one parameter at a time."""
    state = optimizer_state(trainer.optimizer)
    for name, parameter in trainable(trainer.model):
        for kind, tensor in state.read(parameter).items():
            yield f"{kind}.{name}", tensor
        if trainer.average is not None:
            yield f"{AVERAGE}.{name}", trainer.average.read(parameter)


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], max_bytes: int = SHARD_BYTES) -> None:
    """Write files of about `max_bytes` each, so that no more is held in memory."""
    shard: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in tensors:
        shard[name] = tensor.detach().cpu().contiguous()
        size += shard[name].nbytes
        if size >= max_bytes:
            save_file(shard, folder / f"optimizer-{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
    if shard:
        save_file(shard, folder / f"optimizer-{number:05d}.safetensors")


class SavedStates:
    """The files of `write_shards`, read one parameter at a time."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.files: dict[str, dict[str, Any]] = defaultdict(dict)  # by parameter and kind
        for path in sorted(folder.glob("optimizer-*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            names = file.keys()
            for key in names:
                kind, _, name = key.partition(".")
                self.files[name][kind] = file

    def __getitem__(self, name: str) -> ParameterState:
        return {kind: file.get_tensor(f"{kind}.{name}") for kind, file in self.files.get(name, {}).items()}

    def has_masters(self) -> bool:
        return any(MASTER in kinds for kinds in self.files.values())

    def master(self, name: str) -> Tensor | None:
        file = self.files.get(name, {}).get(MASTER)
        return None if file is None else file.get_tensor(f"{MASTER}.{name}")


class Resumed:
    """A checkpoint from which a trainer resumes: weights before DeepSpeed takes the model over, the rest after it."""

    def __init__(self, trainer: Any, folder: Path):
        self.trainer, self.folder = trainer, folder
        self.state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.masters: dict[str, Tensor] = {}  # fp32 weights, for an engine that would start from rounded ones

    @torch.no_grad()
    def load_weights(self) -> None:
        """Load the adapter's weights before training begins. Raises UserError if they do not fit the model."""
        trainer = self.trainer
        load_weights(trainer.model, self.folder / "adapter")
        with ExitStack() as stack:
            saved = SavedStates(self.folder, stack)
            for name, parameter in trainable(trainer.model):
                master = saved.master(name)
                if master is not None and parameter.dtype == torch.float32:
                    parameter.copy_(master)
            half_precision = trainer.is_deepspeed_enabled and (trainer.args.bf16 or trainer.args.fp16)
            if half_precision and not saved.has_masters():
                self.masters = {name: p.detach().float().clone() for name, p in trainable(trainer.model)}

    def load_optimizer(self) -> None:
        """Load optimizer, scheduler and loss scale, once DeepSpeed's engine exists."""
        trainer = self.trainer
        with ExitStack() as stack:
            saved = SavedStates(self.folder, stack)
            optimizer_state(trainer.optimizer).write(
                (parameter, self._state_of(saved, name, parameter)) for name, parameter in trainable(trainer.model)
            )
        self.masters = {}
        trainer.bad_steps.count = self.state["bad_steps"]
        trainer.lr_scheduler.load_state_dict(self.state["scheduler"])
        rates = zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True)
        for group, rate in rates:
            group["lr"] = rate
        _set_loss_scale(trainer, self.state["loss_scale"])

    def _state_of(self, saved: SavedStates, name: str, parameter: nn.Parameter) -> ParameterState:
        state = saved[name]
        if (average := state.pop(AVERAGE, None)) is not None and self.trainer.average is not None:
            self.trainer.average.write(parameter, average)
        if name in self.masters:
            state[MASTER] = self.masters[name]
        if parameter.dtype == torch.float32:
            state.pop(MASTER, None)  # `load_weights` has copied it into the parameter
        return state

    def load_random_state(self) -> None:
        """Restore random states. With another number of processes, seed them from the seed, the step and the rank."""
        if self.state["processes"] != world_size():
            if is_main():
                log.warning(
                    "%s was written by %d processes and is resumed by %d: dropout draws different random numbers; "
                    "weights, optimizer, scheduler and the order of samples are the same",
                    self.folder,
                    self.state["processes"],
                    world_size(),
                )
            set_seed((self.trainer.args.seed + 1_000_003 * self.state["step"] + rank()) % 2**32)
            return
        path = self.folder / f"rng-{rank():05d}.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002 (libraries draw from it)
        torch.set_rng_state(_tensor(state["torch"]))
        if torch.cuda.is_available() and state["cuda"] is not None:
            torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _random_state() -> dict[str, Any]:
    kind, numbers, *rest = np.random.get_state()  # noqa: NPY002 (libraries draw from it)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(numbers).tolist(), *rest],
        "torch": _base64(torch.get_rng_state()),
        "cuda": None if cuda is None else _base64(cuda),
    }


def _base64(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _run_state(trainer: Any) -> dict[str, Any]:
    return {
        "step": trainer.state.global_step,
        "bad_steps": trainer.bad_steps.count,
        "evaluations_since_best": trainer.patience.count,
        "processes": world_size(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "loss_scale": _loss_scale(trainer),
    }


def _loss_scale(trainer: Any) -> dict[str, Any] | None:
    """Return the state of the float16 loss scaler, DeepSpeed's or torch's; None without one."""
    if trainer.is_deepspeed_enabled:
        scaler = loss_scaler(trainer.optimizer.optimizer)
        return None if scaler is None else read_loss_scale(scaler)
    scaler = trainer.accelerator.scaler
    return (scaler.state_dict() if scaler is not None else {}) or None


def _set_loss_scale(trainer: Any, saved: dict[str, Any] | None) -> None:
    """Restore the loss scale. Between DeepSpeed and torch the scale itself carries over, and counters start anew."""
    if saved is None:
        return
    if trainer.is_deepspeed_enabled:
        if (scaler := loss_scaler(trainer.optimizer.optimizer)) is not None:
            write_loss_scale(scaler, saved)
        return
    scaler = trainer.accelerator.scaler
    if scaler is not None and scaler.is_enabled():
        known = scaler.state_dict()
        scaler.load_state_dict(known | {key: value for key, value in saved.items() if key in known})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
