"""Settings of a benchmark take effect or are refused."""

from __future__ import annotations

import json

import pytest

from data_pipelines.samples import Image, Text
from eval.benchmarks import BENCHMARKS
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError

OWN = ("vqa", "exact_match", "multiple_choice", "caption")
ROW = {
    "id": "a",
    "image": ["0.png", "1.png"],
    "conversations": [
        {"from": "human", "value": "<image> and <image>\nWhich?\nA. cat\nB. dog"},
        {"from": "gpt", "value": "A"},
        {"from": "human", "value": "Surely?\nA. yes\nB. no"},
        {"from": "gpt", "value": "B"},
    ],
}


def config(benchmark: str, data="x", **keys) -> EvaluationConfig:
    return EvaluationConfig(name="b", benchmark=benchmark, data=str(data), **keys)


@pytest.mark.parametrize("name", OWN)
def test_a_prompt_is_applied_to_questions_of_ones_own_data(name, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROW]))
    plain, prompted = (
        BENCHMARKS[name]().questions(config(name, path, **keys)) for keys in ({}, {"prompt": "Say: {question}!"})
    )
    assert [q.id for q in prompted] == ["a/0", "a/1"]
    text = "Which?\nA. cat\nB. dog"
    kinds = [type(part) for part in plain[0].sample.messages[-1].parts]
    assert kinds == [Image, Text, Image, Text]
    assert plain[0].sample.messages[-1].parts[-1] == Text(text)
    assert prompted[0].sample.messages[-1].parts == (*plain[0].sample.messages[-1].parts[:-1], Text(f"Say: {text}!"))
    assert prompted[1].sample.messages[-1].text == "Say: Surely?\nA. yes\nB. no!"
    assert prompted[1].sample.messages[:-1] == plain[1].sample.messages[:-1]  # earlier turns are unchanged
    assert [q.references for q in prompted] == [q.references for q in plain]


def test_a_prompt_can_complete_a_question_that_is_only_an_image(tmp_path):
    path = tmp_path / "rows.json"
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "cat"}]
    path.write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": turns}]))
    (q,) = BENCHMARKS["vqa"]().questions(config("vqa", path, prompt="{question}What is it?"))
    assert q.sample.messages[-1].text == "What is it?"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("What?", "has no {question}"),
        ("{question} {options}", "unknown field {options}"),
        ("{question} {", "write a literal brace"),
    ],
)
def test_an_invalid_prompt_is_refused(prompt, message, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROW]))
    with pytest.raises(UserError, match=message):
        BENCHMARKS["vqa"]().questions(config("vqa", path, prompt=prompt))


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_a_setting_without_effect_is_refused(name):
    benchmark = BENCHMARKS[name]()
    benchmark.check_settings(config(name))
    given = {"split": "val", "format": "llava", "media": "images", "where": {"kind": ["a"]}}
    used = {*benchmark.settings, *(["split"] if benchmark.splits else [])}
    assert used == {"media", "format", "where"} if name in OWN else not used & {"format"}
    for key, value in given.items():
        if key in used:
            benchmark.check_settings(config(name, **{key: value}))
        else:
            with pytest.raises(UserError, match=f"{key}: not supported by the benchmark {name!r}"):
                benchmark.check_settings(config(name, **{key: value}))
