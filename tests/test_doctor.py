"""`mmdora doctor` reports data, template and batch problems before training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data_pipelines.dataset import read_source
from data_pipelines.encoding import Encoder
from data_pipelines.inspection import count_duplicates, decode_pieces
from data_pipelines.samples import Image, Message, Sample, Text
from mmdora.core.config import SourceConfig
from tests.ledgers import read_ledger
from tests.media import write_image
from tests.test_runs import command

MESSY = {"ok": 16, "gone": 2, "torn": 1, "empty": 1}  # samples of each kind


@pytest.fixture
def messy(tmp_path) -> Path:
    """LLaVA JSON with typical faults: missing, truncated and outside files, and a repeated sample."""
    rows = []
    for i in range(MESSY["ok"]):
        write_image(tmp_path / f"{i}.png", seed=i) if i else write_image(tmp_path / "0.png")
        rows.append(row(f"ok{i}", f"{i}.png", "<image>\nWhat is it?", "a thing"))
    rows.append(rows[0] | {"id": "again"})
    rows += [row(f"gone{i}", f"gone{i}.png", "<image>\nWhat?", "a thing") for i in range(MESSY["gone"])]
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    rows.append(row("torn", "torn.png", "<image>\nWhat?", "a thing"))
    rows.append(row("out", "../out.png", "<image>\nWhat?", "a thing"))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    held_out = [row("h", "copy.png", "<image>\nWhat is it?", "a thing"), row("t", None, "What?", "a thing")]
    (tmp_path / "copy.png").write_bytes((tmp_path / "3.png").read_bytes())
    (tmp_path / "held_out.json").write_text(json.dumps(held_out))
    return tmp_path


def row(name: str, image: str | None, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {})


def config(folder: Path, *more: str) -> list[str]:
    return [
        "quickstart",
        f"data.train=[{folder}/data.json]",
        f"evaluation=[{{name: mine, benchmark: vqa, data: {folder}/held_out.json}}]",
        f"training.output={folder}/run",
        *more,
    ]


def test_problems_name_the_setting_to_change(messy, capsys):
    assert command("doctor", *config(messy), "--html", str(messy / "page.html")) == 1
    out = capsys.readouterr().out
    assert "over data.max_skipped 1.0%  [data.max_skipped]" in out
    assert "1 of 21 rows skipped: '../out.png' is outside the media folder" in out
    assert "2 of 20 encoded samples skipped: no such file" in out
    assert "torn.png, at stage 'media'" in out
    assert "1 of 20 samples repeat an earlier one" in out
    assert f"mine: 1 of its 1 files are training data too, such as {messy}/copy.png ({messy}/3.png)" in out
    assert "[<image> × " in out
    page = (messy / "page.html").read_text()
    assert "a thing" in page
    assert "data.max_skipped" in page


def test_validation_data_is_encoded_and_compared_with_training_data(messy, world, capsys):
    """Skipped samples, frames, and overlap with the training data are reported."""
    lost = row("lost", "nowhere.png", "<image>\nWhat?", "a thing")
    (messy / "watched.json").write_text(json.dumps([*json.loads((messy / "held_out.json").read_text()), lost]))
    sources = f"[{{path: {messy}/watched.json}}, {{path: {world}/motion_held_out.json, format: shapes}}]"
    overrides = config(messy, f"data.validation={sources}", "training.evaluate_every=50")
    assert command("doctor", *overrides, "--samples", "8") == 1
    out = capsys.readouterr().out
    assert "watched.json: 1 of 3 encoded samples skipped: no such file" in out
    assert f"watched.json: 1 of its 2 files are training data too, such as {messy}/copy.png" in out
    assert "[data.validation.0]" in out
    table = out[out.index("encoded samples") :]
    assert re.search(r"8 of 256 +0 +8 +2, ≤ 2 ", table)  # images, videos, frames


def test_training_skips_the_samples_that_doctor_reported(messy, capsys):
    assert command("doctor", *config(messy, "data.max_skipped=0.5")) == 0
    assert "[data.train]" in capsys.readouterr().out
    more = ("data.max_skipped=0.5", "training.max_steps=6", "training.batch_size=8", "training.micro_batch_size=8")
    assert command("train", *config(messy, *more), "evaluation=[]") == 0
    lost = {entry.id: entry.stage for entry in read_ledger(messy / "run" / "skipped.jsonl")}
    assert lost == {"gone0": "media", "gone1": "media", "torn": "media", "out": "parse"}


def test_a_template_that_never_ends_an_answer_is_an_error(messy, capsys):
    template = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    template += "{% else %}<{{ p.type }}>{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: "
    (messy / "endless.jinja").write_text(template + "{% endif %}")
    overrides = config(messy, "data.max_skipped=1.0", f"model.chat_template={messy}/endless.jinja")
    assert command("doctor", *overrides) == 1
    out = capsys.readouterr().out
    assert "ends an answer without a token that stops generation" in out
    assert "[model.chat_template]" in out


def test_data_without_problems(world, capsys):
    overrides = [f"data.train=[{{path: {world}/counting_train.json, format: shapes}}]", "evaluation=[]"]
    assert command("doctor", "quickstart", *overrides, "data.max_length=200", "--samples", "5") == 0
    out = capsys.readouterr().out
    assert "No problems found." in out
    assert "97, ≤ 97" in out


def test_batches_that_training_rejects_are_errors(messy, capsys):
    budget = ("data.max_skipped=1.0", "data.max_length=200", "data.max_tokens=200", "training.batch_size=16")
    assert command("doctor", *config(messy, *budget)) == 1
    told = capsys.readouterr().out
    assert "error: data.max_tokens 200: the 16 samples of a step need" in told
    assert command("train", *config(messy, *budget)) == 2
    assert "data.max_tokens 200: the 16 samples of a step need" in capsys.readouterr().err
    assert not (messy / "run" / "eval").exists()  # reported before the base model was evaluated


def test_a_vision_encoder_is_not_trained_on_text_alone(tmp_path, capsys):
    (tmp_path / "data.json").write_text(json.dumps([row(str(i), None, "What?", "a thing") for i in range(16)]))
    assert command("doctor", *config(tmp_path, "evaluation=[]")) == 1
    assert "error: parts.vision: no sample of data.train has an image or a video" in capsys.readouterr().out
    assert command("train", *config(tmp_path, "evaluation=[]")) == 2
    assert "parts.vision: no sample of data.train has an image or a video" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    parts = "parts={language: {method: dora, rank: 4}, vision: {method: frozen}}"
    assert command("train", *config(tmp_path, "evaluation=[]", parts, "training.max_steps=1")) == 0


def test_too_many_invalid_rows_stop_a_run_before_the_model_is_loaded(messy, capsys):
    assert command("train", *config(messy, "data.max_skipped=0.01", "model.path=nobody/nothing")) == 2
    assert "1 of 21 samples skipped, more than data.max_skipped" in capsys.readouterr().err


def test_brackets_in_file_names_are_printed_as_they_are(messy, capsys):
    rows = [row(str(i), None, f"Question {i}?", "b") for i in range(8)]
    rows += [row(f"b{i}", "missing[/b].png", "<image> What?", "b") for i in range(2)]
    (messy / "data[train].json").write_text(json.dumps(rows))
    overrides = config(messy, "data.max_skipped=1.0", "training.max_steps=2")
    overrides[1] = f"data.train=[{{path: '{messy}/data[train].json'}}]"
    assert command("doctor", *overrides) == 0
    assert "data[train].json" in capsys.readouterr().out
    assert command("train", *overrides, "evaluation=[]", "training.batch_size=8", "training.micro_batch_size=8") == 0
    assert "missing[/b].png" in capsys.readouterr().out


def test_an_error_in_a_worker_is_one_line(messy, capsys):
    workers = ("data.max_skipped=0.06", "data.num_workers=1", "evaluation=[]", "training.max_steps=9")
    assert command("train", *config(messy, *workers)) == 2
    told = capsys.readouterr().err
    assert "more than data.max_skipped 6.0% allows" in told
    assert "Traceback" not in told


def test_no_weights_are_read(messy, tmp_path, capsys):
    """The doctor works beside a model of which only the configs and the processor were fetched."""
    base = Path(__file__).parent.parent / "assets" / "tiny-llava"
    lean = tmp_path / "lean"
    lean.mkdir()
    for file in base.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".py", ".md"):
            (lean / file.name).write_bytes(file.read_bytes())
    assert command("doctor", *config(messy, f"model.path={lean}", "data.max_skipped=1.0")) == 0
    assert "[<image> × " in capsys.readouterr().out


def test_bad_input_exits_with_2(messy, capsys):
    assert command("doctor", *config(messy, "data.train.0.path=nowhere.json")) == 2
    assert "'0' is a value" in capsys.readouterr().err
    assert command("doctor", *config(messy, "data.train=[nowhere.json]")) == 2
    assert "data.train.0.path: no such file 'nowhere.json'" in capsys.readouterr().err


def test_supervised_text_is_marked(tiny, tmp_path):
    picture = Image(write_image(tmp_path / "a.png"))
    sample = Sample("s", (Message("user", (picture, Text("What?"))), Message("assistant", (Text("red"),))), "t")
    encoder = Encoder(tiny[1])
    pieces = decode_pieces(encoder, encoder.encode(sample))
    assert [text for text, supervised in pieces if supervised] == [" red</s>"]
    assert any(text.startswith("[<image> × ") for text, _ in pieces)


def test_repeats_have_the_same_text_and_files(messy):
    source = read_source(SourceConfig(path=str(messy / "data.json")))
    assert count_duplicates(source) == 1


def test_repeats_of_embedded_images_are_found_by_content():
    def sample(row: int, data: bytes) -> Sample:
        parts = Image(Path(f"x.parquet/{row}/image"), data), Text("What?")
        return Sample(f"{row}", (Message("user", parts), Message("assistant", (Text("red"),))), "x.parquet")

    assert count_duplicates([sample(0, b"a"), sample(1, b"b"), sample(2, b"a")]) == 1
