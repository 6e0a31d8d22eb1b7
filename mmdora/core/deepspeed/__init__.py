"""Everything that mmdora knows about DeepSpeed and ZeRO-3.

    config.py            the JSON configs, how a process starts DeepSpeed, whether ZeRO-3 is on
    parameters.py        parameters that ZeRO-3 partitions, and the fp32 copies of half-precision ones
    optimizer_state.py   what DeepSpeed's engine and optimizers hold; imported on its own, because it imports torch

Importing this package imports neither torch nor DeepSpeed, so the command line can check `training.deepspeed` first.
"""

from mmdora.core.deepspeed.config import (
    is_zero3_enabled,
    load_unpartitioned,
    offloads_to_nvme,
    prepare_deepspeed_config,
    prepare_process,
    quiet_deepspeed,
    read_deepspeed_config,
    zero_stage,
)
from mmdora.core.deepspeed.parameters import (
    as_one_call,
    compute_device,
    full_parameter,
    gather_in_forward,
    gather_shards,
    gathered,
    is_in_memory,
    is_partitioned,
    local_shard,
    numel,
    partition_model,
    release_gathered,
    shard_of,
    true_shape,
)

__all__ = [
    "as_one_call",
    "compute_device",
    "full_parameter",
    "gather_in_forward",
    "gather_shards",
    "gathered",
    "is_in_memory",
    "is_partitioned",
    "is_zero3_enabled",
    "load_unpartitioned",
    "local_shard",
    "numel",
    "offloads_to_nvme",
    "partition_model",
    "prepare_deepspeed_config",
    "prepare_process",
    "quiet_deepspeed",
    "read_deepspeed_config",
    "release_gathered",
    "shard_of",
    "true_shape",
    "zero_stage",
]
