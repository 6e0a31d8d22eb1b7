"""NExT-QA (five options) and NExT-OE (open answers): causal and temporal questions about videos.

Data: one CSV or Parquet file per split, and the videos; for NExT-OE's test split a file of second reference answers.

Scorers: doc-doc/NExT-QA, eval_mc.py: accuracy of the option index, by groups of question types. doc-doc/NExT-OE,
eval_oe.py and metrics.py: WUPS with threshold 0 over lemmas without stop words, against the better of two reference
answers if the test split has two; yes/no (DB) and counting (DC) questions by equality.

Deviation: eval_oe.py lemmatizes with pywsd, whose part-of-speech tagger needs data that no package provides. Here words
in -ing and -ed are looked up in WordNet as verbs first and all others as nouns first (`lemmas`); the rest is the
official computation. Figures that use the tagger differ slightly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from data_pipelines.samples import Video
from eval import wordnet
from eval.benchmarks.base import BENCHMARKS, Benchmark, Question, Score, conversation
from eval.benchmarks.choice import LETTER_PROMPT, score_choice
from eval.layout import fields, find_file, find_folder, read_json, read_parquet, read_predicted, read_table
from eval.options import LETTERS, option_lines
from eval.videos import VideoFiles
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

OPTIONS = 5
# Official names. A question belongs to the category of its type and to that of its group.
TYPES = {"CW": "Why", "CH": "How", "TN": "Bef&Aft", "TP": "Bef&Aft", "TC": "When", "DC": "Cnt", "DL": "Loc"}
TYPES |= {"DO": "Other", "DB": "Yes/No"}  # only the open-ended files have DB
EQUAL_ONLY = ("DC", "DB")
_STOPWORDS = """
i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his himself
she she's her hers herself it it's its itself they them their theirs themselves what which who whom this that that'll
these those am is are was were be been being have has had having do does did doing a an the and but if or because as
until while to from of at for with about into through during again further then here there when where why how all any
each most other some such only own so than too very s t can will just don don't should should've now d ll m o re ve y
ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven haven't isn isn't ma mightn
mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won won't wouldn wouldn't
"""
STOPWORDS = frozenset(_STOPWORDS.split())  # NExT-OE's stopwords.txt
LAYOUT = """  val.csv and test.csv (columns video, question, answer, qid, type{columns}), or dataset/nextqa/ with them
  map_vid_vidorID.json for videos in NExTVideo/<folder>/<id>.mp4; without it NExTVideo/<video>.mp4
  or, as on Hugging Face (lmms-lab/NExTQA): {folder}/<split>-00000-of-00001.parquet and NExTVideo/<video>.mp4"""


class NExT(Benchmark):
    """Files that NExT-QA and NExT-OE share."""

    splits = ("val", "test", "train")
    folder: ClassVar[str]  # folder of the Parquet files

    def rows(self, config: EvaluationConfig) -> tuple[Path, list[tuple[str, dict[str, str], Path]]]:
        """Return the split's file, and each row with its location ("row 1") and its video."""
        split = self.split(config)
        tables = [f"{folder}{split}.csv" for folder in ("", "nextqa/", "dataset/nextqa/")]
        parquet = f"{self.folder}/{'validation' if split == 'val' else split}-*.parquet"
        path = find_file(config.data, [*tables, parquet], self.layout)
        video_ids = read_object(path.with_name("map_vid_vidorID.json"))
        media = find_folder(config.data, ["NExTVideo", "videos/NExTVideo", "videos", "."], config.media, self.layout)
        videos, rows = VideoFiles([media, path.parent / "NExTVideo", path.parent.parent / "NExTVideo"]), []
        for number, row in enumerate(read_rows(path), 1):
            kind, video, _ = fields(row, path, f"row {number}", "type", "video", "qid")
            if kind not in TYPES:
                raise UserError(f"{path}, row {number}: type must be one of {', '.join(TYPES)}, found {kind!r}")
            names = (str(video_ids[video]), video) if video in video_ids else (video,)
            rows.append((f"row {number}", row, videos.find(*names)))
        return path, rows


@BENCHMARKS.register("nextqa")
class NExTQA(NExT):
    """NExT-QA: accuracy with five options (doc-doc/NExT-QA, eval_mc.py)."""

    prompt = LETTER_PROMPT
    folder = "MC"
    layout = LAYOUT.format(columns=", a0 … a4; answer is an index from 0", folder=folder)

    def questions(self, config: EvaluationConfig) -> list[Question]:
        path, rows = self.rows(config)
        questions = []
        for where, row, video in rows:
            question, answer, *options = fields(row, path, where, "question", "answer", "a0", "a1", "a2", "a3", "a4")
            if answer not in map(str, range(OPTIONS)):
                raise UserError(f"{path}, {where}: answer must be 0 to 4, found {answer!r}")
            key = f"{row['video']}_{row['qid']}"
            text = self.format_prompt(config, question=question, options=option_lines(options))
            sample = conversation(key, text, [Video(video)], str(path))
            categories = (f"type: {TYPES[row['type']]}", f"group: Acc_{row['type'][0]}")
            reference, details = LETTERS[int(answer)], {"options": options}
            questions.append(Question(key, sample, (reference,), row["video"], categories, details))
        return questions

    def score(self, response: str, question: Question) -> Score:
        return score_choice(response, question)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read `{"<video>_<qid>": {"prediction": 0…4, "answer": 0…4}}`.

        The official script trusts the answers in this file, so they must equal the annotations.
        """
        rows = read_predicted(path) if path.suffix == ".json" else None
        if not isinstance(rows, dict):
            return super().read_predictions(path, questions)
        references, pairs = {q.id: q.references[0] for q in questions}, []
        for key, row in rows.items():
            prediction, answer = fields(row, path, f"entry {key}", "prediction", "answer")
            if not isinstance(prediction, int) or not isinstance(answer, int) or answer not in range(OPTIONS):
                raise UserError(f"{path}, entry {key}: prediction and answer must be integers from 0 to 4")
            if references.get(key, LETTERS[answer]) != LETTERS[answer]:
                raise UserError(f"{path}, entry {key}: answer {answer} differs from the annotations")
            pairs.append((key, LETTERS[prediction] if prediction in range(OPTIONS) else ""))
        return pairs


@BENCHMARKS.register("nextqa_oe")
class NExTOE(NExT):
    """NExT-OE: WUPS of open answers (doc-doc/NExT-OE, eval_oe.py and metrics.py)."""

    folder = "OE"
    layout = (
        LAYOUT.format(columns="", folder=folder)
        + "\n  add_reference_answer_test.json, the second reference answers of the test split"
    )

    def questions(self, config: EvaluationConfig) -> list[Question]:
        path, rows = self.rows(config)
        second_file = path.with_name(f"add_reference_answer_{path.stem}.json")
        second_answers = read_object(second_file)
        questions = []
        for where, row, video in rows:
            question, answer = fields(row, path, where, "question", "answer")
            references: tuple[str, ...] = (answer,)
            if row["video"] in second_answers:
                references += tuple(
                    map(str, fields(second_answers[row["video"]], second_file, f"video {row['video']}", row["qid"]))
                )
            elif extra := row.get("additional_ref_answer"):
                references += (extra,)
            key, kind = f"{row['video']}_{row['qid']}", "TN" if row["type"] == "TP" else row["type"]
            sample = conversation(key, self.format_prompt(config, question=question), [Video(video)], str(path))
            categories = (f"type: {'TPN' if kind == 'TN' else kind}", f"group: WUPS_{kind[0]}")
            questions.append(Question(key, sample, references, row["video"], categories, {"type": kind}))
        return questions

    def score(self, response: str, question: Question) -> Score:
        return Score.free_text(open_score(response, question), response)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        values = [open_score(responses[q.id], q, threshold=0.9) for q in questions]
        return {"WUPS@0.9": 100 * sum(values) / len(values), "lemmas": "WordNet's, without a part-of-speech tagger"}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Read `{"<video>": {"<qid>": "answer"}}`."""
        rows = read_predicted(path) if path.suffix == ".json" else None
        if not isinstance(rows, dict):
            return super().read_predictions(path, questions)
        pairs = []
        for video, answers in rows.items():
            if not isinstance(answers, dict) or not all(isinstance(a, str) for a in answers.values()):
                raise UserError(f"{path}, video {video}: expected an object of answers by qid")
            pairs += [(f"{video}_{qid}", answer) for qid, answer in answers.items()]
        return pairs


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of the official CSV, or of a Parquet file with the same columns, with numbers as text."""
    if path.suffix != ".parquet":
        return read_table(path)
    return [{name: "" if cell is None else str(cell) for name, cell in row.items()} for row in read_parquet(path)]


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file does not exist. Raise UserError for other JSON."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object with videos as keys")
    return value


def lemmas(text: str) -> list[str]:
    """Return the lower-cased words in their base forms."""
    return [_lemma(word) for word in tokens(text.lower())]


@cache
def _lemma(word: str) -> str:
    """Return the shortest base form, as NLTK's lemmatizer, for the first part of speech that WordNet lists."""
    if word in STOPWORDS:  # "has" is not the plural of "ha"
        return word
    as_verb = word.endswith(("ing", "ed"))
    first = (wordnet.VERB, wordnet.NOUN) if as_verb else (wordnet.NOUN, wordnet.VERB)
    for part in (*first, wordnet.ADJECTIVE, wordnet.ADVERB):
        if forms := wordnet.base_forms(word, part):
            return min(forms, key=len)
    return word


def open_score(
    response: str, question: Question, threshold: float = 0.0, lemmatize: Callable[[str], list[str]] = lemmas
) -> float:
    """Return equality (DC and DB questions) or WUPS, 0 to 1, against the better of the references."""
    predicted, *references = (_without_stopwords(text, lemmatize) for text in (response, *question.references))
    if question.details["type"] in EQUAL_ONLY:
        return float(predicted in references)
    return max(wups(predicted, reference, threshold) for reference in references)


def _without_stopwords(text: str, lemmatize: Callable[[str], list[str]]) -> str:
    return " ".join(word for word in lemmatize(text) if word not in STOPWORDS)


def wups(prediction: str, truth: str, threshold: float) -> float:
    """Return WUPS: the smaller of `_coverage` in both directions. Similarities below `threshold` count a tenth."""
    a, b = tokens(prediction), tokens(truth)
    return min(_coverage(a, b, threshold), _coverage(b, a, threshold))


def _coverage(words: Sequence[str], others: Sequence[str], threshold: float) -> float:
    """Return the product of each word's best similarity. Words without any are ignored, as in the official code."""
    best = [max((_similarity(a, b, threshold) for b in others), default=0.0) for a in words]
    product = 1.0
    for similarity in filter(None, best):
        product *= similarity
    return product if any(best) else 0.0


def _similarity(a: str, b: str, threshold: float) -> float:
    if a == b:
        return 1.0
    value = wordnet.wup_similarity(a, b)
    return 0.1 * value if value < threshold else value


def tokens(text: str) -> list[str]:
    """Split text into words and punctuation like NLTK's word_tokenize, for short answers of one sentence."""
    text = re.sub(r"""[?!;@#$%&*()\[\]{}<>"]|\.{2,}|--""", r" \g<0> ", text)
    text = re.sub(r"[:,](?!\d)", r" \g<0> ", text)
    text = re.sub(r"(?<!\.)\.\s*$", " . ", text)
    text = re.sub(r"(?i)(?<=[^\s'])('s|'m|'d|'ll|'re|'ve|n't|')(?=\s|$)", r" \g<0>", text)
    text = re.sub(r"(?i)(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", "' ", text)
    return re.sub(r"(?i)\b(can)(not)\b", r"\1 \2", text).split()
