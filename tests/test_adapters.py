"""The mathematics of adapters against a float64 reference and PEFT, and the effects of injection."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

import mmdora
from data_pipelines.encoding import Encoder
from data_pipelines.samples import Image, Message, Sample, Text, Video
from mmdora.adapters import adapter_layers, resolve_targets
from mmdora.adapters.ops.functional import dora_norm
from mmdora.core.config import PartConfig, VideoConfig
from mmdora.core.errors import UserError
from mmdora.models.architectures import find_part
from tests.media import write_image, write_video

DORA = {"method": "dora", "rank": 4, "alpha": 8}


class Net(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(12, 20, bias=bias)
        self.down = nn.Linear(20, 6, bias=bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def randomize(model: nn.Module) -> None:
    """Change every adapter parameter, as training would."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def reference(x, w, b, a, bb, m, s):
    """DoRA as written in the paper, in float64, with the norm detached."""
    x, w, a, bb, m = (t.double() for t in (x, w, a, bb, m))
    v = w + s * bb @ a
    out = F.linear(x, m[:, None] * v / v.detach().norm(dim=1, keepdim=True))
    return out + b.double() if b is not None else out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_output_and_gradients_equal_float64(bias, rslora):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20, bias=bias))
    mmdora.inject_adapters(net, {"": DORA | {"use_rslora": rslora}})
    randomize(net)
    layer = net[0]
    x = torch.randn(3, 5, 12, requires_grad=True)
    weight = torch.randn(3, 5, 20)
    (net(x) * weight).sum().backward()
    a, b, m = layer.lora_A["default"], layer.lora_B["default"], layer.lora_magnitude_vector["default"]
    leaves = [t.detach().clone().double().requires_grad_() for t in (x, a, b, m)]
    scale = 8 / (2 if rslora else 4)
    out = reference(leaves[0], layer.weight, layer.bias, leaves[1], leaves[2], leaves[3], scale)
    (out * weight).sum().backward()
    torch.testing.assert_close(net(x).double(), out, atol=1e-6, rtol=1e-6)
    for tensor, leaf in zip((x, a, b, m), leaves, strict=True):
        torch.testing.assert_close(tensor.grad.double(), leaf.grad, atol=1e-5, rtol=1e-5)


def test_equals_peft(tmp_path):
    """An adapter saved by either loads in the other, with equal outputs and gradients."""
    torch.manual_seed(0)
    base = Net()
    net = copy.deepcopy(base)
    mmdora.inject_adapters(net, {"": DORA})
    randomize(net)
    mmdora.save_adapter(net, tmp_path / "mmdora")
    in_peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mmdora", is_trainable=True)
    x = torch.randn(7, 12)
    torch.testing.assert_close(net(x), in_peft(x), atol=1e-5, rtol=1e-5)
    net(x).square().sum().backward()
    in_peft(x).square().sum().backward()
    gradients = {n: p.grad for n, p in in_peft.named_parameters() if p.requires_grad}
    for path, layer in adapter_layers(net):
        for kind in ("lora_A", "lora_B"):
            peft_gradient = gradients[f"base_model.model.{path}.{kind}.default.weight"]
            torch.testing.assert_close(getattr(layer, kind)["default"].grad, peft_gradient, atol=1e-5, rtol=1e-5)
        magnitude = gradients[f"base_model.model.{path}.lora_magnitude_vector.default.weight"]
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].grad, magnitude, atol=1e-5, rtol=1e-5)

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], use_dora=True, init_lora_weights=False)
    peft_model = get_peft_model(copy.deepcopy(base), config)
    peft_model.save_pretrained(tmp_path / "peft")
    loaded = copy.deepcopy(base)
    mmdora.load_adapter(loaded, tmp_path / "peft")
    torch.testing.assert_close(loaded(x), peft_model(x), atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad == ("lora_" in n) for n, p in loaded.named_parameters())


def test_mixed_methods_mean_the_same_in_peft(tmp_path):
    """PEFT has one flag `use_dora`, so LoRA beside DoRA is saved as DoRA with m = ‖W + sBA‖; it loads as LoRA here."""
    torch.manual_seed(0)
    base = Net()
    net = copy.deepcopy(base)
    parts = {"up": DORA | {"method": "lora", "rank": 2}, "down": DORA | {"alpha": 3}}
    mmdora.inject_adapters(net, parts)
    randomize(net)
    mmdora.save_adapter(net, tmp_path)
    x = torch.randn(7, 12)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(peft_model(x), net(x), atol=1e-5, rtol=1e-5)
    again = copy.deepcopy(base)
    mmdora.load_adapter(again, tmp_path)
    assert {path: layer.specs["default"].use_dora for path, layer in adapter_layers(again)} == {
        "up": False,
        "down": True,
    }
    torch.testing.assert_close(again(x), net(x))


def test_norm_survives_cancellation_and_zero_rows():
    torch.manual_seed(0)
    weight, a = torch.randn(6, 10), torch.randn(6, 10)
    b = torch.randn(6, 6)
    weight[:3] = -(b @ a)[:3] * (1 + 1e-4)  # sBA ≈ −W
    weight[3] = 0
    b[3] = 0
    dense = (weight.double() + b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(dora_norm(weight, a, b, 1.0).double(), dense, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("remaining", [1e-3, 0.02, 0.05, 0.1, 0.3, 0.6])
def test_norm_is_exact_for_any_cancellation(remaining):
    torch.manual_seed(0)
    a, b = torch.randn(8, 512), torch.randn(16, 8)
    noise = torch.randn(16, 512)
    weight = -(b @ a)
    weight += remaining * weight.norm(dim=1, keepdim=True) * noise / noise.norm(dim=1, keepdim=True)
    dense = (weight.double() + b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(dora_norm(weight, a, b, 1.0).double(), dense, atol=0, rtol=1e-5)


def test_a_zero_row_stays_finite():
    net = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight[1] = 0
    mmdora.inject_adapters(net, {"": DORA})
    out = net(torch.randn(2, 4))
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.requires_grad)


@pytest.fixture
def batches(tiny, tmp_path):
    """A sample with an image and one with a video, encoded for the shipped base model."""
    _, processor = tiny
    encoder = Encoder(processor, VideoConfig(num_frames=4))
    image, video = write_image(tmp_path / "a.png"), write_video(tmp_path / "a.mp4")
    return [
        encoder.encode(Sample(str(m), (Message("user", (m, Text("What?"))), Message("assistant", (Text("red"),))), "t"))
        for m in (Image(image), Video(video))
    ]


PARTS = {"vision": DORA, "projector": {"method": "full"}, "language": DORA}


def test_injection_changes_nothing_until_trained(tiny, batches):
    model, _ = tiny
    before = [model(**batch).logits for batch in batches]
    report = mmdora.inject_adapters(model, PARTS)
    for batch, logits in zip(batches, before, strict=True):
        torch.testing.assert_close(model(**batch).logits, logits, atol=1e-4, rtol=1e-5)
    assert [p.name for p in report.parts] == ["vision", "projector", "language"]
    assert len(report.parts[0].modules) == 18  # 3 blocks of q, k, v, out and two of the MLP
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_training_moves_every_adapter_parameter_and_no_base_weight(tiny, batches):
    model, _ = tiny
    mmdora.inject_adapters(model, PARTS)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):  # B starts at zero, so A has no gradient in the first step
        optimizer.zero_grad()
        sum(model(**batch).loss for batch in batches).backward()
        optimizer.step()
    still = {n for n, p in model.named_parameters() if torch.equal(p, start[n])}
    assert still == {n for n, p in model.named_parameters() if not p.requires_grad}


def test_merged_equals_adapted_and_disabled_equals_base(tiny, batches):
    model, _ = tiny
    base = [model(**batch).logits for batch in batches]
    mmdora.inject_adapters(model, {"vision": DORA, "language": DORA | {"method": "lora"}})
    randomize(model)
    adapted = [model(**batch).logits for batch in batches]
    assert all((a - b).abs().max() > 0.1 for a, b in zip(adapted, base, strict=True))
    with mmdora.disable_adapters(model):
        for batch, logits in zip(batches, base, strict=True):
            torch.testing.assert_close(model(**batch).logits, logits)
    merged = mmdora.merge_adapters(model)
    assert not list(adapter_layers(merged))
    for batch, logits in zip(batches, adapted, strict=True):
        torch.testing.assert_close(merged(**batch).logits, logits, atol=1e-3, rtol=1e-4)


def test_peft_computes_the_same_with_a_whole_model(tiny, batches, tmp_path):
    model, _ = tiny
    base = copy.deepcopy(model)
    mmdora.inject_adapters(model, PARTS)
    randomize(model)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight += 0.01
    mmdora.save_adapter(model, tmp_path)
    peft_model = PeftModel.from_pretrained(base, tmp_path)
    for batch in batches:
        expected = model(**batch).logits
        torch.testing.assert_close(
            peft_model(**batch).logits, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5
        )


def test_unused_vision_blocks_are_not_adapted(tiny):
    model, _ = tiny
    model.config.vision_feature_layer = -2
    targets = resolve_targets(model, "vision", find_part(model, "vision"), PartConfig(method="dora"))
    assert len(targets) == 12
    assert not any(".resblocks.2." in t for t in targets)


def test_switching_between_two_adapters():
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(2, 12)
    base = net(x)
    mmdora.inject_adapters(net, {"": DORA})
    randomize(net)
    first = net(x)
    mmdora.inject_adapters(net, {"up": DORA}, name="b")
    torch.testing.assert_close(net.up.lora_B["b"], torch.zeros(20, 4))
    mmdora.set_adapter(net, "default")
    torch.testing.assert_close(net(x), first)
    mmdora.set_adapter(net, "b")
    torch.testing.assert_close(net(x), base, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="no adapter 'c'"):
        mmdora.set_adapter(net, "c")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"visoin": DORA}, "no such part. Did you mean 'vision'"),
        ({"vision": {"method": "dorra"}}, "unknown adapter method 'dorra'. Did you mean 'dora'"),
        ({"vision": DORA | {"rnk": 3}}, "parts.vision.rnk"),
        ({"language": DORA | {"targets": ["q_porj"]}}, "nothing in the part is named 'q_porj'"),
        ({"language": DORA | {"targets": "nothing.*"}}, "matches no layer"),
        ({"language": DORA | {"targets": "("}}, "not a regular expression"),
        ({"": DORA, "language": DORA}, "both adapt"),
    ],
)
def test_an_invalid_part_is_named_and_changes_nothing(tiny, parts, message):
    model, _ = tiny
    with pytest.raises(UserError, match=message):
        mmdora.inject_adapters(model, parts)
    assert not list(adapter_layers(model))


def test_a_damaged_or_foreign_adapter_changes_nothing(tmp_path):
    torch.manual_seed(0)
    net = Net()
    mmdora.inject_adapters(net, {"": DORA})
    mmdora.save_adapter(net, tmp_path / "good")
    file = tmp_path / "good" / "adapter_model.safetensors"
    whole = file.read_bytes()

    def refused(model, match):
        with pytest.raises(UserError, match=match):
            mmdora.load_adapter(model, tmp_path / "good")
        assert not list(adapter_layers(model))

    file.write_bytes(whole[:-40])
    refused(Net(), "damaged or not a safetensors file")
    file.write_bytes(whole)
    other = nn.Module()
    other.up = nn.Linear(12, 20)
    refused(other, "made for another model: down is not in this model")
    wide = Net()
    wide.down = nn.Linear(20, 7)
    refused(wide, r"down.lora_B.weight has shape \[6, 4\]; this model needs \[7, 4\]")
    config = tmp_path / "good" / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LOHA"'))
    refused(Net(), "'peft_type' must be LORA")
