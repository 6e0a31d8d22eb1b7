"""Row readers and the index: rows are located, cached, shared by processes, and re-indexed after damage."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.dataset import TrainDataset
from data_pipelines.encoding import Encoder
from data_pipelines.formats import llava
from data_pipelines.index import cache_folder
from data_pipelines.ledger import Ledger
from data_pipelines.rows import text
from data_pipelines.samples import Image, SampleError, Video
from data_pipelines.sources import IMAGES, VIDEOS, Source, read_source
from mmdora.core.config import SourceConfig, VideoConfig
from mmdora.core.errors import UserError
from tests.conversations import tiny_processor
from tests.media import write_image, write_video


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MMDORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


def row(number: int, answer: str = "a", **more) -> dict:
    turns = [{"from": "human", "value": f"Question {number}?"}, {"from": "gpt", "value": answer}]
    return {"id": f"{number}", "conversations": turns, **more}


def write(path: Path, rows: list, age: float = 60) -> SourceConfig:
    """Write a JSON list or JSON lines, last modified `age` seconds ago."""
    texts = [json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("\n".join(texts) if path.suffix == ".jsonl" else f"[{', '.join(texts)}]", encoding="utf-8")
    changed = path.stat().st_mtime - age
    os.utime(path, (changed, changed))
    return SourceConfig(path=str(path), format="llava")


def answers(source: Source) -> list[str]:
    return [sample.messages[1].text for sample in source]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 10**6])
def test_rows_are_located_wherever_a_chunk_of_the_file_ends(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(text, "CHUNK", chunk)
    rng = random.Random(chunk)
    expected = ["".join(rng.choices('ab"\\/é鳥🐦\n\t {}[],:', k=rng.randint(1, 30))) + "." for _ in range(40)]
    rows = [row(i, answer, score=rng.choice([1, -2.5e10, True, None, 10**20])) for i, answer in enumerate(expected)]
    source = read_source(write(tmp_path / name, rows))
    assert answers(source) == expected
    assert [s.id for s in source] == [str(i) for i in range(40)]


def test_json_may_have_any_layout(tmp_path):
    path = tmp_path / "x.json"
    for written in (
        "\ufeff" + json.dumps([row(0), row(1)]),
        json.dumps([row(0), row(1)], indent=8),
        "\r\n [" + json.dumps(row(0)) + "\n,\n" + json.dumps(row(1)) + "] \n",
        json.dumps(row(0)) + "\r\n\n" + json.dumps(row(1)),  # JSON lines in a file named .json
    ):
        path.write_text(written, encoding="utf-8")
        assert len(read_source(SourceConfig(path=str(path)))) == 2


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[1", "the list is not closed: line 1, byte 2"),
        ("[{}\n,{}]\nx", "text after the end of the list: line 3, byte 9"),
        ("[{}\n,{},]", "Expecting value: line 2, byte 8"),
        ("[{} {}]", "expected ',' or ']': line 1, byte 4"),
        ('[{"é": "a]', "Unterminated string starting at: line 1, byte 8"),
        ('["é", {"a" 1}]', "Expecting ':' delimiter: line 1, byte 12"),
        ("[" * 5000, "nested too deeply: line 1, byte 1"),
        ('{"a": [1]}', "expected a JSON list of samples, not dict"),
    ],
)
def test_a_damaged_list_is_an_error_with_its_position(tmp_path, written, message):
    (tmp_path / "x.json").write_text(written, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_source(SourceConfig(path=str(tmp_path / "x.json"), format="llava"))
    assert f"{tmp_path}/x.json" in str(error.value)
    assert message in str(error.value)


def test_an_endless_row_is_an_error_and_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MAX_ROW", 1000)
    monkeypatch.setattr(text, "CHUNK", 100)
    (tmp_path / "x.json").write_text('[{"a": "' + "x" * 5000)
    with pytest.raises(UserError, match="a row of more than"):
        read_source(SourceConfig(path=str(tmp_path / "x.json"), format="llava"))


def test_damaged_lines_are_rejected_and_the_rest_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps(row(i)).encode() for i in range(3)]
    twice = lines[0].replace(b'"id"', b'"id": "9", "id"')
    huge = json.dumps(row(9, "a")).replace('"9"', "9" * 5000, 1).encode()
    path.write_bytes(b"\n".join([lines[0], b"{", lines[1], b'{"id": "\xff"}', twice, huge, b"[" * 5000, lines[2]]))
    source = read_source(SourceConfig(path=str(path)))
    assert [s.id for s in source] == ["0", "1", "2"]
    expected = ["line 2 is not", "line 4 is not", "duplicate key 'id'", "a number of 5000 digits", "line 7 is not"]
    reasons = [r.reason for r in source.rejected]
    assert [e in r for e, r in zip(expected, reasons, strict=True)] == [True] * 5
    assert [r.id for r in source.rejected] == ["line-2", "line-4", "row-4", "row-5", "line-7"]
    assert source.total == 8


def test_lengths_and_kinds_come_from_the_index(tmp_path):
    long = row(3, "x" * 4000)
    rows = [row(0), row(1, image="a.png"), row(2, video="a.mp4"), long]
    source = read_source(write(tmp_path / "x.jsonl", rows))
    assert source.kinds.tolist() == [0, IMAGES, VIDEOS, 0]
    assert source.text[3] == 1000 + source.text[0]
    assert [source.images.tolist(), source.videos.tolist()] == [[0, 1, 0, 0], [0, 0, 1, 0]]
    dataset = TrainDataset([source], None, Ledger(tmp_path / "l", 4, 0.0), seed=0)
    assert dataset.kinds.tolist() == [0, IMAGES, VIDEOS, 0]
    assert dataset.media_kinds() == [Image, Video]
    no_media = read_source(write(tmp_path / "x.jsonl", rows[:1]))
    assert TrainDataset([no_media], None, Ledger(tmp_path / "l", 4, 0.0), seed=0).media_kinds() == []


def test_lengths_include_media_as_the_encoder_encodes_them(tmp_path):
    for i in range(3):
        write_image(tmp_path / f"{i}.png")
    write_video(tmp_path / "a.mp4")
    with_image = [row(i, "x" * 400, image=f"{i}.png") for i in range(4)]  # the last image does not exist
    rows = [row(8), *with_image, row(9, image=["0.png", "1.png"]), row(10, video="a.mp4")]
    processor = tiny_processor()
    encoder = Encoder(processor, VideoConfig(num_frames=4), max_length=50)  # does not apply to the estimate
    source = read_source(write(tmp_path / "x.jsonl", rows))
    dataset = TrainDataset([source], encoder, Ledger(tmp_path / "l", 7, 0.0), seed=0)
    assert "lengths" not in vars(dataset)
    unbounded = replace(encoder, max_length=None)
    image, video = (
        int((unbounded.encode(source[at])["input_ids"] == token).sum())
        for at, token in ((1, processor.image_token_id), (6, processor.video_token_id))
    )
    assert image > 0
    assert video > 0
    media = [0, image, image, image, image, 2 * image, video]
    assert (dataset.lengths - source.text).tolist() == media
    assert dataset.lengths.dtype == np.int64
    (tmp_path / "a.mp4").unlink()
    assert TrainDataset([source], encoder, Ledger(tmp_path / "l", 7, 0.0), seed=0).lengths[6] == source.text[6] + 576


def count_parses(monkeypatch) -> list[str]:
    """Return a list that collects the ids of the rows that are parsed from now on."""
    parsed: list[str] = []
    parse = llava.LLaVA.parse
    monkeypatch.setattr(
        llava.LLaVA, "parse", lambda self, row, place: parsed.append(place.id) or parse(self, row, place)
    )
    return parsed


def test_a_file_is_indexed_once_and_again_after_a_change(tmp_path, monkeypatch, cache):
    config = write(tmp_path / "x.json", [row(i) for i in range(5)])
    parsed = count_parses(monkeypatch)
    assert len(read_source(config)) == 5
    assert len(parsed) == 5
    source = read_source(config)
    assert len(parsed) == 5
    assert source[3].id == "3"
    assert parsed[5:] == ["3"]  # parsed on access
    read_source(config.model_copy(update={"where": {"id": ["1"]}}))
    assert len(parsed) == 7  # another `where` is another index, and rows that it excludes are not parsed
    write(tmp_path / "x.json", [row(i, "b") for i in range(5)], age=30)  # same size, another time stamp
    assert answers(read_source(config)) == ["b"] * 5
    assert len(list(cache.iterdir())) == 2  # the old index was replaced, and no temporary folder remains
    assert not list(tmp_path.glob("x.*[!n]"))  # nothing next to the user's file


def test_a_file_that_was_just_modified_is_indexed_again(tmp_path):
    """It may change again with the same time stamp and size."""
    config = write(tmp_path / "x.json", [row(0, "a")], age=0)
    stamp = (tmp_path / "x.json").stat().st_mtime_ns
    assert answers(read_source(config)) == ["a"]
    write(tmp_path / "x.json", [row(0, "b")], age=0)
    os.utime(tmp_path / "x.json", ns=(stamp, stamp))
    assert answers(read_source(config)) == ["b"]


@pytest.mark.parametrize("name", ["number.npy", "begin.npy", "meta.json", "rejected.jsonl"])
def test_a_damaged_index_is_rebuilt(tmp_path, cache, name):
    config = write(tmp_path / "x.jsonl", [row(0), "no row", row(1)])
    read_source(config)
    (folder,) = cache.iterdir()
    whole = (folder / name).read_bytes()
    for damaged in (whole[:-3], whole[:-3] + b"xyz", b""):
        (folder / name).write_bytes(damaged)
        source = read_source(config)
        assert (answers(source), source.total) == (["a", "a"], 3)
    (folder / name).unlink()
    assert answers(read_source(config)) == ["a", "a"]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMDORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="MMDORA_CACHE sets the cache folder"):
        read_source(write(tmp_path / "x.jsonl", [row(0)]))
    monkeypatch.delenv("MMDORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "mmdora" / "index"


def test_a_row_that_changed_after_indexing_is_an_error(tmp_path):
    source = read_source(write(tmp_path / "x.jsonl", [row(0), row(1)]))
    (tmp_path / "x.jsonl").write_text("gone")
    with pytest.raises(SampleError, match="was the file changed meanwhile"):
        source[1]


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_a_removed_arrow_table_is_an_error_of_its_rows(tmp_path, cache, suffix):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "x.arrow"
    source_of(path)
    if suffix == "parquet":
        parquet.write_table(pa.ipc.open_stream(path.read_bytes()).read_all(), tmp_path / "x.parquet")
        path = tmp_path / "x.parquet"
    source = read_source(SourceConfig(path=str(path)))
    file = path if suffix == "arrow" else next(cache.glob("*/*.arrow"))
    file.rename(tmp_path / "aside")
    for at in (0, 999):
        with pytest.raises(SampleError, match=r"can no longer be read .* was the file changed, or the cache deleted"):
            source[at]
    (tmp_path / "aside").rename(file)
    assert source[999].id == "999"


def build_and_read(path: str, barrier) -> None:
    barrier.wait()
    source = read_source(SourceConfig(path=path, format="llava"))
    assert answers(source) == ["a"] * 200


def test_processes_may_build_the_same_index_at_the_same_time(tmp_path, cache):
    write(tmp_path / "x.jsonl", [row(i) for i in range(200)])
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=build_and_read, args=(str(tmp_path / "x.jsonl"), barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("name", ["x.json", "x.arrow", "x.tar"])
def test_a_pickled_source_maps_the_index_and_holds_no_rows(tmp_path, name):
    """Spawned processes get their sources this way."""
    source = source_of(tmp_path / name)
    ids, pickled = [s.id for s in source], pickle.dumps(source)
    assert len(pickled) < 40_000  # 8 bytes per selected sample
    del source
    loaded = pickle.loads(pickled)
    maps = Path("/proc/self/maps")
    assert not maps.is_file() or f"{tmp_path}/cache/index/" in maps.read_text()
    assert [s.id for s in loaded] == ids


def source_of(path: Path) -> Source:
    """Write 1000 rows to a .json, .arrow or .tar file and open it."""
    rows = [row(i, "a" * 100) for i in range(1000)]
    if path.suffix == ".json":
        return read_source(write(path, rows))
    if path.suffix == ".arrow":
        import pyarrow as pa

        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=64)
    else:
        from tests.test_row_formats import write_shard

        write_shard(path, {f"{r['id']}.json": json.dumps(r).encode() for r in rows})
    return read_source(SourceConfig(path=str(path)))
