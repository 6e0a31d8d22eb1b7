"""`mmdora chat`: chat with a run or a model about images and videos in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Part, Sample, Text, Video
from eval.benchmarks import Question
from eval.generation import generate
from mmdora.adapters.temporary_merge import merged_weights
from mmdora.apps.load_target import load_target
from mmdora.core.console import make_console
from mmdora.core.errors import UserError
from mmdora.core.logs import quiet_libraries


def run(target: str, images: list[Path], videos: list[Path], max_new_tokens: int, trust_remote_code: bool) -> None:
    """Answer questions from the terminal, or from a pipe until it ends. The media precede the first question.

    Raises UserError for a file that does not exist.
    """
    for path in (*images, *videos):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    quiet_libraries()
    console = make_console()
    loaded = load_target(target, trust_remote_code)
    encoder = Encoder(loaded.processor, loaded.video)
    if encoder.text_only and (files := [*images, *videos]):
        raise UserError(f"{files[0]}: {target} is a language model alone; leave --image and --video out")
    media: list[Part] = [*(Image(p) for p in images), *(Video(p) for p in videos)]
    sample = Sample("chat", (), "the terminal")
    if sys.stdin.isatty():
        console.print("Type a question; an empty line ends the chat.")
    with merged_weights(loaded.model, loaded.merge_memory):
        while question := _read_line():
            parts = (*media, Text(question)) if not sample.messages else (Text(question),)
            sample = Sample("chat", (*sample.messages, Message("user", parts)), "the terminal")
            answer = reply(loaded.model, encoder, sample, max_new_tokens)
            console.print(answer, markup=False)
            sample = Sample("chat", (*sample.messages, Message("assistant", (Text(answer),))), "the terminal")


def reply(model: Any, encoder: Encoder, sample: Sample, max_new_tokens: int) -> str:
    """Return the model's greedy answer to a conversation that ends with a user message, as evaluation generates it."""
    question = Question(sample.id, sample, (), sample.id)
    ((_, answer),) = generate(model, encoder, [question], 1, max_new_tokens)
    return answer


def _read_line() -> str:
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return ""
    return sys.stdin.readline().strip()
