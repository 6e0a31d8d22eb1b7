"""`textvqa`: questions about the words in a picture, ten answers each (Singh et al., CVPR 2019).

Scorer: facebookresearch/mmf, mmf/utils/m4c_evaluators.py, TextVQAAccuracyEvaluator: VQA's accuracy, with prediction and
answers normalised as EvalAI has it, whether the annotators agree or not. The file's evaluators of ST-VQA (accuracy, and
ANLS: the average normalised Levenshtein similarity) are here too.

LLaVA-1.5's figure, 58.2, was measured with the words that Rosetta's OCR found in the prompt (haotian-liu/LLaVA,
playground/data/eval/textvqa/llava_textvqa_val_v051_ocr.jsonl, which is read too): so is the default here. A prompt
without `{ocr}` leaves them out, and then needs no OCR file. As there, the question begins with a capital and is lower
case else.
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
    """TextVQA, accuracy against ten annotators (facebookresearch/mmf, m4c_evaluators.py)."""

    splits = ("val", "test", "train")
    max_new_tokens = 32
    prompt = "{question}\nReference OCR token: {ocr}\nAnswer the question using a single word or phrase."
    layout = """TextVQA_0.5.1_val.json
TextVQA_Rosetta_OCR_v0.2_val.json   (or LLaVA's llava_textvqa_val_v051_ocr.jsonl; unless the prompt has no {ocr})
train_images/003a8ae2ef43b901.jpg   (of train and val; test_images/ of test)"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        path = self.annotations(config)
        tokens = self.ocr_tokens(config)
        rows = typed(read_json(path), path, "the file", "data", list)
        name = "test_images" if "test" in path.stem else "train_images"
        images = find_folder(config.data, [name, f"images/{name}"], config.media, self.layout)
        found = []
        for number, row in enumerate(rows):
            where = f"question {number}"
            question_id, (image_id, words) = typed(row, path, where, "question_id", int), row_key(row, path, where)
            answers = tuple(typed(row, path, where, "answers", list)) if "answers" in row else ()
            if answers and (len(answers) != ANNOTATORS or not all(isinstance(answer, str) for answer in answers)):
                raise UserError(
                    f"{path}, {where}: {len(answers)} answers; the official scorer wants {ANNOTATORS} strings"
                )
            text = self.ask(config, question=words.capitalize(), ocr=tokens.get(image_id, ""))
            sample = conversation(str(question_id), text, [Image(images / f"{image_id}.jpg")])
            details = {"image_id": image_id, "question": words}
            found.append(Question(sample.id, sample, answers, image_id, details=details))
        return found

    def annotations(self, config: EvaluationConfig) -> Path:
        name = f"TextVQA_0.5.1_{self.split(config)}.json"
        return find_file(config.data, [name, f"*/{name}"], self.layout)

    def ocr_file(self, config: EvaluationConfig) -> Path | None:
        """The OCR tokens that the prompt wants, wherever they should be; None where it wants none."""
        if "{ocr}" not in (config.prompt or self.prompt):
            return None
        split = self.annotations(config).stem.rpartition("_")[2]
        names = (f"TextVQA_Rosetta_OCR_v0.2_{split}.json", f"llava_textvqa_{split}_v051_ocr.jsonl")
        root = find_path(config.data)
        root = root.parent if root.is_file() else root
        places = (place for name in names for place in (root / name, *sorted(root.glob(f"*/{name}"))))
        return next((place for place in places if place.is_file()), root / names[0])

    def lacks(self, config: EvaluationConfig) -> str | None:
        path = self.ocr_file(config)
        if path is None or path.is_file():
            return None
        return (
            f"{path}: no such file, and the prompt has {{ocr}}, the words that OCR found, as LLaVA-1.5's has; put it "
            f"there, or set a prompt without {{ocr}}; expected layout:\n{self.layout}"
        )

    def ocr_tokens(self, config: EvaluationConfig) -> dict[str, str]:
        """By image; none where the file is missing, which is for `lacks` to say: scores need no prompt."""
        path = self.ocr_file(config)
        if path is None or not path.is_file():
            return {}
        if path.suffix == ".jsonl":
            return dict(ocr_of_llava(row, path, f"row {number}") for number, row in enumerate(read_jsonl(path)))
        tokens = {}
        for number, row in enumerate(typed(read_json(path), path, "the file", "data", list)):
            words = typed(row, path, f"image {number}", "ocr_tokens", list)
            tokens[typed(row, path, f"image {number}", "image_id", str)] = ", ".join(map(str, words))
        return tokens

    def score(self, response: str, question: Question) -> Score:
        value = textvqa_accuracy(response, question.references)
        return Score.of_words(value, response)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """EvalAI's format, `[{"question_id", "answer"}]`; LLaVA's answers (JSON lines with the image as `question_id`,
        `prompt` and `text`), whose question is in the prompt; or ours."""
        pairs, form = read_answers_as(path, ("question_id", "answer"), ("question_id", "text"), ("id", "response"))
        return self.by_prompt(path, questions) if form == ("question_id", "text") else pairs

    def by_prompt(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        ids: dict[tuple[str, str], list[str]] = defaultdict(list)
        for q in questions:
            ids[q.details["image_id"], q.details["question"].lower()].append(q.id)
        pairs = []
        for number, row in enumerate(read_rows(path)):
            where = f"row {number}"
            image_id, prompt, said = (typed(row, path, where, key, str) for key in ("question_id", "prompt", "text"))
            asked = question_in_llava_prompt(prompt)
            if asked is None:
                raise UserError(f"{path}, {where}: no question in the prompt {prompt!r:.80}")
            same = ids.get((image_id, asked))
            if not same:
                raise UserError(f"{path}, {where}: image {image_id} has no (further) question {asked!r}")
            pairs.append((same.pop(0), said))
        return pairs

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """EvalAI's file, `[{"question_id", "answer"}]`."""
        result = self.only_result(results, "the split test")
        write_whole(out, json_text([{"question_id": int(row["id"]), "answer": row["response"]} for row in result.rows]))


def row_key(row: object, path: Path, where: str) -> tuple[str, str]:
    image_id, words = fields(row, path, where, "image_id", "question")
    return str(image_id), str(words)


def ocr_of_llava(row: object, path: Path, where: str) -> tuple[str, str]:
    """The image, and the words in LLaVA's question about it."""
    image_id, prompt = (typed(row, path, where, key, str) for key in ("question_id", "text"))
    _, marker, rest = prompt.partition("\nReference OCR token: ")
    if not marker:
        raise UserError(f"{path}, {where}: no OCR tokens in the prompt {prompt!r:.80}")
    return image_id, rest.rpartition("\n")[0]


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """0 to 1, of the ten answers that the official scorer asserts."""
    assert len(answers) == ANNOTATORS, f"{len(answers)} answers"
    return leave_one_out(evalai_normalize(prediction), [evalai_normalize(answer) for answer in answers])


def stvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, all normalised (STVQAAccuracyEvaluator)."""
    return float(evalai_normalize(prediction) in {evalai_normalize(answer) for answer in answers})


def anls(prediction: str, answers: Sequence[str]) -> float:
    """The likeness to the most similar answer, 0 to 1, and 0 below a half (STVQAANLSEvaluator, which divides by zero
    where both are empty: they are alike here)."""
    return max(likeness(prediction.lower().strip(), answer.lower().strip()) for answer in answers)


def likeness(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    share = 1 - edit_distance(one, other) / longest if longest else 1.0
    return share if share >= 0.5 else 0.0


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's: the fewest characters to insert, delete and replace."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def question_in_llava_prompt(prompt: str) -> str | None:
    """The question in a prompt of LLaVA's answers file, in lower case (llava/eval/eval_textvqa.py, prompt_processor);
    None where the official code fails."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found and found.group(1).lower()
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[prompt.startswith("Reference OCR token:")].lower()
    return lines[0].lower() if len(lines) == 2 else None
