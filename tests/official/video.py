"""MVBench (OpenGVLab/Ask-Anything), Video-MME (BradyFU/Video-MME), TVQA and How2QA (VALUE-Leaderboard)."""

from __future__ import annotations

from data_pipelines.samples import Sample
from eval.benchmarks.base import Question
from eval.benchmarks.mvbench import check_ans
from eval.benchmarks.videomme import VideoMME, extract_letter
from eval.options import LETTERS
from eval.scoring import figure, score_all
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


@official("videomme", "dataset", left_out=("stdout_sha_lines",))
def dataset(case):
    assert case["skip_missing"], "the official script would ask for 300 videos of each duration"
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
        return 0.0  # what the script prints of no answers
    scores = score_all("videomme", {r["question_id"]: r["response"] for r in rows}, questions)
    return float(f"{figure(VideoMME(), questions, scores, 'official')['value']:.1f}")


@official("tvqa_how2qa", "dataset")
def value(case):
    found = {}
    for name, count in (("tvqa", 5), ("how2qa", 4)):
        details = {"options": [" " * i for i in range(count)]}
        questions = [
            Question(key, Sample(key, (), "t"), (LETTERS[answer],), key, (), details)
            for key, answer in case["gt"].items()
        ]
        responses = {key: LETTERS[answer] for key, answer in case["submission"].items()}
        scores = score_all(name, responses, questions)
        found[f"{name}_acc"] = round(100 * sum(scores[q.id].official for q in questions) / len(questions), 2)
    return found
