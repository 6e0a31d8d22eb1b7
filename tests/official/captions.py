"""COCO's caption metrics (pycocoevalcap 1.2), and TVC and YC2C, which use them (VALUE-Leaderboard/EvaluationTools)."""

from __future__ import annotations

import atexit
import json
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from eval.benchmarks import BENCHMARKS
from eval.benchmarks.captions import corpus_metrics
from eval.captions import bleu, cider, rouge_l
from eval.captions_java import meteor_process, tokenize
from mmdora.core.config import EvaluationConfig
from tests.official import official


@cache
def meteor():
    """Return one process for all cases, since it takes seconds to start."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(meteor_process())


def metrics(references, captions):
    values, by_order = bleu(references, captions)
    by_image = {
        "Bleu_per_image": [list(order) for order in zip(*by_order, strict=True)],
        "CIDEr_per_image": cider(references, captions),
        "ROUGE_L_per_image": rouge_l(references, captions),
    }
    found = {name: sum(by_image[f"{name}_per_image"]) / len(captions) for name in ("CIDEr", "ROUGE_L")}
    found["METEOR"], by_image["METEOR_per_image"] = meteor().score(references, captions)
    return {"Bleu": values} | found | by_image


@official("cider", "ptb_tokenize")
def ptb_tokenize(caption):
    return tokenize([caption])[0]


@official("cider", "pretokenized", tolerance=1e-6, optional=("METEOR", "METEOR_per_image"))
def pretokenized(case):
    return metrics(list(case["refs"].values()), [caption for (caption,) in case["hyps"].values()])


@official("cider", "raw_captions", tolerance=1e-6)
def raw_captions(case):
    flat = iter(tokenize([caption for captions in case["refs"].values() for caption in captions]))
    references = [[next(flat) for _ in captions] for captions in case["refs"].values()]
    captions = tokenize([caption for (caption,) in case["hyps"].values()])
    tokenized = {key: [caption] for key, caption in zip(case["hyps"], captions, strict=True)}
    return metrics(references, captions) | {"tokenized_hyps": tokenized}


@official("tvc_yc2c", "dataset")
def video_captions(case):
    """Score from files in VALUE's format."""
    benchmark = BENCHMARKS["tvc"]()
    with TemporaryDirectory() as folder:
        annotations, predictions = Path(folder, "tvc_val_release.jsonl"), Path(folder, "tvc_val_predictions.jsonl")
        annotations.write_text("\n".join(map(json.dumps, case["gt_jsonl"])))
        predictions.write_text("\n".join(map(json.dumps, case["submission_jsonl"])))
        questions = benchmark.questions(EvaluationConfig(name="tvc", benchmark="tvc", data=folder))
        responses = dict(benchmark.read_predictions(predictions, questions))
    figures = corpus_metrics(benchmark.tokenized(responses, questions), meteor())
    return {name: float(f"{100 * value:.2f}") for name, value in figures.items()}
