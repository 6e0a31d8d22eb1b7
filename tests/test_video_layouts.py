"""Alternative layouts of the video benchmarks: Video-ChatGPT's files and Hugging Face's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from eval.archives import write_zip
from eval.benchmarks import BENCHMARKS
from eval.benchmarks.mvbench import TASKS, file_name
from eval.run import read_questions
from mmdora.core.errors import UserError
from tests.benchmark_walk import config, lines, scored, small, walk, write
from tests.media import write_image, write_video

__all__ = ["small"]
ZERO_SHOT = {  # benchmark: (its folder, a video in it)
    "msvd_qa": ("MSVD_Zero_Shot_QA", "videos/x_1_2.avi"),
    "msrvtt_qa": ("MSRVTT_Zero_Shot_QA", "videos/all/x_1_2.mp4"),
    "tgif_qa": ("TGIF_Zero_Shot_QA", "mp4/x_1_2.mp4"),
    "activitynet_qa": ("Activitynet_Zero_Shot_QA", "all_test/v_x_1_2.mp4"),
}


@pytest.fixture(scope="module")
def video_file(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=4, size=(32, 32))


def copy_to(video_file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(video_file, place)


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def zero_shot(root: Path, name: str, video_file: Path) -> Path:
    folder, video = ZERO_SHOT[name]
    questions = [{"video_name": "x_1_2", "question": f"what {i}?", "question_id": f"v_x_1_2_{i}"} for i in range(3)]
    answers = [{"answer": a, "type": 3, "question_id": f"v_x_1_2_{i}"} for i, a in enumerate(["yes", "dog", "two"])]
    write(root / folder / "test_q.json", questions)
    write(root / folder / "test_a.json", list(reversed(answers)))
    copy_to(video_file, root / folder / video)
    return root / folder


@pytest.mark.parametrize("name", ZERO_SHOT)
def test_video_chatgpt_files(name, small, video_file, tmp_path):
    folder = zero_shot(tmp_path, name, video_file)
    pairs = [("yes", "yes"), ("dog", "cat"), ("two", "two")]
    rows = [
        {"id": f"v_x_1_2_{i}", "question": "what?", "answer": a, "pred": p} for i, (a, p) in enumerate(pairs)
    ]  # the scripts also write the reference as "answer"
    merged = write(tmp_path / "merge.jsonl", lines(rows))
    chunk = write(tmp_path / "1_0.json", lines(rows))  # JSON lines despite its suffix
    whole = write(tmp_path / "MSVD.json", rows)
    for data in (tmp_path, folder, folder / "test_q.json", folder / "test_a.json"):
        for file in (merged, chunk, whole):
            assert scored(name, file, data)["scores"]["official"]["value"] == pytest.approx(200 / 3)
    alone = shutil.copy(folder / "test_a.json", tmp_path / "alone_a.json")
    assert scored(name, merged, alone)["scores"]["official"]["value"] == pytest.approx(200 / 3)
    _, answered = walk(small, name, tmp_path, tmp_path / "out")
    assert [row["references"] for row in answered] == [["yes"], ["dog"], ["two"]]
    assert {row["cluster"] for row in answered} == {"x_1_2"}
    assert answered[0]["question"] == "what 0?\nAnswer the question using a single word or phrase."


def test_errors_for_a_missing_answer_or_video(video_file, tmp_path):
    folder = zero_shot(tmp_path, "msvd_qa", video_file)
    write(folder / "test_a.json", [{"answer": "yes", "question_id": "v_x_1_2_0"}])
    with pytest.raises(UserError, match=r"v_x_1_2_1 has no answer in test_a\.json"):
        BENCHMARKS["msvd_qa"]().questions(config("msvd_qa", folder))
    zero_shot(tmp_path, "msvd_qa", video_file)
    (folder / "videos" / "x_1_2.avi").unlink()
    for data in (tmp_path / "none", tmp_path):  # no question file, and no video
        with pytest.raises(UserError, match=r"(?s)expected layout.*MSVD_Zero_Shot_QA/ with test_q\.json"):
            read_questions(config("msvd_qa", data))


def test_nextqa_files_on_hugging_face(small, video_file, tmp_path):
    row = {"video": 11, "frame_count": 9, "width": 32, "height": 32, "question": "why", "qid": 0, "type": "CW"}
    options = {f"a{i}": f"option {i}" for i in range(5)}
    table(tmp_path / "MC" / "test-00000-of-00001.parquet", [row | options | {"answer": 3}])
    open_ended = [row | {"answer": "to play", "additional_ref_answer": "for fun"}]
    open_ended += [row | {"qid": 1, "type": "DC", "answer": "2", "additional_ref_answer": None}]
    table(tmp_path / "OE" / "validation-00000-of-00001.parquet", open_ended)
    copy_to(video_file, tmp_path / "NExTVideo" / "11.mp4")
    _, answered = walk(small, "nextqa", tmp_path, tmp_path / "out", split="test")
    assert answered[0]["references"] == ["D"]
    assert "D. option 3" in answered[0]["question"]
    official = write(tmp_path / "mc.json", {"11_0": {"prediction": 3, "answer": 3}})
    assert scored("nextqa", official, tmp_path, "test")["scores"]["official"]["value"] == 100
    (one, two) = read_questions(config("nextqa_oe", tmp_path))
    assert (one.references, two.references) == (("to play", "for fun"), ("2",))
    official = write(tmp_path / "oe.json", {"11": {"0": "for fun", "1": "3"}})
    assert scored("nextqa_oe", official, tmp_path / "OE" / "validation-00000-of-00001.parquet")["scores"]["official"][
        "value"
    ] == pytest.approx(50)


def test_egoschema_files_on_hugging_face(small, video_file, tmp_path):
    options = [f"{letter}. C does {i}" for i, letter in enumerate("ABCDE")]
    row = {"question_idx": "7", "question": "What?", "video_idx": "uid-x", "option": options, "answer": "4"}
    table(tmp_path / "Subset" / "test-00000-of-00001.parquet", [row])
    hidden = [row | {"answer": None}, row | {"video_idx": "uid-y", "answer": None}]
    table(tmp_path / "MC" / "test-00000-of-00001.parquet", hidden)
    copy_to(video_file, tmp_path / "videos" / "uid-x.mp4")
    copy_to(video_file, tmp_path / "videos" / "uid-y.MP4")
    _, answered = walk(small, "egoschema", tmp_path, tmp_path / "out")
    assert (answered[0]["id"], answered[0]["references"]) == ("uid-x", ["E"])
    assert "\nA. C does 0\n" in answered[0]["question"]
    everything = read_questions(config("egoschema", tmp_path, split="full"))
    assert [(q.id, q.references) for q in everything] == [("uid-x", ()), ("uid-y", ())]
    official = write(tmp_path / "p.json", {"uid-x": 4, "uid-y": 0})
    assert scored("egoschema", official, tmp_path)["scores"]["official"]["value"] == 100
    table(tmp_path / "Subset" / "test-00000-of-00001.parquet", [row | {"answer": "E"}])
    with pytest.raises(UserError, match="must be 0 to 4, found 'E'"):
        read_questions(config("egoschema", tmp_path))


def test_mvbench_video_folders(video_file, tmp_path):
    """Videos that are cut already on Hugging Face are used whole; all others between their bounds."""
    row = {"question": "What?", "candidates": ["cat", "dog"], "answer": "dog"}
    bounds = {"start": 0.5, "end": 1.0}
    write(tmp_path / "json" / f"{file_name('Action Sequence')}.json", [row | bounds | {"video": "a.mp4"}])
    write(tmp_path / "json" / f"{file_name('Object Interaction')}.json", [row | {"video": "b_1.5_2.0.mp4"}])
    write(tmp_path / "json" / f"{file_name('Action Antonym')}.json", [row | {"video": "c.mp4"}])
    write(tmp_path / "json" / f"{file_name('Episodic Reasoning')}.json", [row | bounds | {"video": "d"}])
    copy_to(video_file, tmp_path / "video" / "data0613" / TASKS["Action Sequence"] / "a.mp4")
    copy_to(video_file, tmp_path / "video" / "star" / "Charades_segment" / "b_1.5_2.0.mp4")
    copy_to(video_file, tmp_path / "video" / "ssv2_video_mp4" / "c.mp4")
    (tmp_path / "video" / TASKS["Episodic Reasoning"] / "d").mkdir(parents=True)
    write_image(tmp_path / "video" / TASKS["Episodic Reasoning"] / "d" / "00001.jpg", 0, (32, 32))
    found = {q.categories[0]: next(q.sample.media()) for q in read_questions(config("mvbench", tmp_path))}
    bound = {task.removeprefix("task: "): video.bounds for task, video in found.items()}
    assert bound == {
        "Action Sequence": bounds,
        "Object Interaction": {},
        "Action Antonym": {},
        "Episodic Reasoning": bounds | {"frames_fps": 3.0},
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nextqa", '{"11_0": {"prediction": 1, "answer": 3}, "11_0": {"prediction": 3, "answer": 3}}'),
        ("nextqa_oe", '{"11": {"0": "no", "0": "to play"}}'),
        ("egoschema", '{"x": 1, "x": 3}'),
        ("tvqa", '{"0": 1, "0": 3}'),
        ("tvqa", '{"0": 1, "00": 3}'),
    ],
)
def test_duplicate_ids_in_an_object_are_errors(name, text, tmp_path):
    """json.loads would silently keep the last one."""
    with pytest.raises(UserError, match=r"p\.json: .*(twice|equal as integers)"):
        BENCHMARKS[name]().read_predictions(write(tmp_path / "p.json", text), [])


@pytest.mark.parametrize("caption", [None, 5, ["a dog"], {}])
@pytest.mark.parametrize("name", ["msrvtt_caption", "tvc", "yc2c"])
def test_captions_must_be_text(name, caption, tmp_path):
    if name == "msrvtt_caption":
        file = write(tmp_path / "p.json", {"result": [{"video_id": "video1", "caption": caption}]})
    else:
        file = write(tmp_path / "p.jsonl", lines([{"clip_id": 1, "descs": [{"desc": caption}]}]))
    with pytest.raises(UserError, match=r"row [01]: the caption must be a string, found "):
        BENCHMARKS[name]().read_predictions(file, [])


def test_predictions_must_be_text(video_file, tmp_path):
    with pytest.raises(UserError, match="'result' is 5, not a list"):
        BENCHMARKS["msrvtt_caption"]().read_predictions(write(tmp_path / "p.json", {"result": 5}), [])
    row = {"question": "?", "candidates": ["3", "4"], "answer": "4", "video": "x"}
    write(tmp_path / "json" / "action_count.json", [row])
    questions = BENCHMARKS["mvbench"]().questions(config("mvbench", tmp_path))
    saved = write(tmp_path / "p.json", {"acc_dict": {}, "res_list": [{"pred": None, "gt": "(B) 4"}]})
    with pytest.raises(UserError, match="res_list 0: 'pred' is None"):
        BENCHMARKS["mvbench"]().read_predictions(saved, questions)
    question = {"question_id": "1-1", "task_type": "t", "response": None}
    template = write(tmp_path / "t.json", [{"video_id": "1", "questions": [question]}])
    with pytest.raises(UserError, match="1-1: 'response' is None"):
        BENCHMARKS["videomme"]().read_predictions(template, [])


def test_zip_submissions_need_the_suffix_zip(tmp_path):
    with pytest.raises(UserError, match=r"takes a zip file, such as .*tvc\.zip"):
        write_zip(tmp_path / "tvc.json", {"tvc/tvc_val_predictions.jsonl": []})
