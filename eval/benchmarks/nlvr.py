"""`nlvr`: is a sentence true of a picture of boxes with shapes? NLVR 1.0 (Suhr et al., ACL 2017).

Scorer: lil-lab/nlvr, nlvr/metrics_images.py: a prediction is right if it equals the label, whatever its case, over
every picture; "consistency" is the share of sentences with all their pictures right. The official script wants all
six permutations of an example; a subset is scored on what is there, and the report says how many that is. `data` is
the split's JSON-lines file or the folder that holds it.
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
from eval.benchmarks.nlvr2 import LABELS, OURS, csv_text, read_csv
from eval.files import write_whole
from eval.layout import fields, read_jsonl
from eval.results import Result
from mmdora.core.config import EvaluationConfig, SourceConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

log = logging.getLogger(__name__)


@BENCHMARKS.register("nlvr")
class NLVR(Benchmark):
    """NLVR 1.0, accuracy and consistency (lil-lab/nlvr, metrics_images.py)."""

    verified = True
    prompt = PROMPT.format(sentence="{question}")
    settings = ("media", "where")
    layout = """  <split>/<split>.json
  <split>/images/<directory>/<split>-<identifier>-<0…5>.png"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        questions = []
        for key, sentence, label, picture, category in self._pictures(config, split_file(config.data)):
            sample = conversation(key, self.ask(config, question=sentence), [Image(picture)], config.data)
            # "dev-1085-3-0.png": the four examples of presentation 1085 share their sentence
            questions.append(Question(key, sample, (label,), key.split("-")[1], (category,)))
        return questions

    def _pictures(self, config: EvaluationConfig, path: Path) -> Iterator[tuple[str, str, str, Path, str]]:
        """Name, sentence, label, file and category of each picture that is there; of all six of each example where the
        JSON file stands alone, to be scored."""
        media = find_path(config.media) if config.media else path.parent
        if (media / "images").is_dir():
            source = SourceConfig(path=str(path), format="nlvr", media=config.media, where=config.where)
            for sample in read_source(source):
                sentence = sample.messages[0].text.removesuffix(PROMPT.format(sentence=""))
                picture = next(sample.media()).path
                yield sample.id, sentence, sample.messages[1].text, picture, str(sample.category)
            return
        for number, row in enumerate(read_jsonl(path)):
            columns = ("sentence", "label", "identifier", "directory")
            sentence, label, identifier, directory = map(str, fields(row, path, f"row {number}", *columns))
            if label.lower() not in LABELS:
                raise UserError(f"{path}, row {number}: label must be true or false, found {label!r}")
            for permutation in range(PERMUTATIONS):
                name = f"{path.stem}-{identifier}-{permutation}.png"
                picture = media / "images" / directory / name
                yield name, sentence.strip(), label.lower(), picture, f"directory {directory}"

    def score(self, response: str, question: Question) -> Score:
        said = response.strip().lower()
        right = float(said == question.references[0])
        return Score(right, right, unparsed=said not in LABELS)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        sentences: dict[str, bool] = {}
        for q in questions:
            right = responses[q.id].strip().lower() == q.references[0]
            sentences[q.cluster] = sentences.get(q.cluster, True) and right
        examples = {q.id.rpartition("-")[0] for q in questions}
        return {
            "consistency": 100 * sum(sentences.values()) / len(sentences),
            "pictures_of_official": f"{len(questions)} of {PERMUTATIONS * len(examples)}",
        }

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """The official CSV: a picture's name and a label a line; of the name only the numbers count."""
        if path.suffix in OURS:
            return super().read_predictions(path, questions)
        names = {numbers_of(q.id): q.id for q in questions}
        return [(names.get(numbers_of(name), name), label) for name, label in read_csv(path)]

    def write_submission(self, results: Sequence[Result], out: Path) -> None:
        """The identifiers' CSV: a picture's name, and true or false; an answer that is neither is written as "none"."""
        result = self.only_result(results)
        answers = {row["id"]: row["response"].strip() for row in result.rows}
        wanted = PERMUTATIONS * len({key.rpartition("-")[0] for key in answers})
        if len(answers) < wanted:
            log.warning("%s: %d of %d pictures; the official script wants all", out, len(answers), wanted)
        write_whole(out, csv_text(answers, str.lower))


def numbers_of(name: str) -> str:
    """ "1085-3-0" of "dev-1085-3-0.png": by which the official script knows a picture."""
    return "-".join(name.split(".")[0].split("-")[1:])


def split_file(data: str) -> Path:
    """The split's JSON-lines file. Raises UserError with the layout expected."""
    path = find_path(data)
    if path.is_dir():
        path = path / f"{path.name}.json"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; NLVR's layout is <split>/<split>.json beside "
            "<split>/images/<directory>/<split>-<identifier>-<0…5>.png"
        )
    return path
