"""Every kind of adapted layer, compared with a float64 reference and, where PEFT has the layer, with PEFT."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GptOssConfig, Llama4TextConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import mmdora
from mmdora.adapters import AdapterLayer, adapter_layers
from mmdora.adapters.ops import norm_cache as norms
from mmdora.core.errors import UserError

LAYERS = {
    "linear": lambda: nn.Linear(12, 20),
    "linear without bias": lambda: nn.Linear(12, 20, bias=False),
    "fused qkv": lambda: nn.Linear(12, 36),
    "Conv1D": lambda: Conv1D(20, 12),
    "conv1d": lambda: nn.Conv1d(6, 10, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False),
    "conv2d 1x1": lambda: nn.Conv2d(6, 10, 1),
    "conv3d": lambda: nn.Conv3d(3, 10, 2),
    "embedding": lambda: nn.Embedding(30, 12, padding_idx=0),
}
OWN = {  # PEFT does not have these layers, or computes an output that cannot be merged
    "grouped": lambda: nn.Conv2d(6, 12, 3, groups=3),
    "depthwise": lambda: nn.Conv1d(6, 6, 3, groups=6, padding="same"),
    "dilated": lambda: nn.Conv2d(6, 10, 3, dilation=2, padding=2),
    "reflecting": lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect"),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def build(kind: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    layer = (LAYERS | OWN)[kind]()
    shapes = {nn.Conv1d: (2, 6, 9), nn.Conv2d: (2, 6, 9, 9), nn.Conv3d: (2, 3, 5, 5, 5)}
    if isinstance(layer, nn.Embedding):
        return Net(layer), torch.randint(0, 30, (3, 7))
    return Net(layer), torch.randn(shapes.get(type(layer), (3, 5, 12)))


def adapted(net: Net, method: str = "dora", **settings) -> Net:
    net = copy.deepcopy(net)
    mmdora.inject_adapters(net, {"": {"method": method, "targets": ["layer"], "rank": 4, "alpha": 6} | settings})
    randomize(net)
    return net


def randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name or "vera_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def reference(plain: nn.Module, layer: AdapterLayer, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the float64 output of the plain layer with the paper's W' (the norm detached), and the tensors in W'."""
    name = layer.active
    leaves = [t.detach().double().requires_grad_() for t in layer.adapter_tensors(name).values()]
    matrix = layer.matrix().detach().double()
    direction = matrix
    if layer.specs[name].rank:
        direction = matrix + layer.specs[name].scale * leaves[1].flatten(1) @ leaves[0].flatten(1)
    if layer.specs[name].use_dora:
        direction = leaves[-1].flatten()[:, None] * direction / direction.detach().norm(dim=1, keepdim=True)
    x = x if x.dtype == torch.int64 else x.double()
    return functional_call(copy.deepcopy(plain).double(), {"weight": layer.from_matrix(direction)}, x), leaves


@pytest.mark.parametrize("method", ["lora", "dora", "magnitude"])
@pytest.mark.parametrize("kind", [*LAYERS, *OWN])
def test_output_gradients_and_merge_equal_float64(kind, method):
    base, x = build(kind)
    before = base(x)
    net = copy.deepcopy(base)
    settings = {} if method == "magnitude" else {"rank": 4, "alpha": 6}
    mmdora.inject_adapters(net, {"": {"method": method, "targets": ["layer"]} | settings})
    torch.testing.assert_close(net(x), before, atol=1e-6, rtol=1e-5)  # an untrained adapter changes nothing
    randomize(net)
    out = net(x)
    assert (out - before).abs().max() > 0.01
    expected, leaves = reference(base.layer, net.layer, x)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    for parameter, leaf in zip(net.layer.adapter_tensors("default").values(), leaves, strict=True):
        torch.testing.assert_close(parameter.grad.double(), leaf.grad, atol=1e-5, rtol=1e-5)
    merged = mmdora.merge_adapters(net)
    assert type(merged.layer) is type(base.layer)
    assert list(merged.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(merged(x), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_peft_reads_and_writes_the_same_adapter(kind, use_dora, tmp_path):
    base, x = build(kind)
    net = adapted(base, "dora" if use_dora else "lora")
    mmdora.save_adapter(net, tmp_path / "mmdora")
    in_peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mmdora", is_trainable=True)
    torch.testing.assert_close(in_peft(x), net(x), atol=1e-5, rtol=1e-5)
    net(x).square().sum().backward()
    in_peft(x).square().sum().backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in in_peft.named_parameters() if p.requires_grad}
    for suffix, parameter in net.layer.adapter_tensors("default").items():
        name = f"base_model.model.layer.{suffix}"
        gradient = gradients[f"{name}.weight" if "magnitude" in suffix else name]
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["layer"], use_dora=use_dora, init_lora_weights=False)
    peft_model = get_peft_model(copy.deepcopy(base), config)
    randomize(peft_model)
    peft_model.save_pretrained(tmp_path / "peft")
    loaded = copy.deepcopy(base)
    mmdora.load_adapter(loaded, tmp_path / "peft")
    torch.testing.assert_close(loaded(x), peft_model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", OWN)
def test_peft_refuses_layers_that_it_would_misread(kind, tmp_path):
    base, x = build(kind)
    net = adapted(base)
    mmdora.save_adapter(net, tmp_path)
    with pytest.raises(KeyError, match="MMDORA"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again = copy.deepcopy(base)
    mmdora.load_adapter(again, tmp_path)
    assert torch.equal(again(x), net(x))


@pytest.mark.parametrize("peft_dropout", [False, True])
def test_dropout_with_and_without_pefts_rule(peft_dropout):
    """By default dropout applies to the low-rank branch only; PEFT applies it to the scaled base product too."""
    base, x = build("linear")
    net = adapted(base, dropout=0.5, peft_dropout=peft_dropout).train()
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.5, target_modules=["layer"], use_dora=True)
    peft_model = get_peft_model(copy.deepcopy(base), config).train()
    tensors = net.layer.adapter_tensors("default")
    for name, parameter in peft_model.named_parameters():
        for suffix, tensor in tensors.items():
            if suffix.split(".")[0] in name:
                parameter.data.copy_(tensor)
    torch.manual_seed(1)
    out = net(x)
    torch.manual_seed(1)
    expected = peft_model(x)
    if peft_dropout:
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        out.square().sum().backward()
        expected.square().sum().backward()
        gradient = peft_model.base_model.model.layer.lora_A.default.weight.grad
        torch.testing.assert_close(tensors["lora_A.weight"].grad, gradient, atol=1e-5, rtol=1e-5)
    else:
        assert (out - expected).abs().max() > 0.01
    torch.testing.assert_close(net.eval()(x), peft_model.eval()(x), atol=1e-5, rtol=1e-5)


def test_a_scaled_embedding_stays_scaled():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    base = Net(Gemma3TextScaledWordEmbedding(30, 12, 0, embed_scale=3.5))
    x = torch.randint(0, 30, (3, 7))
    before = base(x)
    net = copy.deepcopy(base)
    mmdora.inject_adapters(net, {"": {"method": "dora", "targets": ["layer"]}})
    torch.testing.assert_close(net(x), before, atol=1e-6, rtol=1e-5)
    with mmdora.disable_adapters(net):
        assert torch.equal(net(x), before)
    randomize(net)
    out = net(x)
    merged = mmdora.merge_adapters(net)
    assert type(merged.layer) is Gemma3TextScaledWordEmbedding
    torch.testing.assert_close(merged(x), out, atol=1e-5, rtol=1e-5)


def half_precision_errors(dtype: torch.dtype, bias: bool, forward: str) -> tuple[list[float], list[float]]:
    """Return the relative errors of mmdora and of PEFT for the output and every gradient.

    The reference is float64 on the same half-precision weights and inputs. PEFT's adapters have the model's dtype.
    """
    torch.manual_seed(0)
    base = Net(nn.Linear(256, 384, bias=bias)).to(dtype)
    x = torch.randn(64, 256, dtype=dtype, requires_grad=True)
    net = adapted(base, rank=8, alpha=16, forward=forward)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["layer"], use_dora=True)
    peft_model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    for name, parameter in peft_model.named_parameters():
        for suffix, tensor in net.layer.adapter_tensors("default").items():
            if suffix.split(".")[0] in name:
                parameter.data.copy_(tensor)
    expected, leaves = reference(base.layer, net.layer, x.detach())
    expected.square().sum().backward()

    def errors(model: nn.Module, named) -> list[float]:
        out = model(x)
        out.float().square().sum().backward()
        pairs = [(out, expected), *((p.grad, leaf.grad) for p, leaf in zip(named, leaves, strict=True))]
        return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]

    own_errors = errors(net, net.layer.adapter_tensors("default").values())
    peft_layer = peft_model.base_model.model.layer
    kinds = (peft_layer.lora_A, peft_layer.lora_B, peft_layer.lora_magnitude_vector)
    peft_errors = errors(peft_model, [k["default"].weight for k in kinds])
    return own_errors, peft_errors


def test_autocast_and_checkpointing_compute_the_same():
    base, x = build("linear")
    net = adapted(base)
    half = copy.deepcopy(net).to(torch.bfloat16)
    for name, parameter in half.layer.adapter_tensors("default").items():
        parameter.data = net.layer.adapter_tensors("default")[name].data.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, half(x.bfloat16()), atol=0.02, rtol=0.02)
    again = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    assert torch.equal(again, net(x))


def test_a_layer_used_twice_is_adapted_in_both_places():
    torch.manual_seed(0)
    net = nn.Module()
    net.first = nn.Linear(6, 6)
    net.second = net.first
    mmdora.inject_adapters(net, {"": {"method": "dora", "targets": ["first"]}})
    assert net.second is net.first
    assert isinstance(net.second, AdapterLayer)
    mmdora.merge_adapters(net)
    assert net.second is net.first
    assert type(net.second) is nn.Linear


def mixtral() -> tuple[nn.Module, tuple]:
    config = MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = MixtralExperts(config)
    return block, (torch.randn(5, 8), torch.tensor([[0, 1], [1, 3], [0, 2], [3, 2], [1, 0]]), torch.rand(5, 2))


def gpt_oss() -> tuple[nn.Module, tuple]:
    config = GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = GptOssExperts(config)
    return block, (torch.randn(5, 8), torch.tensor([[0, 1], [1, 3], [0, 2], [3, 2], [1, 0]]), torch.rand(5, 2))


class Model(nn.Module):
    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def llama4() -> tuple[nn.Module, tuple]:
    return Llama4TextExperts(Llama4TextConfig(hidden_size=8, intermediate_size=6, num_local_experts=4)), (
        torch.randn(20, 8),
    )


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_by_other_implementations(implementation):
    torch.manual_seed(0)
    block, inputs = mixtral()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    net = Model(block)
    mmdora.inject_adapters(net, {"": {"method": "dora", "targets": ["gate_up_proj", "down_proj"]}})
    randomize(net)
    expected = net(*inputs)
    block.config._experts_implementation = implementation
    torch.testing.assert_close(net(*inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora", "magnitude"])
@pytest.mark.parametrize("make", [mixtral, gpt_oss, llama4])
def test_experts_equal_float64_and_are_saved_and_merged(make, method, tmp_path):
    torch.manual_seed(0)
    block, inputs = make()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    base = Model(block)
    before, net = base(*inputs), copy.deepcopy(base)
    settings = {} if method == "magnitude" else {"rank": 2, "alpha": 3}
    parts = {"": {"method": method, "targets": ["experts.gate_up_proj", "down_proj"]} | settings}
    report = mmdora.inject_adapters(net, parts)
    assert report.parts[0].modules == ["experts.gate_up_proj", "experts.down_proj"]
    torch.testing.assert_close(net(*inputs), before, atol=1e-6, rtol=1e-5)
    randomize(net)
    out = net(*inputs)
    assert (out - before).abs().max() > 0.01
    out.square().sum().backward()

    weights, leaves = {}, []
    for path, layer in adapter_layers(net):
        tensors = [t.detach().double().requires_grad_() for t in layer.adapter_tensors("default").values()]
        direction = layer.matrix().detach().double()
        if layer.specs["default"].rank:
            direction = direction + layer.specs["default"].scale * tensors[1] @ tensors[0]
        if layer.specs["default"].use_dora:
            direction = tensors[-1][..., None] * direction / direction.detach().norm(dim=-1, keepdim=True)
        weights[path] = layer.from_matrix(direction)
        leaves += tensors
    double = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    expected = functional_call(copy.deepcopy(base).double(), weights, double)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    expected.square().sum().backward()
    parameters = [p for _, layer in adapter_layers(net) for p in layer.adapter_tensors("default").values()]
    for parameter, leaf in zip(parameters, leaves, strict=True):
        torch.testing.assert_close(parameter.grad.double(), leaf.grad, atol=1e-5, rtol=1e-4)

    mmdora.save_adapter(net, tmp_path)
    again = copy.deepcopy(base)
    mmdora.load_adapter(again, tmp_path)
    assert torch.equal(again(*inputs), out)
    twin = copy.deepcopy(again)
    assert next(adapter_layers(twin))[1].block is twin.experts
    merged = mmdora.merge_adapters(again)
    assert type(merged.experts) is type(block)
    assert list(merged.state_dict()) == list(base.state_dict())
    torch.testing.assert_close(merged(*inputs), out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_equals_float64_on_the_dequantized_weight(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 32).to(torch.bfloat16)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.bfloat16)
    else:
        layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    net = Net(layer.to("cpu"))
    net.layer.bias.data = plain.bias.data
    x = torch.randn(16, 64, dtype=torch.bfloat16)
    before = net(x)
    mmdora.inject_adapters(net, {"": {"method": "dora", "rank": 4, "alpha": 6}})
    torch.testing.assert_close(net(x), before, atol=0.05, rtol=0.05)
    randomize(net)
    out = net(x)
    out.float().square().sum().backward()
    assert (net.layer.matrix().float() - plain.weight.float()).abs().max() < 0.05
    expected, leaves = reference(plain, net.layer, x)  # on the dequantized weight
    expected.square().sum().backward()
    torch.testing.assert_close(out.double(), expected, atol=0.05, rtol=0.02)
    for parameter, leaf in zip(net.layer.adapter_tensors("default").values(), leaves, strict=True):
        assert (parameter.grad.double() - leaf.grad).norm() < 0.02 * leaf.grad.norm()
    with norms.weights_fixed():
        assert torch.equal(net(x), net(x))
    merged = mmdora.merge_adapters(net)
    assert type(merged.layer) is nn.Linear
    torch.testing.assert_close(merged(x), out, atol=0.1, rtol=0.05)


def test_a_4_bit_layer_that_was_used_before_injection():
    """On some CPUs, its first forward pass in inference mode repacks the weight."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    net = Net(layer.to("cpu")).eval()
    with torch.inference_mode():
        before = net(torch.ones(3, 64))
    mmdora.inject_adapters(net, {"": {"method": "dora", "targets": ["layer"], "rank": 4}})
    assert (net.layer.matrix() - weight).abs().max() < 0.5
    torch.testing.assert_close(net(torch.ones(3, 64)), before, atol=0.2, rtol=0.05)
    net(torch.randn(3, 64)).sum().backward()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_unusual_inputs_work_as_with_a_plain_layer(method):
    """Empty batches, a single vector, strides, and an image without a batch."""
    base, _ = build("linear")
    net = adapted(base, method)
    for x in (torch.zeros(0, 12), torch.zeros(2, 0, 12), torch.randn(12), torch.randn(12, 5).T):
        x = x.requires_grad_()
        out = net(x)
        assert out.shape == base(x).shape
        out.sum().backward()
    for kind in ("conv2d", "grouped"):
        base, x = build(kind)
        net = adapted(base, method)
        torch.testing.assert_close(net(x[0]), net(x)[0])


def test_pickled_layers_have_their_own_norms():
    base, x = build("linear")
    net = adapted(base)
    other = pickle.loads(pickle.dumps(net))
    other.layer.lora_B["default"].data.add_(1)
    with norms.weights_fixed():
        net(x)
        kept = other(x)
    assert torch.equal(kept, other(x))
    block, inputs = mixtral()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    experts = Model(block)
    mmdora.inject_adapters(experts, {"": {"method": "dora", "targets": ["gate_up_proj"]}})
    assert torch.equal(pickle.loads(pickle.dumps(experts))(*inputs), experts(*inputs))


@pytest.mark.parametrize(("net", "target"), [(build("embedding")[0], "layer"), (Model(mixtral()[0]), "gate_up_proj")])
def test_dropout_on_a_layer_without_float_input_is_an_error(net, target):
    with pytest.raises(UserError, match=r"dropout: .* has no input to drop"):
        mmdora.inject_adapters(net, {"": {"method": "dora", "targets": [target], "dropout": 0.1}})


def test_a_layer_that_cannot_be_adapted_is_named():
    net = nn.Module()
    net.norm = nn.LayerNorm(4)
    with pytest.raises(UserError, match="norm is a LayerNorm, which cannot have a low-rank adapter"):
        mmdora.inject_adapters(net, {"": {"method": "dora", "targets": ["norm"]}})


def test_a_layer_with_a_hook_of_accelerate_is_adapted():
    """The hooks that `device_map` adds call the forward method that they found."""
    base, x = build("linear")
    before = base(x)
    add_hook_to_module(base.layer, ModelHook())
    mmdora.inject_adapters(base, {"": {"method": "dora", "rank": 4}})
    torch.testing.assert_close(base(x), before)
    randomize(base)
    out = base(x)
    assert (out - before).abs().max() > 0.01
    torch.testing.assert_close(mmdora.merge_adapters(base)(x), out, atol=1e-5, rtol=1e-5)
