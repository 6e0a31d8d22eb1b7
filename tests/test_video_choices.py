"""Multiple-choice video benchmarks: NExT-QA, MVBench, Video-MME, EgoSchema, TVQA and How2QA."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.samples import Sample
from eval.benchmarks import BENCHMARKS, Question
from eval.benchmarks.choice import chosen_option
from eval.benchmarks.mvbench import TASKS, file_name
from eval.run import evaluate, read_questions
from mmdora.core.errors import UserError
from tests.benchmark_walk import config, lines, scored, small, submitted, walk, write
from tests.media import write_image, write_video

__all__ = ["small"]
LLAVA = "Answer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def video_file(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=12, size=(32, 32))


def copy_to(video_file: Path, *places: Path) -> None:
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video_file, place)


def nextqa(root: Path, video_file: Path) -> Path:
    rows = ["video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"]
    rows += [f"11,9,32,32,why,{i},{i},{kind},a,b,c,d,e" for i, kind in enumerate(["CW", "TP", "DO"])]
    copy_to(video_file, root / "NExTVideo" / "11.mp4")
    return write(root / "val.csv", "\n".join(rows) + "\n")


def mvbench(root: Path, video_file: Path, tasks: tuple[str, ...] = ("Action Sequence", "Action Count")) -> Path:
    row = {"question": "What?", "candidates": ["cat", "dog."], "answer": "dog.", "video": "x.mp4"}
    for task in tasks:
        write(root / "json" / f"{file_name(task)}.json", [row | {"start": 0.5, "end": 1.0}])
        copy_to(video_file, root / "video" / TASKS[task] / "x.mp4")
    return root / "json" / f"{file_name(tasks[0])}.json"


def videomme(root: Path, video_file: Path) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    row = {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Law", "videoID": "abc"}
    row |= {
        "task_type": "OCR Problems",
        "question": "What?",
        "options": ["A. Apples.", "B. Pears.", "C. Figs.", "D. No."],
    }
    rows = [row | {"question_id": f"001-{i}", "answer": "ABC"[i - 1]} for i in (1, 2, 3)]
    copy_to(video_file, root / "data" / "abc.mp4")
    write(root / "subtitle" / "abc.srt", "1\n00:00:00,000 --> 00:00:01,000\nHello there\n")
    path = root / "videomme" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def egoschema(root: Path, video_file: Path) -> Path:
    rows = [{"q_uid": key, "question": "What?"} | {f"option {i}": f"C does {i}" for i in range(5)} for key in "xyz"]
    copy_to(video_file, *(root / "videos" / f"{key}.mp4" for key in "xyz"))
    write(root / "questions.json", rows)
    return write(root / "subset_answers.json", {"x": 0, "y": 4})


def value(root: Path, video_file: Path, task: str) -> Path:
    options = {f"a{i}": f"it is {i}" for i in range(5 if task == "tvqa" else 4)}
    rows = [
        {"qid": i, "q": "What?", "vid_name": "friends_s01", "ts": ts} | options
        for i, ts in enumerate(("0.3-0.9", "NaN-NaN"))
    ]
    sub = {
        "vid_name": "friends_s01",
        "sub": [{"text": " Joey: Hi", "start": 0.5, "end": 0.6}, {"text": "Bye", "start": 1.0, "end": 2}],
    }
    if task == "tvqa":
        for i in range(5):
            folder = root / "frames_hq" / "friends_frames" / "friends_s01"
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / f"{i + 1:05d}.jpg", i, (32, 32))
    else:
        copy_to(video_file, root / "videos" / "friends_s01.mp4")
    write(root / "ann" / ("tv_subtitles.jsonl" if task == "tvqa" else "how2_subtitles.jsonl"), lines([sub]))
    files = BENCHMARKS[task].files
    write(root / "ann" / task / files["test"][0], lines([row | {"qid": row["qid"] + 10} for row in rows]))
    return write(root / "ann" / task / files["val"][0], lines([row | {"answer_idx": 3 * row["qid"]} for row in rows]))


def template(path: Path, responses: list[str], **names: str) -> Path:
    asked = [
        {"question_id": f"001-{i}", "task_type": "OCR Problems", "question": "What?", "choices": [], "answer": "A"}
        for i in (1, 2, 3)
    ]
    video = {"video_id": "001", "questions": [q | {"response": r} for q, r in zip(asked, responses, strict=True)]}
    return write(path, [video | names])


ME = {"duration_category": "short", "video_category": "Knowledge", "video_subcategory": "Law"}
OFFICIAL = {  # benchmark: (function that writes its files, official predictions, their official and strict accuracy)
    "nextqa": (nextqa, {f"11_{i}": {"prediction": p, "answer": i} for i, p in enumerate([0, 3, 2])}, 200 / 3, 200 / 3),
    "mvbench": (mvbench, {"res_list": [{"pred": p, "gt": "(B) dog."} for p in ("(B) dog", "")]}, 100, 50),
    "videomme": (videomme, template, 50, 100 / 3),
    "egoschema": (egoschema, {"x": 0, "y": -1, "z": 2}, 50, 50),
    "tvqa": (lambda root, video_file: value(root, video_file, "tvqa"), {"0": 0, "1": 4}, 50, 50),
    "how2qa": (lambda root, video_file: value(root, video_file, "how2qa"), {"0": 0, "1": 3}, 100, 100),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_from_files_to_scores(name, small, video_file, tmp_path):
    make, predictions, official, strict = OFFICIAL[name]
    answers = make(tmp_path / "data", video_file)
    report, rows = walk(small, name, tmp_path / "data", tmp_path / "out")
    assert report["n"] == len(rows)
    assert report["scores"]["official"] is not None
    assert LLAVA in report["receipt"]["prompt"]
    assert rows[0]["question"].count("\n") >= 3  # the options
    file = tmp_path / "predictions.json"
    template(file, ["The answer is A", "C", "no"], **ME) if predictions is template else write(file, predictions)
    alone = [] if name == "mvbench" else [answers]  # one annotation file per task
    for annotated in (tmp_path / "data", *alone):
        found = scored(name, file, annotated)
        assert found["scores"]["official"]["value"] == pytest.approx(official)
        assert found["scores"]["strict"]["value"] == pytest.approx(strict)
    own_predictions = write(tmp_path / "ours.jsonl", lines([{"id": row["id"], "response": "B"} for row in rows]))
    assert scored(name, own_predictions, tmp_path / "data")["unparsed_rate"] == 0


def test_nextqa_categories(video_file, tmp_path):
    nextqa(tmp_path, video_file)
    predictions = OFFICIAL["nextqa"][1]
    found = scored("nextqa", write(tmp_path / "p.json", predictions), tmp_path)["categories"]
    right = {name for name, figures in found.items() if figures["value"] == 100}
    wrong = {name for name, figures in found.items() if figures["value"] == 0}
    assert right == {"type: Why", "type: Other", "group: Acc_C", "group: Acc_D"}
    assert wrong == {"type: Bef&Aft", "group: Acc_T"}
    changed = predictions | {"11_0": {"prediction": 0, "answer": 1}}
    with pytest.raises(UserError, match=r"entry 11_0: answer 1 differs from the annotations"):
        scored("nextqa", write(tmp_path / "p.json", changed), tmp_path)


def test_mvbench_response_start_and_submission(small, video_file, tmp_path):
    mvbench(tmp_path / "data", video_file, tuple(TASKS))
    prompt = "Question: {question}\nOptions:\n{choices}\nOnly give the best option.\nBest option:("
    entry = config("mvbench", tmp_path / "data", prompt=prompt)
    questions = read_questions(entry)
    report = evaluate(*small, entry, questions, tmp_path / "out")
    assert report["receipt"]["prompt"].endswith("Best option:(")
    assert questions[0].sample.messages[0].text.endswith("(A) cat\n(B) dog.\nOnly give the best option.")
    videos = {q.id: next(q.sample.media()) for q in questions}
    assert videos["action_sequence-0"].bounds == {"start": 0.5, "end": 1.0}
    assert videos["episodic_reasoning-0"].bounds == {"start": 0.5, "end": 1.0}  # a video file has its own frame rate
    assert videos["action_count-0"].bounds == {}
    scores = [BENCHMARKS["mvbench"]().score(response, questions[0]) for response in ("B) dog", "A) cat", "B", "")]
    assert [(s.official, s.strict, s.unparsed) for s in scores] == [
        (1, 1, False), (0, 0, False), (1, 1, False), (1, 0, True),
    ]  # fmt: skip
    submission = json.loads(submitted([tmp_path / "out"], tmp_path / "upload.json"))
    assert list(submission) == [*TASKS, "Avg"]
    assert submission["Avg"] == pytest.approx(report["scores"]["official"]["value"])
    walk(
        small,
        "mvbench",
        Path(mvbench(tmp_path / "few", video_file)).parent,
        tmp_path / "few-out",
        media=str(tmp_path / "few/video"),
    )
    with pytest.raises(UserError, match="no responses for Action Prediction"):
        submitted([tmp_path / "few-out"], tmp_path / "few.json")


def test_videomme_with_subtitles_and_both_key_styles(small, video_file, tmp_path):
    videomme(tmp_path / "data", video_file)
    prompt = "{subtitles}\n{question}\n{options}\nThe best answer is:"
    _, rows = walk(small, "videomme", tmp_path / "data", tmp_path / "out", prompt=prompt)
    assert rows[0]["question"] == "Hello there\nWhat?\nA. Apples.\nB. Pears.\nC. Figs.\nD. No.\nThe best answer is:"
    submission = json.loads(submitted([tmp_path / "out"], tmp_path / "results.json"))
    assert [list(video) for video in submission] == [["video_id", *ME, "questions"]]
    assert [q["response"] for q in submission[0]["questions"]] == [row["response"] for row in rows]
    again = scored("videomme", tmp_path / "results.json", tmp_path / "data")
    assert again["n"] == 3
    other = {"duration": "short", "domain": "Knowledge", "sub_category": "Law"}
    for names in (ME, other):  # the template also holds the reference answers
        path = template(tmp_path / "t.json", ["A", "B", "x"], **names)
        assert scored("videomme", path, path)["scores"]["official"]["value"] == 50
    missing = template(tmp_path / "t.json", ["A", "A", "A"], missing=True, **ME)
    found = scored("videomme", missing, missing)
    assert (found["scores"]["official"]["value"], found["unparsed_rate"]) == (0, 1)


def test_egoschema_submission_is_of_the_full_set(small, video_file, tmp_path, caplog):
    egoschema(tmp_path / "data", video_file)
    report, _ = walk(small, "egoschema", tmp_path / "data", tmp_path / "full", split="full")
    assert report["scores"]["official"] is None
    table = submitted([tmp_path / "full"], tmp_path / "kaggle.csv").decode()
    assert table.startswith("q_uid,answer\nx,")
    checked = json.loads(submitted([tmp_path / "full"], tmp_path / "server.json"))
    assert table == "q_uid,answer\n" + "".join(f"{key},{index}\n" for key, index in checked.items())
    assert scored("egoschema", tmp_path / "kaggle.csv", tmp_path / "data" / "subset_answers.json")["n"] == 2
    walk(small, "egoschema", tmp_path / "data", tmp_path / "subset")
    submitted([tmp_path / "subset"], tmp_path / "try.csv")
    assert "the leaderboard ranks the split full" in caplog.text
    with pytest.raises(UserError, match=r"p\.json, x: the answer must be 0 to 4, found 'B'"):
        scored("egoschema", write(tmp_path / "p.json", {"x": "B"}), tmp_path / "data")


@pytest.mark.parametrize("task", ["tvqa", "how2qa"])
def test_value_submission_needs_both_splits(task, small, video_file, tmp_path):
    value(tmp_path / "data", video_file, task)
    for split in ("val", "test"):
        report, rows = walk(small, task, tmp_path / "data", tmp_path / split, split=split)
    assert report["scores"]["official"] is None
    assert rows[0]["question"].startswith("Subtitles:\nJoey: Hi\nWhat?")  # subtitles between the timestamps
    assert rows[1]["question"].startswith("Subtitles:\nJoey: Hi\nBye\nWhat?")
    bounds = [next(q.sample.media()).bounds for q in read_questions(config(task, tmp_path / "data"))]
    rate = {"frames_fps": 3.0} if task == "tvqa" else {}
    assert bounds == [{"start": 0.3, "end": 0.9} | rate, rate]
    folders = [tmp_path / "test", tmp_path / "val"]
    archive = zipfile.ZipFile(io.BytesIO(submitted(folders, tmp_path / "out.zip")))
    names = [f"{task}/{name}" for name in BENCHMARKS[task].submission_files.values()]
    assert archive.namelist() == names
    assert {int(k): -1 <= v < 5 for k, v in json.loads(archive.read(names[1])).items()} == {10: True, 11: True}
    with pytest.raises(UserError, match=r"one result of each split, val and test; got test"):
        submitted(folders[:1], tmp_path / "no.zip")


def test_tvqa_solution_file_alone(tmp_path):
    path = write(
        tmp_path / "tvqa_val_solution.json", {"split": "tvqa_val", "solution": {"House": {"7": 4}, "Castle": {"8": 0}}}
    )
    found = scored("tvqa", write(tmp_path / "p.json", {"7": 4, "8": 1}), path)
    assert found["scores"]["official"]["value"] == 50
    assert scored("tvqa", write(tmp_path / "p.json", {"7": 4, "8": 1, "9": 4}), path)["n"] == 2
    with pytest.raises(UserError, match=r"ids 2 without an answer: 7, 8"):
        scored("tvqa", write(tmp_path / "p.json", {"9": 4}), path)


def test_responses_that_name_an_option():
    options = ["C is cooking.", "a cat", "Bird", "red fox"]
    response = ["A", "b", "(B)", "B. a cat", "c is COOKING", "The answer is (D).", "Option C", "red fox."]
    assert [chosen_option(text, options) for text in response] == [0, 1, 1, 1, 0, 3, 2, 3]
    assert {chosen_option(text, options) for text in ("", "A cat or so", "E", "I do not know", "an option", "2")} == {
        None
    }


@given(st.text(), st.sampled_from(list(OFFICIAL)))
def test_every_response_gets_a_score(text, name):
    details = {"options": 2, "answer": "(B) dog.", "begun": True} if name == "mvbench" else {"options": ["a", "b"]}
    question = Question("q", Sample("q", (), "t"), ("B",), "c", (), details)
    score = BENCHMARKS[name]().score(text, question)
    assert 0 <= score.strict <= score.official <= 1
