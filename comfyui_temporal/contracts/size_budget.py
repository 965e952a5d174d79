"""Size limits of everything that passes through Temporal: bytes and counts, each with its reason, in one place.

The server's limits (1.32, its defaults):

    one payload                 2 MiB    more: the workflow task always fails (`PayloadsTooLarge`), or the start is
                                         refused
    one gRPC message            4 MiB    all commands of a workflow task, or one activity's result
    one history                50 MiB or 51,200 events: the run is terminated

Our limits are well below, because a run that exceeds one of those is stuck with an open hold and job (pitfalls 6, 39,
43). `tests/workflows/test_size_budget.py` fills every part to its maximum and adds them up. Sizes are bytes of JSON, as
a payload holds it: a control character takes six bytes, a quotation mark two.
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel

KIB: Final = 1024
SERVER_PAYLOAD_BYTES: Final = 2 * 1024 * KIB
PAYLOAD_BYTES: Final = 1024 * KIB
"""Any one payload of ours: a continuation, an argument, a result, a marker, an answer to a query."""

# Lists of a dataset's files. They are in object storage; a run holds address, checksum and counts.
MAX_FILE_LIST_BYTES: Final = 4 * 1024 * KIB
"""A list from a caller: 10,000 files with paths of 400 characters."""
MAX_INLINE_LIST_BYTES: Final = 128 * KIB
"""The gateway stores a longer list in object storage. Never lower it: lists that release 0.1.0 accepted in a body of
128 KiB must stay the same input, so that a repeat of it is the same task."""
MAX_SENT_LIST_BYTES: Final = 6 * 1024 * KIB
"""The list in a training request, including checksums: a service accepts bodies of 8 MiB."""
MAX_START_BYTES: Final = SERVER_PAYLOAD_BYTES - 4 * KIB
"""An input that a client passes to Temporal itself. The rest is for what Temporal and encryption add."""
ENCRYPTION_BYTES: Final = 256
"""What encryption adds to a payload at most: nonce, tag, the id of the key, the metadata of both payloads."""

# Input from callers.
MAX_PROMPT_BYTES: Final = 16 * KIB
MAX_EXTRAS_BYTES: Final = 32 * KIB
MAX_STORED_INPUT_BYTES: Final = 256 * KIB
MAX_IMAGES: Final = 16
"""Images that one task may ask for."""
MAX_LORAS: Final = 8
"""LoRAs of an image. A run holds the address of each."""

# What a run keeps until it can be used.
MAX_SIGNAL_BYTES: Final = 256 * KIB
"""A callback as a signal. A larger one is counted and not read."""
SMALL_SIGNAL_BYTES: Final = 8 * KIB
MAX_READ_BYTES: Final = 2 * 1024 * KIB
"""The large callbacks in one run. Reading eight of the largest takes a quarter of a second, again with each replay. A
workflow task that takes two seconds fails as a deadlock, again and again."""
MAX_INBOX: Final = 256
MAX_INBOX_BYTES: Final = 160 * KIB
"""One delivery at its largest (64 addresses) and some dozen other messages."""
MAX_UNWRITTEN: Final = 256
"""Facts that wait for the task store. Beyond it the oldest progress is dropped."""
MAX_UNWRITTEN_BYTES: Final = 256 * KIB
"""About 600 ordinary facts: two weeks of renewals while the store is away."""
MAX_EXCEPTIONS: Final = 64
MAX_EXCEPTIONS_BYTES: Final = 64 * KIB
"""Beyond it the first record of each code is kept, and the others are counted."""
MAX_KEPT_HOLDS: Final = 64
"""Holds that are over and still published. Older ones are only counted."""
MAX_ATTEMPTS: Final = 16
MAX_TABLE_ENTRIES: Final = 256
"""Extras and base models in the price table, which each run holds."""

# What is kept of another party's answer.
MAX_MESSAGE_BYTES: Final = 2 * KIB
MAX_ADDRESS_BYTES: Final = 2 * KIB
MAX_RESULT_URLS: Final = 64
MAX_OPTIONS: Final = 8
"""An estimate's options: there are two priorities."""
MAX_METRICS: Final = 64
"""Metrics of a trained model."""
MAX_NAME_BYTES: Final = 128
"""A word that another party chooses: an error's code, a metric's name, a version."""
MAX_POOLS: Final = 64
"""The list of GPUs: the types that decide whether the requested one exists."""
MAX_LEDGER_BYTES: Final = 256 * KIB
"""A task's ledger: about 1,500 entries."""


def json_bytes(value: BaseModel) -> int:
    """How many bytes a model takes in a payload."""
    return len(value.model_dump_json().encode())
