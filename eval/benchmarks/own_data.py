"""Questions from one's own data, in any dataset format: what the general benchmarks ask."""

from __future__ import annotations

from dataclasses import replace

from data_pipelines.dataset import read_source
from data_pipelines.samples import Sample
from eval.benchmarks.base import Question
from mmdora.config import EvaluationConfig, SourceConfig
from mmdora.errors import UserError


def conversation_questions(config: EvaluationConfig) -> list[Question]:
    """A question for each assistant turn of a dataset; what was said before it is its context."""
    source = read_source(SourceConfig(path=config.data, format=config.format, media=config.media, where=config.where))
    if source.rejected:
        first = source.rejected[0]
        why = f"row {first.id!r} cannot be asked ({first.reason})"
        raise UserError(f"{config.data}: {why}; mend it, or leave it out by `where`")
    questions = []
    for sample in source:
        turns = [i for i, message in enumerate(sample.messages) if message.role == "assistant"]
        for number, turn in enumerate(turns):
            question_id = sample.id if len(turns) == 1 else f"{sample.id}/{number}"
            context: Sample = replace(sample, id=question_id, messages=sample.messages[:turn])
            cluster = " ".join(str(part.path) for part in context.media()) or sample.id
            categories = () if sample.category is None else (sample.category,)
            references = sample.answers or (sample.messages[turn].text,)
            questions.append(Question(question_id, context, references, cluster, categories))
    return questions
