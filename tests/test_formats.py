"""LLaVA, NLVR and shapes: what they read and reject; skipped samples are recorded and replaced."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from data_pipelines.dataset import TrainDataset
from data_pipelines.encoding import Encoder
from data_pipelines.formats import shapes
from data_pipelines.ledger import Ledger
from data_pipelines.samples import Image, Text, Video
from data_pipelines.sources import guess_format, read_source
from mmdora.core.config import SourceConfig
from mmdora.core.errors import UserError
from tests.conversations import tiny_processor
from tests.ledgers import read_ledger
from tests.media import write_image


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": "human" if i % 2 == 0 else "gpt", "value": t} for i, t in enumerate(texts)]


def read(tmp_path, rows, **options):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return read_source(SourceConfig(path=str(path), format="llava", **options))


def test_llava_media_replace_their_placeholders(tmp_path):
    rows = [
        {"id": "a", "image": "a.png", "conversations": turns("<image>\nWhat?", "red")},
        {"id": "b", "image": ["a.png", "b.png"], "conversations": turns("One <image> two <image>?", "x")},
        {"id": "c", "video": "c.mp4", "conversations": turns("<image>\nAs in LLaVA-NeXT", "x")},
        {"id": "d", "image": "a.png", "conversations": turns("No placeholder", "x")},
        {"id": "e", "conversations": [{"from": "system", "value": "Be brief."}, *turns("Text", "x")]},
    ]
    a, b, c, d, e = read(tmp_path, rows)
    png = (tmp_path / "a.png").resolve()
    assert a.messages[0].parts == (Image(png), Text("What?"))
    assert [type(p) for p in b.messages[0].parts] == [Text, Image, Text, Image, Text]
    assert [type(p) for p in c.messages[0].parts] == [Video, Text]
    assert d.messages[0].parts == (Image(png), Text("No placeholder"))
    assert [m.role for m in e.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "expected an object"),
        ({"id": "x"}, "'conversations' must be a list"),
        ({"conversations": [{"from": "human"}]}, "string 'value'"),
        ({"conversations": turns("a", "b") + turns("c")[:0] + turns("d", "e")[1:]}, "turns must alternate"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "'from' is 'bot'"),
        ({"image": "../secret.png", "conversations": turns("<image>", "b")}, "is outside the media folder"),
        ({"image": "/etc/passwd", "conversations": turns("<image>", "b")}, "is outside the media folder"),
        ({"image": "http://x/y.png", "conversations": turns("<image>", "b")}, "is a URL"),
        ({"image": 3, "conversations": turns("<image>", "b")}, "non-empty string"),
        ({"conversations": turns("<image>", "b")}, "its text has a <image> placeholder, but the row names no media"),
        ({"image": ["a", "b"], "conversations": turns("<image>", "b")}, "have no <image>"),
    ],
)
def test_invalid_llava_rows_are_rejected_with_a_reason(tmp_path, row, reason):
    good = {"id": "good", "conversations": turns("a", "b")}
    source = read(tmp_path, [row, good])
    assert [s.id for s in source] == ["good"]
    assert reason in source.rejected[0].reason
    assert source.total == 2


def test_an_unreadable_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "data.json"
    for text, message in [
        ("{", "not valid JSON"),
        ('{"a": 1}', "expected a JSON list"),
        ("[]", "no usable sample"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_source(SourceConfig(path=str(path), format="llava"))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_source(SourceConfig(path=str(path), format="llava"))
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        read_source(SourceConfig(path=str(path), format="llava"))
    with pytest.raises(UserError, match="no such data file"):
        read_source(SourceConfig(path="gone.json", format="llava"))


def test_where_selects_rows_by_their_fields(tmp_path):
    rows = [{"id": str(i), "split": i % 2, "conversations": turns("a", "b")} for i in range(6)]
    assert [s.id for s in read(tmp_path, rows, where={"split": [1]})] == ["1", "3", "5"]


def test_the_format_is_guessed_from_the_file(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"conversations": turns("a", "b")}]))
    assert guess_format(path) == "llava"
    path.write_text(json.dumps([{"question": "?"}]))
    with pytest.raises(UserError, match="cannot guess the format"):
        guess_format(path)


def test_nlvr_reads_the_official_layout(tmp_path):
    (tmp_path / "images" / "3").mkdir(parents=True)
    for k in (0, 4):
        write_image(tmp_path / "images" / "3" / f"dev-12-1-{k}.png", size=(80, 20))
    good = {"sentence": "There is a box.", "label": "True", "identifier": "12-1", "directory": "3"}
    lines = [
        good,
        good | {"identifier": "13-0"},
        good | {"label": "maybe"},
        good | {"directory": "../.."},
        [1],
    ]
    (tmp_path / "dev.json").write_text("\n".join(json.dumps(line) for line in lines))
    source = read_source(SourceConfig(path=str(tmp_path / "dev.json"), format="nlvr"))
    assert [s.id for s in source] == ["dev-12-1-0.png", "dev-12-1-4.png"]
    assert source[0].messages[1].text == "true"
    reasons = [r.reason for r in source.rejected]
    assert [
        word in reason for word, reason in zip(("none of its", "'label'", "numbers", "object"), reasons, strict=True)
    ] == [True] * 4


def test_shapes_datasets_are_reproducible_and_share_no_scene(tmp_path, monkeypatch):
    for task in ("counting", "motion"):
        monkeypatch.setitem(shapes.TASKS, task, replace(shapes.TASKS[task], held_out=40))
        path, other_path = (tmp_path / folder / f"{task}_held_out.json" for folder in ("first", "second"))
        source, other = (read_source(SourceConfig(path=str(p), format="shapes")) for p in (path, other_path))
        rows = json.loads(path.read_text())
        assert rows == json.loads(other_path.read_text())
        assert len({json.dumps(row["scene"]) for row in rows}) == len(rows) == len(source) == 40
        for row in rows:
            scene = tuple(shapes.Thing(**{**t, "to": tuple(t["to"]) if t["to"] else None}) for t in row["scene"])
            assert shapes.split_of(scene) == "held_out"
        for first, second in zip(source, other, strict=True):
            (medium,), (other_medium,) = (list(sample.media()) for sample in (first, second))
            assert medium.path.read_bytes() == other_medium.path.read_bytes()
    with pytest.raises(UserError, match="the shapes dataset has no such file"):
        read_source(SourceConfig(path=str(tmp_path / "counting_trian.json"), format="shapes"))


def test_counting_answers_are_balanced(world):
    source = read_source(SourceConfig(path=str(world / "counting_held_out.json"), format="shapes"))
    answers = [s.messages[1].text for s in source]
    assert {a: answers.count(a) for a in set(answers)} == {"1": 96, "2": 96, "3": 96, "4": 96}


def test_a_broken_sample_is_recorded_and_its_replacement_is_reproducible(tmp_path):
    write_image(tmp_path / "a.png")
    rows = [{"id": f"ok{i}", "conversations": turns(f"Question {i}?", "b")} for i in range(9)]
    rows.append({"id": "broken", "image": "gone.png", "conversations": turns("<image>", "b")})
    source = read(tmp_path, rows)
    encoder = Encoder(tiny_processor())

    def tenth(name: str):
        ledger = Ledger(tmp_path / name, source.total, max_skipped=0.5)
        return ledger, TrainDataset([source], encoder, ledger, seed=0)[9]["input_ids"].tolist()

    ledger, first = tenth("one.jsonl")
    _, second = tenth("two.jsonl")
    assert first == second
    (entry,) = read_ledger(ledger.path)
    assert (entry.id, entry.stage) == ("broken", "media")
    assert entry.reason == "no such file"
    assert entry.file.endswith("gone.png")
    assert ledger.summary().startswith("1 of 10 samples skipped: 1 × no such file (")


def test_too_many_broken_samples_stop_the_run(tmp_path):
    rows = [{"id": f"x{i}", "image": "gone.png", "conversations": turns("<image>", "b")} for i in range(5)]
    ledger = Ledger(tmp_path / "skipped.jsonl", 5, max_skipped=0.2)
    dataset = TrainDataset([read(tmp_path, rows)], Encoder(tiny_processor()), ledger, seed=0)
    with pytest.raises(UserError, match=r"more than data.max_skipped 20.0% allows.*gone\.png"):
        list(map(dataset.__getitem__, range(5)))


def test_weight_repeats_samples(tmp_path):
    rows = [{"id": str(i), "conversations": turns("a", "b")} for i in range(4)]
    ledger = Ledger(tmp_path / "skipped.jsonl", 4, 0.0)
    for weight, expected in ((1, 4), (2.5, 10), (0.5, 2)):
        assert len(TrainDataset([read(tmp_path, rows, weight=weight)], None, ledger, 0)) == expected


def test_repeated_ids_are_made_unique(tmp_path):
    rows = [
        {"id": "same", "conversations": turns("a", "b")},
        {"id": "same", "conversations": turns("c", "d")},
    ]
    source = read(tmp_path, rows)
    assert [s.id for s in source] == ["same", "same#1"]
    assert source.rejected == []
