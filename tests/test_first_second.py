"""Invalid input is reported before torch, transformers or DeepSpeed are imported, with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmdora.core.registry import Registry
from mmdora.core.vision_encoders import VISION_ENCODERS
from tests.conftest import ROOT

TRAIN = ["train", "quickstart"]
CLIP = "model={vision_encoder: {type: %s, name: %s}, language_model: {path: %s}}"
RUN = """
model: {path: assets/tiny-llava}
parts: {language: {method: dora}}
data: {train: [{path: gone.json}]}
training: {output: OUT}
evaluation: [{name: counting, benchmark: vqa, data: gone.json}]
"""

# Name -> the command line, where {tmp} is the folder of the files below, and what the error must say.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (
        [*TRAIN, "parts.language.rnak=3"],
        ["quickstart.yaml is not a valid config", "parts.language.rnak: unknown key. Did you mean 'rank'?"],
    ),
    "invalid override": ([*TRAIN, "training.seed"], ["'training.seed' is not an override"]),
    "unknown config": (["train", "quikstart"], ["no config at 'quikstart'. Did you mean 'quickstart'?"]),
    "unknown method": ([*TRAIN, "parts.language.method=dorra"], ["parts.language.method", "Did you mean 'dora'?"]),
    "setting of another method": (
        [*TRAIN, "parts.language.method=lora", "parts.language.magnitude_targets=all-linear"],
        ["parts.language.magnitude_targets: the method 'lora' has no such setting"],
    ),
    "missing generated data": ([*TRAIN, "data.train.0.path=missing.json"], ["data.train.0.path", "'missing.json'"]),
    "missing data": ([*TRAIN, "data.train=[gone.json]"], ["data.train.0.path: no such file 'gone.json'"]),
    "missing media": ([*TRAIN, "data.train.0.media=nowhere"], ["data.train.0.media: no such folder 'nowhere'"]),
    "unknown format": ([*TRAIN, "data.train.0.format=lava"], ["data.train.0.format", "Did you mean 'llava'?"]),
    "unknown reader": ([*TRAIN, "data.video.reader=decrod"], ["data.video.reader", "Did you mean 'decord'?"]),
    "unknown benchmark": ([*TRAIN, "evaluation.0.benchmark=vqaa"], ["evaluation.0.benchmark", "Did you mean 'vqa'?"]),
    "missing benchmark data": ([*TRAIN, "evaluation.0.data=gone.json"], ["evaluation.0.data", "'gone.json'"]),
    "unknown DeepSpeed config": ([*TRAIN, "training.deepspeed=zero9"], ["training.deepspeed: no such config 'zero9'"]),
    "invalid DeepSpeed JSON": (
        [*TRAIN, "training.deepspeed={tmp}/broken.json"],
        ["training.deepspeed: ", "broken.json is not valid JSON"],
    ),
    "missing template": (
        [*TRAIN, "model.chat_template=gone.jinja"],
        ["model.chat_template: no such file 'gone.jinja'"],
    ),
    "missing model": ([*TRAIN, "model.path=./nowhere"], ["model.path: no such directory './nowhere'"]),
    "folder without a model": ([*TRAIN, "model.path={tmp}/empty"], ["model.path: ", "has no config.json"]),
    "unknown vision encoder": (
        [*TRAIN, CLIP % ("clipp", "a/b", "a/b")],
        ["model.vision_encoder.type: unknown vision encoder 'clipp'. Did you mean 'clip'?"],
    ),
    "missing tower and language model": (
        [*TRAIN, CLIP % ("siglip", "./tower", "./lm")],
        ["model.vision_encoder.name: no such directory './tower'", "language_model.path: no such directory './lm'"],
    ),
    "existing run": (
        [*TRAIN, "training.output={tmp}/run"],
        ["run already holds a run; --resume continues it, --overwrite moves it aside"],
    ),
    "resume and overwrite": ([*TRAIN, "--resume", "--overwrite"], ["give one of them"]),
    "missing plugin": ([*TRAIN, "plugins=[no_such_plugin]"], ["plugins: cannot import 'no_such_plugin'"]),
    "all problems at once": (
        [*TRAIN, "parts.vision.method=dorra", "data.video.reader=decrod", "model.path=./nowhere"],
        ["parts.vision.method", "data.video.reader", "model.path"],
    ),
    "doctor": (["doctor", "quickstart", "evaluation.0.benchmark=vqaa"], ["evaluation.0.benchmark"]),
    "plan": (
        ["plan", "quickstart", "training.deepspeed=zero9", "--gpus", "1", "--gpu-memory", "1"],
        ["training.deepspeed: no such config 'zero9'"],
    ),
    "eval: unknown entry": (
        ["eval", "{tmp}/run", "--only", "countin"],
        ["--only countin: the run has no such entry. Did you mean 'counting'? Entries: counting"],
    ),
    "eval: missing data": (["eval", "{tmp}/run"], ["counting.data: no such file 'gone.json'"]),
    "eval: a model without a benchmark": (
        ["eval", "assets/tiny-llava"],
        ["assets/tiny-llava is not a run; give --benchmark NAME --data DIR --out DIR"],
    ),
    "eval: no --data": (["eval", "assets/tiny-llava", "--benchmark", "vqa"], ["--benchmark needs --data"]),
    "eval: no --out": (
        ["eval", "assets/tiny-llava", "--benchmark", "vqa", "--data", "{tmp}/answers.json"],
        ["assets/tiny-llava is not a run; give --out DIR"],
    ),
    "eval: unknown benchmark": (
        ["eval", "assets/tiny-llava", "--benchmark", "vqaa", "--data", "{tmp}", "--out", "{tmp}/new"],
        ["unknown benchmark 'vqaa'. Did you mean 'vqa'?"],
    ),
    "eval: missing model": (
        ["eval", "./nowhere", "--benchmark", "vqa", "--data", "{tmp}/answers.json", "--out", "{tmp}/new"],
        ["no such directory './nowhere'; give a run, an adapter directory, a model directory or a hub id"],
    ),
    "score: missing predictions": (
        ["score", "vqa", "--predictions", "gone.json", "--annotations", "{tmp}/answers.json"],
        ["--predictions: no such file 'gone.json'"],
    ),
    "score: missing annotations": (
        ["score", "vqa", "--predictions", "{tmp}/answers.json", "--annotations", "gone.json"],
        ["--annotations: no such file 'gone.json'"],
    ),
    "score: finished result": (
        ["score", "vqa", "--predictions", "x", "--annotations", "x", "--out", "{tmp}/result"],
        ["result holds a finished result; --overwrite replaces it"],
    ),
    "score: judge without --out": (
        ["score", "mmvet", "--predictions", "x", "--annotations", "x", "--verdicts", "x"],
        ["a judge needs --out"],
    ),
    "merge: output is not empty": (["merge", "{tmp}/run", "{tmp}"], ["is not empty; give a new directory"]),
    "merge: unfinished run": (["merge", "{tmp}/run", "{tmp}/new"], ["the run has no adapter yet"]),
    "merge: missing target": (["merge", "./nowhere", "{tmp}/new"], ["no such directory './nowhere'"]),
    "analyze: missing target": (["analyze", "./nowhere"], ["no such directory './nowhere'"]),
    "convert: missing checkpoint": (
        ["convert", "nowhere", "{tmp}/new", "--vision-tower", "a/b"],
        ["nowhere: no such directory"],
    ),
    "chat: missing image": (["chat", "assets/tiny-llava", "--image", "gone.png"], ["gone.png: no such file"]),
    "compare: missing result": (["compare", "gone", "gone"], ["gone: no such folder; give a result"]),
    "submit: missing result": (["submit", "gone", "--out", "{tmp}/new.json"], ["gone: no report.json"]),
    "submit: file exists": (["submit", "gone", "--out", "{tmp}/answers.json"], ["answers.json already exists"]),
    "leaderboard: missing result": (["leaderboard", "gone", "--html", "{tmp}/new.html"], ["gone: no such folder"]),
    "list: unknown kind": (["list", "adaptors"], ["cannot list 'adaptors'. Did you mean 'adapters'?"]),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    """The outcomes of all cases, from one process."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("empty", "run", "result"):
        (folder / name).mkdir()
    (folder / "run" / "config.yaml").write_text(RUN.replace("OUT", str(folder / "run")))
    (folder / "result" / "report.json").write_text("{}")
    (folder / "broken.json").write_text("{")
    (folder / "answers.json").write_text("[]")
    commands = {
        name: [argument.replace("{tmp}", str(folder)) for argument in command] for name, (command, _) in CASES.items()
    }
    worker = [sys.executable, str(Path(__file__).with_name("first_second_worker.py"))]
    done = subprocess.run(worker, input=json.dumps(commands), capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_invalid_input_is_reported_before_torch_is_imported(name, outcomes):
    outcome = outcomes[name]
    assert outcome["imported"] == []
    assert outcome["code"] == 2
    assert outcome["error"].startswith("error: ")
    for message in CASES[name][1]:
        assert message in outcome["error"]


def test_the_table_of_vision_encoders_is_what_their_modules_register():
    import mmdora.models  # noqa: F401  (registers them)

    for name, encoder in VISION_ENCODERS.items():
        assert encoder.__module__ == f"mmdora.models.vision_encoders.{'siglip' if name == 'siglip2' else name}"
    files = (ROOT / "mmdora" / "models" / "vision_encoders").glob("*.py")
    registered = [line for file in files for line in file.read_text().splitlines() if ".register(" in line]
    assert len([line for line in registered if line.startswith("@VISION_ENCODERS")]) == len(list(VISION_ENCODERS))


def test_a_built_in_entry_is_imported_when_it_is_looked_up(tmp_path, monkeypatch):
    (tmp_path / "built_in_entry.py").write_text(
        "from tests.test_first_second import REGISTRY\n\n\n@REGISTRY.register('one')\ndef entry(): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "one" in REGISTRY
    assert list(REGISTRY) == ["one"]
    assert "built_in_entry" not in sys.modules
    assert REGISTRY["one"].__module__ == "built_in_entry"


@pytest.mark.parametrize("registered_first", [False, True])
def test_a_second_entry_of_a_built_in_name_is_an_error(registered_first):
    registry: Registry = Registry("thing", built_in={"one": "somewhere.else"} if not registered_first else None)
    if registered_first:
        registry.register("one")(object())
    with pytest.raises(ValueError, match="thing 'one' is already registered"):
        registry.register("one")(object())


REGISTRY: Registry = Registry("thing", built_in={"one": "built_in_entry"})
