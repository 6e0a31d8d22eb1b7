"""EgoSchema (Mangalam et al., 2023): multiple choice with five options about three-minute egocentric videos.

Data: questions.json and subset_answers.json, or the Parquet files on Hugging Face, beside the videos. The answers to
500 of the 5,031 questions are public (split `subset`).

Scorer: a server (egoschema/EgoSchema, validate.py) that takes `{"<q_uid>": 0…4}` and returns the accuracy; Kaggle's
competition takes the same as CSV. How to extract an option from a response is not defined officially; choice.py does
it. A response that names no option is wrong, and -1 in the submission.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.samples import Video
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.choice import LETTER_PROMPT, chosen_option, score_choice
from eval.files import json_text, write_whole
from eval.layout import fields, find_file, find_folder, read_json, read_parquet, read_predicted, read_table
from eval.options import LETTERS, option_lines
from eval.results import Result
from eval.videos import VideoFiles
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

OPTIONS = 5
LABEL = re.compile(r"^[A-E]\. ")  # prefix of the options on Hugging Face


@BENCHMARKS.register("egoschema")
class EgoSchema(Benchmark):
    """EgoSchema: accuracy with five options (egoschema/EgoSchema, validate.py; Kaggle)."""

    splits = ("subset", "full")  # the 500 questions with public answers, and all questions
    prompt = LETTER_PROMPT
    layout = """  questions.json (q_uid, question, "option 0" … "option 4")
  subset_answers.json ({"<q_uid>": 0…4}), for the split `subset`
  videos/<q_uid>.mp4
  or, as on Hugging Face (lmms-lab/egoschema), Subset/*.parquet and MC/*.parquet beside videos/"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        full = self.split(config) == "full"
        names = ["questions.json", "MC/*.parquet"] if full else ["subset_answers.json", "Subset/*.parquet"]
        path = find_file(config.data, names, self.layout)
        read = read_parquet_files if path.suffix == ".parquet" else read_official_files
        file, rows, answers = read(path, full)
        rows_by_id = {str(next(fields(row, file, f"row {number}", "q_uid"))): row for number, row in enumerate(rows)}
        videos = VideoFiles(
            [find_folder(config.data, ["videos", "videos/videos", "good_clips_git", "."], config.media, self.layout)]
        )
        questions = []
        for key in answers or rows_by_id:
            if answers and not (isinstance(answers[key], int) and answers[key] in range(OPTIONS)):
                raise UserError(f"{path}, {key}: the answer must be 0 to 4, found {answers[key]!r}")
            options, text = [""] * OPTIONS, ""
            if rows_by_id:
                columns = ("question", *(f"option {i}" for i in range(OPTIONS)))
                text, *options = map(str, fields(rows_by_id.get(key), file, f"q_uid {key}", *columns))
            prompt = self.format_prompt(config, question=text, options=option_lines(options))
            references = (LETTERS[answers[key]],) if answers else ()
            sample = conversation(key, prompt, [Video(videos.find(key))], str(path))
            questions.append(Question(key, sample, references, key, (), {"options": options}))
        return questions

    def score(self, response: str, question: Question) -> Score:
        return score_choice(response, question)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read `{"<q_uid>": 0…4}`, or CSV with the columns q_uid and answer.

        For the subset, answers to the other questions of the whole set are ignored.
        """
        if path.suffix == ".csv":
            rows = read_table(path)
            pairs = [tuple(fields(row, path, f"row {i}", "q_uid", "answer")) for i, row in enumerate(rows, 1)]
        elif path.suffix == ".json" and isinstance(saved := read_predicted(path), dict):
            pairs = list(saved.items())
        else:
            return super().read_predictions(path, questions)
        subset = {q.id for q in questions} if all(q.references for q in questions) else None
        kept = [(key, value) for key, value in pairs if subset is None or key in subset]
        return [(key, letter(value, path, key)) for key, value in kept]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write `{"<q_uid>": 0…4}` for the validation server if `out` ends in .json, else Kaggle's CSV."""
        rows = self.single_result(results, "the split full").rows
        chosen = {row["id"]: chosen_option(row["response"], row["details"]["options"]) for row in rows}
        indices = {key: -1 if index is None else index for key, index in chosen.items()}
        if out.suffix == ".json":
            write_whole(out, json_text(indices))
            return
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("q_uid", "answer"), *indices.items()])
        write_whole(out, table.getvalue())


def read_official_files(path: Path, full: bool) -> tuple[Path, list[Any], dict[str, Any]]:
    """Return the question file, its rows, and the answers by q_uid (empty for the full set)."""
    file, answers = path.with_name("questions.json"), {} if full else read_json(path)
    rows = read_json(file) if file.is_file() else []
    if not isinstance(answers, dict) or not isinstance(rows, list):
        raise UserError(f"{path}: expected an object of answers by q_uid, and a list in questions.json")
    return file, rows, answers


def read_parquet_files(path: Path, full: bool) -> tuple[Path, list[Any], dict[str, Any]]:
    """Return the same from a Parquet file, where q_uid is video_idx and an answer is a digit as text."""
    rows, answers = [], {}
    for number, row in enumerate(read_parquet(path)):
        where = f"row {number}"
        key, question, options = fields(row, path, where, "video_idx", "question", "option")
        if not isinstance(options, list) or len(options) != OPTIONS:
            raise UserError(f"{path}, {where}: expected {OPTIONS} options, found {options!r:.60}")
        texts = {f"option {i}": LABEL.sub("", str(option)) for i, option in enumerate(options)}
        rows.append({"q_uid": key, "question": question} | texts)
        if not full:
            answer = str(next(fields(row, path, where, "answer")))
            answers[str(key)] = int(answer) if answer.isdecimal() else answer
    return path, rows, answers


def letter(value: object, path: Path, key: str) -> str:
    """Return the letter of an option index, "" for -1 (no option). Raise UserError for other values."""
    text = str(value).strip()
    if text == "-1":
        return ""
    if text not in map(str, range(OPTIONS)):
        raise UserError(f"{path}, {key}: the answer must be 0 to 4, found {value!r}")
    return LETTERS[int(text)]
