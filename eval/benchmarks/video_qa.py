"""Open-ended video QA: MSVD-QA, MSRVTT-QA, ActivityNet-QA and TGIF-QA.

Data: the official files, or the form in which Video-ChatGPT and Video-LLaVA distribute all four (folder
GPT_Zero_Shot_QA): test_q.json with the questions and test_a.json with the answers, as ActivityNet-QA comes. Predictions
are read in both forms.

Scorers: a response is correct if it equals the reference character by character: xudejing/video-question-answering,
run_gra.py (MSVD-QA, MSRVTT-QA); MILVLG/activitynet-qa, evaluation/eval.py; YunseokJANG/tgif-qa, code/gifqa (FrameQA;
Action and Transition by the option's number). The references are lower case, so "Yes." is wrong; the report's metrics
also hold the accuracy that ignores case and a final period. The verdicts of a judge, as in Video-ChatGPT
(mbzuai-oryx/Video-ChatGPT, quantitative_evaluation), have a column of their own.
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
QUESTION_WORDS = ("what", "who", "how", "when", "where")  # the question types in the paper of MSVD-QA and MSRVTT-QA
FREE = ("yes/no", "color", "object", "location", "number", "other")  # ActivityNet-QA's types 3 to 8
ACTIVITY_TYPES = (("type: motion",), ("type: spatial relationship",), ("type: temporal relationship",)) + tuple(
    ("type: free", f"answer: {kind}") for kind in FREE
)
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
FRAME_TYPES = ("object", "number", "color", "location")


class OpenVideoQA(Benchmark):
    """Exact match, and optionally a judge's verdict."""

    answer_keys: ClassVar[tuple[str, str]] = ("id", "answer")  # fields of the official predictions, a JSON list
    zero_shot: ClassVar[str]  # folder in GPT_Zero_Shot_QA
    zero_shot_videos: ClassVar[str]  # video folder inside `zero_shot`
    prefix: ClassVar[str] = ""  # of the video files; the annotations omit it

    def score(self, response: str, question: Question) -> Score:
        return Score.free_text(float(response == question.references[0]), response)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        matches = [_simplify(responses[q.id]) == _simplify(q.references[0]) for q in questions]
        return {"accuracy_any_case": 100 * sum(matches) / len(matches)}

    def find_questions(self, config: EvaluationConfig, *official: str, split: str = "test") -> Path:
        """Return the official file, or one in Video-ChatGPT's form. Raise UserError with the expected layout."""
        names = [f"{folder}{split}_{kind}.json" for kind in "qa" for folder in ("", f"{self.zero_shot}/")]
        return find_file(config.data, [*official, *names], self.layout)

    def paired_questions(self, config: EvaluationConfig, path: Path, *folders: str) -> list[Question]:
        """Read the questions from a pair of files, `path` being one of them.

        `<split>_q.json` holds rows of video_name, question and question_id; `<split>_a.json` holds rows of answer and
        question_id. The first alone is enough to generate, the second alone is enough to score.
        """
        rows, stem = _by_id(path), path.stem.removesuffix("_q").removesuffix("_a")
        if any("question" in row for row in rows.values()):
            question_rows, answer_rows = rows, _by_id(path.with_name(f"{stem}_a.json"))
        else:
            question_rows, answer_rows = _by_id(path.with_name(f"{stem}_q.json")), rows
        root = find_path(config.media) if config.media else path.parent
        videos = VideoFiles([*(root / name for name in (*folders, self.zero_shot_videos, ".")), root.parent / "videos"])
        questions = []
        for key in question_rows or answer_rows:
            if answer_rows and key not in answer_rows:
                raise UserError(f"{path}: question {key} has no answer in {stem}_a.json")
            row = question_rows.get(key) or {
                "question": "",
                "video_name": key.rpartition("_")[0].removeprefix("v_") or key,
            }
            text, video = map(str, fields(row, path, f"question {key}", "question", "video_name"))
            references = (
                (str(next(fields(answer_rows[key], path, f"question {key}", "answer"))),) if answer_rows else ()
            )
            categories = self.categories(text, answer_rows.get(key), f"{path}, question {key}")
            file = videos.find(f"{self.prefix}{video}", video)
            sample = conversation(key, self.prompt_text(config, text), [Video(file)], str(path))
            questions.append(Question(key, sample, references, video, categories, {"question": text}))
        return questions

    def prompt_text(self, config: EvaluationConfig, question: str) -> str:
        """Return the prompt for a question."""
        return self.format_prompt(config, question=question)

    def categories(self, question: str, answer: dict[str, Any] | None, where: str) -> tuple[str, ...]:
        """Return the categories of a question, from its text or its answer row. Raise UserError for an unknown type."""
        word = question.partition(" ")[0].lower()
        return (f"type: {word}",) if word in QUESTION_WORDS else ()

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read the official list, or Video-ChatGPT's output: id, question, answer (the reference) and pred."""
        rows = read_predicted(path)
        keys = rows[0].keys() if isinstance(rows, list) and rows and isinstance(rows[0], dict) else ()
        if "pred" in keys:
            return read_answers(path, "id" if "id" in keys else "question_id", "pred")
        official = self.answer_keys[1] in keys
        return read_answers(path, *self.answer_keys) if official else super().read_predictions(path, questions)

    def judge_prompt(self, response: str, question: Question) -> str:
        text, reference = question.details["question"], question.references[0]
        if options := question.details.get("options"):
            reference = f"{reference}. {options[LETTERS.index(reference)]}"
        return JUDGE.format(question=text, reference=reference, response=response.strip())

    def judge_score(self, verdict: str) -> float | None:
        match = VERDICT.search(verdict)
        return None if match is None else float(match[1].lower() == "yes")


class XuVideoQA(OpenVideoQA):
    """Xu et al. 2017: `<split>_qa.json` beside the videos of the base dataset, which are numbered."""

    splits = ("test", "val", "train")
    folders: ClassVar[tuple[str, ...]]

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        path = self.find_questions(config, f"{split}_qa.json", f"*/{split}_qa.json", split=split)
        if path.stem.endswith(("_q", "_a")):
            return self.paired_questions(config, path)
        root = path.parent if config.media is None else find_path(config.media)
        videos = VideoFiles([root / folder for folder in self.folders])
        names = self.file_names(path.parent)
        questions = []
        for number, row in enumerate(_rows(path)):
            question, answer, key, video = fields(row, path, f"row {number}", "question", "answer", "id", "video_id")
            file = videos.find(*names(str(video)))
            sample = conversation(
                str(key), self.format_prompt(config, question=str(question)), [Video(file)], str(path)
            )
            categories = self.categories(str(question), None, f"{path}, row {number}")
            details = {"question": str(question)}
            questions.append(Question(str(key), sample, (str(answer),), str(video), categories, details))
        return questions

    def file_names(self, folder: Path) -> Any:
        """Return a function that maps a video's number to the possible names of its file."""
        raise NotImplementedError


@BENCHMARKS.register("msvd_qa")
class MSVDQA(XuVideoQA):
    """MSVD-QA: exact match (xudejing/video-question-answering, run_gra.py)."""

    folders = ("video", "YouTubeClips", ".")
    zero_shot, zero_shot_videos = "MSVD_Zero_Shot_QA", "videos"
    layout = """  train_qa.json, val_qa.json, test_qa.json
  video/vid<number>.avi, or YouTubeClips/<name>.avi beside youtube_mapping.txt (lines of "<name> vid<number>")
  or MSVD_Zero_Shot_QA/ with test_q.json, test_a.json and videos/"""

    def file_names(self, folder: Path) -> Any:
        mapping = folder / "youtube_mapping.txt"
        rows = [line.split() for line in mapping.read_text().split("\n")] if mapping.is_file() else []
        names = {row[1]: row[0] for row in rows if len(row) == 2}
        return lambda number: (f"vid{number}", *filter(None, [names.get(f"vid{number}")]))


@BENCHMARKS.register("msrvtt_qa")
class MSRVTTQA(XuVideoQA):
    """MSRVTT-QA: exact match (xudejing/video-question-answering, run_gra.py)."""

    folders = ("video", "TestVideo", "TrainValVideo", "videos/all", ".")
    zero_shot, zero_shot_videos = "MSRVTT_Zero_Shot_QA", "videos/all"
    layout = """  train_qa.json, val_qa.json, test_qa.json
  video/video<number>.mp4 (or MSR-VTT's TestVideo/ and TrainValVideo/)
  or MSRVTT_Zero_Shot_QA/ with test_q.json, test_a.json and videos/all/"""

    def file_names(self, folder: Path) -> Any:
        return lambda number: (f"video{number}",)


@BENCHMARKS.register("activitynet_qa")
class ActivityNetQA(OpenVideoQA):
    """ActivityNet-QA: exact match (MILVLG/activitynet-qa, evaluation/eval.py)."""

    splits = ("test", "val", "train")
    answer_keys = ("question_id", "answer")
    zero_shot, zero_shot_videos, prefix = "Activitynet_Zero_Shot_QA", "all_test", "v_"
    missing_is_wrong = True  # eval.py divides the number of correct predictions by that of the annotations
    layout = """  test_q.json and test_a.json (val_, train_ likewise), or in dataset/
  videos/v_<video_name>.mp4 (or .mkv, .webm)
  or Activitynet_Zero_Shot_QA/ with test_q.json, test_a.json and all_test/"""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        split = self.split(config)
        path = self.find_questions(config, *(f"dataset/{split}_{kind}.json" for kind in "qa"), split=split)
        return self.paired_questions(config, path, "videos", "Test_Videos")

    def categories(self, question: str, answer: dict[str, Any] | None, where: str) -> tuple[str, ...]:
        if answer is None:
            return ()
        kind = answer.get("type")
        if not isinstance(kind, int) or kind not in range(len(ACTIVITY_TYPES)):
            raise UserError(f"{where}: type must be 0 to 8, found {kind!r}")
        return ACTIVITY_TYPES[kind]


@BENCHMARKS.register("tgif_qa")
class TGIFQA(OpenVideoQA):
    """TGIF-QA: exact match on FrameQA, accuracy on Action and Transition (YunseokJANG/tgif-qa, code/gifqa).

    The Count task, which is scored by squared error, is not included.
    """

    splits = ("frameqa", "action", "transition")
    prompt = "{question}\n{instruction}"
    zero_shot, zero_shot_videos = "TGIF_Zero_Shot_QA", "mp4"
    layout = """  Test_frameqa_question.csv, Test_action_question.csv, Test_transition_question.csv (tab-separated)
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
            gif, question, answer, key = fields(row, path, where, "gif_name", "question", "answer", "vid_id")
            prompt = self.prompt_text(config, question)
            details: dict[str, Any] = {"question": question}
            categories: tuple[str, ...] = ()
            if split == "frameqa":
                kind = next(fields(row, path, where, "type"))
                categories = (f"type: {FRAME_TYPES[int(kind)]}",) if kind in ("0", "1", "2", "3") else ()
            else:
                options = list(fields(row, path, where, "a1", "a2", "a3", "a4", "a5"))
                if answer not in ("0", "1", "2", "3", "4"):
                    raise UserError(f"{path}, {where}: answer must be 0 to 4, found {answer!r}")
                text, answer = f"{question}\n{option_lines(options)}", LETTERS[int(answer)]
                details["options"] = options
                prompt = self.format_prompt(config, question=text, instruction=LETTER)
            sample = conversation(key, prompt, [Video(videos.find(gif))], str(path))
            questions.append(Question(key, sample, (answer,), gif, categories, details))
        return questions

    def prompt_text(self, config: EvaluationConfig, question: str) -> str:
        return self.format_prompt(config, question=question, instruction=SHORT)

    def categories(self, question: str, answer: dict[str, Any] | None, where: str) -> tuple[str, ...]:
        return ()  # only FrameQA's own table has the types

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
    """Return rows by question id; empty if the file does not exist."""
    rows = _rows(path) if path.is_file() else []
    ids = [str(next(fields(row, path, f"row {number}", "question_id"))) for number, row in enumerate(rows)]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: a question_id occurs twice")
    return dict(zip(ids, rows, strict=True))


def _simplify(text: str) -> str:
    return text.strip().rstrip(".").lower()
