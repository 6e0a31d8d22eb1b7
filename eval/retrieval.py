"""Recall at k and ranks of text-video retrieval, as CLIP4Clip's metrics.py computes them (ArrowLuo/CLIP4Clip).

Pure functions on similarities; ranks count from 0. Where the right one ties with others, the official code counts every
tied place as a rank of its own, so that there are more ranks than queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RECALLS = (1, 5, 10)


def tied_ranks(similarity: np.ndarray) -> list[list[int]]:
    """For each row of a square matrix [queries, candidates], whose right ones are on the diagonal: the places, best
    first, of the candidates as similar as the right one (metrics.py, compute_metrics)."""
    ordered = np.sort(-similarity, axis=1)
    same = ordered - np.diag(-similarity)[:, np.newaxis] == 0
    return [np.flatnonzero(row).tolist() for row in same]


def rank_figures(ranks: Sequence[int]) -> dict[str, float]:
    """R1, R5 and R10 in percent, the median and the mean rank, counted from 1."""
    found = np.asarray(ranks)
    figures = {f"R{k}": float(np.sum(found < k)) * 100 / len(found) for k in RECALLS}
    return figures | {"MedianR": float(np.median(found)) + 1, "MeanR": float(np.mean(found)) + 1}


def sentence_ranks(similarity: np.ndarray) -> np.ndarray:
    """Each sentence's rank of its video, where videos have several: `similarity` [videos, sentences, videos] is padded
    with -inf where a video has fewer (metrics.py, tensor_text_to_video_metrics). Ties stand in the videos' order."""
    by_sentence = similarity.transpose(1, 0, 2)
    order = np.argsort(-by_sentence, axis=-1, kind="stable")
    places = np.argsort(order, axis=-1, kind="stable")
    own = np.diagonal(similarity, axis1=0, axis2=2)  # [sentences, videos]
    return np.diagonal(places, axis1=1, axis2=2)[np.isfinite(own)]


def sentence_figures(ranks: Sequence[int] | np.ndarray) -> dict[str, float]:
    """As `rank_figures`, of `sentence_ranks`: the recalls in single precision, the lower of two medians, and the ranks'
    standard deviation, as the official code has them."""
    found = np.asarray(ranks) + 1
    figures = {f"R{k}": float(np.float32(100 * np.sum(found <= k)) / np.float32(len(found))) for k in RECALLS}
    median = float(np.sort(found)[(len(found) - 1) // 2])
    return figures | {"MedianR": median, "MeanR": float(np.mean(found)), "Std_Rank": float(np.std(found))}


def video_to_sentences(similarity: np.ndarray) -> np.ndarray:
    """[videos, groups of sentences]: how similar a video is to its most similar sentence of each group (metrics.py,
    tensor_video_to_text_sim)."""
    return np.where(np.isnan(similarity), -np.inf, similarity).max(axis=1).T
