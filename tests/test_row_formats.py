"""The formats other than LLaVA: what each reads and rejects, and the key that its errors name."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from data_pipelines.formats import registry
from data_pipelines.samples import Image, SampleError, Text, Video
from data_pipelines.sources import guess_format, read_source
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


def texts(sample) -> list[tuple[str, str]]:
    """Return the role and text of each turn."""
    return [(m.role, m.text) for m in sample.messages]


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def test_messages_may_have_parts_of_every_type(tmp_path):
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


def test_messages_take_media_from_the_lists_of_the_row(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image", "index": 0, "text": None}]
    row = {"images": ["a.png", "b.png"], "messages": [user([parts[1], {"type": "image", "index": 1}, parts[0]])]}
    row["messages"].append(assistant("x"))
    (sample,) = read(tmp_path, "messages", row)
    assert [part.path.name for part in sample.media()] == ["b.png", "a.png"]
    marked = {"images": ["a.png"], "messages": [user("See <image> here"), assistant("x")]}
    (sample,) = read(tmp_path, "messages", marked)
    assert sample.messages[0].parts == (Text("See"), Image(tmp_path / "a.png"), Text("here"))


def test_a_turn_with_train_false_is_not_trained(tmp_path):
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
        ({"messages": [user(3)]}, "turn 0: 'content' must be a string or a list of parts, not 3"),
        ({"messages": [user([{"type": "audio"}])]}, "turn 0, part 0: 'type' is 'audio'"),
        ({"messages": [user([{"type": "image"}]), assistant("x")]}, "turn 0, part 0: names no file"),
        ({"messages": [user([{"type": "text"}])]}, "turn 0, part 0: 'text' must be a string"),
        ({"messages": [user("a"), user("b"), assistant("c")]}, "turn 1 is from the user; turns must alternate"),
        ({"messages": [user("a"), assistant(" ")]}, "turn 1: the assistant's answer is empty"),
        ({"messages": [user("a"), assistant("b", train="no")]}, "turn 1: 'train' must be true or false"),
        ({"messages": [user("a"), assistant("b", train=False)]}, "no answer to train on"),
        ({"messages": [user("a"), assistant("b", weight=0)]}, "no answer to train on"),
        ({"messages": [user("a"), assistant("b", weight=0.5)]}, "turn 1: 'weight' must be 0 or 1, not 0.5"),
        ({"img": "a.png", "messages": [user("a"), assistant("b")]}, "the key 'img' is not read"),
        ({"messages": [user("a"), assistant("b", tool_calls=[{}])]}, "'tool_calls' are not supported"),
        ({"messages": [user("a"), assistant("\ud800")]}, "turn 1 has an incomplete surrogate pair"),
        ({"id": [1], "messages": [user("a"), assistant("b")]}, "'id' must be a string or a number"),
    ],
)
def test_invalid_messages_are_rejected_with_the_key_at_fault(tmp_path, row, reason):
    good = {"id": "good", "messages": [user("a"), assistant("b")]}
    source = read(tmp_path, "messages", row, good, format="messages")
    assert [s.id for s in source] == ["good"]
    assert reason in source.rejected[0].reason


def test_sharegpt_rows(tmp_path):
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
    assert "turn 1: 'from' is 'function_call'; tool calls are not supported" in source.rejected[0].reason


def test_alpaca_rows(tmp_path):
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
    assert texts(first) == [("user", "Add.\n1 and 2"), ("assistant", "3")]
    assert [m.text for m in second.messages] == ["Be brief.", "a?", "b", "c?", "d", "Go on.", "e"]
    assert third.messages[0].parts == (Image(tmp_path / "a.png"), Text("Color?"))
    reasons = [row.reason for row in source.rejected]
    expected = ("'input'", "answer is empty", "'history'")
    assert [e in reason for e, reason in zip(expected, reasons, strict=True)] == [True] * 3


def test_vqa_trains_on_the_most_common_answer_and_scores_against_all(tmp_path):
    ten = [{"answer": a, "answer_id": i} for i, a in enumerate(["blue"] * 2 + ["red"] * 7 + ["pink"])]
    rows = [
        {"question_id": 5, "question": "Color?", "answers": ten, "image": "a.png"},
        {"question_id": 6, "question": "Color?", "answer": "red"},
    ]
    sample, single = read(tmp_path, "vqa", *rows)
    assert (sample.id, sample.messages[1].text, len(sample.answers)) == ("5", "red", 10)
    assert single.answers == ()
    benchmark = VQA()
    question, _ = benchmark.questions(EvaluationConfig(name="x", benchmark="vqa", data=str(tmp_path / "data.jsonl")))
    assert len(question.references) == 10
    assert benchmark.score("red", question).official == 1
    assert 0 < benchmark.score("blue", question).official < 1


def test_vqa_rows_in_csv_and_tsv(tmp_path):
    text = 'id;question;answer;image\n1;"Hm,\nreally?";"say ""a"";";a.png\n2;one\n3;b?;;a.png\n4;ünd?;ß;a.png\n'
    for name, mark in (("t.csv", ","), ("t.tsv", "\t")):
        (tmp_path / name).write_text("\ufeff" + text.replace(";", mark), encoding="utf-8")
        source = read_source(SourceConfig(path=str(tmp_path / name)))
        assert [s.id for s in source] == ["1", "4"]
        assert texts(source[0]) == [("user", "Hm,\nreally?"), ("assistant", f'say "a"{mark}')]
        assert texts(source[1])[1] == ("assistant", "ß")
        assert "has 2 fields, but the header has 4" in source.rejected[0].reason
        assert "'answer' must be a non-empty string" in source.rejected[1].reason
    (tmp_path / "t.csv").write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match="two columns have the name 'a'"):
        read_source(SourceConfig(path=str(tmp_path / "t.csv"), format="vqa"))


def test_caption_rows(tmp_path):
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


def test_hugging_face_datasets_embed_their_media(tmp_path):
    png = write_image(tmp_path / "a.png").read_bytes()
    chat = [user([{"type": "image"}, {"type": "text", "text": "Hm?"}]), assistant([{"type": "text", "text": "a"}])]
    files = [{"bytes": png, "path": "a.png"}, {"bytes": None, "path": str(tmp_path / "a.png")}]
    rows = [{"id": f"{i}", "images": [files[i % 2]], "messages": chat} for i in range(5)]
    saved = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    saved.to_parquet(tmp_path / "t-0.parquet")
    saved.to_parquet(tmp_path / "t-1.parquet")
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"a cache file of the library")
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
    with pytest.raises(UserError, match="holds the splits test, train; set the path to one"):
        read_source(SourceConfig(path=str(tmp_path / "both")))


def test_a_table_that_fits_no_format_is_an_error_with_its_columns(tmp_path):
    from pyarrow import parquet

    parquet.write_table(pa.table({"x": [1], "y": [2]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="its keys fit no format: 'x', 'y'"):
        read_source(SourceConfig(path=str(tmp_path / "t.parquet")))


def write_shard(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


def test_shards_are_read_in_place(tmp_path):
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
                "a/1.txt": b"A video.",
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
        first, video, chat_sample = source[:3]
        assert first.id == "s-0.tar/a/0"
        assert first.messages[0].parts == (Image(Path("s-0.tar/a/0.png"), b"png 0"), Text("Hm?"))
        assert (next(video.media()).data, video.category) == (b"mp4", "7")
        assert texts(video)[1] == ("assistant", "A video.")
        assert next(chat_sample.media()).data == b"left 0"
        assert next(source[5].media()).data == b"left 1"
        assert [row.id for row in source.rejected] == [f"s-{n}.tar/a/{k}" for n in range(2) for k in (3, 4)]
    with pytest.raises(UserError, match=r"s-2\.tar: no such data file"):
        read_source(SourceConfig(path=str(tmp_path / "s-{0..2}.tar")))


def test_the_rest_of_a_damaged_shard_is_read(tmp_path):
    answer = json.dumps({"question": "Hm?", "answer": "a"}).encode()
    members = {f"{i}.{suffix}": data for i in range(5) for suffix, data in (("json", answer), ("png", b"png"))}
    write_shard(tmp_path / "s.tar", members)
    data = bytearray((tmp_path / "s.tar").read_bytes())
    data[2048 * 2 + 100 : 2048 * 2 + 140] = b"\xff" * 40  # the header of 2.json
    (tmp_path / "s.tar").write_bytes(data[: 2048 * 4 + 512 + 30])  # and the shard ends within 4.json
    source = read_source(SourceConfig(path=str(tmp_path / "s.tar")))
    assert [s.id for s in source] == ["s.tar/0", "s.tar/1", "s.tar/3"]
    reasons = {row.id: row.reason for row in source.rejected}
    assert "the shard is damaged here" in reasons[f"s.tar/bytes {4096} to {5120}"]
    assert "is truncated by the end of the shard" in reasons["s.tar/4"]


def test_links_to_files_outside_the_root_are_errors_when_the_sample_is_accessed(tmp_path):
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
        with pytest.raises(SampleError, match="is a link to a file outside the media folder"):
            source[at]
    assert [source[at].id for at in (2, 3)] == ["inner.png", "a.png"]


def test_llava_rows_may_have_a_system_key_and_sharegpt_roles(tmp_path):
    path = tmp_path / "data.json"
    bing = [{"from": "user", "value": "Hm?"}, {"from": "bing", "value": "b"}]
    path.write_text(json.dumps([{"conversations": ASK}, {"system": "Be brief.", "conversations": bing}]))
    assert guess_format(path) == "llava"
    _, sample = read_source(SourceConfig(path=str(path)))
    assert texts(sample) == [("system", "Be brief."), ("user", "Hm?"), ("assistant", "b")]


def test_null_counts_as_a_missing_train_or_weight(tmp_path):
    turns = [turn | {"train": None, "weight": None} for turn in ASK]
    (sample,) = read(tmp_path, "llava", {"conversations": turns, "system": None}, format="llava")
    assert sample.messages[1].train
    chat = [user("One?"), assistant("a", weight=0), user("Two?"), assistant("b", weight=1, train=None)]
    (sample,) = read(tmp_path, "messages", {"messages": chat})
    assert [m.train for m in sample.messages] == [True, False, True, True]


@pytest.mark.parametrize(
    ("key", "known"),
    [
        (key, "image")
        for key in ("image_path", "image_file", "imagePath", "img", "Image", "picture", "images_left", "image1")
    ]
    + [("video_path", "video"), ("videos_list", "video")],
)
def test_media_under_an_unknown_key_are_reported_and_not_ignored(tmp_path, key, known):
    qa = {"question": "Hm?", "answer": "a"}
    rows = (qa | {key: "a.png"}, qa | {key: "a.png", "image": "a.png"}, qa | {key: None}, qa | {"imagery": "x"})
    source = read(tmp_path, "vqa", *rows)
    assert len(source) == 3
    reason = f"the key {key!r} is not read, and there is no {known!r}; rename it to {known!r}"
    assert source.rejected[0].reason.startswith(reason)


def test_an_image_id_without_an_image_is_reported(tmp_path):
    qa = {"question": "Hm?", "multiple_choice_answer": "a", "image_id": 42}
    parts = [user([{"type": "image", "image": "a.png"}]), assistant("a")]
    source = read(tmp_path, "vqa", qa, qa | {"image": "a.png"})
    assert (len(source), "the key 'image_id'" in source.rejected[0].reason) == (1, True)
    assert len(read(tmp_path, "messages", {"image_id": 42, "messages": parts})) == 1


def test_a_placeholder_in_a_row_without_media_is_reported(tmp_path):
    turns = [{"from": "human", "value": "See <video>"}, ASK[1]]
    source = read(tmp_path, "llava", {"conversations": turns}, {"conversations": ASK})
    assert source.rejected[0].reason.startswith("its text has a <video> placeholder, but the row names no media")


@pytest.mark.parametrize(
    "cell", ["['red', 'red', \"it's\"]", '["red", "red", "it\'s"]', " [{'answer': 'red'}, 'red', \"it's\"]"]
)
def test_a_table_may_have_its_answers_as_a_list_in_text(tmp_path, cell):
    (tmp_path / "t.tsv").write_text("question\tanswers\nHm?\t" + '"' + cell.replace('"', '""') + '"')
    (sample,) = read_source(SourceConfig(path=str(tmp_path / "t.tsv")))
    assert (texts(sample)[1], sample.answers) == (("assistant", "red"), ("red", "red", "it's"))


def test_invalid_answers_are_rejected(tmp_path):
    invalid = ("[red, red]", "['a' 'b']", "[" * 5000, "[{[]: 1}]", True, 0.5, [None], [])
    rows = [{"question": "Hm?", "answers": value} for value in (2, 2.0, [3, "3", 4], "[1, 1]", *invalid)]
    source = read(tmp_path, "vqa", *rows, {"question": "Where?", "answer": "[0.1, 0.2]"})
    assert [texts(sample)[1][1] for sample in source] == ["2", "2", "3", "1", "[0.1, 0.2]"]
    assert len(source.rejected) == len(invalid)
    assert all("'answers'" in row.reason and len(row.reason) < 300 for row in source.rejected)
    (sample,) = read(tmp_path, "vqa", {"question": "Hm?", "answers": ["a"], "multiple_choice_answer": 2})
    assert texts(sample)[1][1] == "2"


def test_data_urls_embed_images(tmp_path):
    png = write_image(tmp_path / "a.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"

    def with_image(url):
        return {"messages": [user([{"type": "image_url", "image_url": {"url": url}}]), assistant("a")]}

    invalid = ("data:image/png;base64,%%%", "data:image/png,abc", "data:image/png;base64,", "x" * 5000, "é" * 2100)
    non_ascii = "data:image/png;base64," + "é" * 500
    source = read(tmp_path, "messages", with_image(url), *map(with_image, (*invalid, non_ascii)))
    assert [part.data for part in source[0].media()] == [png]
    expected = ("invalid base64", "must begin", "must begin", "path of 5,000", "path of 4,200", "invalid base64")
    reasons = [row.reason for row in source.rejected]
    assert [e in reason for e, reason in zip(expected, reasons, strict=True)] == [True] * 6
    assert max(map(len, reasons)) < 300


def test_data_urls_have_a_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "MAX_ROW", 100)
    source = read(tmp_path, "caption", {"image": "data:," + "x" * 100, "caption": "x"}, {"image": "a", "caption": "x"})
    assert "a data URL of" in source.rejected[0].reason


def test_absolute_paths_through_a_linked_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "out").symlink_to(tmp_path)
    write_image(tmp_path / "real" / "a.png")
    write_image(tmp_path / "secret.png")
    names = [f"{tmp_path}/{name}" for name in ("linked/a.png", "real/a.png", "secret.png", "linked/out/secret.png")]
    source = read(tmp_path / "linked", "caption", *[{"image": name, "caption": "x"} for name in names])
    assert [next(s.media()).path.name for s in source] == ["a.png", "a.png"]
    assert ["is outside the media folder" in row.reason for row in source.rejected] == [True, True]


@pytest.mark.parametrize("value", [True, "true", "True"])
def test_where_matches_booleans_and_their_text(tmp_path, value):
    rows = [{"id": str(v), "is_train": v, "conversations": ASK} for v in (True, "true", "True", False, 1, None)]
    source = read(tmp_path, "llava", *rows, where={"is_train": [value]})
    assert [s.id for s in source] == ["True", "true", "True#2"]
    config = EvaluationConfig(name="x", benchmark="vqa", data="x", where={"a": [True, 1, "1"]})
    assert [type(v) for v in config.where["a"]] == [bool, int, str]


def test_a_table_may_embed_images(tmp_path):
    url = f"data:image/png;base64,{base64.b64encode(b'x' * 300_000).decode()}"
    (tmp_path / "t.tsv").write_text(f"image\tcaption\n{url}\tx")
    (sample,) = read_source(SourceConfig(path=str(tmp_path / "t.tsv")))
    assert next(sample.media()).data == b"x" * 300_000


def test_a_file_without_a_readable_row_is_an_error_with_the_first_reason(tmp_path):
    (tmp_path / "t.csv").write_text("question,answer\n1,2,3\n4\n")
    with pytest.raises(UserError, match="none of the first 2 rows can be read; the first: has 3 fields, but"):
        guess_format(tmp_path / "t.csv")


@pytest.mark.parametrize("form", ["llava", "sharegpt", "messages", "alpaca", "vqa", "caption"])
def test_a_file_url_is_its_path_in_every_format(tmp_path, form):
    """Also in lists, and never to a file outside the media folder."""
    texts = {
        "llava": {"conversations": ASK},
        "sharegpt": {"conversations": ASK, "system": "Be brief."},
        "messages": {"messages": [user("Hm?"), assistant("a")]},
        "alpaca": {"instruction": "Hm?", "output": "a"},
        "vqa": {"question": "Hm?", "answer": "a"},
        "caption": {"caption": "a"},
    }
    names = ["file://a.png", f"file://{tmp_path}/a.png"]
    key = "images" if form in ("sharegpt", "messages") else "image"
    rows = [texts[form] | {key: name if key == "image" else [name]} for name in names]
    rows.append(texts[form] | {key: names})
    rows += [texts[form] | {key: ["file:///etc/passwd"]}, texts[form] | {key: ["file://http://x/a.png"]}]
    source = read(tmp_path, form, *rows)
    a = Image(tmp_path / "a.png")
    assert [list(sample.media()) for sample in source] == [[a], [a], [a, a]]
    assert ["outside the media folder" in row.reason for row in source.rejected] == [True, False]
    assert "is a URL" in source.rejected[1].reason
