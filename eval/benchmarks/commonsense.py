"""The eight commonsense tasks of LLM-Adapters (Hu et al., EMNLP 2023) and of the DoRA paper, text only.

`commonsense` runs all of them; each is also a benchmark of its own.

Data: LLM-Adapters' dataset folder, with <task>/test.json for each task.

Prompt: the official one, including its indentation. The official code decodes with four beams; here it is greedy.

Scorer: AGI-Edgerunners/LLM-Adapters, commonsense_evaluate.py (NVlabs/DoRA parses responses the same way): the
prediction is the first of a task's labels, in lower case, anywhere in the response; a response without one is wrong.
The headline of `commonsense` is the mean of the eight accuracies, as in the papers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.layout import find_file, read_json, read_rows, typed_fields, warn_of_missing
from eval.metrics import Totals
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

RESPONSE = "### Response:"
INDENT = " " * 16  # the official source's indentation is part of its prompts
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    f"{INDENT}### Instruction:\n{INDENT}{{question}}\n\n{INDENT}{RESPONSE}\n{INDENT}"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    f"{INDENT}### Instruction:\n{INDENT}{{question}}\n\n{INDENT}### Input:\n{INDENT}{{input}}\n\n"
    f"{INDENT}{RESPONSE}\n{INDENT}"
)


@dataclass(frozen=True)
class Task:
    """A task: its folder, and the labels that its answers can be."""

    folder: str
    labels: re.Pattern[str]


ANSWERS = re.compile("answer1|answer2|answer3|answer4|answer5")
TASKS = {
    "boolq": Task("boolq", re.compile("true|false")),
    "piqa": Task("piqa", re.compile("solution1|solution2")),
    "siqa": Task("social_i_qa", ANSWERS),
    "hellaswag": Task("hellaswag", re.compile("ending1|ending2|ending3|ending4")),
    "winogrande": Task("winogrande", re.compile("option1|option2")),
    "arc_easy": Task("ARC-Easy", ANSWERS),
    "arc_challenge": Task("ARC-Challenge", ANSWERS),
    "openbookqa": Task("openbookqa", ANSWERS),
}


def extract(task: str, response: str) -> str:
    """Return the first label in the response, "" if there is none."""
    match = TASKS[task].labels.search(response)
    return match[0] if match else ""


def completion(decoded: str) -> str:
    """Return the answer in a text decoded with its prompt: from "### Response:" to the next one, if any."""
    parts = decoded.split(RESPONSE)
    return parts[1 if len(parts) > 1 else 0].strip()


def official_prompt(instruction: str, context: str = "") -> str:
    """Return the official prompt."""
    return (PROMPT_WITH_INPUT if context else PROMPT).format(question=instruction, input=context)


class CommonsenseTasks(Benchmark):
    """Tasks of LLM-Adapters; the headline is the mean of their accuracies."""

    tasks: ClassVar[tuple[str, ...]]
    prompt = PROMPT
    settings = ()
    max_new_tokens = 32

    def questions(self, config: EvaluationConfig) -> list[Question]:
        files = {task: path for task in self.tasks if (path := self._file(task, config.data)) is not None}
        missing = [f"{TASKS[task].folder}/test.json" for task in self.tasks if task not in files]
        if not files:
            raise UserError(f"{config.data}: holds no {' or '.join(missing)}; expected layout:\n{self.layout}")
        warn_of_missing(config.data, missing, self.layout)
        return [q for task, path in files.items() for q in self._questions(task, path, config)]

    def _file(self, task: str, data: str) -> Path | None:
        """Return the task's question file, or None if it is missing."""
        root, folder = find_path(data), TASKS[task].folder
        if root.is_file():
            return root if len(self.tasks) == 1 else None
        places = [root / folder, root / "dataset" / folder, *([root] if len(self.tasks) == 1 else [])]
        return next((place / "test.json" for place in places if (place / "test.json").is_file()), None)

    def _questions(self, task: str, path: Path, config: EvaluationConfig) -> Iterator[Question]:
        rows = read_json(path)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a list of questions")
        for number, row in enumerate(rows):
            instruction, answer = typed_fields(row, path, f"row {number}", instruction=str, answer=str)
            if extract(task, answer) != answer or not answer:
                raise UserError(f"{path}, row {number}: {answer!r} is not an answer of {task}")
            prompt = self.format_prompt(config, question=instruction)
            if row.get("input") and config.prompt is None:
                prompt = official_prompt(instruction, row["input"])
            sample = conversation(f"{task}/{number}", prompt, source=str(path))
            details = {"task": task, "instruction": instruction}
            yield Question(sample.id, sample, (answer,), sample.id, (task,), details)

    def score(self, response: str, question: Question) -> Score:
        task = question.details["task"]
        predicted = extract(task, completion(RESPONSE + response))
        correct = float(predicted == question.references[0])
        return Score(correct, correct, not predicted, {f"{task} n": 1.0, f"{task} right": correct})

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        """Return the mean of the tasks' accuracies in percent, without tasks that are absent from a bootstrap draw."""
        present = [task for task in self.tasks if f"{task} n" in totals]
        return 100 * np.nanmean([totals[f"{task} right"] / totals[f"{task} n"] for task in present], axis=0)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        return {"tasks": f"{len({q.details['task'] for q in questions})} of {len(self.tasks)}"}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the output of commonsense_evaluate.py, or a folder of such files for several tasks.

        It is <model>-<adapter>-<folder>.json with the test's rows in order, and the response as `output_pred`.
        """
        if path.is_dir():
            pairs = []
            for task in dict.fromkeys(q.details["task"] for q in questions):
                file = find_file(str(path), [f"*{TASKS[task].folder}.json"], f"{path}/<…>-{TASKS[task].folder}.json")
                pairs += _answers(file, [q for q in questions if q.details["task"] == task])
            return pairs
        rows = read_rows(path)
        if rows and isinstance(rows[0], dict) and "output_pred" in rows[0]:
            return _answers(path, questions)
        return super().read_predictions(path, questions)


def _answers(path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
    rows = read_rows(path)
    if len(rows) != len(questions):
        raise UserError(
            f"{path}: {len(rows)} answers for {len(questions)} questions; expected one per question, in order"
        )
    pairs = []
    for number, (row, q) in enumerate(zip(rows, questions, strict=True)):
        instruction, response = typed_fields(row, path, f"row {number}", instruction=str, output_pred=str)
        if instruction != q.details["instruction"]:
            raise UserError(
                f"{path}, row {number}: answers {instruction!r:.80}, which is not question {number} of the test"
            )
        pairs.append((q.id, response))
    return pairs


@BENCHMARKS.register("commonsense")
class Commonsense(CommonsenseTasks):
    """Commonsense: mean accuracy over eight tasks (AGI-Edgerunners/LLM-Adapters, commonsense_evaluate.py)."""

    tasks = tuple(TASKS)
    layout = (
        "<folder>/{" + ",".join(task.folder for task in TASKS.values()) + "}/test.json, from LLM-Adapters' dataset/"
    )


def _register(name: str) -> None:
    """Register a benchmark for a single task."""
    docstring = f"{TASKS[name].folder}: accuracy (AGI-Edgerunners/LLM-Adapters, commonsense_evaluate.py)."
    layout = f"<folder>/{TASKS[name].folder}/test.json, or <folder>/test.json"
    BENCHMARKS.register(name)(
        type(name, (CommonsenseTasks,), {"__doc__": docstring, "tasks": (name,), "layout": layout})
    )


for _name in TASKS:
    _register(_name)
