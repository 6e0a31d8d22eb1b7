"""The eight commonsense tasks (LLM-Adapters, commonsense_evaluate.py)."""

from __future__ import annotations

from eval.benchmarks.commonsense import RESPONSE, TASKS, completion, extract, official_prompt
from tests.official import official


@official("commonsense", "extract")
def extracted(case):
    task = next(name for name, task in TASKS.items() if task.folder == case["dataset"])
    return extract(task, case["output"])


@official("commonsense", "prompt")
def prompt(case):
    return official_prompt(case["instruction"], case.get("input") or "")


@official("commonsense", "split_response")
def split_response(decoded):
    return {"LLM-Adapters [1]": completion(decoded), "DoRA [-1]": decoded.split(RESPONSE)[-1].strip()}
