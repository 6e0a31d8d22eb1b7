"""Fixtures of all tests: the shipped tiny model, and files that the tests make themselves."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["MMDORA_CACHE"] = tempfile.mkdtemp(prefix="mmdora-tests-")  # indexes of files that tests make
atexit.register(shutil.rmtree, os.environ["MMDORA_CACHE"], ignore_errors=True)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def no_launcher() -> Iterator[None]:
    """Remove the launcher's variables after each test: `prepare_deepspeed_config` sets them for its whole process."""
    yield
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the shapes world; each test's files are made when it first asks for them."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture
def tiny():
    """(model, processor) of the shipped base, in fp32, fresh for each test."""
    from mmdora.core.config import ModelConfig
    from mmdora.models.loading import load_model

    torch.manual_seed(0)
    return load_model(ModelConfig(path="assets/tiny-llava", dtype="float32"))


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs the project's shared data beside the checkout")
    return SHARED
