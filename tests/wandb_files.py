"""Read the files that Weights & Biases writes offline: protocol buffers in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32 * 1024  # bytes; the header of the file and that of a chunk have the same size


def records(path: Path) -> list[Any]:
    """Return the records of a `run-*.wandb` file."""
    from wandb.proto import wandb_internal_pb2 as messages

    data, position, record, decoded = path.read_bytes(), HEADER, b"", []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + HEADER])
        record += data[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if kind in (1, 4):  # a complete record, or the last chunk of one
            decoded.append(messages.Record.FromString(record))
            record = b""
    return decoded


def history(records: list[Any]) -> list[dict[str, Any]]:
    """Return the logged values, one dict per call."""
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
