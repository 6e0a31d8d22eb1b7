"""DoRA in your own training loop: `python examples/own_loop.py [out]`.

No YAML and no Trainer: any `nn.Module` and any optimizer will do. The shipped tiny model is trained to answer "7" to
one question about a grey image. Replace the model, the data and the loss by your own.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import mmdora
import mmdora.models  # registers mmdora's model classes; the tiny model has an OpenCLIP tower
from mmdora.core.config_files import find_path

OUT = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
base = find_path("assets/tiny-llava")
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(base)

report = mmdora.inject_adapters(
    model,
    {
        "vision": {"method": "dora", "rank": 4, "alpha": 8},
        "projector": {"method": "full"},
        "language": {"method": "dora", "rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    },
)
print(f"trainable params: {report.trainable:,} of {report.total:,} ({report.percent:.1f}%)")

image = Image.new("RGB", (96, 96), "grey")
text = "<s>USER: <image>\nWhat is the number? ASSISTANT: 7</s>"
batch = processor(text=text, images=image, return_tensors="pt", add_special_tokens=False)
labels = batch["input_ids"].clone()
labels[:, :-2] = -100  # train on the answer and its end-of-sequence token only

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
model.train()
for step in range(20):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0 or step == 19:
        print(f"step {step:2d}  loss {loss.item():.3f}")

mmdora.save_adapter(model, OUT)  # PeftModel.from_pretrained(base_model, OUT) computes the same
reloaded = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
mmdora.load_adapter(reloaded, OUT)
merged = mmdora.merge_adapters(reloaded)  # a plain model without adapters
with torch.no_grad():
    difference = (merged.eval()(**batch).logits - model.eval()(**batch).logits).abs().max().item()
print(f"saved to {OUT}, reloaded and merged: largest logit difference {difference:.1e}")
