"""A real pretrained language model: DoRA learns the answer format of commonsense questions in 20 steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_runs import command

MODEL = ROOT / "models" / "smollm2-135m-instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (MODEL / "config.json").is_file(),
        reason=f"needs {MODEL.relative_to(ROOT)}; examples/smollm2.py says how to make it",
    ),
]


def question(first: int, second: int) -> dict[str, str]:
    """Return a question in the form of LLM-Adapters' BoolQ, with its answer."""
    answer = "true" if first > second else "false"
    text = f"Please answer the following question with true or false, question: is {first} greater than {second}?"
    return {
        "instruction": f"{text}\n\nAnswer format: true/false",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def report(run: Path, name: str) -> dict:
    return json.loads((run / "eval" / name / "report.json").read_text())


def test_twenty_steps_of_dora_teach_the_answer_format(tmp_path, capsys):
    pairs = [(7 * i % 41, 11 * i % 37) for i in range(1, 201)]
    (tmp_path / "train.json").write_text(json.dumps([question(*pair) for pair in pairs[:180]]))
    (tmp_path / "test.json").write_text(json.dumps([question(*pair) for pair in pairs[180:]]))
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(
        f"""
model: {{path: {MODEL}, dtype: float32}}
parts:
  language:
    {{method: dora, rank: 16, alpha: 32, dropout: 0.05, targets: [q_proj, k_proj, v_proj, up_proj, down_proj]}}
data: {{train: [{{path: {tmp_path}/train.json, format: alpaca}}]}}
training: {{output: {run}, max_steps: 20, batch_size: 4, micro_batch_size: 4, learning_rate: 1.0e-3}}
evaluation:
  - {{name: boolq, benchmark: boolq, data: {tmp_path}/test.json, batch_size: 20, max_new_tokens: 8, before: true}}
"""
    )
    assert command("train", str(tmp_path / "run.yaml")) == 0
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = report(run, "before/boolq"), report(run, "boolq")
    with capsys.disabled():
        scores = [(entry["scores"]["official"]["value"], entry["unparsed_rate"]) for entry in (before, after)]
        print(f"\nloss {losses[0]:.2f} to {losses[-1]:.2f}; score and unparsed rate before and after: {scores}")
    assert losses[-1] < 0.3 * losses[0]
    assert before["unparsed_rate"] > after["unparsed_rate"] == 0
    assert command("merge", str(run), str(tmp_path / "merged")) == 0
    assert float(capsys.readouterr().out.split("difference")[1].split()[0]) < 1e-3
