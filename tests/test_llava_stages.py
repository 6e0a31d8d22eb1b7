"""LLaVA's two stages as shipped, on a tiny Vicuna and CLIP: convert, stage 1, merge, stage 2."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.llava_files import Parts, run, write_base, write_tower
from tests.media import write_image


def write_rows(path: Path, question: str, answer: str) -> Path:
    rows = []
    for i in range(4):
        name = write_image(path.parent / f"{i}.png", size=(12, 8)).name
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(i), "image": name, "conversations": turns})
    path.write_text(json.dumps(rows))
    return path


def test_the_two_stages(tmp_path):
    parts = Parts()
    tower = write_tower(tmp_path / "clip", parts)
    base = write_base(tmp_path / "vicuna", parts)
    run("convert", base, tmp_path / "start", "--vision-tower", tower)
    rows = write_rows(tmp_path / "rows.json", "Describe it.\n<image>", "a dog")
    small = ["model.dtype=float32", "training.deepspeed=null", "training.batch_size=4", "training.micro_batch_size=4"]
    small += ["training.epochs=3", "data.num_workers=0", f"data.train=[{rows}]"]

    first = tmp_path / "stage1"
    paths = [f"model.path={tmp_path / 'start'}", f"training.output={first}"]
    run("train", "llava-1.5-7b_stage1_projector", *paths, *small)
    trained = load_file(first / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[3] for name in trained} == {"multi_modal_projector"}

    run("merge", first, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "linear_1.weight"
    adapted = next(tensor for key, tensor in trained.items() if key.endswith(name))
    assert torch.equal(next(tensor for key, tensor in merged.items() if key.endswith(name)), adapted)

    second = tmp_path / "stage2"
    paths = [f"model.path={tmp_path / 'merged'}", f"training.output={second}", "parts.language.rank=4"]
    run("train", "llava-1.5-7b_stage2_dora_instruct", *paths, *small)
    adapted = load_file(second / "adapter" / "adapter_model.safetensors")
    assert sum(name.endswith("lora_magnitude_vector") for name in adapted) == 7 * parts.text.num_hidden_layers
    for folder in (first, second):
        assert not (folder / "skipped.jsonl").read_text()
