"""Files are written completely or not at all, whatever text a model produced."""

from __future__ import annotations

import json
import zipfile

import pytest

from eval.archives import write_zip
from eval.files import json_text, write_whole
from mmdora.core.errors import UserError

ANSWER = "lone surrogate: \ud800, line separator: \u2028"


def test_any_answer_can_be_written_and_read_back(tmp_path):
    write_whole(tmp_path / "a.json", json_text({"answer": ANSWER}))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"answer": ANSWER}
    write_zip(tmp_path / "a.zip", {"task/a.json": json_text([ANSWER])})
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert json.loads(archive.read("task/a.json")) == [ANSWER]


def test_the_same_zip_twice_is_the_same_bytes(tmp_path):
    for name in ("a.zip", "b.zip"):
        write_zip(tmp_path / name, {"one.txt": "1", "two.txt": "2"})
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_zip_file_needs_the_suffix(tmp_path):
    with pytest.raises(UserError, match=r"a zip file, such as .*a\.zip"):
        write_zip(tmp_path / "a.json", {"one.txt": "1"})


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "a.txt", "old")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "a.txt", 5)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
