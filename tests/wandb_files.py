"""What Weights & Biases recorded offline: its file holds protocol buffers in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32 * 1024  # bytes: of the file (its magic) and of a piece; of a block


def records(path: Path) -> list[Any]:
    """The records of a `run-*.wandb` file."""
    from wandb.proto import wandb_internal_pb2 as messages

    data, at, whole, found = path.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + HEADER])
        whole += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # a whole one, or the last piece of one
            found.append(messages.Record.FromString(whole))
            whole = b""
    return found


def history(found: list[Any]) -> list[dict[str, Any]]:
    """What was logged, call by call."""
    rows = [record.history.item for record in found if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
