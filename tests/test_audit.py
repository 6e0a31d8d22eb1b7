"""The audit reports a parameter that never moves, but not a part that is still waiting for its first image."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from mmdora.core.errors import RunError
from mmdora.training.audit import Audit
from tests.media import write_image
from tests.test_doctor import row
from tests.test_runs import command


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.vision = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)]), nn.Linear(2, 2)


def audited(net: nn.Module) -> Audit:
    parts = {id(p): name.partition(".")[0] for name, p in net.named_parameters()}
    return Audit(net, parts, torch.device("cpu"))


@torch.no_grad()
def move(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter += 1


def test_a_parameter_that_never_moves_is_an_error():
    net = Net()
    audit = audited(net)
    for step in range(1, 4):
        move(net.text[0])
        move(net.text[2])
        if step == 3:
            with pytest.raises(RunError, match=r"2 trainable parameters of parts.text did not change.*text.1.weight"):
                audit.check(step)
        else:
            audit.check(step)


def test_a_part_is_audited_from_its_first_change():
    net = Net()
    audit = audited(net)
    for step in range(1, 9):
        move(net.text)
        audit.check(step)
    assert audit.unchanged_parts == ["vision"]
    with torch.no_grad():
        net.vision.weight += 1
    for step in (9, 10):
        audit.check(step)
    assert audit.unchanged_parts == []
    with pytest.raises(RunError, match=r"parts.vision did not change in 3 steps.*vision.bias"):
        audit.check(11)


def test_a_run_without_images_in_its_first_steps_logs_the_idle_part(tmp_path, world, caplog):
    """With one image in 61 samples the run is completed, and names the part that was not trained."""
    import json

    write_image(tmp_path / "a.png")
    rows = [row(str(i), None, f"What is {i}?", "a number") for i in range(60)]
    rows += [row("p", "a.png", "<image>\nWhat is it?", "a thing")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    arguments = ["training.max_steps=6", "training.batch_size=2", "training.micro_batch_size=2", "evaluation=[]"]
    with caplog.at_level(logging.WARNING):
        output = f"training.output={tmp_path / 'run'}"
        assert command("train", "quickstart", f"data.train=[{tmp_path / 'data.json'}]", output, *arguments) == 0
    assert "parts.vision was not trained" in caplog.text
