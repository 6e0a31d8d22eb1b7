"""Multiple-choice benchmarks (own data, ScienceQA, MMBench, SEED-Bench, commonsense tasks): from miniatures of their
official files to the submission."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.samples import Sample
from eval.benchmarks import BENCHMARKS, Question
from eval.benchmarks.commonsense import TASKS
from eval.results import read_result
from mmdora.core.errors import UserError
from tests.benchmark_walk import questions_of, responses, scored, small, submitted, walk, write, write_lines
from tests.choice_files import commonsense_files, mmbench_files, mmbench_rows, science_files, seed_files
from tests.media import write_image

__all__ = ["small"]


def own_files(root: Path) -> Path:
    ask = "What is it?\nA. a cat\n(B) a dog\nAnswer with a letter."
    rows = [
        {"question": ask, "answer": "B", "image": "0.png"},
        {"question": ask, "answer": "a cat", "image": "1.png"},
    ]
    for i in range(2):
        write_image(root / f"{i}.png", i, (32, 32))
    write(root / "own.json", rows)
    return root / "own.json"


def answer_letter(q: Question) -> str:
    return q.references[0]


def llava_answers(path: Path, questions: list[Question]) -> Path:
    return write_lines(
        path / "answers.jsonl", [{"question_id": q.id, "prompt": "", "text": answer_letter(q)} for q in questions]
    )


def mmbench_workbook(path: Path, questions: list[Question]) -> Path:
    rows = [{"index": int(q.id), "question": "", "A": "", "prediction": answer_letter(q)} for q in questions]
    pd.DataFrame(rows).to_excel(path / "answers.xlsx", index=False, engine="openpyxl")
    return path / "answers.xlsx"


def llm_adapters_answers(path: Path, questions: list[Question]) -> Path:
    for q in questions:
        row = {"instruction": q.details["instruction"], "output_pred": f"the correct answer is {answer_letter(q)}"}
        write(path / f"LLaMA-7B-DoRA-{TASKS[q.details['task']].folder}.json", [row])
    return path


def mmdora_answers(path: Path, questions: list[Question]) -> Path:
    return write_lines(path / "responses.jsonl", [{"id": q.id, "response": f"({answer_letter(q)})"} for q in questions])


@pytest.mark.parametrize(
    ("name", "make", "official", "n", "file"),
    [
        ("multiple_choice", own_files, mmdora_answers, 2, None),
        ("scienceqa", science_files, llava_answers, 3, "results.json"),
        ("mmbench", mmbench_files, mmbench_workbook, 5, "results.xlsx"),
        ("seedbench", seed_files, llava_answers, 3, "results.jsonl"),
        ("commonsense", commonsense_files, llm_adapters_answers, 8, None),
    ],
)
def test_from_files_to_submission(small, tmp_path, name, make, official, n, file):
    (tmp_path / "data").mkdir()
    (tmp_path / "predictions").mkdir()
    data = make(tmp_path / "data")
    report = walk(small, name, data, tmp_path / "result")[0]
    assert report["n"] == n
    assert 0 <= report["scores"]["official"]["low"] <= report["scores"]["official"]["high"] <= 100
    perfect = scored(name, official(tmp_path / "predictions", questions_of(name, data)), data, out=tmp_path / "perfect")
    assert perfect["scores"]["official"]["value"] == perfect["scores"]["strict"]["value"] == pytest.approx(100)
    assert perfect["unparsed_rate"] == 0
    if file is None:
        with pytest.raises(UserError, match="no leaderboard"):
            submitted([tmp_path / "result"], tmp_path / "out")
        return
    written = tmp_path / "out" / file
    submitted([tmp_path / "result"], written)
    read_back = dict(BENCHMARKS[name]().read_predictions(written, questions_of(name, data)))
    assert read_back == responses(tmp_path / "result")
    assert [path.name for path in written.parent.iterdir()] == [file]


@given(st.text() | st.sampled_from(["A", "(B)", "The answer is B.", "answer1", "A. cat", "the answer is a"]))
def test_every_response_gets_a_score(text):
    about = {"choices": 3, "answer": 1, "image": None, "options": {"A": "", "B": "cat"}, "task": "piqa"}
    for name in ("multiple_choice", "scienceqa", "seedbench", "commonsense", "boolq", "mmbench"):
        details = about | ({"options": ["ant", "bee"], "index": 3} if name == "mmbench" else {})
        q = Question(
            "3", Sample("3", (), "t"), ("B",), "c", (), details | ({"task": "boolq"} if name == "boolq" else {})
        )
        score = BENCHMARKS[name]().score_all({"3": text}, [q])["3"]
        assert 0 <= score.strict <= score.official <= 1


def test_scienceqa_uses_llavas_prompt_and_both_official_scorers(tmp_path):
    data = science_files(tmp_path)
    prompts = {q.id: q.sample.messages[0].text for q in questions_of("scienceqa", data)}
    end = "\nAnswer with the option's letter from the given choices directly."
    assert prompts["1"] == "Context: Look at it.\nWhich is warmer?\nA. ice\nB. fire\nC. snow" + end
    assert prompts["2"] == "Which is a verb?\nA. run\nB. tree" + end
    predicted = [{"question_id": "1", "text": "The answer is B."}, {"question_id": "2", "text": "(A)"}]
    report = scored("scienceqa", write_lines(tmp_path / "said.jsonl", predicted), data, out=tmp_path / "out")
    assert report["scores"]["official"]["value"] == pytest.approx(100 / 3)  # "(A)" is unparsed, 3 has no prediction
    assert report["metrics"]["img_accuracy"] == 100  # excludes 3, which has no prediction
    assert report["metrics"]["acc_has_image"] == 50
    assert (report["metrics"]["acc_grade_1_6"], report["metrics"]["acc_verbs"]) == (100, None)
    assert report["categories"]["context: image"]["value"] == 50
    results = write(tmp_path / "results.json", {"results": {"1": 1, "2": 0, "3": -1}})
    assert scored("scienceqa", results, data / "problems.json", out=tmp_path / "2")["scores"]["official"]["value"] > 66
    (data / "pid_splits.json").unlink()
    assert [q.id for q in questions_of("scienceqa", data, split="val")] == ["4"]
    with pytest.raises(UserError, match=r"no problems of the split 'minival'"):
        questions_of("scienceqa", data, split="minival")


def test_mmbench_requires_every_pass(tmp_path):
    """Two questions with three and two options: five passes, generated by rotating the options."""
    questions = questions_of("mmbench", mmbench_files(tmp_path))
    assert [q.id for q in questions] == ["7", "1000007", "2000007", "9", "1000009"]
    assert [answer_letter(q) for q in questions] == ["B", "A", "C", "A", "B"]
    assert questions[1].sample.messages[0].text.startswith('Think.\nWhat "colour"?\nA. =green\nB. blue\nC. red\nAnswer')
    assert questions[0].sample.messages[0].parts[0] is questions[2].sample.messages[0].parts[0]  # one shared image
    predicted = {q.id: answer_letter(q) for q in questions} | {"1000007": "I think =green", "1000009": "A"}
    scores = BENCHMARKS["mmbench"]().score_all(predicted, questions)
    assert [scores[q.id].official for q in questions] == [1, 1, 1, 0, 0]
    rows = write_lines(tmp_path / "said.jsonl", [{"question_id": i, "text": text} for i, text in predicted.items()])
    report = scored("mmbench", rows, tmp_path, out=tmp_path / "out")
    assert report["scores"]["official"]["value"] == 50
    assert report["metrics"]["accuracy of dev"] == {"CP": 0.5, "Overall": 0.5, "color": 0.0, "ocr": 1.0}
    sheet = pd.read_excel(io.BytesIO(submitted([tmp_path / "out"], tmp_path / "out.xlsx")), keep_default_na=False)
    names = "index question A B C D prediction answer category l2-category split"
    assert list(sheet.columns) == names.split()
    assert list(sheet.iloc[1])[:7] == [1000007, 'What "colour"?', "=green", "blue", "red", "", "I think =green"]
    result = read_result(tmp_path / "out")
    with pytest.raises(UserError, match="mmbench takes one result"):
        BENCHMARKS["mmbench"]().write_submission([result, result], tmp_path / "x.xlsx")
    del result.rows[1]
    with pytest.raises(
        UserError, match=r"question 7 has 3 options, but the passes \[0, 2\]; the server needs all passes"
    ):
        BENCHMARKS["mmbench"]().write_submission([result], tmp_path / "x.xlsx")


def test_mmbench_reads_passes_from_the_file(small, tmp_path):
    """As downloaded: pass 2 of question 9 is a row that refers to the image of row 9. This split has no answers."""
    first = mmbench_rows(tmp_path)[1] | {"split": "test"}
    rotated = first | {"index": 1000009, "A": "no", "B": "yes", "image": "9"}
    del first["answer"], rotated["answer"]
    table = tmp_path / "MMBench_TEST_EN.tsv"
    pd.DataFrame([rotated, first]).to_csv(table, sep="\t", index=False)
    questions = questions_of("mmbench", tmp_path, split="test")
    assert [(q.id, q.references) for q in questions] == [("9", ()), ("1000009", ())]
    assert questions[0].cluster == questions[1].cluster
    report = walk(small, "mmbench", tmp_path, tmp_path / "result")[0]
    assert report["scores"] == {"official": None, "strict": None}
    written = tmp_path / "results.xlsx"
    submitted([tmp_path / "result"], written)
    assert list(pd.read_excel(written, keep_default_na=False)["answer"]) == ["", ""]
    with pytest.raises(UserError, match="not public"):
        scored("mmbench", written, table, out=tmp_path / "scored")
    (tmp_path / "MMBench_TEST_CN.tsv").write_bytes(table.read_bytes())
    with pytest.raises(UserError, match=r"holds MMBench_TEST_CN.tsv, MMBench_TEST_EN.tsv; set `data` to one"):
        questions_of("mmbench", tmp_path, split="test")


def test_commonsense_tasks_individually_and_together(tmp_path):
    data = commonsense_files(tmp_path)
    (q,) = questions_of("siqa", data / "social_i_qa" / "test.json")
    assert q.sample.messages[0].text.startswith("Below is an instruction that describes a task. Write a response")
    assert q.sample.messages[0].text.endswith("\n\n                ### Response:\n                ")
    predicted = write_lines(tmp_path / "said.jsonl", [{"id": q.id, "response": "answer3 ### Response: answer1"}])
    assert scored("siqa", predicted, data, out=tmp_path / "siqa")["scores"]["official"]["value"] == 100
    rows = [
        {"id": q.id, "response": answer_letter(q) if "arc" in q.id else "?"} for q in questions_of("commonsense", data)
    ]
    report = scored("commonsense", write_lines(tmp_path / "all.jsonl", rows), data, out=tmp_path / "all")
    assert report["scores"]["official"]["value"] == 25
    assert (report["unparsed_rate"], report["metrics"]["tasks"]) == (0.75, "8 of 8")
