"""`responses.jsonl`: answers as they come, one line a question, written by any number of processes.

A line is keyed by everything that its answer depends on: the conversation, media bytes, frames, reader, decoding,
preprocessing and weights. Killed and restarted, a run asks only what is not answered; anything changed is asked again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Text, Video
from data_pipelines.video import resolve_reader
from eval.benchmarks import Question
from eval.digests import media_digest, processor_digest
from mmdora.core.distributed import rank
from mmdora.core.errors import RunError

log = logging.getLogger(__name__)

Row = dict[str, str]  # id, response, key


def question_keys(questions: Iterable[Question], encoder: Encoder, max_new_tokens: int, weights: str) -> dict[str, str]:
    """By question id, a digest of everything that the answer depends on; `weights` is a digest of the model's."""
    common = [processor_digest(encoder.processor), str(max_new_tokens), weights]
    frames = [encoder.video.model_dump_json(exclude={"reader", "timeout"}), resolve_reader(encoder.video.reader)]
    keys = {}
    for question in questions:
        said = [
            [m.role, [p.text if isinstance(p, Text) else _media_key(p) for p in m.parts]]
            for m in question.sample.messages
        ]
        clips = any(isinstance(part, Video) for part in question.sample.media())
        parts = [*common, said, frames if clips else []]
        keys[question.id] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return keys


def _media_key(part: Image | Video) -> list[Any]:
    """What is shown of a file."""
    return [type(part).__name__, media_digest(part), part.bounds if isinstance(part, Video) else {}]


class Responses:
    """The answers of one evaluation, in its folder. Every process makes one, adds what it is answered, and finishes.

    `known` holds the answers that were there under the same keys when it was made. Lines under other keys stay until an
    evaluation is finished, so that a setting given by mistake costs nothing; they are never reported.
    """

    def __init__(self, folder: Path, keys: Mapping[str, str]):
        self.folder, self.keys = folder, keys
        folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            _join(folder)
        _barrier()
        self.known = self._answers()
        _barrier()  # all have read before one writes
        self._files: dict[str, TextIO] = {}

    def add(self, answers: Iterable[tuple[str, str]]) -> None:
        """Answers by question id. They are on the disk when this returns."""
        self._write("responses", [{"id": i, "response": text, "key": self.keys[i]} for i, text in answers])

    def fail(self, question_id: str, reason: str) -> None:
        """A question that cannot be answered, and why."""
        self._write("failed", [{"id": question_id, "reason": reason}])

    def finish(self, ids: Sequence[str]) -> dict[str, str]:
        """All processes' answers by id, with `responses.jsonl` whole. Every process calls it.

        Raises RunError where questions have none, which are in `failed.jsonl` then; the answers that there are stay.
        """
        for file in self._files.values():
            file.close()
        _barrier()
        answers = self._answers()
        failed = {row["id"]: row["reason"] for row in _rows(self.folder, "failed")}
        _barrier()  # all have read before the files are joined
        asked = set(ids)
        assert asked == answers.keys() | failed.keys(), "some questions have neither an answer nor a reason"
        if rank() == 0:
            if failed:
                _join(self.folder)
                rows = [{"id": i, "reason": failed[i]} for i in ids if i in failed]
                _replace(self.folder, "failed", rows)
            else:
                _replace(self.folder, "responses", [self._row(i, answers[i]) for i in ids])
        _barrier()
        if failed:
            first = next(i for i in ids if i in failed)
            raise RunError(
                f"{len(failed)} of {len(ids)} questions could not be answered, such as {first!r}: {failed[first]}. "
                f"{self.folder / 'failed.jsonl'} lists them. The other answers are kept: mend these and give the same "
                "command again, and only they are asked"
            )
        return {i: answers[i] for i in ids}

    def _row(self, question_id: str, response: str) -> Row:
        return {"id": question_id, "response": response, "key": self.keys[question_id]}

    def _answers(self) -> dict[str, str]:
        rows = _rows(self.folder, "responses")
        return {row["id"]: row["response"] for row in rows if self.keys.get(row["id"]) == row["key"]}

    def _write(self, kind: str, rows: list[Row]) -> None:
        """One write for all of them, brought to the disk at once: they came together."""
        if kind not in self._files:
            name = f"{kind}.{rank()}.jsonl" if rank() else f"{kind}.jsonl"
            self._files[kind] = (self.folder / name).open("a", encoding="utf-8", errors="backslashreplace")
        file = self._files[kind]
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def _rows(folder: Path, kind: str) -> Iterator[Row]:
    """The lines of the joined file and of every process's own. A last line that was cut off is dropped."""
    wanted = {"responses": {"id", "response", "key"}, "failed": {"id", "reason"}}[kind]
    for path in sorted(folder.glob(f"{kind}*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            if not line:
                continue
            try:
                row: Any = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and row.keys() == wanted:
                yield row
            else:
                log.warning("%s: dropped a line that was cut off", path)


def _join(folder: Path) -> None:
    """Put whole lines of all processes into one file: what is appended later never stands behind a torn line."""
    rows = {(row["id"], row["key"]): row for row in _rows(folder, "responses")}
    _replace(folder, "responses", list(rows.values()))
    for path in folder.glob("failed*.jsonl"):
        path.unlink()


def _replace(folder: Path, kind: str, rows: Sequence[Row]) -> None:
    aside = folder / f".{kind}.jsonl"
    with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:  # JSON's own escape of half a character
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(folder / f"{kind}.jsonl")
    for path in folder.glob(f"{kind}.*.jsonl"):
        path.unlink()


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
