"""`mmdora score` and `mmdora submit`, with valid and with damaged files of predictions and results."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.samples import Sample
from eval.benchmarks import BENCHMARKS, Question
from eval.benchmarks.vqa import VQA
from eval.predictions import read_predictions
from eval.results import find_results, read_result
from mmdora.apps.tables import results_table
from mmdora.core.errors import UserError
from tests.conftest import ROOT
from tests.media import write_image
from tests.scored import command, edit, right, scored, write_answers, write_questions


@pytest.fixture
def rows(tmp_path):
    return write_questions(tmp_path / "data", 12)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def score(capsys, rows, predictions, *options) -> tuple[int, str, str]:
    capsys.readouterr()
    code = command("score", "vqa", "--predictions", predictions, "--annotations", rows, *options)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_json_prints_the_report_and_changes_no_file(rows, tmp_path, capsys):
    predictions = write_answers(tmp_path / "answers.json", right(12, 0, 1, 2))
    before = contents(tmp_path)
    code, out, err = score(capsys, rows, predictions, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out, parse_constant=pytest.fail)
    assert report["n"] == 12
    assert report["scores"]["official"]["value"] == 75
    assert report["scores"]["official"]["low"] < 75 < report["scores"]["official"]["high"]
    assert report["categories"]["shape"]["n"] == 6
    assert report["receipt"]["predictions"] == str(predictions)
    assert contents(tmp_path) == before
    code, out, _ = score(capsys, rows, predictions)
    assert code == 0
    assert "75.0 [" in out


HEAVY = ["torch", "transformers", "scipy", "pandas", "openpyxl", "pyarrow", "wn", "nltk"]
LIGHT = ["benchmarks", "questions", "scoring", "compare", "leaderboard_page", "judge", "digests", "receipts"]


def test_scores_and_benchmark_names_need_no_heavy_library():
    """A config's benchmarks are checked, and predictions scored, before torch is imported."""
    code = f"import sys\nsys.modules.update(dict.fromkeys({HEAVY}))\nfrom eval import {', '.join(LIGHT)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nlvr_is_scored_from_its_file_of_labels(tmp_path, capsys):
    (tmp_path / "images" / "0").mkdir(parents=True)
    lines = []
    for m, label in enumerate(("true", "false")):
        lines.append({"sentence": "A box.", "label": label, "identifier": f"7-{m}", "directory": "0"})
        for k in range(6):
            write_image(tmp_path / "images" / "0" / f"dev-7-{m}-{k}.png", size=(40, 10))
    (tmp_path / "dev.json").write_text("\n".join(json.dumps(line) for line in lines))
    answers = [{"id": f"dev-7-{m}-{k}.png", "response": "true"} for m in range(2) for k in range(6)]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    before = contents(tmp_path)
    given = ("--predictions", tmp_path / "answers.json", "--annotations", tmp_path / "dev.json", "--json")
    assert command("score", "nlvr", *given) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["scores"]["official"]["value"] == 50
    assert report["metrics"]["pictures_of_official"] == "12 of 12"
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda pairs: pairs[:-2], "2 without an answer: q10, q11"),
        (lambda pairs: pairs + pairs[:1], "1 answered twice: q0"),
        (lambda pairs: [*pairs, {"id": "z", "response": "yes"}], "1 unknown: z"),
    ],
)
def test_missing_duplicate_and_unknown_ids_are_named(change, expected, rows, tmp_path, capsys):
    pairs = json.loads(write_answers(tmp_path / "answers.json", right(12)).read_text())
    (tmp_path / "answers.json").write_text(json.dumps(change(pairs)))
    code, out, err = score(capsys, rows, tmp_path / "answers.json", "--json")
    assert (code, out) == (2, "")
    assert expected in err


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "the file is empty"),
        (b'{"q0": "yes"}', "row 0: no field 'id'"),
        (b'{\n  "q0": "yes"\n}', "expected a list of objects or one object per line"),
        (b"12", "row 0: expected an object, found int"),
        (b'"yes"', "row 0: expected an object, found str"),
        (b"[1, 2]", "row 0: expected an object, found int"),
        (b'[{"id": "q0"}]', "row 0: no field 'response'"),
        (b'[{"id": "q0", "response": NaN}]', "row 0: 'response' is NaN, not text"),
        (b'[{"id": "q0", "response": null}]', "row 0: 'response' is null, not text"),
        (b'[{"id": "q0", "response": {"text": "yes"}}]', 'row 0: \'response\' is {"text": "yes"}, not text'),
        (b'[{"id": "q0", "response": "\xff"}]', "not UTF-8"),
        (b'[{"id": "q0", "response": "yes"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\x89PNG\r\n\x1a\n", "not UTF-8"),
    ],
)
def test_malformed_predictions_are_refused(data, expected, rows, tmp_path, capsys):
    (tmp_path / "answers.json").write_bytes(data)
    code, out, err = score(capsys, rows, tmp_path / "answers.json", "--out", tmp_path / "result")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert expected in err
    assert "answers.json" in err
    assert len(err) < 400
    assert not (tmp_path / "result").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "response", "x"]), inner),
    max_leaves=8,
)


@given(document=JSON)
def test_any_json_gives_answers_or_one_error(document, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(document))
    questions = [Question("q0", Sample("q0", (), "t"), ("yes",), "q0")]
    try:
        ids, message = list(read_predictions(path, BENCHMARKS["vqa"](), questions)), ""
    except UserError as error:
        ids, message = [], str(error)
    assert ids == ["q0"] or str(path) in message


def test_a_syntax_error_in_json_lines_names_the_line(rows, tmp_path, capsys):
    (tmp_path / "answers.jsonl").write_text('{"id": "q0", "response": "yes"}\n{"id": \n')
    code, _, err = score(capsys, rows, tmp_path / "answers.jsonl")
    assert code == 2
    assert "answers.jsonl, line 2: not JSON" in err


def test_invalid_arguments(rows, tmp_path, capsys):
    predictions = write_answers(tmp_path / "answers.json", right(12))
    code, _, err = score(capsys, rows, tmp_path / "nothing.json")
    assert (code, "no such file" in err) == (2, True)
    code, _, err = score(capsys, tmp_path / "nothing", predictions)
    assert (code, "nothing" in err) == (2, True)
    assert command("score", "vqs", "--predictions", predictions, "--annotations", rows) == 2
    assert "Did you mean 'vqa'?" in capsys.readouterr().err
    code, _, err = score(capsys, rows, predictions, "--out", predictions)
    assert (code, f"--out: cannot make the folder {predictions}" in err) == (2, True)


def test_a_finished_result_is_replaced_only_with_overwrite(rows, tmp_path, capsys):
    out = scored(tmp_path / "result", rows, right(12))
    before = contents(out)
    predictions = write_answers(tmp_path / "worse.json", right(12, 0, 1))
    code, _, err = score(capsys, rows, predictions, "--out", out)
    assert (code, "--overwrite replaces it" in err) == (2, True)
    assert contents(out) == before
    assert score(capsys, rows, predictions, "--out", out, "--overwrite")[0] == 0
    assert read_result(out).report["scores"]["official"]["value"] == pytest.approx(100 * 10 / 12)


def test_nan_and_infinity_become_null(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VQA, "extras", lambda *_: {"share": math.nan, "more": {"all": [math.inf, 1.5]}})
    code, out, _ = score(capsys, rows, write_answers(tmp_path / "answers.json", right(12)), "--json")
    assert code == 0
    assert json.loads(out, parse_constant=pytest.fail)["metrics"] == {"share": None, "more": {"all": [None, 1.5]}}


def test_any_text_is_an_answer(rows, tmp_path):
    hostile = ["\ud800", "\u2028", "\x00", "</script>", *right(8)]
    result = read_result(scored(tmp_path / "result", rows, hostile))
    assert [row["response"] for row in result.rows[:4]] == hostile[:4]


def change_line(number: int, change):
    def changed(folder: Path) -> None:
        lines = (folder / "scores.jsonl").read_text().split("\n")
        lines[number] = change(lines[number])
        (folder / "scores.jsonl").write_text("\n".join(lines))

    return changed


def change_report(text: str):
    return lambda folder: (folder / "report.json").write_text(text)


def with_report(**changes):
    return lambda folder: edit(folder / "report.json", **changes)


def with_row(**changes):
    return change_line(2, lambda line: json.dumps(json.loads(line) | changes))


TAMPERED = [
    (change_line(2, lambda _: ""), "report.json has n = 12, but scores.jsonl has 11 questions"),
    (change_line(2, lambda line: line[:20]), "scores.jsonl, line 3: not JSON"),
    (change_line(2, lambda _: "[]"), "scores.jsonl, row 3: expected an object, found list"),
    (with_row(id="q0"), "1 duplicate ids, such as 'q0'"),
    (with_row(response=5), "row 3: 'response' is 5, not text"),
    (with_row(references="yes"), "row 3: 'references' is 'yes', not a list of strings"),
    (with_row(media=[1]), "row 3: 'media' is [1], not a list of strings"),
    (with_row(official="1"), "row 3: 'official' is '1', not a number"),
    (with_row(strict=math.nan), "row 3: 'strict' is nan, not a number"),
    (with_row(counts={"tp": "x"}), "row 3: 'tp' is 'x', not a number"),
    (change_report("{"), "report.json: not JSON"),
    (change_report("[]"), "report.json, the report: expected an object, found list"),
    (with_report(scores={"official": 5}), "scores: official: expected an object, found int"),
    (with_report(scores={"official": {"value": "5", "low": 1, "high": 2}}), "'value' is '5', not a number"),
    (with_report(categories={"shape": {"value": 5}}), "categories: shape: no field 'n'"),
    (with_report(unparsed_rate="none"), "'unparsed_rate' is 'none', not a number"),
    (change_report('{"name": "vqa"}'), "report.json, the report: no field 'benchmark'"),
    (lambda folder: (folder / "scores.jsonl").unlink(), "scores.jsonl: cannot be read"),
    (lambda folder: (folder / "scores.jsonl").write_bytes(b"\xff"), "scores.jsonl: not UTF-8"),
    (lambda folder: (folder / "report.json").unlink(), "a folder with a report.json"),
]


@pytest.mark.parametrize(("tamper", "expected"), TAMPERED)
def test_damaged_results_are_refused(tamper, expected, rows, tmp_path, capsys):
    out, other = (scored(tmp_path / name, rows, right(12)) for name in ("result", "other"))
    tamper(out)
    page = tmp_path / "page.html"
    capsys.readouterr()
    for arguments in (("compare", out, other), ("leaderboard", other, out, "--html", page)):
        assert command(*arguments) == 2
        printed = capsys.readouterr()
        assert expected in printed.err
        assert str(out) in printed.err
        assert printed.out == ""
    assert not page.exists()
    assert command("submit", out, "--out", tmp_path / "file") == 2
    assert expected.removeprefix("a folder with a ") in capsys.readouterr().err


def test_a_run_gives_its_results(rows, tmp_path):
    for name in ("one", "two", "before/one"):
        scored(tmp_path / "run" / "eval" / name, rows, right(12))
    assert [path.name for path in find_results(tmp_path / "run")] == ["one", "two"]
    assert find_results(tmp_path / "run" / "eval" / "before") == [tmp_path / "run" / "eval" / "before" / "one"]
    with pytest.raises(UserError, match="no such folder"):
        find_results(tmp_path / "missing")


@pytest.fixture
def with_leaderboard(monkeypatch):
    """Give `vqa` a leaderboard file."""

    def write(self, results, out):
        out.write_text(json.dumps({row["id"]: row["response"] for result in results for row in result.rows}))

    monkeypatch.setattr(BENCHMARKS["vqa"], "write_submission", write)


def test_submit_writes_the_file_and_changes_nothing_else(rows, tmp_path, capsys, with_leaderboard):
    out, file = scored(tmp_path / "result", rows, right(12, 3)), tmp_path / "new" / "answers.json"
    before = contents(out)
    assert command("submit", out, "--out", file) == 0
    assert json.loads(file.read_text()) == {f"q{i}": "no" if i == 3 else "yes" for i in range(12)}
    assert "12 answers to vqa" in capsys.readouterr().out
    assert contents(out) == before
    assert command("submit", out, "--out", file) == 2
    assert "already exists" in capsys.readouterr().err
    assert command("submit", out, "--out", file / "inside.json") == 2
    assert f"--out: cannot make the folder {file}" in capsys.readouterr().err


def test_submit_refuses_incomplete_results_and_benchmarks_without_a_leaderboard(rows, tmp_path, capsys, monkeypatch):
    out = scored(tmp_path / "result", rows, right(12))
    assert command("submit", out, "--out", tmp_path / "file") == 2
    assert "no leaderboard" in capsys.readouterr().err
    edit(out / "report.json", receipt={"limit": 12})
    assert command("submit", out, "--out", tmp_path / "file") == 2
    assert "only the first 12 questions were evaluated" in capsys.readouterr().err
    assert not (tmp_path / "file").exists()


def test_benchmarks_are_listed_one_per_line(capsys):
    assert command("list", "benchmarks") == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert [line.split()[0] for line in lines] == sorted(BENCHMARKS)
    for line in lines:
        status = "verified" if BENCHMARKS[line.split()[0]].verified else "layout from documentation only"
        assert status in line
    assert len({line.index(BENCHMARKS[line.split()[0]].__doc__.split("\n")[0]) for line in lines}) == 1
    assert command("list", "architectures") == 0
    assert "vision: " in capsys.readouterr().out


def test_the_table_shows_the_rate_of_unparsed_answers():
    figure = {"value": 96.1, "low": 93.8, "high": 97.9}
    report = {"name": "b", "n": 8, "scores": {"official": figure}, "majority_baseline": None}
    headers = [
        [str(column.header) for column in results_table([(report | {"unparsed_rate": rate}, None)]).columns]
        for rate in (0.125, 0.0, None)
    ]
    assert headers[0] == ["benchmark", "n", "score", "baseline", "unparsed"]
    assert headers[1] == headers[2] == headers[0][:-1]
    assert [list(c.cells) for c in results_table([(report | {"unparsed_rate": 0.125}, None)]).columns][-1] == ["12.5"]
