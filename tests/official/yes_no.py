"""MME (eval_tool, calculation.py) and POPE (evaluate.py)."""

from __future__ import annotations

import math
from dataclasses import asdict

from data_pipelines.samples import Sample
from eval.benchmarks import Question, mme, pope
from eval.scoring import score_table
from tests.official import official


def totals(benchmark, responses, questions):
    scores = benchmark.score_all(responses, questions)
    return score_table([asdict(scores[q.id]) for q in questions], [q.cluster for q in questions]).whole()


@official("mme", "parse")
def mme_parse(text):
    return mme.parse(text)


@official("mme", "dataset")
def mme_dataset(tasks):
    questions, responses = [], {}
    for task, lines in tasks.items():
        for number, (image, _, answer, response) in enumerate(lines):
            details = {"task": task, "pair": f"{task}/{image}"}
            q = Question(f"{task}/{number}", Sample("", (), ""), (answer.lower(),), image, (), details)
            questions.append(q)
            responses[q.id] = response
    points = {task: float(value[0]) for task, value in mme.task_scores(totals(mme.MME(), responses, questions)).items()}
    sums = {
        group: sum(v for task, v in points.items() if mme.GROUP[task] == group) for group in set(mme.GROUP.values())
    }
    return {"per_task": points, **sums}


@official("pope", "parse")
def pope_parse(text):
    return pope.parse(text)


@official("pope", "dataset")
def pope_dataset(case):
    questions, responses = [], {}
    for number, (response, label) in enumerate(zip(case["answers"], case["labels"], strict=True)):
        q = Question(str(number), Sample("", (), ""), (label,), str(number), (), {"category": "random"})
        questions.append(q)
        responses[q.id] = response
    sums = totals(pope.POPE(), responses, questions)
    found = {name: float(value[0]) for name, value in pope.by_category(sums, "official")["random"].items()}
    if any(math.isnan(value) for value in found.values()):
        return {"error": "ZeroDivisionError"}  # the official script fails here; ours reports no figure
    cells = {cell.upper(): int(sums[f"random official {cell}"][0]) for cell in pope.CELLS}
    found["f1_score"] = found.pop("f1")
    return cells | found
