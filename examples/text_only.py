"""DoRA on a causal language model: `python examples/text_only.py [MODEL]`.

MODEL is a hub id or directory. The default is a tiny random Llama, so that the example runs without a network. The
parts of a language model alone are `language`, `lm_head` and `embeddings`, whatever its family calls them.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import mmdora

if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
else:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)

# Table 6 of the DoRA paper: directions in q, k and v only, magnitudes in every linear layer.
report = mmdora.inject_adapters(
    model,
    {
        "language": {
            "method": "dora",
            "rank": 8,
            "targets": ["q_proj", "k_proj", "v_proj"],
            "magnitude_targets": "all-linear",
        },
        "lm_head": {"method": "full"},  # the head of the random model is untrained; remove this line for a real one
    },
)
print(f"trainable params: {report.trainable:,} of {report.total:,} ({report.percent:.1f}%)")

text = torch.arange(3, 35).view(2, 16)  # two sequences to memorise
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model.train()
for step in range(60):
    loss = model(input_ids=text, labels=text).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 or step == 59:
        print(f"step {step:2d}  loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    before = model(input_ids=text).logits
    with mmdora.disable_adapters(model):
        base = model(input_ids=text, labels=text).loss.item()
    print(f"loss of the base model: {base:.3f}")
    difference = (mmdora.merge_adapters(model)(input_ids=text).logits - before).abs().max().item()
print(f"merged: largest logit difference {difference:.1e}")
