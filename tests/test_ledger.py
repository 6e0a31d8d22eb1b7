"""The ledger counts skipped and changed samples over processes and restarts, with their reasons."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from data_pipelines.ledger import Entry, Ledger, by_reason, drop_incomplete_line, from_change, from_error
from data_pipelines.samples import Sample, SampleError
from mmdora.core.errors import UserError
from tests.ledgers import read_ledger


def entry(name: str, reason: str = "no such file", **more) -> Entry:
    return Entry(name, "data.json", "media", reason, **more)


def write(path: Path, names: list[str]) -> None:
    """Record samples; runs in a process of its own."""
    ledger = Ledger(path, 1000, 1.0)
    for name in names:
        ledger.record(entry(name, f"reason of {name} with a \u2028 in it"))


def test_processes_share_one_file_and_each_sample_counts_once(tmp_path):
    path = tmp_path / "skipped.jsonl"
    context = multiprocessing.get_context("spawn")
    shares = [[f"s{i}" for i in range(start, start + 60)] for start in (0, 30, 60)]
    processes = [context.Process(target=write, args=(path, names)) for names in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(e.id for e in read_ledger(path)) == sorted(f"s{i}" for i in range(120))
    assert Ledger(path, 1000, 1.0).summary().startswith("120 of 1000 samples skipped: 120 × reason of s")


def test_the_limit_includes_the_samples_of_other_processes(tmp_path):
    path = tmp_path / "skipped.jsonl"
    first, second = Ledger(path, 10, 0.2), Ledger(path, 10, 0.2)
    first.record(entry("a"))
    second.record(entry("b", file="b.png"))
    second.record(entry("a"))  # recorded before
    with pytest.raises(UserError, match=r"3 of 10 .* 20.0% allows: 3 × no such file \(a\)"):
        first.record(entry("c"))


def test_a_changed_sample_is_listed_but_not_counted_as_skipped(tmp_path):
    ledger = Ledger(tmp_path / "skipped.jsonl", 10, 0.0)
    ledger.record(from_change(Sample("long", (), "data.json"), "cut from 3000 to 2048 tokens"))
    assert ledger.summary() == "0 of 10 samples skipped; 1 changed: 1 × cut from 3000 to 2048 tokens (long)"


def test_an_incomplete_line_is_dropped_and_recorded_again(tmp_path):
    path = tmp_path / "skipped.jsonl"
    Ledger(path, 10, 1.0).record(entry("a"), entry("b"))
    path.write_bytes(path.read_bytes()[:-9])  # killed while writing
    drop_incomplete_line(path)
    again = Ledger(path, 10, 1.0)
    again.record(entry("b"))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_reasons_that_differ_in_names_and_numbers_count_as_equal():
    entries = [entry(str(i), f"{1000 + i} tokens, over data.max_length 999") for i in range(3)]
    entries += [entry("x", "'a.png' is outside the media folder /data")]
    entries += [entry("y", "'b.png' is outside the media folder /m")]
    assert [count for count, _ in by_reason(entries)] == [3, 2]


def test_a_long_reason_is_shortened_and_grouped_in_linear_time(tmp_path):
    reason, file = "the value is " + "x" * 10**6, "images/" + "y" * 10**6
    start = time.perf_counter()
    assert [count for count, _ in by_reason([entry("a", reason), entry("b", reason + " 3")])] == [1, 1]
    assert time.perf_counter() - start < 5  # quadratic time would be hours
    ledger = Ledger(tmp_path / "skipped.jsonl", 10, 1.0)
    ledger.record(entry("a", reason, file=file))
    ledger.record(entry("a", reason, file=file))
    (kept,) = read_ledger(ledger.path)
    assert (kept.reason, kept.file) == (reason[:500], file[:500])


def test_the_file_at_fault_is_not_repeated_in_the_reason():
    error = SampleError("s", "data.json", "images/a.png: no such file", "media", "images/a.png")
    assert from_error(error) == entry("s", file="images/a.png")
