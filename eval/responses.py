"""`responses.jsonl`: one line per answer, written while a model generates, by any number of processes.

Each line has a key: a digest of everything that the answer depends on (conversation, media bytes, frames, video reader,
decoding, preprocessing and weights). A restarted evaluation generates only the answers that are missing under their
current keys.
"""

from __future__ import annotations

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
from eval.digests import json_digest, media_digest, processor_digest
from mmdora.core.distributed import rank
from mmdora.core.errors import RunError

log = logging.getLogger(__name__)

Row = dict[str, str]  # id, response, key
FIELDS = {"responses": {"id", "response", "key"}, "failed": {"id", "reason"}}


def question_keys(questions: Iterable[Question], encoder: Encoder, max_new_tokens: int, weights: str) -> dict[str, str]:
    """Return by question id a digest of everything that the answer depends on.

    `weights` is the digest of the model's weights.
    """
    common = [processor_digest(encoder.processor), str(max_new_tokens), weights]
    frames = [encoder.video.model_dump_json(exclude={"reader", "timeout"}), resolve_reader(encoder.video.reader)]
    keys = {}
    for question in questions:
        messages = [
            [m.role, [p.text if isinstance(p, Text) else _media_key(p) for p in m.parts]]
            for m in question.sample.messages
        ]
        has_video = any(isinstance(part, Video) for part in question.sample.media())
        keys[question.id] = json_digest([*common, messages, frames if has_video else []])
    return keys


def _media_key(part: Image | Video) -> list[Any]:
    """Return the kind of a file, its content and, for a video, the part of it that is shown."""
    return [type(part).__name__, media_digest(part), part.bounds if isinstance(part, Video) else {}]


class Responses:
    """The answers of one evaluation, stored in its folder.

    Every process creates one, adds its answers and calls `finish`. `known` holds the answers that were stored under the
    same keys before. Lines under other keys are never reported, but stay until an evaluation finishes: running once
    with a wrong setting loses no answers.
    """

    def __init__(self, folder: Path, keys: Mapping[str, str]):
        self.folder, self.keys = folder, keys
        folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            _merge_files(folder)
        _barrier()
        self.known = self._answers()
        _barrier()  # every process has read before one writes
        self._files: dict[str, TextIO] = {}

    def add(self, answers: Iterable[tuple[str, str]]) -> None:
        """Store (question id, answer) pairs. They are on the disk when this returns."""
        self._write("responses", [self._row(question_id, text) for question_id, text in answers])

    def fail(self, question_id: str, reason: str) -> None:
        """Store that a question cannot be answered, and why."""
        self._write("failed", [{"id": question_id, "reason": reason}])

    def finish(self, ids: Sequence[str]) -> dict[str, str]:
        """Return all processes' answers by id and write `responses.jsonl` in order. Every process must call it.

        Raises RunError if questions failed. `failed.jsonl` lists them, and all other answers are kept.
        """
        for file in self._files.values():
            file.close()
        _barrier()
        answers = self._answers()
        failed = {row["id"]: row["reason"] for row in _rows(self.folder, "failed")}
        _barrier()  # every process has read before the files are merged
        assert set(ids) == answers.keys() | failed.keys(), "some questions have neither an answer nor a reason"
        if rank() == 0:
            if failed:
                _merge_files(self.folder)
                _replace(self.folder, "failed", [{"id": i, "reason": failed[i]} for i in ids if i in failed])
            else:
                _replace(self.folder, "responses", [self._row(i, answers[i]) for i in ids])
        _barrier()
        if failed:
            first = next(i for i in ids if i in failed)
            raise RunError(
                f"{len(failed)} of {len(ids)} questions could not be answered, such as {first!r}: {failed[first]}. "
                f"{self.folder / 'failed.jsonl'} lists them. All other answers are kept: fix these questions and run "
                "the same command again, which evaluates only them"
            )
        return {i: answers[i] for i in ids}

    def _row(self, question_id: str, response: str) -> Row:
        return {"id": question_id, "response": response, "key": self.keys[question_id]}

    def _answers(self) -> dict[str, str]:
        rows = _rows(self.folder, "responses")
        return {row["id"]: row["response"] for row in rows if self.keys.get(row["id"]) == row["key"]}

    def _write(self, kind: str, rows: list[Row]) -> None:
        """Append rows with one write and one fsync."""
        if kind not in self._files:
            name = f"{kind}.{rank()}.jsonl" if rank() else f"{kind}.jsonl"
            self._files[kind] = (self.folder / name).open("a", encoding="utf-8", errors="backslashreplace")
        file = self._files[kind]
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def _rows(folder: Path, kind: str) -> Iterator[Row]:
    """Yield the rows of the merged file and of every process's own file, without incomplete lines."""
    for path in sorted(folder.glob(f"{kind}*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            if not line:
                continue
            try:
                row: Any = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and row.keys() == FIELDS[kind]:
                yield row
            else:
                log.warning("%s: skipped an incomplete line", path)


def _merge_files(folder: Path) -> None:
    """Merge all processes' complete lines into one file, so that nothing is ever appended to an incomplete line.

    Files of failed questions are removed: those questions are tried again.
    """
    rows = {(row["id"], row["key"]): row for row in _rows(folder, "responses")}
    _replace(folder, "responses", list(rows.values()))
    for path in folder.glob("failed*.jsonl"):
        path.unlink()


def _replace(folder: Path, kind: str, rows: Sequence[Row]) -> None:
    """Write the merged file of a kind and remove the processes' own files."""
    temporary = folder / f".{kind}.jsonl"
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:  # lone surrogates as JSON escapes
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / f"{kind}.jsonl")
    for path in folder.glob(f"{kind}.*.jsonl"):
        path.unlink()


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
