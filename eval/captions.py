"""BLEU, ROUGE-L and CIDEr over tokenized captions, as pycocoevalcap 1.2 (tylin/coco-caption) computes them.

Pure functions on parallel lists: `references[i]` are an image's captions, `hypotheses[i]` is the caption to score.
Values are on the official scales: 0 to 1, and 0 to 10 for CIDEr. Peculiarities of the official code are kept: BLEU's
constants in numerators and denominators, ROUGE-L's precision and recall from different references, and a CIDEr length
penalty that counts bigrams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

ORDERS = 4  # n-grams of one to four words
SMALL, TINY = 1e-9, 1e-15  # in BLEU: against division by zero, and against products that are exactly zero
BETA = 1.2  # in ROUGE-L: recall has beta² times the weight of precision
SIGMA = 6.0  # in CIDEr's length penalty, in words

NGram = tuple[str, ...]


def ngrams(caption: str) -> Counter[NGram]:
    """Count the n-grams of one to ORDERS words."""
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def bleu(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> tuple[list[float], list[tuple[float, ...]]]:
    """Return BLEU-1 to BLEU-4 of the corpus and of each image (bleu_scorer.py, with the closest reference length)."""
    counts = [_bleu_counts(refs, hypothesis) for refs, hypothesis in zip(references, hypotheses, strict=True)]
    return list(_bleu(np.sum(counts, axis=0))), [_bleu(row) for row in counts]


def _bleu_counts(references: Sequence[str], hypothesis: str) -> np.ndarray:
    """Return [caption length, closest reference length, matching n-grams per order, all n-grams per order]."""
    length = len(hypothesis.split())
    closest = min((abs(len(r.split()) - length), len(r.split())) for r in references)[1]
    largest: Counter[NGram] = Counter()
    for reference in references:
        largest |= ngrams(reference)
    matching = [0] * ORDERS
    for gram, count in ngrams(hypothesis).items():
        matching[len(gram) - 1] += min(count, largest[gram])
    return np.asarray([length, closest, *matching, *(max(0, length - n) for n in range(ORDERS))])


def _bleu(counts: np.ndarray) -> tuple[float, ...]:
    length, closest, *rest = (float(count) for count in counts)
    product, values = 1.0, []
    for n in range(ORDERS):
        product *= (rest[n] + TINY) / (rest[ORDERS + n] + SMALL)
        values.append(product ** (1 / (n + 1)))
    ratio = (length + TINY) / (closest + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return tuple(value * brevity for value in values)


def rouge_l(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> list[float]:
    """Return ROUGE-L of each image (rouge.py): the F score of its best precision and best recall.

    The corpus score is their mean.
    """
    return [_rouge_l(refs, hypothesis) for refs, hypothesis in zip(references, hypotheses, strict=True)]


def _rouge_l(references: Sequence[str], hypothesis: str) -> float:
    words = hypothesis.split(" ")  # not split(): an empty caption is one empty word
    reference_words = [reference.split(" ") for reference in references]
    common = [longest_common_subsequence(reference, words) for reference in reference_words]
    precision = max(common) / len(words)
    recall = max(length / len(reference) for length, reference in zip(common, reference_words, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return its length in words."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for i, match in enumerate(b, 1):
            longest = diagonal + 1 if word == match else max(row[i], row[i - 1])
            diagonal, row[i] = row[i], longest
    return row[-1]


def cider(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> list[float]:
    """Return CIDEr-D of each image (cider_scorer.py). The corpus score is their mean.

    Document frequencies come from these references, so the score of a single image is 0.
    """
    counted = [[ngrams(reference) for reference in refs] for refs in references]
    frequency: Counter[NGram] = Counter()
    for counts in counted:
        frequency.update(set().union(*counts))
    documents = math.log(len(counted)) if counted else 0.0
    scores = []
    for counts, hypothesis in zip(counted, hypotheses, strict=True):
        weighted = _Weighted(ngrams(hypothesis), frequency, documents)
        total = sum(weighted.similarity(_Weighted(count, frequency, documents)) for count in counts)
        scores.append(10 * total / ORDERS / len(counts))
    return scores


class _Weighted:
    """A caption's n-grams with tf-idf weights, and a norm for each order."""

    def __init__(self, counts: Counter[NGram], frequency: Mapping[NGram, int], documents: float) -> None:
        self.weights = {g: n * (documents - math.log(max(1, frequency.get(g, 0)))) for g, n in counts.items()}
        self.bigrams = sum(n for gram, n in counts.items() if len(gram) == 2)
        squares = [0.0] * ORDERS
        for gram, weight in self.weights.items():
            squares[len(gram) - 1] += weight**2
        self.norms = [math.sqrt(square) for square in squares]

    def similarity(self, reference: _Weighted) -> float:
        """Return the similarity summed over the orders, 0 to ORDERS."""
        products = [0.0] * ORDERS
        for gram, weight in self.weights.items():
            other = reference.weights.get(gram, 0.0)
            products[len(gram) - 1] += min(weight, other) * other
        norms = [a * b for a, b in zip(self.norms, reference.norms, strict=True)]
        cosine = sum(product / norm if norm else product for product, norm in zip(products, norms, strict=True))
        return cosine * math.exp(-((self.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2))
