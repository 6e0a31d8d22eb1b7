"""NLVR and NLVR2: from miniatures of their official files to scores and the official CSV."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.samples import Sample
from eval.benchmarks import BENCHMARKS, Question
from eval.run import read_questions
from mmdora.core.errors import UserError
from tests.benchmark_walk import config, lines, scored, small, submitted, walk, write
from tests.media import write_image

__all__ = ["small"]


def nlvr(root: Path) -> Path:
    rows = [
        {"sentence": "A box.", "label": label, "identifier": f"7-{m}", "directory": "0"}
        for m, label in enumerate(("true", "false"))
    ]
    (root / "images" / "0").mkdir(parents=True)
    for m in range(2):
        for k in range(2):
            write_image(root / "images" / "0" / f"dev-7-{m}-{k}.png", seed=m, size=(40, 10))
    return write(root / "dev.json", lines(rows))


def nlvr2(root: Path) -> Path:
    rows = [
        {"sentence": "Two dogs.", "identifier": f"dev-4-{pair}-{s}", "label": label}
        for pair, s, label in ((0, 0, "True"), (1, 0, "False"), (0, 1, "True"))
    ]
    (root / "images" / "dev").mkdir(parents=True)
    for pair in range(2):
        for side in range(2):
            write_image(root / "images" / "dev" / f"dev-4-{pair}-img{side}.png", seed=side, size=(32, 32))
    return write(root / "data" / "dev.json", lines(rows))


def test_nlvr2_from_files_to_csv(small, tmp_path):
    path = nlvr2(tmp_path / "data")
    report, rows = walk(small, "nlvr2", tmp_path / "data", tmp_path / "out")
    assert [len(row["media"]) for row in rows] == [2, 2, 2]
    assert set(report["metrics"]) == {"consistency"}
    csv = tmp_path / "predictions.csv"
    csv.write_text("dev-4-0-0,TRUE\ndev-4-1-0,false\ndev-4-0-1,yes\n")
    for official in (path, tmp_path / "data"):
        found = scored("nlvr2", csv, official)
        assert found["scores"]["official"]["value"] == pytest.approx(200 / 3)
        assert found["metrics"]["consistency"] == 50  # two sentences; the first is correct for both of its pairs
        assert found["unparsed_rate"] == pytest.approx(1 / 3)
    submission = submitted([tmp_path / "out"], tmp_path / "submission.csv").decode().split("\n")
    assert [line.split(",")[0] for line in submission if line] == ["dev-4-0-0", "dev-4-1-0", "dev-4-0-1"]
    again = scored("nlvr2", tmp_path / "submission.csv", path)
    assert again["scores"]["official"]["value"] == report["scores"]["official"]["value"]


def test_nlvr2_image_folders_and_errors(tmp_path):
    nlvr2(tmp_path)
    row = {"sentence": "A.", "identifier": "train-1-2-0", "label": "True", "directory": 33}
    write(tmp_path / "data" / "train.json", lines([row]))
    folder = tmp_path / "images" / "train" / "33"
    folder.mkdir(parents=True)
    for side in range(2):
        write_image(folder / f"train-1-2-img{side}.png", size=(32, 32))
    assert [
        part.path.parent for part in read_questions(config("nlvr2", tmp_path, split="train"))[0].sample.media()
    ] == [folder] * 2
    (folder / "train-1-2-img1.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 media files are missing, such as .*img1\.png; expected layout"):
        read_questions(config("nlvr2", tmp_path, split="train"))
    with pytest.raises(UserError, match=r"nlvr2 has no split 'x'; choose from dev, test1, test2, train"):
        read_questions(config("nlvr2", tmp_path, split="x"))
    write(tmp_path / "data" / "dev.json", lines([row | {"label": "maybe"}]))
    with pytest.raises(UserError, match=r"dev\.json, row 0: invalid label or identifier"):
        read_questions(config("nlvr2", tmp_path))
    (tmp_path / "p.csv").write_text("dev-4-0-0\n")
    with pytest.raises(UserError, match=r"p\.csv, line 1: expected an identifier, a comma"):
        BENCHMARKS["nlvr2"]().read_predictions(tmp_path / "p.csv", [])


def test_nlvr_from_files_to_csv(small, tmp_path, caplog):
    path = nlvr(tmp_path / "dev")
    report, rows = walk(small, "nlvr", tmp_path / "dev", tmp_path / "out")
    assert report["metrics"]["pictures_of_official"] == "4 of 12"
    assert rows[0]["question"] == "A box.\nIs this true or false?"
    submitted([tmp_path / "out"], tmp_path / "submission.csv")
    assert "has 4 of 12 images; the official script requires all" in caplog.text
    again = scored("nlvr", tmp_path / "submission.csv", path)
    assert again["scores"]["official"]["value"] == report["scores"]["official"]["value"]
    csv = tmp_path / "predictions.csv"  # the official script compares only the numbers in a name
    csv.write_text("".join(f"{split}-7-{m}-{k}.png,{label}\n" for split, m, k, label in [
        ("dev", 0, 0, "TRUE"), ("test", 0, 1, "true"), ("dev", 1, 0, "false"), ("dev", 1, 1, "what")]))  # fmt: skip
    found = scored("nlvr", csv, path)
    assert (found["scores"]["official"]["value"], found["metrics"]["consistency"], found["unparsed_rate"]) == (
        75,
        0,
        0.25,
    )
    _, rows_with_prompt = walk(small, "nlvr", tmp_path / "dev", tmp_path / "other", prompt="Is it so? {question}")
    assert rows_with_prompt[0]["question"] == "Is it so? A box."


def test_nlvr_annotations_alone_require_all_images(tmp_path):
    path = nlvr(tmp_path / "dev").rename(tmp_path / "dev.json")
    names = [f"dev-7-{m}-{k}.png" for m in range(2) for k in range(6)]
    csv = tmp_path / "p.csv"
    csv.write_text("".join(f"{name},true\n" for name in names))
    found = scored("nlvr", csv, path)
    assert (found["n"], found["scores"]["official"]["value"]) == (12, 50)
    assert found["metrics"]["pictures_of_official"] == "12 of 12"
    csv.write_text("dev-7-0-0.png,true\n")
    with pytest.raises(UserError, match="11 without an answer"):
        scored("nlvr", csv, path)


@given(st.text())
def test_every_response_gets_a_score(text):
    question = Question("dev-1-0-0", Sample("q", (), "t"), ("true",), "c")
    for name in ("nlvr", "nlvr2"):
        score = BENCHMARKS[name]().score(text, question)
        assert 0 <= score.strict <= score.official <= 1
