"""The imports of the server of tests/processes.py. They must compute nothing and start no thread."""

from importlib import import_module

MODULES = (
    "deepspeed",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava_onevision.modeling_llava_onevision",
    "mmdora.apps.merge",
    "mmdora.apps.train",
    "mmdora.cli.app",
)
for name in MODULES:
    import_module(name)
