"""Measure answers per CPU second with a DoRA adapter against a plain transformers loop over the merged model, and the
time from command to first answer.

    python benchmarks/eval.py --out benchmarks/results/eval.json

The adapter has random values and the `parts` of the quickstart. The plain loop is a hand-written script: the same
images and prompts through the merged model's own processor, sorted by length, in left-padded batches, with `generate`
and one output line per question. It computes no digests, cannot be resumed and does not score. Both sides compute in
fp32 and must give the same answers.
- `answers`: the loops alternate in one process; CPU seconds of all threads. mmdora's time includes merging the adapter
  and restoring the weights. `adapter separate` is mmdora without the merge.
- `commands`: `mmdora eval` on the adapter directory, with its scores and report, and the plain loop as a script; both
  from start to end, CPU seconds of the processes. `first_answer_seconds` is wall-clock time until responses.jsonl has a
  line.
Figures are medians over the rounds, and ratios within one run: above 1, mmdora is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import about_machine
from PIL import Image as PILImage
from transformers import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).parent.parent
sys.path.remove(str(Path(__file__).parent))  # else this file would shadow the package `eval`

MODEL = ROOT / "assets" / "tiny-llava"
NEW_TOKENS = 16
TOKENS = ("input_ids", "attention_mask")
WORDS = ["red", "blue", "green", "circle", "square", "triangle", "left", "right", "up", "down", "two", "small"]


def write_questions(folder: Path, count: int) -> Path:
    """Write four questions of 3 to 30 words per image, a JPEG of 320 × 240 pixels, in LLaVA's format."""
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        if i % 4 == 0:
            coarse = PILImage.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
            coarse.resize((320, 240), PILImage.Resampling.BICUBIC).save(folder / f"{i // 4}.jpg", quality=90)
        question = " ".join(rng.choice(WORDS, rng.integers(3, 31)))
        turns = [{"from": "human", "value": f"<image>\n{question}?"}, {"from": "gpt", "value": "red"}]
        rows.append({"id": f"q{i}", "image": f"{i // 4}.jpg", "conversations": turns})
    (folder / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "questions.json"


@torch.no_grad()
def plain_loop(model: Any, processor: Any, data: Path, out: Path, size: int) -> None:
    rows = []
    for row in json.loads(data.read_text(encoding="utf-8")):
        content = [
            {"type": "image"},
            {"type": "text", "text": row["conversations"][0]["value"].removeprefix("<image>\n")},
        ]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        with PILImage.open(data.parent / row["image"]) as image:
            inputs = processor(
                text=[text], images=[image.convert("RGB")], return_tensors="pt", add_special_tokens=False
            )
        rows.append((row["id"], inputs))
    rows.sort(key=lambda row: row[1]["input_ids"].shape[1], reverse=True)
    with out.open("w", encoding="utf-8") as file:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            tokens = [{key: inputs[key][0] for key in TOKENS} for _, inputs in batch]
            media = [key for key in batch[0][1] if key not in TOKENS]
            inputs = processor.tokenizer.pad(tokens, padding_side="left", return_tensors="pt")
            inputs |= {key: torch.cat([inputs[key] for _, inputs in batch]) for key in media}
            output = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
            )[:, inputs["input_ids"].shape[1] :]
            texts = processor.tokenizer.batch_decode(output, skip_special_tokens=True)
            for (question_id, _), text in zip(batch, texts, strict=True):
                file.write(json.dumps({"id": question_id, "response": text.strip()}) + "\n")


def load(path: Path) -> tuple[Any, Any]:
    import mmdora.models  # noqa: F401  (registers the model's vision encoder in transformers)

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(path)


def write_models(folder: Path) -> None:
    """Write `adapter`, a directory with a DoRA adapter, and `merged`, the plain model that computes the same."""
    import mmdora
    from mmdora.core.config_files import load_config

    model, processor = load(MODEL)
    mmdora.inject_adapters(model, load_config("quickstart").parts)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    mmdora.save_adapter(model, folder / "adapter")
    mmdora.merge_adapters(model).save_pretrained(folder / "merged")
    processor.save_pretrained(folder / "merged")


def answers(out: Path) -> dict[str, str]:
    lines = out.read_text(encoding="utf-8").split("\n")
    return {row["id"]: row["response"] for row in map(json.loads, filter(None, lines))}


def loops(data: Path, size: int, rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each round."""
    import mmdora
    from data_pipelines.encoding import Encoder
    from eval.digests import weights_digest
    from eval.generation import answer_all
    from eval.responses import question_keys
    from eval.run import read_questions
    from mmdora.core.config import EvaluationConfig

    (adapted, processor), (merged, _) = load(MODEL), load(data.parent / "merged")
    mmdora.load_adapter(adapted, data.parent / "adapter")
    config = EvaluationConfig(name="vqa", benchmark="vqa", data=str(data))

    def run_mmdora(folder: Path, merge: bool = True) -> Path:
        questions, encoder = read_questions(config), Encoder(processor)
        keys = question_keys(questions, encoder, NEW_TOKENS, weights_digest(adapted))
        with mmdora.merged_weights(adapted) if merge else nullcontext():
            answer_all(adapted, encoder, questions, keys, folder, size, NEW_TOKENS)
        return folder / "responses.jsonl"

    def run_plain(folder: Path) -> Path:
        plain_loop(merged, processor, data, folder / "answers.jsonl", size)
        return folder / "answers.jsonl"

    ways = {"mmdora": run_mmdora, "plain loop": run_plain, "mmdora, adapter separate": partial(run_mmdora, merge=False)}
    return alternate(ways, rounds, time.process_time)


def commands(data: Path, size: int, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Return the CPU seconds of each round, and the seconds to the first answer."""
    first: list[float] = []

    def run_mmdora(folder: Path) -> Path:
        options = ["--benchmark", "vqa", "--data", str(data), "--batch-size", str(size), "--out", str(folder)]
        command = [sys.executable, "-m", "mmdora.cli", "eval", str(data.parent / "adapter"), *options]
        start, responses = time.perf_counter(), folder / "vqa" / "responses.jsonl"
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (responses.exists() and responses.stat().st_size):
            time.sleep(0.01)
        first.append(time.perf_counter() - start)
        if process.wait():
            raise RuntimeError(f"mmdora eval exited with code {process.returncode}")
        return folder / "vqa" / "responses.jsonl"

    def run_plain(folder: Path) -> Path:
        out = folder / "answers.jsonl"
        command = [sys.executable, __file__, "--batch", str(size), "--plain", str(data), str(out)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return out

    def children() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    return alternate({"mmdora": run_mmdora, "plain loop": run_plain}, rounds, children), first


def alternate(
    candidates: dict[str, Callable[[Path], Path]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the clock's seconds of each round after a warm-up round. Raise RuntimeError if the answers differ."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        results = []
        for name in random.sample(list(candidates), len(candidates)):
            with tempfile.TemporaryDirectory() as folder:
                start = clock()
                out = candidates[name](Path(folder))
                seconds[name] += [clock() - start] if number else []
                results.append(answers(out))
        if any(result != results[0] for result in results):
            raise RuntimeError("the candidates give different answers")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plain", nargs=2, type=Path, metavar=("DATA", "OUT"), help="run only the plain loop")
    parser.add_argument("--note", help="a remark on the machine, for the file")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    if args.plain:
        plain_loop(*load(args.plain[0].parent / "merged"), *args.plain, args.batch)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MMDORA_CACHE"] = folder
        data = write_questions(Path(folder), args.questions)
        write_models(Path(folder))
        in_process = loops(data, args.batch, args.rounds)
        whole, first = commands(data, args.batch, args.rounds)
    figures: dict[str, Any] = {}
    for section, seconds in (("answers", in_process), ("commands", whole)):
        rates = {name: args.questions / statistics.median(values) for name, values in seconds.items()}
        figures[section] = {f"{name}, questions a CPU second": round(rate, 2) for name, rate in rates.items()}
        figures[section]["over the plain loop"] = round(rates["mmdora"] / rates["plain loop"], 3)
        if "mmdora, adapter separate" in rates:
            figures[section]["separate, over the plain loop"] = round(
                rates["mmdora, adapter separate"] / rates["plain loop"], 3
            )
    figures["commands"]["first_answer_seconds"] = round(statistics.median(first[1:]), 2)
    print(json.dumps(figures, indent=2))
    if args.out is not None:
        shape = {"questions": args.questions, "batch": args.batch, "rounds": args.rounds, "note": args.note}
        args.out.write_text(
            json.dumps(about_machine() | shape | {"figures": figures}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
