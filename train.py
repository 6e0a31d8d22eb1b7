"""What `torchrun` and `deepspeed` launch: `train.py CONFIG …` is `mmdora train CONFIG …`."""

import sys

from mmdora.cli import main

if __name__ == "__main__":
    # The deepspeed launcher adds --local_rank=N; LOCAL_RANK in the environment says the same.
    main(["train", *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))])
