"""ScienceQA (LLaVA's and the official script) and MMBench's CircularEval (VLMEvalKit)."""

from __future__ import annotations

from data_pipelines.samples import Sample
from eval.benchmarks import Question
from eval.benchmarks.mmbench import PASS, MMBench, accuracy_by_split, can_infer
from eval.benchmarks.scienceqa import FAILED, ScienceQA, answer_index, breakdown
from eval.options import LETTERS
from tests.official import official


@official("scienceqa", "parse_4choices")
def parse_four(text):
    return {"pred_idx": answer_index(text, 4)}


@official("scienceqa", "parse_2choices")
def parse_two(text):
    return {"pred_idx": answer_index(text, 2)}


@official("scienceqa", "dataset")
def science(case):
    predictions = {p["question_id"]: p for p in case["predictions"]}
    about = {"hint": "", "grade": "grade1", "subject": "natural science", "topic": "physics"}
    questions = []
    for i, problem in case["problems"].items():
        image = "<image>" in predictions.get(i, {"prompt": ""})["prompt"]
        details = {"choices": len(problem["choices"]), "answer": problem["answer"], "image": image, **about}
        questions.append(Question(i, Sample(i, (), ""), (LETTERS[problem["answer"]],), i, (), details))
    responses = {q.id: predictions[q.id]["text"] if q.id in predictions else FAILED for q in questions}
    correct = sum(s.official for s in ScienceQA().score_all(responses, questions).values())
    extras = ScienceQA().extras(responses, questions)
    if extras["img_accuracy"] is None:
        return {"error": "ZeroDivisionError"}  # the official script fails here; ours reports no figure
    return {
        "acc": extras["acc_average"],
        "correct": int(correct),
        "count": len(questions),
        "img_accuracy": round(extras["img_accuracy"], 2),
    }


@official("scienceqa_official_breakdown", "dataset")
def science_breakdown(case):
    problems = {i: problem for i, problem in case["problems"].items() if problem["split"] == "test"}
    found = breakdown(problems, {i: int(index) for i, index in case["results"].items()})
    return {name: -1 if value is None else f"{value:.2f}" for name, value in found.items()}


@official("mmbench_circular", "can_infer")
def inferred(case):
    return can_infer(case["prediction"], case["choices"]) or False


@official("mmbench_circular", "circular")
def circular(groups):
    questions, responses = [], {}
    for group in groups:
        about = {"category": group["category"], "l2-category": group["l2"], "split": group["split"]}
        passes = zip(group["rolled_options"], group["rolled_answers"], group["predictions"], strict=True)
        for k, (options, answer, response) in enumerate(passes):
            index = group["index"] + k * PASS
            q = Question(
                str(index), Sample("", (), ""), (answer,), "", (), {"index": index, "options": options, **about}
            )
            questions.append(q)
            responses[q.id] = response
    hits = {i: s.official for i, s in MMBench().score_all(responses, questions).items()}
    return {
        "hit": {str(group["index"]): int(hits[str(group["index"])]) for group in groups},
        "acc_by_split": accuracy_by_split(questions, hits),
    }
