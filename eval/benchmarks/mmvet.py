"""MM-Vet (Yu et al., ICML 2024): open questions that need several capabilities at once, graded by a language model.

Data: mm-vet.json, an object of questions by id, beside images/.

Scorer: yuweihao/MM-Vet, mm-vet_evaluator.ipynb. A judge grades each response from 0.0 to 1.0 in tenths. The headline is
the mean in percent; it is also given for the questions that need a capability ("capability: ocr") and for those that
need exactly a set of them ("integration: ocr + math"). The official judge is gpt-4-0613 at temperature 0 with a
few-shot prompt. The prompt here has its own wording and examples for the same rules, so compare figures only with those
of the same judge and prompt. Without a judge there is no score. If a verdict stays unreadable after retries, the
official code scores 0; here it is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.samples import Image
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.files import json_text, write_whole
from eval.layout import find_file, find_folder, read_answers_as, read_json, typed
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

PROMPT = """You grade an answer to a question about a picture against the reference. You do not see the picture; the \
reference is right.

Give a grade of 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 or 1.0: how much of what the reference says the \
answer says too, in whatever words. 1.0 is wholly right and 0.0 wholly wrong. Where the reference joins parts by \
<AND>, the answer is wholly right only if it has them all; where it joins them by <OR>, any one of them will do. \
What the answer says beyond the reference costs nothing, unless it contradicts it.

Examples:
Question: Which two cities does the sign name?
Reference: Lyon <AND> Dijon
Answer: Paris and Rome
Grade: 0.0
Question: Which two cities does the sign name?
Reference: Lyon <AND> Dijon
Answer: It points to Dijon.
Grade: 0.5
Question: What is on the plate?
Reference: pasta <OR> noodles
Answer: A bowl-shaped plate of noodles with basil.
Grade: 1.0
Question: Why is the drawing funny?
Reference: A cat in a tie chairs a meeting of dogs, who all took off their collars to look serious for it.
Answer: Because a cat leads a meeting.
Grade: 0.4

Reply with the grade alone.

Question: {question}
Reference: {reference}
Answer: {answer}
Grade:"""
GRADE = re.compile(r"\s*([01](?:\.\d+)?)(?![\d.]*\d)")  # at the start, as in the official code


@BENCHMARKS.register("mmvet")
class MMVet(Benchmark):
    """MM-Vet: grades by a judge, per capability and integration (yuweihao/MM-Vet, mm-vet_evaluator.ipynb)."""

    prompt = "{question}"
    max_new_tokens = 1024
    has_official = False
    splits = ("test",)
    layout = """mm-vet.json
images/v1_0.png"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        self.split(config)
        path = find_file(config.data, ["mm-vet.json", "*/mm-vet.json"], self.layout)
        images = find_folder(config.data, ["images", "mm-vet/images"], config.media, self.layout)
        rows = read_json(path)
        if not isinstance(rows, dict):
            raise UserError(f"{path}: expected an object of questions by id")
        questions = []
        for question_id, row in rows.items():
            where = f"question {question_id}"
            name, question_text, answer = (
                typed(row, path, where, key, str) for key in ("imagename", "question", "answer")
            )
            capabilities = sorted({str(ability) for ability in typed(row, path, where, "capability", list)})
            categories = (*(f"capability: {c}" for c in capabilities), f"integration: {' + '.join(capabilities)}")
            sample = conversation(
                question_id, self.format_prompt(config, question=question_text), [Image(images / name)]
            )
            questions.append(Question(question_id, sample, (answer,), name, categories, {"question": question_text}))
        return questions

    def score(self, response: str, question: Question) -> Score:
        return Score(math.nan, math.nan)  # only the judge scores

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the official format (an object of answers by question id), LLaVA's answers or mmdora's responses.jsonl.

        LLaVA's answers are JSON lines of `text` and `question_id`, the number at the end of the official id.
        """
        content = read_json(path) if path.suffix != ".jsonl" else []
        if not isinstance(content, dict):
            pairs, form = read_answers_as(path, ("id", "response"), ("question_id", "text"))
            return [(f"v1_{i}" if form[0] == "question_id" and i.isdecimal() else i, response) for i, response in pairs]
        return [(question_id, typed(content, path, "the file", question_id, str)) for question_id in content]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write the input of MM-Vet's evaluator: an object of answers by question id."""
        result = self.single_result(results)
        write_whole(out, json_text({row["id"]: row["response"] for row in result.rows}))

    def judge_prompt(self, response: str, question: Question) -> str:
        reference = question.references[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return PROMPT.format(question=question.details["question"], reference=reference, answer=response)

    def judge_score(self, verdict: str) -> float | None:
        match = GRADE.match(verdict)
        value = float(match.group(1)) if match else None
        return value if value is not None and value <= 1.0 else None
