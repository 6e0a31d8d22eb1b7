"""Miniatures of the official files of the multiple-choice and yes/no benchmarks."""

from __future__ import annotations

import base64
from pathlib import Path

import pandas as pd

from eval.benchmarks.commonsense import TASKS
from eval.benchmarks.mme import GROUP
from tests.benchmark_walk import write, write_lines
from tests.media import write_image

ASK = "Please answer yes or no."
SCIENCE = {
    "1": ("test", "Which is warmer?", ["ice", "fire", "snow"], 1, "image.png", "Look at it.", "grade3"),
    "2": ("test", "Which is a verb?", ["run", "tree"], 0, None, "", "grade9"),
    "3": ("test", "Which is a planet?", ["Mars", "Pluto"], 0, "image.png", "", "grade12"),
    "4": ("val", "Which?", ["a", "b"], 1, None, "", "grade1"),
}


def science_files(root: Path) -> Path:
    names = ("split", "question", "choices", "answer", "image", "hint", "grade")
    metadata = {"subject": "natural science", "topic": "physics"}
    problems = {i: {**dict(zip(names, row, strict=True)), **metadata} for i, row in SCIENCE.items()}
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {"test": ["1", "2", "3"], "val": ["4"], "train": []})
    for i in ("1", "3"):
        (root / "images/test" / i).mkdir(parents=True)
        write_image(root / "images/test" / i / "image.png", int(i), (32, 32))
    return root


def base64_image(seed: int, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return base64.b64encode(write_image(folder / "made.png", seed, (32, 32)).read_bytes()).decode()


def mmbench_rows(folder: Path) -> list[dict]:
    metadata = {"category": "ocr", "l2-category": "coarse_perception", "split": "dev", "source": "", "comment": ""}
    three = {"A": "red", "B": "=green", "C": "blue", "D": "", "answer": "B", "hint": "Think."}
    two = {"A": "yes", "B": "no", "C": "", "D": "", "answer": "A", "hint": ""}
    return [
        {"index": 7, "question": 'What "colour"?', **three, "image": base64_image(0, folder), **metadata},
        {"index": 9, "question": "Is it?", **two, "image": base64_image(1, folder), **metadata, "category": "color"},
    ]


def mmbench_files(root: Path) -> Path:
    pd.DataFrame(mmbench_rows(root / "made")).to_csv(root / "mmbench_dev_en.tsv", sep="\t", index=False)
    return root


def seed_files(root: Path) -> Path:
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    kinds = [("image", 5, "11", "1454_25"), ("image", 1, "12", "1454_25"), ("video", 11, "v19", "P03/P03_24.MP4")]
    questions = [
        {"data_type": kind, "question_type_id": dimension, "question_id": i, "data_id": data, "answer": "B", **choices}
        | {"question": f"How many in {i}?"}
        for kind, dimension, i, data in kinds
    ]
    types = {"Instances Counting": 5, "Scene Understanding": 1, "Action Prediction": 11}
    write(root / "SEED-Bench.json", {"questions": questions, "question_type": types})
    for name in ("SEED-Bench-image", "SEED-Bench-video-image"):
        (root / name).mkdir()
    write_image(root / "SEED-Bench-image/made.png", 0, (32, 32)).rename(root / "SEED-Bench-image/1454_25")
    write_image(root / "SEED-Bench-video-image/11_v19.png", 1, (32, 32))
    return root


def commonsense_files(root: Path) -> Path:
    labels = ["true", "solution2", "answer3", "ending4", "option1", "answer2", "answer5", "answer1"]
    for task, label in zip(TASKS.values(), labels, strict=True):
        row = {"instruction": f"Answer format: {label}/other", "input": "", "output": f"it is {label}", "answer": label}
        write(root / task.folder / "test.json", [row])
    return root


def mme_files(root: Path, tasks=tuple(GROUP)) -> Path:
    """One image per task, in both official layouts."""
    for task in tasks:
        folder = root / "MME_Benchmark_release_version" / task
        has_subfolders = task in ("celebrity", "scene")
        texts, images = (folder / "questions_answers_YN", folder / "images") if has_subfolders else (folder, folder)
        texts.mkdir(parents=True)
        images.mkdir(exist_ok=True)
        write_image(images / "0001.png", 0, (32, 32))
        lines = [f'Is "it" a cat?  {ASK}\tYes', f'Is "it" a dog? {ASK}\tNo']
        (texts / "0001.txt").write_text("\n".join(lines) + "\n\n")
    return root


def pope_files(root: Path) -> Path:
    (root / "val2014").mkdir()
    write_image(root / "val2014/COCO_1.jpg", 0, (32, 32))
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": i, "image": "COCO_1.jpg", "text": f"Is there a {thing} in the image?", "label": label}
            for i, (thing, label) in enumerate((("cat", "yes"), (f"{category} dog", "no")), 1)
        ]
        write_lines(root / "coco" / f"coco_pope_{category}.json", rows)
    return root
