"""MVBench (OpenGVLab/Ask-Anything), Video-MME (BradyFU/Video-MME), TVQA and How2QA (VALUE-Leaderboard)."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipelines.samples import Sample
from eval.benchmarks import BENCHMARKS
from eval.benchmarks.base import Question
from eval.benchmarks.mvbench import check_ans
from eval.benchmarks.videomme import VideoMME, extract_letter
from eval.options import LETTERS
from eval.predictions import read_predictions
from eval.scoring import figure, score_all
from mmdora.core.errors import UserError
from tests.official import official


@official("mvbench", "check_ans")
def checked(case):
    try:
        return check_ans(case["pred"], case["gt"])
    except IndexError:
        return {"error": "IndexError"}


@official("videomme", "extract")
def extracted(response):
    return extract_letter(response)


@official("videomme", "dataset", ignored=("stdout_sha_lines",))
def dataset(case):
    assert case["skip_missing"], "the official script requires 300 videos of each duration"
    overall, everything = [], []
    for duration in case["video_types"]:
        videos = [v for v in case["results"] if v["duration_category"] == duration and not v["missing"]]
        rows = [row for video in videos for row in video["questions"]]
        everything += rows
        overall.append(percent(rows))
    return {"overall_per_type_then_all": [*overall, percent(everything)]}


def percent(rows):
    questions = [Question(r["question_id"], Sample("", (), ""), (r["answer"],), r["question_id"]) for r in rows]
    if not questions:
        return 0.0  # what the script prints without answers
    scores = score_all("videomme", {r["question_id"]: r["response"] for r in rows}, questions)
    return float(f"{figure(VideoMME(), questions, scores, 'official')['value']:.1f}")


@official("tvqa_how2qa", "dataset")
def value(case):
    details = {"options": [" " * i for i in range(5)]}
    gold = {key: LETTERS[answer] for key, answer in case["gt"].items()}
    questions = [Question(key, Sample(key, (), "t"), (letter,), key, (), details) for key, letter in gold.items()]
    with TemporaryDirectory() as folder:
        file = Path(folder, "predictions.json")
        file.write_text(json.dumps(case["submission"]))
        return {f"{name}_acc": accuracy(name, file, questions) for name in ("tvqa", "how2qa")}


def accuracy(name, file, questions):
    try:
        responses = read_predictions(file, BENCHMARKS[name](), questions)
    except UserError:  # in the words of the recorded official exceptions
        missing = [q.id for q in questions if q.id not in json.loads(file.read_text())]
        faults = {"tvqa": f"KeyError: {', '.join(missing[:1])}", "how2qa": "AssertionError: submission qids != GT qids"}
        return {"error": faults[name]}
    scores = score_all(name, responses, questions)
    return round(100 * sum(scores[q.id].official for q in questions) / len(questions), 2)
