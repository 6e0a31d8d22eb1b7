"""MMBench (Liu et al., ECCV 2024) with CircularEval, in all its languages and versions.

Data: one TSV file per split, with images as base64. CircularEval asks each question once per option (one pass each),
with the options rotated by one place; a question is correct only if every pass is. The file as downloaded may hold the
passes as rows (pass k of question i has the index i + k × 1,000,000); otherwise they are generated here.

Prompt: LLaVA-1.5's. For the Chinese files LLaVA-1.5 ends the prompt with 请直接回答选项字母。; set `prompt` for that.

Scorer: open-compass/VLMEvalKit, vlmeval/dataset/utils/multiple_choice.py (mcq_circular_eval, report_acc) with
vlmeval/utils/matching_util.py (can_infer) and the policy `exact_matching`: a response that the rules cannot match is
wrong. The leaderboard's server asks a language model in that case.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.samples import Image
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.choice import LETTER_PROMPT
from eval.files import write_whole
from eval.layout import fields, find_file, read_answers_as, read_rows, read_table, typed_fields
from eval.metrics import Totals
from eval.options import LETTERS, option_lines
from eval.results import Result
from eval.workbook import read_workbook, workbook
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

PASS = 1_000_000  # index offset between the passes of a question
REFERENCE = 64  # an image cell of at most this length holds the index of the row that has the image
ABSENT = ("", "nan", "none")
FAILURE = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Quirk: "answer is bird" reads as B.
DECLARED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def can_infer(response: str, choices: Mapping[str, str]) -> str | None:
    """Return the choice that VLMEvalKit's rules read from a response: "Z" for a refusal, None if no rule matches."""
    return infer_option(response, choices) or infer_text(response, choices)


def infer_option(response: str, choices: Mapping[str, str]) -> str | None:
    """Match by letter: the only one among the words, if it is among the last four, or the one after "answer is"."""
    if FAILURE in response:
        return None
    if any(refusal in response for refusal in REFUSALS):
        return "Z"
    words = response.translate(NO_MARKS).split()
    matches = [letter for letter in choices if letter in words]
    if len(matches) == 1 and words.index(matches[0]) > len(words) - 5:
        return matches[0]
    if not matches and "Z" in words:
        return "Z"
    declared = DECLARED.search(response)
    return declared[1].upper() if declared and declared[1].upper() in choices else None


def infer_text(response: str, choices: Mapping[str, str]) -> str | None:
    """Match by text: the only choice inside a response of at most twice the length of all choices."""
    lowered = response.lower()
    if len(lowered) > 2 * sum(map(len, choices.values())):
        return None
    matches = [letter for letter, text in choices.items() if text.lower() in lowered]
    return matches[0] if len(matches) == 1 else None


def accuracy_by_split(questions: Sequence[Question], hits: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return VLMEvalKit's report: accuracy (0 to 1) per split, overall, by l2-category (abbreviated) and by category.

    NaN for a category that a split lacks. The keys of `hits` are the ids of the first passes.
    """
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    mains = [q for q in questions if q.details["index"] < PASS]
    for q in mains:
        l2, category = q.details["l2-category"], q.details["category"]
        for name in filter(None, ("Overall", ABBREVIATIONS.get(l2, l2), category)):
            values[q.details["split"] or "none"][name].append(hits[q.id])
    names = {name for by_name in values.values() for name in by_name}
    return {
        split: {name: float(np.mean(by_name[name])) if name in by_name else float("nan") for name in sorted(names)}
        for split, by_name in values.items()
    }


@BENCHMARKS.register("mmbench")
class MMBench(Benchmark):
    """MMBench: CircularEval accuracy by exact matching (open-compass/VLMEvalKit, multiple_choice.py)."""

    layout = "<folder>/mmbench_<split>….tsv or MMBench_<SPLIT>….tsv, with base64 images"
    splits = ("dev", "test")
    settings = ()
    prompt = LETTER_PROMPT

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        path = find_file(config.data, [f"mmbench_{split}*.tsv", f"MMBench_{split.upper()}*.tsv", "*.tsv"], self.layout)
        _only_table(path, config)
        rows = list(passes(read_table(path, "\t"), path))
        images = _images(rows, path)
        kept = [row for row in rows if config.split in (None, row.get("split") or config.split)]
        return [self._question(row, images.get(row["index"]), path, config) for row in kept]

    def _question(self, row: dict[str, Any], image: Image | None, path: Path, config: EvaluationConfig) -> Question:
        where, options, answer = f"index {row['index']}", row["options"], row.get("answer", "")
        if answer not in (*ABSENT, *LETTERS[: len(options)]):
            raise UserError(f"{path}, {where}: the answer {answer!r} is not one of the {len(options)} options")
        hint = row.get("hint") or ""
        text = row["question"] if hint.lower() in ABSENT else f"{hint}\n{row['question']}"
        prompt = self.format_prompt(config, question=text, options=option_lines(options))
        names = ("split", "l2-category", "category")
        groups = tuple(f"{name}: {row[name]}" for name in names if row.get(name))
        details = {name: row.get(name) or "" for name in names}
        details |= {"index": row["index"], "question": row["question"], "options": options}
        media = [] if image is None else [image]
        cluster = image.path.name if image is not None else str(row["index"] % PASS)
        sample = conversation(str(row["index"]), prompt, media, str(path))
        return Question(sample.id, sample, () if answer in ABSENT else (answer,), cluster, groups, details)

    def score(self, response: str, question: Question) -> Score:
        """Score a single pass."""
        predicted = can_infer(response, dict(zip(LETTERS, question.details["options"], strict=False)))
        correct = float(predicted == question.references[0])
        return Score(correct, correct, unparsed=predicted in (None, "Z"))

    def score_all(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Score]:
        """Give every pass the score of its question: 1 if all passes are correct."""
        single = {q.id: self.score(responses[q.id], q) for q in questions}
        groups: dict[int, list[str]] = defaultdict(list)
        for q in questions:
            groups[q.details["index"] % PASS].append(q.id)
        scores = {}
        for ids in groups.values():
            correct, share = min(single[i].official for i in ids), 1 / len(ids)
            for i in ids:
                scores[i] = Score(correct, correct, single[i].unparsed, {"questions": share, "right": share * correct})
        return scores

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        """Return the percentage of questions with all passes correct."""
        return 100 * totals["right"] / totals["questions"]

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        hits = {i: score.official for i, score in self.score_all(responses, questions).items()}
        table = accuracy_by_split(questions, hits)
        return {
            f"accuracy of {split}": {name: value for name, value in by_name.items() if not np.isnan(value)}
            for split, by_name in table.items()
        }

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the server's workbook or TSV (`index`, `prediction`), or LLaVA's answers.

        LLaVA's answers are JSON lines of `question_id`, `round_id` and `text`.
        """
        if path.suffix in (".xlsx", ".tsv"):
            rows: list[Any] = read_workbook(path) if path.suffix == ".xlsx" else read_table(path, "\t")
            pairs = [tuple(fields(row, path, f"row {n}", "index", "prediction")) for n, row in enumerate(rows, 2)]
            return [(str(index), str(response)) for index, response in pairs]
        pairs, _ = read_answers_as(path, ("id", "response"), ("index", "prediction"), ("question_id", "text"))
        rounds = [next(typed_fields({"round_id": 0} | row, path, "a row", round_id=int)) for row in read_rows(path)]
        return [
            (str(int(i) + k * PASS) if k and i.isdecimal() else i, response)
            for (i, response), k in zip(pairs, rounds, strict=True)
        ]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write the workbook for mmbench.opencompass.org.cn: one row per pass, with the options of that pass."""
        result = self.single_result(results)
        rows = [_as_submitted(row) for row in result.rows]
        _check_passes(rows, result)
        letters = LETTERS[: max(4, *(len(row["details"]["options"]) for row in result.rows))]
        columns = ("index", "question", *letters, "prediction", "answer", "category", "l2-category", "split")
        write_whole(out, workbook(columns, rows))


def _only_table(path: Path, config: EvaluationConfig) -> None:
    """Raise UserError if the folder has the split in several languages or versions: each is a benchmark of its own."""
    split = path.name.lower().split("_")[:2]
    tables = [other.name for other in path.parent.glob("*.tsv") if other.name.lower().split("_")[:2] == split]
    if len(tables) > 1 and find_path(config.data).is_dir():
        raise UserError(f"{path.parent}: holds {', '.join(sorted(tables))}; set `data` to one of these files")


def passes(rows: Sequence[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows with their `options`, grouped by question; generate the passes if the file has none."""
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for number, row in enumerate(rows, 2):
        index, *_ = fields(row, path, f"row {number}", "index", "question", "A", "B")
        if not index.isdecimal():
            raise UserError(f"{path}, row {number}: the index {index!r} is not a whole number")
        given = [row.get(letter) or "" for letter in LETTERS[:5]]
        options = given[: next((i for i, option in enumerate(given) if option.lower() in ABSENT), len(given))]
        if not options:
            raise UserError(f"{path}, row {number}: has no options")
        groups[int(index) % PASS].append({**row, "index": int(index), "options": options})
    circular = any(row["index"] >= PASS for group in groups.values() for row in group)
    for group in groups.values():
        for row in sorted(group, key=lambda row: row["index"]):
            yield from [row] if circular else _rotations(row)


def _rotations(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a question's passes: pass k starts with option k."""
    options, answer = row["options"], row.get("answer", "")
    for k in range(len(options)):
        rotated = row | {"index": row["index"] + k * PASS, "options": options[k:] + options[:k]}
        if answer in tuple(LETTERS[: len(options)]):
            rotated["answer"] = LETTERS[(LETTERS.index(answer) - k) % len(options)]
        yield rotated


def _images(rows: Sequence[dict[str, Any]], path: Path) -> dict[int, Image]:
    """Return the image of each row by index; rows with the same image share one object."""
    cells = {row["index"]: row.get("image") or "" for row in rows}
    images_by_cell: dict[str, Image] = {}
    images = {}
    for index, cell in cells.items():
        where = f"{path}, index {index}"
        text = cells.get(int(cell), "") if len(cell) <= REFERENCE and cell.isdecimal() else cell
        if not cell:
            continue
        if text not in images_by_cell:
            try:
                data = base64.b64decode(text, validate=True)
            except binascii.Error as error:
                raise UserError(f"{where}: the image is not valid base64 ({error})") from None
            if not data:
                raise UserError(f"{where}: the image refers to row {cell!r}, which has none")
            images_by_cell[text] = Image(path / f"{hashlib.sha256(data).hexdigest()[:16]}.jpg", data)
        images[index] = images_by_cell[text]
    return images


def _as_submitted(row: Mapping[str, Any]) -> dict[str, Any]:
    details = row["details"]
    options = dict(zip(LETTERS, details["options"], strict=False))
    answer = row["references"][0] if row["references"] else ""
    return {**details, **options, "prediction": row["response"], "answer": answer}


def _check_passes(rows: Sequence[Mapping[str, Any]], result: Result) -> None:
    """Raise UserError for a question that lacks one of its passes."""
    passes_by_question: dict[int, set[int]] = defaultdict(set)
    for row in rows:
        passes_by_question[row["index"] % PASS].add(row["index"] // PASS)
    for row in rows:
        question = row["index"] % PASS
        found, expected = passes_by_question[question], len(row["options"])
        if found != set(range(expected)):
            problem = f"question {question} has {expected} options, but the passes {sorted(found)}"
            raise UserError(f"{result.folder}: {problem}; the server needs all passes of each question")
