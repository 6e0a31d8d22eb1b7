"""`mmdora compare`: paired tests over the same questions; other questions are refused."""

from __future__ import annotations

import gc
import json

import pytest

from eval.compare import BOOTSTRAP, EXACT
from eval.compare_results import compare_results
from eval.metrics import mcnemar
from mmdora.core.errors import UserError
from tests.scored import command, edit, judge, right, scored, write_questions


@pytest.fixture
def rows(tmp_path):
    return write_questions(tmp_path / "data", 40)


def compared(capsys, a, b) -> dict:
    capsys.readouterr()
    assert command("compare", a, b, "--json") == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, a, b) -> str:
    capsys.readouterr()
    assert command("compare", a, b) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_answers_that_only_one_model_has_right_are_counted_and_printed(rows, tmp_path, capsys):
    a = scored(tmp_path / "a", rows, right(40, 0, 1, 2, 3, 4, 5, 6, 7, 8))
    b = scored(tmp_path / "b", rows, right(40, 0, 39))
    document = compared(capsys, a, b)
    one = next(c for c in document["comparisons"] if c["kind"] == "official")
    assert one["counts"] == {"both_right": 30, "only_a": 1, "only_b": 8, "both_wrong": 1}
    assert (one["a"], one["b"], one["difference"]) == (77.5, 95, 17.5)
    assert one["low"] < 17.5 < one["high"]
    assert one["test"] == EXACT
    assert one["p"] == one["mcnemar_p"] == pytest.approx(20 / 2**9)
    assert [e["id"] for e in one["examples"]["better_in_a"]] == ["q39"]
    assert [e["id"] for e in one["examples"]["better_in_b"]] == [f"q{i}" for i in range(1, 6)]
    example = one["examples"]["better_in_a"][0]
    assert (example["response_a"], example["response_b"], example["references"]) == ("yes", "no", ["yes"])
    assert command("compare", a, b) == 0
    printed = capsys.readouterr().out
    assert "+17.5" in printed
    assert "both right 30, only A 1, only B 8, both wrong 1" in printed
    assert "q39: Question number 39?" in printed


def test_swapping_the_results_flips_the_sign(rows, tmp_path, capsys):
    a, b = scored(tmp_path / "a", rows, right(40, 0, 1, 2)), scored(tmp_path / "b", rows, right(40, 5))
    there, back = (compared(capsys, *pair)["comparisons"][0] for pair in ((a, b), (b, a)))
    assert there["difference"] == -back["difference"]
    assert there["p"] == back["p"]
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))


def test_questions_about_one_image_are_not_independent(tmp_path, capsys):
    rows = write_questions(tmp_path / "data", 40, per_image=4)
    wrong = range(20)
    a, b = scored(tmp_path / "a", rows, right(40, *wrong)), scored(tmp_path / "b", rows, right(40))
    one = compared(capsys, a, b)["comparisons"][0]
    assert (one["clusters"], one["test"], one["p"]) == (10, BOOTSTRAP, one["bootstrap_p"])
    assert one["mcnemar_p"] == mcnemar(0, 20)
    assert one["p"] > 100 * one["mcnemar_p"]  # five images differ, not twenty
    assert command("compare", a, b) == 0
    assert "McNemar's test, which assumes independent questions, gives <0.001" in capsys.readouterr().out


def test_partly_correct_answers_are_tested_by_bootstrap(tmp_path, capsys):
    rows = write_questions(tmp_path / "data", 30, answers=["yes"] * 2 + ["no"] * 8)
    a, b = scored(tmp_path / "a", rows, right(30, *range(20))), scored(tmp_path / "b", rows, right(30, *range(25)))
    one = compared(capsys, a, b)["comparisons"][0]
    assert one["a"] < one["b"]
    assert (one["test"], one["mcnemar_p"]) == (BOOTSTRAP, None)
    assert one["low"] > 0
    assert one["examples"]["better_in_b"][0]["id"] == "q20"


def test_holm_over_the_benchmarks_of_two_runs(tmp_path, capsys):
    """Folders of results are matched by name and benchmark; results without a partner are skipped."""
    for name, (n, wrong) in {"small": (20, 8), "large": (40, 9), "alone": (12, 2)}.items():
        rows = write_questions(tmp_path / "data" / name, n)
        for side, errors in (("a", range(wrong)), ("b", ())):
            if (name, side) != ("alone", "b"):
                out = scored(tmp_path / side / "eval" / name, rows, right(n, *errors))
                edit(out / "report.json", name=name)
    document = compared(capsys, tmp_path / "a", tmp_path / "b")
    official = {c["name"]: c for c in document["comparisons"] if c["kind"] == "official"}
    ps = {name: c["p"] for name, c in official.items()}
    assert ps == {"large": pytest.approx(2 / 2**9), "small": pytest.approx(2 / 2**8)}
    assert official["large"]["p_holm"] == pytest.approx(2 * ps["large"])
    assert official["small"]["p_holm"] == pytest.approx(max(ps["small"], 2 * ps["large"]))


def test_different_questions_are_refused(rows, tmp_path, capsys):
    a = scored(tmp_path / "a", rows, right(40))
    fewer = scored(tmp_path / "fewer", write_questions(tmp_path / "half", 30), right(30))
    assert "10 only in A, such as 'q30', 'q31', 'q32'" in refused(capsys, a, fewer)
    other = write_questions(tmp_path / "other", 40, answers=["no"])
    error = refused(capsys, a, scored(tmp_path / "other_result", other, right(40)))
    assert "references: 40 questions differ, such as 'q0': ['yes'] and ['no']" in error
    renamed = scored(tmp_path / "renamed", rows, right(40)) / "scores.jsonl"
    renamed.write_text(renamed.read_text().replace('"q7"', '"z7"'))
    assert "questions: 1 only in A, such as 'q7'" in refused(capsys, a, renamed.parent)


@pytest.mark.parametrize(
    ("receipt", "expected"),
    [
        ({"scorer_version": 2}, "scorer_version: 1 and 2"),
        ({"prompt_template": "{question} Briefly."}, "prompt_template: '{question}' and '{question} Briefly.'"),
        ({"judge": "other"}, "judge: 'one' and 'other'"),
        ({"limit": 5, "question_set": "another"}, "limit: none and 5"),
        ({"split": "test", "question_set": "another"}, "split: none and test"),
    ],
)
def test_different_conditions_are_named(receipt, expected, rows, tmp_path, capsys):
    a, b = scored(tmp_path / "a", rows, right(40)), scored(tmp_path / "b", rows, right(40))
    for out in (a, b):
        edit(out / "report.json", receipt={"prompt_template": "{question}", "judge": "one"})
    edit(b / "report.json", receipt=receipt)
    assert expected in refused(capsys, a, b)


def test_different_benchmarks_are_refused(rows, tmp_path, capsys):
    a, b = scored(tmp_path / "a", rows, right(40)), scored(tmp_path / "b", rows, right(40))
    edit(b / "report.json", benchmark="nlvr")
    assert "benchmark: vqa and nlvr" in refused(capsys, a, b)
    assert "no such folder" in refused(capsys, a, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no result" in refused(capsys, tmp_path / "empty", b)


def test_other_differences_in_settings_are_printed(rows, tmp_path, capsys):
    a, b = scored(tmp_path / "a", rows, right(40)), scored(tmp_path / "b", rows, right(40, 1))
    edit(a / "report.json", receipt={"num_frames": 8, "prompt_template": "{question}"})
    edit(b / "report.json", receipt={"num_frames": 16})
    assert compared(capsys, a, b)["also_unlike"]["vqa"] == [
        "num_frames: 8 and 16",
        "the prompt of B is unknown: not generated by `mmdora eval`",
    ]


def test_judged_scores_have_their_own_row(rows, tmp_path, capsys):
    a, b = scored(tmp_path / "a", rows, right(40)), scored(tmp_path / "b", rows, right(40))
    judge(a, 0.25)
    judge(b, 0.5)
    found = {c["kind"]: c for c in compared(capsys, a, b)["comparisons"]}
    assert found["official"]["difference"] == 0
    assert (found["judged"]["difference"], found["judged"]["test"]) == (25, BOOTSTRAP)
    judge(a, 0.0, only=True)
    judge(b, 1.0, only=True)
    (one,) = compared(capsys, a, b)["comparisons"]
    assert (one["kind"], one["difference"], one["test"], one["p"]) == ("judged", 100, EXACT, mcnemar(0, 40))
    edit(b / "report.json", scores={"official": None, "strict": None})
    assert "no scores to compare" in refused(capsys, a, b)


def test_control_characters_in_answers_are_not_printed(rows, tmp_path, capsys):
    hostile = ["\x1b[2J[bold]\ud800\u2028no", *right(39)]
    a, b = scored(tmp_path / "a", rows, hostile), scored(tmp_path / "b", rows, right(40))
    capsys.readouterr()
    assert command("compare", a, b) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "�[2J[bold]� no" in printed


def test_garbage_collection_is_enabled_again_after_an_error(tmp_path):
    with pytest.raises(UserError):
        compare_results(tmp_path / "none", tmp_path / "none")
    assert gc.isenabled()
