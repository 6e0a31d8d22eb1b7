"""Option extraction from responses, and errors for malformed official files and predictions."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.benchmarks import BENCHMARKS
from eval.benchmarks.choice import chosen_option
from eval.benchmarks.multiple_choice import read_options
from eval.options import LETTERS
from mmdora.core.errors import UserError
from tests.benchmark_walk import questions_of, write, write_lines
from tests.choice_files import commonsense_files, mmbench_files, mme_files, pope_files, science_files, seed_files


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        *[
            (response, "B")
            for response in ("B", "b.", "(B)", "**B**", "B. dog", "(B) a dog", "B) x", "B: dog", "B is correct.")
        ],
        *[
            (response, "B")
            for response in ("The answer is B", "Answer: (B).", "the correct answer is **B**. It barks.")
        ],
        *[(response, "B") for response in ("Dog.", "a dog", "It is a dog", "The answer is the dog.", "B\nIt barks.")],
        *[(response, "C") for response in ("Let me think. A is wrong. So the answer is C", "option C")],
        *[
            (response, None)
            for response in ("", "A or B", "E", "I", "dog and cat", "the answer is a fish", "not B", "A dog or so")
        ],
        *[(response, None) for response in ("The answer is A. No, the answer is B.", "hot dog", "The answer is not B")],
    ],
)
def test_only_unambiguous_responses_name_an_option(response, letter):
    index = chosen_option(response, ["cat", "a dog", "bird"])
    assert (None if index is None else LETTERS[index]) == letter


@pytest.mark.parametrize(
    ("response", "options", "index"),
    [
        ("U.S. Army", ["the navy", "U.S. Army"], 1),  # there is no option U
        ("A.D. 300", ["300 B.C.", "A.D. 300"], 1),
        ("A.D. 400", ["300 B.C.", "A.D. 300"], None),
        ("E", ["D", "E"], 1),  # matches as text: there is no fifth option
        ("B", ["B", "A"], 1),  # matches as letter: there is a second option
        ("", ["", "x"], None),
        ("x", ["x", "X."], None),
    ],
)
def test_options_that_look_like_letters(response, options, index):
    assert chosen_option(response, options) == index


def test_options_are_read_from_lines():
    assert read_options("Which?\nA. a cat\n(B) a dog \n C) it\nAnswer.") == ["a cat", "a dog", "it"]
    assert read_options("I. Roman\nA. x\nA. one\nB. two\nD. four") == ["one", "two"]
    assert read_options("A. only one") == read_options("No options") == []
    assert len(read_options("\n".join(f"{letter}. x" for letter in [*LETTERS, "B"]))) == 26


@given(st.text(alphabet="ABab.():* \nis") | st.text())
def test_no_text_breaks_the_parser(text):
    assert chosen_option(text, [text, "b"]) in (0, 1, None)
    assert len(read_options(text)) <= len(LETTERS)


def test_own_data_with_an_answer_outside_the_options_is_an_error(tmp_path):
    rows = [{"question": "Which?\nA. x\nB. y", "answer": "z"}]
    with pytest.raises(UserError, match="has the answer 'z', which is none of its options A, B"):
        questions_of("multiple_choice", write(tmp_path / "own.json", rows))
    with pytest.raises(UserError, match="has no options"):
        questions_of("multiple_choice", write(tmp_path / "own.json", [{"question": "Which?", "answer": "z"}]))


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("scienceqa", "problems.json", '{"1": {"split": "test"}}', r"problems.json, problem '1': no field 'question'"),
        ("mmbench", "mmbench_dev.tsv", "index\tquestion\tA\tB\nx\tWhat?\tp\tq\n", r"row 2: the index 'x'"),
        (
            "mmbench",
            "mmbench_dev.tsv",
            "index\tquestion\tA\tB\tanswer\n1\tWhat?\tp\tq\tC\n",
            r"index 1: the answer 'C'",
        ),
        ("mmbench", "mmbench_dev.tsv", "index\tquestion\tA\tB\timage\n1\tWhat?\tp\tq\t*\n", r"index 1: the image"),
        (
            "mmbench",
            "mmbench_dev.tsv",
            "index\tquestion\tA\tB\n1\tWhat?\t\t\n",
            r"mmbench_dev.tsv, row 2: has no options",
        ),
        ("seedbench", "SEED-Bench.json", '{"questions": []}', r"SEED-Bench.json, the file: no field 'question_type'"),
        ("boolq", "test.json", '[{"instruction": "?", "answer": "yes"}]', r"row 0: 'yes' is not an answer of boolq"),
        ("commonsense", "test.json", "[]", r"holds no boolq/test.json or piqa/test.json"),
    ],
)
def test_errors_name_the_malformed_file(tmp_path, name, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        questions_of(name, tmp_path)


def test_errors_name_the_malformed_workbook(tmp_path):
    questions = questions_of("mmbench", mmbench_files(tmp_path))
    (tmp_path / "said.xlsx").write_text("no workbook")
    with pytest.raises(UserError, match=r"said\.xlsx: not a workbook"):
        BENCHMARKS["mmbench"]().read_predictions(tmp_path / "said.xlsx", questions)
    pd.DataFrame([{"id": 1}]).to_excel(tmp_path / "said.xlsx", index=False)
    with pytest.raises(UserError, match=r"said\.xlsx, row 2: no field 'index'"):
        BENCHMARKS["mmbench"]().read_predictions(tmp_path / "said.xlsx", questions)


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path to every value inside a JSON value."""
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from paths(inner, (*path, key))


def mutations(value: Any) -> Iterator[Any]:
    """Yield copies of a JSON value with one inner value removed or replaced by another type."""
    for *path, last in paths(value):
        for wrong in (None, 5, -1, "x", True, [1], {"a": 1}):
            other = copy.deepcopy(value)
            inner = other
            for key in path:
                inner = inner[key]
            inner[last] = wrong
            yield other
        if isinstance(inner, dict):
            del inner[last]
            yield other


def succeeds(read: Any) -> bool:
    """Return whether `read` succeeds; a malformed file raises UserError and no other exception."""
    try:
        read()
    except UserError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "make", "file"),
    [
        ("scienceqa", science_files, "problems.json"),
        ("scienceqa", science_files, "pid_splits.json"),
        ("seedbench", seed_files, "SEED-Bench.json"),
        ("boolq", commonsense_files, "boolq/test.json"),
        ("pope", pope_files, "coco/coco_pope_random.json"),
    ],
)
def test_malformed_official_files_raise_user_errors(tmp_path, name, make, file):
    path = make(tmp_path) / file
    lines = path.read_text().split("\n")
    value = json.loads(lines[0]) if len(lines) < 3 else [json.loads(line) for line in lines if line]
    save = write if len(lines) < 3 else write_lines
    save(path, value)
    assert succeeds(lambda: questions_of(name, tmp_path))
    refused = [not succeeds(lambda: questions_of(name, tmp_path)) for other in mutations(value) if save(path, other)]
    assert sum(refused) > len(refused) / 4


@pytest.mark.parametrize(
    ("name", "make", "row"),
    [
        ("scienceqa", science_files, lambda q: {"question_id": q.id, "text": "A"}),
        ("seedbench", seed_files, lambda q: {"question_id": q.id, "prediction": "A"}),
        ("commonsense", commonsense_files, lambda q: {"id": q.id, "response": "true"}),
        ("pope", pope_files, lambda q: {"question": q.details["question"], "answer": "no"}),
        (
            "mmbench",
            mmbench_files,
            lambda q: {"question_id": int(q.id) % 10, "round_id": int(q.id) // 10**6, "text": "A"},
        ),
        ("mme", mme_files, lambda q: {"question_id": q.details["pair"], "prompt": q.details["question"], "text": "no"}),
    ],
)
def test_malformed_predictions_raise_user_errors(tmp_path, name, make, row):
    questions = questions_of(name, make(tmp_path))[:6]
    path, benchmark = tmp_path / "said.jsonl", BENCHMARKS[name]()

    def score() -> None:
        predicted = dict(benchmark.read_predictions(path, questions))
        benchmark.score_all({q.id: predicted.get(q.id, "") for q in questions}, questions)

    rows = [row(q) for q in questions]
    write_lines(path, rows)
    assert {i for i, _ in benchmark.read_predictions(path, questions)} == {q.id for q in questions}
    refused = [not succeeds(score) for other in mutations(rows) if write_lines(path, other)]
    assert any(refused)
