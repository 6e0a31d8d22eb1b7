"""GQA (eval.py of its eval.zip)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from eval.benchmarks import BENCHMARKS
from eval.scoring import make_report, score_all
from mmdora.core.config import EvaluationConfig
from tests.official import official

BREAKDOWNS = {
    "structural": "structural type",
    "semantic": "semantic type",
    "steps": "steps number",
    "words": "words number",
}


@official("gqa", "llava_normalise")
def normalised(text):
    return BENCHMARKS["gqa"]().prediction(text)


@official("gqa", "dataset")
def dataset(case):
    """Score like the official script: from files in a folder, predictions in its format, two decimals."""
    benchmark = BENCHMARKS["gqa"]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "val_all_questions.json").write_text(json.dumps(case["questions"]))
        (folder / "predictions.json").write_text(json.dumps(case["predictions"]))
        if case["choices"] is not None:
            (folder / "val_choices.json").write_text(json.dumps(case["choices"]))
        config = EvaluationConfig(name="gqa", benchmark="gqa", data=name, split="val_all")
        questions = benchmark.questions(config)
        responses = dict(benchmark.read_predictions(folder / "predictions.json", questions))
        scored = questions if case["consistency"] else [q for q in questions if q.details["balanced"]]
        if any(q.id not in responses for q in scored):
            return {"error": "missing predictions"}
        report = make_report(config, responses, scored, score_all("gqa", responses, scored), {})
    if "distribution" not in report["metrics"]:  # no question is in a group
        return {"error": "ZeroDivisionError"}
    return _printed(report, case["consistency"])


def _printed(report, with_consistency):
    """Return what the official script prints: 0.00 for a figure that it cannot compute."""
    kinds = {kind: report["categories"].get(f"kind: {kind}", {"value": 0.0})["value"] for kind in ("binary", "open")}
    figures = {**kinds, "accuracy": report["scores"]["official"]["value"]}
    for key in ("consistency", "validity", "plausibility", "distribution"):
        figures[key] = report["metrics"].get(key, 0.0)
    if not with_consistency:
        del figures["consistency"]
    found = {key: round(value, 2) for key, value in figures.items()}
    for kind, title in BREAKDOWNS.items():
        chosen = {k: v for k, v in report["categories"].items() if k.startswith(f"{kind}: ")}
        found[f"Accuracy / {title}"] = {
            key.removeprefix(f"{kind}: "): [round(figure["value"], 2), figure["n"]] for key, figure in chosen.items()
        }
    return found
