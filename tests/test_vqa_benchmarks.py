"""Open-ended image benchmarks: from miniatures of their official files to scores and submission."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Sample
from eval.benchmarks import BENCHMARKS, Question
from eval.benchmarks.stvqa import anls, edit_distance
from eval.benchmarks.textvqa import question_in_llava_prompt
from eval.benchmarks.vizwiz import unanswerability
from eval.results import read_report, read_result
from eval.run import evaluate, read_questions
from mmdora.cli.score import score
from mmdora.cli.submit import submit
from mmdora.core.config import EvaluationConfig, ModelConfig
from mmdora.core.errors import UserError
from mmdora.models.loading import load_model
from tests.vqa_miniatures import LLAVA, MINIATURES, gqa_question, write


@pytest.fixture(scope="module")
def model():
    """(model, encoder) of the shipped base model; no test changes it."""
    model, processor = load_model(ModelConfig(path="assets/tiny-llava", dtype="float32"))
    return model, Encoder(processor)


def config(name, data, **more):
    return EvaluationConfig(name=name, benchmark=name, data=str(data), max_new_tokens=3, **more)


def scored(name, predictions, data, out, **more):
    score(name, predictions, str(data), more.get("split"), False, out, False)
    return read_report(out)


@pytest.mark.parametrize("name", sorted(MINIATURES))
def test_from_files_to_the_leaderboard(name, model, tmp_path, caplog):
    mini, data = MINIATURES[name], tmp_path / "data"
    mini.build(data)
    data_path = data / mini.answers if name == "exact_match" else data
    entry = config(name, data_path, split=mini.split)
    questions = read_questions(entry)
    report = evaluate(*model, entry, questions, tmp_path / "out")
    assert questions[0].sample.messages[0].text == mini.prompt
    assert mini.prompt in report["receipt"]["prompt"]
    assert report["n"] == len(questions) == 3
    assert set(report["scores"]) == {"official", "strict"}
    assert 0 <= report["scores"]["strict"]["value"] <= report["scores"]["official"]["value"] <= 100

    predictions = tmp_path / "predictions.json"
    write(predictions, mini.predictions)
    for place, out in ((data_path, "a"), (data / mini.answers, "b")):
        found = scored(name, predictions, place, tmp_path / out, split=mini.split)
        assert found["scores"]["official"]["value"] == pytest.approx(mini.official)
        assert found["scores"]["strict"]["value"] == pytest.approx(mini.strict)
    own = scored(name, tmp_path / "out" / "responses.jsonl", data_path, tmp_path / "c", split=mini.split)
    assert own["scores"] == report["scores"]

    if mini.unanswered is None or mini.submitted is None:
        with pytest.raises(UserError, match="no leaderboard"):
            submit([tmp_path / "out"], tmp_path / "none.json")
        return
    entry = config(name, data, split=mini.unanswered)
    report = evaluate(*model, entry, read_questions(entry), tmp_path / "test")
    assert report["scores"] == {"official": None, "strict": None}
    submit([tmp_path / "test"], tmp_path / "answers.json")
    assert json.loads((tmp_path / "answers.json").read_text()) == mini.submitted(read_result(tmp_path / "test").rows)
    submit([tmp_path / "out"], tmp_path / "public.json")
    assert "this split has public answers; the leaderboard ranks" in caplog.text
    assert len(json.loads((tmp_path / "public.json").read_text())) == len(read_result(tmp_path / "out").rows)


@given(st.text())
def test_every_response_gets_a_score(text):
    details = {"balanced": True, "answerable": 1, "group": "g", "common": False, "entailed": []}
    for name in MINIATURES:
        benchmark = BENCHMARKS[name]()
        question = Question("q", Sample("q", (), "t"), ("a dog",) * 10, "c", details=details)
        found = benchmark.score(benchmark.prediction(text), question)
        assert 0 <= found.strict <= found.official <= 1
        benchmark.extras({"q": text}, [question])
    assert 0 <= anls(text, ["", "a"]) <= 1
    question_in_llava_prompt(text)


@given(st.text(max_size=12), st.text(max_size=12))
def test_edit_distance_is_a_distance(a, b):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert (edit_distance(a, b) == 0) == (a == b)


@pytest.mark.parametrize("name", sorted(MINIATURES))
def test_errors_name_malformed_files(name, tmp_path):
    mini = MINIATURES[name]
    mini.build(tmp_path)
    if name != "exact_match":
        with pytest.raises(UserError, match="expected layout"):
            BENCHMARKS[name]().questions(config(name, tmp_path / "nowhere"))
        with pytest.raises(UserError, match="split 'x'"):
            BENCHMARKS[name]().questions(config(name, tmp_path, split="x"))
        for wrong in ([], {}, [{}], {"annotations": [{}]}, {"data": [3]}, {"1": {"answer": 3}}, {"questions": [None]}):
            write(tmp_path / "wrong.json", wrong)
            with pytest.raises(UserError, match=r"wrong\.json") as caught:
                read_questions(config(name, tmp_path / "wrong.json"))
            assert "\n" not in str(caught.value).split("; expected layout")[0]
    for path in [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")]:
        path.unlink()
    with pytest.raises(UserError, match="media files are missing"):
        read_questions(config(name, tmp_path / mini.answers if name == "exact_match" else tmp_path))


def test_responses_are_normalised_as_in_llavas_scripts(tmp_path):
    """LLaVA's answer files go through its conversion; official files are scored unchanged."""
    MINIATURES["gqa"].build(tmp_path)
    answers = [{"question_id": i, "prompt": "", "text": t} for i, t in (("10", "Red."), ("11", "Yes"), ("12", "right"))]
    (tmp_path / "llava.jsonl").write_text("\n".join(json.dumps(row) for row in answers))
    assert scored("gqa", tmp_path / "llava.jsonl", tmp_path, tmp_path / "out")["scores"]["official"]["value"] == (
        pytest.approx(200 / 3)
    )
    MINIATURES["vqav2"].build(tmp_path / "coco")
    answers = [{"question_id": i, "text": text} for i, text in enumerate(["Yes", "Red.", "two"])]
    write(tmp_path / "vqa.json", answers)
    report = scored("vqav2", tmp_path / "vqa.json", tmp_path / "coco", tmp_path / "o")
    assert report["scores"]["official"]["value"] == 100
    assert report["categories"]["answer type: number"]["value"] == 100
    assert report["categories"]["question type: eight"]["n"] == 3


def test_annotations_alone_are_enough_to_score_but_not_to_generate(tmp_path):
    MINIATURES["vqav2"].build(tmp_path)
    for path in (tmp_path / "Questions").iterdir():
        path.unlink()
    for data in (tmp_path, tmp_path / MINIATURES["vqav2"].answers):
        assert len(BENCHMARKS["vqav2"]().questions(config("vqav2", data))) == 3
        with pytest.raises(UserError, match="has annotations but no questions"):
            read_questions(config("vqav2", data))


def test_okvqa_names_its_question_types(tmp_path):
    MINIATURES["okvqa"].build(tmp_path)
    assert (
        "question type: Plants and Animals" in BENCHMARKS["okvqa"]().questions(config("okvqa", tmp_path))[0].categories
    )


def test_textvqa_prompt_with_and_without_ocr(tmp_path):
    MINIATURES["textvqa"].build(tmp_path)
    plain = config("textvqa", tmp_path, prompt=f"{{question}}{LLAVA}")
    assert read_questions(plain)[0].sample.messages[0].text == f"What says 0?{LLAVA}"
    assert read_questions(config("textvqa", tmp_path))[2].sample.messages[0].text == (
        f"What says 2?\nReference OCR token: {LLAVA}"  # an image without OCR tokens
    )
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    assert read_questions(plain)
    with pytest.raises(UserError, match=r"TextVQA_Rosetta_OCR_v0\.2_val\.json: no such file"):
        read_questions(config("textvqa", tmp_path))
    with pytest.raises(UserError, match=r"unknown field \{tokens\}"):
        read_questions(config("textvqa", tmp_path, prompt="{question} {tokens}"))


def test_textvqa_matches_llavas_answers_by_their_prompt(tmp_path):
    MINIATURES["textvqa"].build(tmp_path)
    rows = [
        {"question_id": image, "prompt": f"{question_text}\nReference OCR token: x{LLAVA}", "text": predicted}
        for image, question_text, predicted in (
            ("ab1", "What says 2?", "stop"),
            ("ab0", "What says 1?", "x"),
            ("ab0", "What says 0?", "nokia"),
        )
    ]
    (tmp_path / "llava.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    report = scored("textvqa", tmp_path / "llava.jsonl", tmp_path, tmp_path / "out")
    assert report["scores"]["official"]["value"] == pytest.approx(200 / 3)
    for wrong in ({"prompt": f"What says 9?{LLAVA}"}, {"prompt": "a\nb\nc"}):
        (tmp_path / "llava.jsonl").write_text(json.dumps(rows[0] | wrong))
        with pytest.raises(UserError, match=r"llava\.jsonl, row 0"):
            scored("textvqa", tmp_path / "llava.jsonl", tmp_path, tmp_path / "wrong")


def test_textvqa_requires_ten_answers(tmp_path):
    row = {"question_id": 1, "image_id": "a", "question": "?", "answers": ["x"] * 9}
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": [row]})
    with pytest.raises(UserError, match="question 0: expected 10 strings as answers, found 9"):
        BENCHMARKS["textvqa"]().questions(config("textvqa", tmp_path))


def test_gqa_counts_balanced_questions_only(tmp_path):
    """In a split with other questions, accuracy excludes them and consistency uses them."""
    MINIATURES["gqa"].build(tmp_path)
    questions = {
        "1": gqa_question(0, "red", "query", entailed=["1", "2", "3"]),
        "2": gqa_question(1, "yes", "verify", balanced=False),
        "3": gqa_question(1, "no", "verify", balanced=False),
        "4": gqa_question(1, "left", "choose"),
    }
    write(tmp_path / "val_all_questions.json", questions)
    predicted = {"1": "red", "2": "yes", "3": "yes", "4": "right"}
    write(tmp_path / "p.json", [{"questionId": i, "prediction": p} for i, p in predicted.items()])
    report = scored("gqa", tmp_path / "p.json", tmp_path / "val_all_questions.json", tmp_path / "out")
    assert report["scores"]["official"]["value"] == 50
    assert report["metrics"]["consistency"] == 50
    assert report["categories"]["kind: open"].items() >= {"n": 1, "value": 100, "high": 100}.items()
    assert "validity" not in report["metrics"]  # there is no choices file
    questions["1"]["entailed"] = ["99"]
    write(tmp_path / "val_all_questions.json", questions)
    report = scored("gqa", tmp_path / "p.json", tmp_path / "val_all_questions.json", tmp_path / "more")
    assert "consistency" not in report["metrics"]


def test_gqa_leaderboard_takes_only_its_split(model, tmp_path):
    MINIATURES["gqa"].build(tmp_path)
    write(tmp_path / "questions1.2" / "test_balanced_questions.json", {"9": {"question": "What?", "imageId": "n0"}})
    entry = config("gqa", tmp_path, split="test_balanced")
    evaluate(*model, entry, read_questions(entry), tmp_path / "out")
    with pytest.raises(UserError, match="the leaderboard takes submission_all"):
        submit([tmp_path / "out"], tmp_path / "a.json")


def test_stvqa_reports_anls_and_accuracy(tmp_path):
    """ "coca colas" is one edit in ten from "coca cola"; "two" is normalised to "2" by the accuracy, not by ANLS."""
    mini = MINIATURES["stvqa"]
    mini.build(tmp_path)
    write(tmp_path / "p.json", mini.predictions)
    report = scored("stvqa", tmp_path / "p.json", tmp_path, tmp_path / "out", split="train")
    assert report["scores"]["official"]["value"] == pytest.approx(100 * (1 + 0.9 + 0) / 3)
    assert report["metrics"]["accuracy"] == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("response", "answers", "anls"),
    [
        ("ABCD", ["x", "abcd"], 1),
        ("abxx", ["abcd"], 0.5),  # the threshold itself counts
        ("axxx", ["abcd"], 0),
        ("ab  cd", ["ab xx"], 1 - 2 / 6),  # the distance ignores the second space, the length does not
        ("", ["yes"], 0),
    ],
)
def test_docvqa_anls_as_the_official_script_computes_it(response, answers, anls):
    question = Question("1", Sample("1", (), "t"), tuple(answers), "c")
    assert BENCHMARKS["docvqa"]().score(response, question).official == pytest.approx(anls)


def test_docvqa_layouts_and_question_types(tmp_path):
    MINIATURES["docvqa"].build(tmp_path)
    (tmp_path / "spdocvqa_qas" / "val_v1.0_withQT.json").rename(tmp_path / "val_v1.0.json")
    (tmp_path / "spdocvqa_images").rename(tmp_path / "documents")
    read = read_questions(config("docvqa", tmp_path))
    assert [q.id for q in read] == ["300", "301", "302"]
    assert read[0].categories == ("question type: form", "question type: layout")
    assert {q.cluster for q in read} == {"page_1.png", "page_2.png"}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_unanswerability_by_its_definition(pairs):
    """Average precision: the sum over the thresholds of precision times the gain in recall."""
    predicted, true = zip(*pairs, strict=True)
    found, recall, area = unanswerability(predicted, true), 0.0, 0.0
    for threshold in sorted(set(predicted), reverse=True):
        chosen = [is_true for is_predicted, is_true in pairs if is_predicted >= threshold]
        reached = sum(chosen) / max(1, sum(true))
        area, recall = area + (reached - recall) * sum(chosen) / len(chosen), reached
    assert found["average_precision"] == pytest.approx(100 * area, abs=0.006)
    hits = sum(a and b for a, b in pairs)
    assert found["f1_score"] == pytest.approx(200 * hits / max(1, sum(predicted) + sum(true)), abs=0.006)


def test_exact_match_normalisation():
    benchmark = BENCHMARKS["exact_match"]()

    def scores(response, *references):
        found = benchmark.score(response, Question("q", Sample("q", (), "t"), references, "c"))
        return found.official, found.strict, found.unparsed

    assert scores(" The  Dog. ", "a cat", "the dog") == (1, 1, False)
    assert scores("dog", "a dog") == (0, 0, False)
    assert scores("", "") == (1, 0, True)
