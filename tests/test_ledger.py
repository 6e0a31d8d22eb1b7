"""The ledger counts what was lost, over processes and restarts, and says why."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from data_pipelines.ledger import Entry, Ledger, by_reason, from_change, from_error, mend, read_ledger
from data_pipelines.samples import Sample, SampleError
from mmdora.core.errors import UserError


def entry(name: str, reason: str = "no such file", **more) -> Entry:
    return Entry(name, "data.json", "media", reason, **more)


def write(path: Path, names: list[str]) -> None:
    ledger = Ledger(path, 1000, 1.0)
    for name in names:
        ledger.record(entry(name, f"reason of {name} with a \u2028 in it"))


def test_processes_share_one_file_and_count_each_sample_once(tmp_path):
    path = tmp_path / "skipped.jsonl"
    context = multiprocessing.get_context("spawn")
    shares = [[f"s{i}" for i in range(start, start + 60)] for start in (0, 30, 60)]
    processes = [context.Process(target=write, args=(path, names)) for names in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(e.id for e in read_ledger(path)) == sorted(f"s{i}" for i in range(120))
    watching = Ledger(path, 1000, 1.0)
    assert watching.summary().startswith("120 of 1000 samples skipped: 120 × reason of s")


def test_the_limit_counts_what_other_processes_lost(tmp_path):
    path = tmp_path / "skipped.jsonl"
    one, two = Ledger(path, 10, 0.2), Ledger(path, 10, 0.2)
    one.record(entry("a"))
    two.record(entry("b", file="b.png"))
    two.record(entry("a"))  # met again
    with pytest.raises(UserError, match=r"3 of 10 .* 20.0% allows: 3 × no such file \(a\)"):
        one.record(entry("c"))


def test_a_changed_sample_is_told_and_not_counted_as_lost(tmp_path):
    ledger = Ledger(tmp_path / "skipped.jsonl", 10, 0.0)
    ledger.record(from_change(Sample("long", (), "data.json"), "cut from 3000 to 2048 tokens"))
    assert ledger.summary() == "0 of 10 samples skipped; 1 changed: 1 × cut from 3000 to 2048 tokens (long)"


def test_a_torn_line_is_dropped_and_met_again(tmp_path):
    path = tmp_path / "skipped.jsonl"
    Ledger(path, 10, 1.0).record(entry("a"), entry("b"))
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote
    mend(path)
    again = Ledger(path, 10, 1.0)
    again.record(entry("b"))
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_reasons_are_counted_apart_from_the_names_and_numbers_in_them():
    entries = [entry(str(i), f"{1000 + i} tokens, over data.max_length 999") for i in range(3)]
    entries += [entry("x", "'a.png' leaves the media folder /data"), entry("y", "'b.png' leaves the media folder /m")]
    assert [count for count, _ in by_reason(entries)] == [3, 2]


def test_a_long_reason_is_cut_and_counted_in_linear_time(tmp_path):
    reason, file = "the model said " + "x" * 10**6, "pictures/" + "y" * 10**6
    start = time.perf_counter()
    assert [count for count, _ in by_reason([entry("a", reason), entry("b", reason + " 3")])] == [1, 1]
    assert time.perf_counter() - start < 5  # it was hours
    ledger = Ledger(tmp_path / "skipped.jsonl", 10, 1.0)
    ledger.record(entry("a", reason, file=file))
    ledger.record(entry("a", reason, file=file))
    (kept,) = read_ledger(ledger.path)
    assert (kept.reason, kept.file) == (reason[:500], file[:500])


def test_the_file_at_fault_stands_beside_the_reason():
    error = SampleError("s", "data.json", "pictures/a.png: no such file", "media", "pictures/a.png")
    assert from_error(error) == entry("s", file="pictures/a.png")
