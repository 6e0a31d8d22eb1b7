"""docs/data.md: every example on the page is read and encoded."""

from __future__ import annotations

import re

import pytest
import yaml
from PIL import Image

from data_pipelines.dataset import TrainDataset
from data_pipelines.encoding import IGNORED, Encoder
from data_pipelines.formats import DATASET_FORMATS
from data_pipelines.ledger import Ledger
from data_pipelines.sources import read_source
from mmdora.core.config import DataConfig, SourceConfig
from mmdora.training.metrics import PIXELS
from tests.conftest import ROOT
from tests.conversations import tiny_processor

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:`([\w.]+)`:\n\n)?```(\w+)\n(.*?)```", re.DOTALL)
EXAMPLES = {section.split("\n")[0]: BLOCK.findall(section) for section in PAGE.split("\n## ")[1:]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The media that the page's examples name. Formats that an example registers are removed afterwards."""
    for name, color in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        Image.new("RGB", (48, 48), color).save(tmp_path / f"{name}.png")
    (tmp_path / "clip").mkdir()
    for frame in range(6):
        Image.new("RGB", (48, 48), (40 * frame, 0, 0)).save(tmp_path / "clip" / f"{frame}.png")
    monkeypatch.chdir(tmp_path)
    known = dict(DATASET_FORMATS._entries)
    yield tmp_path
    DATASET_FORMATS._entries.clear()
    DATASET_FORMATS._entries.update(known)


def run(blocks) -> list[SourceConfig]:
    """Write the files of the blocks, run their code, and return the entries of their YAML."""
    entries = []
    for name, language, text in blocks:
        if name:
            with open(name, "w", encoding="utf-8") as file:  # noqa: PTH123
                file.write(text)
        elif language == "python":
            exec(text, {})
        elif language == "yaml":
            tree = yaml.safe_load(text)
            entries += DataConfig(**tree["data"]).train if "data" in tree else [SourceConfig(**tree)]
    return entries


def test_every_format_has_an_example():
    assert set(DATASET_FORMATS) - {"nlvr", "shapes"} <= set(EXAMPLES)


@pytest.mark.parametrize("section", [s for s in EXAMPLES if s != "Mixtures"])
def test_an_example_is_read_and_encoded(section, folder):
    entries = run(EXAMPLES[section])
    assert entries
    for entry in entries:
        source = read_source(entry)
        assert source.rejected == []
        ledger = Ledger(folder / "skipped.jsonl", len(source), 0.0)
        dataset = TrainDataset([source], Encoder(tiny_processor()), ledger, seed=0)
        for i in range(len(dataset)):
            encoded = dataset[i]
            assert (encoded["labels"] != IGNORED).any()
            has_media = any(True for _ in dataset.sample(i).media())
            assert any(key in encoded for key in PIXELS) == has_media


def test_the_mixture_is_read(folder):
    sections = ("llava", "vqa", "Mixtures")
    *_, doubled, halved = run([block for section in sections for block in EXAMPLES[section]])
    assert (doubled.weight, halved.take) == (2.0, "random:50%")
    assert read_source(halved).total == 1
