"""Recall at k and ranks of text-video retrieval, as CLIP4Clip's metrics.py computes them (ArrowLuo/CLIP4Clip).

Pure functions on similarities. Ranks count from 0. If the correct candidate ties with others, the official code counts
every tied place as a separate rank, so there can be more ranks than queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RECALLS = (1, 5, 10)


def tied_ranks(similarity: np.ndarray) -> list[list[int]]:
    """Return for each query the places of all candidates that are as similar as the correct one, the best place first.

    `similarity` is square, [queries, candidates], with the correct candidates on the diagonal (metrics.py,
    compute_metrics).
    """
    ordered = np.sort(-similarity, axis=1)
    tied = ordered - np.diag(-similarity)[:, np.newaxis] == 0
    return [np.flatnonzero(row).tolist() for row in tied]


def rank_figures(ranks: Sequence[int]) -> dict[str, float]:
    """Return R1, R5 and R10 in percent, and the median and mean rank counted from 1."""
    array = np.asarray(ranks)
    figures = {f"R{k}": float(np.sum(array < k)) * 100 / len(array) for k in RECALLS}
    return figures | {"MedianR": float(np.median(array)) + 1, "MeanR": float(np.mean(array)) + 1}


def sentence_ranks(similarity: np.ndarray) -> np.ndarray:
    """Return each sentence's rank of its video, for videos with several sentences.

    `similarity` is [videos, sentences, videos], padded with -inf for videos with fewer sentences (metrics.py,
    tensor_text_to_video_metrics). Tied videos keep their order.
    """
    by_sentence = similarity.transpose(1, 0, 2)
    order = np.argsort(-by_sentence, axis=-1, kind="stable")
    places = np.argsort(order, axis=-1, kind="stable")
    own = np.diagonal(similarity, axis1=0, axis2=2)  # [sentences, videos]
    return np.diagonal(places, axis1=1, axis2=2)[np.isfinite(own)]


def sentence_figures(ranks: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return the figures of `sentence_ranks` as the official code computes them.

    Unlike `rank_figures`: recalls in single precision, the lower of two medians, and the ranks' standard deviation.
    """
    array = np.asarray(ranks) + 1
    figures = {f"R{k}": float(np.float32(100 * np.sum(array <= k)) / np.float32(len(array))) for k in RECALLS}
    median = float(np.sort(array)[(len(array) - 1) // 2])
    return figures | {"MedianR": median, "MeanR": float(np.mean(array)), "Std_Rank": float(np.std(array))}


def video_to_sentences(similarity: np.ndarray) -> np.ndarray:
    """Return each video's similarity to the most similar sentence of each video's group, [videos, groups] (metrics.py,
    tensor_video_to_text_sim)."""
    return np.where(np.isnan(similarity), -np.inf, similarity).max(axis=1).T
