"""NLVR2 (Suhr et al., ACL 2019): is a sentence true of two photographs?

Data: one JSON-lines file per split, and two PNG images per example.

Scorer: lil-lab/nlvr, nlvr2/eval/metrics.py: a prediction is correct if it equals the label, ignoring case ("true." and
" True" are wrong). Consistency is the share of sentences that are answered correctly for all their image pairs. The
identifiers of a sentence differ only in the pair, their third part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.samples import Image
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.files import write_whole
from eval.layout import fields, find_file, read_jsonl
from eval.results import Result
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

LABELS = ("true", "false")
JSON_SUFFIXES = (".json", ".jsonl")  # of predictions in mmdora's own format


@BENCHMARKS.register("nlvr2")
class NLVR2(Benchmark):
    """NLVR2: accuracy and consistency (lil-lab/nlvr, nlvr2/eval/metrics.py)."""

    splits = ("dev", "test1", "test2", "train")
    prompt = "{question}\nIs this true or false of the two images? Answer the question using a single word or phrase."
    layout = """  data/<split>.json (dev, test1, test2, train; or the file itself)
  dev/<identifier without its last number>-img0.png and -img1.png, test1/ likewise; images/train/<directory>/
  (in the folder itself or in its images/)"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        path = find_file(config.data, [f"data/{split}.json", f"{split}.json", f"nlvr2/data/{split}.json"], self.layout)
        default_root = path.parent.parent if path.parent.name == "data" else path.parent
        root = find_path(config.media) if config.media else default_root
        questions = []
        for number, row in enumerate(read_jsonl(path)):
            sentence, label, key = map(str, fields(row, path, f"row {number}", "sentence", "label", "identifier"))
            if label.lower() not in LABELS or key.count("-") != 3:
                raise UserError(f"{path}, row {number}: invalid label or identifier ({label!r}, {key!r})")
            pair = key.rpartition("-")[0]
            folder = image_folder(root, key.split("-")[0], row.get("directory"), pair)
            images = [Image(folder / f"{pair}-img{side}.png") for side in (0, 1)]
            sample = conversation(key, self.format_prompt(config, question=sentence), images, str(path))
            questions.append(Question(key, sample, (label.lower(),), sentence_of(key)))
        return questions

    def score(self, response: str, question: Question) -> Score:
        predicted = response.lower()
        correct = float(predicted == question.references[0])
        return Score(correct, correct, unparsed=predicted.strip() not in LABELS)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        sentences: dict[str, bool] = {}
        for q in questions:
            correct = self.score(responses[q.id], q).official == 1
            sentences[sentence_of(q.id)] = sentences.get(sentence_of(q.id), True) and correct
        return {"consistency": 100 * sum(sentences.values()) / len(sentences)}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the official CSV: an identifier and a label per line."""
        return super().read_predictions(path, questions) if path.suffix in JSON_SUFFIXES else read_csv(path)

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write the official CSV: an identifier and True or False per line; any other response becomes "none"."""
        result = self.single_result(results)
        write_whole(out, csv_text({row["id"]: row["response"] for row in result.rows}, str.capitalize))


def image_folder(root: Path, split: str, directory: Any, pair: str) -> Path:
    """Return the first folder that has the images of a pair, or the documented folder if none has."""
    subfolders = [f"{split}/{directory}", split] if directory is not None else [split]
    places = [root / top / folder for top in ("images", ".", "..") for folder in subfolders]
    return next((place for place in places if (place / f"{pair}-img0.png").is_file()), places[0])


def sentence_of(identifier: str) -> str:
    """Return the identifier without the number of the image pair: the same for all pairs of a sentence."""
    split, group, _, sentence = identifier.split("-")
    return f"{split}-{group}--{sentence}"


def read_csv(path: Path) -> list[tuple[str, str]]:
    """Read (identifier, prediction) per line, split at commas as in the official scripts. Raise UserError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        identifier, *rest = line.strip().split(",")
        if not rest:
            raise UserError(f"{path}, line {number}: expected an identifier, a comma and true or false")
        pairs.append((identifier, rest[0]))
    return pairs


def csv_text(answers: Mapping[str, str], case: Callable[[str], str]) -> str:
    """Return one line per answer; anything but true or false becomes "none", since it could break the lines."""
    predicted = {key: answer.lower() for key, answer in answers.items()}
    return "".join(f"{key},{case(word) if word in LABELS else 'none'}\n" for key, word in predicted.items())
