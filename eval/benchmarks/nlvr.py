"""NLVR 1.0 (Suhr et al., ACL 2017): is a sentence true of an image with boxes of shapes?

Data: the split's JSON-lines file, or the folder that holds it, with one PNG per permutation of an example.

Scorer: lil-lab/nlvr, nlvr/metrics_images.py: a prediction is correct if it equals the label, ignoring case. The
accuracy is over all images; consistency is the share of sentences with all their images correct. The official script
requires all six permutations of an example. Here a subset is scored on the images present, and the report says how many
of the official ones these are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.formats.nlvr import PERMUTATIONS, PROMPT
from data_pipelines.samples import Image
from data_pipelines.sources import read_source
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.nlvr2 import JSON_SUFFIXES, LABELS, csv_text, read_csv
from eval.files import write_whole
from eval.layout import fields, read_jsonl
from eval.results import Result
from mmdora.core.config import EvaluationConfig, SourceConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)


@BENCHMARKS.register("nlvr")
class NLVR(Benchmark):
    """NLVR: accuracy and consistency (lil-lab/nlvr, nlvr/metrics_images.py)."""

    verified = True
    prompt = PROMPT.format(sentence="{question}")
    settings = ("media", "where")
    layout = """  <split>/<split>.json
  <split>/images/<directory>/<split>-<identifier>-<0…5>.png"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        questions = []
        for key, sentence, label, image_file, category in self._images(config, split_file(config.data)):
            sample = conversation(key, self.format_prompt(config, question=sentence), [Image(image_file)], config.data)
            # "dev-1085-3-0.png": the four examples of presentation 1085 share their sentence
            questions.append(Question(key, sample, (label,), key.split("-")[1], (category,)))
        return questions

    def _images(self, config: EvaluationConfig, path: Path) -> Iterator[tuple[str, str, str, Path, str]]:
        """Yield name, sentence, label, file and category of each image.

        Without an images folder, as when only predictions are scored, yield all six permutations of each example.
        """
        media = find_path(config.media) if config.media else path.parent
        if (media / "images").is_dir():
            source = SourceConfig(path=str(path), format="nlvr", media=config.media, where=config.where)
            for sample in read_source(source):
                sentence = sample.messages[0].text.removesuffix(PROMPT.format(sentence=""))
                image_file = next(sample.media()).path
                yield sample.id, sentence, sample.messages[1].text, image_file, str(sample.category)
            return
        for number, row in enumerate(read_jsonl(path)):
            columns = ("sentence", "label", "identifier", "directory")
            sentence, label, identifier, directory = map(str, fields(row, path, f"row {number}", *columns))
            if label.lower() not in LABELS:
                raise UserError(f"{path}, row {number}: label must be true or false, found {label!r}")
            for permutation in range(PERMUTATIONS):
                name = f"{path.stem}-{identifier}-{permutation}.png"
                image_file = media / "images" / directory / name
                yield name, sentence.strip(), label.lower(), image_file, f"directory {directory}"

    def score(self, response: str, question: Question) -> Score:
        predicted = response.strip().lower()
        correct = float(predicted == question.references[0])
        return Score(correct, correct, unparsed=predicted not in LABELS)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        sentences: dict[str, bool] = {}
        for q in questions:
            correct = responses[q.id].strip().lower() == q.references[0]
            sentences[q.cluster] = sentences.get(q.cluster, True) and correct
        examples = {q.id.rpartition("-")[0] for q in questions}
        return {
            "consistency": 100 * sum(sentences.values()) / len(sentences),
            "pictures_of_official": f"{len(questions)} of {PERMUTATIONS * len(examples)}",
        }

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the official CSV: an image name and a label per line. Only the numbers in the name matter."""
        if path.suffix in JSON_SUFFIXES:
            return super().read_predictions(path, questions)
        names = {numbers_of(q.id): q.id for q in questions}
        return [(names.get(numbers_of(name), name), label) for name, label in read_csv(path)]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """Write the official CSV: an image name and true or false per line; any other response becomes "none"."""
        result = self.single_result(results)
        answers = {row["id"]: row["response"].strip() for row in result.rows}
        expected = PERMUTATIONS * len({key.rpartition("-")[0] for key in answers})
        if len(answers) < expected:
            log.warning("%s: has %d of %d images; the official script requires all", out, len(answers), expected)
        write_whole(out, csv_text(answers, str.lower))


def numbers_of(name: str) -> str:
    """Return "1085-3-0" for "dev-1085-3-0.png": the official script identifies images by these numbers."""
    return "-".join(name.split(".")[0].split("-")[1:])


def split_file(data: str) -> Path:
    """Return the split's JSON-lines file. Raise UserError with the expected layout if it is missing."""
    path = find_path(data)
    if path.is_dir():
        path = path / f"{path.name}.json"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected layout: <split>/<split>.json beside "
            "<split>/images/<directory>/<split>-<identifier>-<0…5>.png"
        )
    return path
