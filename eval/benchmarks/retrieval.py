"""Text-video retrieval by features: MSR-VTT 1k-A (Yu et al., ECCV 2018) and MSVD (Chen and Dolan, ACL 2011).

Data: for MSR-VTT a CSV file with one sentence per video; for MSVD, in CLIP4Clip's form, a list of videos per split and
a pickle of their captions, about 40 sentences per video. Videos are beside these files.

Scorer: ArrowLuo/CLIP4Clip, metrics.py, over similarities [sentences, videos] in file order. The headline is the recall
at 1 of videos by sentences. A "response" is the rank of the correct video among all. Quirk reproduced: if the correct
video ties with others, every tied rank counts. If videos have several sentences, as in MSVD, ties are broken by video
order instead, and a video's similarity to another video's sentences is that of the closest sentence.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.samples import Video
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.video_captions import MSRVTT_FOLDERS, videos_of
from eval.layout import find_file, read_json, read_lines, read_table
from eval.metrics import Totals
from eval.retrieval import rank_figures, sentence_figures, sentence_ranks, tied_ranks, video_to_sentences
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

DIRECTIONS = ("text_to_video", "video_to_text")
NUM_BEST = 5  # videos that a response lists


class VideoRetrieval(Benchmark):
    """One question per sentence; its only reference is the name of its video."""

    prompt = "{question}"  # the sentence alone
    compares_features = True
    has_strict = False

    def score(self, response: str, question: Question) -> Score:
        ranks = read_ranks(response)["text_to_video"]
        hits = sum(rank == 0 for rank in ranks)
        recall = hits / len(ranks) if ranks else 0.0
        return Score(recall, recall, counts={"hits": hits, "ranks": len(ranks)})

    def headline(self, totals: Totals, kind: str) -> np.ndarray:
        """Return the recall at 1 of videos by sentences, in percent."""
        return 100 * totals["hits"] / totals["ranks"]

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        answers = [read_ranks(responses[q.id]) for q in questions]
        several_sentences = len(video_names(questions)) < len(questions)
        figures: dict[str, float] = {}
        for direction in DIRECTIONS:
            ranks = list(chain.from_iterable(answer[direction] for answer in answers))
            compute = sentence_figures if several_sentences and direction == "text_to_video" else rank_figures
            if ranks:
                figures |= {f"{direction}_{name}": value for name, value in compute(ranks).items()}
        return figures

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read similarities [sentences, videos] in file order as .npy or JSON lists, or mmdora's responses.jsonl."""
        if path.suffix == ".npy":
            try:
                values = np.load(path, allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise UserError(f"{path}: not a NumPy array ({error})") from None
        elif path.suffix == ".json":
            values = read_json(path)
        else:
            return super().read_predictions(path, questions)
        shape = (len(questions), len(video_names(questions)))
        return list(rank_responses(_matrix(values, path, shape), questions).items())


@BENCHMARKS.register("msrvtt_retrieval")
class MSRVTTRetrieval(VideoRetrieval):
    """MSR-VTT 1k-A retrieval: recall at 1 of videos by sentences (ArrowLuo/CLIP4Clip, metrics.py)."""

    layout = """<data>/MSRVTT_JSFUSION_test.csv
<data>/MSRVTT_Videos/video9770.mp4 or <data>/videos/all/video9770.mp4 or <data>/TestVideo/video9770.mp4"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        names = ["MSRVTT_JSFUSION_test.csv", "*/MSRVTT_JSFUSION_test.csv"]
        file = find_file(config.data, names, self.layout)
        videos = videos_of(config, *MSRVTT_FOLDERS)
        rows = read_table(file)
        if rows and not {"video_id", "sentence"} <= rows[0].keys():
            raise UserError(f"{file}: expected the columns key, vid_key, video_id and sentence")
        questions = []
        for row in rows:
            name, text = row["video_id"], self.format_prompt(config, question=row["sentence"])
            questions.append(Question(name, conversation(name, text, [Video(videos.find(name))]), (name,), name))
        return questions


@BENCHMARKS.register("msvd_retrieval")
class MSVDRetrieval(VideoRetrieval):
    """MSVD retrieval: recall at 1 of videos by sentences, several per video (ArrowLuo/CLIP4Clip, metrics.py)."""

    splits = ("test", "val", "train")
    layout = """<data>/test_list.txt, val_list.txt, train_list.txt  (a video per line)
<data>/raw-captions.pkl  (by video, a list of captions, each a list of words)
<data>/YouTubeClips/-4wsuPCjDBc_5_15.avi or <data>/videos/-4wsuPCjDBc_5_15.avi"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        name = f"{self.split(config)}_list.txt"
        file = find_file(config.data, [name, f"*/{name}"], self.layout)
        captions = read_captions(file.with_name("raw-captions.pkl"), self.layout)
        videos = videos_of(config, "YouTubeClips", "videos", ".")
        questions = []
        for video in map(str.strip, read_lines(file)):
            if not captions.get(video):
                raise UserError(f"{file}: raw-captions.pkl has no captions of the video {video!r}")
            for number, words in enumerate(captions[video]):
                key, text = f"{video}/{number}", self.format_prompt(config, question=" ".join(words))
                sample = conversation(key, text, [Video(videos.find(video))])
                questions.append(Question(key, sample, (video,), video))
        return questions


class _PlainUnpickler(pickle.Unpickler):
    """Loads builtin containers and strings only: a pickle that names a class or a function could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"refused {module}.{name}: only lists and strings are expected")


def read_captions(path: Path, layout: str) -> dict[str, list[list[str]]]:
    """Read CLIP4Clip's pickle of captions by video, each a list of words. Raise UserError for anything else."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected layout:\n{layout}")
    try:
        with path.open("rb") as file:
            captions = _PlainUnpickler(file).load()
    except (
        pickle.UnpicklingError,
        ValueError,
        EOFError,
        LookupError,
        AttributeError,
        TypeError,
        OverflowError,
    ) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(captions, dict):
        raise UserError(f"{path}: expected a dict of captions by video")
    for video, sentences in captions.items():
        if not isinstance(sentences, list) or not all(
            isinstance(words, list) and all(isinstance(word, str) for word in words) for words in sentences
        ):
            raise UserError(f"{path}, video {video!r}: expected a list of captions, each a list of words")
    return captions


def video_names(questions: Sequence[Question]) -> list[str]:
    """Return the videos in the order of their first question: the columns of a similarity matrix."""
    return list(dict.fromkeys(q.references[0] for q in questions))


def rank_responses(similarity: np.ndarray, questions: Sequence[Question]) -> dict[str, str]:
    """Return the response to each question as JSON, from similarities [questions, videos of `video_names`].

    A response holds the ranks of the correct video for the text and of the correct text for the video (from 0; several
    if there are ties), and the videos with the highest similarity. If a video has several sentences, the response to
    its first one holds the video's ranks.
    """
    names = video_names(questions)
    if len(names) < len(questions):
        text_ranks, video_ranks = _ranks_of_several_sentences(similarity, questions, names)
    else:
        text_ranks, video_ranks = tied_ranks(similarity), tied_ranks(similarity.T)
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :NUM_BEST]
    return {
        q.id: json.dumps(dict(zip(DIRECTIONS, ranks, strict=True)) | {"best": [names[i] for i in row]})
        for q, *ranks, row in zip(questions, text_ranks, video_ranks, best, strict=True)
    }


def _ranks_of_several_sentences(
    similarity: np.ndarray, questions: Sequence[Question], names: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return each question's ranks in both directions, as CLIP4Clip's main_task_retrieval.py computes them."""
    rows: list[list[int]] = [[] for _ in names]  # the questions of each video
    column = {name: i for i, name in enumerate(names)}
    for i, q in enumerate(questions):
        rows[column[q.references[0]]].append(i)
    padded = np.full((len(names), max(map(len, rows)), len(names)), -np.inf)  # [videos, sentences, videos]
    position = np.full(padded.shape[1::-1], -1)  # [sentences, videos]: the question, in the order of `sentence_ranks`
    for video, of_video in enumerate(rows):
        padded[video, : len(of_video)] = similarity[of_video]
        position[: len(of_video), video] = of_video
    text_ranks: list[list[int]] = [[] for _ in questions]
    for question, rank in zip(position[position >= 0], sentence_ranks(padded), strict=True):
        text_ranks[question] = [int(rank)]
    video_ranks: list[list[int]] = [[] for _ in questions]
    for of_video, ranks in zip(rows, tied_ranks(video_to_sentences(padded)), strict=True):
        video_ranks[of_video[0]] = ranks
    return text_ranks, video_ranks


def read_ranks(response: str) -> dict[str, list[int]]:
    """Return the ranks in a response by direction; empty for a response that is not from `rank_responses`."""
    try:
        answer = json.loads(response)
    except (ValueError, RecursionError):
        answer = None
    fields = answer if isinstance(answer, dict) else {}
    return {direction: _valid_ranks(fields.get(direction)) for direction in DIRECTIONS}


def _valid_ranks(value: Any) -> list[int]:
    is_ranks = isinstance(value, list) and all(type(rank) is int and rank >= 0 for rank in value)
    return value if is_ranks else []


def _matrix(values: Any, path: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        matrix = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):
        raise UserError(f"{path}: expected a list of lists of numbers") from None
    if matrix.shape != shape:
        raise UserError(f"{path}: expected {shape[0]} sentences x {shape[1]} videos, found the shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise UserError(f"{path}: {np.count_nonzero(~np.isfinite(matrix))} similarities are not finite numbers")
    return matrix
