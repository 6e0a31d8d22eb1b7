"""TextVQA (Singh et al., CVPR 2019): questions about text in images.

Data: one JSON file per split with ten answers per question, an OCR file, and the OpenImages images.

Prompt: LLaVA-1.5's, with Rosetta's OCR tokens: its published accuracy, 58.2, was measured with them. LLaVA's file
(haotian-liu/LLaVA, playground/data/eval/textvqa/llava_textvqa_val_v051_ocr.jsonl) is read too. A prompt without `{ocr}`
needs no OCR file. As in LLaVA's file, the question is capitalised: first letter upper case, the rest lower case.

Scorer: facebookresearch/mmf, mmf/utils/m4c_evaluators.py, TextVQAAccuracyEvaluator: VQA accuracy with prediction and
answers normalised as on EvalAI, whether or not the annotators agree.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.samples import Image
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.vqa import evalai_normalize, leave_one_out
from eval.files import json_text, write_whole
from eval.layout import fields, find_file, find_folder, read_answers_as, read_json, read_jsonl, read_rows, typed
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

ANNOTATORS = 10


@BENCHMARKS.register("textvqa")
class TextVQA(Benchmark):
    """TextVQA: accuracy against ten human answers (facebookresearch/mmf, m4c_evaluators.py)."""

    splits = ("val", "test", "train")
    max_new_tokens = 32
    prompt = "{question}\nReference OCR token: {ocr}\nAnswer the question using a single word or phrase."
    layout = """TextVQA_0.5.1_val.json
TextVQA_Rosetta_OCR_v0.2_val.json   (or LLaVA's llava_textvqa_val_v051_ocr.jsonl; for prompts with {ocr})
train_images/003a8ae2ef43b901.jpg   (train and val; test_images/ for test)"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        path = self.annotations(config)
        tokens = self.ocr_tokens(config)
        rows = typed(read_json(path), path, "the file", "data", list)
        name = "test_images" if "test" in path.stem else "train_images"
        images = find_folder(config.data, [name, f"images/{name}"], config.media, self.layout)
        questions = []
        for number, row in enumerate(rows):
            where = f"question {number}"
            question_id, (image_id, question_text) = (
                typed(row, path, where, "question_id", int),
                row_key(row, path, where),
            )
            answers = tuple(typed(row, path, where, "answers", list)) if "answers" in row else ()
            if answers and (len(answers) != ANNOTATORS or not all(isinstance(answer, str) for answer in answers)):
                raise UserError(f"{path}, {where}: expected {ANNOTATORS} strings as answers, found {len(answers)}")
            text = self.format_prompt(config, question=question_text.capitalize(), ocr=tokens.get(image_id, ""))
            sample = conversation(str(question_id), text, [Image(images / f"{image_id}.jpg")])
            details = {"image_id": image_id, "question": question_text}
            questions.append(Question(sample.id, sample, answers, image_id, details=details))
        return questions

    def annotations(self, config: EvaluationConfig) -> Path:
        name = f"TextVQA_0.5.1_{self.split(config)}.json"
        return find_file(config.data, [name, f"*/{name}"], self.layout)

    def ocr_file(self, config: EvaluationConfig) -> Path | None:
        """Return the path of the OCR file, whether or not it exists; None if the prompt has no `{ocr}`."""
        if "{ocr}" not in (config.prompt or self.prompt):
            return None
        split = self.annotations(config).stem.rpartition("_")[2]
        names = (f"TextVQA_Rosetta_OCR_v0.2_{split}.json", f"llava_textvqa_{split}_v051_ocr.jsonl")
        root = find_path(config.data)
        root = root.parent if root.is_file() else root
        places = (place for name in names for place in (root / name, *sorted(root.glob(f"*/{name}"))))
        return next((place for place in places if place.is_file()), root / names[0])

    def missing_input(self, config: EvaluationConfig) -> str | None:
        path = self.ocr_file(config)
        if path is None or path.is_file():
            return None
        return (
            f"{path}: no such file; the prompt has {{ocr}}, the OCR tokens, as LLaVA-1.5's does. Download it, or set a "
            f"prompt without {{ocr}}; expected layout:\n{self.layout}"
        )

    def ocr_tokens(self, config: EvaluationConfig) -> dict[str, str]:
        """Return the OCR tokens by image id; empty if the file is missing, which only `missing_input` reports."""
        path = self.ocr_file(config)
        if path is None or not path.is_file():
            return {}
        if path.suffix == ".jsonl":
            return dict(read_llava_ocr(row, path, f"row {number}") for number, row in enumerate(read_jsonl(path)))
        tokens = {}
        for number, row in enumerate(typed(read_json(path), path, "the file", "data", list)):
            ocr_tokens = typed(row, path, f"image {number}", "ocr_tokens", list)
            tokens[typed(row, path, f"image {number}", "image_id", str)] = ", ".join(map(str, ocr_tokens))
        return tokens

    def score(self, response: str, question: Question) -> Score:
        value = textvqa_accuracy(response, question.references)
        return Score.free_text(value, response)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read EvalAI's format, `[{"question_id", "answer"}]`, LLaVA's answers or mmdora's responses.jsonl.

        LLaVA's answers are JSON lines of `question_id` (the image), `prompt` (which holds the question) and `text`.
        """
        pairs, form = read_answers_as(path, ("question_id", "answer"), ("question_id", "text"), ("id", "response"))
        return self.match_by_prompt(path, questions) if form == ("question_id", "text") else pairs

    def match_by_prompt(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        ids: dict[tuple[str, str], list[str]] = defaultdict(list)
        for q in questions:
            ids[q.details["image_id"], q.details["question"].lower()].append(q.id)
        pairs = []
        for number, row in enumerate(read_rows(path)):
            where = f"row {number}"
            image_id, prompt, answer = (typed(row, path, where, key, str) for key in ("question_id", "prompt", "text"))
            text = question_in_llava_prompt(prompt)
            if text is None:
                raise UserError(f"{path}, {where}: no question in the prompt {prompt!r:.80}")
            same = ids.get((image_id, text))
            if not same:
                raise UserError(f"{path}, {where}: no (further) question {text!r} about image {image_id}")
            pairs.append((same.pop(0), answer))
        return pairs

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write EvalAI's file, `[{"question_id", "answer"}]`."""
        result = self.single_result(results, "the split test")
        write_whole(out, json_text([{"question_id": int(row["id"]), "answer": row["response"]} for row in result.rows]))


def row_key(row: object, path: Path, where: str) -> tuple[str, str]:
    image_id, question_text = fields(row, path, where, "image_id", "question")
    return str(image_id), str(question_text)


def read_llava_ocr(row: object, path: Path, where: str) -> tuple[str, str]:
    """Return the image id and the OCR tokens in one of LLaVA's prompts."""
    image_id, prompt = (typed(row, path, where, key, str) for key in ("question_id", "text"))
    _, marker, rest = prompt.partition("\nReference OCR token: ")
    if not marker:
        raise UserError(f"{path}, {where}: no OCR tokens in the prompt {prompt!r:.80}")
    return image_id, rest.rpartition("\n")[0]


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy, 0 to 1. There must be ten answers, as the official scorer asserts."""
    assert len(answers) == ANNOTATORS, f"{len(answers)} answers"
    return leave_one_out(evalai_normalize(prediction), [evalai_normalize(answer) for answer in answers])


def question_in_llava_prompt(prompt: str) -> str | None:
    """Return the lower-cased question in a prompt of LLaVA's answers file; None if the official code would fail.

    Source: haotian-liu/LLaVA, llava/eval/eval_textvqa.py, prompt_processor.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return match and match.group(1).lower()
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[prompt.startswith("Reference OCR token:")].lower()
    return lines[0].lower() if len(lines) == 2 else None
