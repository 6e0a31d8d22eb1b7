"""Yes/no benchmarks (MME, POPE): from miniatures of their official files to the submission."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.samples import Sample
from eval.benchmarks import BENCHMARKS, Question
from eval.benchmarks.pope import parse_strictly
from mmdora.core.errors import UserError
from tests.benchmark_walk import questions_of, responses, scored, small, submitted, walk, write_lines
from tests.choice_files import ASK, mme_files, pope_files

__all__ = ["small"]


def mme_results(folder: Path, questions: list[Question]) -> Path:
    for task in {q.details["task"] for q in questions}:
        lines = [q for q in questions if q.details["task"] == task]
        cells = [(q.details["image"], q.details["question"], q.details["answer"], f"{q.references[0]}.") for q in lines]
        (folder / f"{task}.txt").write_text("".join("\t".join(row) + "\n" for row in cells))
    return folder


def pope_answers(folder: Path, questions: list[Question]) -> Path:
    for category in {q.details["category"] for q in questions}:
        chosen = [q for q in questions if q.details["category"] == category]
        rows = [{"question": q.details["question"].lower(), "answer": q.references[0].title()} for q in chosen]
        write_lines(folder / f"coco_pope_{category}.json", rows)
    return folder


@pytest.mark.parametrize(
    ("name", "make", "official", "n", "best", "file"),
    [
        ("mme", mme_files, mme_results, 28, 2800, "LLaVA.zip"),
        ("pope", pope_files, pope_answers, 6, 100, "answers.jsonl"),
    ],
)
def test_from_files_to_submission(small, tmp_path, name, make, official, n, best, file):
    (tmp_path / "data").mkdir()
    (tmp_path / "predictions").mkdir()
    data = make(tmp_path / "data")
    report = walk(small, name, data, tmp_path / "result")[0]
    assert report["n"] == n
    assert report["majority_baseline"] is None  # no majority baseline: the headline is not a mean
    questions = questions_of(name, data)
    perfect = scored(name, official(tmp_path / "predictions", questions), data, out=tmp_path / "perfect")
    assert perfect["scores"]["official"]["value"] == perfect["scores"]["strict"]["value"] == pytest.approx(best)
    assert perfect["unparsed_rate"] == 0
    written = tmp_path / "out" / file
    submitted([tmp_path / "result"], written)
    read_back = dict(BENCHMARKS[name]().read_predictions(written, questions))
    predicted = responses(tmp_path / "result")
    assert {i: " ".join(text.split()) for i, text in predicted.items()} == read_back
    assert [path.name for path in written.parent.iterdir()] == [file]


@given(st.text() | st.sampled_from(["yes", "No.", "not\tyes", "n't"]))
def test_every_response_gets_a_score(text):
    for name, details in (("mme", {"task": "count", "pair": "p"}), ("pope", {"category": "random"})):
        for label in ("yes", "no"):
            q = Question("q", Sample("q", (), "t"), (label,), "c", (), details)
            score = BENCHMARKS[name]().score_all({"q": text}, [q])["q"]
            assert 0 <= score.strict <= score.official <= 1


def test_mme_uses_llavas_prompt_and_counts_pairs(tmp_path, caplog):
    data = mme_files(tmp_path, ("existence", "code_reasoning"))
    with caplog.at_level("WARNING"):
        questions = questions_of("mme", data)
    assert "count, position" in caplog.text
    assert "is missing" in caplog.text
    assert questions[0].sample.messages[0].text == 'Is "it" a cat?\nAnswer the question using a single word or phrase.'
    llava = [
        {"question_id": f"{q.details['task']}/0001.png", "prompt": q.sample.messages[0].text, "text": "nope"}
        for q in questions
    ]
    report = scored("mme", write_lines(tmp_path / "said.jsonl", llava), data, out=tmp_path / "out")
    assert (
        report["scores"]["official"]["value"] == 100
    )  # half of the questions of both tasks, no image with both correct
    assert {name: c["value"] for name, c in report["categories"].items()} == {
        "Cognition": 50,
        "Perception": 50,
        "task: code_reasoning": 50,
        "task: existence": 50,
    }
    assert report["metrics"]["tasks"] == "2 of 14"
    with pytest.raises(UserError, match=r"no responses for count, position, .*needs all 14"):
        submitted([tmp_path / "out"], tmp_path / "x.zip")
    with pytest.raises(UserError, match=r"give --out a name ending in \.zip"):
        submitted([tmp_path / "out"], tmp_path / "x.txt")


def test_mme_scores_the_official_results_without_images(tmp_path):
    """eval_tool/Your_Results holds the questions; a zip of the completed text files holds the predictions."""
    (tmp_path / "Your_Results").mkdir()
    lines = [f"1.jpg\tA? {ASK}\tYes", f"1.jpg\tB? {ASK}\tNo"]
    (tmp_path / "Your_Results/OCR.txt").write_text("\n".join(lines))
    with zipfile.ZipFile(tmp_path / "said.zip", "w") as archive:
        archive.writestr("model/OCR.txt", f"{lines[0]}\t yes\n{lines[1]}\tNo, it is not\n")
        archive.writestr("model/readme.txt", "nothing")
    report = scored("mme", tmp_path / "said.zip", tmp_path / "Your_Results", out=tmp_path / "out")
    assert report["scores"]["official"]["value"] == 200  # " yes" contains "yes" within its first four characters
    (tmp_path / "said.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match="not a folder or a zip"):
        scored("mme", tmp_path / "said.zip", tmp_path / "Your_Results", out=tmp_path / "2")
    (tmp_path / "Your_Results/OCR.txt").write_text(f"{lines[0]}\n2.jpg\tB?\tNo")
    with pytest.raises(
        UserError, match=r"OCR.txt, line 1: expected 2 questions about one image, found questions about: 1.jpg, 2.jpg"
    ):
        questions_of("mme", tmp_path / "Your_Results")
    (tmp_path / "Your_Results/OCR.txt").write_text("1.jpg\tA?\tperhaps")
    with pytest.raises(UserError, match=r"OCR.txt, line 1: expected a question, a tab, and Yes or No"):
        questions_of("mme", tmp_path / "Your_Results")
    with pytest.raises(UserError, match=r"no such folder; expected layout:\nMME_Benchmark_release_version/<task>"):
        questions_of("mme", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("response", "expected"),
    [("NO", "no"), ("No, yes", "no"), ("There isn't one", "no"), ("I see. Yes.", "yes"), ("yes and no", "yes")]
    + [("", None), ("Maybe", None), ("None", None), ("It may be yes or no", None)],
)
def test_pope_strict_parsing(response, expected):
    assert parse_strictly(response) == expected


def test_pope_strict_score_requires_a_clear_answer(tmp_path):
    data = pope_files(tmp_path)
    only = data / "coco/coco_pope_random.json"
    predicted = [{"question_id": 1, "text": "Maybe"}, {"question_id": 2, "text": "No"}]
    report = scored("pope", write_lines(tmp_path / "said.jsonl", predicted), only, out=tmp_path / "out")
    assert report["scores"]["official"]["value"] == 100
    assert report["scores"]["strict"] is None  # no clear "yes" at all: F1 is 0 / 0
    assert report["unparsed_rate"] == 0.5
    assert report["metrics"]["random"] == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 0.5}
    llava = [{"question_id": i, "prompt": "", "text": "no"} for i in range(6)]
    report = scored("pope", write_lines(tmp_path / "llava.jsonl", llava), data, out=tmp_path / "no")
    assert report["scores"]["official"] is None  # the official script divides by zero
    assert report["metrics"]["popular"]["precision"] is None
    assert report["metrics"]["categories"] == "3 of 3"


def test_pope_errors_name_file_and_row(tmp_path):
    data = pope_files(tmp_path)
    predicted = write_lines(tmp_path / "said.jsonl", [{"question": "Is there a horse?", "answer": "no"}] * 6)
    with pytest.raises(UserError, match=r"row 1: answers 'Is there a horse\?'"):
        scored("pope", predicted, data, out=tmp_path / "out")
    predicted = write_lines(tmp_path / "said.jsonl", [{"answer": "no"}] * 5)
    with pytest.raises(UserError, match="5 answers for 6 questions"):
        scored("pope", predicted, data, out=tmp_path / "out")
    with pytest.raises(UserError, match="the file name must contain one of"):
        questions_of("pope", write_lines(tmp_path / "coco.json", []))
    write_lines(data / "coco/coco_pope_random.json", [{"question_id": 1, "image": "x", "text": "?", "label": "maybe"}])
    with pytest.raises(UserError, match=r"coco_pope_random.json, line 1: the label is 'maybe'"):
        questions_of("pope", data)
    with pytest.raises(UserError, match=r"holds no .*expected layout"):
        questions_of("pope", data / "val2014")
