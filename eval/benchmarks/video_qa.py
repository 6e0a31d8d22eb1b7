"""`msvd_qa`, `msrvtt_qa`, `activitynet_qa`, `tgif_qa`: open questions on short videos.

Scorers: an answer is right if it is the reference, letter for letter: xudejing/video-question-answering, run_gra.py
(MSVD-QA, MSRVTT-QA); MILVLG/activitynet-qa, evaluation/eval.py; YunseokJANG/tgif-qa, code/gifqa (FrameQA; Action and
Transition by the option's number). The references are lower case, so "Yes." is wrong; the report's metrics hold the
accuracy without regard to case and final period beside it. What a judge finds, as in Video-ChatGPT
(mbzuai-oryx/Video-ChatGPT, quantitative_evaluation), stands in a column of its own.

Video-ChatGPT and Video-LLaVA hand all four out in another form, in a folder GPT_Zero_Shot_QA: test_q.json with the
questions and test_a.json with the answers, as ActivityNet-QA comes. Both forms are read, and their predictions, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from data_pipelines.samples import Video
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.choice import score_choice
from eval.layout import fields, find_file, read_answers, read_json, read_predicted, read_table
from eval.options import LETTERS, option_lines
from eval.videos import VideoFiles
from mmdora.core.config import EvaluationConfig
from mmdora.core.config_files import find_path
from mmdora.core.errors import UserError

VERDICT = re.compile(r"""(?i)["']?pred["']?\s*:\s*["']?(yes|no)\b""")
JUDGE = """You compare answers to a question about a video.
Question: {question}
Reference answer: {reference}
Answer to be judged: {response}
Does it say the same as the reference? Other words with the same meaning will do; something else, or nothing, will not.
Reply with one dictionary and nothing else, such as {{'pred': 'no', 'score': 1}}: 'pred' is 'yes' or 'no', and 'score' \
is how well the two agree, a whole number from 0 to 5."""
QUESTION_WORDS = ("what", "who", "how", "when", "where")  # the kinds of the MSVD-QA and MSRVTT-QA paper
FREE = ("yes/no", "color", "object", "location", "number", "other")  # ActivityNet-QA's types 3 to 8
ACTIVITY_TYPES = (("type: motion",), ("type: spatial relationship",), ("type: temporal relationship",)) + tuple(
    ("type: free", f"answer: {kind}") for kind in FREE
)
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
FRAME_TYPES = ("object", "number", "color", "location")


class OpenVideoQA(Benchmark):
    """Exact match, and a judge's verdict beside it."""

    answer_keys: ClassVar[tuple[str, str]] = ("id", "answer")  # of the official predictions, a JSON list
    zero_shot: ClassVar[str]  # its folder in GPT_Zero_Shot_QA
    zero_shot_videos: ClassVar[str]  # and the videos' in there
    prefix: ClassVar[str] = ""  # of the videos' files, which the annotations leave out

    def score(self, response: str, question: Question) -> Score:
        return Score.of_words(float(response == question.references[0]), response)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        same = [_plain(responses[q.id]) == _plain(q.references[0]) for q in questions]
        return {"accuracy_any_case": 100 * sum(same) / len(same)}

    def find_questions(self, config: EvaluationConfig, *official: str, split: str = "test") -> Path:
        """The official file, or one of those that Video-ChatGPT hands out. Raises UserError with the layout."""
        names = [f"{folder}{split}_{kind}.json" for kind in "qa" for folder in ("", f"{self.zero_shot}/")]
        return find_file(config.data, [*official, *names], self.layout)

    def paired_questions(self, config: EvaluationConfig, path: Path, *folders: str) -> list[Question]:
        """Of a file of questions and one of answers beside it, of which `path` is either: `<split>_q.json`, rows of
        video_name, question and question_id, and `<split>_a.json`, of answer and question_id. One will do, to ask or
        to score."""
        rows, stem = _by_id(path), path.stem.removesuffix("_q").removesuffix("_a")
        if any("question" in row for row in rows.values()):
            asked, answered = rows, _by_id(path.with_name(f"{stem}_a.json"))
        else:
            asked, answered = _by_id(path.with_name(f"{stem}_q.json")), rows
        root = find_path(config.media) if config.media else path.parent
        videos = VideoFiles([*(root / name for name in (*folders, self.zero_shot_videos, ".")), root.parent / "videos"])
        questions = []
        for key in asked or answered:
            if answered and key not in answered:
                raise UserError(f"{path}: question {key} has no answer in {stem}_a.json")
            row = asked.get(key) or {"question": "", "video_name": key.rpartition("_")[0].removeprefix("v_") or key}
            text, video = map(str, fields(row, path, f"question {key}", "question", "video_name"))
            references = (str(next(fields(answered[key], path, f"question {key}", "answer"))),) if answered else ()
            categories = self.categories(text, answered.get(key), f"{path}, question {key}")
            file = videos.find(f"{self.prefix}{video}", video)
            sample = conversation(key, self.words(config, text), [Video(file)], str(path))
            questions.append(Question(key, sample, references, video, categories, {"question": text}))
        return questions

    def words(self, config: EvaluationConfig, asked: str) -> str:
        """The user's words."""
        return self.ask(config, question=asked)

    def categories(self, asked: str, answer: dict[str, Any] | None, where: str) -> tuple[str, ...]:
        """What a question counts in, by its words or by the row with its answer. Raises UserError for another type."""
        word = asked.partition(" ")[0].lower()
        return (f"type: {word}",) if word in QUESTION_WORDS else ()

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """The official list; or what Video-ChatGPT's scripts write: id, question, answer (the reference) and pred."""
        rows = read_predicted(path)
        keys = rows[0].keys() if isinstance(rows, list) and rows and isinstance(rows[0], dict) else ()
        if "pred" in keys:
            return read_answers(path, "id" if "id" in keys else "question_id", "pred")
        official = self.answer_keys[1] in keys
        return read_answers(path, *self.answer_keys) if official else super().read_predictions(path, questions)

    def judge_prompt(self, response: str, question: Question) -> str:
        asked, reference = question.details["question"], question.references[0]
        if options := question.details.get("options"):
            reference = f"{reference}. {options[LETTERS.index(reference)]}"
        return JUDGE.format(question=asked, reference=reference, response=response.strip())

    def judge_score(self, verdict: str) -> float | None:
        found = VERDICT.search(verdict)
        return None if found is None else float(found[1].lower() == "yes")


class XuVideoQA(OpenVideoQA):
    """Xu et al. 2017: `<split>_qa.json` beside the base dataset's videos, which have numbers."""

    splits = ("test", "val", "train")
    folders: ClassVar[tuple[str, ...]]

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        path = self.find_questions(config, f"{split}_qa.json", f"*/{split}_qa.json", split=split)
        if path.stem.endswith(("_q", "_a")):
            return self.paired_questions(config, path)
        root = path.parent if config.media is None else find_path(config.media)
        videos = VideoFiles([root / folder for folder in self.folders])
        names = self.names(path.parent)
        questions = []
        for number, row in enumerate(_rows(path)):
            asked, answer, key, video = fields(row, path, f"row {number}", "question", "answer", "id", "video_id")
            file = videos.find(*names(str(video)))
            sample = conversation(str(key), self.ask(config, question=str(asked)), [Video(file)], str(path))
            categories = self.categories(str(asked), None, f"{path}, row {number}")
            details = {"question": str(asked)}
            questions.append(Question(str(key), sample, (str(answer),), str(video), categories, details))
        return questions

    def names(self, folder: Path) -> Any:
        """A function from a video's number to the names that its file may have."""
        raise NotImplementedError


@BENCHMARKS.register("msvd_qa")
class MSVDQA(XuVideoQA):
    """MSVD-QA, exact match (xudejing/video-question-answering, run_gra.py)."""

    folders = ("video", "YouTubeClips", ".")
    zero_shot, zero_shot_videos = "MSVD_Zero_Shot_QA", "videos"
    layout = """  train_qa.json, val_qa.json, test_qa.json
  video/vid<number>.avi, or YouTubeClips/<name>.avi beside youtube_mapping.txt (lines of "<name> vid<number>")
  or MSVD_Zero_Shot_QA/ with test_q.json, test_a.json and videos/"""

    def names(self, folder: Path) -> Any:
        mapping = folder / "youtube_mapping.txt"
        rows = [line.split() for line in mapping.read_text().split("\n")] if mapping.is_file() else []
        clips = {row[1]: row[0] for row in rows if len(row) == 2}
        return lambda number: (f"vid{number}", *filter(None, [clips.get(f"vid{number}")]))


@BENCHMARKS.register("msrvtt_qa")
class MSRVTTQA(XuVideoQA):
    """MSRVTT-QA, exact match (xudejing/video-question-answering, run_gra.py)."""

    folders = ("video", "TestVideo", "TrainValVideo", "videos/all", ".")
    zero_shot, zero_shot_videos = "MSRVTT_Zero_Shot_QA", "videos/all"
    layout = """  train_qa.json, val_qa.json, test_qa.json
  video/video<number>.mp4 (or TestVideo/ and TrainValVideo/, as MSR-VTT comes)
  or MSRVTT_Zero_Shot_QA/ with test_q.json, test_a.json and videos/all/"""

    def names(self, folder: Path) -> Any:
        return lambda number: (f"video{number}",)


@BENCHMARKS.register("activitynet_qa")
class ActivityNetQA(OpenVideoQA):
    """ActivityNet-QA, exact match (MILVLG/activitynet-qa, evaluation/eval.py)."""

    splits = ("test", "val", "train")
    answer_keys = ("question_id", "answer")
    zero_shot, zero_shot_videos, prefix = "Activitynet_Zero_Shot_QA", "all_test", "v_"
    missing_is_wrong = True  # eval.py counts the right predictions, and divides by the annotations
    layout = """  test_q.json and test_a.json (val_, train_ likewise), or dataset/ that holds them
  videos/v_<video_name>.mp4 (or .mkv, .webm)
  or Activitynet_Zero_Shot_QA/ with test_q.json, test_a.json and all_test/"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        path = self.find_questions(config, *(f"dataset/{split}_{kind}.json" for kind in "qa"), split=split)
        return self.paired_questions(config, path, "videos", "Test_Videos")

    def categories(self, asked: str, answer: dict[str, Any] | None, where: str) -> tuple[str, ...]:
        if answer is None:
            return ()
        kind = answer.get("type")
        if not isinstance(kind, int) or kind not in range(len(ACTIVITY_TYPES)):
            raise UserError(f"{where}: type must be 0 to 8, found {kind!r}")
        return ACTIVITY_TYPES[kind]


@BENCHMARKS.register("tgif_qa")
class TGIFQA(OpenVideoQA):
    """TGIF-QA: FrameQA by exact match; splits `action` and `transition` by the option (YunseokJANG/tgif-qa, gifqa).

    The Count task, whose figure is a squared error, is not among them.
    """

    splits = ("frameqa", "action", "transition")
    prompt = "{question}\n{instruction}"
    zero_shot, zero_shot_videos = "TGIF_Zero_Shot_QA", "mp4"
    layout = """  Test_frameqa_question.csv, Test_action_question.csv, Test_transition_question.csv (with tabs)
  gifs/<gif_name>.gif
  or TGIF_Zero_Shot_QA/ with test_q.json, test_a.json and mp4/"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        name = f"Test_{split}_question.csv"
        places = [name, f"dataset/{name}", f"annotations/{name}"]
        if split == "frameqa":
            path = self.find_questions(config, *places)
        else:
            path = find_file(config.data, places, self.layout)
        if path.suffix == ".json":
            return self.paired_questions(config, path)
        root = find_path(config.media) if config.media else path.parent
        videos = VideoFiles([root / "gifs", root, root.parent / "gifs"])
        questions = []
        for number, row in enumerate(read_table(path, "\t"), 1):
            where = f"row {number}"
            gif, asked, answer, key = fields(row, path, where, "gif_name", "question", "answer", "vid_id")
            words = self.words(config, asked)
            details: dict[str, Any] = {"question": asked}
            categories: tuple[str, ...] = ()
            if split == "frameqa":
                kind = next(fields(row, path, where, "type"))
                categories = (f"type: {FRAME_TYPES[int(kind)]}",) if kind in ("0", "1", "2", "3") else ()
            else:
                options = list(fields(row, path, where, "a1", "a2", "a3", "a4", "a5"))
                if answer not in ("0", "1", "2", "3", "4"):
                    raise UserError(f"{path}, {where}: answer must be 0 to 4, found {answer!r}")
                text, answer = f"{asked}\n{option_lines(options)}", LETTERS[int(answer)]
                details["options"] = options
                words = self.ask(config, question=text, instruction=LETTER)
            sample = conversation(key, words, [Video(videos.find(gif))], str(path))
            questions.append(Question(key, sample, (answer,), gif, categories, details))
        return questions

    def words(self, config: EvaluationConfig, asked: str) -> str:
        return self.ask(config, question=asked, instruction=SHORT)

    def categories(self, asked: str, answer: dict[str, Any] | None, where: str) -> tuple[str, ...]:
        return ()  # FrameQA's kinds stand in its own table alone

    def score(self, response: str, question: Question) -> Score:
        return score_choice(response, question) if "options" in question.details else super().score(response, question)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        return {} if "options" in questions[0].details else super().extras(responses, questions)


def _rows(path: Path) -> list[Any]:
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of objects")
    return rows


def _by_id(path: Path) -> dict[str, Any]:
    """Rows by question id; none where the file is not there."""
    rows = _rows(path) if path.is_file() else []
    ids = [str(next(fields(row, path, f"row {number}", "question_id"))) for number, row in enumerate(rows)]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: the same question_id is there twice")
    return dict(zip(ids, rows, strict=True))


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()
