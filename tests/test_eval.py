"""Scorers, intervals by simulation, and answers that are stored, resumed and keyed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor

from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Sample, Text, Video
from eval.benchmarks import BENCHMARKS, Question
from eval.digests import weights_digest
from eval.generation import answer_all, generate
from eval.metrics import cluster_bootstrap, majority_share, wilson
from eval.responses import Responses, question_keys
from eval.run import evaluate
from eval.scoring import make_report, score_all
from mmdora.core.config import EvaluationConfig, VideoConfig
from mmdora.core.errors import RunError, UserError
from tests.conftest import ROOT
from tests.media import write_image
from tests.scored import command, write_questions


@given(st.text())
def test_any_text_can_be_scored(text):
    sample = Sample("q", (Message("user", (Text("?"),)),), "t")
    for name in ("vqa", "nlvr"):
        score = BENCHMARKS[name]().score(text, Question("q", sample, ("true",), "c"))
        assert 0 <= score.strict <= score.official <= 1


def test_a_single_reference_is_compared_after_normalization():
    question = Question("q", Sample("q", (), "t"), ("A dog.",), "c")
    assert BENCHMARKS["vqa"]().score("the dog", question).official == 1
    assert BENCHMARKS["vqa"]().score("two dogs", question).official == 0
    empty = BENCHMARKS["vqa"]().score("  ", question)
    assert (empty.official, empty.strict, empty.unparsed) == (0, 0, True)


def test_intervals_cover_the_truth():
    """In 300 simulated studies with correlated clusters of three, about 95% of the intervals contain the true mean."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        shares = rng.beta(7, 3, 120)  # mean 0.7, one share per cluster
        values = (rng.random((120, 3)) < shares[:, None]).astype(float).ravel()
        clusters = [str(i) for i in range(120) for _ in range(3)]
        estimate = cluster_bootstrap(values.tolist(), clusters)
        covered += estimate.low <= 70 <= estimate.high
    assert 0.91 <= covered / 300 <= 0.985


def test_intervals_widen_with_clusters_and_never_vanish():
    values = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0] * 20
    together = cluster_bootstrap(values, [str(i // 3) for i in range(120)])
    apart = cluster_bootstrap(values, [str(i) for i in range(120)])
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
    perfect = cluster_bootstrap([1.0] * 50, [str(i) for i in range(50)])
    assert perfect.value == perfect.high == 100
    assert perfect.low == pytest.approx(100 * wilson(1.0, 50)[0])
    assert majority_share(["a", "b", "a", "a"]) == 0.75


def test_nlvr_official_rule(tmp_path):
    (tmp_path / "images" / "0").mkdir(parents=True)
    rows = []
    for m, label in enumerate(("true", "false")):
        rows.append({"sentence": "A box.", "label": label, "identifier": f"7-{m}", "directory": "0"})
        for k in range(2):
            write_image(tmp_path / "images" / "0" / f"dev-7-{m}-{k}.png", size=(40, 10))
    (tmp_path / "dev.json").write_text("\n".join(json.dumps(r) for r in rows))
    config = EvaluationConfig(name="n", benchmark="nlvr", data=str(tmp_path / "dev.json"))
    questions = BENCHMARKS["nlvr"]().questions(config)
    responses = dict(zip([q.id for q in questions], ["TRUE", "true", "false", "perhaps"], strict=True))
    scores = score_all("nlvr", responses, questions)
    report = make_report(config, responses, questions, scores, {})
    assert report["scores"]["official"]["value"] == 75
    assert report["unparsed_rate"] == 0.25
    assert report["metrics"]["consistency"] == 0
    assert report["metrics"]["pictures_of_official"] == "4 of 12"
    assert report["majority_baseline"] == 50
    with pytest.raises(UserError, match=r"expected layout: <split>/<split>\.json"):
        BENCHMARKS["nlvr"]().questions(config.model_copy(update={"data": str(tmp_path / "images")}))


@pytest.fixture
def questions(tmp_path) -> list[Question]:
    out = []
    texts = ["What color is the circle?", "Is there a red square?", "What shape is the blue thing?"] * 2
    for i, text in enumerate(texts):
        path = write_image(tmp_path / f"{i}.png", seed=i, size=(64, 64 if i % 2 else 128))
        sample = Sample(f"q{i}", (Message("user", (Image(path), Text(text))),), "t")
        out.append(Question(sample.id, sample, ("red",), str(path)))
    return out


def test_batches_give_the_answers_of_single_questions(tiny, questions):
    model, processor = tiny
    encoder = Encoder(processor)
    batched = {q.id: text for q, text in generate(model, encoder, questions, 4, 8)}
    single = {q.id: text for q, text in generate(model, encoder, questions, 1, 8)}
    assert batched == single
    assert set(batched) == {q.id for q in questions}


def test_only_missing_or_changed_answers_are_generated(tiny, questions, tmp_path):
    model, processor = tiny
    encoder, folder = Encoder(processor), tmp_path / "result"
    progress: list[int] = []

    def keys(max_new_tokens: int = 8) -> dict[str, str]:
        return question_keys(questions, encoder, max_new_tokens, weights_digest(model))

    def answers(max_new_tokens: int = 8) -> dict[str, str]:
        return answer_all(model, encoder, questions, keys(max_new_tokens), folder, 2, max_new_tokens, progress.append)

    first = answers()

    def generated(max_new_tokens: int = 8) -> int:
        """Run again and return how many answers were generated."""
        progress.clear()
        assert set(answers(max_new_tokens)) == set(first)
        return sum(progress[1:])  # the first number is that of stored answers

    assert generated() == 0
    lines = (folder / "responses.jsonl").read_text().splitlines()
    incomplete = "\n".join([*lines[:4], lines[4][:20]])
    (folder / "responses.jsonl").write_text(incomplete)
    assert generated() == 2
    assert Responses(folder, keys()).known == first
    assert generated(max_new_tokens=7) == len(questions)
    Path(next(iter(questions[0].sample.media())).path).write_bytes(write_image(tmp_path / "x.png", 99).read_bytes())
    assert generated(max_new_tokens=7) == 1
    model.lm_head.weight.data[0] += 1
    assert generated(max_new_tokens=7) == len(questions)


def test_a_key_changes_with_the_frames(tmp_path):
    """Keys depend on which frames of a video the model sees, and on their content."""
    processor = AutoProcessor.from_pretrained(ROOT / "assets" / "tiny-llava")
    for i in range(4):
        write_image(tmp_path / f"{i}.png", seed=i)

    def key(config: VideoConfig, video: Video) -> str:
        sample = Sample("q", (Message("user", (video, Text("What?"))),), "test")
        return question_keys([Question("q", sample, ("yes",), "q")], Encoder(processor, config), 8, "weights")["q"]

    video = Video(tmp_path)
    first = key(VideoConfig(num_frames=2), video)
    assert key(VideoConfig(num_frames=2, timeout=None), video) == first  # the timeout changes no frames
    assert key(VideoConfig(num_frames=2, start=1.0), video) != first
    assert key(VideoConfig(num_frames=2, sampling="keyframe"), video) != first
    write_image(tmp_path / "3.png", seed=9)
    assert key(VideoConfig(num_frames=2), video) != first
    shard = Path("shard.tar/a.mp4")
    assert key(VideoConfig(), Video(shard, b"one")) != key(VideoConfig(), Video(shard, b"two"))


def test_a_failed_question_means_no_report_until_it_is_repaired(tiny, questions, tmp_path):
    """The old report is removed too. After the repair, the report is that of the first run."""
    config = EvaluationConfig(name="mine", benchmark="vqa", data="mine.json", max_new_tokens=2, batch_size=4)
    folder, encoder = tmp_path / "result", Encoder(tiny[1])

    def run(overwrite: bool = False) -> dict:
        return evaluate(tiny[0], encoder, config, questions, folder, overwrite=overwrite)

    first = run()
    assert run() == first  # returned unchanged
    file = next(questions[2].sample.media()).path
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(UserError, match="other questions; --overwrite"):
        run()
    with pytest.raises(RunError, match=r"1 of 6 questions could not be answered, such as 'q2'"):
        run(overwrite=True)
    assert not (folder / "report.json").exists()
    assert [json.loads(line)["id"] for line in (folder / "failed.jsonl").open()] == ["q2"]
    file.write_bytes(whole)
    assert run() == first
    assert not (folder / "failed.jsonl").exists()


class Unscored(BENCHMARKS["vqa"]):
    """A test split without public answers."""

    def questions(self, config: EvaluationConfig) -> list[Question]:
        return [replace(q, references=()) for q in super().questions(config)]


@pytest.fixture
def unscored(monkeypatch) -> str:
    monkeypatch.setitem(BENCHMARKS._entries, "unscored", Unscored)
    return "unscored"


def test_a_split_without_public_answers_is_evaluated_but_not_during_training(unscored, tmp_path, capsys):
    file = write_questions(tmp_path / "data", 3)
    options = ["--benchmark", unscored, "--data", str(file), "--limit", "2"]
    assert command("eval", "assets/tiny-llava", *options, "--out", str(tmp_path)) == 0
    report = json.loads((tmp_path / unscored / "report.json").read_text())
    assert (report["n"], report["scores"]) == (2, {"official": None, "strict": None})
    settings = [
        f"data.train=[{{path: {file}}}]",
        f"evaluation=[{{name: unscored, benchmark: {unscored}, data: {file}, limit: 2, during: true}}]",
        f"training.output={tmp_path / 'run'}",
        "training.evaluate_every=2",
        "model.path=nobody/nothing",
    ]
    assert command("train", "quickstart", *settings) == 2
    assert "evaluation.0.during: the answers to unscored's questions" in capsys.readouterr().err
