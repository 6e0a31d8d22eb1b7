"""DoRA on a speech model: `python examples/speech.py [MODEL]`.

MODEL is a hub id or directory of a Whisper model (`openai/whisper-small`). The default is a tiny random Whisper, so
that the example runs without a network. Two tones stand in for recordings, and token ids for their transcripts.
"""

from __future__ import annotations

import math
import sys

import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import mmdora

if len(sys.argv) > 1:
    model = WhisperForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
else:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=60, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
        max_source_positions=100,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)

# Parts can be dotted module paths. The encoder's two convolutions take adapters just as its linear layers do.
report = mmdora.inject_adapters(
    model,
    {
        "model.encoder": {"method": "dora", "rank": 8, "targets": r"conv\d|layers\..*(proj|fc\d)"},
        "model.decoder": {"method": "dora", "rank": 8, "targets": "all-linear", "dropout": 0.05},
        "proj_out": {"method": "full"},  # the head of the random model is untrained; remove this line for a real one
    },
)
print(f"trainable params: {report.trainable:,} of {report.total:,} ({report.percent:.1f}%)")

seconds_read = model.config.max_source_positions // 50  # 30 for the published models, 2 for the tiny one
features = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins, chunk_length=seconds_read)
seconds = torch.arange(16000) / 16000
tones = [(hertz * 2 * math.pi * seconds).sin().numpy() for hertz in (220, 880)]
audio = features(tones, sampling_rate=16000, return_tensors="pt").input_features  # [batch, mel bins, frames]
labels = torch.tensor([[7, 8, 9, 2], [11, 12, 13, 2]])

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
model.train()
for step in range(30):
    loss = model(input_features=audio, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == 29:
        print(f"step {step:2d}  loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    before = model(input_features=audio, labels=labels).logits
    merged = mmdora.merge_adapters(model)
    difference = (merged(input_features=audio, labels=labels).logits - before).abs().max().item()
print(f"merged: largest logit difference {difference:.1e}")
