"""`evaluation`: the benchmarks that a run is scored on."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, model_validator

from mmdora.core.config.section import PositiveInt, Section


class JudgeConfig(Section):
    """Who judges free-form answers: a model behind an OpenAI-compatible API, or a file of existing verdicts."""

    url: str | None = Field(
        default=None,
        description="Base URL of the API, such as `https://api.openai.com/v1`; the key is read from OPENAI_API_KEY.",
    )
    model: str | None = Field(default=None, description="The judge's model name at `url`.")
    verdicts: str | None = Field(
        default=None, description="Instead of `url`: a JSON-lines file with `id` and `verdict` per line."
    )

    @model_validator(mode="after")
    def _url_or_verdicts(self) -> JudgeConfig:
        if (self.verdicts is None) == (self.url is None) or (self.url is None) != (self.model is None):
            raise ValueError("give either 'url' and 'model', or 'verdicts'")
        if self.url is not None and (not re.match(r"https?://[^/]", self.url) or "@" in self.url):
            raise ValueError("'url' must be an http(s) URL without a key; the key is read from OPENAI_API_KEY")
        return self


class EvaluationConfig(Section):
    """One benchmark. Its results are in the run directory, in `eval/<name>`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")] = Field(
        description="A name of your own for the results: letters, digits, `.`, `-` and `_`."
    )
    benchmark: str = Field(description="A name that `mmdora list benchmarks` prints.")
    data: str = Field(description="The folder of the benchmark's official files, or your own data file.")
    format: str | None = Field(
        default=None, description="Your own data: a name that `mmdora list formats` prints; null means: detect it."
    )
    media: str | None = Field(
        default=None, description="The folder that image and video paths start from; null means the file's own folder."
    )
    where: dict[str, list[str | int | bool]] = Field(
        default={}, description="Keep only questions whose field has one of these values: field -> values."
    )
    split: str | None = Field(default=None, description="One of the benchmark's official splits; null means its first.")
    prompt: str | None = Field(
        default=None, description="A prompt with `{question}` in it, instead of the benchmark's own prompt."
    )
    limit: PositiveInt | None = Field(default=None, description="Evaluate only the first N questions; null means all.")
    before: bool = Field(default=False, description="Also evaluate the base model, before training.")
    during: bool = Field(default=False, description="Also evaluate every `training.evaluate_every` steps.")
    batch_size: PositiveInt = Field(default=16, description="Questions per generation batch.")
    max_new_tokens: PositiveInt | None = Field(
        default=None, description="Maximum length of an answer; null means the benchmark's default."
    )
    judge: JudgeConfig | None = Field(
        default=None, description="Benchmarks with judged answers (`mmvet`, ...); null means no judged score."
    )
