"""The loss without logits: equal to transformers' own loss, for every family and kind of head, in less memory."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, LlamaForCausalLM

import mmdora
from mmdora.adapters.ops.norm_cache import weights_fixed
from mmdora.models.new_tokens import add_tokens, train_token_rows
from mmdora.training import chunked_loss, deferred_logits
from mmdora.training.chunked_loss import ChunkedLoss, chunked_cross_entropy
from mmdora.training.deferred_logits import DeferredLogits, Recipe
from tests.grid import deepspeed_file, run_in_two_processes
from tests.test_runs import command
from tests.tiny_language_models import FAMILIES, build
from tests.tiny_models import write_tokenizer

VOCABULARY = 300
# Operations of models between the head and the loss, and losses that they add to it.
CHANGES = {
    "soft-capping": ("gemma2", {"final_logit_softcapping": 2.0}),
    "division": ("granite", {"logits_scaling": 3.0}),
    "scaling": ("cohere", {"logit_scale": 0.3}),
    "router loss": ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 1.0}),
    "router loss, shared expert": ("qwen2_moe", {"output_router_logits": True, "router_aux_loss_coef": 1.0}),
}
CASES = {family: (family, {}) for family in FAMILIES} | CHANGES


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "rows_per_chunk", lambda recipe: 3)


def batch_of(supervised: int = 8) -> dict[str, Tensor]:
    """Two rows of 17 tokens with different numbers of supervised ones."""
    ids = torch.randint(5, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, : 17 - supervised] = labels[1, : 17 - supervised // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradients(model: Any, batch: dict[str, Any], chunked: bool) -> tuple[float, dict[str, Tensor | None]]:
    """Return the loss and every trained parameter's gradient."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with weights_fixed():
        if chunked:
            with ChunkedLoss(model):
                loss = model(**batch).loss
        else:
            loss = model(**batch).loss
        loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), {name: None if grad is None else grad.clone() for name, grad in trained.items()}


def check_equal(model: Any, batch: dict[str, Any]) -> None:
    """Check that loss and gradients are those of transformers' own loss."""
    expected, reference = gradients(model, batch, chunked=False)
    loss, found = gradients(model, batch, chunked=True)
    assert loss == pytest.approx(expected, rel=1e-6)
    total = torch.stack([g.norm() for g in reference.values() if g is not None]).norm()
    for name, gradient in reference.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * total, name
    assert not any("lm_head" in vars(module) for module in model.modules())


@pytest.fixture
def all_logits() -> Iterator[list[str]]:
    """Collects the names of models whose logits had to be computed as a whole."""
    deferred_logits._computed.clear()
    names: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: names.append(record.getMessage())  # type: ignore[method-assign]
    for module in (deferred_logits, chunked_loss):
        module.log.addHandler(handler)
    yield names
    for module in (deferred_logits, chunked_loss):
        module.log.removeHandler(handler)


@pytest.mark.parametrize("case", CASES)
def test_every_family_trains_as_with_its_own_loss(case, all_logits):
    """The number of tokens by which a loss is divided is that of the whole step."""
    family, changes = CASES[case]
    model = build(family, **changes).train()
    check_equal(model, batch_of())
    check_equal(model, batch_of() | {"num_items_in_batch": torch.tensor(31)})
    assert all_logits == []


def test_the_router_loss_is_part_of_the_loss():
    """Without it the test above would show nothing."""
    family, changes = CASES["router loss"]
    with_it, without = (build(family, **more).train() for more in (changes, {}))
    losses = [gradients(model, batch_of(), chunked=True)[0] for model in (with_it, without)]
    assert losses[0] > losses[1] + 0.5


def adapted(method: str, **settings: Any) -> Any:
    model = build("llama").train()
    parts = {"lm_head": {"method": method, **settings}, "language": {"method": "dora", "rank": 2}}
    mmdora.inject_adapters(model, parts)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full"},
        {"method": "lora", "rank": 2},
        {"method": "dora", "rank": 2},
        {"method": "dora", "rank": 2, "forward": "merged"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_trained_or_adapted_head_gets_its_gradient(settings):
    check_equal(adapted(**settings), batch_of())


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_rows_of_new_tokens_in_the_head_get_their_gradient(family, tmp_path):
    """Qwen2's head is tied to the input embeddings."""
    model = build(family).train()
    write_tokenizer(tmp_path)
    ids = add_tokens(model, AutoTokenizer.from_pretrained(tmp_path), ["<a>", "<b>"])
    mmdora.inject_adapters(model, {"language": {"method": "dora", "rank": 2}})
    train_token_rows(model)
    batch = batch_of()
    batch["labels"][0, -2:] = batch["input_ids"][0, -2:] = torch.tensor(ids)
    check_equal(model, batch)


def test_a_quantized_head_is_used_as_it_is():
    bnb = pytest.importorskip("bitsandbytes")
    model = build("llama").train().requires_grad_(False)
    head = bnb.nn.Linear4bit(32, VOCABULARY, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head.to("cpu")
    model.model.norm.weight.requires_grad_(True)
    check_equal(model, batch_of())


def test_rows_without_supervised_tokens_give_zero_gradients():
    """Every process needs gradients of all its trained parameters, whatever its rows hold."""
    batch = batch_of() | {"num_items_in_batch": torch.tensor(31)}
    batch["labels"][:] = -100
    loss, found = gradients(adapted("full"), batch, chunked=True)
    assert loss == 0
    assert all(gradient is not None and not gradient.any() for gradient in found.values())


class PenalizedLogits(LlamaForCausalLM):
    """A model that uses its logits for something else than cross-entropy."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = output.loss + 1e-3 * output.logits.logsumexp(-1).square().mean()
        return output


def test_a_model_that_needs_its_logits_keeps_its_loss_and_is_named_once(all_logits):
    model = PenalizedLogits(build("llama").config).train()
    check_equal(model, batch_of())
    check_equal(model, batch_of())
    (line,) = all_logits
    assert "PenalizedLogits" in line
    assert "logsumexp" in line


def test_a_model_without_a_linear_head_is_named(all_logits):
    model = build("llama")
    model.lm_head = nn.Sequential(nn.Linear(32, VOCABULARY))
    check_equal(model, batch_of())
    (line,) = all_logits
    assert "LlamaForCausalLM has no linear head" in line


SCALE = nn.Parameter(torch.tensor(0.7))
PATTERNS: dict[str, Any] = {
    "a cap in fp32": lambda x: torch.tanh(x.float() / 5) * 5,
    "a trained scale": lambda x: SCALE.exp() * x,
    "a bias of the logits": lambda x: x + torch.linspace(0, 1, 40)[None, None],
    "a smaller vocabulary": lambda x: x[..., :33],
    "excluded tokens": lambda x: _excluded(x, [1, 5, 7]),
    "the last positions": lambda x: x[:, 2:].contiguous(),
    "one sample": lambda x: x[1],
    "a mask of positions": lambda x: x[..., :-1, :][torch.arange(10).reshape(2, 5) % 3 > 0],
    "other operators": lambda x: -(1 - x) / 2 - 3 + x.new_ones(()) if isinstance(x, Tensor) else -(1 - x) / 2 - 3 + 1,
    "float64": lambda x: x.double(),
    "a softmax (all logits)": lambda x: x.log_softmax(-1),
    "a transposition (all logits)": lambda x: x.transpose(0, 1),
}


def _excluded(logits: Any, tokens: list[int]) -> Any:
    logits = logits * 1
    logits[:, :, tokens] = -1e4
    return logits


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_whatever_a_forward_pass_does_with_logits(pattern, reduction):
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 40), torch.randn(2, 6, 8, requires_grad=True)
    found = []
    for deferred in (False, True):
        recipe = Recipe(head, pattern, hidden, 40, torch.float32)
        start: Any = DeferredLogits(recipe, lambda *a, **k: chunked_cross_entropy(None, *a, **k))
        logits = PATTERNS[pattern](start if deferred else head(hidden))
        rows = logits.reshape(-1, logits.shape[-1])
        target = torch.arange(len(rows)) * 7 % 33
        target[::3] = -100
        loss = F.cross_entropy(rows, target, reduction=reduction).sum()
        wanted = (hidden, SCALE, *head.parameters())
        found.append([loss, *torch.autograd.grad(loss * 1.7, wanted, allow_unused=True)])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_exact_as_torch_and_keeps_small_gradients(dtype):
    """With a large number of tokens, most gradients of fp16 logits would be rounded to zero."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 4000, bias=False).to(dtype), torch.randn(64, 16, dtype=dtype)
    target, items, factor = torch.randint(0, 4000, (64,)), torch.tensor(5000), 2.0**16
    errors = []
    exact = _gradient(head.double(), hidden.double(), lambda x: F.cross_entropy(x, target, reduction="sum") / items)
    head.to(dtype)
    for deferred in (False, True):
        x = hidden.clone().requires_grad_()
        recipe = Recipe(head, "m", x, 4000, dtype)
        logits: Any = DeferredLogits(recipe, lambda *a, **k: chunked_cross_entropy(items, *a, **k))
        loss = F.cross_entropy((logits if deferred else head(x)).float(), target, reduction="sum") / items
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss * factor, x)
        errors.append(float((gradient.double() / factor - exact).norm() / exact.norm()))
    assert errors[1] <= 1.05 * errors[0]


def _gradient(head: nn.Module, hidden: Tensor, loss_of: Any) -> Tensor:
    x = hidden.clone().requires_grad_()
    return torch.autograd.grad(loss_of(head(x)), x)[0]


class Largest(TorchDispatchMode):
    """Finds the largest number of rows of any tensor of logits."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        weight = (32, VOCABULARY)  # the head's, transposed
        if isinstance(out, Tensor) and out.ndim and out.shape[-1] == VOCABULARY and out.shape != weight:
            self.rows = max(self.rows, out.numel() // VOCABULARY)
        return out


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_holds_more_logits_than_a_chunk(dtype):
    """Not even a copy in fp32 that accelerate makes of a model's output."""
    from accelerate.utils import convert_outputs_to_fp32

    model = build("llama").train().requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    with Largest() as plain, autocast(dtype):
        convert_outputs_to_fp32(model.forward)(**batch_of())
    with Largest() as chunked, autocast(dtype), ChunkedLoss(model):
        convert_outputs_to_fp32(model.forward)(**batch_of()).loss.backward()
    assert plain.rows == 2 * 17
    assert chunked.rows == 3


COUNT_CALLS = """
import mmdora.training.chunked_loss
mmdora.training.chunked_loss.rows_per_chunk = lambda recipe: 3
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload as Offload
original = Offload.pre_sub_module_forward_function
def counted(self, module):
    if getattr(module, "out_features", 0) >= 512:
        print("the head is gathered", flush=True)
    return original(self, module)
Offload.pre_sub_module_forward_function = counted
"""


@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")
def test_zero3_gathers_the_head_once_and_trains_like_one_process(tmp_path):
    """The chunks of a micro-batch, whose number differs between the processes, are one call of the head."""
    (tmp_path / "count_head_calls.py").write_text(COUNT_CALLS)
    common = ["quickstart", "evaluation=[]", "data.num_workers=0", "training.max_steps=2", "training.batch_size=4"]
    common += ["training.micro_batch_size=2", "training.warmup_ratio=0", "training.save_every=null"]
    common += ["parts.lm_head={method: dora, rank: 2}"]
    assert command("train", *common, f"training.output={tmp_path}/one") == 0
    engine = [f"training.deepspeed={deepspeed_file(tmp_path, 'zero3', 3)}", "plugins=[count_head_calls]"]
    printed = run_in_two_processes([*common, f"training.output={tmp_path}/two", *engine], tmp_path / "two", tmp_path)
    assert printed.count("the head is gathered") == 2 * 2  # processes and steps; recomputing nothing
    runs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, two in zip(*runs, strict=True):
        for key in ("loss", "grad_norm"):
            assert json.loads(two)[key] == pytest.approx(json.loads(one)[key], rel=1e-4)


def test_the_loss_is_backpropagated_once():
    model = build("llama").train()
    with ChunkedLoss(model):
        loss = model(**batch_of()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
