"""Models by their names on the hub: from its cache without a network, and what is said where they cannot be had.

A server of our own answers as the hub does; nothing leaves this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.tiny_models import write_language_model, write_tower

NOBODY = "http://127.0.0.1:9"  # where nothing answers
# Each line of the input a model's config; each line of the output what loading it says.
LOAD = """
import json, sys, time
time.sleep = lambda seconds: None  # the hub's client waits before it asks again
from mmdora.core.config import ModelConfig
from mmdora.core.errors import UserError
from mmdora.models.loading import load_model

for line in sys.stdin:
    try:
        model, _ = load_model(ModelConfig.model_validate(json.loads(line)))
        print("said", json.dumps(f"loaded {model.lm_head.weight.flatten()[0].item():.3f}"))
    except UserError as error:
        print("said", json.dumps(str(error)))
"""


class Hub(BaseHTTPRequestHandler):
    """The hub's answers to whoever asks for the files of a repository: status and error code, by its name."""

    answers: ClassVar = {
        "gated/model": (401, "GatedRepo"),  # without a token
        "gated/other": (403, "GatedRepo"),  # with a token of someone who may not
        "open/model": (404, "RevisionNotFound"),
        "closed/model": (403, ""),
    }

    def do_GET(self) -> None:
        known = [answer for name, answer in self.answers.items() if name in self.path]
        status, code = known[0] if known else (401, "RepoNotFound")
        if code == "GatedRepo" and self.path.startswith("/api/"):  # what a gated repository is, anyone may know
            status, code = 200, ""
        body = b"{}" if status == 200 else b""
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "Access to it is restricted.")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def load(configs: list[dict], cache: Path, **environment: str) -> list[str]:
    """What loading each of them says, in a process of its own: huggingface_hub reads its settings at import."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        input="\n".join(map(json.dumps, configs)),
        env=inherited | {"HF_HOME": str(cache), "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = [json.loads(line.removeprefix("said ")) for line in done.stdout.splitlines() if line.startswith("said ")]
    assert len(said) == len(configs), done.stderr
    return said


def composed(tower: dict, language_model: str = "nobody/model") -> dict:
    return {"vision_encoder": tower, "language_model": {"path": language_model}, "dtype": "float32"}


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
RANDOM = {"type": "clip", "name": "random", "model_config": {**TOWER, "patch_size": 8}}
GATED = "it is gated; accept its licence at {}/gated/model and log in with `hf auth login`"
MISSING = "there is no such directory, and no {}/nobody/model; check the spelling, or log in with `hf auth login`"
REFUSED: list[tuple[dict, str, str]] = [  # what the config names, and how the one line begins and goes on
    ({"path": "gated/model"}, "model.path: cannot load 'gated/model'", GATED),
    ({"path": "gated/other"}, "model.path: cannot load 'gated/other'", GATED.replace("model", "other")),
    ({"path": "nobody/model"}, "model.path: cannot load 'nobody/model'", MISSING),
    (
        {"path": "closed/model"},
        "model.path: cannot load 'closed/model'",
        "/closed/model may not be read (status 403)",
    ),
    ({"path": "open/model", "revision": "v9"}, "model.path: cannot load 'open/model'", "no branch, tag or commit 'v9'"),
    (composed({"type": "clip", "name": "gated/model"}), "model.vision_encoder (clip): cannot load 'gated/", GATED),
    (
        composed({"type": "siglip", "name": "open/model", "pretrained": "v9"}),
        "model.vision_encoder (siglip): cannot load 'open/model'",
        "it has no branch, tag or commit 'v9'; {}/open/model shows those that it has",
    ),
    (
        composed({"type": "open_clip", "name": "ViT-B-32", "pretrained": "openai"}),
        "model.vision_encoder (open_clip): cannot load ViT-B-32 with pretrained 'openai'",
        "no {}/timm/vit_base_patch32_clip_224.openai; check the spelling",
    ),
    (composed(RANDOM, "gated/model"), "model.language_model.path (gated/model): cannot load it", GATED),
    (composed(RANDOM), "model.language_model.path (nobody/model): cannot load it", MISSING),
]


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub, tmp_path):
    said = load([config for config, _, _ in REFUSED], tmp_path, HF_ENDPOINT=hub)
    for (_, begins, holds), line in zip(REFUSED, said, strict=True):
        assert line.startswith(begins)
        assert holds.format(hub) in line
        assert "\n" not in line


def write_cache(home: Path, name: str, revisions: dict[str, Path]) -> None:
    """A repository in huggingface_hub's cache: by revision, a folder whose files it has."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    for number, (revision, folder) in enumerate(revisions.items(), 1):
        commit = f"{number}" * 40
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit).symlink_to(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A cache: a whole model, of which `v1` has other weights; the halves of a composed one; and a part of a model."""
    home = tmp_path_factory.mktemp("home")
    base, other = ROOT / "assets" / "tiny-llava", home / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).symlink_to(file)
    tensors = load_file(base / "model.safetensors")
    (head,) = (name for name in tensors if "embed_tokens" in name)
    tensors[head][0, 0] = 7.0
    (other / "model.safetensors").unlink()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    write_cache(home, "org/name", {"main": base, "v1": other})
    write_cache(home, "org/llama", {"main": write_language_model(home / "llama", "llama")})
    write_cache(home, "org/clip", {"v2": write_tower(home / "clip", "clip")})
    (home / "part").mkdir()
    (home / "part" / "config.json").symlink_to(base / "config.json")
    write_cache(home, "org/part", {"main": home / "part"})
    return home


@pytest.mark.parametrize("network", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOBODY}], ids=["offline", "no network"])
def test_without_a_network_the_cache_serves(network, home):
    clip = {"type": "clip", "name": "org/clip", "pretrained": "v2"}
    said = load(
        [
            {"path": "org/name", "dtype": "float32"},
            {"path": "org/name", "dtype": "float32", "revision": "v1"},
            composed(clip, "org/llama"),
            {"path": "org/name", "revision": "v9"},
            composed(clip | {"pretrained": None}, "org/llama"),
            composed(clip, "org/gone"),
            {"path": "org/part"},
        ],
        home,
        **network,
    )
    assert [line.partition(" ")[0] for line in said[:3]] == ["loaded"] * 3
    assert said[0] != said[1] == "loaded 7.000"
    why = "HF_HUB_OFFLINE is set" if "HF_HUB_OFFLINE" in network else f"{NOBODY} does not answer"
    for line, begins, fetch in zip(
        said[3:6],
        (
            "model.path: cannot load 'org/name'",
            "model.vision_encoder (clip): cannot load 'org/clip'",
            "model.language_model.path (org/gone): cannot load it",
        ),
        ("org/name --revision v9", "org/clip", "org/gone"),
        strict=True,
    ):
        assert line.startswith(begins)
        assert f"there is no such directory, nor is it in the cache ({home / 'hub'}), and {why}; " in line
        assert f"run `hf download {fetch}` where there is a network" in line
        assert "\n" not in line
    assert said[6].startswith("model.path: cannot load 'org/part' as an image-text-to-text model: ")
    assert said[6].endswith("; `hf download org/part` gets what the cache may lack")
