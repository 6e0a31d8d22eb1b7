"""Captioning benchmarks: from miniatures of their official files to report and submission."""

from __future__ import annotations

import json
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from data_pipelines.encoding import Encoder
from eval.captions_java import meteor_process
from eval.run import evaluate, read_questions
from mmdora.cli.score import score
from mmdora.cli.submit import submit
from mmdora.core.config import EvaluationConfig, VideoConfig
from mmdora.core.errors import UserError
from tests.families import qwen2_vl
from tests.media import write_image, write_video

CAPTIONS = ["A red dog runs.", "Two men (old) ride a horse!", "a cat sits on “the” street", "Blue boats, far away"]


def rows(*values: object) -> str:
    return "".join(f"{json.dumps(value)}\n" for value in values)


def make_caption(folder: Path) -> str:
    lines = [{"image": write_image(folder / f"{i}.png", i).name, "captions": CAPTIONS[i : i + 2]} for i in range(3)]
    (folder / "mine.jsonl").write_text(rows(*lines))
    return rows(*({"id": f"row-{i}", "response": CAPTIONS[i]} for i in range(3)))


def make_coco(folder: Path) -> str:
    images, annotations = [], []
    for part, ids in (("val2014", (42, 73, 74)), ("test2014", (1, 14, 16))):
        (folder / part).mkdir()
        for image_id in ids:
            name = f"COCO_{part}_{image_id:012}.jpg"
            write_image(folder / part / name, image_id)
            images.append({"id": image_id, "file_name": name})
    for i, image in enumerate(images[:3]):
        annotations += [{"id": 9 * i + k, "image_id": image["id"], "caption": CAPTIONS[i + k]} for k in (1, 0)]
    (folder / "annotations").mkdir()
    val = {"images": images[:3], "annotations": annotations}
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(val))
    (folder / "annotations" / "image_info_test2014.json").write_text(json.dumps({"images": images[3:]}))
    split = [
        {"cocoid": i["id"], "filename": i["file_name"], "filepath": "val2014", "split": s, "sentences": [{"raw": c}]}
        for i, s, c in zip(images[:3], ("test", "val", "test"), CAPTIONS, strict=False)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": split}))
    return json.dumps([{"image_id": row["id"], "caption": CAPTIONS[i]} for i, row in enumerate(images[:3])])


def make_flickr30k(folder: Path) -> str:
    (folder / "flickr30k-images").mkdir()
    names = [write_image(folder / "flickr30k-images" / f"{i}36979.jpg", i).name for i in range(3)]
    lines = [f"{name}#{k}\t{CAPTIONS[i + k]}" for i, name in enumerate(names) for k in range(2)]
    (folder / "results_20130124.token").write_text("\n".join(lines), encoding="utf-8")
    return json.dumps([{"image_id": name, "caption": CAPTIONS[i]} for i, name in enumerate(names)])


def make_msrvtt(folder: Path) -> str:
    (folder / "TestVideo").mkdir()
    names = [write_video(folder / "TestVideo" / f"video{i}.mp4", frames=4).stem for i in range(7010, 7013)]
    videos = [{"video_id": name, "split": "test", "category": i} for i, name in enumerate(names)]
    videos.append({"video_id": "video0", "split": "train", "category": 9})
    sentences = [
        {"video_id": n, "sen_id": k, "caption": CAPTIONS[i + k]} for i, n in enumerate(names) for k in range(2)
    ]
    (folder / "test_videodatainfo.json").write_text(json.dumps({"info": {}, "videos": videos, "sentences": sentences}))
    result = [{"video_id": name, "caption": CAPTIONS[i]} for i, name in enumerate(names)]
    return json.dumps({"version": "VERSION 1.0", "result": result, "external_data": {"used": "true"}})


def make_value(folder: Path, task: str, names: list[str]) -> str:
    (folder / "ann" / task).mkdir(parents=True)
    clips = [{"vid_name": name, "duration": 3.0, "ts": [i / 2, 2.5], "clip_id": 80 + i} for i, name in enumerate(names)]
    answered = [video | {"descs": [{"desc": c} for c in CAPTIONS[i : i + 2]]} for i, video in enumerate(clips)]
    (folder / "ann" / task / f"{task}_val_release.jsonl").write_text(rows(*answered))
    (folder / "ann" / task / f"{task}_test_release.jsonl").write_text(rows(*clips))
    return rows(*({"clip_id": 80 + i, "descs": [{"desc": CAPTIONS[i]}, {"desc": "x"}]} for i in range(len(names))))


def make_tvc(folder: Path) -> str:
    names = ["friends_s01e01_seg01_clip_00", "s01e01_seg01_clip_00"]
    for show, name in zip(("friends", "bbt"), names, strict=True):
        frames = folder / "frames_hq" / f"{show}_frames" / name
        frames.mkdir(parents=True)
        for i in range(9):
            write_image(frames / f"{i + 1:05}.jpg", i)
    subtitles = {
        "vid_name": names[1],
        "sub": [{"text": " Hi. ", "start": 2, "end": 3}, {"text": "No", "start": 0, "end": 0.4}],
    }
    make = make_value(folder, "tvc", names)
    (folder / "ann" / "tv_subtitles.jsonl").write_text(rows(subtitles))
    return make


def make_yc2c(folder: Path) -> str:
    (folder / "videos").mkdir()
    names = [write_video(folder / "videos" / f"iuQjb1-WAzs_{i}.mp4", frames=4).stem for i in range(2)]
    return make_value(folder, "yc2c", names)


MAKERS = {
    "caption": (make_caption, {"data": "mine.jsonl", "format": "caption"}, "mine.jsonl"),
    "coco_caption": (make_coco, {"split": "val2014"}, "annotations/captions_val2014.json"),
    "flickr30k": (make_flickr30k, {}, "results_20130124.token"),
    "msrvtt_caption": (make_msrvtt, {}, "test_videodatainfo.json"),
    "tvc": (make_tvc, {}, "ann/tvc/tvc_val_release.jsonl"),
    "yc2c": (make_yc2c, {}, "ann/yc2c/yc2c_val_release.jsonl"),
}


@pytest.fixture(scope="module")
def model():
    """(model, encoder) of a tiny model for images and videos."""
    made, processor = qwen2_vl()
    return made.eval(), Encoder(processor, VideoConfig(num_frames=2, timeout=None))


@pytest.fixture(scope="module")
def meteor():
    """One METEOR process for all tests: it takes seconds to start."""
    with meteor_process() as started:
        yield started


@pytest.mark.parametrize("name", MAKERS)
def test_from_files_to_report(name, tmp_path, model, meteor, monkeypatch, capsys):
    monkeypatch.setattr("eval.benchmarks.captions.meteor_process", lambda: nullcontext(meteor))
    make, options, answers = MAKERS[name]
    data = tmp_path / "data"
    data.mkdir()
    predictions = tmp_path / (
        "predictions.json" if name in ("coco_caption", "flickr30k", "msrvtt_caption") else "p.jsonl"
    )
    predictions.write_text(make(data), encoding="utf-8")
    fields = {"data": str(data / options.get("data", "")), "max_new_tokens": 3} | {
        key: value for key, value in options.items() if key != "data"
    }
    config = EvaluationConfig(name=name, benchmark=name, **fields)
    questions = read_questions(config)
    report = evaluate(*model, config, questions, tmp_path / "out")
    assert report["n"] == len(questions) > 1
    assert report["scores"]["official"]["value"] == pytest.approx(report["metrics"]["CIDEr"])
    assert report["scores"]["strict"] is report["unparsed_rate"] is None

    alone = tmp_path / Path(answers).name  # the annotations without the rest of the folder
    alone.write_bytes((data / answers).read_bytes())
    split = options.get("split")
    score(name, predictions, str(alone if name != "caption" else data / answers), split, True, None, False)
    scored = json.loads(capsys.readouterr().out)
    assert scored["scores"]["official"]["value"] > 200  # each caption equals one of its references
    assert scored["metrics"]["Bleu_1"] > 99
    assert 50 < scored["metrics"]["METEOR"] <= 100


@pytest.mark.parametrize(("name", "splits"), [("coco_caption", ("val2014", "test2014")), ("tvc", ("val", "test"))])
def test_submissions_need_both_splits(name, splits, tmp_path, model, meteor, monkeypatch):
    monkeypatch.setattr("eval.benchmarks.captions.meteor_process", lambda: nullcontext(meteor))
    MAKERS[name][0](tmp_path)
    for split in splits:
        config = EvaluationConfig(name=split, benchmark=name, data=str(tmp_path), split=split, max_new_tokens=3)
        report = evaluate(*model, config, read_questions(config), tmp_path / split)
        assert (report["scores"]["official"] is None) == split.startswith("test")
    folders, out = [tmp_path / split for split in splits], tmp_path / "mine.zip"
    with pytest.raises(UserError, match="takes two results, of the splits"):
        submit(folders[:1], out)
    assert not out.exists()
    submit(folders, out)
    with zipfile.ZipFile(out) as archive:
        files = {member: archive.read(member).decode() for member in archive.namelist()}
    if name == "tvc":
        assert set(files) == {"tvc/tvc_val_predictions.jsonl", "tvc/tvc_test_predictions.jsonl"}
        first = json.loads(files["tvc/tvc_val_predictions.jsonl"].split("\n")[0])
        assert (first["vid_name"], first["clip_id"]) == ("friends_s01e01_seg01_clip_00", 80)
        assert isinstance(first["descs"][0]["desc"], str)
    else:
        assert set(files) == {"captions_val2014_mine_results.json", "captions_test2014_mine_results.json"}
        assert [row["image_id"] for row in json.loads(files["captions_test2014_mine_results.json"])] == [1, 14, 16]


def test_coco_karpathy_splits_and_prompt(tmp_path):
    make_coco(tmp_path)
    config = EvaluationConfig(name="c", benchmark="coco_caption", data=str(tmp_path))
    questions = read_questions(config)
    assert [q.id for q in questions] == ["42", "74"]
    assert questions[0].sample.messages[0].text == "Provide a one-sentence caption for the provided image."
    other = read_questions(config.model_copy(update={"prompt": "Say what you see.", "split": "val"}))
    assert [(q.id, q.sample.messages[0].text) for q in other] == [("73", "Say what you see.")]
    blips = {"images": [{"id": 73}], "annotations": [{"image_id": 73, "caption": "A cat."}]}
    (tmp_path / "coco_karpathy_test_gt.json").write_text(json.dumps(blips))
    (alone,) = read_questions(config.model_copy(update={"data": str(tmp_path / "coco_karpathy_test_gt.json")}))
    assert (alone.id, alone.references) == ("73", ("A cat.",))
    with pytest.raises(UserError, match=r"holds no dataset_coco\.json .*; expected layout:\n<data>/dataset_coco\.json"):
        read_questions(config.model_copy(update={"data": str(tmp_path / "val2014")}))


def test_flickr30k_karpathy_split(tmp_path):
    make_flickr30k(tmp_path)
    images = [
        {"imgid": 0, "filename": "036979.jpg", "split": "train", "sentences": [{"raw": "A dog."}]},
        {"imgid": 1, "filename": "136979.jpg", "split": "test", "sentences": [{"raw": "A cat."}, {"raw": "Cats."}]},
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"dataset": "flickr30k", "images": images}))
    (questions,) = read_questions(EvaluationConfig(name="f", benchmark="flickr30k", data=str(tmp_path)))
    assert (questions.id, questions.references) == ("136979", ("A cat.", "Cats."))


def test_tvc_uses_the_frames_and_subtitles_of_the_clip(tmp_path):
    make_tvc(tmp_path)
    prompt = "Hear: {subtitles}. Caption it."
    config = EvaluationConfig(name="t", benchmark="tvc", data=str(tmp_path), prompt=prompt)
    first, second = read_questions(config)
    assert first.sample.messages[0].text == "Hear: . Caption it."
    assert second.sample.messages[0].text == "Hear: Hi.. Caption it."
    (video,) = second.sample.media()
    assert (video.start, video.end, video.frames_fps) == (0.5, 2.5, 3.0)
    assert video.path == tmp_path / "frames_hq" / "bbt_frames" / "s01e01_seg01_clip_00"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tvc", rows({"clip_id": 80, "descs": []}), r"row 1: 'descs' must be a non-empty list"),
        ("tvc", rows({"clip_id": 80, "descs": [{"desc": "x"}]}), r"1 without an answer: 81"),
        (
            "flickr30k",
            json.dumps([{"image_id": 7, "caption": "x"}, {"image_id": 7, "caption": "x"}]),
            "1 answered twice: 7",
        ),
        ("msrvtt_caption", json.dumps({"results": []}), "the file: no field 'result'"),
    ],
)
def test_errors_name_malformed_predictions(name, text, message, tmp_path):
    make, _, answers = MAKERS[name]
    make(tmp_path)
    predictions = tmp_path / ("p.jsonl" if name == "tvc" else "p.json")
    predictions.write_text(text)
    with pytest.raises(UserError, match=message):
        score(name, predictions, str(tmp_path / answers), None, True, None, False)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "coco_caption",
            ('"caption": "Two men (old) ride a horse!"', '"caption": 7'),
            "annotation 0: the caption must be a string, found 7",
        ),
        ("coco_caption", ('"image_id": 73', '"image_id": 42'), "image 73 has no caption"),
        ("flickr30k", ("\t", " "), "line 1: expected <image>#<number>, a tab and a caption"),
        (
            "msrvtt_caption",
            ('"video_id": "video7010", "sen_id"', '"video_id": "video7011", "sen_id"'),
            "video video7010 has no caption",
        ),
        (
            "tvc",
            ('"ts": [0.0, 2.5]', '"ts": "0-2.5"'),
            "row 1: 'ts' must be the start and end of the clip in seconds, found '0-2.5'",
        ),
    ],
)
def test_errors_name_malformed_files(name, change, message, tmp_path):
    make, options, answers = MAKERS[name]
    make(tmp_path)
    file = tmp_path / answers
    assert change[0] in file.read_text(encoding="utf-8")
    file.write_text(file.read_text(encoding="utf-8").replace(*change), encoding="utf-8")
    config = EvaluationConfig(name="c", benchmark=name, data=str(tmp_path), split=options.get("split"))
    with pytest.raises(UserError, match=message):
        read_questions(config)
