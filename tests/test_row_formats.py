"""The formats beyond LLaVA's: what each reads, what it refuses and which key it names."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from data_pipelines.dataset import guess_format, read_source
from data_pipelines.formats import registry
from data_pipelines.samples import Image, SampleError, Text, Video
from eval.benchmarks.vqa import VQA
from mmdora.core.config import EvaluationConfig, SourceConfig
from mmdora.core.errors import UserError
from tests.media import write_image

ASK = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "a"}]


def read(tmp_path, form: str, *rows, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert "format" in options or guess_format(path) == form
    return read_source(SourceConfig(path=str(path), **({"format": form} | options)))


def said(sample) -> list[tuple[str, str]]:
    return [(m.role, m.text) for m in sample.messages]


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def test_messages_have_parts_of_every_kind(tmp_path):
    parts = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "input_text", "text": "and"},
        {"type": "video", "video": "b.mp4"},
        {"type": "input_image", "image_url": "c.png"},
    ]
    (sample,) = read(tmp_path, "messages", {"messages": [user(parts), assistant([{"type": "text", "text": "x"}])]})
    a, b, c = (tmp_path / name for name in ("a.png", "b.mp4", "c.png"))
    assert sample.messages[0].parts == (Image(a), Text("and"), Video(b), Image(c))
    (bare,) = read(tmp_path, "messages", [{"role": "developer", "content": "Be brief."}, user("Hm?"), assistant("a")])
    assert [m.role for m in bare.messages] == ["system", "user", "assistant"]


def test_messages_take_media_from_beside(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image", "index": 0, "text": None}]
    row = {"images": ["a.png", "b.png"], "messages": [user([parts[1], {"type": "image", "index": 1}, parts[0]])]}
    row["messages"].append(assistant("x"))
    (sample,) = read(tmp_path, "messages", row)
    assert [part.path.name for part in sample.media()] == ["b.png", "a.png"]
    marked = {"images": ["a.png"], "messages": [user("See <image> here"), assistant("x")]}
    (sample,) = read(tmp_path, "messages", marked)
    assert sample.messages[0].parts == (Text("See"), Image(tmp_path / "a.png"), Text("here"))


def test_a_turn_of_train_false_is_only_read(tmp_path):
    turns = [user("One?"), assistant("a", train=False), user("Two?"), assistant("b")]
    (sample,) = read(tmp_path, "messages", {"messages": turns})
    assert [m.train for m in sample.messages] == [True, False, True, True]
    turns = [{**turn, "train": False} if turn["from"] == "gpt" else turn for turn in ASK] + ASK
    (sample,) = read(tmp_path, "llava", {"conversations": turns})
    assert [m.train for m in sample.messages] == [True, False, True, True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "turn 0: 'role' is 'bot'"),
        ({"messages": [user(3)]}, "turn 0: 'content' must be a string or a list of parts, found 3"),
        ({"messages": [user([{"type": "audio"}])]}, "turn 0, part 0: 'type' is 'audio'"),
        ({"messages": [user([{"type": "image"}]), assistant("x")]}, "turn 0, part 0: names no file"),
        ({"messages": [user([{"type": "text"}])]}, "turn 0, part 0: 'text' must be a string"),
        ({"messages": [user("a"), user("b"), assistant("c")]}, "turn 1 is the user's; turns must alternate"),
        ({"messages": [user("a"), assistant(" ")]}, "turn 1: the assistant's answer is empty"),
        ({"messages": [user("a"), assistant("b", train="no")]}, "turn 1: 'train' must be true or false"),
        ({"messages": [user("a"), assistant("b", train=False)]}, "no answer to learn"),
        ({"messages": [user("a"), assistant("b", weight=0)]}, "no answer to learn"),
        ({"messages": [user("a"), assistant("b", weight=0.5)]}, "turn 1: 'weight' must be 0 or 1, found 0.5"),
        ({"img": "a.png", "messages": [user("a"), assistant("b")]}, "has 'img', which is not read"),
        ({"messages": [user("a"), assistant("b", tool_calls=[{}])]}, "'tool_calls' cannot be trained"),
        ({"messages": [user("a"), assistant("\ud800")]}, "turn 1 holds half of a surrogate pair"),
        ({"id": [1], "messages": [user("a"), assistant("b")]}, "'id' must be a string or a number"),
    ],
)
def test_messages_that_are_no_samples_are_rejected_with_the_key(tmp_path, row, reason):
    good = {"id": "good", "messages": [user("a"), assistant("b")]}
    source = read(tmp_path, "messages", row, good, format="messages")
    assert [s.id for s in source] == ["good"]
    assert reason in source.rejected[0].reason


def test_sharegpt(tmp_path):
    turns = [{"from": "human", "value": "<image>Hm? <video>"}, {"from": "chatgpt", "value": "a"}]
    call = [{"from": "human", "value": "Hm?"}, {"from": "function_call", "value": "{}"}]
    source = read(
        tmp_path,
        "sharegpt",
        {"system": "Be brief.", "images": ["a.png"], "videos": ["b.mp4"], "conversations": turns},
        {"tools": "[]", "conversations": call},
    )
    (sample,) = source
    assert sample.messages[0].text == "Be brief."
    assert [type(part) for part in sample.messages[1].parts] == [Image, Text, Video]
    assert "turn 1: 'from' is 'function_call'; tool calls cannot be trained" in source.rejected[0].reason


def test_alpaca(tmp_path):
    history = [["a?", "b"], ["c?", "d"]]
    source = read(
        tmp_path,
        "alpaca",
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "answer": "three"},
        {"instruction": "Go on.", "output": "e", "history": history, "system": "Be brief."},
        {"instruction": "Color?", "output": "red", "image": "a.png"},
        {"instruction": "Add.", "input": 3, "output": "3"},
        {"instruction": "Add.", "output": ""},
        {"instruction": "Add.", "output": "3", "history": [["a"]]},
    )
    first, second, third = source
    assert said(first) == [("user", "Add.\n1 and 2"), ("assistant", "3")]
    assert [m.text for m in second.messages] == ["Be brief.", "a?", "b", "c?", "d", "Go on.", "e"]
    assert third.messages[0].parts == (Image(tmp_path / "a.png"), Text("Color?"))
    reasons = [row.reason for row in source.rejected]
    assert [w in r for w, r in zip(("'input'", "answer is empty", "'history'"), reasons, strict=True)] == [True] * 3


def test_vqa_learns_the_commonest_answer_and_is_scored_against_all(tmp_path):
    ten = [{"answer": a, "answer_id": i} for i, a in enumerate(["blue"] * 2 + ["red"] * 7 + ["pink"])]
    rows = [
        {"question_id": 5, "question": "Color?", "answers": ten, "image": "a.png"},
        {"question_id": 6, "question": "Color?", "answer": "red"},
    ]
    sample, single = read(tmp_path, "vqa", *rows)
    assert (sample.id, sample.messages[1].text, len(sample.answers)) == ("5", "red", 10)
    assert single.answers == ()
    benchmark = VQA()
    asked, _ = benchmark.questions(EvaluationConfig(name="x", benchmark="vqa", data=str(tmp_path / "data.jsonl")))
    assert len(asked.references) == 10
    assert benchmark.score("red", asked).official == 1
    assert 0 < benchmark.score("blue", asked).official < 1


def test_vqa_tables(tmp_path):
    text = 'id;question;answer;image\n1;"Hm,\nreally?";"say ""a"";";a.png\n2;one\n3;b?;;a.png\n4;ünd?;ß;a.png\n'
    for name, mark in (("t.csv", ","), ("t.tsv", "\t")):
        (tmp_path / name).write_text("\ufeff" + text.replace(";", mark), encoding="utf-8")
        source = read_source(SourceConfig(path=str(tmp_path / name)))
        assert [s.id for s in source] == ["1", "4"]
        assert said(source[0]) == [("user", "Hm,\nreally?"), ("assistant", f'say "a"{mark}')]
        assert said(source[1])[1] == ("assistant", "ß")
        assert "has 2 fields, and the first line names 4" in source.rejected[0].reason
        assert "'answer' must be a string" in source.rejected[1].reason
    (tmp_path / "t.csv").write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match="two columns are named 'a'"):
        read_source(SourceConfig(path=str(tmp_path / "t.csv"), format="vqa"))


def test_captions(tmp_path):
    source = read(
        tmp_path,
        "caption",
        {"image": "a.png", "captions": ["one", "two"]},
        {"video": "a.mp4", "caption": "one"},
        {"image": ["a.png", "b.png"], "caption": "one", "prompt": "Compare <image> with <image>."},
        {"caption": "one"},
        {"image": "a.png", "captions": []},
    )
    assert [s.messages[0].text for s in source] == ["Describe the image.", "Describe the video.", "Comparewith."]
    assert [type(part) for part in source[2].messages[0].parts] == [Text, Image, Text, Image, Text]
    assert source[0].answers == ("one", "two")
    assert ["needs an 'image'" in r.reason or "'captions' must" in r.reason for r in source.rejected] == [True, True]


def test_hugging_face_tables_hold_their_media(tmp_path):
    png = write_image(tmp_path / "a.png").read_bytes()
    chat = [user([{"type": "image"}, {"type": "text", "text": "Hm?"}]), assistant([{"type": "text", "text": "a"}])]
    files = [{"bytes": png, "path": "a.png"}, {"bytes": None, "path": str(tmp_path / "a.png")}]
    rows = [{"id": f"{i}", "images": [files[i % 2]], "messages": chat} for i in range(5)]
    saved = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    saved.to_parquet(tmp_path / "t-0.parquet")
    saved.to_parquet(tmp_path / "t-1.parquet")
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"a cache of the library's")
    for path, expected in (("saved", 5), ("t-*.parquet", 10), ("t-{0,1}.parquet", 10)):
        source = read_source(SourceConfig(path=str(tmp_path / path), media=str(tmp_path)))
        assert len(source) == expected
        assert source.rejected == []
        for sample in source:
            (image,) = sample.media()
            assert image.data == png or image == Image(tmp_path / "a.png")
        assert next(source[0].media()).data == png
        assert len({s.id for s in source}) == expected
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match="holds the splits test, train; give one"):
        read_source(SourceConfig(path=str(tmp_path / "both")))


def test_a_table_of_no_form_says_its_columns(tmp_path):
    from pyarrow import parquet

    parquet.write_table(pa.table({"x": [1], "y": [2]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="its keys are those of no format: 'x', 'y'"):
        read_source(SourceConfig(path=str(tmp_path / "t.parquet")))


def write_shard(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


def test_shards_are_read_where_they_lie(tmp_path):
    answer = json.dumps({"question": "Hm?", "answer": "a", "image": "elsewhere/1.jpg"}).encode()
    chat = json.dumps([user([{"type": "image"}, {"type": "text", "text": "Hm?"}]), assistant("a")]).encode()
    long = "x" * 150
    for number in range(2):
        write_shard(
            tmp_path / f"s-{number}.tar",
            {
                "a/0.png": b"png 0",
                "a/0.json": answer,
                "a/1.mp4": b"mp4",
                "a/1.txt": b"A clip.",
                "a/1.cls": b"7",
                f"{long}.json": chat,
                f"{long}.left.png": f"left {number}".encode(),
                "a/3.json": b"{",
                "a/4.png": b"alone",
            },
        )
    for path in ("s-{0..1}.tar", ".", "s-*.tar"):
        source = read_source(SourceConfig(path=str(tmp_path / path)))
        assert len(source) == 6
        first, clip, chatted = source[:3]
        assert first.id == "s-0.tar/a/0"
        assert first.messages[0].parts == (Image(Path("s-0.tar/a/0.png"), b"png 0"), Text("Hm?"))
        assert (next(clip.media()).data, clip.category, said(clip)[1]) == (b"mp4", "7", ("assistant", "A clip."))
        assert next(chatted.media()).data == b"left 0"
        assert next(source[5].media()).data == b"left 1"
        assert [row.id for row in source.rejected] == [f"s-{n}.tar/a/{k}" for n in range(2) for k in (3, 4)]
    with pytest.raises(UserError, match=r"s-2\.tar: no such data file"):
        read_source(SourceConfig(path=str(tmp_path / "s-{0..2}.tar")))


def test_of_a_damaged_shard_the_rest_is_read(tmp_path):
    answer = json.dumps({"question": "Hm?", "answer": "a"}).encode()
    members = {f"{i}.{suffix}": data for i in range(5) for suffix, data in (("json", answer), ("png", b"png"))}
    write_shard(tmp_path / "s.tar", members)
    data = bytearray((tmp_path / "s.tar").read_bytes())
    data[2048 * 2 + 100 : 2048 * 2 + 140] = b"\xff" * 40  # the header of 2.json
    (tmp_path / "s.tar").write_bytes(data[: 2048 * 4 + 512 + 30])  # and the last one ends in its text
    source = read_source(SourceConfig(path=str(tmp_path / "s.tar")))
    assert [s.id for s in source] == ["s.tar/0", "s.tar/1", "s.tar/3"]
    reasons = {row.id: row.reason for row in source.rejected}
    assert "the shard is damaged there" in reasons[f"s.tar/bytes {4096} to {5120}"]
    assert "is cut off by the shard's end" in reasons["s.tar/4"]


def test_links_that_leave_the_root_are_refused_when_their_file_is_wanted(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    write_image(tmp_path / "secret.png")
    write_image(root / "a.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "inner.png").symlink_to(root / "a.png")
    names = ("link.png", "folder/secret.png", "inner.png", "a.png")
    source = read(root, "caption", *[{"id": name, "image": name, "caption": "x"} for name in names])
    for at in (0, 1):
        with pytest.raises(SampleError, match="is a link that leaves the media folder"):
            source[at]
    assert [source[at].id for at in (2, 3)] == ["inner.png", "a.png"]


def test_llava_rows_may_have_a_system_beside_and_sharegpt_roles(tmp_path):
    path = tmp_path / "data.json"
    bing = [{"from": "user", "value": "Hm?"}, {"from": "bing", "value": "b"}]
    path.write_text(json.dumps([{"conversations": ASK}, {"system": "Be brief.", "conversations": bing}]))
    assert guess_format(path) == "llava"
    _, sample = read_source(SourceConfig(path=str(path)))
    assert said(sample) == [("system", "Be brief."), ("user", "Hm?"), ("assistant", "b")]


def test_null_says_nothing_of_whether_a_turn_is_learnt(tmp_path):
    turns = [turn | {"train": None, "weight": None} for turn in ASK]
    (sample,) = read(tmp_path, "llava", {"conversations": turns, "system": None}, format="llava")
    assert sample.messages[1].train
    chat = [user("One?"), assistant("a", weight=0), user("Two?"), assistant("b", weight=1, train=None)]
    (sample,) = read(tmp_path, "messages", {"messages": chat})
    assert [m.train for m in sample.messages] == [True, False, True, True]


@pytest.mark.parametrize(
    ("key", "right"),
    [
        (key, "image")
        for key in ("image_path", "image_file", "imagePath", "img", "Image", "picture", "images_left", "image1")
    ]
    + [("video_path", "video"), ("videos_list", "video")],
)
def test_media_under_another_key_are_told_and_not_left_out(tmp_path, key, right):
    qa = {"question": "Hm?", "answer": "a"}
    rows = (qa | {key: "a.png"}, qa | {key: "a.png", "image": "a.png"}, qa | {key: None}, qa | {"imagery": "x"})
    source = read(tmp_path, "vqa", *rows)
    assert len(source) == 3
    assert source.rejected[0].reason.startswith(f"has {key!r}, which is not read, and no {right!r}; rename it to")


def test_image_ids_alone_are_told(tmp_path):
    qa = {"question": "Hm?", "multiple_choice_answer": "a", "image_id": 42}
    parts = [user([{"type": "image", "image": "a.png"}]), assistant("a")]
    source = read(tmp_path, "vqa", qa, qa | {"image": "a.png"})
    assert (len(source), "has 'image_id'" in source.rejected[0].reason) == (1, True)
    assert len(read(tmp_path, "messages", {"image_id": 42, "messages": parts})) == 1


def test_a_placeholder_in_a_row_without_media_is_told(tmp_path):
    turns = [{"from": "human", "value": "See <video>"}, ASK[1]]
    source = read(tmp_path, "llava", {"conversations": turns}, {"conversations": ASK})
    assert source.rejected[0].reason.startswith("the row names no media, and its text holds a <video> placeholder")


@pytest.mark.parametrize(
    "cell", ["['red', 'red', \"it's\"]", '["red", "red", "it\'s"]', " [{'answer': 'red'}, 'red', \"it's\"]"]
)
def test_a_table_may_write_its_answers_as_a_list(tmp_path, cell):
    (tmp_path / "t.tsv").write_text("question\tanswers\nHm?\t" + '"' + cell.replace('"', '""') + '"')
    (sample,) = read_source(SourceConfig(path=str(tmp_path / "t.tsv")))
    assert (said(sample)[1], sample.answers) == (("assistant", "red"), ("red", "red", "it's"))


def test_answers_that_are_no_list_or_no_text(tmp_path):
    wrong = ("[red, red]", "['a' 'b']", "[" * 5000, "[{[]: 1}]", True, 0.5, [None], [])
    rows = [{"question": "Hm?", "answers": value} for value in (2, 2.0, [3, "3", 4], "[1, 1]", *wrong)]
    source = read(tmp_path, "vqa", *rows, {"question": "Where?", "answer": "[0.1, 0.2]"})
    assert [said(sample)[1][1] for sample in source] == ["2", "2", "3", "1", "[0.1, 0.2]"]
    assert len(source.rejected) == len(wrong)
    assert all("'answers'" in row.reason and len(row.reason) < 300 for row in source.rejected)
    (sample,) = read(tmp_path, "vqa", {"question": "Hm?", "answers": ["a"], "multiple_choice_answer": 2})
    assert said(sample)[1][1] == "2"


def test_data_urls_hold_their_picture(tmp_path):
    png = write_image(tmp_path / "a.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"

    def asked(url):
        return {"messages": [user([{"type": "image_url", "image_url": {"url": url}}]), assistant("a")]}

    wrong = ("data:image/png;base64,%%%", "data:image/png,abc", "data:image/png;base64,", "x" * 5000, "é" * 2100)
    source = read(tmp_path, "messages", asked(url), *map(asked, wrong), asked("data:image/png;base64," + "é" * 500))
    assert [part.data for part in source[0].media()] == [png]
    told = ("cannot be read", "must be", "must be", "path of 5,000 bytes", "path of 4,200 bytes", "cannot be read")
    reasons = [row.reason for row in source.rejected]
    assert [w in r for w, r in zip(told, reasons, strict=True)] == [True] * 6
    assert max(map(len, reasons)) < 300


def test_a_data_url_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "MAX_ROW", 100)
    source = read(tmp_path, "caption", {"image": "data:," + "x" * 100, "caption": "x"}, {"image": "a", "caption": "x"})
    assert "a data URL of" in source.rejected[0].reason


def test_absolute_paths_by_way_of_a_linked_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "out").symlink_to(tmp_path)
    write_image(tmp_path / "real" / "a.png")
    write_image(tmp_path / "secret.png")
    names = [f"{tmp_path}/{name}" for name in ("linked/a.png", "real/a.png", "secret.png", "linked/out/secret.png")]
    source = read(tmp_path / "linked", "caption", *[{"image": name, "caption": "x"} for name in names])
    assert [next(s.media()).path.name for s in source] == ["a.png", "a.png"]
    assert ["leaves the media folder" in row.reason for row in source.rejected] == [True, True]


@pytest.mark.parametrize("wanted", [True, "true", "True"])
def test_where_keeps_booleans(tmp_path, wanted):
    rows = [{"id": str(v), "is_train": v, "conversations": ASK} for v in (True, "true", "True", False, 1, None)]
    source = read(tmp_path, "llava", *rows, where={"is_train": [wanted]})
    assert [s.id for s in source] == ["True", "true", "True#2"]
    config = EvaluationConfig(name="x", benchmark="vqa", data="x", where={"a": [True, 1, "1"]})
    assert [type(v) for v in config.where["a"]] == [bool, int, str]


def test_a_table_may_hold_pictures(tmp_path):
    url = f"data:image/png;base64,{base64.b64encode(b'x' * 300_000).decode()}"
    (tmp_path / "t.tsv").write_text(f"image\tcaption\n{url}\tx")
    (sample,) = read_source(SourceConfig(path=str(tmp_path / "t.tsv")))
    assert next(sample.media()).data == b"x" * 300_000


def test_where_no_row_can_be_read_the_first_says_why(tmp_path):
    (tmp_path / "t.csv").write_text("question,answer\n1,2,3\n4\n")
    with pytest.raises(UserError, match="none of its first 2 rows can be read; the first: has 3 fields, and"):
        guess_format(tmp_path / "t.csv")
