"""Base class of the benchmarks that run on your own data, in any dataset format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from data_pipelines.samples import Message, Text
from data_pipelines.sources import read_source
from eval.benchmarks.base import Benchmark, Question
from mmdora.core.config import EvaluationConfig, SourceConfig
from mmdora.core.errors import UserError


class OwnData(Benchmark):
    """One question per assistant turn of a dataset; the turns before it are the context."""

    verified = True
    settings = ("media", "format", "where")
    prompt = "{question}"  # the dataset's own text

    def questions(self, config: EvaluationConfig) -> list[Question]:
        source = read_source(
            SourceConfig(path=config.data, format=config.format, media=config.media, where=config.where)
        )
        if source.rejected:
            first = source.rejected[0]
            raise UserError(
                f"{config.data}: row {first.id!r} is invalid ({first.reason}); fix it or exclude it with `where`"
            )
        questions = []
        for sample in source:
            turns = [i for i, message in enumerate(sample.messages) if message.role == "assistant"]
            for number, turn in enumerate(turns):
                question_id = sample.id if len(turns) == 1 else f"{sample.id}/{number}"
                context = replace(sample, id=question_id, messages=self.apply_prompt(sample.messages[:turn], config))
                cluster = " ".join(str(part.path) for part in context.media()) or sample.id
                categories = () if sample.category is None else (sample.category,)
                references = sample.answers or (sample.messages[turn].text,)
                questions.append(Question(question_id, context, references, cluster, categories))
        return questions

    def apply_prompt(self, messages: Sequence[Message], config: EvaluationConfig) -> tuple[Message, ...]:
        """Return the messages with the prompt around the last text part of the last message."""
        *before, last = messages
        text_parts = [i for i, part in enumerate(last.parts) if isinstance(part, Text)]
        place = text_parts[-1] if text_parts else len(last.parts)
        question = "".join(part.text for part in last.parts[place:] if isinstance(part, Text))
        prompt = self.format_prompt(config, question=question)
        parts = (*last.parts[:place], *((Text(prompt),) if prompt else ()), *last.parts[place + 1 :])
        return (*before, replace(last, parts=parts))
