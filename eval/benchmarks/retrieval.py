"""`msrvtt_retrieval`: which of 1,000 videos does a sentence describe? MSR-VTT 1k-A (Yu et al., ECCV 2018).

Scorer: ArrowLuo/CLIP4Clip, metrics.py, over similarities [sentences, videos] in the file's order. The headline is the
recall at 1 of videos by sentences. An answer is the right video's rank among all: where it ties with others, every tied
place counts as a rank of its own, in the official figures and so in ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.samples import Video
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.video_captions import MSRVTT_FOLDERS, videos_of
from eval.layout import find_file, read_json, read_table
from eval.metrics import Totals
from eval.retrieval import rank_figures, tied_ranks
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

DIRECTIONS = ("text_to_video", "video_to_text")
BEST = 5  # videos that an answer names


@BENCHMARKS.register("msrvtt_retrieval")
class MSRVTTRetrieval(Benchmark):
    """MSR-VTT 1k-A, recall at 1 of videos by sentences (ArrowLuo/CLIP4Clip, metrics.py)."""

    layout = """<data>/MSRVTT_JSFUSION_test.csv
<data>/MSRVTT_Videos/video9770.mp4 or <data>/videos/all/video9770.mp4 or <data>/TestVideo/video9770.mp4"""
    prompt = "{question}"  # the sentence alone
    compares_features = True
    has_strict = False

    def questions(self, config: EvaluationConfig) -> list[Question]:
        names = ["MSRVTT_JSFUSION_test.csv", "*/MSRVTT_JSFUSION_test.csv"]
        file = find_file(config.data, names, self.layout)
        videos = videos_of(config, *MSRVTT_FOLDERS)
        rows = read_table(file)
        if rows and not {"video_id", "sentence"} <= rows[0].keys():
            raise UserError(f"{file}: expected the columns key, vid_key, video_id and sentence")
        asked = []
        for row in rows:
            name, text = row["video_id"], self.ask(config, question=row["sentence"])
            asked.append(Question(name, conversation(name, text, [Video(videos.find(name))]), (name,), name))
        return asked

    def score(self, response: str, question: Question) -> Score:
        ranks = read_ranks(response)["text_to_video"]
        hits = sum(rank == 0 for rank in ranks)
        share = hits / len(ranks) if ranks else 0.0
        return Score(share, share, counts={"hits": hits, "ranks": len(ranks)})

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        return 100 * totals["hits"] / totals["ranks"]

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        found = [read_ranks(responses[q.id]) for q in questions]
        figures: dict[str, float] = {}
        for direction in DIRECTIONS:
            ranks = list(chain.from_iterable(answer[direction] for answer in found))
            if ranks:
                figures |= {f"{direction}_{name}": value for name, value in rank_figures(ranks).items()}
        return figures

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Similarities, sentences by videos in the file's order, as .npy or as JSON's lists; or our answers."""
        if path.suffix == ".npy":
            try:
                values = np.load(path, allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise UserError(f"{path}: no array of numpy ({error})") from None
        elif path.suffix == ".json":
            values = read_json(path)
        else:
            return super().read_predictions(path, questions)
        return list(ranked(_matrix(values, path, len(questions)), questions).items())


def ranked(similarity: np.ndarray, questions: Sequence[Question]) -> dict[str, str]:
    """Each question's answer, as JSON: the right video's ranks for the text, the text's for the video (from 0; several
    where it ties), and the videos found best."""
    ranks = zip(tied_ranks(similarity), tied_ranks(similarity.T), strict=True)
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :BEST]
    return {
        q.id: json.dumps(dict(zip(DIRECTIONS, pair, strict=True)) | {"best": [questions[i].id for i in row]})
        for q, pair, row in zip(questions, ranks, best, strict=True)
    }


def read_ranks(response: str) -> dict[str, list[int]]:
    """The ranks in an answer, by direction; none where it is not one of ours."""
    try:
        answer = json.loads(response)
    except (ValueError, RecursionError):
        answer = None
    found = answer if isinstance(answer, dict) else {}
    return {direction: _whole_numbers(found.get(direction)) for direction in DIRECTIONS}


def _whole_numbers(value: Any) -> list[int]:
    is_ranks = isinstance(value, list) and all(type(rank) is int and rank >= 0 for rank in value)
    return value if is_ranks else []


def _matrix(values: Any, path: Path, size: int) -> np.ndarray:
    try:
        matrix = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):
        raise UserError(f"{path}: expected a list of lists of numbers") from None
    if matrix.shape != (size, size):
        raise UserError(f"{path}: {size} sentences and as many videos are asked about, and this is {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise UserError(f"{path}: {np.count_nonzero(~np.isfinite(matrix))} similarities are no finite numbers")
    return matrix
