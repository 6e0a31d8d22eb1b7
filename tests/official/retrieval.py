"""MSR-VTT retrieval (ArrowLuo/CLIP4Clip)."""

from __future__ import annotations

from itertools import chain

import numpy as np

from eval.retrieval import rank_figures, sentence_figures, sentence_ranks, tied_ranks, video_to_sentences
from tests.official import official


def one_way(similarity):
    ranks = list(chain.from_iterable(tied_ranks(similarity)))
    figures = rank_figures(ranks)
    return figures | {"MR": figures["MedianR"], "cols": ranks}


@official("retrieval", "square")
def square(similarity):
    matrix = np.asarray(similarity)
    return {"t2v": one_way(matrix), "v2t": one_way(matrix.T)}


@official("retrieval", "multi_sentence")
def multi_sentence(case):
    (rows,) = case.values()
    similarity = np.asarray(rows, dtype=np.float64)  # null becomes NaN
    padded = np.where(np.isnan(similarity), -np.inf, similarity)
    text_to_video = sentence_figures(sentence_ranks(padded))
    text_to_video["MR"] = text_to_video["MedianR"]
    return {"t2v": text_to_video, "v2t": one_way(video_to_sentences(padded))}
