"""TextVQA and ST-VQA (facebookresearch/mmf), and LLaVA's extraction of a question from its prompt."""

from __future__ import annotations

from eval.benchmarks.stvqa import anls, stvqa_accuracy
from eval.benchmarks.textvqa import ANNOTATORS, question_in_llava_prompt, textvqa_accuracy
from eval.benchmarks.vqa import evalai_normalize
from tests.official import official


@official("textvqa", "normalize")
def normalized(text):
    return evalai_normalize(text)


@official("textvqa", "question_textvqa")
def question(case):
    if len(case["answers"]) != ANNOTATORS:  # the benchmark refuses the file
        return {"error": "AssertionError (needs exactly 10 answers)"}
    return textvqa_accuracy(case["prediction"], case["answers"])


@official("textvqa", "dataset_textvqa")
def dataset(rows):
    return sum(textvqa_accuracy(row["pred_answer"], row["gt_answers"]) for row in rows) / len(rows)


@official("textvqa", "stvqa_acc")
def stvqa(case):
    return stvqa_accuracy(case["prediction"], case["answers"])


@official("textvqa", "anls")
def average_normalized_levenshtein_similarity(case):
    if not case["prediction"].strip() and not any(answer.strip() for answer in case["answers"]):
        return {"error": "ZeroDivisionError"}  # of the official code; ours returns a value
    return anls(case["prediction"], case["answers"])


@official("textvqa_llava_prompt", "llava_prompt_processor")
def question_of_prompt(prompt):
    question = question_in_llava_prompt(prompt)
    return {"error": "AssertionError"} if question is None else question
