"""Files that are there whole or not at all, whatever a model said."""

from __future__ import annotations

import json
import zipfile

import pytest

from eval.archives import write_zip
from eval.files import json_text, write_whole
from mmdora.core.errors import UserError

SAID = "half of a pair: \ud800, and \u2028"


def test_any_answer_can_be_written_and_read_back(tmp_path):
    write_whole(tmp_path / "a.json", json_text({"answer": SAID}))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"answer": SAID}
    write_zip(tmp_path / "a.zip", {"task/a.json": json_text([SAID])})
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert json.loads(archive.read("task/a.json")) == [SAID]


def test_the_same_zip_twice_is_the_same_bytes(tmp_path):
    for name in ("a.zip", "b.zip"):
        write_zip(tmp_path / name, {"one.txt": "1", "two.txt": "2"})
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_zip_is_called_one(tmp_path):
    with pytest.raises(UserError, match=r"a zip file, as .*a\.zip"):
        write_zip(tmp_path / "a.json", {"one.txt": "1"})


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    write_whole(tmp_path / "a.txt", "old")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "a.txt", 5)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
