"""Models by hub id: loading from the cache without a network, and the errors for models that cannot be loaded.

A local server stands in for the hub; nothing leaves this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from mmdora.core.config import ModelConfig
from mmdora.core.errors import UserError
from mmdora.models.loading import load_model
from tests.conftest import ROOT
from tests.tiny_models import write_language_model, write_tower

# Each line of the input is a model's config; each line of the output is the result of loading it.
LOAD = """
import functools, json, ssl, sys, time
time.sleep = lambda seconds: None  # the hub's client waits before it retries
ssl.create_default_context = functools.cache(ssl.create_default_context)  # it loads the certificates at every retry
from mmdora.core.config import ModelConfig
from mmdora.core.errors import UserError
from mmdora.models.loading import load_model

for line in sys.stdin:
    try:
        model, _ = load_model(ModelConfig.model_validate(json.loads(line)))
        result = f"loaded {model.lm_head.weight.flatten()[0].item():.3f}"
    except UserError as error:
        result = str(error)
    print("result", json.dumps(result), flush=True)
"""


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the hub that answers with a status and an error code by repository."""

    answers: ClassVar = {
        "gated/model": (401, "GatedRepo"),  # without a token
        "gated/other": (403, "GatedRepo"),  # with the token of an account without access
        "open/model": (404, "RevisionNotFound"),
        "closed/model": (403, ""),
    }

    def do_GET(self) -> None:
        known = [answer for name, answer in self.answers.items() if name in self.path]
        status, code = known[0] if known else (401, "RepoNotFound")
        if code == "GatedRepo" and self.path.startswith("/api/"):  # the metadata of a gated repository is public
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


def composed(tower: dict, language_model: str = "nobody/model") -> dict:
    return {"vision_encoder": tower, "language_model": {"path": language_model}, "dtype": "float32"}


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
RANDOM = {"type": "clip", "name": "random", "model_config": {**TOWER, "patch_size": 8}}
GATED = "it is gated; accept its licence at {}/gated/model and log in with `hf auth login` with the same account"
MISSING = "no such directory, and {}/nobody/model does not exist; check the spelling, or log in with `hf auth login`"
REFUSED: list[tuple[dict, str, str]] = [  # a config, the beginning of its error, and another part of it
    ({"path": "gated/model"}, "model.path: cannot load 'gated/model'", GATED),
    ({"path": "gated/other"}, "model.path: cannot load 'gated/other'", GATED.replace("model", "other")),
    ({"path": "nobody/model"}, "model.path: cannot load 'nobody/model'", MISSING),
    (
        {"path": "closed/model"},
        "model.path: cannot load 'closed/model'",
        "/closed/model is denied (status 403)",
    ),
    ({"path": "open/model", "revision": "v9"}, "model.path: cannot load 'open/model'", "no branch, tag or commit 'v9'"),
    (composed({"type": "clip", "name": "gated/model"}), "model.vision_encoder (clip): cannot load 'gated/", GATED),
    (
        composed({"type": "siglip", "name": "open/model", "pretrained": "v9"}),
        "model.vision_encoder (siglip): cannot load 'open/model'",
        "it has no branch, tag or commit 'v9'; {}/open/model lists them",
    ),
    (
        composed({"type": "open_clip", "name": "ViT-B-32", "pretrained": "openai"}),
        "model.vision_encoder (open_clip): cannot load ViT-B-32 with pretrained 'openai'",
        "{}/timm/vit_base_patch32_clip_224.openai does not exist; check the spelling",
    ),
    (composed(RANDOM, "gated/model"), "model.language_model.path (gated/model): cannot load it", GATED),
    (composed(RANDOM), "model.language_model.path (nobody/model): cannot load it", MISSING),
]


CLIP = {"type": "clip", "name": "org/clip", "pretrained": "v2"}
CACHED: list[dict] = [  # all of it, all of it at another revision, both halves; then what the cache lacks
    {"path": "org/name", "dtype": "float32"},
    {"path": "org/name", "dtype": "float32", "revision": "v1"},
    composed(CLIP, "org/llama"),
    {"path": "org/name", "revision": "v9"},
    composed(CLIP | {"pretrained": None}, "org/llama"),
    composed(CLIP, "org/gone"),
    {"path": "org/part"},
]


def write_cache(home: Path, name: str, revisions: dict[str, Path]) -> None:
    """Write a repository into huggingface_hub's cache; `revisions` maps a branch or tag to the folder of its files."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    for number, (revision, folder) in enumerate(revisions.items(), 1):
        commit = f"{number}" * 40
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit).symlink_to(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A cache with a model, whose `v1` has other weights, the halves of a composed model, and an incomplete model."""
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


@dataclass(frozen=True)
class Answers:
    endpoint: str
    refused: list[str]  # results for REFUSED, from the hub
    unreachable: list[str]  # results for CACHED, after the hub went away


@pytest.fixture(scope="module")
def answers(home) -> Answers:
    """Load REFUSED from a hub and then CACHED without it, in one process: huggingface_hub reads its URL at import."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment = inherited | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)}
    with (
        (home / "stderr").open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", LOAD],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):

        def load(configs: list[dict]) -> list[str]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.writelines(f"{json.dumps(config)}\n" for config in configs)
            process.stdin.flush()
            results: list[str] = []
            while len(results) < len(configs):
                line = process.stdout.readline()
                assert line, (home / "stderr").read_text()[-3000:]
                if line.startswith("result "):
                    results.append(json.loads(line.removeprefix("result ")))
            return results

        refused = load([config for config, _, _ in REFUSED])
        server.shutdown()
        server.server_close()
        return Answers(endpoint, refused, load(CACHED))


def test_an_error_of_the_hub_is_one_line_with_advice(answers):
    for (_, begins, contains), line in zip(REFUSED, answers.refused, strict=True):
        assert line.startswith(begins)
        assert contains.format(answers.endpoint) in line
        assert "\n" not in line


def check_cached(results: list[str], home: Path, reason: str) -> None:
    assert [line.partition(" ")[0] for line in results[:3]] == ["loaded"] * 3
    assert results[0] != results[1] == "loaded 7.000"
    for line, begins, fetch in zip(
        results[3:6],
        (
            "model.path: cannot load 'org/name'",
            "model.vision_encoder (clip): cannot load 'org/clip'",
            "model.language_model.path (org/gone): cannot load it",
        ),
        ("org/name --revision v9", "org/clip", "org/gone"),
        strict=True,
    ):
        assert line.startswith(begins)
        assert f"no such directory, and not in the cache ({home / 'hub'}), and {reason}; " in line
        assert f"run `hf download {fetch}` on a machine with network" in line
        assert "\n" not in line
    assert results[6].startswith("model.path: cannot load 'org/part' as an image-text-to-text model: ")
    assert results[6].endswith("; `hf download org/part` downloads files that the cache may lack")


def test_the_cache_serves_when_the_hub_does_not_answer(answers, home):
    check_cached(answers.unreachable, home, f"{answers.endpoint} does not answer")


def test_the_cache_serves_in_offline_mode(home, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))

    def load(config: dict) -> str:
        try:
            model, _ = load_model(ModelConfig.model_validate(config))
        except UserError as error:
            return str(error)
        return f"loaded {model.lm_head.weight.flatten()[0].item():.3f}"

    check_cached([load(config) for config in CACHED], home, "HF_HUB_OFFLINE is set")
