"""What a benchmark shares with the data that a model is trained on: files, pictures that look the same, questions.

A file that is the same byte for byte is exact (SHA-256); one that looks the same is near (eval/fingerprints.py). A
question is shared where its words, but for case and punctuation, are asked about the same pictures and clips, or about
none in both. Words alone that are asked about other pictures ("What colour is it?") are counted apart and no leak.
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

from data_pipelines.inspection import readable_samples
from data_pipelines.samples import Image, Sample, Video
from data_pipelines.sources import Source, read_source
from eval.benchmarks import BENCHMARKS, Benchmark, Question
from eval.benchmarks.choice import LETTER_PROMPT
from eval.digests import media_digest
from eval.fingerprints import Fingerprint, FingerprintCache, Near, fingerprint_cache
from mmdora.core.config import EvaluationConfig, SourceConfig
from mmdora.core.errors import UserError

MOST_FILES = 10_000  # on each side, compared by their looks after an evaluation
SHOWN = 5  # examples of each kind in a receipt
CHUNK = 256  # fingerprints that are searched for at once
WORD = re.compile(r"[^\W_]+")
NO_MEDIA = Path()  # in place of the pictures of a sample that has none

Asked = Mapping[str, Sequence[Question]]  # by the name of the `evaluation` entry


@dataclass
class Overlap:
    """Of one benchmark with the training data."""

    files: int  # of the benchmark
    files_compared: int  # of them, by their looks
    training_files: int
    training_files_compared: int  # of them, by their looks
    exact: dict[Path, Path] = field(default_factory=dict)  # the benchmark's file, and one that is trained on
    near: dict[Path, Path] = field(default_factory=dict)  # likewise, without those that are exact
    questions: list[str] = field(default_factory=list)  # ids
    words_alone: int = 0

    def receipt(self) -> dict[str, Any]:
        """Counts and examples, of JSON's types."""
        found: dict[str, Any] = {
            "files": self.files,
            "files_compared": self.files_compared,
            "training_files": self.training_files,
            "training_files_compared": self.training_files_compared,
            "exact": len(self.exact),
            "near": len(self.near),
            "questions": len(self.questions),
            "question_words_alone": self.words_alone,
            "examples": {
                kind: [{"file": str(mine), "training": str(theirs)} for mine, theirs in sorted(pairs.items())[:SHOWN]]
                for kind, pairs in (("exact", self.exact), ("near", self.near))
            },
        }
        found["examples"]["questions"] = self.questions[:SHOWN]
        return found


def comparison(
    training: Sequence[SourceConfig], seed: int, entries: Sequence[EvaluationConfig], asked: Asked
) -> Callable[[], dict[str, dict[str, Any]]]:
    """What finds out, when it is first wanted, what each entry shares with a run's training data: for receipts, by the
    entry's name. Training data that is not there any more is said to be absent, and why."""

    @cache
    def found() -> dict[str, dict[str, Any]]:
        sources, absent = [], []
        for config in training:
            try:
                sources.append(read_source(config, seed))
            except UserError as error:
                absent.append(str(error))
        about = {"compared_with": [str(source.path) for source in sources], "absent": absent}
        overlaps = find_overlaps(sources, entries, asked, MOST_FILES)
        return {name: about | overlap.receipt() for name, overlap in overlaps.items()}

    return found


def find_overlaps(
    sources: Sequence[Source],
    entries: Sequence[EvaluationConfig],
    asked: Asked,
    most: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Overlap]:
    """What each entry's questions share with the training data, by the entry's name.

    Every training file is compared by its bytes. By their looks at most about `most` files on each side are, at equal
    steps over all; what that takes is kept in the user's cache. `advance` hears how many more samples were seen.
    """
    prompts = {entry.prompt or BENCHMARKS[entry.benchmark].prompt for entry in entries}
    frames = [_frame(prompt) for prompt in (*prompts, Benchmark.prompt, LETTER_PROMPT)]  # training data has LLaVA's
    with fingerprint_cache() as cache:
        held_out = _HeldOut(asked, frames, cache, most)
        seen: set[Path] = set()
        with_media = sum(int(((source.images > 0) | (source.videos > 0)).sum()) for source in sources)
        step, place, compared = max(1, -(-with_media // most)), 0, 0
        for sample in (sample for source in sources for sample in readable_samples(source)):
            advance(1)
            held_out.hear(sample, frames)
            media = list(sample.media())
            new = [part for part in media if part.path not in seen]
            seen.update(part.path for part in new)
            for part in new:
                held_out.match_bytes(part)
                if place % step == 0:
                    compared += held_out.match_looks(part)
            place += bool(media)
        held_out.search()
    return {name: held_out.overlap(asked[name], frames, len(seen), compared) for name in asked}


class _HeldOut:
    """All entries' files and words, against which training samples are held one by one; no content is held."""

    def __init__(self, asked: Asked, frames: Sequence[tuple[str, str]], cache: FingerprintCache, most: int):
        questions = [question for entry in asked.values() for question in entry]
        parts = {part.path: part for question in questions for part in question.sample.media()}
        self.cache = cache
        self.by_size: defaultdict[int, dict[Path, Image | Video]] = defaultdict(dict)
        for path, part in parts.items():
            self.by_size[_bytes(part)][path] = part
        self.by_size.pop(0, None)
        self.digests: dict[int, dict[str, list[Path]]] = {}  # of a size, once a training file has it
        chosen = list(parts.values())[:: max(1, -(-len(parts) // most))]
        looks = {part.path: found for part in chosen if (found := cache.get(part)) is not None}
        self.looked, self.near = list(looks), Near(list(looks.values()))
        self.waiting: list[tuple[Path, Fingerprint]] = []
        self.exact: defaultdict[Path, set[Path]] = defaultdict(set)
        self.alike: defaultdict[Path, set[Path]] = defaultdict(set)
        self.said: dict[str, set[Path]] = {
            words: set() for question in questions for words in _wordings(question.sample.messages[-1].text, frames)
        }

    def hear(self, sample: Sample, frames: Sequence[tuple[str, str]]) -> None:
        """What of the sample's words is asked too, and about which files."""
        for message in sample.messages:
            if message.role != "user":
                continue
            for words in _wordings(message.text, frames):
                if words in self.said:
                    self.said[words].update([part.path for part in sample.media()] or [NO_MEDIA])

    def match_bytes(self, part: Image | Video) -> None:
        """Only files of one size are read and compared."""
        size = _bytes(part)
        if size not in self.by_size:
            return
        if size not in self.digests:
            self.digests[size] = defaultdict(list)
            for path, mine in self.by_size[size].items():
                self.digests[size][media_digest(mine)].append(path)
        for path in self.digests[size].get(media_digest(part), []):
            self.exact[path].add(part.path)

    def match_looks(self, part: Image | Video) -> bool:
        """Whether the file could be looked at; it is compared with some others at once."""
        found = self.cache.get(part) if self.looked else None
        if found is None:
            return False
        self.waiting.append((part.path, found))
        if len(self.waiting) == CHUNK:
            self.search()
        return True

    def search(self) -> None:
        for mine, theirs in self.near.search([found for _, found in self.waiting]):
            self.alike[self.looked[mine]].add(self.waiting[theirs][0])
        self.waiting = []

    def overlap(
        self, questions: Sequence[Question], frames: Sequence[tuple[str, str]], files: int, compared: int
    ) -> Overlap:
        mine = {part.path for question in questions for part in question.sample.media()}
        found = Overlap(len(mine), len(mine & set(self.looked)), files, compared)
        found.exact = {path: min(self.exact[path]) for path in mine if path in self.exact}
        found.near = {path: min(self.alike[path]) for path in mine if path in self.alike and path not in self.exact}
        for question in questions:
            about = set[Path]().union(*(self.said[w] for w in _wordings(question.sample.messages[-1].text, frames)))
            shown = [part.path for part in question.sample.media()]
            shared = [(self.exact.get(p, set()) | self.alike.get(p, set())) & about for p in shown]
            if all(shared) if shown else NO_MEDIA in about:
                found.questions.append(question.id)
            elif about:
                found.words_alone += 1
        return found


def _bytes(part: Image | Video) -> int:
    """Of a file's content; 0 for one that is missing, or that is a directory of pictures."""
    if part.data is not None:
        return len(part.data)
    return part.path.stat().st_size if part.path.is_file() else 0


def _words(text: str) -> str:
    """Without case and punctuation."""
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _frame(template: str) -> tuple[str, str]:
    """What a prompt says before and after the question."""
    return _words(template.partition("{")[0]), _words(template.rpartition("}")[2])


def _wordings(text: str, frames: Sequence[tuple[str, str]]) -> Iterator[str]:
    """A question's words, as they stand and without the words that a prompt adds."""
    words = _words(text)
    bare = {words} | {words.removeprefix(before).removesuffix(after).strip() for before, after in frames}
    yield from (each for each in bare if each)
