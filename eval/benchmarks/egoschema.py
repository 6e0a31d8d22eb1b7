"""`egoschema`: what somebody does over three minutes, through their own eyes; five options (Mangalam et al., 2023).

The official code is a server (egoschema/EgoSchema, validate.py) that takes `{"<q_uid>": 0…4}` and answers with the
accuracy; Kaggle's competition takes the same as CSV. The answers to 500 of the 5,031 questions are public. How an
option is found in an answer is ours (choice.py); one that names none is wrong, and -1 in what is handed in.
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
LABEL = re.compile(r"^[A-E]\. ")  # before the options on Hugging Face


@BENCHMARKS.register("egoschema")
class EgoSchema(Benchmark):
    """EgoSchema, accuracy (egoschema/EgoSchema, validate.py; Kaggle)."""

    splits = ("subset", "full")  # the 500 with public answers, and all
    prompt = LETTER_PROMPT
    layout = """  questions.json (q_uid, question, "option 0" … "option 4")
  subset_answers.json ({"<q_uid>": 0…4}), for the split `subset`
  videos/<q_uid>.mp4
  or, as on Hugging Face (lmms-lab/egoschema), Subset/*.parquet and MC/*.parquet beside videos/"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        full = self.split(config) == "full"
        names = ["questions.json", "MC/*.parquet"] if full else ["subset_answers.json", "Subset/*.parquet"]
        path = find_file(config.data, names, self.layout)
        file, rows, answers = hugging_face(path, full) if path.suffix == ".parquet" else official(path, full)
        asked = {str(next(fields(row, file, f"row {number}", "q_uid"))): row for number, row in enumerate(rows)}
        videos = VideoFiles(
            [find_folder(config.data, ["videos", "videos/videos", "good_clips_git", "."], config.media, self.layout)]
        )
        questions = []
        for key in answers or asked:
            if answers and not (isinstance(answers[key], int) and answers[key] in range(OPTIONS)):
                raise UserError(f"{path}, {key}: the answer must be 0 to 4, found {answers[key]!r}")
            options, text = [""] * OPTIONS, ""
            if asked:
                columns = ("question", *(f"option {i}" for i in range(OPTIONS)))
                text, *options = map(str, fields(asked.get(key), file, f"q_uid {key}", *columns))
            words = self.ask(config, question=text, options=option_lines(options))
            references = (LETTERS[answers[key]],) if answers else ()
            sample = conversation(key, words, [Video(videos.find(key))], str(path))
            questions.append(Question(key, sample, references, key, (), {"options": options}))
        return questions

    def score(self, response: str, question: Question) -> Score:
        return score_choice(response, question)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """`{"<q_uid>": 0…4}`, or CSV with the columns q_uid and answer. Answers to questions of the whole set that are
        not in the subset are passed over."""
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
        """`{"<q_uid>": 0…4}` for the validation server where `out` ends in .json, else Kaggle's CSV."""
        rows = self.only_result(results, "the split full").rows
        chosen = {row["id"]: chosen_option(row["response"], row["details"]["options"]) for row in rows}
        indices = {key: -1 if index is None else index for key, index in chosen.items()}
        if out.suffix == ".json":
            write_whole(out, json_text(indices))
            return
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("q_uid", "answer"), *indices.items()])
        write_whole(out, table.getvalue())


def official(path: Path, full: bool) -> tuple[Path, list[Any], dict[str, Any]]:
    """The questions' file, its rows, and the answers by q_uid; none for all questions."""
    file, answers = path.with_name("questions.json"), {} if full else read_json(path)
    rows = read_json(file) if file.is_file() else []
    if not isinstance(answers, dict) or not isinstance(rows, list):
        raise UserError(f"{path}: expected an object of answers by q_uid, and a list in questions.json")
    return file, rows, answers


def hugging_face(path: Path, full: bool) -> tuple[Path, list[Any], dict[str, Any]]:
    """As `official`, of a Parquet file: there q_uid is video_idx, and an answer the text of its number."""
    rows, answers = [], {}
    for number, row in enumerate(read_parquet(path)):
        where = f"row {number}"
        key, asked, options = fields(row, path, where, "video_idx", "question", "option")
        if not isinstance(options, list) or len(options) != OPTIONS:
            raise UserError(f"{path}, {where}: expected {OPTIONS} options, found {options!r:.60}")
        texts = {f"option {i}": LABEL.sub("", str(option)) for i, option in enumerate(options)}
        rows.append({"q_uid": key, "question": asked} | texts)
        if not full:
            answer = str(next(fields(row, path, where, "answer")))
            answers[str(key)] = int(answer) if answer.isdecimal() else answer
    return path, rows, answers


def letter(value: object, path: Path, key: str) -> str:
    """The option's letter for its number; "" for -1, no option. Raises UserError for anything else."""
    text = str(value).strip()
    if text == "-1":
        return ""
    if text not in map(str, range(OPTIONS)):
        raise UserError(f"{path}, {key}: the answer must be 0 to 4, found {value!r}")
    return LETTERS[int(text)]
