"""`mmdora chat`: talk with a run or a model in the terminal, about pictures and videos."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Part, Sample, Text, Video
from eval.benchmarks import Question
from eval.generation import generate
from mmdora.apps.load_target import load_target
from mmdora.core.console import make_console
from mmdora.core.errors import UserError


def run(target: str, images: list[Path], videos: list[Path], max_new_tokens: int, trust_remote_code: bool) -> None:
    """Reads questions from the terminal, or from a pipe until it ends. The media stand before the first question."""
    for path in (*images, *videos):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    console = make_console()
    loaded = load_target(target, trust_remote_code)
    encoder = Encoder(loaded.processor, loaded.video)
    media: list[Part] = [*(Image(p) for p in images), *(Video(p) for p in videos)]
    sample = Sample("chat", (), "the terminal")
    if sys.stdin.isatty():
        console.print("Ask; an empty line ends.")
    while question := _read():
        parts = (*media, Text(question)) if not sample.messages else (Text(question),)
        sample = Sample("chat", (*sample.messages, Message("user", parts)), "the terminal")
        answer = reply(loaded.model, encoder, sample, max_new_tokens)
        console.print(answer, markup=False)
        sample = Sample("chat", (*sample.messages, Message("assistant", (Text(answer),))), "the terminal")


def reply(model: Any, encoder: Encoder, sample: Sample, max_new_tokens: int) -> str:
    """The model's greedy answer to a conversation that ends with the user: what evaluation would generate."""
    question = Question(sample.id, sample, (), sample.id)
    ((_, answer),) = generate(model, encoder, [question], 1, max_new_tokens)
    return answer


def _read() -> str:
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return ""
    return sys.stdin.readline().strip()
