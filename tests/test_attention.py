"""Explicit attention equals nn.MultiheadAttention, and OpenCLIP towers convert to equal CLIP towers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoModel

from mmdora.models.attention import (
    ExplicitAttention,
    convert_attention,
    explicit_attention,
    explicit_state_dict,
    multihead_state_dict,
    restore_multihead,
)
from mmdora.models.vision_encoders import VISION_ENCODERS
from mmdora.models.vision_encoders.open_clip import OpenCLIPVisionModel

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"width": 48, "layers": 2, "head_width": 16, "patch_size": 8, "image_size": 32},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [None, "bool", "float", "padding"])
@pytest.mark.parametrize("bias", [True, False])
def test_explicit_attention_equals_multihead_attention(batch_first, masked, bias):
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(32, 4, batch_first=batch_first, bias=bias).eval()
    explicit = ExplicitAttention.from_multihead(reference)
    x = torch.randn(2, 5, 32) if batch_first else torch.randn(5, 2, 32)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    masks = {
        None: {},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.zeros(5, 5).masked_fill(causal, float("-inf"))},
        "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    }[masked]
    expected, _ = reference(x, x, x, need_weights=False, **masks)
    actual, _ = explicit(x, x, x, need_weights=False, **masks)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def test_cross_attention_with_different_widths():
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(32, 4, kdim=24, vdim=40, batch_first=True).eval()
    explicit = ExplicitAttention.from_multihead(reference)
    q, k, v = torch.randn(2, 3, 32), torch.randn(2, 6, 24), torch.randn(2, 6, 40)
    torch.testing.assert_close(explicit(q, k, v)[0], reference(q, k, v, need_weights=False)[0], atol=1e-6, rtol=1e-5)


def test_checkpoints_convert_both_ways():
    state = nn.TransformerEncoderLayer(32, 4).state_dict()
    back = multihead_state_dict(explicit_state_dict(state))
    assert back.keys() == state.keys()
    for key in state:
        assert torch.equal(back[key], state[key])


def test_explicit_attention_changes_no_zero_shot_logits_of_open_clip(tmp_path):
    import open_clip

    text_cfg = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    (tmp_path / "tiny-zero-shot.json").write_text(json.dumps({**TINY, "text_cfg": text_cfg}))
    open_clip.add_model_config(tmp_path / "tiny-zero-shot.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-zero-shot", device="cpu").eval()
    images = torch.randn(2, 3, 32, 32)
    text = torch.randint(1, 64, (2, 8))
    with torch.no_grad():
        before = model.encode_image(images) @ model.encode_text(text).T
        assert explicit_attention(model) == 4  # two layers each in the image and the text tower
        after = model.encode_image(images) @ model.encode_text(text).T
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_a_tower_returns_all_hidden_states_reloads_and_converts_to_clip(tmp_path):
    torch.manual_seed(0)
    tower: OpenCLIPVisionModel = VISION_ENCODERS["open_clip"]("tiny", model_config=TINY).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        out = tower(x)
        tower.save_pretrained(tmp_path)
        reloaded = AutoModel.from_pretrained(tmp_path).eval()(x)
        clip = tower.to_clip().eval()(x, output_hidden_states=True)
    assert len(out.hidden_states) == TINY["vision_cfg"]["layers"] + 1
    assert torch.equal(reloaded.last_hidden_state, out.last_hidden_state)
    for state, converted in zip(out.hidden_states, clip.hidden_states, strict=True):
        torch.testing.assert_close(converted, state, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(clip.pooler_output, out.pooler_output, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    tower = VISION_ENCODERS["open_clip"]("tiny", model_config=TINY).train()
    x = torch.randn(2, 3, 32, 32)

    def gradient():
        tower.zero_grad()
        tower(x).last_hidden_state.square().mean().backward()
        return tower.visual.transformer.resblocks[0].attn.q_proj.weight.grad.clone()

    plain = gradient()
    tower.gradient_checkpointing_enable()
    assert tower.gradient_checkpointing
    torch.testing.assert_close(gradient(), plain)


def test_an_unknown_architecture_is_an_error():
    with pytest.raises(ValueError, match="open_clip has no architecture 'ViT-Z'"):
        VISION_ENCODERS["open_clip"]("ViT-Z")


@pytest.mark.parametrize(
    "settings", [{}, {"bias": False}, {"kdim": 24, "vdim": 40}, {"batch_first": True}, {"dropout": 0.1}]
)
def test_an_explicit_attention_becomes_multihead_attention_again(settings):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, **settings).eval()
    names, state = list(attention.state_dict()), attention.state_dict()
    widths = (32, settings.get("kdim", 32), settings.get("vdim", 32))
    inputs = [torch.randn(5, 2, width) for width in widths]
    before = attention(*inputs, need_weights=False)[0]
    convert_attention(attention, ExplicitAttention.from_multihead(attention))
    assert type(attention) is ExplicitAttention
    assert not attention.training
    restore_multihead(attention)
    assert type(attention) is nn.MultiheadAttention
    assert list(attention.state_dict()) == names
    assert all(torch.equal(attention.state_dict()[name], state[name]) for name in names)
    assert torch.equal(attention(*inputs, need_weights=False)[0], before)
    assert attention.dropout == settings.get("dropout", 0.0)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_explicit_attention_takes_inputs_without_a_batch(heads, batch_first):
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(32, heads, batch_first=batch_first).eval()
    explicit = ExplicitAttention.from_multihead(reference)
    x, padding = torch.randn(5, 32), torch.tensor([False, False, False, True, False])
    expected = reference(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(explicit(x, x, x, key_padding_mask=padding)[0], expected, atol=1e-6, rtol=1e-5)


def test_explicit_attention_works_in_torchs_transformer_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        before = layer(x)
        assert explicit_attention(layer) == 1
        torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=1e-5)


def test_an_attention_that_two_modules_share_stays_shared():
    attention = nn.MultiheadAttention(32, 4)
    net = nn.ModuleList([nn.Sequential(attention), nn.Sequential(attention)])
    assert explicit_attention(net) == 1
    assert net[0][0] is net[1][0]


def test_an_attention_with_another_forward_is_not_made_explicit():
    class Other(nn.MultiheadAttention):
        def forward(self, query):
            return 2 * query

    with pytest.raises(ValueError, match="Other has a forward of its own"):
        ExplicitAttention.from_multihead(Other(32, 4))
