"""docs/evaluation.md: its commands are those of the command line, and its recipe's own part runs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from types import ModuleType, SimpleNamespace

import pytest
import typer

from mmdora.cli import app
from tests.conftest import ROOT
from tests.media import write_image
from tests.test_runs import command

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
LINE = re.compile(r"^    (?:torchrun .* )?((?:mmdora|-m mmdora\.cli) .*)$", re.MULTILINE)
COMMANDS = [line.partition("  #")[0] for line in LINE.findall(PAGE)]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_can_be_given(line):
    known = typer.main.get_command(app).commands
    name, *arguments = shlex.split(line.removeprefix("-m mmdora.cli").removeprefix("mmdora"))
    if name not in known:
        pytest.skip(f"{name} is not there yet")
    known[name].make_context(name, arguments)


class Silent:
    """In place of vLLM's model, which answers each prompt with its number of tokens."""

    def __init__(self, path, limit_mm_per_prompt):
        assert path == "merged"

    def generate(self, prompts, settings):
        assert settings.max_tokens == 16
        said = [f" {len(p['prompt_token_ids'])} {len(p['multi_modal_data']['image'])}" for p in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text)]) for text in said]


def test_what_the_vllm_recipe_asks_of_us_is_there(tmp_path, monkeypatch):
    """vLLM itself is not installed here: the recipe is marked untested."""
    write_image(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = Silent, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").symlink_to(ROOT / "assets" / "tiny-llava")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code.replace('"vqav2"', '"vqa"').replace('data="DIR"', 'data="data.json"'), {})
    (line,) = (tmp_path / "responses.jsonl").read_text().splitlines()
    assert re.fullmatch(r"\d\d 1", json.loads(line)["response"])
    assert command("score", "vqa", "--predictions", "responses.jsonl", "--annotations", "data.json") == 0
