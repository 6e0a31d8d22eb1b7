"""docs/scaling.md: its commands parse, and every key of the DeepSpeed JSONs is documented; two nodes on one machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmdora.core.config_files import load_config
from mmdora.core.deepspeed import prepare_deepspeed_config, read_deepspeed_config
from mmdora.core.errors import UserError
from mmdora.training.arguments import training_arguments
from tests.conftest import ROOT
from tests.grid import free_port
from tests.test_runs import command, small

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
SHIPPED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
LINES = re.findall(r"^    ((?:mmdora|torchrun|deepspeed|MMDORA_NVME).*)$", PAGE, re.MULTILINE)
linux = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")


def keys(tree: dict) -> set[str]:
    return set(tree) | {key for value in tree.values() if isinstance(value, dict) for key in keys(value)}


def test_every_key_of_the_jsons_is_documented():
    assert {p.stem for p in SHIPPED} == {
        "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme"
    }  # fmt: skip
    used = set().union(*(keys(json.loads(path.read_text())) for path in SHIPPED))
    documented = set(re.findall(r"^\| `(\w+)` \|", PAGE.split("## Every key")[1], re.MULTILINE))
    assert used == documented
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE.split("## Which one")[1].split("##")[0], re.MULTILINE))
    assert listed == {p.stem for p in SHIPPED} | {"null"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_each_json_matches_its_name(path):
    tree = json.loads(path.read_text())
    zero, name = tree["zero_optimization"], path.stem
    assert zero["stage"] == int(name[4])
    device = {"offload": "cpu", "nvme": "nvme"}.get(name.partition("_")[2])
    assert zero.get("offload_optimizer", {}).get("device") == device
    assert zero.get("offload_param", {}).get("device") == (device if zero["stage"] == 3 else None)
    assert "optimizer" not in tree  # DeepSpeed would compile its own optimizer
    assert tree["zero_force_ds_cpu_optimizer"] is False


def check_start(words: list[str]) -> None:
    """Check what follows the launcher's arguments: a command or train.py, an existing config, valid settings."""
    if words[0] == "mmdora":
        words = words[1:]
    else:
        assert words[0] == "train.py"
    settings = [word for word in words[2:] if re.match(r"[a-z_]+(\.\w+)+=", word)]
    load_config(words[1], settings)


@linux
@pytest.mark.parametrize("line", LINES)
def test_every_command_parses(line):
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    words = [word for word in shlex.split(line) if not word.startswith("MMDORA_NVME=")]
    launcher, arguments = words[0], words[1:]
    if launcher == "torchrun":
        parsed = get_args_parser().parse_args(arguments)
        check_start([parsed.training_script, *parsed.training_script_args])
    elif launcher == "deepspeed":
        parsed = parse_args(arguments)
        check_start([parsed.user_script, *parsed.user_args])
    else:
        check_start(words)


def test_there_are_commands_for_every_launcher():
    assert {line.split()[0] for line in LINES} >= {"mmdora", "torchrun", "deepspeed"}
    assert any("--hostfile" in line for line in LINES)
    assert any("--nnodes" in line for line in LINES)


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo head; echo other; else echo "$@" >> requeued; fi',
    "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@"; done; exit ${STATUS:-0}',
    "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> started',
}


@linux
def test_the_slurm_script(tmp_path):
    """With stubs for Slurm's commands, bash starts one process per task, resumes, and requeues the job."""
    script = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1]
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}

    def submit(**more: str) -> list[str]:
        for name in ("started", "requeued"):
            (tmp_path / name).unlink(missing_ok=True)
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment | more, check=False)
        return (tmp_path / "started").read_text().splitlines()

    run = tmp_path / "runs" / "llava-1.5-7b_dora_instruct"
    started = submit()
    assert [line.split()[:5] for line in started] == [[str(i), str(i), "2", "head", "20007"] for i in (0, 1)]
    words = started[0].split()[5:]
    check_start(words)
    assert "--resume" not in words
    assert load_config(words[1], words[2:]).training.output == str(run.relative_to(tmp_path))
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"  # stopped before the run was complete
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    assert submit()[0].split()[-1] == "--resume"
    submit(STATUS="2")
    assert not (tmp_path / "requeued").exists()
    (run / "adapter").mkdir()
    submit()
    assert not (tmp_path / "requeued").exists()


def test_configs_are_read_without_importing_torch():
    """So that the command line can check `training.deepspeed` at once."""
    code = """
import sys
from mmdora.core.deepspeed import read_deepspeed_config
assert read_deepspeed_config("zero2")[1]["zero_optimization"]["stage"] == 2
assert not {"torch", "transformers", "deepspeed"} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such config.*Shipped configs: zero1"), ("{", "is not valid JSON"), ("[]", "must hold a JSON object")],
)
def test_a_config_that_cannot_be_read_is_an_error(tmp_path, content, message):
    path = tmp_path / "own.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"training\.deepspeed: .*{message}"):
        read_deepspeed_config(str(path))


@linux
def test_nvme_offload_needs_a_folder_and_async_io(tmp_path, monkeypatch):
    """Both errors come before the model is loaded."""
    monkeypatch.delenv("MMDORA_NVME", raising=False)
    with pytest.raises(UserError, match="set MMDORA_NVME to a folder"):
        prepare_deepspeed_config("zero3_nvme")
    monkeypatch.setenv("MMDORA_NVME", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="there is no such folder"):
        prepare_deepspeed_config("zero3_nvme")
    monkeypatch.setenv("MMDORA_NVME", str(tmp_path))
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        monkeypatch.setattr(AsyncIOBuilder, "load", lambda self, verbose: None)
        zero = prepare_deepspeed_config("zero3_nvme")["zero_optimization"]
        assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"] == str(tmp_path)
        monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(UserError, match=r"async_io.*libaio-dev"):
        prepare_deepspeed_config("zero3_nvme")
    assert read_deepspeed_config("zero3_nvme")[1]["zero_optimization"]["offload_param"]["nvme_path"] == "${MMDORA_NVME}"


@linux
def test_ema_of_weights_on_nvme_is_an_error(tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setenv("MMDORA_NVME", str(tmp_path))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    monkeypatch.setattr(AsyncIOBuilder, "load", lambda self, verbose: None)
    config = load_config("quickstart", ["training.deepspeed=zero3_nvme", "training.ema=0.9"])
    with pytest.raises(UserError, match=r"training\.ema: cannot average weights that are offloaded to NVMe"):
        training_arguments(config, tmp_path)


def start(arguments: list[str], launcher: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "torch.distributed.run", *launcher, "train.py", *arguments]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]


@linux
@pytest.mark.slow
def test_two_nodes_train_like_one_process(world, tmp_path):
    """Two launchers with one rendezvous, as on two machines: ZeRO-2, one process each."""
    settings = ["training.save_every=null", "evaluation=[]"]
    alone, output = tmp_path / "alone", tmp_path / "nodes"
    assert command("train", *small(world, alone, steps=2), *settings) == 0
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    arguments = [*small(world, output, steps=2), *settings, "training.deepspeed=zero2"]
    nodes = [start(arguments, [*rendezvous, f"--node_rank={rank}"]) for rank in (0, 1)]
    try:
        printed = [node.communicate(timeout=500)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], printed[0][-2000:] + printed[1][-2000:]
    assert losses(output) == pytest.approx(losses(alone), rel=1e-4)
