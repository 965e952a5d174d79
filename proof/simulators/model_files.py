"""Model files: small, but real safetensors (8 bytes of header length, a JSON header, the tensors)."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

_ROWS, _COLUMNS = 16, 16


def write_weights(path: Path, *, seed: str, metadata: dict[str, str]) -> None:
    """Write one 16 × 16 float32 tensor, the same for the same seed; the file appears whole or not at all."""
    source = random.Random(seed)  # noqa: S311 - weights, no secret
    count = _ROWS * _COLUMNS
    data = struct.pack(f"<{count}f", *(source.gauss(0.0, 0.02) for _ in range(count)))
    tensor = {"dtype": "F32", "shape": [_ROWS, _COLUMNS], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": metadata, "lora.weight": tensor}).encode()
    header += b" " * (-len(header) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(struct.pack("<Q", len(header)) + header + data)
    partial.replace(path)
