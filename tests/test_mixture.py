"""Mixtures of sources: caps (`take`), weights and temperature."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from data_pipelines.dataset import TrainDataset
from data_pipelines.encoding import Encoder
from data_pipelines.ledger import Ledger
from data_pipelines.mixture import epoch, shares, take
from data_pipelines.sources import read_source
from mmdora.core.config import SourceConfig
from mmdora.core.errors import UserError
from tests.conversations import tiny_processor
from tests.ledgers import read_ledger
from tests.media import write_image


def source(tmp_path, name: str, count: int, **options):
    turns = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": f"{name}{i}", "conversations": turns} for i in range(count)]
    (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return read_source(SourceConfig(path=str(tmp_path / f"{name}.json"), format="llava", **options), seed=3)


def epoch_counts(tmp_path, sources, **options) -> Counter:
    """Count how often the epoch holds each sample."""
    dataset = TrainDataset(sources, None, Ledger(tmp_path / "skipped.jsonl", 1, 0.0), seed=3, **options)
    return Counter(dataset.sample(i).id for i in range(len(dataset)))


def test_take_selects_the_first_or_random_rows(tmp_path):
    names = [s.id for s in source(tmp_path, "a", 40, take="first:5")]
    assert names == [f"a{i}" for i in range(5)]
    drawn = [s.id for s in source(tmp_path, "a", 40, take="random:10")]
    assert len(set(drawn)) == 10
    assert drawn == [s.id for s in source(tmp_path, "a", 40, take="random:10")]
    assert drawn != [f"a{i}" for i in range(10)]
    assert len(source(tmp_path, "a", 40, take="random:25%")) == 10
    assert len(source(tmp_path, "a", 40, take="first:100")) == 40
    assert take(40, "random:10", 3, "a").tolist() != take(40, "random:10", 4, "a").tolist()
    assert take(40, "random:10", 3, "a").tolist() != take(40, "random:10", 3, "b").tolist()


def test_take_counts_rejected_rows(tmp_path):
    turns = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": str(i), "conversations": turns if i % 2 else []} for i in range(10)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    taken = read_source(SourceConfig(path=str(tmp_path / "x.json"), format="llava", take="first:4"))
    assert [s.id for s in taken] == ["1", "3"]
    assert [r.id for r in taken.rejected] == ["0", "2"]
    assert taken.total == 4


@pytest.mark.parametrize("rule", ["first", "first:0", "last:3", "random:0%", "random:101%", "first:10%", "random:-1"])
def test_an_invalid_take_is_an_error(rule):
    with pytest.raises(ValueError, match=r"first:N, random:N or random:P%"):
        SourceConfig(path="x", take=rule)


def test_weight_scales_the_samples_of_a_source(tmp_path):
    counts = epoch_counts(tmp_path, [source(tmp_path, "a", 10, weight=2.5), source(tmp_path, "b", 10, weight=0.5)])
    per_source = Counter(name[0] for name in counts.elements())
    assert per_source == {"a": 25, "b": 5}
    assert Counter(counts[f"a{i}"] for i in range(10)) == {2: 5, 3: 5}
    assert max(counts[f"b{i}"] for i in range(10)) == 1


def test_temperature_balances_the_sources_and_keeps_the_length_of_the_epoch(tmp_path):
    sources = [source(tmp_path, "a", 90), source(tmp_path, "b", 10)]
    for temperature, expected in ((1, [90, 10]), (2, [75, 25]), (1000, [50, 50])):
        counts = epoch_counts(tmp_path, sources, temperature=temperature)
        per_source = Counter(name[0] for name in counts.elements())
        assert [per_source["a"], per_source["b"]] == expected
    assert shares([100, 100], [1, 4], 2) == [167, 333]


def test_an_epoch_is_reproducible_from_its_seed():
    first = epoch([10, 4], [13, 2], 0, ["a", "b"])
    assert first.tolist() == epoch([10, 4], [13, 2], 0, ["a", "b"]).tolist()
    assert first.tolist() != epoch([10, 4], [13, 2], 1, ["a", "b"]).tolist()
    assert len(first) == 15
    assert set(first[:10]) == set(range(10))
    assert all(10 <= n < 14 for n in first[13:])


def test_an_empty_epoch_is_an_error(tmp_path):
    with pytest.raises(UserError, match="the epoch has no sample"):
        epoch_counts(tmp_path, [source(tmp_path, "a", 1, weight=0.1)])


def test_a_file_that_is_two_sources_counts_twice(tmp_path):
    """With two media folders, each source skips its own samples."""
    turns = [{"from": "human", "value": "<image>\nHm?"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": f"{i}", "image": f"{i}.png", "conversations": turns} for i in range(4)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    sources = []
    for folder, existing in (("one", [0, 1, 2]), ("two", [0])):
        (tmp_path / folder).mkdir()
        for i in existing:
            write_image(tmp_path / folder / f"{i}.png")
        path, media = str(tmp_path / "x.json"), str(tmp_path / folder)
        sources.append(read_source(SourceConfig(path=path, format="llava", media=media)))
    ledger = Ledger(tmp_path / "skipped.jsonl", sum(source.total for source in sources), 1.0)
    dataset = TrainDataset(sources, Encoder(tiny_processor()), ledger, seed=0)
    for i in range(len(dataset)):
        dataset[i]
    assert ledger.summary().startswith("4 of 8 samples skipped")
    skipped = Counter((entry.source, entry.id) for entry in read_ledger(ledger.path))
    x = f"{tmp_path}/x.json (data.train."
    assert skipped == Counter([(f"{x}0)", "3"), (f"{x}1)", "1"), (f"{x}1)", "2"), (f"{x}1)", "3")])
