"""Contamination: what a benchmark shares with the data that a model is trained on.

- Files with the same bytes (SHA-256) are exact copies.
- Files that look the same are near copies (eval/fingerprints.py).
- A question is shared if its words, apart from case and punctuation, occur in training with the same images and videos,
  or with none in both. The same words with other images ("What colour is it?") are counted separately; they are no
  leak.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from data_pipelines.dataset import Source, read_source
from data_pipelines.inspection import readable_samples
from data_pipelines.samples import Image, Sample, Video
from data_pipelines.splitting import split_off
from eval.benchmarks import BENCHMARKS, Benchmark, Question
from eval.benchmarks.choice import LETTER_PROMPT
from eval.digests import media_digest
from eval.fingerprints import Fingerprint, FingerprintCache, FingerprintIndex, fingerprint_cache
from mmdora.core.config import EvaluationConfig, SourceConfig
from mmdora.core.errors import UserError

MAX_FILES = 10_000  # on each side, compared by fingerprints after an evaluation
EXAMPLES = 5  # of each kind in a receipt
CHUNK = 256  # fingerprints in one search
WORD = re.compile(r"[^\W_]+")
NO_MEDIA = Path()  # stands for the media of a sample that has none

QuestionsByEntry = Mapping[str, Sequence[Question]]  # by the name of the `evaluation` entry
Affixes = tuple[str, str]  # a prompt's words before and after the question


@dataclass
class Overlap:
    """The overlap of one benchmark with the training data."""

    files: int  # the benchmark's files
    files_compared: int  # those that were compared by fingerprint
    training_files: int
    training_files_compared: int
    exact: dict[Path, Path] = field(default_factory=dict)  # benchmark file -> training file
    near: dict[Path, Path] = field(default_factory=dict)  # likewise, without exact copies
    questions: list[str] = field(default_factory=list)  # ids
    words_alone: int = 0

    def receipt(self) -> dict[str, Any]:
        """Return counts and examples as JSON types."""
        receipt: dict[str, Any] = {
            "files": self.files,
            "files_compared": self.files_compared,
            "training_files": self.training_files,
            "training_files_compared": self.training_files_compared,
            "exact": len(self.exact),
            "near": len(self.near),
            "questions": len(self.questions),
            "question_words_alone": self.words_alone,
            "examples": {
                kind: [
                    {"file": str(file), "training": str(training)}
                    for file, training in sorted(pairs.items())[:EXAMPLES]
                ]
                for kind, pairs in (("exact", self.exact), ("near", self.near))
            },
        }
        receipt["examples"]["questions"] = self.questions[:EXAMPLES]
        return receipt


def contamination_check(
    training: Sequence[SourceConfig],
    seed: int,
    entries: Sequence[EvaluationConfig],
    questions: QuestionsByEntry,
    validation_share: float | None = None,
) -> Callable[[], dict[str, dict[str, Any]]]:
    """Return a function that compares a run's training data with its benchmarks when it is first called.

    Its result is each entry's part of the receipt, by entry name. Training data that no longer exists is listed as
    `absent`, with the reason. Samples that the run held out for validation are not training data. If some data
    is absent, the split cannot be repeated, and they count as training data.
    """

    @cache
    def check() -> dict[str, dict[str, Any]]:
        sources, absent = [], []
        for config in training:
            try:
                sources.append(read_source(config, seed))
            except UserError as error:
                absent.append(str(error))
        if validation_share is not None and not absent:
            sources, _ = split_off(sources, validation_share, seed)
        common = {"compared_with": [str(source.path) for source in sources], "absent": absent}
        overlaps = find_overlaps(sources, entries, questions, MAX_FILES)
        return {name: common | overlap.receipt() for name, overlap in overlaps.items()}

    return check


def find_overlaps(
    sources: Sequence[Source],
    entries: Sequence[EvaluationConfig],
    questions: QuestionsByEntry,
    max_files: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Overlap]:
    """Return what each entry's questions share with the training data, by entry name.

    The bytes of all training files are compared. Fingerprints are compared for about `max_files` files on each side,
    evenly spaced; they are cached in the user's cache. `advance` is called with the number of samples read since the
    last call.
    """
    prompts = {entry.prompt or BENCHMARKS[entry.benchmark].prompt for entry in entries}
    # LLaVA's training data has LLaVA's prompts, whatever the entries' prompts are.
    affixes = [_affixes(prompt) for prompt in (*prompts, Benchmark.prompt, LETTER_PROMPT)]
    with fingerprint_cache() as cache:
        held_out = _HeldOut(questions, affixes, cache, max_files)
        seen: set[Path] = set()
        with_media = sum(int(((source.images > 0) | (source.videos > 0)).sum()) for source in sources)
        step, place, compared = max(1, -(-with_media // max_files)), 0, 0
        for sample in (sample for source in sources for sample in readable_samples(source)):
            advance(1)
            held_out.match_words(sample)
            media = list(sample.media())
            new = [part for part in media if part.path not in seen]
            seen.update(part.path for part in new)
            for part in new:
                held_out.match_bytes(part)
                if place % step == 0:
                    compared += held_out.match_fingerprint(part)
            place += bool(media)
        held_out.search()
    return {name: held_out.overlap(questions[name], len(seen), compared) for name in questions}


class _HeldOut:
    """All entries' files and words. Training samples are matched against them one by one; no content is kept."""

    def __init__(
        self, entries: QuestionsByEntry, affixes: Sequence[Affixes], cache: FingerprintCache, max_files: int
    ) -> None:
        questions = [question for entry in entries.values() for question in entry]
        parts = {part.path: part for question in questions for part in question.sample.media()}
        self.affixes, self.cache = affixes, cache
        self.by_size: defaultdict[int, dict[Path, Image | Video]] = defaultdict(dict)
        for path, part in parts.items():
            self.by_size[_size(part)][path] = part
        self.by_size.pop(0, None)
        self.digests: dict[int, dict[str, list[Path]]] = {}  # by size, once a training file has that size
        chosen = list(parts.values())[:: max(1, -(-len(parts) // max_files))]
        fingerprints = {part.path: found for part in chosen if (found := cache.get(part)) is not None}
        self.fingerprinted, self.index = list(fingerprints), FingerprintIndex(list(fingerprints.values()))
        self.waiting: list[tuple[Path, Fingerprint]] = []
        self.exact: defaultdict[Path, set[Path]] = defaultdict(set)
        self.near: defaultdict[Path, set[Path]] = defaultdict(set)
        self.media_of_words: dict[str, set[Path]] = {words: set() for q in questions for words in self._wordings(q)}

    def _wordings(self, question: Question) -> Iterator[str]:
        return _wordings(question.sample.messages[-1].text, self.affixes)

    def match_words(self, sample: Sample) -> None:
        """Record which of the sample's user messages are questions of a benchmark, and with which media."""
        for message in sample.messages:
            if message.role != "user":
                continue
            for words in _wordings(message.text, self.affixes):
                if words in self.media_of_words:
                    self.media_of_words[words].update([part.path for part in sample.media()] or [NO_MEDIA])

    def match_bytes(self, part: Image | Video) -> None:
        """Record exact copies. Only files of equal size are read."""
        size = _size(part)
        if size not in self.by_size:
            return
        if size not in self.digests:
            self.digests[size] = defaultdict(list)
            for path, held_out in self.by_size[size].items():
                self.digests[size][media_digest(held_out)].append(path)
        for path in self.digests[size].get(media_digest(part), []):
            self.exact[path].add(part.path)

    def match_fingerprint(self, part: Image | Video) -> bool:
        """Queue the file for the next search. Return whether it has a fingerprint."""
        fingerprint = self.cache.get(part) if self.fingerprinted else None
        if fingerprint is None:
            return False
        self.waiting.append((part.path, fingerprint))
        if len(self.waiting) == CHUNK:
            self.search()
        return True

    def search(self) -> None:
        """Record near copies among the queued files."""
        for held_out, training in self.index.search([fingerprint for _, fingerprint in self.waiting]):
            self.near[self.fingerprinted[held_out]].add(self.waiting[training][0])
        self.waiting = []

    def overlap(self, questions: Sequence[Question], training_files: int, compared: int) -> Overlap:
        files = {part.path for question in questions for part in question.sample.media()}
        overlap = Overlap(len(files), len(files & set(self.fingerprinted)), training_files, compared)
        overlap.exact = {path: min(self.exact[path]) for path in files if path in self.exact}
        overlap.near = {path: min(self.near[path]) for path in files if path in self.near and path not in self.exact}
        for question in questions:
            same_words = set[Path]().union(*(self.media_of_words[words] for words in self._wordings(question)))
            media = [part.path for part in question.sample.media()]
            shared = [(self.exact.get(p, set()) | self.near.get(p, set())) & same_words for p in media]
            if all(shared) if media else NO_MEDIA in same_words:
                overlap.questions.append(question.id)
            elif same_words:
                overlap.words_alone += 1
        return overlap


def _size(part: Image | Video) -> int:
    """Return the content's size in bytes; 0 for a missing file, and for a video that is a directory of images."""
    if part.data is not None:
        return len(part.data)
    return part.path.stat().st_size if part.path.is_file() else 0


def _words(text: str) -> str:
    """Return the text's words without case and punctuation."""
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _affixes(template: str) -> Affixes:
    return _words(template.partition("{")[0]), _words(template.rpartition("}")[2])


def _wordings(text: str, affixes: Sequence[Affixes]) -> Iterator[str]:
    """Yield a question's words, with and without the words that a prompt adds."""
    words = _words(text)
    wordings = {words} | {words.removeprefix(before).removesuffix(after).strip() for before, after in affixes}
    yield from (wording for wording in wordings if wording)
