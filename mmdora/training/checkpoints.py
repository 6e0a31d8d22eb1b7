"""Checkpoints of our own, the same for every ZeRO stage and number of processes, without the frozen base:

    adapter/                      the weights, as `save_adapter` writes them
    optimizer-00000.safetensors   the optimizer's state by the names of parameters (optimizer_state.py), in pieces, with
                                  the average of `training.ema`
    state.json                    schedule, loss scale, step, bad steps and number of processes
    rng-00000.json                random states, one file a process
    trainer_state.json            what transformers' Trainer knows of the run
    manifest.json                 size and SHA-256 of all of these

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
from mmdora.core.distributed import all_gather_objects, from_main
from mmdora.core.errors import UserError
from mmdora.core.run_directory import checkpoints_in
from mmdora.training.optimizer_state import MASTER, Kinds, state_of

log = logging.getLogger(__name__)

AVERAGE = "average"  # a kind of tensor beside the optimizer's own
PIECE = 2**30  # bytes of optimizer state that rank 0 gathers before it writes them
DEEPSPEED_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def save_checkpoint(trainer: Any, folder: Path) -> None:
    """Write a checkpoint, whole or not at all. Raises UserError in every process where it cannot be written."""
    about, ranks = _state(trainer), all_gather_objects(_random_state())
    weights = adapter_contents(trainer.model, "default")
    tensors = optimizer_tensors(trainer)
    problem = ""
    if trainer.args.process_index == 0:
        try:
            with written_aside(folder) as aside:
                write_adapter(aside / "adapter", *weights)
                write_pieces(aside, tensors)
                _dump(aside / "state.json", about)
                for rank, state in enumerate(ranks):
                    _dump(aside / f"rng-{rank:05d}.json", state)
                replace(trainer.state, log_history=[]).save_to_json(str(aside / "trainer_state.json"))
                write_manifest(aside, step=trainer.state.global_step)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            problem = (
                f"{folder} cannot be written: {reason}. The checkpoints before it are whole: make room, "
                "then go on with --resume"
            )
    for _ in tensors:  # gathering takes all processes, also where rank 0 has given up
        pass
    if problem := from_main(problem):
        raise UserError(problem)


def rotate(checkpoints: Path, newest: int, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best. Those of later steps than the newest are left from
    before the run went back to an older one."""
    steps = checkpoints_in(checkpoints)
    kept = {*sorted(step for step in steps if step <= newest)[-keep:], best}
    for step, path in steps.items():
        if step not in kept:
            remove(path)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def optimizer_tensors(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    """`<kind>.<parameter>` and the whole tensor, gathered one parameter at a time."""
    state = state_of(trainer.optimizer)
    for name, parameter in trainable(trainer.model):
        for kind, tensor in state.read(parameter).items():
            yield f"{kind}.{name}", tensor
        if trainer.average is not None:
            yield f"{AVERAGE}.{name}", trainer.average.read(parameter)


def write_pieces(folder: Path, tensors: Iterator[tuple[str, Tensor]], most: int = PIECE) -> None:
    """Files of about `most` bytes each, so that no more is held in memory."""
    piece: dict[str, Tensor] = {}
    size = number = 0
    for name, tensor in tensors:
        piece[name] = tensor.detach().cpu().contiguous()
        size += piece[name].nbytes
        if size >= most:
            save_file(piece, folder / f"optimizer-{number:05d}.safetensors")
            piece, size, number = {}, 0, number + 1
    if piece:
        save_file(piece, folder / f"optimizer-{number:05d}.safetensors")


class Pieces:
    """What `write_pieces` wrote, read one parameter at a time."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.files: dict[str, dict[str, Any]] = defaultdict(dict)  # by parameter and kind
        for path in sorted(folder.glob("optimizer-*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            names = file.keys()
            for key in names:
                kind, _, name = key.partition(".")
                self.files[name][kind] = file

    def __getitem__(self, name: str) -> Kinds:
        return {kind: file.get_tensor(f"{kind}.{name}") for kind, file in self.files.get(name, {}).items()}

    def has_masters(self) -> bool:
        return any(MASTER in kinds for kinds in self.files.values())

    def master(self, name: str) -> Tensor | None:
        file = self.files.get(name, {}).get(MASTER)
        return None if file is None else file.get_tensor(f"{MASTER}.{name}")


class Resumed:
    """A checkpoint that a trainer goes on from: the weights before DeepSpeed takes the model, the rest after."""

    def __init__(self, trainer: Any, folder: Path):
        self.trainer, self.folder = trainer, folder
        self.about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.whole: dict[str, Tensor] = {}  # fp32 weights, for an engine that would begin with rounded ones

    @torch.no_grad()
    def load_weights(self) -> None:
        """Into parameters as they are before training begins. Raises UserError where they do not fit."""
        trainer = self.trainer
        load_weights(trainer.model, self.folder / "adapter")
        with ExitStack() as stack:
            pieces = Pieces(self.folder, stack)
            for name, parameter in trainable(trainer.model):
                master = pieces.master(name)
                if master is not None and parameter.dtype == torch.float32:
                    parameter.copy_(master)
            half = trainer.is_deepspeed_enabled and (trainer.args.bf16 or trainer.args.fp16)
            if half and not pieces.has_masters():
                self.whole = {name: p.detach().float().clone() for name, p in trainable(trainer.model)}

    def load_rest(self) -> None:
        """Optimizer, schedule and loss scale; to be called once the engine is there."""
        trainer = self.trainer
        with ExitStack() as stack:
            pieces = Pieces(self.folder, stack)
            state_of(trainer.optimizer).write(
                (parameter, self._kinds(pieces, name, parameter)) for name, parameter in trainable(trainer.model)
            )
        self.whole = {}
        trainer.bad_steps.count = self.about["bad_steps"]
        trainer.lr_scheduler.load_state_dict(self.about["scheduler"])
        rates = zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True)
        for group, rate in rates:
            group["lr"] = rate
        _set_scale(trainer, self.about["loss_scale"])

    def _kinds(self, pieces: Pieces, name: str, parameter: nn.Parameter) -> Kinds:
        kinds = pieces[name]
        if (average := kinds.pop(AVERAGE, None)) is not None and self.trainer.average is not None:
            self.trainer.average.write(parameter, average)
        if name in self.whole:
            kinds[MASTER] = self.whole[name]
        if parameter.dtype == torch.float32:
            kinds.pop(MASTER, None)  # it is the parameter itself by now
        return kinds

    def load_random_state(self) -> None:
        """Raises no error for another number of processes: they draw anew, from the seed, the step and the rank."""
        args = self.trainer.args
        if self.about["processes"] != args.world_size:
            if args.process_index == 0:
                log.warning(
                    "%s was written by %d processes, and %d go on from it: dropout draws other numbers than it would "
                    "have; weights, optimizer, schedule and order of samples are the same",
                    self.folder,
                    self.about["processes"],
                    args.world_size,
                )
            set_seed((args.seed + 1_000_003 * self.about["step"] + args.process_index) % 2**32)
            return
        path = self.folder / f"rng-{args.process_index:05d}.json"
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
        "torch": _text(torch.get_rng_state()),
        "cuda": None if cuda is None else _text(cuda),
    }


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _state(trainer: Any) -> dict[str, Any]:
    return {
        "step": trainer.state.global_step,
        "bad_steps": trainer.bad_steps.count,
        "processes": trainer.args.world_size,
        "scheduler": trainer.lr_scheduler.state_dict(),
        "loss_scale": _scale(trainer),
    }


def _scaler(trainer: Any) -> tuple[Any, Any]:
    """What scales the loss in float16: DeepSpeed's, or torch's; None for what is not there."""
    if trainer.is_deepspeed_enabled:
        inner = trainer.optimizer.optimizer
        return getattr(inner, "loss_scaler", None) or getattr(inner, "loss_scale_config", None), None
    return None, trainer.accelerator.scaler


def _scale(trainer: Any) -> dict[str, Any] | None:
    theirs, torchs = _scaler(trainer)
    if theirs is not None:
        counters = {key: getattr(theirs, key) for key in DEEPSPEED_SCALE if hasattr(theirs, key)}
        return {"scale": float(theirs.cur_scale)} | counters
    state = torchs.state_dict() if torchs is not None else {}
    return state or None


def _set_scale(trainer: Any, saved: dict[str, Any] | None) -> None:
    """Between DeepSpeed's and torch's the scale itself is taken over, and their counters begin anew."""
    if saved is None:
        return
    theirs, torchs = _scaler(trainer)
    if theirs is not None:
        for key, value in ({"cur_scale": saved["scale"]} | saved).items():
            if key in DEEPSPEED_SCALE and hasattr(theirs, key):
                setattr(theirs, key, value)
    elif torchs is not None and torchs.is_enabled():
        known = torchs.state_dict()
        torchs.load_state_dict(known | {key: value for key, value in saved.items() if key in known})


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
