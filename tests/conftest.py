"""Fixtures of all tests: the shipped tiny model, and files that the tests make themselves."""

from __future__ import annotations

import atexit
import gc
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

if "PYTEST_XDIST_WORKER" in os.environ:  # test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


# With several test processes these files start first, so that none of them is the last one to run.
LONGEST = ("test_zero", "test_resume", "test_scripts", "test_token_weighting", "test_evaluating", "test_bad_steps")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection: every full collection would visit their objects."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # otherwise libraries report their objects as leaked


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
