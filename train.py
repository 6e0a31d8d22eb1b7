"""Launcher for `torchrun` and `deepspeed`: `train.py CONFIG ...` runs `mmdora train CONFIG ...`."""

import sys

from mmdora.cli import main

if __name__ == "__main__":
    # The deepspeed launcher adds --local_rank=N, which the LOCAL_RANK environment variable repeats.
    main(["train", *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))])
