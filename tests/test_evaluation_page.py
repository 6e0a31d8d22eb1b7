"""docs/evaluation.md: the command line accepts its commands, and our part of its vLLM recipe runs."""

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
def test_the_command_line_accepts_the_commands_of_the_page(line):
    known = typer.main.get_command(app).commands
    name, *arguments = shlex.split(line.removeprefix("-m mmdora.cli").removeprefix("mmdora"))
    if name not in known:
        pytest.skip(f"{name} does not exist yet")
    known[name].make_context(name, arguments)


class FakeLLM:
    """A stand-in for vLLM's model that answers each prompt with its numbers of tokens and images."""

    def __init__(self, path, limit_mm_per_prompt):
        assert path == "merged"

    def generate(self, prompts, settings):
        assert settings.max_tokens == 16
        texts = [f" {len(p['prompt_token_ids'])} {len(p['multi_modal_data']['image'])}" for p in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text)]) for text in texts]


def test_our_part_of_the_vllm_recipe_runs(tmp_path, monkeypatch):
    """vLLM itself is not installed, and the recipe is marked untested."""
    write_image(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = FakeLLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merged").symlink_to(ROOT / "assets" / "tiny-llava")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code.replace('"vqav2"', '"vqa"').replace('data="DIR"', 'data="data.json"'), {})
    (line,) = (tmp_path / "responses.jsonl").read_text().splitlines()
    assert re.fullmatch(r"\d\d 1", json.loads(line)["response"])
    assert command("score", "vqa", "--predictions", "responses.jsonl", "--annotations", "data.json") == 0
