"""Questions from one's own data, in any dataset format: what the general benchmarks ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data_pipelines.samples import Message, Text
from data_pipelines.sources import read_source
from eval.benchmarks.base import Benchmark, Question
from mmdora.core.config import EvaluationConfig, SourceConfig
from mmdora.core.errors import UserError


class OwnData(Benchmark):
    """A question for each assistant turn of a dataset; what was said before it is its context."""

    verified = True
    settings = ("media", "format", "where")
    prompt = "{question}"  # the dataset's own words

    def questions(self, config: EvaluationConfig) -> list[Question]:
        source = read_source(
            SourceConfig(path=config.data, format=config.format, media=config.media, where=config.where)
        )
        if source.rejected:
            first = source.rejected[0]
            why = f"row {first.id!r} cannot be asked ({first.reason})"
            raise UserError(f"{config.data}: {why}; mend it, or leave it out by `where`")
        questions = []
        for sample in source:
            turns = [i for i, message in enumerate(sample.messages) if message.role == "assistant"]
            for number, turn in enumerate(turns):
                question_id = sample.id if len(turns) == 1 else f"{sample.id}/{number}"
                context = replace(sample, id=question_id, messages=self.prompted(sample.messages[:turn], config))
                cluster = " ".join(str(part.path) for part in context.media()) or sample.id
                categories = () if sample.category is None else (sample.category,)
                references = sample.answers or (sample.messages[turn].text,)
                questions.append(Question(question_id, context, references, cluster, categories))
        return questions

    def prompted(self, messages: Sequence[Message], config: EvaluationConfig) -> tuple[Message, ...]:
        """The prompt around the last message's words; around the last of them, where pictures stand between."""
        *before, last = messages
        words = [i for i, part in enumerate(last.parts) if isinstance(part, Text)]
        place = words[-1] if words else len(last.parts)
        asked = self.ask(config, question="".join(p.text for p in last.parts[place:] if isinstance(p, Text)))
        parts = (*last.parts[:place], *((Text(asked),) if asked else ()), *last.parts[place + 1 :])
        return (*before, replace(last, parts=parts))
