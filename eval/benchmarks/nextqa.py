"""`nextqa` and `nextqa_oe`: why, how and when in videos; five options (NExT-QA), or open answers (NExT-OE).

Scorers: doc-doc/NExT-QA, eval_mc.py: the predicted option's number against the answer's, by groups of question types.
doc-doc/NExT-OE, eval_oe.py and metrics.py: WUPS with threshold 0 over lemmas without stop words, the better of two
reference answers where the test split has two; yes/no (DB) and counting (DC) questions by equality.

eval_oe.py takes its lemmas from pywsd, whose part-of-speech tagger needs data that no package brings. Here words in
-ing and -ed are looked up in WordNet as verbs first and all others as nouns first (`lemmas`); everything after that is
the official computation. Figures that were made with the tagger differ a little.
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
# Official column names. A question counts in its type's and in its group's.
TYPES = {"CW": "Why", "CH": "How", "TN": "Bef&Aft", "TP": "Bef&Aft", "TC": "When", "DC": "Cnt", "DL": "Loc"}
TYPES |= {"DO": "Other", "DB": "Yes/No"}  # DB is in the open-ended files alone
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
  map_vid_vidorID.json, by which a video is NExTVideo/<folder>/<id>.mp4; without it NExTVideo/<video>.mp4
  or, as on Hugging Face (lmms-lab/NExTQA): {folder}/<split>-00000-of-00001.parquet and NExTVideo/<video>.mp4"""


class NExT(Benchmark):
    splits = ("val", "test", "train")
    folder: ClassVar[str]  # of the Parquet files

    def rows(self, config: EvaluationConfig) -> tuple[Path, list[tuple[str, dict[str, str], Path]]]:
        """The split's file, and of each of its rows where it stands, the row and its video."""
        split = self.split(config)
        tables = [f"{folder}{split}.csv" for folder in ("", "nextqa/", "dataset/nextqa/")]
        parquet = f"{self.folder}/{'validation' if split == 'val' else split}-*.parquet"
        path = find_file(config.data, [*tables, parquet], self.layout)
        places = read_object(path.with_name("map_vid_vidorID.json"))
        media = find_folder(config.data, ["NExTVideo", "videos/NExTVideo", "videos", "."], config.media, self.layout)
        videos, found = VideoFiles([media, path.parent / "NExTVideo", path.parent.parent / "NExTVideo"]), []
        for number, row in enumerate(read_rows(path), 1):
            kind, video, _ = fields(row, path, f"row {number}", "type", "video", "qid")
            if kind not in TYPES:
                raise UserError(f"{path}, row {number}: type must be one of {', '.join(TYPES)}, found {kind!r}")
            named = (str(places[video]), video) if video in places else (video,)
            found.append((f"row {number}", row, videos.find(*named)))
        return path, found


@BENCHMARKS.register("nextqa")
class NExTQA(NExT):
    """NExT-QA with five options, accuracy (doc-doc/NExT-QA, eval_mc.py)."""

    prompt = LETTER_PROMPT
    folder = "MC"
    layout = LAYOUT.format(columns=", a0 … a4; answer is a number from 0", folder=folder)

    def questions(self, config: EvaluationConfig) -> list[Question]:
        path, rows = self.rows(config)
        questions = []
        for where, row, video in rows:
            asked, answer, *options = fields(row, path, where, "question", "answer", "a0", "a1", "a2", "a3", "a4")
            if answer not in map(str, range(OPTIONS)):
                raise UserError(f"{path}, {where}: answer must be 0 to 4, found {answer!r}")
            key = f"{row['video']}_{row['qid']}"
            text = self.ask(config, question=asked, options=option_lines(options))
            sample = conversation(key, text, [Video(video)], str(path))
            categories = (f"type: {TYPES[row['type']]}", f"group: Acc_{row['type'][0]}")
            reference, details = LETTERS[int(answer)], {"options": options}
            questions.append(Question(key, sample, (reference,), row["video"], categories, details))
        return questions

    def score(self, response: str, question: Question) -> Score:
        return score_choice(response, question)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """`{"<video>_<qid>": {"prediction": 0…4, "answer": 0…4}}`; the official script believes the answers that stand
        in it, so they must be the annotations'."""
        rows = read_predicted(path) if path.suffix == ".json" else None
        if not isinstance(rows, dict):
            return super().read_predictions(path, questions)
        references, pairs = {q.id: q.references[0] for q in questions}, []
        for key, row in rows.items():
            prediction, answer = fields(row, path, f"entry {key}", "prediction", "answer")
            if not isinstance(prediction, int) or not isinstance(answer, int) or answer not in range(OPTIONS):
                raise UserError(f"{path}, entry {key}: prediction and answer must be numbers from 0 to 4")
            if references.get(key, LETTERS[answer]) != LETTERS[answer]:
                raise UserError(f"{path}, entry {key}: answer {answer} is not that of the annotations")
            pairs.append((key, LETTERS[prediction] if prediction in range(OPTIONS) else ""))
        return pairs


@BENCHMARKS.register("nextqa_oe")
class NExTOE(NExT):
    """NExT-QA with open answers, WUPS (doc-doc/NExT-OE, eval_oe.py and metrics.py)."""

    folder = "OE"
    layout = (
        LAYOUT.format(columns="", folder=folder)
        + "\n  add_reference_answer_test.json, the second answers of the test split"
    )

    def questions(self, config: EvaluationConfig) -> list[Question]:
        path, rows = self.rows(config)
        second = path.with_name(f"add_reference_answer_{path.stem}.json")
        further = read_object(second)
        questions = []
        for where, row, video in rows:
            asked, answer = fields(row, path, where, "question", "answer")
            references: tuple[str, ...] = (answer,)
            if row["video"] in further:
                references += tuple(
                    map(str, fields(further[row["video"]], second, f"video {row['video']}", row["qid"]))
                )
            elif extra := row.get("additional_ref_answer"):
                references += (extra,)
            key, kind = f"{row['video']}_{row['qid']}", "TN" if row["type"] == "TP" else row["type"]
            sample = conversation(key, self.ask(config, question=asked), [Video(video)], str(path))
            categories = (f"type: {'TPN' if kind == 'TN' else kind}", f"group: WUPS_{kind[0]}")
            questions.append(Question(key, sample, references, row["video"], categories, {"type": kind}))
        return questions

    def score(self, response: str, question: Question) -> Score:
        return Score.of_words(open_score(response, question), response)

    def extras(self, responses: Mapping[str, str], questions: Sequence[Question]) -> dict[str, Any]:
        values = [open_score(responses[q.id], q, threshold=0.9) for q in questions]
        return {"WUPS@0.9": 100 * sum(values) / len(values), "lemmas": "WordNet's, without a part-of-speech tagger"}

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """`{"<video>": {"<qid>": "answer"}}`."""
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
    """The rows of the official CSV, or of a Parquet file with the same columns, where numbers are no text."""
    if path.suffix != ".parquet":
        return read_table(path)
    return [{name: "" if cell is None else str(cell) for name, cell in row.items()} for row in read_parquet(path)]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is not there. Raises UserError."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object by video")
    return value


def lemmas(text: str) -> list[str]:
    """The words in their base forms, lower case."""
    return [_lemma(word) for word in tokens(text.lower())]


@cache
def _lemma(word: str) -> str:
    """The shortest base form, as NLTK's lemmatizer takes, of the first part of speech that WordNet has the word in."""
    if word in STOPWORDS:  # "has" is no plural of "ha"
        return word
    as_verb = word.endswith(("ing", "ed"))
    first = (wordnet.VERB, wordnet.NOUN) if as_verb else (wordnet.NOUN, wordnet.VERB)
    for part in (*first, wordnet.ADJECTIVE, wordnet.ADVERB):
        if found := wordnet.base_forms(word, part):
            return min(found, key=len)
    return word


def open_score(
    response: str, question: Question, threshold: float = 0.0, words: Callable[[str], list[str]] = lemmas
) -> float:
    """Equality or WUPS against the better of the references, 0 to 1."""
    said, *wanted = (_without_stopwords(text, words) for text in (response, *question.references))
    if question.details["type"] in EQUAL_ONLY:
        return float(said in wanted)
    return max(wups(said, reference, threshold) for reference in wanted)


def _without_stopwords(text: str, words: Callable[[str], list[str]]) -> str:
    return " ".join(word for word in words(text) if word not in STOPWORDS)


def wups(prediction: str, truth: str, threshold: float) -> float:
    """The smaller of both directions of `_covered`; similarities under `threshold` weigh a tenth."""
    one, other = tokens(prediction), tokens(truth)
    return min(_covered(one, other, threshold), _covered(other, one, threshold))


def _covered(one: Sequence[str], other: Sequence[str], threshold: float) -> float:
    """The product of each word's best similarity; words that are like none are passed over, as officially."""
    best = [max((_similarity(a, b, threshold) for b in other), default=0.0) for a in one]
    product = 1.0
    for similarity in filter(None, best):
        product *= similarity
    return product if any(best) else 0.0


def _similarity(one: str, other: str, threshold: float) -> float:
    if one == other:
        return 1.0
    value = wordnet.wup_similarity(one, other)
    return 0.1 * value if value < threshold else value


def tokens(text: str) -> list[str]:
    """Words and marks as NLTK's word_tokenize cuts them, so far as short answers have any; the text is taken as one
    sentence."""
    text = re.sub(r"""[?!;@#$%&*()\[\]{}<>"]|\.{2,}|--""", r" \g<0> ", text)
    text = re.sub(r"[:,](?!\d)", r" \g<0> ", text)
    text = re.sub(r"(?<!\.)\.\s*$", " . ", text)
    text = re.sub(r"(?i)(?<=[^\s'])('s|'m|'d|'ll|'re|'ve|n't|')(?=\s|$)", r" \g<0>", text)
    text = re.sub(r"(?i)(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", "' ", text)
    return re.sub(r"(?i)\b(can)(not)\b", r"\1 \2", text).split()
