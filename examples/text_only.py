"""DoRA on a language model alone: any causal LM, by the same registry. `python examples/text_only.py [MODEL]`

MODEL is a hub id or a directory; without one a tiny random Llama takes its place, so that the example runs anywhere.
Without a config of its own family the root `""` is the part, and `all-linear` leaves the output head alone.
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

# Table 6 of the DoRA paper: directions in q, k and v, magnitudes everywhere.
report = mmdora.inject_adapters(
    model,
    {
        "": {"method": "dora", "rank": 8, "targets": ["q_proj", "k_proj", "v_proj"], "magnitude_targets": "all-linear"},
        "lm_head": {"method": "full"},  # the random model's head knows nothing; leave it out for a real one
    },
)
print(f"{report.trainable:,} of {report.total:,} parameters are trained ({report.percent:.1f}%)")

text = torch.arange(3, 35).view(2, 16)  # two sentences to learn by heart
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
    print(f"the base model's loss: {base:.3f}")
    difference = (mmdora.merge_adapters(model)(input_ids=text).logits - before).abs().max().item()
print(f"merged: largest logit difference {difference:.1e}")
