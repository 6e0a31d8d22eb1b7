"""NExT-QA (doc-doc/NExT-QA, eval_mc.py) and NExT-OE (doc-doc/NExT-OE, eval_oe.py, metrics.py)."""

from __future__ import annotations

from data_pipelines.samples import Sample
from eval.benchmarks.base import Question
from eval.benchmarks.nextqa import TYPES, open_score, wups
from eval.options import LETTERS
from eval.scoring import score_all
from tests.official import official


def percent(values):
    return round(100 * sum(values) / len(values), 2)


@official("nextqa", "mc")
def multiple_choice(case):
    rows = [(f"{video}_{qid}", kind) for video, qid, kind in case["rows_video_qid_type"]]
    predictions, options = case["predictions"], ["", " ", "  ", "   ", "    "]
    questions = [
        Question(key, Sample(key, (), "t"), (LETTERS[predictions[key]["answer"]],), key, (), {"options": options})
        for key, _ in rows
    ]
    scores = score_all("nextqa", {key: LETTERS[p["prediction"]] for key, p in predictions.items()}, questions)
    groups: dict[str, list[float]] = {name: [] for name in TYPES.values() if name != "Yes/No"}
    groups |= {"Acc_C": [], "Acc_T": [], "Acc_D": []}
    for key, kind in rows:
        for name in (TYPES[kind], f"Acc_{kind[0]}"):
            groups[name].append(scores[key].official)
    return {
        "groups": {name: percent(values) for name, values in groups.items()},
        "acc": percent([scores[key].official for key, _ in rows]),
    }


@official("nextqa", "wups", tolerance=1e-12)
def words(case):
    return {f"wups{threshold}": wups(case["pred"], case["truth"], threshold) for threshold in (0, 0.9)}


@official("nextqa", "oe_dataset(lemmatizer=lower().split())")
def open_ended(case):
    groups: dict[str, list[float]] = {}
    for video, qid, kind, _, answer in case["rows_video_qid_type_question_answer"]:
        kind = "TN" if kind == "TP" else kind
        further = case["additional_refs"].get(video, {}).get(str(qid))
        references = (answer,) if further is None else (answer, further)
        question = Question("q", Sample("q", (), "t"), references, "c", (), {"type": kind})
        value = open_score(case["predictions"][video][str(qid)], question, lemmatize=lambda text: text.lower().split())
        for name in ("TPN" if kind == "TN" else kind, f"WUPS_{kind[0]}", "WUPS"):
            groups.setdefault(name, []).append(value)
    return {name: percent(values) for name, values in groups.items()}
