"""Measure the leaderboard page: built by `mmdora leaderboard`, opened and filtered in headless Chromium.

    python benchmarks/leaderboard.py --out benchmarks/results/leaderboard.json

Answers are random, over questions with images of 640 × 480 pixels; the statistics are computed at VQAv2's size. In the
browser, `first_render` is the time from the start of the navigation to the first contentful paint, and `ready` the time
from opening a tab until the page's script has run. `filter` and `search` are the time from one change of a control to
the next frame: the median of ten, and the maximum. The first search also builds the search index.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from browser import Browser, Page
from machine import about_machine
from PIL import Image as PILImage

sys.path.remove(str(Path(__file__).parent))  # else eval.py in this folder would shadow the package `eval`

from data_pipelines.samples import Image, Message, Sample, Text
from eval.benchmarks import Question
from eval.metrics import cluster_bootstrap
from eval.scoring import make_report, score_all, write_results
from mmdora.cli.leaderboard import leaderboard
from mmdora.core.config import EvaluationConfig

WORDS = ("kitchen", "street", "table", "woman", "red", "blue", "cat", "dog", "left", "right", "under", "holding", "two")
CHANGE = """new Promise(done => {
  const control = document.getElementById(%s), start = performance.now();
  control.value = %s;
  control.dispatchEvent(new Event(%s));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
})"""


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def make_results(folder: Path, models: int, count: int, num_images: int) -> None:
    rng = np.random.default_rng(0)
    (folder / "media").mkdir()
    for i in range(num_images):
        coarse = PILImage.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        coarse.resize((640, 480), PILImage.Resampling.BICUBIC).save(folder / "media" / f"{i}.jpg")
    questions = []
    for i in range(count):
        path = folder / "media" / f"{i % num_images}.jpg"
        sample = Sample(f"q{i}", (Message("user", (Image(path), Text(f"{sentence(rng, 9)}?"))),), "random")
        questions.append(Question(sample.id, sample, ("yes",), str(path), (WORDS[i % 12],)))
    config = EvaluationConfig(name="random", benchmark="vqa", data=str(folder))
    for model in range(models):
        responses = {q.id: "yes" if rng.random() < 0.6 + model / 50 else sentence(rng, 12) for q in questions}
        scores = score_all("vqa", responses, questions)
        receipt = {"target": f"model-{model}", "weights": str(model), "prompt_template": "{question}"}
        write_results(
            folder / str(model),
            responses,
            questions,
            scores,
            make_report(config, responses, questions, scores, receipt),
        )


def change(page: Page, control: str, value: str, event: str) -> float:
    """Return the milliseconds from a change of a control to the next frame."""
    return page.run(CHANGE % tuple(json.dumps(text) for text in (control, value, event)))


def in_browser(address: str) -> dict[str, float]:
    with Browser.start() as browser:
        start = time.perf_counter()
        page = browser.open(address)
        ready = 1000 * (time.perf_counter() - start)
        painted = page.run("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null")
        first = change(page, "search", "kitchen", "input")
        searches = [change(page, "search", word, "input") for word in WORDS[:10]]
        page.run("document.getElementById('search').value = ''")
        filters = [
            change(page, "show", value, "change") for value in ("differ", "wrong-0", "only-1", "right", "all") * 2
        ]
        count = page.run("document.getElementById('count').textContent")
        assert count.endswith("questions"), count
    return {
        "first_render_ms": painted,
        "ready_ms": ready,
        "first_search_ms": first,
        "search_ms": statistics.median(searches),
        "search_worst_ms": max(searches),
        "filter_ms": statistics.median(filters),
        "filter_worst_ms": max(filters),
    }


def statistics_of_vqav2() -> dict[str, float]:
    """Return the seconds for one figure over 214,354 questions on 40,504 images, and the process's peak memory."""
    rng = np.random.default_rng(0)
    clusters = [str(i) for i in rng.integers(40_504, size=214_354)]
    values = rng.random(214_354).tolist()
    start = time.perf_counter()
    cluster_bootstrap(values, clusters)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    figure = statistics_of_vqav2()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_results(folder, arguments.models, arguments.questions, arguments.images)
        page = folder / "page.html"
        start = time.perf_counter()
        leaderboard([str(folder / str(i)) for i in range(arguments.models)], page)
        build = time.perf_counter() - start
        return {
            **about_machine(),
            "models": arguments.models,
            "questions": arguments.questions,
            "build_seconds": build,
            "page_mib": page.stat().st_size / 2**20,
            "browser": in_browser(page.as_uri()),
            "figure_of_vqav2": figure,
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(run(arguments), indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
