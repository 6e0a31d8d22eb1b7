"""`mmbench`: MMBench (Liu et al., ECCV 2024) by CircularEval, in any of its languages and versions.

A question is asked as often as it has options, each time with the options moved on by one; it is right only if every
pass is. The file as downloaded holds the passes as rows (pass k of question i has the index i + k × 1,000,000); where
it holds none, they are made here. Scorer: open-compass/VLMEvalKit, vlmeval/dataset/utils/multiple_choice.py
(mcq_circular_eval, report_acc) with vlmeval/utils/matching_util.py (can_infer), by the policy `exact_matching`: what
the rules cannot match is wrong. The leaderboard's server asks a language model there. LLaVA-1.5 ends its prompts for
the Chinese files with 请直接回答选项字母。, which `prompt` can say.
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

PASS = 1_000_000  # between the indices of a question's passes
REFERENCE = 64  # a cell as short as this holds no picture, but the index of the row that does
ABSENT = ("", "nan", "none")
FAILURE = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
DECLARED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)  # "answer is bird" too: B
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def can_infer(response: str, choices: Mapping[str, str]) -> str | None:
    """The choice that VLMEvalKit's rules read from an answer, "Z" for none of them, None for what they cannot match."""
    return infer_option(response, choices) or infer_text(response, choices)


def infer_option(response: str, choices: Mapping[str, str]) -> str | None:
    """By the letter: the only one among the words, if it is one of the last four, or what "the answer is"."""
    if FAILURE in response:
        return None
    if any(refusal in response for refusal in REFUSALS):
        return "Z"
    words = response.translate(NO_MARKS).split()
    found = [letter for letter in choices if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    if not found and "Z" in words:
        return "Z"
    declared = DECLARED.search(response)
    return declared[1].upper() if declared and declared[1].upper() in choices else None


def infer_text(response: str, choices: Mapping[str, str]) -> str | None:
    """By the choice's text: the only one inside an answer that is not much longer than all of them."""
    said = response.lower()
    if len(said) > 2 * sum(map(len, choices.values())):
        return None
    found = [letter for letter, text in choices.items() if text.lower() in said]
    return found[0] if len(found) == 1 else None


def accuracy_by_split(questions: Sequence[Question], hits: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """VLMEvalKit's report: for each split, the share (0 to 1) of questions with a hit, over all, by l2-category
    (abbreviated) and by category; NaN for a category that the split has not. `hits` is by the first pass's id."""
    worths: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    mains = [q for q in questions if q.details["index"] < PASS]
    for q in mains:
        l2, category = q.details["l2-category"], q.details["category"]
        for name in filter(None, ("Overall", ABBREVIATIONS.get(l2, l2), category)):
            worths[q.details["split"] or "none"][name].append(hits[q.id])
    names = {name for found in worths.values() for name in found}
    return {
        split: {name: float(np.mean(found[name])) if name in found else float("nan") for name in sorted(names)}
        for split, found in worths.items()
    }


@BENCHMARKS.register("mmbench")
class MMBench(Benchmark):
    """MMBench, CircularEval by exact matching (open-compass/VLMEvalKit, multiple_choice.py and matching_util.py)."""

    layout = "<folder>/mmbench_<split>….tsv or MMBench_<SPLIT>….tsv, with the pictures inside (base64)"
    splits = ("dev", "test")
    settings = ()
    prompt = LETTER_PROMPT

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        path = find_file(config.data, [f"mmbench_{split}*.tsv", f"MMBench_{split.upper()}*.tsv", "*.tsv"], self.layout)
        _only_table(path, config)
        rows = list(passes(read_table(path, "\t"), path))
        pictures = _pictures(rows, path)
        kept = [row for row in rows if config.split in (None, row.get("split") or config.split)]
        return [self._question(row, pictures.get(row["index"]), path, config) for row in kept]

    def _question(self, row: dict[str, Any], picture: Image | None, path: Path, config: EvaluationConfig) -> Question:
        where, options, answer = f"index {row['index']}", row["options"], row.get("answer", "")
        if answer not in (*ABSENT, *LETTERS[: len(options)]):
            raise UserError(f"{path}, {where}: the answer {answer!r} is none of {len(options)} options")
        hint = row.get("hint") or ""
        text = row["question"] if hint.lower() in ABSENT else f"{hint}\n{row['question']}"
        words = self.ask(config, question=text, options=option_lines(options))
        names = ("split", "l2-category", "category")
        groups = tuple(f"{name}: {row[name]}" for name in names if row.get(name))
        details = {name: row.get(name) or "" for name in names}
        details |= {"index": row["index"], "question": row["question"], "options": options}
        media = [] if picture is None else [picture]
        cluster = picture.path.name if picture is not None else str(row["index"] % PASS)
        sample = conversation(str(row["index"]), words, media, str(path))
        return Question(sample.id, sample, () if answer in ABSENT else (answer,), cluster, groups, details)

    def score(self, response: str, question: Question) -> Score:
        """One pass by itself."""
        said = can_infer(response, dict(zip(LETTERS, question.details["options"], strict=False)))
        right = float(said == question.references[0])
        return Score(right, right, unparsed=said in (None, "Z"))

    def score_all(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Score]:
        """Every pass is worth what its question is: 1 if all passes are right."""
        alone = {q.id: self.score(responses[q.id], q) for q in questions}
        groups: dict[int, list[str]] = defaultdict(list)
        for q in questions:
            groups[q.details["index"] % PASS].append(q.id)
        scores = {}
        for ids in groups.values():
            right, share = min(alone[i].official for i in ids), 1 / len(ids)
            for i in ids:
                scores[i] = Score(right, right, alone[i].unparsed, {"questions": share, "right": share * right})
        return scores

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        """The share of questions with all passes right, in percent."""
        return 100 * totals["right"] / totals["questions"]

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        hits = {i: score.official for i, score in self.score_all(responses, questions).items()}
        table = accuracy_by_split(questions, hits)
        return {
            f"accuracy of {split}": {name: share for name, share in found.items() if not np.isnan(share)}
            for split, found in table.items()
        }

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """The server's workbook (`index`, `prediction`), the same as TSV, or LLaVA's answers (`question_id`,
        `round_id`, `text`)."""
        if path.suffix in (".xlsx", ".tsv"):
            rows: list[Any] = read_workbook(path) if path.suffix == ".xlsx" else read_table(path, "\t")
            pairs = [tuple(fields(row, path, f"row {n}", "index", "prediction")) for n, row in enumerate(rows, 2)]
            return [(str(index), str(said)) for index, said in pairs]
        pairs, _ = read_answers_as(path, ("id", "response"), ("index", "prediction"), ("question_id", "text"))
        rounds = [next(typed_fields({"round_id": 0} | row, path, "a row", round_id=int)) for row in read_rows(path)]
        return [
            (str(int(i) + k * PASS) if k and i.isdecimal() else i, said)
            for (i, said), k in zip(pairs, rounds, strict=True)
        ]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """The workbook that mmbench.opencompass.org.cn takes: every pass a row, with its own options."""
        result = self.only_result(results)
        rows = [_as_submitted(row) for row in result.rows]
        _check_passes(rows, result)
        letters = LETTERS[: max(4, *(len(row["details"]["options"]) for row in result.rows))]
        columns = ("index", "question", *letters, "prediction", "answer", "category", "l2-category", "split")
        write_whole(out, workbook(columns, rows))


def _only_table(path: Path, config: EvaluationConfig) -> None:
    """Raises UserError where the folder has the split in several languages or versions: each is a benchmark."""
    split = path.name.lower().split("_")[:2]
    same = [other.name for other in path.parent.glob("*.tsv") if other.name.lower().split("_")[:2] == split]
    if len(same) > 1 and find_path(config.data).is_dir():
        raise UserError(f"{path.parent}: holds {', '.join(sorted(same))}; name the one to ask")


def passes(rows: Sequence[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """The rows with their `options`, a question's passes one after the other; made where the file has none."""
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
            yield from [row] if circular else _moved_on(row)


def _moved_on(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A question's passes: pass k begins with option k."""
    options, answer = row["options"], row.get("answer", "")
    for k in range(len(options)):
        moved = row | {"index": row["index"] + k * PASS, "options": options[k:] + options[:k]}
        if answer in tuple(LETTERS[: len(options)]):
            moved["answer"] = LETTERS[(LETTERS.index(answer) - k) % len(options)]
        yield moved


def _pictures(rows: Sequence[dict[str, Any]], path: Path) -> dict[int, Image]:
    """The picture of each row by index; rows that show the same one share it."""
    cells = {row["index"]: row.get("image") or "" for row in rows}
    known: dict[str, Image] = {}
    found = {}
    for index, cell in cells.items():
        where = f"{path}, index {index}"
        text = cells.get(int(cell), "") if len(cell) <= REFERENCE and cell.isdecimal() else cell
        if not cell:
            continue
        if text not in known:
            try:
                data = base64.b64decode(text, validate=True)
            except binascii.Error as error:
                raise UserError(f"{where}: the picture is not base64 ({error})") from None
            if not data:
                raise UserError(f"{where}: the picture is that of {cell!r}, which has none")
            known[text] = Image(path / f"{hashlib.sha256(data).hexdigest()[:16]}.jpg", data)
        found[index] = known[text]
    return found


def _as_submitted(row: Mapping[str, Any]) -> dict[str, Any]:
    details = row["details"]
    options = dict(zip(LETTERS, details["options"], strict=False))
    answer = row["references"][0] if row["references"] else ""
    return {**details, **options, "prediction": row["response"], "answer": answer}


def _check_passes(rows: Sequence[Mapping[str, Any]], result: Result) -> None:
    """Raises UserError for a question that was not asked once with each of its options first."""
    asked: dict[int, set[int]] = defaultdict(set)
    for row in rows:
        asked[row["index"] % PASS].add(row["index"] // PASS)
    for row in rows:
        question = row["index"] % PASS
        if asked[question] != set(range(len(row["options"]))):
            what = f"question {question} has {len(row['options'])} options and the passes {sorted(asked[question])}"
            raise UserError(f"{result.folder}: {what}; the server wants all of each question")
