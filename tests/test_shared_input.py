"""Layers that read the same tensor are computed in one call, with the results of separate calls."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, WhisperConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.whisper.modeling_whisper import WhisperAttention

import mmdora
from mmdora.adapters import adapter_layers
from mmdora.adapters.layers.shared_input import INPUT_GROUPS
from tests.source_reading import groups_in_class, groups_in_file

DORA = {"method": "dora", "rank": 4, "alpha": 6}


class Attention(nn.Module):
    """Attention with one head; without `use_values`, the output of v is computed and not used."""

    def __init__(self, bias: bool = False, key_width: int = 12):
        super().__init__()
        self.q = nn.Linear(12, 8, bias=bias)
        self.k = nn.Linear(key_width, 8, bias=bias)
        self.v = nn.Linear(key_width, 10, bias=bias)
        self.use_values = True

    def forward(self, x):
        q = self.q(x)
        k = self.k(x)
        v = self.v(x)
        scores = (q @ k.mT).softmax(-1)
        return scores @ v if self.use_values else scores


def adapted(module: nn.Module, **settings) -> nn.Module:
    torch.manual_seed(0)
    mmdora.inject_adapters(module, {"": DORA | settings})
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def separated(module: nn.Module) -> nn.Module:
    """A copy in which every layer computes alone."""
    other = copy.deepcopy(module)
    for _, layer in adapter_layers(other):
        if layer.shared_input is not None:
            layer.shared_input.dissolve()
    return other


def calls(*outputs: torch.Tensor) -> int:
    """The number of calls that computed adapted layers, from the autograd graph of the outputs."""
    nodes, waiting = set(), [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [other for other, _ in node.next_functions]
    return sum(node.name() == "AdaptedLinearFunctionBackward" for node in nodes)


def run(module: nn.Module, *inputs: torch.Tensor, forward=None) -> list[torch.Tensor | None]:
    """The output, the gradients of the inputs and those of all parameters."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    module.zero_grad()
    torch.manual_seed(1)  # for dropout
    out = (module if forward is None else forward)(*inputs)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in inputs), *(p.grad for p in module.parameters() if p.requires_grad)]


def assert_same(a: list[torch.Tensor | None], b: list[torch.Tensor | None]) -> None:
    for left, right in zip(a, b, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("forward", ["exact", "merged"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "lora"},
        {"rank_pattern": {"k": 7}, "alpha_pattern": {"v": 11}},
        {"targets": ["q", "v"]},
        {"targets": ["q", "k"], "magnitude_targets": ["k", "v"]},
        {"dropout": 0.3},
    ],
    ids=str,
)
def test_one_call_gives_the_results_of_separate_calls(settings, forward):
    net = adapted(Attention(bias="rank_pattern" in settings), forward=forward, **settings)
    x = torch.randn(2, 40, 12)
    alone = separated(net)
    assert_same(run(net, x), run(alone, x))
    assert calls(net(x)) == 1
    assert calls(alone(x)) == (2 if settings.get("targets") == ["q", "v"] else 3)


def test_an_unused_output_gives_no_gradient():
    net = adapted(Attention())
    net.use_values = False
    x = torch.randn(2, 40, 12)
    together = run(net, x)
    assert_same(together, run(separated(net), x))
    assert net.v.lora_A["default"].grad is None


def test_gate_and_up_of_llama_share_their_input():
    mlp = adapted(LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2)))
    x = torch.randn(2, 5, 12)
    assert calls(mlp(x)) == 2  # gate and up, down
    assert_same(run(mlp, x), run(separated(mlp), x))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        config = WhisperConfig(d_model=12, decoder_attention_heads=2)
        config._attn_implementation = "sdpa"
        self.encoder_attn = WhisperAttention(embed_dim=12, num_heads=2, is_decoder=True, config=config)

    def forward(self, x, seen):
        return self.encoder_attn(x, seen)


def test_key_and_value_of_cross_attention_share_their_input():
    net, x, seen = adapted(Decoder()), torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    assert calls(net(x, seen)[0]) == 3  # q, k and v, out
    assert_same(run(net, x, seen), run(separated(net), x, seen))


class Crossed(Attention):
    """Has the names of a group, but its query reads another tensor than key and value."""

    def forward(self, x, y):
        return (self.q(x) @ self.k(y).mT).softmax(-1) @ self.v(y)


class Reassigned(Attention):
    def forward(self, x):
        q = self.q(x)
        x = x + 1
        return (q @ self.k(x).mT).softmax(-1) @ self.v(x)


class Repeated(Attention):
    def forward(self, x):
        q = self.q(x) + self.q(x)
        return (q @ self.k(x).mT).softmax(-1) @ self.v(x)


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (Crossed(), (torch.randn(2, 5, 12), torch.randn(2, 7, 12))),
        (Crossed(key_width=20), (torch.randn(2, 5, 12), torch.randn(2, 7, 20))),
        (Reassigned(), (torch.randn(2, 5, 12),)),
        (Repeated(), (torch.randn(2, 5, 12),)),
    ],
    ids=["other tensor", "other width", "reassigned", "called twice"],
)
def test_layers_with_the_names_of_a_group_that_read_different_tensors(net, inputs):
    net = adapted(net)
    assert_same(run(net, *inputs), run(separated(net), *inputs))


class InPlace(Attention):
    """Changes its input in place between q and k."""

    def forward(self, x):
        q = self.q(x)
        torch.relu_(x)
        return q, self.k(x), self.v(x)


def test_an_input_that_is_changed_in_place_gives_no_stale_output():
    net, x = adapted(InPlace()), torch.randn(2, 9, 12)
    outputs = net(x.clone())
    for output, layer, read in zip(outputs, (net.q, net.k, net.v), (x, x.relu(), x.relu()), strict=True):
        torch.testing.assert_close(output, layer(read))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for output, expected in zip(compiled(x.clone()), outputs, strict=True):
        torch.testing.assert_close(output, expected)


def by_detached_view(x):
    x.detach()[0].mul_(-1)
    return x


def without_gradient(x):
    with torch.no_grad():
        x.mul_(-1)
    return x


def in_inference_mode(x):
    with torch.inference_mode():
        x.mul_(-1)
    return x


IN_PLACE = {
    "relu_": torch.relu_,
    "ReLU": nn.ReLU(inplace=True),
    "functional": lambda x: nn.functional.relu(x, inplace=True),
    "module without its result": lambda x: (nn.LeakyReLU(0.1, inplace=True)(x), x)[1],
    "method": lambda x: x.add_(1),
    "operator": lambda x: x.__imul__(3),
    "copy": lambda x: x.copy_(-x),
    "index": lambda x: (x.__setitem__(0, 5.0), x)[1],
    "for-each": lambda x: (torch._foreach_mul_([x], -1.0), x)[1],
    "dropout": lambda x: nn.functional.dropout(x, 1.0, True, True),
    "detached view": by_detached_view,
    "no_grad": without_gradient,
    "inference mode": in_inference_mode,
}


class Changing(Attention):
    """Changes its input in place after `after` of the three layers."""

    def forward(self, x):
        outputs = []
        for i, layer in enumerate((self.q, self.k, self.v)):
            outputs.append(layer(x))
            x = self.change(x) if i == self.after else x
        return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("way", IN_PLACE)
def test_every_way_to_change_the_input_in_place(way, after):
    net = Changing()
    net.change, net.after = IN_PLACE[way], after
    net = adapted(net)
    x = torch.randn(2, 9, 12)
    for read in (lambda: x.clone(), lambda: x.clone().requires_grad_() * 1.0):
        torch.testing.assert_close(net(read()), separated(net)(read()))


def replica(module: nn.Module) -> nn.Module:
    """A copy as `nn.DataParallel` makes it: shallow, with its parameters as plain attributes."""
    copied = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(copied, name, parameter)
    for name, child in module.named_children():
        copied._modules[name] = replica(child)
    return copied


def test_shallow_copies_compute_alone():
    net = adapted(Attention(bias=True))
    x = torch.randn(2, 9, 12)
    expected = net(x)
    torch.testing.assert_close(replica(net)(x), expected)
    shallow = copy.copy(net)
    shallow._modules = dict(net._modules) | {"k": copy.copy(net.k)}
    torch.testing.assert_close(shallow(x), expected)
    assert calls(net(x)) == 1
    assert replica(net).q.norm_keys != net.q.norm_keys


def test_checkpointing_autocast_and_compile_compute_the_same():
    net = adapted(Attention(bias=True))
    x = torch.randn(2, 9, 12)
    expected = run(net, x)
    assert_same(run(net, x, forward=lambda x: checkpoint(net, x, use_reentrant=False)), expected)
    assert_same(run(net, x, forward=torch.compile(net, backend="aot_eager", fullgraph=True)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone, together = run(separated(net), x), run(net, x)
    assert together[0].dtype == torch.bfloat16
    for left, right in zip(together, alone, strict=True):
        torch.testing.assert_close(left, right, atol=0.05, rtol=0.05)


def test_a_layer_that_is_called_outside_its_parent_computes_alone():
    """So no output is handed out after a weight has changed."""
    net = adapted(Attention())
    x = torch.randn(2, 9, 12)
    net.q(x)
    net.k.lora_B["default"].data += 1
    k = net.k(x)
    assert_same([k.detach()], [separated(net).k(x).detach()])
    assert calls(net.q(x), k) == 2
    with torch.no_grad():
        torch.testing.assert_close(net(x), separated(net)(x))


def test_a_hook_that_changes_the_input_of_one_layer():
    net = adapted(Attention())
    net.k.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    x = torch.randn(2, 9, 12)
    assert_same(run(net, x), run(separated(net), x))


def test_an_error_in_the_parent_leaves_no_output_behind():
    net, x = adapted(Attention()), torch.randn(2, 9, 12)
    hook = net.v.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(x)
    hook.remove()
    net.v.lora_B["default"].data += 1
    assert_same([net.v(x).detach()], [separated(net).v(x).detach()])
    assert_same(run(net, x), run(separated(net), x))


def test_several_adapters_row_adapters_and_copies():
    net = adapted(Attention())
    mmdora.inject_adapters(net, {"": DORA | {"targets": ["q", "k"]}}, name="b")
    x = torch.randn(2, 9, 12)
    for name in ("default", "b"):
        mmdora.set_adapter(net, name)
        assert_same(run(net, x), run(separated(net), x))
        assert calls(net(x)) == 1
    with mmdora.adapters_by_row(net, ["default", "b"]):
        assert_same([net(x).detach()], [separated(net)(x).detach()])
    before = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert calls(other(x)) == 1
        assert_same(run(other, x), run(net, x))
        other.q.lora_B["b"].data += 1
        assert not torch.equal(other(x), before)
        assert torch.equal(net(x), before)


def test_a_merged_model_has_no_hooks_and_unmerging_restores_the_group():
    net = adapted(Attention())
    x = torch.randn(2, 9, 12)
    before = run(net, x)
    merged = mmdora.merge_adapters(net, reversible=True)
    assert not merged._forward_hooks
    assert not merged._forward_pre_hooks
    torch.testing.assert_close(merged(x), before[0], atol=1e-5, rtol=1e-5)
    back = mmdora.unmerge_adapters(merged)
    assert_same(run(back, x), before)
    assert calls(back(x)) == 1


# The table of names against transformers' source code


@pytest.fixture(scope="module")
def groups_in_transformers() -> dict[frozenset[str], set[str]]:
    """The model families that show each group of layers which read one tensor."""
    families: dict[frozenset[str], set[str]] = defaultdict(set)
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for groups in groups_in_file(path).values():
            for group in groups:
                families[frozenset(group)].add(path.parent.name)
    return families


def test_the_table_has_every_group_of_three_or_more_families(groups_in_transformers):
    frequent = [group for group, families in groups_in_transformers.items() if len(families) >= 3]
    assert len(frequent) > 10
    assert [set(group) for group in frequent if not any(group <= set(names) for names in INPUT_GROUPS)] == []


@pytest.mark.parametrize("names", INPUT_GROUPS, ids=" ".join)
def test_every_group_of_the_table_is_that_of_a_class(names, groups_in_transformers):
    assert frozenset(names) in groups_in_transformers


class Mutating(Attention):
    def forward(self, x):
        q = self.q(x)
        x.add_(1)
        k = self.k(x)
        x[0] = 0
        return q, k, self.v(x)


class Branching(Attention):
    def forward(self, x, y=None):
        q = self.q(x)
        if y is None:
            return q
        k, v = self.k(x), self.v(x)
        return q, k, v


class Conditional(Attention):
    def forward(self, x, y=None):
        return self.q(x), (self.k(x) if y is None else None), [self.v(x) for _ in range(2)]


class Twice(Attention):
    def forward(self, x, y):
        q, k = self.q(x), self.k(x)
        return q, k, self.q(y), self.v(self.q(x))


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        (Attention, [("q", "k", "v")]),
        (Reassigned, [("k", "v")]),
        (Mutating, []),
        (Branching, [("k", "v")]),
        (Conditional, []),
        (Twice, []),
    ],
)
def test_the_source_reader_finds_what_is_certainly_called_on_one_tensor(kind, groups):
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert groups_in_class(node, {"q", "k", "v"}) == groups
