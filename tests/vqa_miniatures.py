"""Miniatures of the official files of the open-ended image benchmarks, in their official layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.media import write_image


@dataclass(frozen=True)
class Miniature:
    """A benchmark's files, predictions in its official format, and the scores that these must get."""

    build: Callable[[Path], None]
    answers: str  # the file that is enough to score
    predictions: Any
    official: float
    strict: float
    prompt: str  # of the first question
    unanswered: str | None = None  # the split to submit
    submitted: Callable[[list[dict[str, Any]]], Any] | None = None  # the submission, computed from the result's rows
    split: str | None = None  # the split with answers, if it is not the default


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        write_image(folder / name, seed, (32, 32))


def coco(folder: Path, prefix: str, splits: dict[str, list[int]]) -> None:
    """Question i is about image i // 2; the annotators answer yes; red or blue; 2 or two."""
    for split, ids in splits.items():
        place = "test2015" if split.startswith("test") else split
        questions = [{"question_id": i, "image_id": i // 2, "question": f"Is it {i}?"} for i in ids]
        name = f"{prefix}OpenEnded_mscoco_{split}_questions.json"
        write(folder / "Questions" / name, {"data_subtype": split, "questions": questions})
        images(folder / place, *sorted({f"COCO_{place}_{i // 2:012d}.jpg" for i in ids}))
    annotated = [["yes"] * 10, ["red"] * 5 + ["blue"] * 5, ["2"] * 8 + ["two"] * 2]
    annotations = [
        {
            "question_id": i,
            "image_id": i // 2,
            "question_type": "eight",
            "answer_type": ("yes/no", "other", "number")[i],
            "answers": [{"answer_id": k, "answer": answer} for k, answer in enumerate(answers, 1)],
        }
        for i, answers in enumerate(annotated)
    ]
    content = {"annotations": annotations, "data_subtype": "val2014"}
    if not prefix:
        content["question_types"] = {"eight": "Plants and Animals"}
    write(folder / f"{prefix}mscoco_val2014_annotations.json", content)


def vizwiz(folder: Path) -> None:
    annotated = [["unanswerable"] * 10, ["Coke"] * 10, ["two"] * 3 + ["2"] * 7]
    rows = [
        {
            "image": f"VizWiz_val_{i:08d}.jpg",
            "question": "What is this?",
            "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
            "answer_type": ("unanswerable", "other", "number")[i],
            "answerable": int(i > 0),
        }
        for i, answers in enumerate(annotated)
    ]
    write(folder / "Annotations" / "val.json", rows)
    images(folder / "val", *(row["image"] for row in rows))
    rows = [{"image": f"VizWiz_test_{i:08d}.jpg", "question": "What colour?"} for i in range(2)]
    write(folder / "Annotations" / "test.json", rows)
    images(folder / "test", *(row["image"] for row in rows))


def textvqa(folder: Path) -> None:
    annotated = [["Nokia."] * 10, ["10:30"] * 2 + ["half past ten"] * 8, ["stop"] * 9 + ["STOP sign"]]
    rows = [
        {"question_id": 7 + i, "image_id": f"ab{i // 2}", "question": f"what Says {i}?", "answers": answers}
        for i, answers in enumerate(annotated)
    ]
    write(folder / "TextVQA_0.5.1_val.json", {"data": rows})
    tokens = [{"image_id": "ab0", "ocr_tokens": ["NOKIA", "3310"]}, {"image_id": "ab1", "ocr_tokens": []}]
    write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    images(folder / "train_images", "ab0.jpg", "ab1.jpg")
    write(folder / "TextVQA_0.5.1_test.json", {"data": [{"question_id": 3, "image_id": "cd", "question": "what?"}]})
    write(folder / "TextVQA_Rosetta_OCR_v0.2_test.json", {"data": [{"image_id": "cd", "ocr_tokens": ["x"]}]})
    images(folder / "test_images", "cd.jpg")


def gqa_question(number: int, answer: str, structural: str, balanced: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "question": f"What is thing {number}?",
        "imageId": f"n{number // 2}",
        "answer": answer,
        "isBalanced": balanced,
        "types": {"structural": structural, "semantic": "attr", "detailed": "chooseColor"},
        "semantic": [{"operation": "select", "argument": "thing (1)"}, {"operation": "query", "argument": "name"}],
        "groups": {"global": "color"},
        "entailed": [],
        **more,
    }


def gqa(folder: Path) -> None:
    questions = {
        "10": gqa_question(0, "red", "query", entailed=["10", "12"]),
        "11": gqa_question(1, "yes", "verify"),
        "12": gqa_question(2, "left", "choose"),
    }
    write(folder / "questions1.2" / "testdev_balanced_questions.json", questions)
    choices = {key: {"valid": ["red", "yes"], "plausible": ["red"]} for key in questions}
    write(folder / "eval" / "testdev_balanced_choices.json", choices)
    hidden = {key: {"question": "What?", "imageId": "n0", "isBalanced": True} for key in ("20", "21")}
    write(folder / "questions1.2" / "submission_all_questions.json", hidden)
    images(folder / "images", "n0.jpg", "n1.jpg")


def stvqa(folder: Path) -> None:
    answers = [["stop"], ["coca-cola", "coca cola"], ["2"]]
    rows = [
        {
            "question_id": 90 + i,
            "question": f"What says {i}?",
            "file_path": f"coco-text/{i // 2}.jpg",
            "answers": annotated,
        }
        for i, annotated in enumerate(answers)
    ]
    write(folder / "train_task_3.json", {"dataset_name": "ST-VQA-train", "data": rows})
    images(folder / "coco-text", "0.jpg", "1.jpg")
    row = {"question_id": 7, "question": "What?", "file_path": "coco-text/9.jpg"}
    write(folder / "test_task_3.json", {"dataset_name": "ST-VQA-test", "data": [row]})
    images(folder / "test" / "coco-text", "9.jpg")


def docvqa(folder: Path) -> None:
    answers = [["Nokia  3310"], ["10%"], ["a", "University of California"]]
    rows = [
        {
            "questionId": 300 + i,
            "question": f"What is {i}?",
            "question_types": ["form", "layout"],
            "image": f"documents/page_{1 + i // 2}.png",
            "docId": 5,
            "answers": annotated,
            "data_split": "val",
        }
        for i, annotated in enumerate(answers)
    ]
    content = {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": rows}
    write(folder / "spdocvqa_qas" / "val_v1.0_withQT.json", content)
    row = {"questionId": 9, "question": "What?", "image": "documents/page_3.png", "docId": 6, "data_split": "test"}
    write(folder / "spdocvqa_qas" / "test_v1.0.json", {"dataset_split": "test", "data": [row]})
    images(folder / "spdocvqa_images", "page_1.png", "page_2.png", "page_3.png")


def exact(folder: Path) -> None:
    rows = [
        {
            "id": f"e{i}",
            "image": f"{i}.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}],
        }
        for i, answer in enumerate(["A dog.", "two", "Red"])
    ]
    write(folder / "own.json", rows)
    images(folder, "0.png", "1.png", "2.png")


def rows_of(key: str, value: str, number: bool = False) -> Callable[[list[dict[str, Any]]], Any]:
    """Return a function that computes a submission as a list of {key: id, value: answer}."""
    return lambda rows: [{key: int(r["id"]) if number else r["id"], value: r["response"]} for r in rows]


def among_all_test_questions(rows: list[dict[str, Any]]) -> Any:
    """VQAv2's submission: every test2015 question, with empty answers outside of test-dev."""
    answers = {row["id"]: row["response"] for row in rows}
    return [{"question_id": i, "answer": answers.get(str(i), "")} for i in (5, 6, 7)]


LLAVA = "\nAnswer the question using a single word or phrase."
VQA_ANSWERS = [{"question_id": i, "answer": answer} for i, answer in enumerate(["Yes", "Red.", "two"])]
MINIATURES = {
    "vqav2": Miniature(
        lambda folder: coco(folder, "v2_", {"val2014": [0, 1, 2], "test2015": [5, 6, 7], "test-dev2015": [5, 7]}),
        "v2_mscoco_val2014_annotations.json",
        VQA_ANSWERS,
        200 / 3,  # all ten annotators answer "yes", so "Yes" is not normalised
        200 / 3,
        f"Is it 0?{LLAVA}",
        "test-dev2015",
        among_all_test_questions,
    ),
    "okvqa": Miniature(
        lambda folder: coco(folder, "", {"val2014": [0, 1, 2]}),
        "mscoco_val2014_annotations.json",
        VQA_ANSWERS,
        200 / 3,
        200 / 3,
        f"Is it 0?{LLAVA}",
    ),
    "vizwiz": Miniature(
        vizwiz,
        "Annotations/val.json",
        [{"image": f"VizWiz_val_{i:08d}.jpg", "answer": a} for i, a in enumerate(["Unanswerable.", "coke", "2"])],
        200 / 3,  # the annotators' "Coke" is not normalised
        200 / 3,
        f"What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.{LLAVA}",
        "test",
        rows_of("image", "answer"),
    ),
    "textvqa": Miniature(
        textvqa,
        "TextVQA_0.5.1_val.json",
        [{"question_id": 7 + i, "answer": answer} for i, answer in enumerate(["nokia", "10:30", "Stop"])],
        (1 + 0.6 + 1) / 3 * 100,
        (1 + 0.6 + 1) / 3 * 100,
        f"What says 0?\nReference OCR token: NOKIA, 3310{LLAVA}",
        "test",
        rows_of("question_id", "answer", number=True),
    ),
    "gqa": Miniature(
        gqa,
        "questions1.2/testdev_balanced_questions.json",
        [{"questionId": i, "prediction": p} for i, p in (("10", "red"), ("11", "Yes"), ("12", "left"))],
        200 / 3,  # "Yes" does not equal "yes"
        200 / 3,
        f"What is thing 0?{LLAVA}",
        "submission_all",
        rows_of("questionId", "prediction"),
    ),
    "stvqa": Miniature(
        stvqa,
        "train_task_3.json",
        [{"question_id": 90 + i, "answer": answer} for i, answer in enumerate(["Stop", "coca colas", "two"])],
        (1 + 0.9 + 0) / 3 * 100,
        (1 + 0.9 + 0) / 3 * 100,
        f"What says 0?{LLAVA}",
        "test",
        rows_of("question_id", "answer", number=True),
        "train",
    ),
    "docvqa": Miniature(
        docvqa,
        "spdocvqa_qas/val_v1.0_withQT.json",
        [
            {"questionId": 300 + i, "answer": answer}
            for i, answer in enumerate(["nokia 3310", "10", "Univ. of California"])
        ],
        (1 + 2 / 3 + 18 / 24) / 3 * 100,
        (1 + 2 / 3 + 18 / 24) / 3 * 100,
        f"What is 0?{LLAVA}",
        "test",
        rows_of("questionId", "answer", number=True),
    ),
    "exact_match": Miniature(
        exact,
        "own.json",
        [{"id": f"e{i}", "response": answer} for i, answer in enumerate(["a  DOG", "2", "red."])],
        200 / 3,
        200 / 3,
        "What?",
    ),
}
