"""`data.validation: P%` holds out whole images and videos of the training data."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_pipelines.sources import Source, read_source
from data_pipelines.splitting import read_sources, split_off
from eval.contamination import contamination_check
from eval.run import read_questions
from mmdora.core.config import DataConfig, EvaluationConfig, SourceConfig
from mmdora.core.config_files import load_config
from mmdora.core.errors import UserError
from tests.media import write_image
from tests.test_runs import command


def row(i: int, *images: str, answer: str = "red") -> dict:
    question = "<image>\n" * len(images) + f"What is number {i}?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"r{i}", "conversations": turns} | ({"image": list(images)} if images else {})


def write(path: Path, rows: list[dict]) -> SourceConfig:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(rows))
    return SourceConfig(path=str(path), format="llava")


def media(sources: list[Source]) -> set[Path]:
    return {part.path.resolve() for source in sources for sample in source for part in sample.media()}


def ids(sources: list[Source]) -> list[str]:
    return sorted(sample.id for source in sources for sample in source)


@pytest.fixture
def rows() -> list[dict]:
    """200 samples: of 40 images, some in pairs, and of texts of which half repeat."""
    drawn = random.Random(0)
    with_images = [
        row(i, *(f"{n}.png" for n in {i % 40, (i % 40) // 2 * 2 if i % 7 == 0 else i % 40})) for i in range(160)
    ]
    texts = [row(i) | {"conversations": row(i % 20)["conversations"]} for i in range(160, 200)]
    drawn.shuffle(all_rows := with_images + texts)
    return all_rows


def test_no_image_and_no_text_is_on_both_sides(rows, tmp_path):
    config = write(tmp_path / "a.json", rows)
    for seed in range(3):
        (train,), (held_out,) = split_off([read_source(config)], 0.1, seed)
        assert len(train) + len(held_out) == 200
        assert 15 <= len(held_out) <= 20
        assert not media([train]) & media([held_out])
        texts = [{s.messages[0].text for s in side if not list(s.media())} for side in (train, held_out)]
        assert not texts[0] & texts[1]


def test_the_seed_and_the_names_determine_the_split_and_the_order_of_rows_does_not(rows, tmp_path):
    def held_out(folder: str, seed: int, order: list[dict]) -> list[str]:
        return ids(split_off([read_source(write(tmp_path / folder / "x.json", order))], 0.1, seed)[1])

    first = held_out("a", 0, rows)
    assert held_out("a", 0, rows) == first
    assert held_out("elsewhere", 0, rows[::-1]) == first
    assert held_out("a", 1, rows) != first


def test_an_image_in_two_sources_and_under_two_names_is_on_one_side(tmp_path):
    for i in range(20):
        write_image(tmp_path / f"{i}.png", i)
        (tmp_path / f"link{i}.png").symlink_to(tmp_path / f"{i}.png")
    sources = [
        read_source(write(tmp_path / "a.json", [row(i, f"{i}.png") for i in range(20)])),
        read_source(write(tmp_path / "b.json", [row(i, f"./link{i}.png") for i in range(20)])),
    ]
    for seed in range(3):
        train, held_out = split_off(sources, 0.25, seed)
        assert sum(map(len, held_out)) == 10
        assert not media(train) & media(held_out)


def test_every_source_keeps_a_sample_and_rejected_rows_stay_with_the_training_data(tmp_path):
    broken = {"id": "broken", "conversations": "?"}
    sources = [
        read_source(write(tmp_path / "a.json", [row(i) for i in range(9)] + [broken])),
        read_source(write(tmp_path / "b.json", [row(100)])),
    ]
    for seed in range(5):
        train, held_out = split_off(sources, 0.5, seed)
        assert [len(source.rejected) for source in train] == [1, 0]
        assert [source.rejected for source in held_out] == [[]]
        assert (len(train[0]), len(train[1]), len(held_out[0])) == (4, 1, 5)


def test_data_that_cannot_be_split_is_an_error(tmp_path):
    config = write(tmp_path / "a.json", [row(i, "one.png") for i in range(9)])
    with pytest.raises(UserError, match=r"data\.validation: no sample of data\.train can be held out"):
        split_off([read_source(config)], 0.1, 0)
    two = write(tmp_path / "b.json", [row(i, f"{i % 3 // 2}.png") for i in range(9)])
    (train,), (held_out,) = split_off([read_source(two)], 0.1, 0)  # the smaller group, though it is larger than 10%
    assert (len(train), len(held_out)) == (6, 3)


@pytest.mark.parametrize("share", ["0%", "100%", "2", "x%", "-1%", "0.0%", "null"])
def test_a_share_is_a_percentage(share):
    with pytest.raises(UserError, match="a share over 0% and under 100%, such as 2%"):
        load_config("quickstart", [f"data.validation={share}", "training.evaluate_every=2"])


def test_errors_in_a_list_of_datasets_name_the_key(tmp_path):
    with pytest.raises(UserError, match=r"data\.validation\.0\.pth: unknown key. Did you mean 'path'.* Known: path"):
        load_config("quickstart", ["data.validation=[{path: x, pth: y}]", "training.evaluate_every=2"])
    with pytest.raises(UserError, match=r"data\.validation\.0\.take: 'take' must be first:N"):
        load_config("quickstart", ["data.validation=[{path: x, take: y}]", "training.evaluate_every=2"])


def test_the_samples_held_out_are_no_contamination(tmp_path):
    """A benchmark that asks about a held-out sample does not ask about training data."""
    config = write(tmp_path / "a.json", [row(i) for i in range(20)])
    train, held_out = read_sources(DataConfig(train=[config], validation="25%"), 0)
    entry = EvaluationConfig(name="mine", benchmark="vqa", data=config.path, format="llava")
    questions = {"mine": read_questions(entry)}
    (all_rows,) = contamination_check([config], 0, [entry], questions)().values()
    (kept,) = contamination_check([config], 0, [entry], questions, 0.25)().values()
    assert (all_rows["questions"], kept["questions"]) == (20, sum(map(len, train)))
    assert sum(map(len, held_out)) == 5


def test_a_run_holds_its_share_out_and_resumes_only_with_the_same(tmp_path, capsys):
    rows = [row(i, answer=("red", "blue")[i % 2]) for i in range(24)]
    write(tmp_path / "a.json", rows)
    settings = [
        "quickstart",
        f"data.train=[{tmp_path}/a.json]",
        "data.validation=25%",
        f"training={{output: {tmp_path}/run, max_steps: 2, batch_size: 2, micro_batch_size: 2, save_every: 1}}",
        "training.evaluate_every=2",
        "parts={language: {method: lora, rank: 2}}",
        "evaluation=[]",
    ]
    assert command("doctor", *settings) == 0
    out = capsys.readouterr().out
    assert "encoding a.json  18/18" in out
    assert "encoding a.json  6/6" in out
    assert command("train", *settings) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval"]["loss"] > 0 for line in lines if "eval" in line] == [True]
    capsys.readouterr()
    assert command("train", *settings, "data.validation=20%", "--resume") == 2
    assert "data.validation: '25%', now '20%'" in capsys.readouterr().err
    assert command("train", *settings, f"data.validation=[{tmp_path}/a.json]", "--resume") == 2
    assert command("train", *settings, "--resume") == 0
