"""Damaged and hostile data files raise nothing but UserError, and each of their rows is a sample or rejected."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import tarfile

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipelines.samples import SampleError
from data_pipelines.sources import read_source
from mmdora.core.config import SourceConfig
from mmdora.core.errors import UserError
from tests.media import write_image

MUTATIONS = 60  # per file type
HOSTILE = [
    None,
    3,
    -1.5,
    True,
    "",
    [],
    {},
    "../secret.png",
    "/etc/passwd",
    "link.png",
    "folder/inside.png",
    "http://x/y.png",
    "a\0b",
    "\ud800",
    "x" * 5000,
    float("nan"),
    float("inf"),
    10**400,
    [None],
    [[[[["deep"]]]]],
    {"bytes": None, "path": None},
]


def rows() -> list[dict]:
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a bird, “grün” 鳥"}]
    image = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    return [
        {"id": "1", "image": "a.png", "conversations": turns},
        {"id": "2", "messages": [{"role": "user", "content": image}, {"role": "assistant", "content": "x"}]},
        {"id": "3", "instruction": "Say it.", "output": "it", "history": [["a", "b"]]},
        {"id": "4", "question": "What?", "answers": ["a", "a", "b"], "image": "a.png"},
        {"id": "5", "caption": "a bird", "image": "a.png"},
        {"id": "6", "images": ["a.png"], "conversations": turns, "system": "Be brief."},
    ]


FORMATS = ["llava", "messages", "alpaca", "vqa", "caption", "sharegpt"]


def flat_rows() -> list[dict[str, str]]:
    return [{"id": str(i), "question": f"What, {i}?", "answer": "a\n“b”", "image": "a.png"} for i in range(6)]


def replace_one(tree, rng: random.Random):
    """Replace a random value anywhere in the tree by a hostile one, or delete a key."""
    places = []

    def collect(node):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                collect(value)

    collect(tree)
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(HOSTILE)
    return tree


def damage(data: bytes, rng: random.Random) -> bytes:
    """Truncate the data, flip bits, or insert, delete or repeat bytes."""
    kind = rng.randrange(5)
    out = bytearray(data)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        for _ in range(rng.randint(1, 20)):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        at = rng.randrange(len(out))
        out[at:at] = rng.choice([b"[" * 3000, b'{"id":' * 3000, b"\xff\xfe", b"\0" * 512, b'"', b"NaN", b"9" * 5000])
    elif kind == 3:
        low, high = sorted(rng.randrange(len(out)) for _ in range(2))
        del out[low:high]
    else:
        low, high = sorted(rng.randrange(len(out)) for _ in range(2))
        out += out[low:high]
    return bytes(out)


def as_json(rng: random.Random, number: int) -> tuple[bytes, str]:
    made = replace_one(rows(), rng) if number % 2 else rows()
    text = json.dumps(made).encode()
    if number % 8 == 1:
        text = text.replace(b'"id": "1"', b'"id": "0", "id": "1"')
    return (text if number % 2 else damage(text, rng)), FORMATS[number % len(FORMATS)]


def as_lines(rng: random.Random, number: int) -> tuple[bytes, str]:
    made = replace_one(rows(), rng) if number % 2 else rows()
    text = "\n".join(json.dumps(row) for row in made).encode()
    return (text if number % 2 else damage(text, rng)), FORMATS[number % len(FORMATS)]


def as_csv(rng: random.Random, number: int) -> tuple[bytes, str]:
    made = flat_rows()
    if number % 2:
        made[rng.randrange(6)][rng.choice([*made[0]])] = str(rng.choice(HOSTILE)).replace("\ud800", "?")
    out = io.StringIO()
    writer = csv.DictWriter(out, [*flat_rows()[0]])
    writer.writeheader()
    writer.writerows(made)
    return (out.getvalue().encode() if number % 2 else damage(out.getvalue().encode(), rng)), "vqa"


def as_parquet(rng: random.Random, number: int) -> tuple[bytes, str]:
    out = io.BytesIO()
    compression = "none" if number % 3 else "snappy"
    parquet.write_table(pa.Table.from_pylist(flat_rows()), out, row_group_size=2, compression=compression)
    return damage(out.getvalue(), rng), "huggingface"


def as_arrow(rng: random.Random, number: int) -> tuple[bytes, str]:
    out = io.BytesIO()
    table = pa.Table.from_pylist([row | {"image": {"bytes": b"123", "path": None}} for row in flat_rows()])
    make = pa.ipc.new_stream if number % 2 else pa.ipc.new_file
    with make(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return damage(out.getvalue(), rng), "huggingface"


def as_tar(rng: random.Random, number: int) -> tuple[bytes, str]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as shard:
        for i, row in enumerate(rows()):
            made = replace_one(row, rng) if number % 2 else row
            name = rng.choice([f"{i:03d}", f"../{i:03d}", f"/{i:03d}", f"{i:03d}" + "x" * 120])
            for suffix, data in (("json", json.dumps(made).encode()), ("png", b"no picture")):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        shard.addfile(link)
    return (out.getvalue() if number % 2 else damage(out.getvalue(), rng)), "webdataset"


@pytest.fixture
def folder(tmp_path):
    """A media root with an image, and links to files outside the root."""
    (tmp_path / "out").mkdir()
    root = tmp_path / "root"
    root.mkdir()
    write_image(root / "a.png")
    write_image(tmp_path / "out" / "inside.png")
    (root / "link.png").symlink_to(tmp_path / "out" / "inside.png")
    (root / "folder").symlink_to(tmp_path / "out")
    return root


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("x.json", as_json),
        ("x.jsonl", as_lines),
        ("x.csv", as_csv),
        ("x.parquet", as_parquet),
        ("x.arrow", as_arrow),
        ("x.tar", as_tar),
    ],
)
def test_every_row_is_a_sample_or_rejected(folder, name, make):
    rng = random.Random(name)
    rows_read = unreadable_files = rejected = 0
    for number in range(MUTATIONS):
        data, form = make(rng, number)
        (folder / name).write_bytes(data)
        try:
            source = read_source(SourceConfig(path=str(folder / name), format=form))
        except UserError as error:
            assert name in str(error)  # noqa: PT017
            unreadable_files += 1
            continue
        usable = 0
        for i in range(len(source)):
            try:
                sample = source[i]
            except SampleError as error:
                assert "outside the media folder" in error.reason  # a link, resolved on access  # noqa: PT017
                continue
            usable += 1
            paths = [part.path for part in sample.media() if part.data is None]
            assert all(os.path.realpath(path).startswith(f"{folder}/") for path in paths)
        assert usable or len(source)
        assert all(row.reason and row.id for row in source.rejected)
        rows_read, rejected = rows_read + source.total, rejected + len(source.rejected)
    assert min(rows_read, unreadable_files, rejected) > 0
