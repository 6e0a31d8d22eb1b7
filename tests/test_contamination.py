"""Contamination: exact copies, near copies and questions that training data and benchmarks share."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageDraw

from data_pipelines.dataset import read_source
from data_pipelines.samples import Image, Message, Sample, Text, Video
from eval.benchmarks import Question
from eval.contamination import contamination_check, find_overlaps
from eval.fingerprints import SIDE, FingerprintIndex, fingerprint, fingerprint_cache
from eval.run import read_questions
from mmdora.core.config import EvaluationConfig, SourceConfig
from mmdora.core.errors import UserError
from tests.media import picture, write_image, write_video
from tests.test_runs import command

ASK = "Answer the question using a single word or phrase."


def row(name: str, question: str, answer: str = "red", **media: str) -> dict:
    marks = "".join(f"<{kind}>\n" for kind in media)
    turns = [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | media


@pytest.fixture
def leaky(tmp_path) -> Path:
    """Training data that shares a file, a re-encoded image, a re-encoded video and questions with a benchmark."""
    for i in range(6):
        write_image(tmp_path / f"train{i}.png", seed=i)
    write_video(tmp_path / "train.mp4", frames=24, rate=12)
    (tmp_path / "copy.png").write_bytes((tmp_path / "train0.png").read_bytes())
    picture(1).resize((96, 80)).save(tmp_path / "resized.jpg", quality=60)
    write_image(tmp_path / "other.png", seed=99)
    write_video(tmp_path / "again.mp4", frames=24, size=(96, 80), rate=24, crf="35")
    write_video(tmp_path / "other.mp4", frames=24)
    frames = [np.asarray(picture(100 + i)) for i in range(8)]
    (tmp_path / "apart").mkdir()
    for i, frame in enumerate(frames):
        PILImage.fromarray(frame).save(tmp_path / "apart" / f"{i}.png")
    train = [
        row("t0", f"What colour is the BUS?\n{ASK}", image="train0.png"),
        row("t1", "Is it a dog", image="train1.png"),
        row("t2", "How many are there?", image="train2.png"),
        row("t3", "What is the capital of France?"),
        row("t4", "What happens?", video="train.mp4"),
    ]
    held_out = [
        row("copy", "What colour is the bus", image="copy.png"),
        row("resized", "Is it a dog?!", image="resized.jpg"),
        row("words", "how many are there", image="other.png"),
        row("none", "Where was it taken?", image="copy.png"),
        row("text", "What is the capital of France ?"),
        row("clip", "What happens here?", video="again.mp4"),
        row("still", "What is it?", video="apart"),
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "held_out.json").write_text(json.dumps(held_out))
    return tmp_path


def entry(folder: Path) -> EvaluationConfig:
    return EvaluationConfig(name="mine", benchmark="vqa", data=str(folder / "held_out.json"))


def overlap_of(folder: Path, max_files: int = 100):
    config = entry(folder)
    sources = [read_source(SourceConfig(path=str(folder / "train.json")))]
    return find_overlaps(sources, [config], {"mine": read_questions(config)}, max_files)["mine"]


def test_exact_copies_near_copies_and_questions_are_found(leaky):
    found = overlap_of(leaky)
    assert found.exact == {leaky / "copy.png": leaky / "train0.png"}
    assert found.near == {leaky / "resized.jpg": leaky / "train1.png", leaky / "again.mp4": leaky / "train.mp4"}
    # Other words about the same image are another question; so are the same words about another image.
    assert found.questions == ["copy", "resized", "text"]
    assert found.words_alone == 1
    assert (found.files, found.files_compared, found.training_files, found.training_files_compared) == (5, 5, 4, 4)
    receipt = found.receipt()
    assert json.loads(json.dumps(receipt)) == receipt
    assert receipt["examples"]["exact"] == [{"file": str(leaky / "copy.png"), "training": str(leaky / "train0.png")}]


def test_max_files_limits_fingerprints_but_not_bytes(leaky):
    found = overlap_of(leaky, max_files=2)
    assert (found.training_files, found.training_files_compared) == (4, 2)
    assert found.exact == {leaky / "copy.png": leaky / "train0.png"}
    assert found.files_compared < found.files


def drawing(x: int, colour: str = "red") -> PILImage.Image:
    image = PILImage.new("RGB", (200, 100), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((4, 4, 96, 96), outline="black")
    draw.rectangle((104, 4, 196, 96), outline="black")
    draw.rectangle((x, 30, x + 24, 54), fill=colour)
    return image


@pytest.mark.parametrize(
    ("other", "near"),
    [
        (drawing(20).resize((100, 50)), True),
        (drawing(20).resize((300, 200)), True),
        (drawing(20).convert("L").convert("RGB"), False),
        (drawing(20, "blue"), False),
        (drawing(60), False),
        (drawing(20).transpose(PILImage.Transpose.FLIP_LEFT_RIGHT), False),
        (PILImage.new("RGB", (200, 100), "white"), False),
    ],
)
def test_drawings_with_the_same_layout_are_not_near(other, near, tmp_path):
    drawing(20).save(tmp_path / "a.png")
    other.save(tmp_path / "b.jpg", quality=80)
    a, b = (fingerprint(Image(tmp_path / name)) for name in ("a.png", "b.jpg"))
    assert FingerprintIndex([a]).search([b]) == ([(0, 0)] if near else [])


def test_videos_are_near_if_most_of_their_frames_are(tmp_path):
    def video(name: str, seeds: list[int]) -> np.ndarray:
        (tmp_path / name).mkdir()
        for i, seed in enumerate(seeds):
            write_image(tmp_path / name / f"{i}.png", seed=seed)
        return fingerprint(Video(tmp_path / name))

    first = video("first", [1, 2, 3, 4])
    others = [video("three", [1, 2, 3, 9]), video("two", [1, 2, 8, 9]), video("longer", [1, 1, 2, 2, 3, 3, 4, 4])]
    assert FingerprintIndex([first]).search(others) == [(0, 0), (0, 2)]
    frame = fingerprint(Image(tmp_path / "first" / "2.png"))
    assert FingerprintIndex([frame]).search([first]) == [(0, 0)]
    assert FingerprintIndex([]).search([first]) == FingerprintIndex([first]).search([]) == []


def test_a_copy_is_found_among_many_images():
    """50,000 training images against 1,000 held-out ones."""
    rng = np.random.default_rng(0)
    held_out = list(rng.integers(0, 256, (1000, 1, SIDE, SIDE, 3), dtype=np.uint8))
    index, found = FingerprintIndex(held_out), []
    for chunk in range(20):
        others = rng.integers(0, 256, (2500, 1, SIDE, SIDE, 3), dtype=np.uint8)
        others[7] = held_out[chunk]
        found += [(copied, chunk) for copied, other in index.search(list(others)) if other == 7]
    assert found == [(chunk, chunk) for chunk in range(20)]


def test_fingerprints_are_cached_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("MMDORA_CACHE", str(tmp_path / "cache"))
    file = Image(write_image(tmp_path / "a.png"))
    with fingerprint_cache() as cache:
        first = cache.get(file)
    monkeypatch.setattr("eval.fingerprints.load_image", lambda *_: pytest.fail("the file was read again"))
    with fingerprint_cache() as cache:
        assert (cache.get(file) == first).all()
    monkeypatch.undo()
    monkeypatch.setenv("MMDORA_CACHE", str(tmp_path / "cache"))
    write_image(tmp_path / "a.png", seed=5)
    with fingerprint_cache() as cache:
        assert (cache.get(file) != first).any()
        assert cache.get(Image(tmp_path / "gone.png")) is None
    next((tmp_path / "cache").glob("*.sqlite")).write_text("not a database, but longer than the header of one " * 99)
    with pytest.raises(UserError, match="remove it, or set MMDORA_CACHE"), fingerprint_cache():
        pass


def test_images_in_shards_are_not_kept_in_memory(tmp_path):

    class Shards(list):
        images, videos = np.ones(40), np.zeros(40)

        def __getitem__(self, i: int) -> Sample:
            return Sample(str(i), (Message("user", (Image(Path(f"t/{i}"), bytes([i]) * 1_000_000), Text("?"))),), "t")

    held_out = [Image(Path(f"h/{i}"), bytes([i]) * (1_000_000 if i == 3 else 1_000)) for i in range(40)]
    questions = [
        Question(str(i), Sample(str(i), (Message("user", (part,)),), "h"), (), "") for i, part in enumerate(held_out)
    ]
    tracemalloc.start()
    found = find_overlaps([Shards(range(40))], [entry(tmp_path)], {"mine": questions}, 100)["mine"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.training_files == 40
    assert found.exact == {Path("h/3"): Path("t/3")}
    assert found.training_files_compared == 0  # the bytes are not images
    assert peak < 8_000_000


def test_missing_training_data_is_listed_as_absent(leaky):
    config = entry(leaky)
    training = [SourceConfig(path=str(leaky / name)) for name in ("train.json", "gone.json")]
    (found,) = contamination_check(training, 0, [config], {"mine": read_questions(config)})().values()
    assert found["compared_with"] == [str(leaky / "train.json")]
    assert len(found["absent"]) == 1
    assert "gone.json" in found["absent"][0]
    assert (found["exact"], found["near"], found["questions"], found["question_words_alone"]) == (1, 2, 3, 1)


def settings(folder: Path) -> list[str]:
    return [
        "quickstart",
        f"data.train=[{folder}/train.json]",
        f"evaluation=[{{name: mine, benchmark: vqa, data: {folder}/held_out.json, max_new_tokens: 2}}]",
        f"training.output={folder}/run",
        "training.max_steps=1",
        "training.batch_size=2",
        "training.micro_batch_size=2",
    ]


def test_doctor_warns_and_receipts_report_contamination(leaky, capsys):
    assert command("doctor", *settings(leaky)) == 0
    printed = capsys.readouterr().out
    assert f"1 of its 5 files are training data too, such as {leaky}/copy.png ({leaky}/train0.png)" in printed
    assert f"2 of its 5 files look like training data, such as {leaky}/again.mp4 ({leaky}/train.mp4)" in printed
    assert "3 of its questions are in the training data about the same media, such as 'copy'  [evaluation.0]" in printed
    assert "Perceptual hashes compared for 4 of 4 training files; byte hashes for all." in printed
    assert command("train", *settings(leaky)) == 0
    report = json.loads((leaky / "run" / "eval" / "mine" / "report.json").read_text())
    assert report["receipt"]["contamination"]["near"] == 2
    (leaky / "train.json").rename(leaky / "moved.json")
    assert command("eval", str(leaky / "run"), "--out", str(leaky / "again")) == 0
    again = json.loads((leaky / "again" / "mine" / "report.json").read_text())
    assert again["scores"] == report["scores"]
    assert again["receipt"]["contamination"]["compared_with"] == []
    assert "train.json" in again["receipt"]["contamination"]["absent"][0]
