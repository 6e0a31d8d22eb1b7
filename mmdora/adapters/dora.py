"""DoRA (arXiv 2402.09353): LoRA moves the weight's direction, a vector of its own scales each output row."""

from mmdora.adapters.base import ADAPTERS
from mmdora.adapters.lora import LoRA


@ADAPTERS.register("dora")
class DoRA(LoRA):
    use_dora = True
