"""Measure training end to end, from files to weights: mmdora's trainer against `transformers.Trainer` with PEFT.

    python benchmarks/train.py                                                    # on a CPU
    python benchmarks/train.py --hidden 4096 --layers 32 --pixels 336 --batch 16  # on a GPU, LLaVA-1.5-7B shapes

A LLaVA with random weights (CLIP tower, projector, Llama) is fine-tuned on conversations about JPEGs as in LLaVA's LoRA
recipe: adapters on all linear layers of the language model, the rest frozen. Both sides read the same samples through
the same pipeline, in this process. In every round each candidate runs a few steps, in a random order; the first step of
a round is warm-up. Figures are medians over the steps, and ratios within one run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from llava import ANSWER, QUESTION, make_processor, write_images
from machine import about_machine
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PrinterCallback

import mmdora
from data_pipelines.collator import Collator
from data_pipelines.dataset import TrainDataset, read_source
from data_pipelines.encoding import Encoder
from data_pipelines.ledger import Ledger
from mmdora.core.config import RunConfig
from mmdora.training.arguments import training_arguments
from mmdora.training.trainer import AdapterTrainer

LANGUAGE = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
TIMED_STEPS = 3  # per candidate and round, after its warm-up step


class Clock(transformers.TrainerCallback):
    """Records the seconds between the ends of consecutive steps: data, forward, backward, update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._last = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def make_model(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """Return a model with random weights; all sizes but the depth follow from the width, as in Llama 7B."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=args.hidden // 4,
        intermediate_size=args.hidden,
        num_hidden_layers=args.vision_layers,
        num_attention_heads=max(1, args.hidden // 256),
        image_size=args.pixels,
        patch_size=14,
    )
    processor = make_processor(args.pixels)
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 43 // 16,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 128),
    )
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    patches = (args.pixels // 14) ** 2
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=patches
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlavaForConditionalGeneration(config).to(getattr(torch, args.dtype))


def make_config(args: argparse.Namespace, folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "a LLaVA with random weights", "dtype": args.dtype},
            "parts": {"language": {"method": "dora", "rank": args.rank, "alpha": 2 * args.rank}},
            "data": {"train": [str(folder / "data.json")]},
            "training": {
                "output": str(folder),
                "max_steps": TIMED_STEPS + 1,
                "batch_size": args.batch,
                "micro_batch_size": args.batch,
                "gradient_checkpointing": args.checkpointing,
            },
        }
    )


def make_data(args: argparse.Namespace, folder: Path) -> TrainDataset:
    """Write samples with an image, a question and a long answer."""
    rows = []
    for i, path in enumerate(write_images(folder, 64)):
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": f"{ANSWER} {i} " * 8}]
        rows.append({"id": str(i), "image": path.name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    source = read_source(make_config(args, folder).data.train[0])
    encoder = Encoder(make_processor(args.pixels))
    return TrainDataset([source], encoder, Ledger(folder / "skipped.jsonl", len(source), 0.0), seed=0)


class PlainCollator(Collator):
    """A collator without `index`, which plain transformers.Trainer would pass to the model."""

    def __call__(self, rows: Any) -> Any:
        batch = super().__call__(rows)
        del batch["index"]
        return batch


def with_mmdora(method: str) -> Callable[..., transformers.Trainer]:
    def build(model: Any, config: RunConfig, **kwargs: Any) -> transformers.Trainer:
        language = config.parts["language"].model_copy(update={"method": method})
        config = config.model_copy(update={"parts": {"language": language}})
        mmdora.inject_adapters(model, config.parts)
        return AdapterTrainer(config, model=model, data_collator=Collator(0), **kwargs)

    return build


def with_peft(use_dora: bool) -> Callable[..., transformers.Trainer]:
    def build(model: Any, config: RunConfig, **kwargs: Any) -> transformers.Trainer:
        rank = config.parts["language"].rank
        adapter = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LANGUAGE, use_dora=use_dora)
        model = peft.get_peft_model(model, adapter)
        if kwargs["args"].gradient_checkpointing:
            model.enable_input_require_grads()
        return transformers.Trainer(model=model, data_collator=PlainCollator(0), **kwargs)

    return build


CANDIDATES = {
    "PEFT LoRA": with_peft(use_dora=False),
    "PEFT DoRA": with_peft(use_dora=True),
    "mmdora LoRA": with_mmdora("lora"),
    "mmdora DoRA": with_mmdora("dora"),
}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    config, dataset, base = make_config(args, folder), make_data(args, folder), make_model(args)
    tokens = statistics.mean(dataset[i]["input_ids"].shape[1] for i in range(len(dataset))) * args.batch
    trainers, clocks, peaks, num_trainable = {}, {}, dict.fromkeys(args.only, 0), {}
    for name in args.only:
        model = copy.deepcopy(base) if len(args.only) > 1 else base
        trainer = CANDIDATES[name](model, config, args=training_arguments(config, folder), train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        clocks[name] = Clock()
        trainer.add_callback(clocks[name])
        trainers[name] = trainer
        num_trainable[name] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    for _ in range(args.rounds):
        for name in random.sample(args.only, len(args.only)):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated()
            trainers[name].train()
            if torch.cuda.is_available():
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - others)
    medians = {name: statistics.median(clock.seconds) for name, clock in clocks.items()}
    first = args.only[0]
    return {
        name: {
            "tokens_a_second": round(tokens / seconds, 1),
            f"over {first}": round(medians[first] / seconds, 3),
            "trained": num_trainable[name],
        }
        | ({"peak_gib_beside_the_models": round(peaks[name] / 2**30, 2)} if peaks[name] else {})
        for name, seconds in medians.items()
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hidden", type=int, default=1024, help="width of the language model; the vision tower has a quarter"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vision-layers", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each layer's forward in the backward")
    parser.add_argument("--only", nargs="*", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    os.environ.setdefault("MMDORA_CACHE", tempfile.mkdtemp(prefix="mmdora-benchmark-"))
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, Path(folder))
    for name, row in figures.items():
        print(f"{name:14} " + "   ".join(f"{key} {value:g}" for key, value in row.items()))
    if args.out is not None:
        shape = {key: value for key, value in vars(args).items() if key not in ("out", "only")}
        result = about_machine() | {"shape": shape, "figures": figures}
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
