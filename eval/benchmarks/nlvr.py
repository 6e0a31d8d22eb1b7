"""`nlvr`: is a sentence true of a picture of boxes with shapes? NLVR 1.0 (Suhr et al., ACL 2017).

Scorer: lil-lab/nlvr, nlvr/metrics_images.py: a prediction is right if it equals the label, whatever its case, over
every picture; "consistency" is the share of sentences with all their pictures right. The official script wants all
six permutations of an example; a subset is scored on what is there, and the report says how many that is. `data` is
the split's JSON-lines file or the folder that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.dataset import read_source
from data_pipelines.formats.nlvr import PERMUTATIONS
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score
from mmdora.config import EvaluationConfig, SourceConfig
from mmdora.config_files import find_path
from mmdora.errors import UserError


@BENCHMARKS.register("nlvr")
class NLVR(Benchmark):
    """NLVR 1.0, accuracy and consistency (lil-lab/nlvr, metrics_images.py)."""

    verified = True

    def questions(self, config: EvaluationConfig) -> list[Question]:
        source = SourceConfig(path=str(split_file(config.data)), format="nlvr", media=config.media, where=config.where)
        questions = []
        for sample in read_source(source):
            reference = sample.messages[1].text
            context = type(sample)(sample.id, sample.messages[:1], sample.source, sample.category)
            # "dev-1085-3-0.png": the four examples of presentation 1085 share their sentence
            cluster = sample.id.split("-")[1]
            categories = () if sample.category is None else (sample.category,)
            questions.append(Question(sample.id, context, (reference,), cluster, categories))
        return questions

    def score(self, response: str, question: Question) -> Score:
        said = response.strip().lower()
        right = float(said == question.references[0])
        return Score(right, right, unparsed=said not in ("true", "false"))

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
